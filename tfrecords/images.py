"""PNG files of a site -> one uint8 array."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def load_channel(path, size=None):
    """Reads one channel: an 8-bit grey PNG file.

    Every chunk's checksum is verified, since decoders let some damage pass.

    Args:
        path: the file.
        size: `(height, width)` in pixels that it must have, or None for any.

    Returns:
        numpy.ndarray, uint8, `(height, width)`.

    Raises:
        ValueError: naming the file if it is truncated, damaged, no PNG, or of another size or mode.
    """
    data = Path(path).read_bytes()
    fault = _fault(data)
    if fault:
        raise ValueError(f"{path}: expected a whole PNG file; found {fault}. Download or copy the file again.")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode != "L":
                raise ValueError(
                    f"{path}: expected an 8-bit grey PNG (mode L), one channel a file; found mode {image.mode}. "
                    "Convert the file, or take the folder that holds single channels."
                )
            pixels = np.asarray(image)
    except (OSError, SyntaxError, zlib.error) as error:
        raise ValueError(f"{path}: the PNG cannot be decoded ({error}). Download or copy the file again.") from None
    if size is not None and pixels.shape != tuple(size):
        raise ValueError(
            f"{path}: expected {size[0]} x {size[1]} pixels (height x width) as in the first site; found "
            f"{pixels.shape[0]} x {pixels.shape[1]}. All images of a build have one size: correct or remove the file."
        )
    return pixels


def load_site(source, prefix, channels, size, image_size=None):
    """Reads the channels of a site, and resizes them if asked.

    Args:
        source: folder of the tables.
        prefix: path of the site's files up to `_w1.png`, from `read_sites`.
        channels: channel numbers, in the order wanted.
        size: `(height, width)` of the files in pixels.
        image_size: edge of the result in pixels; each pixel is the mean over the area it covers (Pillow's BOX
            filter), which neither rings nor aliases. None keeps the pixels as they are on disk.

    Returns:
        numpy.ndarray, uint8, `(height, width, channels)`.
    """
    planes = []
    for channel in channels:
        pixels = load_channel(Path(source) / f"{prefix}_w{channel}.png", size)
        if image_size is not None and pixels.shape != (image_size, image_size):
            pixels = np.asarray(Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BOX))
        planes.append(pixels)
    return np.stack(planes, axis=-1)


def _fault(data):
    if not data.startswith(SIGNATURE):
        return "no PNG signature" if data else "an empty file"
    position = len(SIGNATURE)
    while position < len(data):
        if position + 12 > len(data):
            return f"its end at byte {len(data)}, inside a chunk (truncated)"
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            return f"its end at byte {len(data)}, where a chunk needs {end} (truncated)"
        body = memoryview(data)[position + 4 : end - 4]
        if zlib.crc32(body) != struct.unpack_from(">I", data, end - 4)[0]:
            return f"a wrong checksum in the chunk at byte {position} (damaged)"
        if kind == b"IEND":
            return None
        position = end
    return f"its end at byte {len(data)}, before the closing chunk (truncated)"
