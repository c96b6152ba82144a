"""Reads the images of given sites, in order, as batches: nothing is skipped, and what cannot be read is named."""

import re
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

_TRANSIENT = "A batch could not be read, and on a second try each of its images can. Nothing was skipped. Start again."


class Source(NamedTuple):
    """Where the images of a table of sites come from, see `record_images` and `cached_images`.

    `read(row)` gives an image, uint8 `(height, width, channels)`, and the name that stands with it, inside a tf.data
    graph; it may fail. `names` are those that the rows must have. `complain(row)` says that one could not be read.
    """

    shape: tuple
    read: Callable
    names: tf.Tensor
    complain: Callable


def image_batches(source, rows, size, view=None, each=None):
    """Gives (rows, images) of `size` sites at a time, in their order.

    Each image is read, and changed by `view`, by itself, several at a time: so it stays in the processor's cache.

    Args:
        source: a `Source`.
        rows: row numbers of its table, int64 `(count,)`; `~row` stands for the same site as `row`.
        size: of a batch. The last one is smaller where `count` is no multiple of it.
        view: function of (image, element of `each`), for what to make of each image. Default: the image itself.
        each: `tf.data.Dataset` of an element for each row, which `view` needs.

    Returns:
        tf.data.Dataset. At an image that cannot be read, or is of another site, it raises
        `tf.errors.InvalidArgumentError` with the message of `source.complain`.
    """
    count = rows.shape[0]
    even = count is not None and count % size == 0
    wanted = tf.data.Dataset.from_tensor_slices(rows)
    places = wanted if each is None else tf.data.Dataset.zip((wanted, each))

    def read(place, element):
        row, *extra = (element,) if each is None else element
        image, name = source.read(_row_of(row))
        image = tf.ensure_shape(image, source.shape)
        return place, name, image if view is None else view(image, *extra)

    # TensorFlow makes one step of `map` and `batch`: images go from the processor's cache to their places in the batch.
    found = places.enumerate().map(read, tf.data.AUTOTUNE, deterministic=True).batch(size, drop_remainder=even)
    # A batch with an image that cannot be read is left out, and the end filled. An error of the record itself must not
    # get this far: a file that cannot be opened gives it again and again (tensorflow #25700).
    nothing = tf.data.Dataset.range(1).repeat().map(lambda _: _nothing(found.element_spec, size))
    filled = found.ignore_errors().concatenate(nothing)

    def check(batch, planned_and_found):
        planned, (places, names, images) = planned_and_found
        rows, count = _row_of(planned), tf.size(planned, tf.int64)
        in_place = tf.reduce_max(places) == batch * size + count - 1
        expected = tf.gather(source.names, rows)
        right = in_place & tf.reduce_all(names[:count] == expected[: tf.size(names)])
        message = tf.cond(right, lambda: "", lambda: _explain(source, rows))
        with tf.control_dependencies([tf.debugging.Assert(right, [message])]):
            return planned, tf.identity(images)

    # One after the other: the first complaint is of the first image that is missing.
    return tf.data.Dataset.zip((wanted.batch(size, drop_remainder=even), filled)).enumerate().map(check)


def complaint_in(error):
    """What `source.complain` said, without what TensorFlow and Keras have put around it; None in another error."""
    found = re.search(r"assertion failed: \[(.+?)\]$", str(error), re.DOTALL | re.MULTILINE)
    return found and found[1]


def _explain(source, rows):
    """What is wrong with the first of some rows that cannot be read, or is of another site."""

    def read(place, row):
        image, name = source.read(row)
        return place, name, image[0, 0, 0]  # Of an image that is not needed TensorFlow would decode nothing.

    found = tf.data.Dataset.from_tensor_slices(rows).enumerate().map(read).ignore_errors()
    nothing = tf.data.Dataset.from_tensors(_nothing(found.element_spec, 1)).repeat()
    count = tf.size(rows, tf.int64)
    places, names, _ = found.concatenate(nothing).take(count).batch(count).get_single_element()
    wrong = (places != tf.range(count)) | (names != tf.gather(source.names, rows))
    first = tf.gather(rows, tf.argmax(tf.cast(wrong, tf.int32)))
    return tf.where(tf.reduce_any(wrong), source.complain(first), _TRANSIENT)


def _nothing(spec, size):
    """An element that is in no place."""

    def zeros(part):
        return tf.zeros([size if edge is None else edge for edge in part.shape], part.dtype)

    place, *others = spec
    return (zeros(place) - 1, *map(zeros, others))


def _row_of(rows):
    return tf.where(rows < 0, -1 - rows, rows)
