"""Writes one shard. All has been decided before: nothing here chooses."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from tfrecords.frames import FOOTER, HEADER, frame, read_frames
from tfrecords.images import load_site
from tfrecords.whole import open_whole


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
    """A shard on disk; `offsets` are the bytes at which its records begin, for a reader that wants one of them."""

    name: str
    count: int
    bytes: int
    sha256: str
    offsets: tuple


def write_shard(task):
    """Writes the shard of a `Task` under a temporary name, syncs and renames it, and gives its `Written`.

    A shard that an earlier, broken-off build of the same options left under its final name is kept if every record in
    it fits its checksum.

    Raises:
        ValueError: naming the image file that is damaged or has another size or mode.
        OSError: naming the shard for which no space is left.
    """
    path = Path(task.dest) / task.name
    if path.exists():
        found = scan_shard(path, task.name)
        if found is not None and found.count == len(task.sites):
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    offsets, size = [], 0
    # Uncompressed: gzip saves about a third of raw cell images and costs most of the reading speed.
    with open_whole(path) as file:
        for site in task.sites:
            image = load_site(task.source, site["path"], task.channels, task.size, task.crop, task.image_size)
            record = encode_site(site, image)
            header, footer = frame(record)
            offsets.append(size)
            for part in (header, record, footer):
                file.write(part)
                digest.update(part)
                size += len(part)
    return Written(task.name, len(task.sites), size, digest.hexdigest(), tuple(offsets))


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
    """Reads a shard through, checking and hashing it: a `Written`, or None if a frame is damaged."""
    digest = hashlib.sha256()
    offsets, end = [], 0
    for record, _ in read_frames(path, digest):
        if record is None:
            return None
        offsets.append(end)
        end += HEADER + len(record) + FOOTER
    return Written(name, len(offsets), end, digest.hexdigest(), tuple(offsets))
