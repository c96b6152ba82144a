import math

import keras
from keras import ops

from keras_abra import backend
from keras_abra.losses.precision import full_precision

_SMALLEST_PROBABILITY = 1e-7
_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def symmetric_kl(clean, perturbed):
    """Mean of the two Kullback-Leibler directions between softmax distributions, per sample.

        D = 1/2 KL(p || q) + 1/2 KL(q || p) = 1/2 sum_k (p_k - q_k) (log p_k - log q_k)

    with `p`, `q` the softmax of the two logits. Every term is >= 0.

    Args:
        clean, perturbed: logits `(batch, num_classes)`.

    Returns:
        `(batch,)`, float32.
    """
    log_p, log_q = _log_softmax(clean), _log_softmax(perturbed)
    return 0.5 * ops.sum((ops.exp(log_p) - ops.exp(log_q)) * (log_p - log_q), axis=-1)


def jensen_shannon(clean, perturbed):
    """Jensen-Shannon divergence between softmax distributions, per sample: between 0 and log 2.

        D = 1/2 KL(p || a) + 1/2 KL(q || a),   a = (p + q) / 2

    with `p`, `q` the softmax of the two logits: the AugMix consistency (Hendrycks et al., ICLR 2020) for two
    distributions. AugMix clamps `a` at 1e-7; here `p` and `q` are clamped there, which clamps `a` as well and keeps
    the divergence of equal distributions at exactly zero however many classes have next to no probability.

    Args:
        clean, perturbed: logits `(batch, num_classes)`.

    Returns:
        `(batch,)`, float32.
    """
    p = ops.maximum(ops.exp(_log_softmax(clean)), _SMALLEST_PROBABILITY)
    q = ops.maximum(ops.exp(_log_softmax(perturbed)), _SMALLEST_PROBABILITY)
    log_a = ops.log(0.5 * (p + q))
    return 0.5 * ops.sum(p * (ops.log(p) - log_a) + q * (ops.log(q) - log_a), axis=-1)


def coral(clean, perturbed):
    """Squared distance of the covariances of two batches of embeddings.

        D = |C_clean - C_perturbed|_F^2 / (4 dim^2)

    with `C` the covariance over the batch, ddof 1 (zero for a batch of one) and `|.|_F` the Frobenius norm.
    Reference: Sun & Saenko, "Deep CORAL", ECCV Workshops 2016.

    Args:
        clean, perturbed: embeddings `(batch, dim)`.

    Returns:
        A scalar, float32.
    """
    difference = _covariance(clean) - _covariance(perturbed)
    return 0.25 * ops.mean(ops.square(difference))


def mmd(clean, perturbed):
    """Squared maximum mean discrepancy between two batches of embeddings, with a mixture of Gaussian kernels.

        D = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(x, y) = mean over b of exp(-|x - y|^2 / (b h))

    with `x` the clean and `y` the perturbed embeddings, means over all pairs (the biased V-statistic: >= 0, and 0 for
    equal batches), `h` the mean squared distance between two different rows of both batches taken together, held
    constant in the gradient, and `b` = 1/4, 1/2, 1, 2, 4: the fixed multiples of the code of Long et al., "Learning
    Transferable Features with Deep Adaptation Networks", ICML 2015, so that no bandwidth depends on the embeddings'
    size. Kernels are averaged, not summed: D lies in [0, 2]. Reference: Gretton et al., JMLR 2012.

    Args:
        clean, perturbed: embeddings `(batch, dim)`.

    Returns:
        A scalar, float32.
    """
    clean, perturbed = _float32(clean), _float32(perturbed)
    rows = ops.concatenate([clean, perturbed], axis=0)
    rows = rows - ops.stop_gradient(ops.mean(rows, axis=0, keepdims=True))  # a common offset would cost digits
    square = ops.sum(ops.square(rows), axis=-1, keepdims=True)
    distance = ops.maximum(square + ops.transpose(square) - 2.0 * ops.matmul(rows, ops.transpose(rows)), 0.0)

    n = ops.cast(ops.shape(rows)[0], "float32")
    h = ops.stop_gradient(ops.maximum(ops.sum(distance) / (n * (n - 1.0)), 1e-12))
    kernel = sum(ops.exp(-distance / (b * h)) for b in _BANDWIDTHS) / len(_BANDWIDTHS)

    sign = ops.concatenate([ops.ones_like(clean[:, :1]), -ops.ones_like(perturbed[:, :1])], axis=0) / (0.5 * n)
    return ops.sum(sign * ops.matmul(kernel, sign))


_ON_LOGITS = {"symmetric_kl": symmetric_kl, "jensen_shannon": jensen_shannon}
_ON_EMBEDDINGS = {"coral": coral, "mmd": mmd}


@keras.saving.register_keras_serializable("keras_abra")
class DistributionAlignment(keras.losses.Loss):
    """Divergence between what the model makes of clean and of perturbed features.

    It keeps the representation from collapsing while an adversary explores it: a perturbed sample shall get the same
    answer as the clean one. Call it as `alignment(clean, perturbed)`.

    | kind | compares | per | formula |
    |---|---|---|---|
    | "symmetric_kl" | margin-free logits (batch, num_classes) | sample | `symmetric_kl` |
    | "jensen_shannon" | margin-free logits (batch, num_classes) | sample | `jensen_shannon` |
    | "coral" | embeddings (batch, dim) | batch | `coral` |
    | "mmd" | embeddings (batch, dim) | batch | `mmd` |

    `call` returns one value per sample; a batch kind repeats its one value, so that the mean over the batch is that
    value. A batch kind knows no sample weights.

    Args:
        kind: one of the four above; `on` then tells what it compares, "logits" or "embeddings". Default
            "symmetric_kl": a reconstruction, the paper's "synergistic distribution alignment" is not public.
        weight: float >= 0, factor of this term in `ABRAModel`'s total loss, applied there: `call` returns the
            divergence *without* it. Default 1.0, provisional.
        two_sided: bool. False: the clean side is a constant and only the perturbed side is drawn to it. True: the
            gradient flows into both, which costs `ABRAModel` f/3 of a plain step more, f being the share of the compute
            behind the first perturbed stage. Default False.
        synchronized: bool. Whether a batch kind compares the rows of all replicas (default), as one device would, or
            each replica its own rows. On JAX the rows are one array, and always all.
        reduction: as in `keras.losses.Loss`. Default "sum_over_batch_size".
        name: string. Default "distribution_alignment".
        dtype: None, "float32" or "float64", the dtype of the reduction; the divergence is always computed in float32.
            Default None: float32.

    Raises:
        ValueError: for an unknown kind, a negative weight, a `two_sided` or `synchronized` that is no bool, or inputs
            whose shapes differ or are not of rank 2.

    Example:

    >>> import numpy as np
    >>> from keras_abra.losses import DistributionAlignment
    >>> alignment = DistributionAlignment("symmetric_kl")
    >>> clean, perturbed = np.array([[2.0, 0.0]], "float32"), np.array([[0.0, 0.0]], "float32")
    >>> f"{float(alignment(clean, perturbed)):.4f}", f"{float(alignment(clean, clean + 3.0)):.4f}"
    ('0.3808', '0.0000')
    """

    def __init__(
        self,
        kind="symmetric_kl",
        weight=1.0,
        two_sided=False,
        synchronized=True,
        reduction="sum_over_batch_size",
        name="distribution_alignment",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=full_precision(dtype))
        kinds = [*_ON_LOGITS, *_ON_EMBEDDINGS]
        if kind not in kinds:
            raise ValueError(f"Unknown kind of alignment. Expected one of {kinds}. Received: kind={kind!r}")
        if not 0.0 <= weight < math.inf:
            raise ValueError(
                f"`weight` must be a finite number >= 0 (0 switches alignment off). Received: weight={weight}"
            )
        for argument, value in (("two_sided", two_sided), ("synchronized", synchronized)):
            if not isinstance(value, bool):
                raise ValueError(f"`{argument}` must be True or False. Received: {argument}={value!r}")
        self.kind = kind
        self.weight = float(weight)
        self.two_sided = two_sided
        self.synchronized = synchronized

    @property
    def on(self):
        """What `call` compares: "logits" (margin-free) or "embeddings"."""
        return "logits" if self.kind in _ON_LOGITS else "embeddings"

    def call(self, clean, perturbed):
        clean, perturbed = _float32(clean), _float32(perturbed)
        if len(clean.shape) != 2 or len(perturbed.shape) != 2 or not _may_equal(clean.shape, perturbed.shape):
            raise ValueError(
                f"Alignment compares two {self.on} of one shape (batch, size), row by row the same samples. Received: "
                f"clean {tuple(clean.shape)}, perturbed {tuple(perturbed.shape)}."
            )
        if not self.two_sided:
            clean = ops.stop_gradient(clean)
        if self.kind in _ON_LOGITS:
            return _ON_LOGITS[self.kind](clean, perturbed)
        rows = ops.shape(perturbed)[0]
        if self.synchronized:
            clean, perturbed = backend.global_rows(clean), backend.global_rows(perturbed)
        return ops.broadcast_to(_ON_EMBEDDINGS[self.kind](clean, perturbed), (rows,))

    def get_config(self):
        return {
            **super().get_config(),
            "kind": self.kind,
            "weight": self.weight,
            "two_sided": self.two_sided,
            "synchronized": self.synchronized,
            "dtype": self.dtype,
        }


def _float32(x):
    return ops.cast(ops.convert_to_tensor(x), "float32")


def _log_softmax(logits):
    return ops.log_softmax(_float32(logits), axis=-1)


def _covariance(x):
    x = _float32(x)
    x = x - ops.mean(x, axis=0, keepdims=True)
    rows = ops.cast(ops.shape(x)[0], "float32")
    return ops.matmul(ops.transpose(x), x) / ops.maximum(rows - 1.0, 1.0)


def _may_equal(one, other):
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))
