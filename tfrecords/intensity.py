"""Which grey levels of a deep image become 0 and 255."""

import hashlib
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

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


def measure_ranges(source, sites, channels, size, intensity):
    """Finds the grey levels that become 0 and 255, for each plate and channel.

    The sites looked at are those of the lowest hash, so that the same plate gives the same levels.

    Args:
        source: folder of the images.
        sites: table of the sites to build, with `experiment`, `plate`, `site_id` and `path`.
        channels: numbers of the channels.
        size: `(height, width)` of the files in pixels.
        intensity: see `parse_intensity`.

    Returns:
        dict of (experiment, plate) -> list of (low, high) in the order of `channels`, floats, low below high.
    """
    kind, low, high = parse_intensity(intensity)
    ranges = {}
    plates = sites.groupby(["experiment", "plate"], sort=True)
    for plate, rows in tqdm(plates, unit="plate", desc="intensity", disable=kind == "fixed"):
        if kind == "fixed":
            ranges[plate] = [(low, high)] * len(channels)
            continue
        rows = sorted(zip(rows["site_id"], rows["path"], strict=True), key=lambda row: _draw(row[0]))[:_MOST_SITES]
        counts = np.zeros((len(channels), 65536), np.int64)
        for _, path in rows:
            for count, (file, plane) in zip(counts, channel_files(path, channels), strict=True):
                count += np.bincount(load_channel(Path(source) / file, size, plane).ravel(), minlength=65536)
        ranges[plate] = [_percentiles(count, low, high) for count in counts]
    return ranges


def list_ranges(ranges, channels):
    """The ranges as a manifest has them: list of dicts of `experiment`, `plate`, `channel`, `low`, `high`, sorted."""
    return [
        {"experiment": experiment, "plate": int(plate), "channel": channel, "low": low, "high": high}
        for (experiment, plate), pairs in sorted((ranges or {}).items())
        for channel, (low, high) in zip(channels, pairs, strict=True)
    ]


def ranges_of(manifest):
    """The ranges of a manifest, as `measure_ranges` gave them; None if the files were taken as they are."""
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
