import keras
from keras import ops

from keras_abra.kinds import is_integer, plain

_TINY = 1e-12  # floor of a squared norm: a zero vector gets cosine 0 and a finite gradient


@keras.saving.register_keras_serializable("keras_abra")
class CosineHead(keras.layers.Layer):
    """Cosine of the angle between each embedding and each class direction.

    The last layer of a network trained with an angular margin (`keras_abra.losses.ArcFace`, `CosFace`): there is no
    bias and lengths do not count, so that only directions tell classes apart.

        cos[i, k] = (f_i / |f_i|) . (w_k / |w_k|)

    with `f_i` the embedding of sample i and `w_k` column k of the kernel `W` (dim, num_classes). The division is
    `x * rsqrt(max(sum x^2, 1e-12))`: a zero vector gives cosine 0 and a finite gradient.

    Everything is computed in float32 and float32 is returned, whatever the dtype policy: in half precision a cosine
    has steps of 5e-4 (float16) or 4e-3 (bfloat16) near 1, as coarse as the angles a margin is there to separate.

    Reference: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, section 3.1.

    Args:
        num_classes: int, at least 2. Number of classes.
        kernel_initializer: initializer of the kernel (dim, num_classes). Its scale is immaterial to the cosine; it sets
            how far one optimizer step turns a class direction. Default "glorot_uniform", as in `keras.layers.Dense`.
        **kwargs: `name`, `dtype`, `trainable` of `keras.layers.Layer`.

    Input shape: `(batch, dim)`. Output shape: `(batch, num_classes)`, float32.

    Raises:
        ValueError: if `num_classes` is not an integer of at least 2, or the input is not `(batch, dim)`,
            dim known.

    Example:

    >>> import numpy as np
    >>> from keras_abra.layers.cosine_head import CosineHead
    >>> head = CosineHead(2, kernel_initializer="identity")
    >>> cosine = head(np.array([[3.0, 4.0], [0.0, -5.0]], dtype="float32"))
    >>> [[round(float(c), 4) for c in row] for row in cosine]
    [[0.6, 0.8], [0.0, -1.0]]
    """

    def __init__(self, num_classes, kernel_initializer="glorot_uniform", **kwargs):
        kwargs.pop("autocast", None)
        super().__init__(autocast=False, **kwargs)
        if not (is_integer(plain(num_classes)) and num_classes >= 2):
            raise ValueError(
                f"`num_classes` must be an integer of at least 2: a cosine softmax needs classes to tell apart. "
                f"Received: num_classes={num_classes!r}"
            )
        self.num_classes = int(num_classes)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        self._check(input_shape)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_classes),
            initializer=self.kernel_initializer,
            autocast=False,
        )
        self.input_spec = keras.layers.InputSpec(ndim=2, axes={-1: input_shape[-1]})

    def call(self, inputs):
        return ops.matmul(_unit(inputs, axis=-1), _unit(self.kernel, axis=0))

    def compute_output_shape(self, input_shape):
        self._check(input_shape)
        return (input_shape[0], self.num_classes)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype="float32")

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }

    def _check(self, input_shape):
        if len(input_shape) != 2 or input_shape[-1] is None:
            raise ValueError(
                f"CosineHead {self.name!r} expects embeddings of shape (batch, dim) with a known dim. Received: "
                f"shape {tuple(input_shape)}. Pool a feature map first, for example with GlobalAveragePooling2D."
            )


def _unit(x, axis):
    x = ops.cast(x, "float32")  # before squaring: 256 ** 2 is already infinite in float16
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=axis, keepdims=True), _TINY))
