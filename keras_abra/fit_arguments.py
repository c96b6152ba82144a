"""What `ABRAModel.fit` looks at before Keras does: the number of steps, labels and ids. Everything here runs on the
host."""

import contextlib
import inspect
import math
import sys

import keras
import numpy as np

from keras_abra import backend, checks
from keras_abra.losses.softmax_cross_entropy import ADD_UP
from keras_abra.non_finite_loss import StopOnNonFiniteLoss
from keras_abra.resumable_run import ResumableRun
from keras_abra.skip_non_finite import SkipNonFinite

_MARK, _END = "keras_abra: ", "[keras_abra]"  # around our message inside TensorFlow's
_SHARES = "The shares of the classes of a sample must be at least 0 and add up to 1."


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
    if arguments["y"] is None and (_is_array(arguments["x"]) or isinstance(arguments["x"], dict)):
        checks.check_labels(None, model.num_classes)
    arguments["x"], arguments["y"] = _check_data(model, arguments["x"], arguments["y"], training)
    check_division(arguments["x"], arguments["batch_size"], arguments.get("validation_split"))
    if not training:
        return
    if _is_array(arguments["y"]) and backend.replicas() == 1:
        steps = arguments["steps_per_epoch"]  # Keras goes on in the next epoch where this one ends
        steps = steps and steps * (arguments["epochs"] - arguments["initial_epoch"])
        replicas = getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)
        _check_batches(_samples(arguments), arguments["batch_size"] or 32, steps, replicas)
    if arguments["validation_data"] is not None:
        data = arguments["validation_data"]
        if isinstance(data, tuple | list) and len(data) > 1:
            data = (data[0], _as_array(data[1]), *data[2:])
            check_division(data[0], arguments["validation_batch_size"] or arguments["batch_size"])
            arguments["validation_data"] = (*_check_data(model, data[0], data[1], False), *data[2:])
        else:
            arguments["validation_data"] = _check_data(model, data, None, False)[0]


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


def check_division(x, batch_size, validation_split=None):
    """Checks that the batches made of arrays, or of fixed size in a `tf.data` pipeline, divide among the devices.

    Raises:
        ValueError: naming the size that does not.
    """
    devices, tensorflow = backend.devices(), sys.modules.get("tensorflow")
    if devices == 1:
        return
    first = x["image"] if isinstance(x, dict) and "image" in x else x
    if _is_array(first):
        samples, size = _kept(int(first.shape[0]), validation_split), batch_size or 32
        sizes = [min(samples, size), samples % size, (int(first.shape[0]) - samples) % size]
    elif tensorflow is not None and isinstance(x, tensorflow.data.Dataset):
        sizes = [keras.tree.flatten(x.element_spec)[0].shape[:1].as_list()[0] or 0]
    else:
        return
    for size in sizes:
        if size % devices:
            raise ValueError(_indivisible(devices) + str(size))


def _indivisible(devices):
    return (
        f"Every batch must divide among the {devices} devices that this process has under keras.distribution. Choose a "
        f"multiple of {devices} and leave no smaller last batch: drop_remainder=True in training; rows of weight 0 and "
        "`weighted_metrics` in evaluation, as tfrecords.read_records(pad=True) gives them. Received: a batch of size "
    )


def check_arrays(model, x, y, training=True):
    """Checks the labels, and in training ids, of one batch of arrays.

    Raises:
        ValueError: naming the first one outside its range.
    """
    _check_data(model, x, y, training)


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


@contextlib.contextmanager
def plain_errors():
    """Turns the failed check of a `tf.data` pipeline into a ValueError without TensorFlow's traces."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if _MARK not in text:
            raise
        raise ValueError(text.split(_MARK)[1].split(_END)[0].strip()) from error


def _as_array(labels):
    """Labels of a pandas table as NumPy's; others as they are."""
    return labels.to_numpy() if hasattr(labels, "to_numpy") else labels


def _is_array(value):
    return hasattr(value, "shape") and hasattr(value, "dtype") and not callable(value)


def _samples(arguments):
    return _kept(int(arguments["y"].shape[0]), arguments["validation_split"])


def _kept(samples, validation_split):
    return math.floor(samples * (1.0 - (validation_split or 0.0)))  # as Keras splits


def _steps(arguments):
    data = arguments["x"]
    if _is_array(arguments["y"]):
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
    if _is_array(labels) and len(labels.shape) and not _kept(int(labels.shape[0]), split):
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


def _check_data(model, x, y, training):
    limits = {"label": model.num_classes}
    if model.uncertainty.num_experiments is not None and training:
        limits["experiment id"] = model.uncertainty.num_experiments
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and isinstance(x, tensorflow.data.Dataset):
        plain = tensorflow.autograph.experimental.do_not_convert  # errors keep their text
        return x.map(plain(lambda *batch: _checked(tensorflow, model, batch, limits, training))), y
    values = {"label": y, "experiment id": x.get("experiment") if isinstance(x, dict) else None}
    if _is_array(y) and checks.has_shares(y, model.num_classes):
        _check_shares(keras.ops.convert_to_numpy(y))
        del limits["label"]
    for name, limit in limits.items():
        if _is_array(values[name]):
            _check_range(name, keras.ops.convert_to_numpy(values[name]), limit)
    return x, y


def _check_range(name, values, limit):
    if values.dtype.kind not in "iufb":
        raise ValueError(f"Every {name} must be an integer in [0, {limit}). Received: values of type {values.dtype}")
    whole = values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)
    if not whole:
        shares = f", or the share of each class, shape (samples, {limit})" if name == "label" else ""
        raise ValueError(
            f"Every sample needs one integer {name}, shape (samples,){shares}. Received: shape {values.shape}"
        )
    values = values.ravel()
    wrong = np.flatnonzero(~((values >= 0) & (values < limit) & (values == np.floor(values))))
    if wrong.size:
        raise ValueError(
            f"Every {name} must be an integer in [0, {limit}). Received: {values[wrong[0]]} for sample {wrong[0]}"
            f"{f' and {wrong.size - 1} more' if wrong.size > 1 else ''}"
        )


def _check_shares(values):
    if values.dtype.kind not in "iufb":
        raise ValueError(f"{_SHARES} Received: values of type {values.dtype}")
    values = values.astype("float64")
    wrong = np.flatnonzero(~((values >= 0).all(1) & (np.abs(values.sum(1) - 1) <= ADD_UP)))
    if wrong.size:
        raise ValueError(
            f"{_SHARES} Received: the least {values[wrong[0]].min():g}, the sum {values[wrong[0]].sum():g} for sample "
            f"{wrong[0]}{f' and {wrong.size - 1} more' if wrong.size > 1 else ''}"
        )


def _checked(tf, model, batch, limits, training):
    limits = dict(limits)
    x, y = batch[0], batch[1] if len(batch) > 1 else None
    image = x.get("image") if isinstance(x, dict) else x
    if image is None or image.shape.rank is not None:
        model.unpack_inputs(x)
    elif keras.backend.backend() == "tensorflow":
        raise ValueError(
            "The images of the pipeline have no known shape, as those of tf.py_function have none. Set it: "
            "images.set_shape([None, height, width, channels])."
        )
    if y is not None and y.shape.rank is None:
        raise ValueError(
            "The labels of the pipeline have no known shape, as those of tf.py_function have none. Set it: "
            "labels.set_shape([None]), or [None, classes] for shares."
        )
    checks.check_labels(y, model.num_classes)
    values = {"label": y, "experiment id": x.get("experiment") if isinstance(x, dict) else None}
    asserts = []
    if checks.has_shares(y, model.num_classes):
        del values["label"], limits["label"]
        least, sums = (reduce(tf.cast(y, tf.float32), axis=1) for reduce in (tf.reduce_min, tf.reduce_sum))
        wrong = ~((least >= 0) & (tf.abs(sums - 1) <= ADD_UP))  # NaN among it
        least, sums = (_text(tf, tf.boolean_mask(value, wrong)) for value in (least, sums))
        message = tf.strings.join([_MARK + _SHARES, " Received: the least ", least, ", the sum ", sums, _END])
        asserts.append(tf.debugging.Assert(~tf.reduce_any(wrong), [message]))
    for name, limit in limits.items():
        if values[name] is None:
            continue
        kind = values[name].dtype
        if not (kind.is_integer or kind.is_floating or kind.is_bool):
            raise ValueError(f"Every {name} must be an integer in [0, {limit}). Received: values of type {kind.name}")
        ids = values[name] if values[name].dtype.is_floating else tf.cast(values[name], tf.int64)
        message = f"{_MARK}Every {name} must be an integer in [0, {limit}). Received: "
        good = (ids >= 0) & (ids < limit) & (tf.floor(ids) == ids if ids.dtype.is_floating else True)
        wrong = tf.boolean_mask(ids, ~good)  # NaN among it
        asserts.append(
            tf.debugging.Assert(tf.equal(tf.size(wrong), 0), [tf.strings.join([message, _text(tf, wrong), _END])])
        )
    if (devices := backend.devices()) > 1 and y is not None:
        size = tf.shape(y)[0]
        message = tf.strings.join([f"{_MARK}{_indivisible(devices)}", tf.strings.as_string(size), _END])
        asserts.append(tf.debugging.Assert(tf.equal(size % devices, 0), [message]))
    if training and backend.replicas() == 1:
        asserts.append(tf.debugging.Assert(tf.shape(y)[0] > 1, [checks.ONE_SAMPLE]))
    with tf.control_dependencies(asserts):
        return tf.nest.map_structure(tf.identity, batch)


def _text(tf, values):
    return tf.strings.reduce_join(tf.strings.as_string(values[:5]), separator=", ")
