import errno
import io
import struct

import numpy as np
import pytest
from PIL import Image

from tfrecords.decode import decode_file, png_fault
from tfrecords.faults import describe_fault

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("pixels", [GREY, DEEP, RGB], ids=["8-bit", "16-bit", "RGB"])
def test_pixels_come_back_with_their_depth(tmp_path, ending, pixels):
    path = tmp_path / f"image.{ending}"
    Image.fromarray(pixels).save(path)
    decoded = np.stack(decode_file(path), axis=-1)
    assert decoded.dtype == pixels.dtype
    np.testing.assert_array_equal(decoded, pixels.reshape(5, 7, -1))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_the_pages_of_a_tiff_are_channels(tmp_path, compression):
    path = tmp_path / "image.tif"
    pages = [DEEP, DEEP + 1, DEEP + 2]
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others, compression=compression)
    np.testing.assert_array_equal(decode_file(path), pages)


def test_of_many_pages_those_that_are_wanted_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "stack.tif"
    pages = [Image.fromarray(DEEP + i) for i in range(20)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    decoded, load = [], Image.Image.tobytes
    monkeypatch.setattr(Image.Image, "tobytes", lambda self, *args: decoded.append(self.tell()) or load(self, *args))
    planes = decode_file(path, wanted=[17, 2])
    assert decoded == [2, 17] and [i for i, plane in enumerate(planes) if plane is not None] == [2, 17]
    np.testing.assert_array_equal(planes[17], DEEP + 17)
    assert len(decode_file(path, wanted=[20])) == 20 and decoded == [2, 17]


def test_big_endian_is_read(tmp_path):
    path = tmp_path / "image.tif"
    data, count = DEEP.astype(">u2").tobytes(), 8
    entries = [(256, 3, 7 << 16), (257, 3, 5 << 16), (258, 3, 16 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16)]
    entries += [(273, 4, 8 + 2 + 12 * count + 4), (278, 3, 5 << 16), (279, 4, len(data))]
    directory = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in entries)
    path.write_bytes(b"MM\x00*" + struct.pack(">IH", 8, count) + directory + struct.pack(">I", 0) + data)
    np.testing.assert_array_equal(decode_file(path)[0], DEEP)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_tiff_cut_short_is_noticed_and_named(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(DEEP).save(path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="image.tif: "):
            decode_file(path)


def test_what_would_lose_grey_levels_is_refused(tmp_path):
    path = tmp_path / "image.tif"
    for pixels in (DEEP.astype(np.float32), DEEP.astype(np.int32), GREY > 99):
        Image.fromarray(pixels).save(path)
        with pytest.raises(ValueError, match="image.tif: expected 8 or 16 bits of grey, or 8 bits of RGB; found mode"):
            decode_file(path)
    Image.fromarray(RGB).convert("P").save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="image.png: .* found mode P"):
        decode_file(tmp_path / "image.png")


def test_pages_of_two_sizes_are_refused(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY[:4])])
    with pytest.raises(ValueError, match="expected pages of one size and depth"):
        decode_file(path)


def test_a_file_of_another_format_is_named(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="expected a whole PNG file; found no PNG signature"):
        decode_file(path)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="image.png: expected a PNG or TIFF file; found a JPEG"):
        decode_file(path)


def test_a_whole_png_has_no_fault(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(GREY).save(path)
    data = path.read_bytes()
    assert png_fault(data) is None
    assert png_fault(data[:-1]).endswith("(truncated)") and png_fault(b"") == "an empty file"


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "stitched.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(ValueError, match="stitched.png: Image size .* cut stitched wells into sites"):
        decode_file(tmp_path / "stitched.png")


def test_an_animation_is_refused(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(GREY[::-1])])
    with pytest.raises(ValueError, match="a.png: expected a picture; found an animation of 2 frames"):
        decode_file(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore")
def test_a_tiff_with_a_byte_changed_is_read_or_named(tmp_path):
    """Pillow raises of many kinds there: of 2,000 such files none may end a build without its file's name."""
    path = tmp_path / "image.tif"
    Image.fromarray(DEEP).save(path)
    whole, draw, kinds = path.read_bytes(), np.random.default_rng(1), set()
    for _ in range(2000):
        data = bytearray(whole)
        data[draw.integers(4, len(data))] = draw.integers(256)
        path.write_bytes(data)
        try:
            decode_file(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            kinds.add(type(error.__context__))
    assert len(kinds) > 1


def test_a_disk_that_fails_while_it_is_read_is_named_with_the_file(tmp_path, monkeypatch):
    class Fails(io.BytesIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *_: Fails())
    with pytest.raises(OSError, match="image.png") as caught:
        decode_file(tmp_path / "image.png")
    assert describe_fault(caught.value) == f"{tmp_path / 'image.png'}: cannot be read (Input/output error)."


def test_a_sound_tiff_of_another_kind_is_not_called_damaged_alone(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(RGB).save(path)
    data = bytearray(path.read_bytes())
    place = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert data[place] == 2  # RGB
    data[place] = 1  # three samples of grey
    path.write_bytes(data)
    with pytest.raises(ValueError, match="image.tif: the TIFF is damaged, or of a kind that cannot be read here"):
        decode_file(path)
