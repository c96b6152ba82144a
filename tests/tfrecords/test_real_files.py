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


def test_missing_channels_are_an_error_when_strict(joined, tmp_path):
    with pytest.raises(
        ValueError, match=r"125,498 of 125,510 sites lack[\s\S]*missing channels w5, w6: 12 \(HEPG2-01_1_B02_2"
    ):
        build_records(joined, tmp_path / "records", label="cell_type", strict=True)
    assert not (tmp_path / "records").exists()
