"""The main job, as a user starts it: another process, another working directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

import keras_abra  # noqa: F401, its classes are registered for loading
from tfrecords import build_records, verify_records, write_screen

RECIPE = Path(__file__).parents[2] / "recipes" / "rxrx1.py"


def recipe(folder, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def screen(tmp_path_factory):
    """A screen of four experiments in each part, four treatments, 24 pixels."""
    folder = tmp_path_factory.mktemp("screen") / "screen"
    write_screen(folder, image_size=24, treatments=8, experiments=SMALL)
    return folder


SMALL = {split: {"HUVEC": 1, "RPE": 1} for split in ("train", "val", "test")}
OPTIONS = ("--backbone", "tiny_resnet", "--image-size", 24, "--batch-size", 8, "--epochs", 2)


@pytest.mark.parametrize("method", ["abra", "dsu", "arcface", "erm"])
def test_it_trains_scores_and_saves(method, screen, tmp_path):
    result = recipe(tmp_path, "--data", screen, "--method", method, *OPTIONS)
    assert result.returncode == 0, result.stderr[-2000:]
    output = tmp_path / "runs" / "rxrx1-0001"
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["method"], metrics["backend"], metrics["seed"]) == (method, keras.backend.backend(), 0)
    assert set(metrics["splits"]) == {"id_test", "val", "test"}
    predictions = pd.read_csv(output / "predictions.csv")
    for name, split in metrics["splits"].items():
        rows = predictions[predictions.split == name]
        assert split["count"] == len(rows) == sum(part["count"] for part in split["cell_type"].values())
        assert split["accuracy"] == pytest.approx((rows.predicted_1 == rows.sirna).mean())
    assert len(pd.read_csv(output / "history.csv")) == 2
    assert "Accuracy (%) of" in result.stdout and "test" in result.stdout
    model = keras.models.load_model(output / "model.keras")
    assert model.predict(np.zeros((1, 24, 24, 6), "float32"), verbose=0).shape == (1, 8)
    assert sorted(p.name for p in output.iterdir()) == [
        "history.csv", "metrics.json", "model.keras", "predictions.csv", "records",
    ]  # fmt: skip


def test_records_are_kept_and_used_again(screen, tmp_path):
    records = tmp_path / "records"
    build_records(screen, records)
    result = recipe(tmp_path, "--records", records, "--method", "arcface", *OPTIONS, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "out" / "metrics.json").is_file() and not (tmp_path / "out" / "records").exists()


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = recipe(tmp_path, "--output", tmp_path / "out")
    assert result.returncode != 0 and "is in use: expected a new or empty folder" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_real_files_go_through_the_same_code(rxrx1_sample, tmp_path):
    data = tmp_path / "rxrx1"
    shutil.copytree(rxrx1_sample / "kaggle-2019", data)
    shutil.copytree(rxrx1_sample / "rxrx1-images", data, dirs_exist_ok=True)
    options = (
        "--label",
        "cell_type",
        "--backbone",
        "tiny_resnet",
        "--image-size",
        64,
        "--batch-size",
        4,
        "--epochs",
        2,
    )
    result = recipe(tmp_path, "--data", data, "--records", tmp_path / "records", "--output", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "missing channels" in result.stdout + result.stderr
    assert verify_records(tmp_path / "records") == []
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert len(history) == 2 and np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("method", ["arcface", "erm"])
def test_a_loss_that_is_not_finite_names_the_sites(method, screen, tmp_path, monkeypatch):
    import rxrx1

    monkeypatch.setitem(rxrx1.REAL, "learning_rate", float("nan"))
    arguments = ["--data", screen, "--method", method, "--output", tmp_path / "out", *OPTIONS]
    with pytest.raises(SystemExit, match="became nan in epoch 0, step 1 .*\n.*Sites of that step: (HUVEC|RPE)-01_"):
        rxrx1.main([str(a) for a in arguments])
    assert not (tmp_path / "out" / "metrics.json").exists()
