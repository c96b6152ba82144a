"""Checks of data before Keras sees them: labels, shares and experiment ids, and that batches divide among devices.
Everything here runs on the host."""

import contextlib
import math
import sys

import keras
import numpy as np

from keras_abra import backend, checks
from keras_abra.losses.softmax_cross_entropy import ADD_UP

_MARK, _END = "keras_abra: ", "[keras_abra]"  # around our message inside TensorFlow's
_SHARES = "The shares of the classes of a sample must be at least 0 and add up to 1."


def check_data(model, x, y, training=True):
    """Checks labels, and in training ids: those of arrays at once, those of a `tf.data` pipeline in every mini-batch.

    Returns:
        `x`, a pipeline's with its checks.

    Raises:
        ValueError: naming the first one outside its range; from a pipeline when it is read (see `plain_errors`).
    """
    limits = {"label": model.num_classes}
    if model.uncertainty.num_experiments is not None and training:
        limits["experiment id"] = model.uncertainty.num_experiments
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and isinstance(x, tensorflow.data.Dataset):
        plain = tensorflow.autograph.experimental.do_not_convert  # errors keep their text
        return x.map(plain(lambda *batch: _checked(tensorflow, model, batch, limits, training)))
    values = {"label": y, "experiment id": x.get("experiment") if isinstance(x, dict) else None}
    if is_array(y) and checks.has_shares(y, model.num_classes):
        _check_shares(keras.ops.convert_to_numpy(y))
        del limits["label"]
    for name, limit in limits.items():
        if is_array(values[name]):
            _check_range(name, keras.ops.convert_to_numpy(values[name]), limit)
    return x


def check_division(x, batch_size, validation_split=None):
    """Checks that the batches made of arrays, or of fixed size in a `tf.data` pipeline, divide among the devices.

    Raises:
        ValueError: naming the size that does not.
    """
    devices, tensorflow = backend.devices(), sys.modules.get("tensorflow")
    if devices == 1:
        return
    first = x["image"] if isinstance(x, dict) and "image" in x else x
    if is_array(first):
        samples, size = kept(int(first.shape[0]), validation_split), batch_size or 32
        sizes = [min(samples, size), samples % size, (int(first.shape[0]) - samples) % size]
    elif tensorflow is not None and isinstance(x, tensorflow.data.Dataset):
        sizes = [keras.tree.flatten(x.element_spec)[0].shape[:1].as_list()[0] or 0]
    else:
        return
    for size in sizes:
        if size % devices:
            raise ValueError(_indivisible(devices) + str(size))


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


def is_array(value):
    return hasattr(value, "shape") and hasattr(value, "dtype") and not callable(value)


def kept(samples, validation_split):
    return math.floor(samples * (1.0 - (validation_split or 0.0)))  # as Keras splits


def _indivisible(devices):
    return (
        f"Every batch must divide among the {devices} devices that this process has under keras.distribution. Choose a "
        f"multiple of {devices} and leave no smaller last batch: drop_remainder=True in training; rows of weight 0 and "
        "`weighted_metrics` in evaluation, as tfrecords.read_records(pad=True) gives them. Received: a batch of size "
    )


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
