"""Reads the images of given sites, in order, as batches: nothing is skipped, and what cannot be read is named."""

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
    spec = found.element_spec
    nothing = tf.data.Dataset.range(1).repeat().map(lambda _: (_nothing(spec[0]) - 1, *map(_nothing, spec[1:])))
    found = found.ignore_errors().concatenate(nothing)

    def check(batch, planned_and_found):
        planned, (places, names, images) = planned_and_found
        count = tf.size(planned, tf.int64)
        due = tf.range(batch * size, batch * size + count)
        lost = tf.cond(tf.size(places, tf.int64) == count, lambda: tf.reduce_any(places != due), lambda: True)
        rows = _row_of(planned)
        wrong = tf.cond(lost, lambda: _unreadable(source, rows), lambda: names != tf.gather(source.names, rows))
        first = tf.gather(rows, tf.argmax(tf.cast(wrong, tf.int32)))
        some = tf.reduce_any(wrong)
        message = tf.cond(some, lambda: source.complain(first), lambda: _TRANSIENT)
        with tf.control_dependencies([tf.debugging.Assert(~(some | lost), [message])]):
            return planned, tf.identity(images)

    # One after the other: the first complaint is of the first image that is missing.
    return tf.data.Dataset.zip((wanted.batch(size, drop_remainder=even), found)).enumerate().map(check)


def _unreadable(source, rows):
    """Which of some rows cannot be read, or are of another site: bool. After the first, no more is known."""

    def read(place, row):
        image, name = source.read(row)
        return place, name, image[0, 0, 0]  # Of an image that is not needed TensorFlow would decode nothing.

    found = tf.data.Dataset.from_tensor_slices(rows).enumerate().map(read).ignore_errors()
    place, *others = found.element_spec
    nothing = tf.data.Dataset.from_tensors((_nothing(place) - 1, *map(_nothing, others))).repeat()
    count = tf.size(rows, tf.int64)
    places, names, _ = found.concatenate(nothing).take(count).batch(count).get_single_element()
    return (places != tf.range(count)) | (names != tf.gather(source.names, rows))


def _nothing(spec):
    return tf.zeros([size or 0 for size in spec.shape], spec.dtype)


def _row_of(rows):
    return tf.where(rows < 0, -1 - rows, rows)
