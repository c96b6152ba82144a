"""How far, and along which directions, feature statistics are uncertain. Pure functions, float32.

A perturbation `d` of the statistics `(batch, 2 * channels)` is linear in its coordinates: `d = coordinates * spread`
where every statistic moves by itself, `d = coordinates @ factors` where statistics move together. Each structure has
the same measure, `size(d)^2 = sum((d / spread)^2)` over the statistics that vary at all, so that one radius means the
same everywhere.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_abra import backend


class Uncertainty(NamedTuple):
    """The uncertainty of one feature map's statistics.

    Attributes:
        spread: `(1, 2 * channels)`, standard deviation of every statistic; 0 for those that do not vary.
        factors: `(rows, 2 * channels)`, directions whose squares sum to the squared spread; `None` if diagonal.
    """

    spread: Any
    factors: Any = None

    @property
    def coordinates(self):
        """Number of coordinates of a perturbation."""
        return ops.shape(self.spread)[-1] if self.factors is None else ops.shape(self.factors)[0]


def _varying(variance, mean):
    return ops.sqrt(ops.maximum(variance, 0.0)) > 1e-6 * (ops.abs(mean) + 1e-3)


def _spread(variance, mean):
    varies = _varying(ops.stop_gradient(variance), ops.stop_gradient(mean))
    return ops.where(varies, ops.sqrt(ops.where(varies, variance, 1.0)), 0.0)


def diagonal(statistics, synchronized=True):
    """Spread of each statistic over the mini-batch, ddof 1; a single sample has none.

    Args:
        statistics: `(batch, 2 * channels)`.
        synchronized: whether the mini-batch is that of all replicas, or the part of one replica.
    """
    total = backend.global_sum if synchronized else lambda value: value
    count = ops.maximum(total(ops.cast(ops.shape(statistics)[0], "float32")), 1.0)
    mean = total(ops.sum(statistics, axis=0, keepdims=True)) / count
    squares = total(ops.sum(ops.square(statistics - mean), axis=0, keepdims=True))
    return Uncertainty(_spread(squares / ops.maximum(count - 1.0, 1.0), mean))


def low_rank(statistics, synchronized=True):
    """Empirical covariance of all statistics over the mini-batch, as its centred rows over `sqrt(batch - 1)`.

    Args:
        statistics: `(batch, 2 * channels)`.
        synchronized: as for `diagonal`.
    """
    rows = backend.global_rows(statistics) if synchronized else statistics
    count = ops.cast(ops.shape(rows)[0], "float32")
    mean = ops.mean(rows, axis=0, keepdims=True)
    return _from_factors((rows - mean) / ops.sqrt(ops.maximum(count - 1.0, 1.0)), mean)


def domain(means, seen, groups):
    """Covariance of the statistics between experiments.

    Args:
        means: `(experiments, 2 * channels)`, running means of the statistics of each experiment.
        seen: `(experiments,)`, 1 where a row has been seen, else 0. Unseen rows do not count.
        groups: `(experiments, groups)` one-hot: rows are centred within their group (one group: over all).
    """
    members = groups * seen[:, None]
    sizes = ops.sum(members, axis=0)
    # Sums and no products of matrices, which on a GPU may have ten bits: of differences between experiments too few.
    centres = ops.sum(members[:, :, None] * means[:, None], axis=0) / ops.maximum(sizes, 1.0)[:, None]
    freedom = ops.sum(sizes) - ops.sum(ops.cast(sizes > 0, "float32"))
    own = ops.sum(groups[:, :, None] * centres[None], axis=1)
    factors = seen[:, None] * (means - own) / ops.sqrt(ops.maximum(freedom, 1.0))
    mean = ops.sum(means * seen[:, None], axis=0, keepdims=True) / ops.maximum(ops.sum(seen), 1.0)
    return _from_factors(ops.where(freedom > 0, factors, 0.0), mean)


def _from_factors(factors, mean):
    spread = _spread(ops.sum(ops.square(factors), axis=0, keepdims=True), mean)
    return Uncertainty(spread, ops.where(spread > 0, factors, 0.0))


def offsets(uncertainty, coordinates):
    """The perturbation `d` `(batch, 2 * channels)` that has these coordinates."""
    if uncertainty.factors is None:
        return coordinates * uncertainty.spread
    return ops.matmul(coordinates, uncertainty.factors)


def coordinate_gradient(uncertainty, gradient):
    """Gradient with respect to the coordinates, from the gradient with respect to the offsets."""
    if uncertainty.factors is None:
        return gradient * uncertainty.spread
    return ops.matmul(gradient, ops.transpose(uncertainty.factors))


def size(uncertainty, coordinates):
    """`size(d)` `(batch, 1)` of the perturbation that has these coordinates, in units of the spread."""
    spread = uncertainty.spread
    ratio = ops.where(spread > 0, offsets(uncertainty, coordinates) / ops.where(spread > 0, spread, 1.0), 0.0)
    squares = ops.sum(ops.square(ratio), axis=-1, keepdims=True)
    return ops.where(squares > 0, ops.sqrt(ops.where(squares > 0, squares, 1.0)), 0.0)  # with a slope of 0 at 0


def radius(uncertainty, rho):
    """`rho * sqrt(n)`, n statistics that vary: `rho = 1` is the expected size of standard normal coordinates."""
    return rho * ops.sqrt(ops.sum(ops.cast(uncertainty.spread > 0, "float32")))


def rescale(uncertainty, coordinates, length):
    """The same direction with `size(d) = length`; a direction without size is left as it is."""
    norm = size(uncertainty, coordinates)
    return coordinates * ops.where(norm > 0, length / ops.where(norm > 0, norm, 1.0), 1.0)


def stretch(uncertainty, coordinates, log_scale):
    """The same size, shared out otherwise: each coordinate times a scale in (1 / e^2, e^2).

    Args:
        uncertainty: `Uncertainty`.
        coordinates: `(batch, columns)`.
        log_scale: `(columns,)`; the scale is `exp(2 * tanh(log_scale))`.
    """
    scaled = coordinates * ops.exp(2.0 * ops.tanh(log_scale))
    return rescale(uncertainty, scaled, size(uncertainty, coordinates))


def ascend(uncertainty, coordinates, gradient, length, step_size):
    """One step uphill on the sphere `size(d) = length`, each sample by itself.

    `rescale(coordinates + step_size * length * g / size(d(g)))`. Rows whose gradient is zero or not finite stay.

    Args:
        uncertainty: `Uncertainty`.
        coordinates: the starting point, of size `length`.
        gradient: of the loss with respect to the *offsets*, `(batch, 2 * channels)`; any positive factor cancels.
        length: radius of the sphere, scalar.
        step_size: length of the step in radii; 0 changes nothing.
    """
    finite = ops.all(ops.isfinite(gradient), axis=-1, keepdims=True)
    gradient = ops.where(finite, gradient, 0.0)
    largest = ops.max(ops.abs(gradient), axis=-1, keepdims=True)
    gradient = gradient / ops.where(largest > 0, largest, 1.0)  # squares of tiny gradients would vanish
    direction = coordinate_gradient(uncertainty, gradient)
    norm = size(uncertainty, direction)
    usable = norm > 0
    moved = coordinates + step_size * length * direction / ops.where(usable, norm, 1.0)
    return ops.where(usable, rescale(uncertainty, moved, length), coordinates)
