import keras
from keras import ops

from keras_abra import backend
from keras_abra.losses import softmax_cross_entropy
from keras_abra.perturbed_norms import replace_norms, twin


class AdvBN(keras.Model):
    """Trains on clean features and on features whose batch statistics an adversary has scaled (AdvBN).

        z' = relu((z - m) * s + m * u),   m the mean of each channel over mini-batch and positions,

    with `u`, `s` `(channels,)` shared by the mini-batch, sought by `steps` sign steps from 1 within
    `[1 - radius, 1 + radius]`, in inference mode of the adversarial batch normalizations;
    `L = cross-entropy(clean) + cross-entropy(adversarial)`. Layers behind the cut have a second set of batch
    normalizations for the adversarial branch; evaluation takes the clean ones. Shu et al., "Encoding Robustness to
    Image Style via Adversarial Feature Perturbations", NeurIPS 2021; azshue/AdvBN. Other than there, the network is
    trained from scratch, the part before the cut too.

    Args:
        prefix: Functional `keras.Model`, images to a feature map behind a ReLU.
        suffix: Functional `keras.Model`, from there to logits.
        steps, step_size, radius: of the search. Defaults: theirs, 6, 0.2 and 1.1.
    """

    def __init__(self, prefix, suffix, steps=6, step_size=0.2, radius=1.1, **kwargs):
        super().__init__(**kwargs)
        self.prefix, self.suffix = prefix, suffix
        self.adversarial = replace_norms(suffix, twin)
        self.steps, self.step_size, self.radius = steps, step_size, radius
        self.built = True

    def build(self, input_shape=None):
        self.built = True

    def call(self, inputs, training=None):
        z = self.prefix(inputs, training=training)
        logits = self.suffix(z, training=training)
        return (logits, z) if training else logits

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, tuple | list):
            return ops.mean(softmax_cross_entropy(y, y_pred))
        logits, z = y_pred
        worst = scale_batch_statistics(z, *self.search(z, y))
        loss = ops.mean(softmax_cross_entropy(y, logits))
        loss += ops.mean(softmax_cross_entropy(y, self.adversarial(worst, training=True)))
        return loss + sum((ops.sum(penalty) for penalty in self.losses), 0.0)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logits = y_pred[0] if isinstance(y_pred, tuple | list) else y_pred
        return super().compute_metrics(x, y, logits, sample_weight=sample_weight)

    def search(self, z, labels):
        """The factors `[u, s]` that six sign steps find, each `(channels,)`."""
        z = ops.stop_gradient(z)
        factors = [ops.ones((z.shape[-1],)) for _ in range(2)]

        def loss(factors):
            logits = self.adversarial(scale_batch_statistics(z, *factors), training=False)
            return (ops.mean(softmax_cross_entropy(labels, logits)),), None

        for _ in range(self.steps):
            _, _, pullback = backend.linearize(loss, [factors])
            (slopes,) = pullback([ops.ones(())], [0])
            moved = [f + self.step_size * ops.sign(g) for f, g in zip(factors, slopes, strict=True)]
            factors = [ops.stop_gradient(ops.clip(f, 1 - self.radius, 1 + self.radius)) for f in moved]
        return factors


def scale_batch_statistics(z, mean_factor, deviation_factor):
    """`relu((z - m) * deviation_factor + m * mean_factor)`, `m` the mean of each channel over all but channels."""
    mean = ops.mean(z, axis=(0, 1, 2), keepdims=True)
    moved = (z - mean) * deviation_factor + mean * mean_factor
    return ops.where(moved >= 0, moved, 0.0)  # with a slope of 1 at 0, as torch.clamp: a rectified map begins there
