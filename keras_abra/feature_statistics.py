"""Channel statistics of a feature map, and the map moved to other statistics. Pure functions, float32 inside."""

from keras import ops

EPSILON = 1e-6  # inside the square root of sigma, as in DSU (lixiaotong97/DSU)
LOWEST, HIGHEST = 0.1, 10.0  # bounds of a perturbed sigma, in units of the sample's own


def feature_statistics(inputs):
    """Mean and standard deviation of every channel of every sample over its positions.

    Args:
        inputs: feature map `(batch, height, width, channels)`.

    Returns:
        `(mu, sigma)`, each `(batch, channels)` in float32; `sigma = sqrt(variance + 1e-6)` with the biased variance.
    """
    inputs = ops.cast(inputs, "float32")
    mu = ops.mean(inputs, axis=(1, 2), keepdims=True)
    variance = ops.mean(ops.square(inputs - mu), axis=(1, 2))
    return ops.squeeze(mu, axis=(1, 2)), ops.sqrt(variance + EPSILON)


def shift_statistics(inputs, offsets):
    """Moves each sample's channel means and standard deviations by the given offsets.

    With `mu`, `sigma` the statistics of the sample and `offsets = (d_mu, d_sigma)`:
    `beta = mu + d_mu`, `gamma = clip(sigma + d_sigma, 0.1 sigma, 10 sigma)`, and the result is
    `inputs * (gamma / sigma) + (beta - mu * gamma / sigma)`: one multiply-add over the map. Zero offsets give the
    input back exactly, and still have a gradient.

    Args:
        inputs: feature map `(batch, height, width, channels)`, of any float type.
        offsets: `(batch, 2 * channels)` in float32, those of the means first; in the units of the statistics.

    Returns:
        `(outputs, statistics)`: the map in the type of `inputs`, and `(batch, 2 * channels)` the statistics it had.
    """
    mu, sigma = feature_statistics(inputs)
    d_mu, d_sigma = ops.split(offsets, 2, axis=-1)
    ratio = ops.clip(sigma + d_sigma, LOWEST * sigma, HIGHEST * sigma) / sigma
    bias = mu + d_mu - mu * ratio
    outputs = ops.cast(inputs, "float32") * ratio[:, None, None, :] + bias[:, None, None, :]
    return ops.cast(outputs, inputs.dtype), ops.concatenate([mu, sigma], axis=-1)
