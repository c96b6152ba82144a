"""What Keras's callbacks remember, to be stored and set again. No backend."""

import inspect
import os
from pathlib import Path

import keras
import numpy as np

_FOREIGN = ("model", "_model", "params", "validation_data")


def read_callbacks(callbacks):
    """The state of callbacks: every attribute that holds plain values or arrays and is no argument of the constructor.

    So are stored: EarlyStopping's, ModelCheckpoint's and ReduceLROnPlateau's counters and best values, EarlyStopping's
    best weights, CSVLogger's columns, and the like of your own.

    Returns:
        `(state, arrays)`: a list that `json` can write, and a dict of NumPy arrays it refers to.
    """
    arrays, states = {}, []
    for i, callback in enumerate(callbacks):
        state = {}
        for name, value in vars(callback).items():
            if name in _FOREIGN or name in _arguments(callback):
                continue
            try:
                state[name] = _encode(value, arrays, f"callback-{i}-{name}")
            except TypeError:
                continue
        states.append({"class": type(callback).__name__, "state": state})
    return states, arrays


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


def _encode(value, arrays, name):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        arrays[name] = value
        return {"array": name}
    if isinstance(value, list | tuple):
        return {"list": [_encode(v, arrays, f"{name}-{i}") for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _encode(v, arrays, f"{name}-{k}") for k, v in value.items()}}
    raise TypeError(type(value))


def _decode(value, arrays):
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "list" in value:
        return [_decode(v, arrays) for v in value["list"]]
    return {k: _decode(v, arrays) for k, v in value["dict"].items()}
