import keras
from keras import ops

from contenders.restyle import restyle
from keras_abra.feature_statistics import feature_statistics


class CorrelatedStyleUncertainty(keras.layers.Layer):
    """Draws new channel statistics with the covariance that the mini-batch shows, in training (CSU).

        mu' = mu + b z_1 C_mu^(1/2),   sigma' = sigma + b z_2 C_sigma^(1/2),   b ~ Beta(alpha, alpha) for each sample,

    `z` standard normal, `C` the covariance over the mini-batch (divided by its size), and the symmetric root taken from
    an eigendecomposition whose vectors are constants to the gradient. Zhang et al., "Domain Generalization with
    Correlated Style Uncertainty", WACV 2024 (arXiv 2212.09950) and its code. The cost is that of an eigendecomposition
    of size channels.

    Args:
        probability: chance that a mini-batch is perturbed. Default: theirs, 0.5.
        alpha: of the Beta distribution. Default: theirs, 0.3.
        seed: integer, for reproducible draws.
    """

    def __init__(self, probability=0.5, alpha=0.3, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.probability, self.alpha = probability, alpha
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=None):
        if not training:
            return inputs
        batch, channels = ops.shape(inputs)[0], inputs.shape[-1]
        draws = {"dtype": "float32", "seed": self.seed_generator}
        strength = keras.random.beta((batch, 1), self.alpha, self.alpha, **draws)
        noise = [keras.random.normal((batch, channels), **draws) for _ in range(2)]
        active = ops.cast(keras.random.uniform((), **draws) < self.probability, "float32")
        return self.perturb(inputs, active * strength, *noise)

    def compute_output_shape(self, input_shape):
        return input_shape

    def perturb(self, inputs, strength, mean_noise, deviation_noise):
        """The map for given draws: `strength` `(batch, 1)`, noises `(batch, channels)`."""
        mean, deviation = feature_statistics(inputs)
        moved = [
            statistic + strength * ops.matmul(noise, covariance_root(statistic))
            for statistic, noise in ((mean, mean_noise), (deviation, deviation_noise))
        ]
        return restyle(inputs, mean, deviation, *moved)


def covariance_root(rows):
    """Symmetric root of the covariance of `rows` `(batch, channels)` over the mini-batch, divided by its size."""
    centred = rows - ops.mean(rows, axis=0, keepdims=True)
    covariance = ops.matmul(ops.transpose(centred), centred) / ops.cast(ops.shape(rows)[0], "float32")
    channels = rows.shape[-1]
    identity = ops.eye(channels, dtype="float32")
    symmetric = channels * ops.stop_gradient(covariance) + 1e-6 * identity
    _, vectors = ops.eigh(ops.where(ops.all(ops.isfinite(symmetric)), symmetric, identity))  # which fails at NaN
    vectors = ops.stop_gradient(vectors)
    values = ops.sum(vectors * ops.matmul(covariance, vectors), axis=0)
    return ops.matmul(vectors * ops.sqrt(ops.maximum(values, 1e-12)), ops.transpose(vectors))
