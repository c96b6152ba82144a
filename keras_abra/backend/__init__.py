"""The only place where a backend's own API stands: differentiation, replicas and Keras's three train-step signatures.

Each of `tensorflow.py`, `jax.py` and `torch.py` gives the same names; only the chosen backend's file is imported.
"""

import keras

match keras.backend.backend():
    case "tensorflow":
        from keras_abra.backend import tensorflow as chosen
    case "jax":
        from keras_abra.backend import jax as chosen
    case "torch":
        from keras_abra.backend import torch as chosen
    case other:
        raise ImportError(
            f"keras_abra runs on the backends tensorflow, jax and torch. Received: KERAS_BACKEND={other!r}"
        )

Trainer, Replicated = chosen.Trainer, chosen.Replicated
fold_in_replica, global_rows, global_sum = chosen.fold_in_replica, chosen.global_rows, chosen.global_sum
linearize, replicas, devices = chosen.linearize, chosen.replicas, chosen.devices
take_noise_from_state = chosen.take_noise_from_state
replica_values, set_replica_values = chosen.replica_values, chosen.set_replica_values
generator_state, set_generator_state = chosen.generator_state, chosen.set_generator_state
process_count, process_index = chosen.process_count, chosen.process_index
wait_for_processes = chosen.wait_for_processes
alone, largest_of_processes = chosen.alone, chosen.largest_of_processes


def in_any_process(flag):
    """Whether `flag` holds in one of the processes that train together; all of them must ask."""
    return bool(largest_of_processes(int(flag)))


__all__ = [
    "Replicated",
    "Trainer",
    "alone",
    "devices",
    "fold_in_replica",
    "generator_state",
    "global_rows",
    "global_sum",
    "in_any_process",
    "largest_of_processes",
    "linearize",
    "process_count",
    "process_index",
    "replica_values",
    "replicas",
    "set_generator_state",
    "set_replica_values",
    "take_noise_from_state",
    "wait_for_processes",
]
