"""Writes one shard. All has been decided before: nothing here chooses."""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

from tfrecords.example import encode_example
from tfrecords.faults import collect_faults
from tfrecords.frames import FOOTER, HEADER, frame, read_frames
from tfrecords.images import by_file, load_planes, load_site
from tfrecords.png import load_pngs
from tfrecords.whole import open_whole


class Task(NamedTuple):
    """One shard to write.

    `sites` holds a dict for each record, with `ranges` where grey levels are scaled (see `images.load_site`); `size` is
    `images.Size` of the files on disk; `planes`, of `png.png_planes`, makes the records hold PNG files, None raw
    pixels; `sha256` is what the file must have, where that is known.
    """

    source: str
    dest: str
    name: str
    sites: list
    channels: tuple
    size: tuple
    crop: int | None
    image_size: int | None
    planes: tuple | None = None
    sha256: str | None = None


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
    it fits its checksum. (Those of which rows or image files were changed since are gone by then, see `folder.claim`.)

    Raises:
        Faults: naming the image files that are damaged or have another size or mode.
        OSError: naming the shard for which no space is left.
    """
    path = Path(task.dest) / task.name
    if path.exists():
        found = scan_shard(path, task.name)
        if found is not None and found.count == len(task.sites) and task.sha256 in (None, found.sha256):
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    offsets, size = [], 0
    # Uncompressed: gzip saves about a third of raw cell images and costs most of the reading speed.
    with open_whole(path) as file:
        records = collect_faults(functools.partial(_encode, task), task.sites)
        for record in records:
            header, footer = frame(record)
            offsets.append(size)
            for part in (header, record, footer):
                file.write(part)
                digest.update(part)
                size += len(part)
        if task.sha256 not in (None, digest.hexdigest()):
            raise ValueError(
                f"{path} cannot be repaired: the images in {task.source} give other bytes than they gave to the build. "
                "They were changed since, or this release of Pillow encodes PNG otherwise (the manifest's `versions`). "
                "Repair from the source as it was, or build the records again, into a new folder."
            )
    return Written(task.name, len(task.sites), size, digest.hexdigest(), tuple(offsets))


def check_images(task):
    """Reads the image files of a `Task` and writes nothing.

    Raises:
        Faults: naming the files that are damaged or have another size or mode.
    """

    def check(item):
        file, _, places = item
        load_planes(Path(task.source) / file, task.size, places)

    files = [item for site in task.sites for item in by_file(site["path"], task.channels)]
    for _ in collect_faults(check, files):
        pass


def _encode(task, site):
    try:
        return encode_site(site, _load(task, site["path"], site.get("ranges")))
    except (ValueError, OSError):
        check_images(task._replace(sites=[site]))  # names all files of the site that are wrong
        raise


def _load(task, path, ranges):
    given = (task.size, task.crop, task.image_size, ranges)
    if task.planes is None:
        return [load_site(task.source, path, task.channels, *given).tobytes()]
    return load_pngs(task.source, path, task.channels, task.planes, *given)


def encode_site(site, images):
    """One record: Recursion's keys (rxrx1-utils, images2tfrecords) and `site_id`.

    Its key `image` holds, by the option `encoding` of the manifest:

    - `raw`: one bytes value, the uint8 pixels `(height, width, channels)` in C order, as Recursion's records do.
    - `png`: a bytes value for each entry of the manifest's `planes`, a PNG file of as many channels: `[1, 1, ..., 1]`,
      an 8-bit grey file for each channel, in order; or `[3]`, one 8-bit RGB file.

    Args:
        site: dict with the columns of `read_sites`.
        images: list of bytes, the values of `image`.

    Returns:
        bytes of a serialized `tf.train.Example`, equal for equal input. `sirna` is left out where it is unknown.
    """
    keys = ("well", "well_type", "experiment", "cell_type", "site_id")
    features = {key: [str(site[key]).encode()] for key in keys} | {"image": images}
    features |= {key: [int(site[key])] for key in ("plate", "site")}
    if site["sirna_id"] is not None:
        features["sirna"] = [int(site["sirna_id"])]
    return encode_example(features)


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
