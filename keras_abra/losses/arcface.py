import math

import keras
from keras import ops

from keras_abra.kinds import is_number, plain
from keras_abra.losses.precision import full_precision
from keras_abra.losses.softmax_cross_entropy import shares_of, softmax_cross_entropy

_LIMIT = 1.0 - 1e-7  # the slope of sqrt(1 - c^2) is infinite at 1


def arcface_logits(y_true, cosine, margin, scale):
    """Scaled cosines with an angle added to the true class: see `ArcFace` for the formula.

    Args:
        y_true: class numbers, `(batch,)` or `(batch, 1)`, or shares `(batch, num_classes)`; a number that is no class
            leaves its row without margin.
        cosine: cosines `(batch, num_classes)`.
        margin: angle in radians, a float or a scalar tensor (one that is warmed up). At 0 the result is `scale *
            clip(cosine)`, exactly for class numbers.
        scale: float, factor on the logits.

    Returns:
        `(batch, num_classes)`, float32.

    Example:

    >>> import numpy as np
    >>> from keras_abra.losses import arcface_logits
    >>> logits = arcface_logits([0], np.array([[0.5, 0.5]], "float32"), margin=np.pi / 3, scale=1.0)
    >>> [round(float(z), 4) for z in logits[0]]  # cos(60 + 60 degrees) for the true class
    [-0.5, 0.5]
    """
    shares, cosine = shares_of(y_true, cosine)
    c = ops.clip(cosine, -_LIMIT, _LIMIT)
    margin = ops.cast(ops.convert_to_tensor(margin), "float32")
    cos_m, sin_m = ops.cos(margin), ops.sin(margin)

    sine = ops.sqrt((1.0 - c) * (1.0 + c))  # unlike 1 - c^2 this loses no digits near 1
    # cos(pi - m) = -cos m and sin(pi - m) = sin m. The clip keeps value and slope of both branches finite.
    phi = ops.where(c > -cos_m, c * cos_m - sine * sin_m, c - margin * sin_m)
    return scale * ops.where(shares > 0, shares * phi + (1.0 - shares) * c, c)


@keras.saving.register_keras_serializable("keras_abra")
class ArcFace(keras.losses.Loss):
    """Cross-entropy of cosines after an additive angular margin on the true class.

    Adding an angle to the true class asks of every embedding to lie closer to its own class direction, by that angle,
    than to any other: classes that differ little stay apart. Use it on the output of
    `keras_abra.layers.CosineHead`, which must be cosines, not scaled logits; predict and measure without the margin.

        phi = cos(theta + m) = c cos m - sqrt(1 - c^2) sin m      if c > cos(pi - m)
              c - m sin(pi - m)                                   otherwise
        z_y = s phi for the true class y,   z_k = s c_k for the others
        L   = - log softmax(z)[y]

    with `c = cos theta` clipped to +-(1 - 1e-7), `theta` the angle between embedding and class direction, `m` the
    margin and `s` the scale. The second line continues the first where theta + m would pass pi and the cosine would
    rise again. The gradient is the true one: it has the factor d phi / d c = sin(theta + m) / sin(theta), which the
    implementations that take the arccos without gradient leave out.

    A large margin from the first step stalls training or ends in NaN: warm it up with `margin_logits(..., ramp)`, as
    `ABRAModel` does. `CosFace` is the fallback where ArcFace stalls.

    Reference: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.

    Args:
        margin: float, angle in radians, in [0, pi/2). Default 0.5 (28.6 degrees): the paper's, and RxRx1 practice.
        scale: float > 0. Default 30: RxRx1 practice (first place of the Kaggle competition) for 1,108 classes; with
            few classes use a smaller one. The paper's is 64.
        reduction: as in `keras.losses.Loss`. Default "sum_over_batch_size".
        name: string. Default "arcface".
        dtype: None, "float32" or "float64", the dtype of the reduction; the margin is always computed in float32.
            Default None: float32.

    `y_true` are class numbers `(batch,)` or `(batch, 1)`, `y_pred` cosines `(batch, num_classes)` of any float dtype.
    A sample whose label is no class has the loss NaN. Labels of mixed samples are shares `(batch, num_classes)` that
    add up to 1 (CutMix, mixup): then `z_k = s (y_k phi_k + (1 - y_k) c_k)` and `L = - sum_k y_k log softmax(z)[k]`, as
    in the first place of RxRx1's Kaggle competition (kaggle-rcic-1st, model.py).

    Raises:
        ValueError: if the margin is outside [0, pi/2), the scale is not positive, or shapes do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_abra.losses import ArcFace
    >>> cosine = np.array([[0.5, 0.0], [0.2, 0.9]], "float32")
    >>> f"{float(ArcFace(margin=0.5, scale=10.0)([0, 1], cosine)):.4f}"
    '0.3020'
    >>> f"{float(ArcFace(margin=0.0, scale=10.0)([0, 1], cosine)):.4f}"
    '0.0038'
    """

    def __init__(self, margin=0.5, scale=30.0, reduction="sum_over_batch_size", name="arcface", dtype=None):
        super().__init__(name=name, reduction=reduction, dtype=full_precision(dtype))
        margin, scale = plain(margin), plain(scale)
        if not is_number(margin) or not 0.0 <= margin < math.pi / 2:
            in_degrees = is_number(margin) and margin >= math.pi / 2
            hint = f" If it is in degrees, pass {math.radians(margin):.4f}." if in_degrees else ""
            raise ValueError(f"`margin` is an angle in radians, in [0, pi/2). Received: margin={margin!r}.{hint}")
        if not is_number(scale) or not 0.0 < scale < math.inf:
            raise ValueError(f"`scale` must be a positive, finite number. Received: scale={scale!r}")
        self.margin = float(margin)
        self.scale = float(scale)

    def margin_logits(self, y_true, cosine, ramp=1.0):
        """Logits with `ramp` times the margin; `ramp` is a float or a scalar tensor in [0, 1]."""
        return arcface_logits(y_true, cosine, self.margin * ops.convert_to_tensor(ramp, dtype="float32"), self.scale)

    def call(self, y_true, y_pred):
        return softmax_cross_entropy(y_true, self.margin_logits(y_true, y_pred))

    def get_config(self):
        return {**super().get_config(), "margin": self.margin, "scale": self.scale, "dtype": self.dtype}
