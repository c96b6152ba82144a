"""The only place where a backend's own API stands: differentiation, replicas and Keras's three train-step signatures.

Each of `tensorflow.py`, `jax.py` and `torch.py` gives the same names; only the chosen backend's file is imported.
"""

import keras

match keras.backend.backend():
    case "tensorflow":
        from keras_abra.backend.tensorflow import Trainer, fold_in_replica, global_rows, global_sum, linearize, replicas
    case "jax":
        from keras_abra.backend.jax import Trainer, fold_in_replica, global_rows, global_sum, linearize, replicas
    case "torch":
        from keras_abra.backend.torch import Trainer, fold_in_replica, global_rows, global_sum, linearize, replicas
    case other:
        raise ImportError(
            f"keras_abra runs on the backends tensorflow, jax and torch. Received: KERAS_BACKEND={other!r}"
        )

__all__ = ["Trainer", "fold_in_replica", "global_rows", "global_sum", "linearize", "replicas"]
