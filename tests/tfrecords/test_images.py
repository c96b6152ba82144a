import numpy as np
import pytest
from PIL import Image

from tfrecords.images import load_channel, load_site


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "B02_s1_w1.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return path


def test_pixels_come_back(path):
    np.testing.assert_array_equal(load_channel(path, (8, 8)), np.arange(64).reshape(8, 8))


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
    with pytest.raises(ValueError, match="w1.png: expected an 8-bit grey PNG .* found mode RGB"):
        load_channel(path, (8, 8))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    with pytest.raises(ValueError, match="found mode I"):
        load_channel(path, (8, 8))


def test_a_site_has_its_channels_last_and_in_order(release_tree, pixels_of):
    prefix = "images/RPE-01/Plate1/B03_s2"
    image = load_site(release_tree, prefix, (1, 2, 3, 4, 5, 6), (8, 8))
    np.testing.assert_array_equal(image, pixels_of("RPE-01_1_B03_2"))
    np.testing.assert_array_equal(load_site(release_tree, prefix, (3, 1), (8, 8)), image[..., [2, 0]])


def test_resizing_averages_areas(release_tree, pixels_of):
    small = load_site(release_tree, "images/RPE-01/Plate1/B03_s2", (1, 2, 3, 4, 5, 6), (8, 8), image_size=4)
    mean = pixels_of("RPE-01_1_B03_2").reshape(4, 2, 4, 2, 6).mean(axis=(1, 3))
    assert small.dtype == np.uint8 and np.abs(small - mean).max() <= 1  # Pillow rounds after rows and after columns
