"""Which grey levels of a deep image become 0 and 255."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfrecords.images import channel_files, load_channel

# Leaves hot pixels and dead ones out, and next to no signal: our choice.
DEFAULT = "percentile:0.1,99.9"
_MOST_SITES = 32


def parse_intensity(text):
    """Takes `"percentile:0.1,99.9"` or `"fixed:0,4095"` apart.

    `percentile` takes these percentiles of each plate's grey levels, each channel by itself, over at most 32 of its
    sites; `fixed` takes the same levels for all.

    Returns:
        (kind, low, high).

    Raises:
        ValueError: on anything else, or if low is not below high.
    """
    match = re.fullmatch(r"(percentile|fixed):(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", text)
    if match:
        low, high = float(match[2]), float(match[3])
        if low < high <= (100 if match[1] == "percentile" else 65535):
            return match[1], low, high
    raise ValueError(
        f"Unknown intensity {text!r}. Expected percentile:LOW,HIGH of 0 to 100 or fixed:LOW,HIGH of 0 to 65535, LOW "
        f"below HIGH, such as {DEFAULT}."
    )


class Plate(NamedTuple):
    """One plate to measure: `paths` of the sites to look at; `size`, (height, width) of the files."""

    experiment: str
    plate: int
    source: str
    paths: list
    channels: tuple
    size: tuple
    low: float
    high: float


def choose_plates(source, sites, channels, size, intensity):
    """Lists the plates to measure. The sites looked at are those of the lowest hash: no row order, no draw.

    Args:
        source: folder of the images.
        sites: table of the sites to build, with `experiment`, `plate`, `site_id` and `path`.
        channels: numbers of the channels.
        size: `(height, width)` of the files in pixels.
        intensity: see `parse_intensity`; of percentiles.

    Returns:
        List of `Plate`.
    """
    _, low, high = parse_intensity(intensity)
    plates = []
    for (experiment, plate), rows in sites.groupby(["experiment", "plate"], sort=True):
        paths = dict(zip(rows["site_id"], rows["path"], strict=True))
        chosen = [paths[site_id] for site_id in sorted(paths, key=_draw)[:_MOST_SITES]]
        plates.append(Plate(experiment, int(plate), str(source), chosen, tuple(channels), tuple(size), low, high))
    return plates


def measure_plate(plate):
    """Finds the grey levels of a `Plate` that become 0 and 255.

    Returns:
        ((experiment, plate), [(low, high) for each channel]); floats, low below high.
    """
    counts = np.zeros((len(plate.channels), 65536), np.int64)
    for path in plate.paths:
        for count, (file, plane) in zip(counts, channel_files(path, plate.channels), strict=True):
            pixels = load_channel(Path(plate.source) / file, plate.size, plane)
            count += np.bincount(pixels.ravel(), minlength=65536)
    return (plate.experiment, plate.plate), [_percentiles(count, plate.low, plate.high) for count in counts]


def fix_ranges(sites, channels, intensity):
    """The ranges of a `fixed` intensity, in the form of `measure_plate`'s: dict of (experiment, plate) -> pairs."""
    _, low, high = parse_intensity(intensity)
    plates = sites[["experiment", "plate"]].drop_duplicates().itertuples(index=False)
    return {(experiment, int(plate)): [(low, high)] * len(channels) for experiment, plate in plates}


def list_ranges(ranges, channels):
    """The ranges as a manifest has them: list of dicts of `experiment`, `plate`, `channel`, `low`, `high`, sorted."""
    return [
        {"experiment": experiment, "plate": int(plate), "channel": channel, "low": low, "high": high}
        for (experiment, plate), pairs in sorted((ranges or {}).items())
        for channel, (low, high) in zip(channels, pairs, strict=True)
    ]


def ranges_of(manifest):
    """The ranges of a manifest, as the build had them; None if the files were taken as they are."""
    ranges = {}
    for row in manifest.get("intensity", ()):
        ranges.setdefault((row["experiment"], row["plate"]), []).append((row["low"], row["high"]))
    return ranges or None


def _percentiles(count, low, high):
    # The first level with more than `low` per cent of the pixels at or below it, and the first with `high` per cent.
    below = np.cumsum(count)
    first = float(np.searchsorted(below, low / 100 * below[-1], side="right"))
    last = float(np.searchsorted(below, high / 100 * below[-1], side="left"))
    return first, max(last, first + 1)


def _draw(site_id):
    return hashlib.blake2b(site_id.encode(), digest_size=8).digest()
