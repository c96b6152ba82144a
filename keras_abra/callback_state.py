"""What Keras's callbacks remember, to be stored and set again. No backend."""

import contextlib
import hashlib
import inspect
import os
import types
from pathlib import Path

import keras
import numpy as np

from keras_abra.plain_values import SEQUENCES, decode, encode

_FOREIGN = ("model", "_model", "params", "validation_data")
_CONTAINERS = (dict, *SEQUENCES)
_NO_STATE = (types.ModuleType, keras.callbacks.Callback)
_WATCHERS = ("StopOnNonFiniteLoss", "SkipNonFinite")  # of which a run may have another when it goes on


def read_arguments(callbacks):
    """Constructor's arguments of callbacks as they are now, by `id`, to see later which of them have become state."""
    return {
        id(c): {k: _plain(v) for k, v in vars(c).items() if k in _arguments(c) and k not in _FOREIGN} for c in callbacks
    }


def read_callbacks(callbacks, arguments):
    """The state of callbacks: every attribute that holds plain values or arrays, and is no argument of the constructor
    or has changed since. (Keras's own arguments are none: it changes `min_delta`'s sign when it begins.)

    So are stored: EarlyStopping's, ModelCheckpoint's and ReduceLROnPlateau's counters and best values, EarlyStopping's
    best weights, CSVLogger's columns, and the like of your own. Functions, models and callbacks are none.

    Args:
        callbacks: list of callbacks.
        arguments: of `read_arguments`, when they were new; one that came later has none that is state.

    Returns:
        `(state, arrays, lost)`: a list that `json` can write, a dict of NumPy arrays it refers to, and the names
        `Class.attribute` of what else your own callbacks hold.
    """
    arrays, states, lost = {}, [], set()
    for i, callback in enumerate(callbacks):
        state, given = {}, arguments.get(id(callback))
        own = not type(callback).__module__.startswith("keras.")
        for name, value in vars(callback).items():
            if name in _FOREIGN:
                continue
            if name in _arguments(callback) or name in _arguments_of_keras(callback):
                unchanged = given is None or given.get(name) == _plain(value)
                # Keras changes some of its own: `min_delta`'s sign, again in each process.
                if unchanged or (name in _arguments_of_keras(callback) and (not own or name == "min_delta")):
                    continue
            try:
                state[name] = encode(value, arrays, f"callback-{i}-{name}")
            except TypeError:
                if own and not (callable(value) or isinstance(value, _NO_STATE)):
                    lost.add(f"{type(callback).__name__}.{name}")
        states.append({"class": type(callback).__name__, "state": state})
    return states, arrays, sorted(lost)


def describe_callbacks(callbacks):
    """Class of each, and what it watches: without these the best value so far means nothing."""
    return [
        {type(c).__name__: {k: v for k, v in vars(c).items() if k in ("monitor", "mode") and k in _arguments(c)}}
        for c in _without_watchers(callbacks)
    ]


def _without_watchers(callbacks):
    return [c for c in callbacks if type(c).__name__ not in _WATCHERS]


def set_callbacks(callbacks, states, arrays):
    """Sets what `read_callbacks` read, on new callbacks of the same classes in the same order."""
    watchers = {stored["class"]: stored for stored in states if stored["class"] in _WATCHERS}
    pairs = [(c, watchers[name]) for c in callbacks if (name := type(c).__name__) in watchers]
    rest = [stored for stored in states if stored["class"] not in _WATCHERS]
    for callback, stored in [*pairs, *zip(_without_watchers(callbacks), rest, strict=True)]:
        for name, value in stored["state"].items():
            held = getattr(callback, name, None)
            if isinstance(held, keras.Variable):
                held.assign(decode(value, arrays))
            else:
                setattr(callback, name, decode(value, arrays))


def settle_direction(callbacks):
    """Lets callbacks that keep a best value find out whether more or less is better: Keras does so at the end of their
    first epoch, and then compares at a batch before, if the value is one that was restored."""
    for callback in callbacks:
        if getattr(callback, "best", None) is not None and getattr(callback, "monitor_op", callback) is None:
            callback._set_monitor_op()


def callback_files(callbacks):
    """Files that callbacks keep writing, by name: the table of a `CSVLogger`, the one file of a `ModelCheckpoint`."""
    files = {}
    for i, callback in enumerate(_without_watchers(callbacks)):
        if isinstance(callback, keras.callbacks.CSVLogger):
            files[f"{i}-csv"] = Path(callback.filename)
        elif isinstance(callback, keras.callbacks.ModelCheckpoint) and "{" not in callback.filepath:
            files[f"{i}-model"] = Path(callback.filepath)
    return files


def writes_file(callback):
    """Whether several processes that call it would write one file."""
    return isinstance(callback, keras.callbacks.CSVLogger | keras.callbacks.ModelCheckpoint)


def restore_files(callbacks, stored):
    """Puts the files of `callback_files` back as they were; a table is opened again at its end."""
    for name, path in callback_files(callbacks).items():
        callback = _without_watchers(callbacks)[int(name.split("-")[0])]
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
    if isinstance(value, keras.Variable):
        value = keras.ops.convert_to_numpy(value.value)
    if isinstance(value, np.ndarray):
        return repr((value.shape, value.dtype, hashlib.sha256(value.tobytes()).hexdigest()))
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if not isinstance(value, _CONTAINERS):
        return None
    arrays = {}
    with contextlib.suppress(TypeError):
        value = encode(value, arrays, "")
    return repr((value, {name: _plain(array) for name, array in arrays.items()}))
