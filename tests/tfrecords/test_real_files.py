"""On the real files of RxRx1 that the environment variable RXRX1_SAMPLE names. (CC BY-NC-SA 4.0: not in here.)"""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from tfrecords.build import build_records
from tfrecords.labels import class_map
from tfrecords.leaks import find_repeats, repeating_sites
from tfrecords.plan import plan_shards
from tfrecords.preprocess import standardize
from tfrecords.read import read_records
from tfrecords.sources import KAGGLE_TABLES, read_sites
from tfrecords.splits import assign_splits, count_splits
from tfrecords.verify import verify_records

pytestmark = pytest.mark.skipif(
    "RXRX1_SAMPLE" not in os.environ, reason="RXRX1_SAMPLE does not name a folder with real files of RxRx1"
)


@pytest.fixture(scope="module")
def sample():
    return Path(os.environ["RXRX1_SAMPLE"])


@pytest.fixture(scope="module")
def joined(sample, tmp_path_factory):
    """Copies of the tables and of the image tree, which stand apart in the sample, in one folder."""
    folder = tmp_path_factory.mktemp("real") / "kaggle"
    shutil.copytree(sample / "rxrx1-images", folder)
    for name in KAGGLE_TABLES:
        shutil.copy(sample / "kaggle-2019" / name, folder)
    return folder


def test_the_splits_have_the_official_counts(sample):
    sites = read_sites(sample / "kaggle-2019")
    assert len(sites) == 125_510
    sites["split"] = assign_splits(sites)
    assert count_splits(sites["split"]) == {"train": 40_612, "id_test": 40_612, "val": 9_854, "test": 34_432}
    by_cell_type = sites[sites["split"].isin(["val", "test"])].groupby(["split", "cell_type"]).size()
    assert by_cell_type["val"].to_dict() == {"HEPG2": 2_462, "HUVEC": 2_464, "RPE": 2_464, "U2OS": 2_464}
    assert by_cell_type["test"].to_dict() == {"HEPG2": 7_388, "HUVEC": 17_244, "RPE": 7_360, "U2OS": 2_440}
    planned = pd.Series({shard.name: len(shard.site_ids) for shard in plan_shards(sites)})
    assert planned.sum() == 125_510 and planned.max() <= 256


@pytest.fixture(scope="module")
def sites(sample):
    return read_sites(sample / "kaggle-2019")


def test_mixed_to_test_has_19_of_the_33_training_experiments(sites):
    split = assign_splits(sites, "mixed-to-test")
    assert count_splits(split) == {"train": 40_581, "id_test": 0, "val": 9_854, "test": 17_216}
    training = sites["dataset"] == "train"
    dropped = set(sites.loc[training, "experiment"]) - set(sites.loc[training & (split == "train"), "experiment"])
    lowest = {"HUVEC": 7, "HEPG2": 3, "RPE": 3, "U2OS": 1}
    assert dropped == {f"{name}-{i:02d}" for name, count in lowest.items() for i in range(1, count + 1)}
    traded = sites[~training & (split == "train")]
    assert set(traded["site"]) == {1} and traded["experiment"].nunique() == 14
    assert set(traded["experiment"]) == set(sites.loc[split == "test", "experiment"])
    assert set(sites.loc[split == "test", "site"]) == {2}


def test_the_splits_of_rxrx1_and_of_kaggle_have_their_counts(sites):
    split = assign_splits(sites, "rxrx1")
    assert count_splits(split) == {"train": 81_224, "id_test": 0, "val": 0, "test": 44_286}
    assert sites["experiment"].groupby(split).nunique().to_dict() == {"test": 18, "train": 33}
    split = assign_splits(sites, "kaggle")
    assert count_splits(split) == {"train": 81_224, "id_test": 0, "val": 9_854, "test": 34_432}
    treated = sites[sites["well_type"] == "treatment"]
    wells = treated.groupby(split[treated.index])["well_id"].nunique()
    assert (wells["val"], wells["test"]) == (4_431, 15_466)
    assert sites["experiment"].groupby(split).nunique().to_dict() == {"test": 14, "train": 33, "val": 4}


def test_folds_keep_experiments_whole_and_cell_types_even(sites):
    val = {}
    for fold in range(1, 6):
        split = assign_splits(sites, f"kfold-5-{fold}")
        assert (split.groupby(sites["experiment"]).nunique() == 1).all() and (split == "test").sum() == 44_286
        for experiment in set(sites.loc[split == "val", "experiment"]):
            assert val.setdefault(experiment, fold) == fold
    assert len(val) == 33
    counts = pd.crosstab(pd.Series(val).index.str.split("-").str[0], list(val.values()))
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all() and counts.sum().max() <= 7


def test_the_layout_of_huvec_18_is_found_in_two_training_experiments(sites, sample):
    for table in (sites, read_sites(sample / "kaggle-current")):
        table = table.assign(split=assign_splits(table))
        repeats = find_repeats(table)
        found = repeats[["experiment", "split", "of_experiment", "of_split", "evidence"]].drop_duplicates()
        assert found.values.tolist() == [
            ["HUVEC-07", "train", "HUVEC-18", "test", "positive_control"],
            ["RPE-03", "train", "HUVEC-18", "test", "positive_control"],
        ]
        assert repeats["alike"].between(29, 30).all() and len(repeats) == 2 * 4 * 4
        gone = table[repeating_sites(table, repeats) != ""]
        assert set(gone["experiment"]) == {"HUVEC-07", "RPE-03"} and set(gone["split"]) == {"train", "id_test"}
        assert len(gone) == table["experiment"].isin(["HUVEC-07", "RPE-03"]).sum()


def test_where_treatments_are_known_the_plates_are_told_apart(sites):
    repeats = find_repeats(sites.assign(split=assign_splits(sites, "kfold-5-1")))
    repeats = repeats[repeats["evidence"] == "treatment"]
    pairs = set(zip(repeats["plate"], repeats["of_plate"], strict=True))
    assert set(repeats["experiment"]) == {"HUVEC-07"} and set(repeats["of_experiment"]) == {"RPE-03"}
    assert pairs == {(plate, plate % 4 + 1) for plate in range(1, 5)}
    assert (repeats["alike"] == repeats["wells"]).all() and repeats["wells"].between(276, 277).all()


def test_positive_controls_tell_repeated_plates_from_all_others(sites):
    controls = sites[(sites["well_type"] == "positive_control") & (sites["site"] == 1)]
    places = {
        plate: set(zip(rows["well"], rows["sirna_id"], strict=True))
        for plate, rows in controls.groupby(["experiment", "plate"])
    }
    alike = {(a, b): len(places[a] & places[b]) for a in places for b in places if a < b and a[0] != b[0]}
    same = {pair: count for pair, count in alike.items() if count > 7}
    assert {(a[0], b[0]) for a, b in same} == {("HUVEC-07", "HUVEC-18"), ("HUVEC-07", "RPE-03"), ("HUVEC-18", "RPE-03")}
    assert len(same) == 3 * 4 * 4 and set(same.values()) == {29, 30}


def test_both_versions_of_the_tables_are_one_to_one(sites, sample):
    current = read_sites(sample / "kaggle-current").set_index("site_id")
    joined = sites.set_index("site_id").join(current.add_suffix("_now"), how="left")
    assert joined["experiment_now"].notna().all()
    assert set(current.index) - set(joined.index) == {
        f"{well}_{site}"
        for well in ("HUVEC-06_1_B18", "RPE-04_3_E04", "HUVEC-18_3_D23", "RPE-09_2_J16")
        for site in (1, 2)
    }
    assert (joined["well_type"] == joined["well_type_now"]).all()
    assert (joined["sirna_id"].isna() == joined["sirna_id_now"].isna()).all()
    pairs = joined[["sirna_id", "sirna_id_now"]].dropna().drop_duplicates()
    assert len(pairs) == 1_139 and pairs["sirna_id"].is_unique and pairs["sirna_id_now"].is_unique
    treated = pairs["sirna_id"] < 1_108
    assert treated.sum() == 1_108 and (treated == (pairs["sirna_id_now"] < 1_108)).all()


def test_both_versions_of_the_tables_give_1139_classes_treatments_first(sample):
    for name in ("kaggle-2019", "kaggle-current"):
        classes = class_map(read_sites(sample / name))
        assert [row["value"] for row in classes] == list(range(1139))
        assert [row["treatment"] for row in classes] == [True] * 1108 + [False] * 31
    assert classes[0]["name"] == "sirna_0" and classes[-1]["name"] == "UNTREATED"


def test_real_images_are_built_verified_and_read_back_equal(joined, tmp_path, capsys):
    dest = tmp_path / "records"
    manifest = build_records(joined, dest, label="cell_type")
    out = capsys.readouterr().out
    assert len(out) < 2000
    assert "missing channels w5, w6: 12 (HEPG2-01_1_B02_2, " in out and "no files: 125,486 (" in out
    excluded = pd.read_csv(dest / "excluded.csv")
    assert len(excluded) == manifest["excluded"]["count"] == 125_498
    assert set(excluded.loc[excluded["reason"] == "missing channels w5, w6", "site_id"]) == {
        f"{experiment}-01_{plate}_B02_2" for experiment in ("HEPG2", "HUVEC", "RPE") for plate in range(1, 5)
    }
    assert verify_records(dest) == []

    stored = {}
    for path in dest.glob("train/*.tfrecord"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            pixels = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8).reshape(512, 512, 6)
            stored[feature["site_id"].bytes_list.value[0].decode()] = pixels
    assert len(stored) == 12

    for images, labels, metadata in read_records(dest, "train", batch_size=4, kinds=("control",), metadata=True):
        assert images.shape == (4, 512, 512, 6)
        for image, label, name in zip(images.numpy(), labels.numpy(), metadata["site_id"].numpy(), strict=True):
            experiment, plate, well, site = name.decode().split("_")
            stem = joined / "train" / experiment / f"Plate{plate}" / f"{well}_s{site}"
            pixels = np.stack([np.asarray(Image.open(f"{stem}_w{channel}.png")) for channel in range(1, 7)], axis=-1)
            np.testing.assert_array_equal(stored[name.decode()], pixels)
            np.testing.assert_allclose(image, standardize(pixels[None])[0], atol=1e-5)
            assert manifest["classes"][label]["name"] == experiment.split("-")[0]


def test_derived_wilds_is_a_direct_crop_of_the_real_pixels(joined, tmp_path, capsys):
    dest = tmp_path / "records"
    build_records(joined, dest, label="cell_type", channels=(1, 2, 3), crop=256)
    assert "no files: 125,486 (" in capsys.readouterr().out
    seen = 0
    for path in dest.glob("*/*.tfrecord"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            experiment, plate, well, site = feature["site_id"].bytes_list.value[0].decode().split("_")
            stem = joined / "train" / experiment / f"Plate{plate}" / f"{well}_s{site}"
            pixels = np.stack([np.asarray(Image.open(f"{stem}_w{channel}.png")) for channel in (1, 2, 3)], axis=-1)
            image = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8).reshape(256, 256, 3)
            np.testing.assert_array_equal(image, pixels[128:384, 128:384])
            seen += 1
    assert seen == 24
    assert verify_records(dest) == []


def test_real_microscope_files_are_built_verified_and_read_back_equal_to_the_mapped_pixels(sample, tmp_path):
    source, dest = tmp_path / "own", tmp_path / "records"
    shutil.copytree(sample / "tiff-16bit", source)
    names = sorted(path.name for path in source.glob("*.tif"))
    assert len(names) == 3
    rows = [(name.split("_")[1], name.split("_")[2][1:], name) for name in names]
    pd.DataFrame(rows, columns=["Well", "Field", "FileName_DNA"]).assign(Run="BBBC022").to_csv(
        source / "load_data.csv", index=False
    )
    screen = {
        "table": "load_data.csv",
        "images": {"DNA": "{FileName_DNA}"},
        "columns": {"experiment": "Run", "well": "Well", "site": "Field"},
        "splits": {"train": ["BBBC022"]},
    }
    manifest = build_records(source, dest, screen=screen, label="experiment")
    assert verify_records(dest) == []
    assert manifest["image_shape"] == [520, 696, 1] and manifest["options"]["intensity"] == "percentile:0.1,99.9"
    pixels = {f"BBBC022_1_{well}_{field}": np.asarray(Image.open(source / name)) for well, field, name in rows}
    levels = np.sort(np.concatenate([image.ravel() for image in pixels.values()]))
    low, high = levels[int(0.001 * len(levels))], levels[int(np.ceil(0.999 * len(levels))) - 1]
    assert [(row["low"], row["high"]) for row in manifest["intensity"]] == [(low, high)] and high > 255
    for images, _, metadata in read_records(dest, "train", batch_size=3, metadata=True):
        for image, name in zip(images.numpy(), metadata["site_id"].numpy(), strict=True):
            mapped = np.rint((np.clip(pixels[name.decode()].astype("float64"), low, high) - low) / (high - low) * 255)
            assert (mapped == 255).mean() < 0.01 and mapped.std() > 20
            np.testing.assert_allclose(image[..., 0], standardize(mapped[None, ..., None])[0, ..., 0], atol=1e-2)


def test_missing_channels_are_an_error_when_strict(joined, tmp_path):
    with pytest.raises(
        ValueError, match=r"125,498 of 125,510 sites lack[\s\S]*missing channels w5, w6: 12 \(HEPG2-01_1_B02_2"
    ):
        build_records(joined, tmp_path / "records", label="cell_type", strict=True)
    assert not (tmp_path / "records").exists()
