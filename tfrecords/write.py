"""Writes one shard. All has been decided before: nothing here chooses."""

import hashlib
import os
import struct
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from tfrecords.images import load_site
from tfrecords.manifest import sync_folder

# The frame of a TFRecord: 8 bytes length, 4 bytes checksum of it, the record, 4 bytes checksum.
HEADER, FOOTER = 12, 4


class Task(NamedTuple):
    """One shard to write: `sites` holds a dict for each record; `size` is (height, width) of the files on disk."""

    source: str
    dest: str
    name: str
    sites: list
    channels: tuple
    size: tuple
    crop: int | None
    image_size: int | None


class Written(NamedTuple):
    """A shard on disk."""

    name: str
    count: int
    bytes: int
    sha256: str


def write_shard(task):
    """Writes the shard of a `Task` under a temporary name, syncs and renames it, and gives its `Written`.

    A shard that an earlier, broken-off build of the same options left under its final name is kept.

    Raises:
        ValueError: naming the image file that is damaged or has another size or mode.
    """
    path = Path(task.dest) / task.name
    if path.exists():
        found = scan_shard(path, task.name)
        if found is not None and found.count == len(task.sites):
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # Uncompressed: gzip saves about a third of raw cell images and costs most of the reading speed.
        with tf.io.TFRecordWriter(str(temporary)) as writer:
            for site in task.sites:
                image = load_site(task.source, site["path"], task.channels, task.size, task.crop, task.image_size)
                writer.write(encode_site(site, image))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        written = scan_shard(temporary, task.name)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def encode_site(site, image):
    """One record: Recursion's keys (rxrx1-utils, images2tfrecords) and `site_id`.

    Args:
        site: dict with the columns of `read_sites`.
        image: uint8 `(height, width, channels)`; stored as its raw bytes.

    Returns:
        bytes of a serialized `tf.train.Example`, equal for equal input. `sirna` is left out where it is unknown.
    """
    texts = {key: str(site[key]).encode() for key in ("well", "well_type", "experiment", "cell_type", "site_id")}
    texts["image"] = image.tobytes()
    numbers = {"plate": int(site["plate"]), "site": int(site["site"])}
    if site["sirna_id"] is not None:
        numbers["sirna"] = int(site["sirna_id"])
    features = {key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for key, value in texts.items()}
    for key, value in numbers.items():
        features[key] = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def scan_shard(path, name):
    """Walks the frames of a shard and hashes it: a `Written`, or None if the frames do not end where the file does."""
    digest = hashlib.sha256()
    count = 0
    total = os.path.getsize(path)
    position = 0
    with open(path, "rb") as file:
        while position < total:
            header = file.read(HEADER)
            length = struct.unpack_from("<Q", header)[0] if len(header) == HEADER else total
            if position + HEADER + length + FOOTER > total:
                return None
            record = file.read(length)
            footer = file.read(FOOTER)
            for part in (header, record, footer):
                digest.update(part)
            count += 1
            position += HEADER + length + FOOTER
    return Written(name, count, total, digest.hexdigest())
