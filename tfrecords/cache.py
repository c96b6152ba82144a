"""Keeps decoded pixels: in memory, or in a file of fixed-size records."""

import errno
import hashlib
import shutil
import weakref
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfrecords.frames import FOOTER, HEADER, frame
from tfrecords.image_batches import Source, image_batches
from tfrecords.locks import lock
from tfrecords.manifest import MANIFEST
from tfrecords.progress import progress_bar
from tfrecords.record_images import record_at
from tfrecords.whole import open_whole

_held = weakref.WeakValueDictionary()  # name -> handle of the table, which lives as long as a pipeline has it


def cached_images(source, dest, sites, share, cache):
    """Reads every site of a share once, now, and gives the `Source` that has their pixels from the cache.

    It pays where decoding is slow (png records) or `dest` is on a slow disk; raw records on a fast disk are in the
    memory of the operating system after the first epoch anyway. The cache is before shuffling and augmentation.

    Args:
        source: of `record_images`.
        dest: folder of records.
        sites: rows of `list_sites`.
        share: slice of the sites that will be asked for.
        cache: `"memory"`, which takes the bytes of all these images; pipelines of one process that read the same sites
            share it, and it lasts as long as one of them. Each process has its own: several on one machine may have the
            folder in common. Or a folder, which gets one file. Its name is a checksum of manifest and sites, so that it
            is never taken for another's; it stands there whole or not at all; and each image in it has a checksum.

    """
    name = hashlib.sha256((Path(dest) / MANIFEST).read_bytes())
    name.update("\n".join(sites["site_id"].iloc[share]).encode())
    if share.start:  # rows are counted from the first site, in memory
        name.update(f"from {share.start}".encode())
    name = name.hexdigest()[:32]
    if cache == "memory":
        return _in_memory(source, share, name)
    if not isinstance(cache, str | Path):
        raise ValueError(f"cache is 'memory', a folder, or None. Received: cache={cache!r}")
    if Path(cache).resolve().is_relative_to(Path(dest).resolve()):
        raise ValueError(
            f"The cache {str(cache)!r} lies in the folder of records {str(dest)!r}, which holds nothing else. Name a "
            "folder outside it."
        )
    if Path(cache).exists() and not Path(cache).is_dir():
        raise ValueError(f"The cache {str(cache)!r} is a file. Name a folder, which gets one file for each use.")
    path = Path(cache) / f"{name}.tfrecord"
    length = HEADER + int(np.prod(source.shape)) + FOOTER
    size = length * (share.stop - share.start)
    if not _is_whole(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "a") as file:
            alone = lock(file)  # others wait, and find it
            if not _is_whole(path, size):
                _fill(path, size, source, share, alone)
    return _in_file(str(path), length, source, share.start)


def _is_whole(path, size):
    return path.is_file() and path.stat().st_size == size


def _fill(path, size, source, share, alone):
    for left in path.parent.glob(f".{path.name}.*.tmp") if alone else ():  # by processes that were killed
        left.unlink(missing_ok=True)
    total, _, free = shutil.disk_usage(path.parent)
    if total and free < size:  # some file systems do not tell
        raise OSError(
            errno.ENOSPC,
            f"The cache {path.parent} needs {size / 1e9:,.1f} GB for {share.stop - share.start:,} images, and has "
            f"{free / 1e9:,.1f} GB free. Make space, name another folder, or read without a cache",
        )
    with open_whole(path) as file:
        for _, images in _all(source, share):
            for image in images:
                record = image.tobytes()
                header, footer = frame(record)
                file.write(b"".join((header, record, footer)))


def _all(source, share):
    step = max(1, 2**24 // int(np.prod(source.shape)))
    data = image_batches(source, tf.range(share.start, share.stop, dtype=tf.int64), step)
    with progress_bar(share.stop - share.start, "cache") as progress:
        for rows, images in data.prefetch(1).as_numpy_iterator():
            yield rows, images
            progress.update(len(rows))


def _in_memory(source, share, name):
    handle = _held.get(name)
    if handle is None:
        # Filled piece by piece; one large tensor would be there twice while it is made.
        with tf.device("CPU:0"):
            table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.string, "", experimental_is_anonymous=True)
            for rows, images in _all(source, share):
                table.insert(rows, [image.tobytes() for image in images])
        handle = _held[name] = table.resource_handle

    def read(row):
        found = tf.raw_ops.LookupTableFindV2(table_handle=handle, keys=row, default_value="")
        return tf.reshape(tf.io.decode_raw(found, tf.uint8), source.shape), row

    return Source(source.shape, read, tf.range(len(source.names), dtype=tf.int64), lambda row: "No such image.")


def _in_file(path, length, source, start):
    def read(row):
        return tf.reshape(tf.io.decode_raw(record_at(path, (row - start) * length), tf.uint8), source.shape), row

    def complain(row):
        text = ": damaged. Remove this file of the cache, and start again."
        return tf.strings.join([f"{path}, record ", tf.strings.as_string(row - start), text])

    return Source(source.shape, read, tf.range(len(source.names), dtype=tf.int64), complain)
