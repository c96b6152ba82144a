import os

import numpy as np
import pytest
from PIL import Image

from tfrecords import images
from tfrecords.decode import decode_file
from tfrecords.images import channel_files, load_channel, load_site, scale_to_bytes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "B02_s1_w1.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return path


def test_pixels_come_back(path):
    np.testing.assert_array_equal(load_channel(path, (8, 8)), np.arange(64).reshape(8, 8))


def test_a_file_of_8_bits_among_files_of_16_is_named(path):
    with pytest.raises(ValueError, match="B02_s1_w1.png: expected 16 bits a pixel, as grey level 4095 becomes 255"):
        load_site(path.parent, "B02_s1_w{channel}.png", (1,), (8, 8), ranges=[(0.0, 4095.0)])
    assert load_site(path.parent, "B02_s1_w{channel}.png", (1,), (8, 8), ranges=[(0.0, 63.0)]).max() == 255


def test_a_file_of_another_depth_than_its_plate_is_named(path):
    def load(*ranges):
        return load_site(path.parent, "B02_s1_w{channel}.png", (1,), (8, 8), ranges=[ranges])

    assert load(0.0, 63.0, 8).max() == 255
    with pytest.raises(ValueError, match="w1.png: expected 16 bits a pixel as in other files of its plate; found 8"):
        load(0.0, 63.0, 16)
    Image.fromarray(np.full((8, 8), 999, np.uint16)).save(path)
    with pytest.raises(ValueError, match="w1.png: expected 8 bits a pixel as in other files of its plate; found 16"):
        load(0.0, 63.0, 8)


def test_every_truncation_is_noticed_and_named(path):
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"B02_s1_w1.png: expected a whole PNG file; found"):
            load_channel(path)


def test_every_flipped_byte_is_noticed(path):
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(ValueError, match="B02_s1_w1.png: "):
            load_channel(path)


def test_another_size_or_mode_is_named_with_what_was_expected(path):
    with pytest.raises(ValueError, match="w1.png: expected 16 x 16 pixels .* found 8 x 8"):
        load_channel(path, (16, 16))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match="w1.png: expected a grey image, one channel a file; found 3 channels"):
        load_channel(path, (8, 8))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    with pytest.raises(ValueError, match="w1.png: expected 8 bits a pixel as in the first site; found 16"):
        load_site(path.parent, "B02_s1_w{channel}.png", (1,), (8, 8))


def test_a_site_has_its_channels_last_and_in_order(release_tree, pixels_of):
    path = "images/RPE-01/Plate1/B03_s2_w{channel}.png"
    image = load_site(release_tree, path, (1, 2, 3, 4, 5, 6), (8, 8))
    np.testing.assert_array_equal(image, pixels_of("RPE-01_1_B03_2"))
    np.testing.assert_array_equal(load_site(release_tree, path, (3, 1), (8, 8)), image[..., [2, 0]])


def test_resizing_averages_areas(release_tree, pixels_of):
    small = load_site(
        release_tree, "images/RPE-01/Plate1/B03_s2_w{channel}.png", (1, 2, 3, 4, 5, 6), (8, 8), image_size=4
    )
    mean = pixels_of("RPE-01_1_B03_2").reshape(4, 2, 4, 2, 6).mean(axis=(1, 3))
    assert small.dtype == np.uint8 and np.abs(small - mean).max() <= 1  # Pillow rounds after rows and after columns


@pytest.fixture
def rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "B02_s1.png")
    return pixels


def test_the_planes_of_one_file_are_channels(rgb, tmp_path):
    image = load_site(tmp_path, "B02_s1.png", (3, 1), (10, 9))
    np.testing.assert_array_equal(image, rgb[..., [2, 0]])
    with pytest.raises(ValueError, match="B02_s1.png: expected a file with channel 4; found 3"):
        load_site(tmp_path, "B02_s1.png", (1, 4), (10, 9))


def test_the_centre_is_cut_out_before_resizing(rgb, tmp_path):
    image = load_site(tmp_path, "B02_s1.png", (1, 2, 3), (10, 9), crop=4)
    np.testing.assert_array_equal(image, rgb[3:7, 2:6])
    small = load_site(tmp_path, "B02_s1.png", (1, 2, 3), (10, 9), crop=4, image_size=2)
    assert np.abs(small - rgb[3:7, 2:6].reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))).max() <= 1


def test_a_file_of_several_channels_is_decoded_once_wherever_it_is_named(rgb, tmp_path, monkeypatch):
    decoded = []

    def decode(path, wanted):
        decoded.append(os.path.basename(path))
        return decode_file(path, wanted)

    monkeypatch.setattr(images, "decode_file", decode)
    Image.fromarray(rgb[..., 0]).save(tmp_path / "other.png")
    places = [("B02_s1.png", 2), ("other.png", None), ("B02_s1.png", 0)]
    monkeypatch.setattr(images, "channel_files", lambda path, channels: places)
    np.testing.assert_array_equal(load_site(tmp_path, "", (1, 2, 3), (10, 9)), rgb[..., [2, 0, 0]])
    assert decoded == ["B02_s1.png", "other.png"]


def test_where_the_channels_are():
    assert channel_files("a_w{channel}.png", (2, 1)) == [("a_w2.png", None), ("a_w1.png", None)]
    assert channel_files("a.png", (2, 1)) == [("a.png", 1), ("a.png", 0)]
    assert channel_files(("a", "b", "c"), (3, 1)) == [("c", None), ("a", None)]


def test_grey_levels_are_scaled_to_bytes():
    levels = np.array([[0, 99, 100, 101, 300, 500, 501, 65535]], np.uint16)
    expected = [0, 0, 0, 1, 128, 255, 255, 255]
    assert scale_to_bytes(levels, 100, 500).tolist() == [expected]
