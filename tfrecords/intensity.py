"""Which grey levels of a deep image become 0 and 255: what a user says, and what a manifest keeps."""

import re
from typing import NamedTuple

# Leaves hot pixels and dead ones out, and next to no signal: our choice.
DEFAULT = "percentile:0.1,99.9"


class Range(NamedTuple):
    """The grey levels that become 0 and 255, and the bits a pixel of the files they were measured on, if they were."""

    low: float
    high: float
    bits: int | None = None


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


def list_ranges(ranges, channels):
    """The ranges as a manifest has them: list of dicts of `experiment`, `plate`, `channel`, `low`, `high`, `bits`,
    sorted."""
    return [
        {"experiment": experiment, "plate": int(plate), "channel": channel, **one._asdict()}
        for (experiment, plate), of_channels in sorted((ranges or {}).items())
        for channel, one in zip(channels, of_channels, strict=True)
    ]


def ranges_of(manifest):
    """The ranges of a manifest, as the build had them; None if the files were taken as they are."""
    ranges = {}
    for row in manifest.get("intensity", ()):
        ranges.setdefault((row["experiment"], row["plate"]), []).append(Range(row["low"], row["high"], row.get("bits")))
    return ranges or None
