"""RxRx1-WILDS, from its own tree and derived from RxRx1's."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from tfrecords.build import build_records, main
from tfrecords.manifest import read_manifest
from tfrecords.sources import find_layout, read_sites
from tfrecords.verify import verify_records

LOADED = ["dataset", "site", "experiment", "plate", "well", "cell_type", "sirna_id"]


@pytest.fixture
def wilds(release_tree, tmp_path, pixels_of):
    """WILDS's tree: the first three channels and the centre, here 4 of 8 pixels, of the release in one RGB file."""
    folder = tmp_path / "rxrx1_v1.0"
    table = pd.read_csv(release_tree / "metadata.csv")
    for row in table.itertuples():
        place = folder / "images" / row.experiment / f"Plate{row.plate}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(row.site_id)[2:6, 2:6, :3]).save(place / f"{row.well}_s{row.site}.png")
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


def records(dest):
    return {path.relative_to(dest): path.read_bytes() for path in dest.rglob("*.tfrecord")}


def images(dest):
    shape = read_manifest(dest)["image_shape"]
    for path in dest.rglob("*.tfrecord"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            pixels = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8).reshape(shape)
            yield feature["site_id"].bytes_list.value[0].decode(), pixels


def test_its_tree_is_recognized_by_the_files(wilds, release_tree):
    assert find_layout(wilds) == "wilds" and find_layout(release_tree) == "rxrx1"
    assert set(read_sites(wilds)["path"]) >= {"images/RPE-01/Plate1/B03_s2.png"}


def test_derived_from_the_release_it_is_a_direct_crop_of_the_same_pixels(release_tree, tmp_path, pixels_of):
    dest = tmp_path / "records"
    assert main([str(release_tree), str(dest), "--channels", "1,2,3", "--crop", "4"]) == 0
    found = dict(images(dest))
    assert len(found) == 32
    for site_id, image in found.items():
        np.testing.assert_array_equal(image, pixels_of(site_id)[2:6, 2:6, :3])
    options = read_manifest(dest)["options"]
    assert (options["channels"], options["crop"], options["layout"]) == ([1, 2, 3], 4, "rxrx1")
    assert verify_records(dest) == []


def test_its_own_tree_gives_the_same_records_as_the_release(wilds, release_tree, tmp_path):
    build_records(wilds, tmp_path / "own")
    build_records(release_tree, tmp_path / "derived", channels=(1, 2, 3), crop=4)
    assert records(tmp_path / "own") == records(tmp_path / "derived")
    assert read_manifest(tmp_path / "own")["options"]["layout"] == "wilds"
    assert verify_records(tmp_path / "own") == []


def test_a_table_of_no_more_than_its_loader_reads_is_enough(wilds, edit_table):
    whole = read_sites(wilds)
    ids = [number for number in ("7", "1107", "1108", "1138") for _ in range(2)]  # of the two sites of a well
    edit_table(wilds, lambda table: table[LOADED].assign(sirna_id=ids * 4))
    sites = read_sites(wilds)
    assert sites["well_type"].tolist()[:8:2] == ["treatment", "treatment", "positive_control", "negative_control"]
    same = ["site_id", "well_id", *LOADED[:-1], "path"]
    pd.testing.assert_frame_equal(sites[same], whole[same])
    edit_table(wilds, lambda table: table.drop(columns="sirna_id"))
    with pytest.raises(ValueError, match="metadata.csv lacks the column 'sirna_id'"):
        read_sites(wilds)


def test_a_wrong_layout_finds_no_files(wilds, tmp_path):
    with pytest.raises(ValueError, match="No site is complete: nothing to build. Expected files such as .*_w1.png"):
        build_records(wilds, tmp_path / "records", layout="rxrx1")
    with pytest.raises(ValueError, match="Unknown layout 'WILDS'. Expected one of auto, rxrx1, wilds, kaggle"):
        build_records(wilds, tmp_path / "records", layout="WILDS")


def test_channels_that_are_not_there_and_crops_that_do_not_fit_are_refused(wilds, release_tree, tmp_path):
    for channels in ((1, 4), (), (1, 1)):
        with pytest.raises(ValueError, match="cannot be taken. Expected some of 1, 2, 3, each once"):
            build_records(wilds, tmp_path / "records", channels=channels)
    with pytest.raises(ValueError, match="The crop 9 is not between 1 and the 8 pixels on disk"):
        build_records(release_tree, tmp_path / "records", crop=9)
    with pytest.raises(ValueError, match="image size 5 is not between 1 and the 4 pixels of the crop"):
        build_records(release_tree, tmp_path / "records", crop=4, image_size=5)


def test_files_of_channels_that_are_not_wanted_need_not_be_there(release, tmp_path):
    (release / "images/RPE-01/Plate1/B03_s2_w5.png").unlink()
    assert build_records(release, tmp_path / "records", channels=(2, 1))["excluded"]["count"] == 0
