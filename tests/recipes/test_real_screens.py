"""Screens of real images, made here of fields and digits that show by their grey level where they come from."""

import gzip
import os
import shutil
from pathlib import Path

import h5py
import ladder
import numpy as np
import pytest
from ladder_screens import screen_records
from PIL import Image
from real_screens import OPERATIONS, paint, read_fields, read_usps, write_digits, write_painted

from tfrecords import list_sites, read_manifest, read_records

EXPERIMENTS = ("HUVEC-01", "RPE-01")
SMALL = {"image_size": 16, "treatments": 3, "sites": 2, "test_sites": 3}


def level(experiment, plate):
    return 20 * (4 * EXPERIMENTS.index(experiment) + plate)


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Two experiments of four plates, each of one grey level; site 2 lacks channels."""
    folder = tmp_path_factory.mktemp("fields")
    for experiment in EXPERIMENTS:
        for plate in range(1, 5):
            place = folder / "train" / experiment / f"Plate{plate}"
            place.mkdir(parents=True)
            for site, channels in ((1, 6), (2, 4)):
                for channel in range(1, channels + 1):
                    pixels = np.full((128, 120), level(experiment, plate) + 5 * (site - 1), np.uint8)
                    Image.fromarray(pixels).save(place / f"B02_s{site}_w{channel}.png")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """MNIST's files with 40 pictures, USPS's with 30 and 20; grey level ten times the label, USPS's 5 more."""
    folder = tmp_path_factory.mktemp("digits")
    labels = np.arange(40) % 10
    for name, header, values in (
        ("t10k-images-idx3-ubyte.gz", 16, np.repeat(10 * labels, 28 * 28)),
        ("t10k-labels-idx1-ubyte.gz", 8, labels),
    ):
        (folder / name).write_bytes(gzip.compress(bytes(header) + values.astype(np.uint8).tobytes()))
    with h5py.File(folder / "usps.h5", "w") as file:
        for part, count in (("train", 30), ("test", 20)):
            labels = np.arange(count) % 10
            file[f"{part}/data"] = np.repeat(((10 * labels + 5) / 255)[:, None], 256, axis=1).astype("float32")
            file[f"{part}/target"] = labels
    return folder


def levels(folder, row, channels=6):
    place = folder / "images" / row.experiment / f"Plate{row.plate}"
    return [np.unique(Image.open(place / f"{row.well}_s{row.site}_w{c}.png")) for c in range(1, channels + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_of_each_experiment_a_plate_is_left_out_for_test_and_one_for_validation(fields, tmp_path, seed):
    metadata = write_painted(tmp_path / "screen", fields, seed=seed, **SMALL)
    plates = metadata.assign(field=metadata["experiment"].str[-2:].astype(int)).groupby("dataset")["field"].unique()
    assert set(plates["test"]) == {1 + seed % 4} and set(plates["val"]) == {1 + (seed + 1) % 4}
    assert len(plates["train"]) == 2 and len(set(np.concatenate(plates.tolist()))) == 4
    assert metadata["site_id"].is_unique
    for row in metadata.itertuples():  # each picture is cut from the plate that its experiment is
        plate = int(row.experiment[-2:])
        assert all(found == [level(f"{row.cell_type}-01", plate)] for found in levels(tmp_path / "screen", row))
    counts = metadata.groupby(["dataset", "sirna"]).size()
    assert counts["train", "s0"] == 2 * 2 * 2 * 2 and counts["test", "s2"] == 2 * 3 * 2
    assert counts["test", "EMPTY"] == 2 * 2 * 2  # negative controls, as many as of a treatment in training


def test_a_treatment_changes_one_channel_and_is_the_same_operation_for_all():
    rng = np.random.default_rng(0)
    image = rng.integers(20, 200, (6, 96, 96)).astype(np.uint8)
    seen = set()
    for treatment in range(48):
        painted = [paint(image, treatment, np.random.default_rng(seed)) for seed in range(3)]
        changed = [{c for c in range(6) if (one[c] != image[c]).any()} for one in painted]
        assert changed[0] == changed[1] == changed[2] and len(changed[0]) == 1
        seen.add((treatment % len(OPERATIONS), *changed[0]))
        strengths = [np.abs(one.astype(float) - image).mean() for one in painted]
        assert min(strengths) > 0 and len(set(strengths)) == 3
    assert len(seen) == 48  # no two treatments are the same


@pytest.mark.parametrize(("source", "target"), [("mnist", "usps"), ("usps", "mnist")])
def test_digits_are_trained_on_in_one_domain_and_tested_in_the_other(digits, tmp_path, source, target):
    metadata = write_digits(tmp_path / "screen", digits, source, train=20, held_out=10, test=30)
    assert metadata.groupby(["dataset", "site"]).size().to_dict() == {
        ("train", 1): 20,
        ("train", 2): 10,
        ("val", 1): 10,
        ("test", 1): 30,
    }
    assert metadata["well_id"].is_unique
    assert set(metadata["experiment"][metadata["dataset"] == "test"]) == {f"{target.upper()}-01"}
    for row in metadata.itertuples():
        expected = 10 * row.sirna_id + (5 if row.experiment.startswith("USPS") else 0)
        np.testing.assert_array_equal(levels(tmp_path / "screen", row, 1), [[expected]])
    other = write_digits(tmp_path / "other", digits, source, seed=1, train=20, held_out=10, test=30)
    assert not (other["sirna_id"] == metadata["sirna_id"]).all()


def test_the_ladder_builds_them_and_takes_no_test_plate_for_settings(fields, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(ladder.REAL["painted"], "screen", {"kind": "painted", **SMALL})
    plan = ladder.make_plan(ladder.parse(["--preset", "full", "--screen", "painted", "--data", str(fields)]))
    assert plan["trials"] == 0 and plan["screen"]["kind"] == "painted"
    records = screen_records(tmp_path, plan["screen"] | {"seed": 2}, fields)
    assert screen_records(tmp_path, plan["screen"] | {"seed": 2}) == records  # built
    assert len(read_manifest(records)["experiments"]["train"]) == 4 and len(list_sites(records, "test")) == 36
    small = {"image_size": 28, "train": 16, "held_out": 8, "test": 8}
    records = screen_records(tmp_path, {"kind": "usps-mnist", "seed": 0, **small}, digits)
    images, labels = next(iter(read_records(records, "test", batch_size=8, normalize=lambda x: x)))
    assert images.shape == (8, 28, 28, 1) and len(labels) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--screen", "painted"], "needs --data"),
        (["--data", "x"], "takes no --data"),
        (["--screen", "painted", "--data", "x", "--trials", "8"], "takes no --trials"),
        (["--screen", "mnist-usps", "--data", "x", "--shift", "focus"], "takes no --shift"),
    ],
)
def test_options_of_drawn_screens_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        ladder.parse(arguments)
    assert message in capsys.readouterr().err


def test_bad_input_is_named(fields, digits, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: expected RxRx1's pictures.* found none"):
        write_painted(tmp_path / "a", tmp_path)
    shutil.copytree(fields, tmp_path / "two")
    shutil.copytree(fields / "train" / EXPERIMENTS[0], tmp_path / "two" / "train" / f"{EXPERIMENTS[0][:-1]}9")
    with pytest.raises(ValueError, match="expected one experiment of a cell type; found 2 of"):
        write_painted(tmp_path / "a", tmp_path / "two")
    with pytest.raises(ValueError, match="treatments must be 2 to 48; received 49"):
        write_painted(tmp_path / "a", fields, treatments=49)
    with pytest.raises(ValueError, match="308 wells; 48 treatments would need 776"):
        write_painted(tmp_path / "a", fields, treatments=48, sites=8, test_sites=16)
    with pytest.raises(ValueError, match="Digits have 28 pixels; received image_size=48"):
        write_digits(tmp_path / "a", digits, "mnist", image_size=48)
    with pytest.raises(ValueError, match="MNIST has 40 digits, and 41 were asked for"):
        write_digits(tmp_path / "a", digits, "mnist", train=21, held_out=10, test=5)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is in use"):
        write_digits(tmp_path / "a", digits, "mnist", train=1, held_out=1, test=1)
    assert os.listdir(tmp_path / "a") == ["notes"]


def test_the_real_ones_are_read():
    sample = os.environ.get("RXRX1_SAMPLE")
    if not sample:
        pytest.skip("RXRX1_SAMPLE does not name a folder of real RxRx1 files")
    fields = read_fields(Path(sample) / "rxrx1-images")
    assert len(fields) == 12 and {field.shape for field in fields.values()} == {(6, 512, 512)}
    images, labels = read_usps(Path(sample) / "digits")
    assert images.shape == (9298, 28, 28) and np.bincount(labels).sum() == 9298 and len(np.bincount(labels)) == 10
