"""Peak memory of a training step, measured in each backend's own way."""

import gc

import keras
from step_counters import compile_jax_step


def accelerator():
    """Name of the GPU that Keras uses, or None."""
    match keras.backend.backend():
        case "jax":
            import jax

            return None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
        case "tensorflow":
            import tensorflow as tf

            devices = tf.config.list_physical_devices("GPU")
            return tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU") if devices else None
        case "torch":
            import torch

            return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory(build):
    """Bytes that a model, its optimizer and three training steps need at their peak. Run it in a fresh process.

    JAX: temporaries, arguments and outputs of the compiled step. TensorFlow and torch: what the device's
    allocator says, or, on a CPU, the growth of the process's resident memory from before the model was built.

    Args:
        build: function that returns a compiled model and one batch `(x, y)`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        model, data = build()
        analysis = compile_jax_step(model, *data).memory_analysis()
        sizes = analysis.temp_size_in_bytes, analysis.argument_size_in_bytes, analysis.output_size_in_bytes
        return sum(sizes) - analysis.alias_size_in_bytes
    before = _resident("VmRSS")
    model, (x, y) = build()
    for _ in range(3):
        model.train_on_batch(x, y)
    gc.collect()
    if accelerator() and backend == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if accelerator():
        import torch

        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(name):
    """Resident memory now (VmRSS) or at its peak (VmHWM), bytes; `getrusage` would give a child its parent's peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
