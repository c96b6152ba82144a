import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tfrecords.measure import choose_plates, find_ranges, measure_plate


@pytest.fixture
def plate(tmp_path):
    """Five sites of one plate, and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 5000, (5, 6, 7), dtype=np.uint16)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.tif")
    sites = pd.DataFrame({"experiment": "a", "plate": 1, "site_id": [f"s{i}" for i in range(5)]})
    return sites.assign(path=[(f"{i}.tif",) for i in range(5)]), pixels


def measure(source, sites, size, intensity):
    return dict(map(measure_plate, choose_plates(source, sites, (1,), size, intensity)))


@pytest.mark.parametrize("low, high", [(0, 100), (0.1, 99.9), (5, 50), (1, 2)])
def test_percentiles_are_those_of_all_pixels_of_a_plate(plate, tmp_path, low, high):
    sites, pixels = plate
    ranges = measure(tmp_path, sites, (6, 7), f"percentile:{low},{high}")
    ordered = np.sort(pixels.ravel())
    first, last, bits = ranges["a", 1][0]
    assert bits == 16
    assert first == ordered[min(int(np.floor(low / 100 * 210)), 209)]
    assert last == ordered[int(np.ceil(high / 100 * 210)) - 1]


def test_no_row_order_and_no_other_plate_matters(plate, tmp_path):
    sites, _ = plate
    alone = measure(tmp_path, sites, (6, 7), "percentile:1,99")
    other = sites.head(1).assign(plate=2, site_id="t")
    both = measure(tmp_path, pd.concat([other, sites[::-1]]), (6, 7), "percentile:1,99")
    assert both["a", 1] == alone["a", 1] != both["a", 2]


def test_no_more_than_32_sites_of_a_plate_are_looked_at(plate, tmp_path):
    sites, _ = plate
    many = pd.concat([sites.assign(site_id=sites["site_id"] + f"-{i}") for i in range(20)])
    (first,) = choose_plates(tmp_path, many, (1,), (6, 7), "percentile:1,99")
    (second,) = choose_plates(tmp_path, many[::-1], (1,), (6, 7), "percentile:1,99")
    assert len(first.paths) == 32 and first == second


def test_a_flat_plate_has_a_range(tmp_path):
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "a.tif")
    sites = pd.DataFrame({"experiment": ["a"], "plate": 1, "site_id": "s", "path": [("a.tif",)]})
    assert measure(tmp_path, sites, (4, 4), "percentile:1,99")["a", 1] == [(700, 701, 16)]


def test_the_files_of_another_depth_than_most_are_named(plate, tmp_path):
    sites, _ = plate
    for i in (0, 3):
        Image.fromarray(np.zeros((6, 7), np.uint8)).save(tmp_path / f"{i}.tif")
    (tmp_path / "4.tif").write_bytes(b"II*\x00")
    with pytest.raises(ValueError, match="3 files are not as expected") as caught:
        measure(tmp_path, sites, (6, 7), "percentile:1,99")
    assert [f"{i}.tif: expected 16 bits a pixel" in str(caught.value) for i in range(5)] == [
        True,
        False,
        False,
        True,
        False,
    ]


def test_a_fixed_range_is_that_also_of_files_that_cannot_be_read_and_none_is_none(plate):
    sites = plate[0].assign(path=[(f"{i}.tif",) * 3 for i in range(5)])
    options = {"channels": [1, 3], "intensity": "fixed:100,4095"}
    assert find_ranges("nowhere", sites, options, (6, 7)) == {("a", 1): [(100, 4095, None), (100, 4095, None)]}
    assert find_ranges("nowhere", sites, options | {"intensity": None}, (6, 7)) is None


@pytest.mark.parametrize(
    "levels, intensity, warnings",
    [
        ((500, 2700), "fixed:0,65535", ["keep few steps .* plate 1 of a, channel 1: 50. to 269., 9 of 255 steps"]),
        ((500, 2700), "fixed:0,200", ["keep few steps .*, 0 of 255 steps"]),
        ((500, 2700), "fixed:0,1000", ["reach more than twice the level that becomes 255, such as plate 1 of a"]),
        ((500, 2700), "fixed:0,4095", []),
        ((500, 2700), "percentile:0.1,99.9", []),
        ((65535, 65536), "percentile:0.1,99.9", ["have one grey level .*, channel 1: 65535. Look at their files"]),
        ((0, 1), "fixed:0,4095", ["have one grey level"]),
    ],
)
def test_levels_that_leave_nothing_of_a_channel_are_pointed_out(tmp_path, capsys, levels, intensity, warnings):
    pixels = np.random.default_rng(0).integers(*levels, (3, 20, 20), dtype=np.uint16)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.tif")
    sites = pd.DataFrame({"experiment": "a", "plate": 1, "site_id": [f"s{i}" for i in range(3)]})
    sites = sites.assign(path=[(f"{i}.tif",) for i in range(3)], plate_name="1")
    find_ranges(tmp_path, sites, {"channels": [1], "intensity": intensity}, (20, 20))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(lines) == len(warnings)
    pairs = zip(lines, warnings, strict=True)
    assert all(re.search(f"1 channels of plates {warning}", line) for line, warning in pairs)


def test_a_lost_channel_is_told_by_the_names_of_the_screen(plate, tmp_path, capsys):
    sites = plate[0].assign(plate_name="BR00117")
    options = {"channels": [1], "intensity": "fixed:0,65535", "screen": {"channels": ["DAPI"]}}
    find_ranges(tmp_path, sites, options, (6, 7))
    assert "such as plate BR00117 of a, channel DAPI: " in capsys.readouterr().out
