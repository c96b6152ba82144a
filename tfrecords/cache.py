"""Keeps decoded pixels: in memory, or in a file of fixed-size records."""

import hashlib
import weakref
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfrecords.frames import FOOTER, HEADER, frame
from tfrecords.manifest import MANIFEST
from tfrecords.record_images import read_each, record_at
from tfrecords.whole import open_whole

_held = weakref.WeakValueDictionary()  # name -> handle of the table, which lives as long as a pipeline has it


def cached_images(images_of, dest, sites, manifest, cache):
    """Reads every site once, now, and gives a function that has their pixels from the cache.

    It pays where decoding is slow (png records) or `dest` is on a slow disk; raw records on a fast disk are in the
    memory of the operating system after the first epoch anyway. The cache is before shuffling and augmentation.

    Args:
        images_of: function of `record_images`.
        dest: folder of records.
        sites: rows of `list_sites`.
        manifest: see `read_manifest`.
        cache: `"memory"`, which takes the bytes of all images; pipelines of one process that read the same sites share
            it, and it lasts as long as one of them. Or a folder, which gets one file. Its name is a checksum of
            manifest and sites, so that it is never taken for another's; it stands there whole or not at all; and each
            image in it has a checksum.

    Returns:
        Function as `images_of`. It raises `tf.errors.InvalidArgumentError` for a damaged image in the file.
    """
    shape = tuple(manifest["image_shape"])
    name = hashlib.sha256((Path(dest) / MANIFEST).read_bytes())
    name.update("\n".join(sites["site_id"]).encode())
    name = name.hexdigest()[:32]
    if cache == "memory":
        return _in_memory(images_of, len(sites), shape, name)
    path = Path(cache) / f"{name}.tfrecord"
    length = HEADER + int(np.prod(shape)) + FOOTER
    if not path.is_file() or path.stat().st_size != length * len(sites):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(path) as file:
            for _, images in _all(images_of, len(sites), shape):
                for image in images:
                    record = image.tobytes()
                    file.write(b"".join((frame(record)[0], record, frame(record)[1])))
    return _in_file(str(path), length, shape)


def _all(images_of, count, shape):
    step = max(1, 2**24 // int(np.prod(shape)))
    data = tf.data.Dataset.range(count).batch(step).map(lambda rows: (rows, images_of(rows)), tf.data.AUTOTUNE)
    with tqdm(total=count, unit="site", desc="cache") as progress:
        for rows, images in data.prefetch(1).as_numpy_iterator():
            yield rows, images
            progress.update(len(rows))


def _in_memory(images_of, count, shape, name):
    handle = _held.get(name)
    if handle is None:
        # Filled piece by piece; one large tensor would be there twice while it is made.
        with tf.device("CPU:0"):
            table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, "", experimental_is_anonymous=True)
            for rows, images in _all(images_of, count, shape):
                table.insert(rows, [image.tobytes() for image in images])
        handle = _held[name] = table.resource_handle

    def images_from_table(rows):
        found = tf.raw_ops.LookupTableFindV2(table_handle=handle, keys=rows, default_value="")
        pixels = tf.io.decode_raw(found, tf.uint8, fixed_length=None)
        return tf.ensure_shape(tf.reshape(pixels, (-1, *shape)), (rows.shape[0], *shape))

    return images_from_table


def _in_file(path, length, shape):
    def decode(record):
        return tf.reshape(tf.io.decode_raw(record, tf.uint8), shape)

    def read(row):
        return record_at(path, row * length).map(decode).get_single_element(), row

    def images_from_file(rows):
        images, found = read_each(read, rows, (tf.zeros(shape, tf.uint8), tf.constant(-1, tf.int64)))
        wrong = tf.not_equal(found, rows)
        first = tf.strings.as_string(tf.gather(rows, tf.argmax(tf.cast(wrong, tf.int32))))
        message = [f"{path}, record ", first, ": damaged. Remove this file of the cache, and start again."]
        with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(wrong), [tf.strings.join(message)])]):
            return tf.identity(images)

    return images_from_file
