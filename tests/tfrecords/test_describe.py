import math
import sys

import numpy as np
import pytest
from PIL import Image, ImageFont

from tfrecords.build import build_records
from tfrecords.contact_sheet import to_rgb, write_contact_sheet
from tfrecords.describe import describe_records, main
from tfrecords.verify import verify_records


def row_of(text, *begin):
    (row,) = [line.split() for line in text.splitlines() if tuple(line.split()[: len(begin)]) == begin]
    return row[len(begin) :]


def test_splits_cell_types_experiments_and_classes_are_counted(records_tree):
    text = describe_records(records_tree)
    assert "32 sites in 12 files" in text and "encoding raw, 8 x 8 pixels, channels 1, 2, 3, 4, 5, 6" in text
    # Experiments, plates, wells, sites, treatments, controls, unlabelled.
    assert row_of(text, "train", "HUVEC") == ["1", "1", "4", "4", "2", "2", "0"]
    assert row_of(text, "train", "all") == ["2", "2", "8", "8", "4", "4", "0"]
    assert row_of(text, "test", "HUVEC") == row_of(text, "test", "all") == ["1", "1", "4", "8", "4", "4", "0"]
    assert "train: HUVEC-01 4, RPE-01 4" in text
    # Classes, and the sites of one: least, median, mean, most.
    assert row_of(text.split("Sites of a class")[1], "train") == ["4", "2", "2.0", "2.0", "2"]
    assert "No site was left out." in text


def test_left_out_sites_are_counted_by_reason_and_unlabelled_ones_are_no_class(release, kaggle_tree, tmp_path):
    for site in (1, 2):
        (release / f"images/RPE-01/Plate1/B03_s{site}_w5.png").unlink()
    build_records(release, tmp_path / "records", crop=4)
    text = describe_records(tmp_path / "records")
    assert "1 reasons to leave out 2 sites:\n  2: missing channels w5" in text and "crop 4" in text
    build_records(kaggle_tree, tmp_path / "kaggle")
    text = describe_records(tmp_path / "kaggle")
    assert row_of(text, "test", "HUVEC")[-1] == "4"  # Kaggle does not give the treatments of the test part.
    assert row_of(text.split("Sites of a class")[1], "test")[0] == "2"


def test_the_command_line_prints_and_draws_and_leaves_the_folder_as_it_is(records_tree, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(records_tree)]) == 0
    assert "Contact sheet: contact_sheet.png" in capsys.readouterr().out
    assert Image.open("contact_sheet.png").mode == "RGB"
    assert main([str(records_tree), "--sheet", str(records_tree / "sheet.png")]) == 1
    assert "would lie in the folder of records" in capsys.readouterr().err
    monkeypatch.chdir(records_tree / "train")
    assert main([".."]) == 0
    beside = records_tree.with_name(f"{records_tree.name}_contact_sheet.png")
    assert beside.is_file() and f"Contact sheet: {beside}" in capsys.readouterr().out
    beside.unlink()
    assert main([str(tmp_path)]) == 1
    assert "holds no finished records" in capsys.readouterr().err
    assert verify_records(records_tree) == []


def test_the_command_line_names_a_damaged_record_and_a_package_that_is_lacking(release_tree, tmp_path, capsys):
    build_records(release_tree, tmp_path / "records")
    for file in (tmp_path / "records").glob("*/*.tfrecord"):
        data = file.read_bytes()
        file.write_bytes(bytes(byte ^ (i % 40 == 39) for i, byte in enumerate(data)))
    capsys.readouterr()
    assert main([str(tmp_path / "records"), "--sheet", str(tmp_path / "sheet.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and ": damaged, missing" in error
    assert not (tmp_path / "sheet.png").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fsspec", None)
        assert main(["s3://bucket/records"]) == 1
    assert "error: s3:// needs fsspec" in capsys.readouterr().err


@pytest.mark.parametrize("encoding, channels", [("raw", None), ("png", None), ("raw", (1, 2, 3)), ("png", (2,))])
def test_a_sheet_has_a_row_for_each_cell_type_and_the_sites_own_pixels(
    release_tree, pixels_of, tmp_path, encoding, channels
):
    build_records(release_tree, tmp_path / "records", encoding=encoding, channels=channels)
    write_contact_sheet(tmp_path / "records", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    wide = math.ceil(ImageFont.load_default().getlength("HUVEC-01_1_B03_1"))  # than the images: names are not cut
    assert wide > 60 and sheet.shape[0] == 2 * (8 + 14 + 4) + 4
    assert sheet.shape[1] >= 3 * (wide + 4) + 4  # HUVEC in three experiments, RPE in one.
    corner = sheet[4 + 26 + 14 :, 4:][:8, :8]  # RPE's only one.
    picked = [0, 1, 2, 3, 4, 5] if channels is None else [channel - 1 for channel in channels]
    candidates = [
        to_rgb(pixels_of(f"RPE-01_1_{well}_{site}")[..., picked], [n + 1 for n in picked])
        for well in ("B03", "B04")
        for site in (1, 2)
    ]
    assert any((corner == candidate).all() for candidate in candidates)


def test_colours_are_those_of_rxrx1():
    image = np.zeros((1, 3, 6), np.uint8)
    image[0, 0, 0] = 51  # Nuclei, as bright as shown.
    image[0, 1, 3] = 255  # Brighter than shown.
    image[0, 2, [0, 2]] = 51, 64  # Sums saturate.
    assert to_rgb(image, [1, 2, 3, 4, 5, 6])[0].tolist() == [[19, 0, 249], [45, 255, 252], [255, 0, 255]]
    turned = to_rgb(image[..., ::-1], [6, 5, 4, 3, 2, 1])  # the same stains in another order
    assert (turned == to_rgb(image, [1, 2, 3, 4, 5, 6])).all()
    assert to_rgb(image)[0, :2].tolist() == [[3, 0, 49], [45, 255, 252]]  # another screen's: in full at 255
    assert (to_rgb(image[..., :3]) == image[..., :3]).all()
    assert to_rgb(image[..., :2])[0, 0].tolist() == [26, 26, 26]  # 25.5, rounded to even.
