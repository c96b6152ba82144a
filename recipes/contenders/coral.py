import keras
from keras import ops

from contenders.experiment_risks import one_hot
from keras_abra.losses import softmax_cross_entropy


class CORAL(keras.layers.Layer):
    """Matches first and second moments of the embeddings of experiments, as an objective of `ObjectiveModel`.

        L = cross-entropy + weight * mean over pairs (e, f) of [ mean (m_e - m_f)^2 + mean (C_e - C_f)^2 ]

    `m_e` mean and `C_e` covariance (ddof 1) of the embeddings of experiment e in the mini-batch; experiments with fewer
    than two samples are left out. Sun & Saenko, "Deep CORAL" (2016), in the form of DomainBed's and WILDS's.

    Args:
        num_experiments: int.
        weight: of the penalty. Default: DomainBed's, 1; WILDS's first release has 0.1.
    """

    def __init__(self, num_experiments, weight=1.0, **kwargs):
        super().__init__(**kwargs)
        self.num_experiments, self.weight = num_experiments, weight
        self.built = True

    def call(self, logits, embedding, labels, experiments):
        loss = ops.mean(softmax_cross_entropy(labels, logits))
        return loss + self.weight * coral_penalty(embedding, experiments, self.num_experiments)


def coral_penalty(embedding, experiments, num_experiments):
    """The mean over pairs of experiments, scalar; 0 with fewer than two experiments of two samples."""
    embedding = ops.cast(embedding, "float32")
    members = one_hot(experiments, num_experiments)
    counts = ops.sum(members, axis=0)
    means = ops.matmul(ops.transpose(members), embedding) / ops.maximum(counts, 1.0)[:, None]
    centred = embedding - ops.matmul(members, means)
    products = ops.einsum("be,bi,bj->eij", members, centred, centred)
    covariances = products / ops.maximum(counts - 1.0, 1.0)[:, None, None]
    dim = embedding.shape[-1]
    distance = _distances(means) / dim + _distances(ops.reshape(covariances, (num_experiments, dim * dim))) / dim**2
    usable = ops.cast(counts > 1, "float32")
    pairs = usable[:, None] * usable[None, :] * (1.0 - ops.eye(num_experiments, dtype="float32"))
    return ops.sum(distance * pairs) / ops.maximum(ops.sum(pairs), 1.0)


def _distances(rows):
    """Squared distance of every two rows."""
    squares = ops.sum(ops.square(rows), axis=-1)
    return ops.maximum(squares[:, None] + squares[None, :] - 2.0 * ops.matmul(rows, ops.transpose(rows)), 0.0)
