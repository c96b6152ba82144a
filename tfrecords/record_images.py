"""Any record by itself: its place is in the index, so that an order needs no neighbours and damage has a name."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from tfrecords.devices import leave_gpu_to_backend
from tfrecords.image_batches import Source
from tfrecords.mirror import how_to_mend


def record_images(dest, sites, manifest):
    """Gives the `Source` of the images of any sites in records, checked.

    A record is read at its offset; TensorFlow checks the two checksums of its frame, and its `site_id` must be the
    one that the index has there. `tf.data.TFRecordDataset` stops at damage without naming the file, or skips the rest
    of it; here each record is a data set of its own, so that a fault is caught with its name and can reach nothing
    else. Reading one by one is as fast as streaming where files are in memory or on a solid-state disk; a spinning
    disk or a network file system must seek for each site.

    Args:
        dest: folder of records.
        sites: rows of `list_sites`.
        manifest: see `read_manifest`.
    """
    leave_gpu_to_backend()
    shape = tuple(manifest["image_shape"])
    decode = _decoder(shape, manifest["planes"])
    files, file_of = np.unique(sites["shard"].to_numpy(str), return_inverse=True)
    paths = tf.constant([str(Path(dest) / name) for name in files])
    file_of = tf.constant(file_of, tf.int64)
    offsets = tf.constant(sites["offset"].to_numpy(np.int64))
    numbers = tf.constant(sites["record"].to_numpy(np.int64))
    site_ids = tf.constant(sites["site_id"].to_numpy(str))

    mending = how_to_mend(dest)

    def read(row):
        path = tf.gather(paths, tf.gather(file_of, row))
        return decode(record_at(path, tf.gather(offsets, row)))

    def complain(row):
        parts = [
            tf.gather(paths, tf.gather(file_of, row)),
            ", record ",
            tf.strings.as_string(tf.gather(numbers, row)),
            ": damaged, missing or not of the site ",
            tf.gather(site_ids, row),
            f". Nothing was skipped: the reading stopped here. {mending} Then start again.",
        ]
        return tf.strings.join(parts)

    return Source(shape, read, site_ids, complain)


def record_at(path, offset):
    """The record that begins at byte `offset` of a file: string, inside a tf.data graph."""
    # Unbuffered: exactly the bytes of the frame are read.
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path], compression_type="", buffer_size=tf.constant(0, tf.int64), byte_offsets=[offset]
    )
    return tf.data.experimental.from_variant(variant, tf.TensorSpec((), tf.string)).take(1).get_single_element()


def _decoder(shape, planes):
    """Decodes a record with the raw pixels, or with PNG files of so many channels each (see `write.encode_site`)."""

    def decode(record):
        # One value without a dimension: an element of a list of one would be copied.
        image = tf.io.FixedLenFeature([len(planes)] if planes else [], tf.string)
        parsed = tf.io.parse_single_example(record, {"image": image, "site_id": tf.io.FixedLenFeature([], tf.string)})
        if planes:
            files = [tf.io.decode_png(parsed["image"][i], channels=count) for i, count in enumerate(planes)]
            pixels = tf.concat(files, axis=2)
        else:
            pixels = tf.reshape(tf.io.decode_raw(parsed["image"], tf.uint8), shape)
        return tf.ensure_shape(pixels, shape), parsed["site_id"]

    return decode
