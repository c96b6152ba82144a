import keras
from keras import ops

from contenders.restyle import restyle
from keras_abra.feature_statistics import feature_statistics


class MixStyle(keras.layers.Layer):
    """Mixes each sample's channel statistics with those of another sample of the mini-batch, in training.

        mu' = l mu + (1 - l) mu_j,   sigma' = l sigma + (1 - l) sigma_j,   l ~ Beta(alpha, alpha) for each sample,

    j a random permutation of the mini-batch; statistics are constants to the gradient. Zhou et al., "Domain
    Generalization with MixStyle", ICLR 2021; KaiyangZhou/mixstyle-release (random mixing). The variance is the biased
    one there is in this repository, theirs is unbiased.

    Args:
        probability: chance that a mini-batch is mixed. Default: theirs, 0.5.
        alpha: of the Beta distribution. Default: the paper's, 0.1.
        seed: integer, for reproducible draws.
    """

    def __init__(self, probability=0.5, alpha=0.1, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.probability, self.alpha = probability, alpha
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=None):
        if not training:
            return inputs
        batch = ops.shape(inputs)[0]
        share = keras.random.beta((batch, 1), self.alpha, self.alpha, dtype="float32", seed=self.seed_generator)
        partner = ops.argsort(keras.random.uniform((batch,), dtype="float32", seed=self.seed_generator))
        chance = keras.random.uniform((), dtype="float32", seed=self.seed_generator)
        return self.mix(inputs, ops.where(chance < self.probability, share, 1.0), partner)

    def compute_output_shape(self, input_shape):
        return input_shape

    def mix(self, inputs, share, partner):
        """The map with `share` `(batch, 1)` of its own statistics, the rest from the samples `partner` `(batch,)`."""
        mean, deviation = (ops.stop_gradient(s) for s in feature_statistics(inputs))
        mixed = [share * s + (1.0 - share) * ops.take(s, partner, axis=0) for s in (mean, deviation)]
        return restyle(inputs, mean, deviation, *mixed)
