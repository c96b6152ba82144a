"""A site as PNG files, the original ones where that is possible."""

import io
import os
import struct
from pathlib import Path

from PIL import Image

from tfrecords.decode import SIGNATURE, png_fault, read_file
from tfrecords.images import channel_files, load_site

# Of zlib's levels the one with the smallest files on RxRx1's images (127 KB a channel; 128 KB at levels 6 and 9, 146 KB
# at 1), at less than half the time of level 6.
_LEVEL = 4
_GREY, _RGB = 0, 2
# Transparency, which some decoders turn into a further channel.
_UNSAFE = b"tRNS"


def png_planes(source, path, channels, whole):
    """How the channels of a screen's sites are spread over the PNG files in a record.

    Args:
        source: folder of the tables.
        path: of one site, see `images.channel_files`.
        channels: channel numbers, in the order wanted.
        whole: whether the pixels are stored as they are on disk.

    Returns:
        Tuple: the number of channels of each file, in order. `(3,)` if the sites are RGB files that can be passed
        through, else a 1 for each channel.
    """
    files = channel_files(path, channels)
    if whole and [plane for _, plane in files] == [0, 1, 2] and len({file for file, _ in files}) == 1:
        if _is_plain((Path(source) / files[0][0]).read_bytes(), 3):
            return (3,)
    return (1,) * len(channels)


def load_pngs(source, path, channels, planes, size, crop=None, image_size=None, ranges=None):
    """Gives a site as PNG files.

    The bytes on disk are passed through where nothing is cropped, resized or scaled and they are such a file: 8 bits,
    grey or RGB, of the right size, every checksum right. Their pixels are not decoded: `verify_records` does that. All
    else is decoded and encoded anew, without loss.

    Args:
        planes: of `png_planes`.
        source, path, channels, size, crop, image_size, ranges: see `images.load_site`.

    Returns:
        List of bytes, a PNG file for each of `planes`.

    Raises:
        ValueError: naming the file that is damaged, no image, or of another size or number of channels.
    """
    files = channel_files(path, channels)
    as_they_are = crop is None and image_size is None and ranges is None
    pixels, pngs, position = None, [], 0
    for count in planes:
        file, plane = files[position]
        data = None
        if as_they_are and (plane is None or count == 3):
            data = _read_plain(os.path.join(source, file), count, size)
        if data is None:
            if pixels is None:
                pixels = load_site(source, path, channels, size, crop, image_size, ranges)
            data = _encode(pixels[..., position : position + count])
        pngs.append(data)
        position += count
    return pngs


def _read_plain(path, count, size):
    data = read_file(path)
    if not data.startswith(SIGNATURE):
        return None
    fault = png_fault(data)
    if fault:
        raise ValueError(f"{path}: expected a whole PNG file; found {fault}. Download or copy the file again.")
    width, height = struct.unpack_from(">II", data, 16)
    return data if (height, width) == tuple(size[:2]) and _is_plain(data, count) else None


def _is_plain(data, count):
    if not data.startswith(SIGNATURE) or tuple(data[24:26]) != (8, _GREY if count == 1 else _RGB):
        return False
    return _UNSAFE not in data[: data.find(b"IDAT")]


def _encode(pixels):
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_LEVEL)
    return buffer.getvalue()
