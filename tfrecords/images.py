"""Files of a site -> one uint8 array."""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from tfrecords.decode import decode_file
from tfrecords.intensity import Range

# Stands in a site's path where the number of a channel stands in the names of its files.
CHANNEL = "{channel}"


class Size(NamedTuple):
    """Size of the files of a build, in pixels, and the file that it was taken from, below the source; `planes` is how
    many channels a file of several has, None for any number."""

    height: int
    width: int
    file: str = "the first site"
    planes: int | None = None


def channel_files(path, channels):
    """Where the channels of a site are.

    Args:
        path: from `read_sites`. With `{channel}` in it, a file for each channel has its number there; without, one
            file holds all channels, as the planes of an RGB image or the pages of a TIFF; a tuple of paths has one
            for each channel.
        channels: numbers of the channels, from 1, in the order wanted.

    Returns:
        List of (file, plane) in the order of `channels`: the path below the source, and the place in the file, from 0,
        or None where the file holds one channel.
    """
    if isinstance(path, tuple):
        return [(path[channel - 1], None) for channel in channels]
    if CHANNEL in path:
        return [(path.replace(CHANNEL, str(channel)), None) for channel in channels]
    return [(path, channel - 1) for channel in channels]


def by_file(path, channels):
    """The channels of a site by the file that has them.

    Args:
        path, channels: as for `channel_files`.

    Returns:
        List of (file, [number in `channels`, from 0], [plane]), files in the order of their first channels.
    """
    files = {}
    for i, (file, plane) in enumerate(channel_files(path, channels)):
        numbers, planes = files.setdefault(file, ([], []))
        numbers.append(i)
        planes.append(plane)
    return [(file, *lists) for file, lists in files.items()]


def load_channel(path, size=None, plane=None):
    """Reads one channel.

    Args:
        path: the file, see `decode_file`.
        size: `Size` or `(height, width)` that it must have, or None for any.
        plane: place of the channel in a file of several; None (default) for a file of one.

    Returns:
        numpy.ndarray, uint8 or uint16, `(height, width)`.

    Raises:
        ValueError: naming the file if it is damaged or no image, or of another size or number of channels.
    """
    return load_planes(path, size, (plane,))[0]


def load_planes(path, size, places):
    """Reads several channels of one file, which is decoded once.

    Args:
        path, size: as for `load_channel`.
        places: that of each channel, as `plane` of `load_channel`.

    Returns:
        List of numpy.ndarray, uint8 or uint16, `(height, width)`.

    Raises:
        ValueError: as `load_channel`.
    """
    planes = decode_file(path, [place or 0 for place in places])
    return [_pick(path, planes, size, place) for place in places]


def _pick(path, planes, size, plane):
    count = len(planes)
    if plane is None and count != 1:
        raise ValueError(
            f"{path}: expected a grey image, one channel a file; found {count} channels (RGB, or pages). Convert "
            "the file, or take the folder that holds single channels."
        )
    size = size and Size(*size)
    named = count if plane is None or size is None or size.planes is None else size.planes
    if named != count and not (str(path).lower().endswith(".png") and _only_padded(planes, named)):
        raise ValueError(
            f"{path}: expected {named} channels, as the screen's description names; found {count} (pages, or "
            "RGB). Name each in `channels`, those of other depths or times too, and choose some with --channels; or "
            "correct the file."
        )
    if plane is not None and plane >= count:
        raise ValueError(f"{path}: expected a file with channel {plane + 1}; found {count}. Name other channels.")
    height, width = planes[plane or 0].shape
    if size is not None and (height, width) != size[:2]:
        raise ValueError(
            f"{path}: expected {size.height} x {size.width} pixels (height x width) as in {size.file}; found "
            f"{height} x {width}. All images of a build have one size: correct or remove the one that is wrong."
        )
    return planes[plane or 0]


def _only_padded(planes, named):
    """Whether a PNG in colour holds no more than the channels that are named: one of them three times, or two and an
    empty one."""
    if named == 1:
        return all((plane == planes[0]).all() for plane in planes)
    return named == 2 and not planes[2].any()


def load_site(source, path, channels, size, crop=None, image_size=None, ranges=None):
    """Reads the channels of a site; crops, scales to 8 bits and resizes them if asked, in this order.

    Args:
        source: folder of the tables.
        path: where the site's files are, see `channel_files`.
        channels: channel numbers, in the order wanted.
        size: `Size` or `(height, width)` of the files.
        crop: edge of the square cut out of the centre, in pixels of the file; None for the whole field.
        image_size: edge of the result in pixels; each pixel is the mean over the area it covers (Pillow's BOX
            filter), which neither rings nor aliases. None keeps the pixels as they are on disk.
        ranges: for each channel `intensity.Range`, the grey levels that become 0 and 255; None for 8-bit files as they
            are.

    Returns:
        numpy.ndarray, uint8, `(height, width, channels)`.
    """
    planes = [None] * len(channels)
    for file, numbers, places in by_file(path, channels):
        whole = os.path.join(source, file)
        for i, pixels in zip(numbers, load_planes(whole, size, places), strict=True):
            planes[i] = _convert(whole, crop_centre(pixels, crop), size, image_size, ranges and ranges[i])
    return np.stack(planes, axis=-1)


def _convert(whole, pixels, size, image_size, levels):
    if levels is not None:
        low, high, bits = Range(*levels)
        if bits is not None and 8 * pixels.itemsize != bits:
            raise ValueError(wrong_depth(whole, bits, 8 * pixels.itemsize))
        if pixels.dtype == np.uint8 and high > 255:
            raise ValueError(
                f"{whole}: expected 16 bits a pixel, as grey level {high:g} becomes 255 on its plate; "
                "found 8 bits. All files of a plate have one depth: convert this one, or leave it out."
            )
        pixels = scale_to_bytes(pixels, low, high)
    elif pixels.dtype != np.uint8:
        raise ValueError(
            f"{whole}: expected 8 bits a pixel as in {Size(*size).file}; found 16 (mode I;16). Say which grey "
            "levels become 0 and 255, by an intensity range in the screen's description; or correct that file."
        )
    if image_size is not None and pixels.shape != (image_size, image_size):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(image.resize((image_size, image_size), Image.Resampling.BOX))
    return pixels


def wrong_depth(file, bits, found):
    """The message about a file of another depth than most of its plate."""
    return (
        f"{file}: expected {bits} bits a pixel as in other files of its plate; found {found}. All files of a plate "
        "have one depth: convert this one, or leave it out."
    )


def crop_centre(pixels, edge):
    """Cuts the square of `edge` pixels out of the centre of `(height, width, ...)`; where the rest is odd, the larger
    part of it is left below and on the right. None gives all."""
    if edge is None:
        return pixels
    top, left = (pixels.shape[0] - edge) // 2, (pixels.shape[1] - edge) // 2
    return pixels[top : top + edge, left : left + edge]


def scale_to_bytes(pixels, low, high):
    """Maps grey levels `low` to 0 and `high` to 255, in between linearly and rounded, and what is outside to the ends.

    Args:
        pixels: array of unsigned integers.
        low, high: grey levels, `low < high`.

    Returns:
        numpy.ndarray, uint8, of the same shape.
    """
    scaled = (pixels.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
