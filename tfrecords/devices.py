"""Keeps TensorFlow, which here only feeds data, away from the memory of the GPU."""

import os
import sys
import warnings


def keep_tensorflow_off_gpu():
    """Hides the GPUs from TensorFlow, which would otherwise take nearly all of their memory at its first operation.

    For processes whose model runs on JAX or torch, or that have no model. Without effect once TensorFlow has begun to
    use a GPU.

    Returns:
        bool: whether TensorFlow will use no GPU.
    """
    import tensorflow as tf  # Here, not above: a build does without it.

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        return not tf.config.get_visible_devices("GPU")
    return True


def leave_gpu_to_backend():
    """Does `keep_tensorflow_off_gpu` if this process uses Keras with another backend than TensorFlow; warns if that
    comes too late."""
    keras = sys.modules.get("keras")  # Looked up, not imported: tfrecords works without Keras.
    config = getattr(keras, "config", None)
    backend = config.backend() if config is not None else os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow" and not keep_tensorflow_off_gpu():
        warnings.warn(
            f"TensorFlow, which here only feeds data, had begun to use the GPU before, and {backend} may lack its "
            "memory. Call tfrecords.keep_tensorflow_off_gpu() first.",
            stacklevel=3,
        )
