"""Image files, PNG or TIFF -> pixels."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Little and big endian, each classic and BigTIFF.
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_EXPECTED = "8 or 16 bits of grey, or 8 bits of RGB"


def decode_file(path, wanted=None):
    """Reads the channels of an image file.

    PNG: every chunk's checksum is verified, since decoders let some damage pass. TIFF has no checksums: only what
    breaks its structure, such as a file cut short, is noticed. It is read by Pillow, which every installation has and
    which brings libtiff for LZW and deflate; tifffile would need a second package, imagecodecs, for these.

    Args:
        path: a PNG file, or a TIFF file whose pages, all of one size and depth, are channels.
        wanted: places, from 0, of the channels that are needed: other pages are looked at, and not decoded. None
            (default) is all.

    Returns:
        List of numpy.ndarray, uint8 or uint16, `(height, width)`: 3 of an RGB image, else one for each page; None for
        those that are not decoded.

    Raises:
        ValueError: naming the file if it is truncated, damaged, of another format, or of another kind of pixels.
        OSError: naming it if it cannot be read.
    """
    data = read_file(path)
    is_tiff = data[:4] in _TIFF
    fault = None if is_tiff else png_fault(data)
    if data.startswith(b"\xff\xd8\xff"):
        raise ValueError(f"{path}: expected a PNG or TIFF file; found a JPEG, which has lost detail and is not read.")
    if fault:
        kind = "TIFF or PNG" if str(path).lower().endswith((".tif", ".tiff")) else "PNG"
        raise ValueError(f"{path}: expected a whole {kind} file; found {fault}. Download or copy the file again.")
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF" if is_tiff else "PNG",)) as image:
            if not is_tiff and getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{path}: expected a picture; found an animation of {image.n_frames} frames.")
            return _read_pages(path, image, _tiff_bits if is_tiff else lambda page: data[24], wanted)
    except UnidentifiedImageError:
        if is_tiff:
            raise ValueError(
                f"{path}: the TIFF is damaged, or of a kind that cannot be read here (several samples a pixel, a rare "
                "compression). Copy the file again, or save its channels as grey pages, plain or with LZW or deflate."
            ) from None
        raise ValueError(f"{path}: no PNG can be found in the file. Download or copy the file again.") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error} Expected a field of one site: cut stitched wells into sites.") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises of nearly every kind where a header is damaged
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        kind = "TIFF" if is_tiff else "PNG"
        raise ValueError(f"{path}: the {kind} cannot be decoded ({error}). Download or copy the file again.") from None


def read_file(path):
    """The bytes of a file. An error names it, that of a disk that fails while it is read too."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _read_pages(path, image, bits_of, wanted):
    planes, kinds = [], set()
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        mode, bits = image.mode, bits_of(image)
        # Pillow gives 8 bits of a 16-bit RGB file without a word, and calls 16 bits of grey "I" in older releases.
        if (mode, bits) not in (("L", 8), ("RGB", 8)) and not (mode in ("I", "I;16", "I;16B") and bits == 16):
            raise ValueError(
                f"{path}: expected {_EXPECTED}; found mode {mode} with {bits} bits in page {page + 1}. "
                "Convert the file without loss of grey levels."
            )
        count, dtype = 3 if mode == "RGB" else 1, np.dtype(np.uint8 if bits == 8 else np.uint16)
        kinds.add(((image.height, image.width, count), str(dtype)))
        if wanted is None or any(len(planes) <= place < len(planes) + count for place in wanted):
            pixels = np.asarray(image).astype(dtype, copy=False)
            planes += [pixels[..., i] for i in range(3)] if count == 3 else [pixels]
        else:
            planes += [None] * count
    if len(kinds) > 1:
        first, second, *_ = sorted(kinds)
        raise ValueError(f"{path}: expected pages of one size and depth, each a channel; found {first}, {second}.")
    return planes


def _tiff_bits(page):
    bits, signs = page.tag_v2.get(258, (1,)), page.tag_v2.get(339, (1,))
    white_is_zero = page.tag_v2.get(262) == 0
    if len(set(bits)) != 1 or set(signs) != {1} or white_is_zero:
        return f"{'/'.join(map(str, bits))}{' white-is-zero' if white_is_zero else ' signed or float'}"
    return bits[0]


def png_fault(data):
    """What is wrong with the bytes of a PNG file, as a text; None if all chunks are there and their checksums right."""
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
