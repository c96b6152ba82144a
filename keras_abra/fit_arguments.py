"""What `ABRAModel.fit` looks at before Keras does: the number of steps, the sizes of batches, data, callbacks."""

import inspect
import math

import keras

from keras_abra import backend, checks
from keras_abra.data_checks import check_data, check_division, is_array, kept
from keras_abra.non_finite_loss import StopOnNonFiniteLoss
from keras_abra.resumable_run import ResumableRun
from keras_abra.skip_non_finite import SkipNonFinite


def bind(method, args, kwargs):
    """The arguments of a call to a Keras method, by name, defaults included."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments.update(arguments.pop("kwargs", {}))
    return arguments


def check(model, arguments, training=True):
    """Checks arrays at once, and makes `tf.data` pipelines check every mini-batch they give (changes `arguments`).

    Raises:
        ValueError: naming the first label or id outside its range, or training batches of one sample.
    """
    arguments["y"] = _as_array(arguments["y"])
    _check_some(arguments)
    if arguments["y"] is None and (is_array(arguments["x"]) or isinstance(arguments["x"], dict)):
        checks.check_labels(None, model.num_classes)
    arguments["x"] = check_data(model, arguments["x"], arguments["y"], training)
    check_division(arguments["x"], arguments["batch_size"], arguments.get("validation_split"))
    if not training:
        return
    if is_array(arguments["y"]) and backend.replicas() == 1:
        steps = arguments["steps_per_epoch"]  # Keras goes on in the next epoch where this one ends
        steps = steps and steps * (arguments["epochs"] - arguments["initial_epoch"])
        replicas = getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)
        _check_batches(_samples(arguments), arguments["batch_size"] or 32, steps, replicas)
    if arguments["validation_data"] is not None:
        data = arguments["validation_data"]
        if isinstance(data, tuple | list) and len(data) > 1:
            data = (data[0], _as_array(data[1]), *data[2:])
            check_division(data[0], arguments["validation_batch_size"] or arguments["batch_size"])
            arguments["validation_data"] = (check_data(model, data[0], data[1], False), *data[1:])
        else:
            arguments["validation_data"] = check_data(model, data, None, False)


def watch_finite(arguments):
    """Adds to the callbacks (changes `arguments`) the one that stops at a step that is not finite, unless there is one
    already or one that leaves such steps out; whether there is the latter."""
    callbacks = arguments["callbacks"]
    known = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
    known = known if isinstance(known, list | tuple) else [known] if known else []
    within = [inner for callback in known for inner in (callback, *getattr(callback, "callbacks", ()))]
    if any(isinstance(callback, SkipNonFinite) for callback in within):
        return True
    if any(isinstance(callback, StopOnNonFiniteLoss) for callback in within):
        return False
    run = next((callback for callback in known if isinstance(callback, ResumableRun)), None)
    if run is not None:  # which knows the step of the epoch, where Keras counts from where the data began
        run.callbacks.insert(0, StopOnNonFiniteLoss())
    elif isinstance(callbacks, keras.callbacks.CallbackList):
        watched = [StopOnNonFiniteLoss(), *known]  # before what would save; an `append` Keras would not wait for
        arguments["callbacks"] = keras.callbacks.CallbackList(
            watched, model=callbacks.model, **(callbacks.params or {})
        )
    else:
        arguments["callbacks"] = [StopOnNonFiniteLoss(), *known]
    return False


def ramp_length(model, arguments):
    """Length in optimizer steps of a ramp that is a share of all steps.

    Raises:
        ValueError: if the number of steps cannot be known.
    """
    if not model.warmup:
        return 0
    steps = arguments["steps_per_epoch"] or _steps(arguments)
    if steps is None:
        raise ValueError(
            f"`warmup={model.warmup}` is a share of all steps, but this data does not tell its length. Give "
            "`steps_per_epoch` to fit, or `warmup` as a number of optimizer steps."
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    epochs = max(arguments["epochs"] - arguments["initial_epoch"], 0)
    updates = steps * epochs // (optimizer.gradient_accumulation_steps or 1)
    return math.ceil(model.warmup * updates)


def symbolic_batch(dataset):
    """What stands for a batch of a `tf.data` pipeline where Keras builds metrics: Keras looks at a first batch instead,
    and of a short epoch such a look uses up the data.

    Returns:
        The structure of a batch in `keras.KerasTensor`; None for what is no such pipeline, or of unknown shapes.
    """
    spec = getattr(dataset, "element_spec", None)
    leaves = keras.tree.flatten(spec)
    if not leaves or any(type(leaf).__name__ != "TensorSpec" or leaf.shape.rank is None for leaf in leaves):
        return None
    return keras.tree.map_structure(lambda leaf: keras.KerasTensor(tuple(leaf.shape), leaf.dtype.name), spec)


def _as_array(labels):
    """Labels of a pandas table as NumPy's; others as they are."""
    return labels.to_numpy() if hasattr(labels, "to_numpy") else labels


def _samples(arguments):
    return kept(int(arguments["y"].shape[0]), arguments["validation_split"])


def _steps(arguments):
    data = arguments["x"]
    if is_array(arguments["y"]):
        return math.ceil(_samples(arguments) / (arguments["batch_size"] or 32))
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches
    if callable(getattr(data, "cardinality", None)):  # of a distributed dataset it is a number
        return max(int(data.cardinality()), 0) or None
    try:
        return len(data)
    except TypeError:  # some have a length that fails, as torch's DataLoader of an IterableDataset
        return None


def _check_some(arguments):
    data, labels = arguments["x"], arguments["y"]
    split = arguments.get("validation_split")
    if is_array(labels) and len(labels.shape) and not kept(int(labels.shape[0]), split):
        left = f", of which validation_split={split} leaves none" if split else ""
        raise ValueError(f"There are no samples. Received: {int(labels.shape[0])}{left}")
    if labels is None and callable(getattr(data, "cardinality", None)) and int(data.cardinality()) == 0:
        raise ValueError("There are no samples: the data pipeline is empty.")


def _check_batches(samples, batch_size, steps, replicas):
    reached = steps is None or steps * batch_size > samples
    for size in (min(batch_size, samples), samples % batch_size if reached else 0):
        part = math.ceil(size / replicas)  # as TensorFlow gives them out, to the first ones first
        if size and part * (replicas - 1) >= size:
            raise ValueError(
                f"Each of the {replicas} replicas needs a sample in every training batch. Received: {samples} samples "
                f"in batches of {batch_size}, of which one has {size}. Choose another batch_size, or leave the last "
                "samples out."
            )
    if batch_size == 1 or (samples % batch_size == 1 and reached):
        raise ValueError(
            f"A training batch of one sample has no spread and no batch statistics. Received: {samples} samples "
            f"in batches of {batch_size}, which leaves one alone. Choose another batch_size, or leave a sample out."
        )
