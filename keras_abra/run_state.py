"""Everything that training moves: variables, replica by replica, and the states of random generators."""

import random
import re

import keras
import numpy as np
from keras.src.random.seed_generator import global_seed_generator

from keras_abra import backend

GROUPS = ("model", "optimizer", "metrics", "keras")


def variables(model):
    """The variables of a run by what they belong to: `model` (weights, moving statistics, seeds), `optimizer`,
    `metrics` and `keras` (Keras's own seed generator). Each once."""
    groups = {
        "model": model.trainable_variables + model.non_trainable_variables,
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
        "keras": [global_seed_generator().state],
    }
    seen, result = set(), {}
    for name, group in groups.items():
        result[name] = [v for v in group if id(v) not in seen and not seen.add(id(v))]
    return result


def describe(model):
    """`{group: [[path, shape, type], ...]}` of the variables that make up a model. Numbers that Keras appends to names
    are left out: they count the layers that were made before."""
    found = variables(model)
    return {
        name: [[_plain(v.path), list(v.shape), keras.backend.standardize_dtype(v.dtype)] for v in found[name]]
        for name in ("model", "optimizer")
    }


def read_values(model, groups=GROUPS):
    """NumPy arrays of the variables, named `group-index-replica`; one replica where all are equal. They are copies."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    arrays = {}
    for group, members in variables(model).items():
        if group not in groups:
            continue
        for i, variable in enumerate(members):
            values = backend.replica_values(variable)
            equal = all(_same(values[0], value) for value in values[1:])
            for replica, value in enumerate(values[:1] if equal else values):
                arrays[f"{group}-{i}-{replica}"] = np.array(value)
    return arrays


def set_values(model, arrays, groups=GROUPS):
    """Sets what `read_values` read."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    found, stored = variables(model), {}
    for name, value in arrays.items():
        if name.split("-")[0] in groups:
            group, i, replica = name.split("-")
            stored.setdefault((group, int(i)), {})[int(replica)] = value
    for (group, i), values in stored.items():
        backend.set_replica_values(found[group][i], [values[k] for k in sorted(values)])


def learning_rate(model, arrays):
    """The optimizer's learning rate in what `read_values` read, of one within a loss scale that of the inner one; None
    if it follows a schedule."""
    rate = None
    for i, variable in enumerate(variables(model)["optimizer"]):
        stored = arrays.get(f"optimizer-{i}-0")
        if variable.path.split("/")[-1] == "learning_rate" and stored is not None and stored.ndim == 0:
            rate = float(stored)  # the inner one comes last
    return rate


def read_generators():
    """States of Python's, NumPy's and the backend's global random generators: `(state, arrays)`."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    arrays = {"random-python": np.array(internal, np.uint64), "random-numpy": np.array(keys)}
    state = {"python": [version, gauss], "numpy": [kind, position, has_gauss, cached]}
    own = backend.generator_state()
    if own is not None:
        arrays["random-backend"] = own
    return state, arrays


def set_generators(state, arrays):
    """Sets what `read_generators` read."""
    version, gauss = state["python"]
    random.setstate((version, tuple(int(i) for i in arrays["random-python"]), gauss))
    kind, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, arrays["random-numpy"], position, has_gauss, cached))
    if "random-backend" in arrays:
        backend.set_generator_state(arrays["random-backend"])


def _same(a, b):
    return np.array_equal(a.view(np.uint8) if a.ndim else a, b.view(np.uint8) if b.ndim else b)


def _plain(path):
    return re.sub(r"_\d+(?=[_/]|$)", "", path)
