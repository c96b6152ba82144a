"""Backbones of one's own, small enough for two CPU cores."""

import keras


def tiny_resnet(input_shape, width=16):
    """A residual network for small screens: image in, rank-4 feature map out, no pooling, no head.

    A stem (strided 5 x 5 convolution) and three residual stages of one block each; the stem and every stage halve the
    image, and every stage doubles the width. Convolutions are followed by batch normalization. Every path goes through
    the activations named `stem`, `stage1`, `stage2` and `stage3`, the places where `ABRAModel(perturb_after=...)` may
    cut. At `width=16` an image of 64 x 64 x 6 costs 13 million multiply-adds, one of 48 x 48 x 6 costs 8 million.

    Args:
        input_shape: `(height, width, channels)` of the image; height and width in pixels, at least 16.
        width: channels of the stem; stages have `2 * width`, `4 * width` and `8 * width`. Default 16, chosen for
            its cost alone. At least 8 for torch on a CPU: with fewer channels the gradient of the strided 1 x 1
            convolutions may write past its memory (https://github.com/uxlfoundation/oneDNN/issues/6035).

    Returns:
        A Functional `keras.Model` from `(batch, height, width, channels)` to
        `(batch, ceil(height / 16), ceil(width / 16), 8 * width)`.

    Raises:
        ValueError: if `input_shape` is not three positive sizes of an image of at least 16 x 16 pixels.

    Example:

    >>> tiny_resnet((64, 64, 6)).output_shape
    (None, 4, 4, 128)
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < 16 or input_shape[2] < 1:
        raise ValueError(
            "tiny_resnet needs input_shape=(height, width, channels) of at least 16 x 16 pixels and one channel; "
            f"received input_shape={tuple(input_shape)}."
        )
    image = keras.Input(input_shape, name="image")
    x = _conv(image, width, 5, strides=2, name="stem_conv")
    x = _norm(x, "stem_norm")
    x = keras.layers.ReLU(name="stem")(x)
    x = _residual(x, 2 * width, strides=2, name="stage1")
    x = _residual(x, 4 * width, strides=2, name="stage2")
    x = _residual(x, 8 * width, strides=2, name="stage3")
    return keras.Model(image, x, name="tiny_resnet")


def _conv(x, filters, size, strides, name):
    return keras.layers.Conv2D(
        filters, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal", name=name
    )(x)


def _norm(x, name):
    # Momentum 0.9: the moving statistics must settle within the few hundred steps that a small screen is trained for.
    return keras.layers.BatchNormalization(momentum=0.9, name=name)(x)


def _residual(x, filters, strides, name):
    shortcut = _norm(_conv(x, filters, 1, strides, f"{name}_shortcut_conv"), f"{name}_shortcut_norm")
    x = keras.layers.ReLU(name=f"{name}_relu")(_norm(_conv(x, filters, 3, strides, f"{name}_conv1"), f"{name}_norm1"))
    x = _norm(_conv(x, filters, 3, 1, f"{name}_conv2"), f"{name}_norm2")
    return keras.layers.ReLU(name=name)(keras.layers.Add(name=f"{name}_add")([shortcut, x]))
