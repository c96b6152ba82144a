import math

import keras
from keras import ops

from keras_abra.kinds import is_number, plain
from keras_abra.losses.precision import full_precision
from keras_abra.losses.softmax_cross_entropy import shares_of, softmax_cross_entropy


def cosface_logits(y_true, cosine, margin, scale):
    """Scaled cosines with a margin taken off the true class: see `CosFace` for the formula.

    Args:
        y_true: class numbers, `(batch,)` or `(batch, 1)`, or shares `(batch, num_classes)`; a number that is no class
            leaves its row without margin.
        cosine: cosines `(batch, num_classes)`.
        margin: cosine difference, a float or a scalar tensor. At 0 the result is exactly `scale * cosine`.
        scale: float, factor on the logits.

    Returns:
        `(batch, num_classes)`, float32.

    Example:

    >>> import numpy as np
    >>> from keras_abra.losses import cosface_logits
    >>> logits = cosface_logits([1], np.array([[0.5, 0.5]], "float32"), margin=0.25, scale=2.0)
    >>> [round(float(z), 4) for z in logits[0]]
    [1.0, 0.5]
    """
    shares, cosine = shares_of(y_true, cosine)
    margin = ops.cast(ops.convert_to_tensor(margin), "float32")
    return scale * ops.where(shares > 0, cosine - shares * margin, cosine)


@keras.saving.register_keras_serializable("keras_abra")
class CosFace(keras.losses.Loss):
    """Cross-entropy of cosines after a margin on the cosine of the true class.

    The fallback for backbones that `ArcFace` stalls on: the margin is a constant taken off the cosine, so that the
    gradient is that of the plain softmax at every angle. Its margin is *not* an angle and has its own range. Use it on
    the output of `keras_abra.layers.CosineHead`; predict and measure without the margin.

        z_y = s (c_y - m) for the true class y,   z_k = s c_k for the others
        L   = - log softmax(z)[y]

    with `c` the cosines, `m` the margin and `s` the scale.

    Reference: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.

    Args:
        margin: float in [0, 1], a difference of cosines without unit. Default 0.35: the paper's.
        scale: float > 0. Default 30, as in `ArcFace`, so that the two can be exchanged; the paper's is 64.
        reduction: as in `keras.losses.Loss`. Default "sum_over_batch_size".
        name: string. Default "cosface".
        dtype: None, "float32" or "float64", the dtype of the reduction; the margin is always computed in float32.
            Default None: float32.

    `y_true` are class numbers `(batch,)` or `(batch, 1)`, `y_pred` cosines `(batch, num_classes)` of any float dtype.
    A sample whose label is no class has the loss NaN. Labels of mixed samples are shares `(batch, num_classes)` that
    add up to 1: then each class has its share of the margin, `z_k = s (c_k - y_k m)`, and `L = - sum_k y_k log
    softmax(z)[k]`.

    Raises:
        ValueError: if the margin is outside [0, 1], the scale is not positive, or shapes do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_abra.losses import CosFace
    >>> cosine = np.array([[0.5, 0.0], [0.2, 0.9]], "float32")
    >>> f"{float(CosFace(margin=0.35, scale=10.0)([0, 1], cosine)):.4f}"
    '0.1156'
    """

    def __init__(self, margin=0.35, scale=30.0, reduction="sum_over_batch_size", name="cosface", dtype=None):
        super().__init__(name=name, reduction=reduction, dtype=full_precision(dtype))
        margin, scale = plain(margin), plain(scale)
        if not is_number(margin) or not 0.0 <= margin <= 1.0:
            raise ValueError(
                f"`margin` is a difference of cosines, in [0, 1], not an angle (that is ArcFace's). "
                f"Received: margin={margin!r}"
            )
        if not is_number(scale) or not 0.0 < scale < math.inf:
            raise ValueError(f"`scale` must be a positive, finite number. Received: scale={scale!r}")
        self.margin = float(margin)
        self.scale = float(scale)

    def margin_logits(self, y_true, cosine, ramp=1.0):
        """Logits with `ramp` times the margin; `ramp` is a float or a scalar tensor in [0, 1]."""
        return cosface_logits(y_true, cosine, self.margin * ops.convert_to_tensor(ramp, dtype="float32"), self.scale)

    def call(self, y_true, y_pred):
        return softmax_cross_entropy(y_true, self.margin_logits(y_true, y_pred))

    def get_config(self):
        return {**super().get_config(), "margin": self.margin, "scale": self.scale, "dtype": self.dtype}
