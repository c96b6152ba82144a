import keras
from keras import ops

from contenders.gradient_reversal import reverse_gradient
from contenders.restyle import restyle
from keras_abra.feature_statistics import EPSILON, feature_statistics


class AdversaryBySGD(keras.optimizers.AdamW):
    """AdamW for the network, and for the learned spreads of `AdvStyle` plain gradient steps without decay.

    Of the two published trainers one has momentum 0.9 and decay 5e-4 for the spreads too, the other takes three such
    plain steps for one of the network; both lower the rate on a cosine. This one takes a single step of constant rate.

    Args:
        adversary_rate: of these. Default: 1e-3, the rate at which AdvStyle's published training begins.
        *args, **kwargs: of `keras.optimizers.AdamW`. Its `exclude_from_weight_decay` is to name `ADVERSARY`.
    """

    ADVERSARY = "spread_change"

    def __init__(self, *args, adversary_rate=1e-3, **kwargs):
        super().__init__(*args, **kwargs)
        self.adversary_rate = adversary_rate

    def update_step(self, gradient, variable, learning_rate):
        if self.ADVERSARY in variable.name:  # TensorFlow gives its own variables, which have no path
            self.assign_sub(variable, self.adversary_rate * gradient)
        else:
            super().update_step(gradient, variable, learning_rate)


class AdvStyle(keras.layers.Layer):
    """Draws new channel statistics whose spread is learned, by gradient reversal, to raise the loss.

        mu' = mu + z_1 * a_mu,   sigma' = sigma + z_2 * a_sigma,   z standard normal,

    with `a` one weight for each channel and statistic, which climbs the loss that all other weights descend. As in the
    published code, a third of the mini-batches stays as it is, a third is perturbed so, and a third by DSU (`a` the
    spread over the mini-batch); `a` starts at the spread of the first mini-batch. Zhang et al., "Adversarial Style
    Augmentation for Domain Generalization" (arXiv 2301.12643); YBZh/AdvStyle.

    What the optimizer sees is the difference to that start. Train it with `AdversaryBySGD`: steps of Adam
    have one size whatever the weight and the gradient, and at a rate for training from scratch are mostly noise.

    Args:
        weight: factor of the reversed gradient. Default: 10, that of their experiments; the class's own default is 1.
        seed: integer, for reproducible draws.
    """

    def __init__(self, weight=10.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        shape = (2, input_shape[-1])
        self.change = self.add_weight(shape=shape, initializer="zeros", dtype="float32", name=AdversaryBySGD.ADVERSARY)
        self.start = self.add_weight(
            shape=shape, initializer="zeros", dtype="float32", trainable=False, name="first_spread"
        )
        self.started = self.add_weight(shape=(), initializer="zeros", dtype="float32", trainable=False, name="started")

    def call(self, inputs, training=None):
        if not training:
            return inputs
        draws = {"dtype": "float32", "seed": self.seed_generator}
        noise = keras.random.normal((2, ops.shape(inputs)[0], inputs.shape[-1]), **draws)
        return self.perturb(inputs, noise, keras.random.uniform((), **draws))

    def compute_output_shape(self, input_shape):
        return input_shape

    def perturb(self, inputs, noise, chance):
        """The map for given draws: `noise` `(2, batch, channels)`, `chance` in [0, 1)."""
        statistics = feature_statistics(inputs)
        spread = ops.stack([_spread(s) for s in statistics])
        known, first = ops.convert_to_tensor(self.started), ops.convert_to_tensor(self.start)
        start = ops.where(known > 0, first, ops.stop_gradient(spread))
        self.start.assign(start)
        self.started.assign(ops.ones(()))
        learned = start + reverse_gradient(ops.convert_to_tensor(self.change), self.weight)
        scale = ops.where(chance < 2 / 3, learned, spread) * ops.cast(chance >= 1 / 3, "float32")
        moved = [s + noise[i] * scale[i] for i, s in enumerate(statistics)]
        return restyle(inputs, *statistics, *moved)


def _spread(rows):
    """Standard deviation of each column over the mini-batch, ddof 1."""
    count = ops.maximum(ops.cast(ops.shape(rows)[0], "float32") - 1.0, 1.0)
    squares = ops.sum(ops.square(rows - ops.mean(rows, axis=0, keepdims=True)), axis=0)
    return ops.sqrt(squares / count + EPSILON)
