"""Any record by itself: its place is in the index, so that an order needs no neighbours and damage has a name."""

from pathlib import Path

import numpy as np
import tensorflow as tf


def record_images(dest, sites, manifest):
    """Gives a function that reads the images of any sites inside a tf.data graph, checked.

    A record is read at its offset; TensorFlow checks the two checksums of its frame, and its `site_id` must be the
    one that the index has there. `tf.data.TFRecordDataset` stops at damage without naming the file, or skips the rest
    of it; here each record is a data set of its own, so that a fault is caught with its name and can reach nothing
    else. Reading one by one is as fast as streaming where files are in memory or on a solid-state disk; a spinning
    disk or a network file system must seek for each site.

    Args:
        dest: folder of records.
        sites: rows of `list_sites`.
        manifest: see `read_manifest`.

    Returns:
        Function of row numbers of `sites`, int64 `(batch,)`, that gives uint8 `(batch, height, width, channels)`. It
        raises `tf.errors.InvalidArgumentError` for a damaged record, naming file, record, site and the way to repair.
    """
    shape = tuple(manifest["image_shape"])
    decode = _decoder(shape, manifest["planes"])
    files, file_of = np.unique(sites["shard"].to_numpy(str), return_inverse=True)
    paths = tf.constant([str(Path(dest) / name) for name in files])
    file_of = tf.constant(file_of, tf.int64)
    offsets = tf.constant(sites["offset"].to_numpy(np.int64))
    numbers = tf.constant(sites["record"].to_numpy(np.int64))
    site_ids = tf.constant(sites["site_id"].to_numpy(str))

    def read(row):
        path = tf.gather(paths, tf.gather(file_of, row))
        return record_at(path, tf.gather(offsets, row)).map(decode).get_single_element()

    def images_of(rows):
        images, found = read_each(read, rows, (tf.zeros(shape, tf.uint8), ""))
        expected = tf.gather(site_ids, rows)
        wrong = tf.not_equal(found, expected)
        first = tf.gather(rows, tf.argmax(tf.cast(wrong, tf.int32)))
        message = [
            tf.gather(paths, tf.gather(file_of, first)),
            ", record ",
            tf.strings.as_string(tf.gather(numbers, first)),
            ": damaged, missing or not of the site ",
            tf.gather(site_ids, first),
            f". Nothing was skipped: the reading stopped here. Run `python -m tfrecords.verify {dest} --repair`, then "
            "start again.",
        ]
        with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(wrong), [tf.strings.join(message)])]):
            return tf.identity(images)

    return images_of


def record_at(path, offset):
    """The record that begins at byte `offset` of a file, as a `tf.data.Dataset` of one string."""
    # Unbuffered: exactly the bytes of the frame are read.
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path], compression_type="", buffer_size=tf.constant(0, tf.int64), byte_offsets=[offset]
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec((), tf.string)).take(1)


def read_each(read, rows, nothing):
    """Reads each of some rows. What cannot be read is left out, and the end filled: no error can repeat for ever.

    Args:
        read: function of one row number.
        rows: int64 `(batch,)`.
        nothing: what fills the end, as `read` gives it.

    Returns:
        What `read` gives, stacked `(batch, ...)`. The first row that does not fit its place could not be read.
    """
    count = rows.shape[0] or tf.size(rows, tf.int64)
    # Not over the record itself: a file that cannot be opened gives its error again and again (tensorflow #25700),
    # while a row is used up by it.
    found = tf.data.Dataset.from_tensor_slices(rows).map(read).ignore_errors()
    filled = found.concatenate(tf.data.Dataset.from_tensors(nothing).repeat()).take(count)
    return filled.batch(count, rows.shape[0] is not None).get_single_element()


def _decoder(shape, planes):
    """Decodes a record with the raw pixels, or with PNG files of so many channels each (see `write.encode_site`)."""
    values = len(planes) if planes else 1

    def decode(record):
        image = tf.io.FixedLenFeature([values], tf.string)
        parsed = tf.io.parse_single_example(record, {"image": image, "site_id": tf.io.FixedLenFeature([], tf.string)})
        if planes:
            files = [tf.io.decode_png(parsed["image"][i], channels=count) for i, count in enumerate(planes)]
            pixels = tf.concat(files, axis=2)
        else:
            pixels = tf.reshape(tf.io.decode_raw(parsed["image"][0], tf.uint8), shape)
        return tf.ensure_shape(pixels, shape), parsed["site_id"]

    return decode
