"""Whether a checkpoint belongs to the run that is to go on: what differs, by name."""

import json
import re

import keras

from keras_abra import backend, run_state


def describe_run(model, options):
    """What must be the same for a run to go on, as `json` can write it: the user's `options`, backend, replicas,
    configuration of model and compile, and shapes of all variables."""
    strategy = getattr(model, "distribute_strategy", None)
    distribution = keras.distribution.distribution()
    mesh = None if distribution is None else list(distribution.device_mesh.shape)
    description = {
        "option": options or {},
        "backend": keras.backend.backend(),
        "processes": backend.process_count(model),
        "replicas": mesh or max(backend.replicas(), getattr(strategy, "num_replicas_in_sync", 1)),
        "model": _config(lambda: keras.saving.serialize_keras_object(model)["config"]),
        **(model.said_by_names() if hasattr(model, "said_by_names") else {}),
        "compile": _config(model.get_compile_config),
        "variables": run_state.describe(model),
    }
    return json.loads(json.dumps(description, default=lambda value: type(value).__name__))


def check_same_run(stored, now, folder, rate=None):
    """Refuses a checkpoint of another run.

    Args:
        stored: `describe_run` of the run in the checkpoint, when it began.
        now: of the run that is to go on.
        folder: of the checkpoints.
        rate: learning rate at the checkpoint. A model that already has it is the same one, after a callback changed it.

    Raises:
        ValueError: naming the first differences.
    """
    now = {name: value for name, value in now.items() if name in stored}  # what older checkpoints do not say
    moved = [_moved(stored, now, rate, inner) for inner in ("", "inner_optimizer config ")] if rate is not None else []
    differences = [d for d in _differences(stored, now, "") if d not in moved]
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ValueError(
            f"The checkpoints in {folder} are of another run: {shown}. Start the run again as it was, or give it "
            "another folder."
        )


def _moved(stored, now, rate, inner):
    """The difference of a learning rate that is that of the checkpoint; None if there is none or it is another's."""
    name, values = f"compile optimizer config {inner}learning_rate", [stored, now]
    for key in name.split():
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    if not isinstance(values[1], int | float) or abs(values[1] - rate) > 1e-6 * abs(rate):
        return None
    return f"{name} is {_short(values[0])} in the checkpoint and {_short(values[1])} now"


def _config(get):
    try:
        return _without_counts(get())
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # a model of one's own that cannot be saved
        return None


def _without_counts(value):
    """Leaves out what differs from process to process: numbers that Keras appends to names, and ids of objects."""
    if isinstance(value, dict):
        return {k: _without_counts(v) for k, v in value.items() if k not in ("shared_object_id", "build_config")}
    if isinstance(value, list | tuple):
        return [_without_counts(v) for v in value]
    return re.sub(r"_\d+$", "", value) if isinstance(value, str) else value


def _differences(stored, now, path):
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in [*stored, *(k for k in now if k not in stored)]:
            name = f"{path} {key}".strip()
            if key not in now or key not in stored:
                where = "in the checkpoint only" if key in stored else "now only"
                yield f"{name} is there {where}"
            else:
                yield from _differences(stored[key], now[key], name)
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now) and path != "replicas":
        for i, (a, b) in enumerate(zip(stored, now, strict=True)):
            yield from _differences(a, b, path if len(stored) == 1 else f"{path}[{i}]")
    elif isinstance(stored, list) and isinstance(now, list) and path.startswith("variables"):
        pairs = enumerate(zip(stored, now, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(stored), len(now)))
        yield (
            f"{path}: {len(stored)} in the checkpoint, {len(now)} now, the first that differs is "
            f"{stored[first : first + 1]} there and {now[first : first + 1]} here"
        )
    elif stored != now:
        yield f"{path} is {_short(stored)} in the checkpoint and {_short(now)} now"


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
