"""Plain values, arrays and containers of them as `json` can write them, and back. No backend."""

import collections
from pathlib import Path

import keras
import numpy as np

SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_KINDS = {kind.__name__: kind for kind in SEQUENCES}
_DICTS = {kind.__name__: kind for kind in (dict, collections.OrderedDict, collections.Counter)}
_FACTORIES = {kind.__name__: kind for kind in (list, dict, set, int, float, str)}  # of a defaultdict


def encode(value, arrays, name):
    """A value as `json` can write it, its arrays put into `arrays` under names that begin with `name`.

    Raises:
        TypeError: for a value, or one inside of it, that is none of those that can be stored.
    """
    if type(value) in (type(None), bool, int, float, str):
        return value
    if isinstance(value, keras.Variable):
        value = keras.ops.convert_to_numpy(value.value)
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        arrays[name] = np.array(value)
        return {"array" if isinstance(value, np.ndarray) else "scalar": name}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, np.random.Generator):
        return {"generator": encode(value.bit_generator.state, arrays, name)}
    if type(value) in SEQUENCES:
        items = [encode(v, arrays, f"{name}-{i}") for i, v in enumerate(value)]
        more = {"most": value.maxlen} if isinstance(value, collections.deque) else {}
        return {type(value).__name__: items, **more}
    plain = isinstance(value, dict) and all(isinstance(k, bool | int | float | str | None) for k in value)
    if plain and (type(value) in _DICTS.values() or _factory(value)):
        items = [[k, encode(v, arrays, f"{name}-{i}")] for i, (k, v) in enumerate(value.items())]
        return {"defaultdict": items, "factory": _factory(value)} if _factory(value) else {type(value).__name__: items}
    raise TypeError(type(value))


def decode(value, arrays):
    """What `encode` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = ((k, v) for k, v in value.items() if k not in ("most", "factory"))
    match kind:
        case "array":
            return arrays[held]
        case "scalar":
            return arrays[held][()]
        case "bytes":
            return bytes.fromhex(held)
        case "path":
            return Path(held)
        case "generator":
            state = decode(held, arrays)
            bits = getattr(np.random, state["bit_generator"])()
            bits.state = state
            return np.random.Generator(bits)
        case "defaultdict":
            return collections.defaultdict(_FACTORIES[value["factory"]], ((k, decode(v, arrays)) for k, v in held))
        case name if name in _DICTS:
            return _DICTS[name]({k: decode(v, arrays) for k, v in held})
    items = [decode(v, arrays) for v in held]
    return collections.deque(items, value["most"]) if kind == "deque" else _KINDS[kind](items)


def _factory(value):
    """Name of what a defaultdict makes; None for anything else."""
    name = getattr(getattr(value, "default_factory", None), "__name__", None)
    known = type(value) is collections.defaultdict and _FACTORIES.get(name) is value.default_factory
    return name if known else None
