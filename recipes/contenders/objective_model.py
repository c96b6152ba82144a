import keras
from keras import ops

from keras_abra.losses import softmax_cross_entropy


class ObjectiveModel(keras.Model):
    """A network trained by an objective that sees more than labels: embeddings, and the experiment of each sample.

    Plain `fit` on every backend: in training the inputs are `{"image": ..., "experiment": int (batch,)}`, as
    `read_records(experiment_ids=True)` gives them, and the model's `compute_loss` hands all to the objective.
    `evaluate` and `predict` take images, or the same dict, and are those of the network.

    Args:
        network: Functional `keras.Model`, images to `(logits, extra)`, `extra` what the objective takes besides:
            embeddings `(batch, dim)` or cosines.
        objective: `keras.layers.Layer` with all its weights made, called as `objective(logits, extra, labels,
            experiments)`; gives a scalar. Its state, if any, moves in training only.
    """

    def __init__(self, network, objective, **kwargs):
        super().__init__(**kwargs)
        self.network, self.objective = network, objective
        self.built = True

    def build(self, input_shape=None):
        self.built = True

    def call(self, inputs, training=None):
        image = inputs["image"] if isinstance(inputs, dict) else inputs
        logits, extra = self.network(image, training=training)
        return (logits, extra) if training else logits

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, tuple | list):
            return ops.mean(softmax_cross_entropy(y, y_pred))
        experiments = x["experiment"] if isinstance(x, dict) else None
        loss = self.objective(*y_pred, y, experiments)
        return loss + sum((ops.sum(penalty) for penalty in self.losses), 0.0)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logits = y_pred[0] if isinstance(y_pred, tuple | list) else y_pred
        return super().compute_metrics(x, y, logits, sample_weight=sample_weight)
