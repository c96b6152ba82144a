import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, PngImagePlugin

from tfrecords.build import build_records
from tfrecords.png import load_pngs, png_planes
from tfrecords.verify import verify_records

PATH = "images/RPE-01/Plate1/B03_s2_w{channel}.png"
SITE = "RPE-01_1_B03_2"
GREY = (1,) * 6


def decode(pngs):
    return np.concatenate([tf.io.decode_png(data).numpy() for data in pngs], axis=-1)


def records_of(dest):
    for path in sorted(dest.glob("*/*.tfrecord")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            yield feature["site_id"].bytes_list.value[0].decode(), list(feature["image"].bytes_list.value)


def test_files_are_passed_through_byte_by_byte(release_tree, pixels_of):
    assert png_planes(release_tree, PATH, (1, 2, 3, 4, 5, 6), True) == GREY
    pngs = load_pngs(release_tree, PATH, (3, 1), GREY[:2], (8, 8))
    assert pngs == [(release_tree / PATH.replace("{channel}", str(i))).read_bytes() for i in (3, 1)]
    np.testing.assert_array_equal(decode(pngs), pixels_of(SITE)[..., [2, 0]])


def test_what_is_cropped_or_resized_is_encoded_without_loss(release_tree, pixels_of):
    pngs = load_pngs(release_tree, PATH, range(1, 7), GREY, (8, 8), crop=4)
    np.testing.assert_array_equal(decode(pngs), pixels_of(SITE)[2:6, 2:6])
    assert decode(load_pngs(release_tree, PATH, range(1, 7), GREY, (8, 8), image_size=4)).shape == (4, 4, 6)


def test_a_file_that_decoders_may_see_otherwise_is_encoded_anew(release, pixels_of):
    path = release / PATH.replace("{channel}", "2")
    Image.open(path).save(path, transparency=7)
    pngs = load_pngs(release, PATH, range(1, 7), GREY, (8, 8))
    assert pngs[1] != path.read_bytes() and pngs[0] == (release / PATH.replace("{channel}", "1")).read_bytes()
    np.testing.assert_array_equal(decode(pngs), pixels_of(SITE))


def test_text_in_a_file_is_passed_through(release):
    path = release / PATH.replace("{channel}", "2")
    text = PngImagePlugin.PngInfo()
    text.add_text("Instrument", "microscope")
    Image.open(path).save(path, pnginfo=text)
    assert load_pngs(release, PATH, (2,), (1,), (8, 8)) == [path.read_bytes()]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "expected a whole PNG file; found .*truncated"),
        (lambda path: path.write_bytes(b""), "expected a whole PNG file; found an empty file"),
        (lambda path: Image.new("L", (8, 9)).save(path), "expected 8 x 8 pixels .* found 9 x 8"),
        (lambda path: Image.new("RGB", (8, 8)).save(path), "expected a grey image, one channel a file; found 3"),
    ],
)
def test_a_bad_file_is_named_though_it_is_not_decoded(release, spoil, message):
    spoil(release / PATH.replace("{channel}", "2"))
    with pytest.raises(ValueError, match=f"B03_s2_w2.png: {message}"):
        load_pngs(release, PATH, range(1, 7), GREY, (8, 8))


def test_rgb_files_are_passed_through_as_one(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert png_planes(tmp_path, "a.png", (1, 2, 3), True) == (3,)
    assert png_planes(tmp_path, "a.png", (1, 2, 3), False) == png_planes(tmp_path, "a.png", (3, 2, 1), True) == GREY[:3]
    assert load_pngs(tmp_path, "a.png", (1, 2, 3), (3,), (8, 8)) == [(tmp_path / "a.png").read_bytes()]
    np.testing.assert_array_equal(decode(load_pngs(tmp_path, "a.png", (3, 1), (1, 1), (8, 8))), pixels[..., [2, 0]])


def test_records_hold_the_files_verify_and_say_so(release_tree, tmp_path, pixels_of):
    manifest = build_records(release_tree, tmp_path / "records", encoding="png")
    assert (manifest["options"]["encoding"], manifest["planes"]) == ("png", list(GREY))
    found = dict(records_of(tmp_path / "records"))
    assert len(found) == 32
    for site_id, pngs in found.items():
        np.testing.assert_array_equal(decode(pngs), pixels_of(site_id))
    assert found[SITE] == [(release_tree / PATH.replace("{channel}", str(i))).read_bytes() for i in range(1, 7)]
    assert verify_records(tmp_path / "records") == []
    with pytest.raises(ValueError, match="other options: encoding 'png', now 'raw'"):
        build_records(release_tree, tmp_path / "records")


def test_verify_decodes(release, tmp_path):
    path = release / PATH.replace("{channel}", "4")
    data = path.read_bytes()
    start = data.index(b"IDAT")
    length = struct.unpack_from(">I", data, start - 4)[0]
    chunk = b"IDAT" + bytes([data[start + 4] ^ 0xFF]) + data[start + 5 : start + 4 + length]
    # Every checksum is right, but the compressed pixels are not.
    path.write_bytes(data[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[start + 8 + length :])
    build_records(release, tmp_path / "records", encoding="png")
    (fault,) = verify_records(tmp_path / "records")
    assert fault.file.startswith("id_test/RPE-01_treatment") and "the PNG file 3 cannot be decoded" in fault.message
