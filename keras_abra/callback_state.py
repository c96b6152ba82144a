"""What Keras's callbacks remember, to be stored and set again. No backend."""

import collections
import inspect
import os
from pathlib import Path

import keras
import numpy as np

_FOREIGN = ("model", "_model", "params", "validation_data")
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_CONTAINERS = (dict, *_SEQUENCES)
_KINDS = {kind.__name__: kind for kind in _SEQUENCES}


def read_arguments(callbacks):
    """Constructor's arguments of callbacks as they are now, by `id`, to see later which of them have become state."""
    return {id(c): {k: _plain(v) for k, v in vars(c).items() if k in _arguments(c)} for c in callbacks}


def read_callbacks(callbacks, arguments):
    """The state of callbacks: every attribute that holds plain values or arrays, and is no argument of the constructor
    or has changed since. (Keras's own arguments are none: it changes `min_delta`'s sign when it begins.)

    So are stored: EarlyStopping's, ModelCheckpoint's and ReduceLROnPlateau's counters and best values, EarlyStopping's
    best weights, CSVLogger's columns, and the like of your own.

    Args:
        callbacks: list of callbacks.
        arguments: of `read_arguments`, when they were new; one that came later has none that is state.

    Returns:
        `(state, arrays, lost)`: a list that `json` can write, a dict of NumPy arrays it refers to, and the names
        `Class.attribute` of lists, dicts and the like of your own callbacks that hold something else.
    """
    arrays, states, lost = {}, [], set()
    for i, callback in enumerate(callbacks):
        state, given = {}, arguments.get(id(callback))
        for name, value in vars(callback).items():
            unchanged = given is None or given.get(name) == _plain(value)
            if (
                name in _FOREIGN
                or (name in _arguments(callback) and unchanged)
                or name in _arguments_of_keras(callback)
            ):
                continue
            try:
                state[name] = _encode(value, arrays, f"callback-{i}-{name}")
            except TypeError:
                if isinstance(value, _CONTAINERS) and not type(callback).__module__.startswith("keras."):
                    lost.add(f"{type(callback).__name__}.{name}")
        states.append({"class": type(callback).__name__, "state": state})
    return states, arrays, sorted(lost)


def describe_callbacks(callbacks):
    """Class of each, and what it watches: without these the best value so far means nothing."""
    return [
        {type(c).__name__: {k: v for k, v in vars(c).items() if k in ("monitor", "mode") and k in _arguments(c)}}
        for c in callbacks
    ]


def set_callbacks(callbacks, states, arrays):
    """Sets what `read_callbacks` read, on new callbacks of the same classes in the same order."""
    for callback, stored in zip(callbacks, states, strict=True):
        for name, value in stored["state"].items():
            setattr(callback, name, _decode(value, arrays))


def callback_files(callbacks):
    """Files that callbacks keep writing, by name: the table of a `CSVLogger`, the one file of a `ModelCheckpoint`."""
    files = {}
    for i, callback in enumerate(callbacks):
        if isinstance(callback, keras.callbacks.CSVLogger):
            files[f"{i}-csv"] = Path(callback.filename)
        elif isinstance(callback, keras.callbacks.ModelCheckpoint) and "{" not in callback.filepath:
            files[f"{i}-model"] = Path(callback.filepath)
    return {name: path for name, path in files.items()}


def restore_files(callbacks, stored):
    """Puts the files of `callback_files` back as they were; a table is opened again at its end."""
    for name, path in callback_files(callbacks).items():
        callback = callbacks[int(name.split("-")[0])]
        table = isinstance(callback, keras.callbacks.CSVLogger)
        if table and callback.csv_file is not None:
            callback.csv_file.close()
        if name in stored:
            _replace(stored[name], path)
        elif not table:
            path.unlink(missing_ok=True)
        if table:
            callback.csv_file = open(path, "a")
            callback.writer, callback.append_header = None, path.stat().st_size == 0


def _replace(source, path):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(source.read_bytes())
    data = source.stat()
    os.utime(temporary, ns=(data.st_atime_ns, data.st_mtime_ns))
    os.replace(temporary, path)


def _arguments(callback):
    return inspect.signature(type(callback).__init__).parameters.keys()


def _arguments_of_keras(callback):
    kinds = [kind for kind in type(callback).__mro__ if kind.__module__.startswith("keras.")]
    return {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}


def _plain(value):
    """A plain value, or a text that tells when a container has changed; None for all else."""
    if isinstance(value, bool | int | float | str):
        return value
    return repr(value) if isinstance(value, _CONTAINERS) else None


def _encode(value, arrays, name):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        arrays[name] = value
        return {"array": name}
    if type(value) in _SEQUENCES:
        items = [_encode(v, arrays, f"{name}-{i}") for i, v in enumerate(value)]
        more = {"most": value.maxlen} if isinstance(value, collections.deque) else {}
        return {type(value).__name__: items, **more}
    if isinstance(value, dict) and all(isinstance(k, bool | int | float | str | None) for k in value):
        return {"dict": [[k, _encode(v, arrays, f"{name}-{i}")] for i, (k, v) in enumerate(value.items())]}
    raise TypeError(type(value))


def _decode(value, arrays):
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "dict" in value:
        return {k: _decode(v, arrays) for k, v in value["dict"]}
    ((kind, items),) = ((k, v) for k, v in value.items() if k != "most")
    items = [_decode(v, arrays) for v in items]
    return collections.deque(items, value["most"]) if kind == "deque" else _KINDS[kind](items)
