"""Looks at the images of each plate for the grey levels that become 0 and 255."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfrecords.faults import MOST, Faults, collect_faults
from tfrecords.images import by_file, load_planes, wrong_depth
from tfrecords.intensity import DEFAULT, Range, parse_intensity
from tfrecords.manifest import channel_names
from tfrecords.parallel import run_tasks

_MOST_SITES = 32
_LOOKED_AT = 4  # sites of a plate whose grey levels are given: to see whether these fit


def find_ranges(source, sites, options, size, workers=None):
    """Finds the grey levels that a build scales to 8 bits, and says where the images would be lost on them.

    Args:
        source: folder of the images.
        sites: table of the sites to build.
        options: of the build, with `channels` and `intensity`.
        size: `images.Size` of the files.
        workers: as for `build_records`.

    Returns:
        dict of (experiment, plate) -> list of `Range` in the order of the channels, floats, low below high; None
        if the files are taken as they are.
    """
    channels, intensity = options["channels"], options["intensity"]
    if intensity is None:
        return None
    fixed = parse_intensity(intensity)[0] == "fixed"
    measured, most = (DEFAULT, _LOOKED_AT) if fixed else (intensity, _MOST_SITES)
    plates = choose_plates(os.path.abspath(source), sites, channels, size, measured, most)
    count = sum(len(plate.paths) for plate in plates)
    pixels = 2 * count * size[0] * size[1] * len(channels)
    tasks = ((plate, len(plate.paths)) for plate in plates)
    try:
        found = dict(run_tasks(measure_plate, tasks, workers=workers, total=count, size=pixels, name="intensity"))
    except Faults:
        if not fixed:
            raise
        found = {}  # what cannot be read is named where it is written
    ranges = fix_ranges(sites, channels, intensity) if fixed else found
    for warning in lost_levels(found, ranges, channel_names({"options": options}), _plate_names(sites)):
        print(f"WARNING: {warning}")
    return ranges


class Plate(NamedTuple):
    """One plate to measure: `paths` of the sites to look at; `size`, of the files."""

    experiment: str
    plate: int
    source: str
    paths: list
    channels: tuple
    size: tuple
    low: float
    high: float


def _plate_names(sites):
    if "plate_name" not in sites:
        return {}
    rows = sites[["experiment", "plate", "plate_name"]].drop_duplicates().itertuples(index=False)
    return {(experiment, int(plate)): name for experiment, plate, name in rows}


def lost_levels(found, ranges, channels, plates):
    """What the grey levels that become 0 and 255 leave nothing of.

    Args:
        found: dict of (experiment, plate) -> list of `Range`, as measured by percentiles.
        ranges: the same of what becomes 0 and 255.
        channels: names of the channels, in the order of the ranges.
        plates: names of plates, dict of (experiment, plate); the others have their numbers.

    Returns:
        List of texts.
    """
    flat, coarse, bright = [], [], []
    for key, measured in sorted(found.items()):
        for channel, level, used in zip(channels, measured, ranges[key], strict=True):
            where = f"plate {plates.get(key, key[1])} of {key[0]}, channel {channel}: {level.low:g}"
            if level.high - level.low <= 1:
                flat.append(where)
                continue
            where += f" to {level.high:g}"
            kept = min(level.high, used.high) - max(level.low, used.low)
            left = max(0, round(255 * kept / (used.high - used.low)))
            if left < 32:
                coarse.append(f"{where}, {left} of 255 steps")
            elif level.high > 2 * used.high:
                bright.append(where)
    texts = {
        "have one grey level between the percentiles looked at": (
            flat,
            "Look at their files: is the channel empty or saturated, or the signal rarer than that?",
        ),
        "keep few steps between the grey levels that become 0 and 255": (
            coarse,
            "Give levels nearer to those that were found: files of 16 bits often hold 12.",
        ),
        "reach more than twice the level that becomes 255": (bright, "Give a higher one, unless it is meant."),
    }
    return [
        f"{len(places):,} channels of plates {what}, such as {'; '.join(places[:3])}. {advice}"
        for what, (places, advice) in texts.items()
        if places
    ]


def choose_plates(source, sites, channels, size, intensity, most=_MOST_SITES):
    """Lists the plates to measure. The sites looked at are those of the lowest hash: no row order, no draw.

    Args:
        source: folder of the images.
        sites: table of the sites to build, with `experiment`, `plate`, `site_id` and `path`.
        channels: numbers of the channels.
        size: `images.Size` of the files.
        intensity: see `parse_intensity`; of percentiles.
        most: number of sites to look at.

    Returns:
        List of `Plate`.
    """
    _, low, high = parse_intensity(intensity)
    plates = []
    for (experiment, plate), rows in sites.groupby(["experiment", "plate"], sort=True):
        paths = dict(zip(rows["site_id"], rows["path"], strict=True))
        chosen = [paths[site_id] for site_id in sorted(paths, key=_draw)[:most]]
        plates.append(Plate(experiment, int(plate), str(source), chosen, tuple(channels), size, low, high))
    return plates


def measure_plate(plate):
    """Finds the grey levels of a `Plate` that become 0 and 255.

    Returns:
        ((experiment, plate), [`Range` of each channel]); floats, low below high.

    Raises:
        Faults: naming the files that cannot be read, or are of another size.
    """
    counts = np.zeros((len(plate.channels), 65536), np.int64)
    files_of = [{8: [], 16: []} for _ in plate.channels]
    files = [item for path in plate.paths for item in by_file(path, plate.channels)]

    def count_levels(item):
        file, numbers, places = item
        whole, found = Path(plate.source) / file, []
        for channel, pixels in zip(numbers, load_planes(whole, plate.size, places), strict=True):
            files_of[channel][8 * pixels.itemsize].append(whole)
            found.append((channel, np.bincount(pixels.ravel(), minlength=65536)))
        return found

    messages = []
    try:
        for found in collect_faults(count_levels, files):
            for channel, count in found:
                counts[channel] += count
    except Faults as faults:
        messages += faults.messages
    bits = [max(depths, key=lambda depth: (len(depths[depth]), depth)) for depths in files_of]
    for most, depths in zip(bits, files_of, strict=True):
        messages += [wrong_depth(file, most, 24 - most) for file in depths[24 - most]]
    if messages:
        raise Faults(messages[:MOST])
    levels = [_percentiles(count, plate.low, plate.high) for count in counts]
    return (plate.experiment, plate.plate), [Range(*pair, most) for pair, most in zip(levels, bits, strict=True)]


def fix_ranges(sites, channels, intensity):
    """The ranges of a `fixed` intensity, in the form of `measure_plate`'s: dict of (experiment, plate) -> pairs."""
    _, low, high = parse_intensity(intensity)
    plates = sites[["experiment", "plate"]].drop_duplicates().itertuples(index=False)
    return {(experiment, int(plate)): [Range(low, high)] * len(channels) for experiment, plate in plates}


def _percentiles(count, low, high):
    # The first level with more than `low` per cent of the pixels at or below it, and the first with `high` per cent.
    below = np.cumsum(count)
    first = float(np.searchsorted(below, low / 100 * below[-1], side="right"))
    last = float(np.searchsorted(below, high / 100 * below[-1], side="left"))
    return first, max(last, first + 1)


def _draw(site_id):
    return hashlib.blake2b(site_id.encode(), digest_size=8).digest()
