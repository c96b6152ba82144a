"""The jobs on several devices and in several processes, started as a user starts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import distribution
import keras
import numpy as np
import pandas as pd
import pytest

import keras_abra  # noqa: F401, its classes are registered for loading
from tests.processes import PATIENCE, ROOT, environment, free_port, run_together, xla_flags
from tfrecords import build_records, list_sites, site_ids_of_step

BACKEND = keras.backend.backend()
KIND = {"tensorflow": "mirrored", "jax": "data_parallel", "torch": "data_parallel"}[BACKEND]
CHILD = ROOT / "tests" / "recipes" / "in_process.py"
BATCH = 12


@pytest.fixture(scope="module")
def records(small_screen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "records"
    build_records(small_screen(16), folder)
    return folder


def together(recipe, folder, *arguments):
    """Two replicas of a job, in two processes where the backend takes those: `(text, what each job returned)`."""
    arguments = [CHILD, recipe, folder, *map(str, arguments)]
    if BACKEND == "torch":  # as torchrun, which is this module
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        result = subprocess.run([*launch, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]
        text = result.stdout
    else:
        commands = [arguments] * (2 if BACKEND == "jax" else 1)
        codes, texts = run_together(commands, cwd=folder, KERAS_BACKEND=BACKEND, XLA_FLAGS=xla_flags())
        assert not any(codes), "\n".join(text[-3000:] for text in texts)
        text = "".join(texts)
    return text, [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]


OPTIONS = ("--backbone", "tiny_resnet", "--batch-size", BATCH, "--epochs", 2, "--distribution", KIND)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [("rxrx1", "abra"), pytest.param("rxrx1_wilds", "erm", marks=pytest.mark.any_backend)],
)
def test_two_replicas_do_the_job_once(recipe, method, records, tmp_path):
    options = [*OPTIONS, "--method", method, "--records", records, "--output", tmp_path / "out"]
    if recipe == "rxrx1":
        options = [*options, "--perturb-after", "stem"]
    text, results = together(recipe, tmp_path, *options)
    kinds = ("treatment",) if recipe == "rxrx1" else ("treatment", "control")
    sites = list_sites(records, "val", kinds)
    assert len(sites) % BATCH != 0  # else nothing would be filled up
    read = {"batch_size": BATCH, "kinds": kinds, "seed": 0}
    assert len(results) == (1 if BACKEND == "tensorflow" else 2)
    assert all(result["metrics"] == results[0]["metrics"] for result in results)  # the same epoch, the same scores
    assert all(result["follows"] for result in results)  # no look has used up an epoch, though it has few steps
    for epoch in range(2):
        parts = zip(*(result["sites"][epoch] for result in results), strict=True)
        batches = [sum(part, []) for part in parts]
        order = [site_ids_of_step(records, "train", epoch=epoch, step=i, **read) for i in range(len(batches))]
        assert batches == order  # one order for all, divided among the processes
        assert len(set(sum(batches, []))) == len(batches) * BATCH  # no site twice
        assert len(batches) == len(list_sites(records, "train", kinds)) // BATCH  # none but the rest left out
    assert text.count(f"{KIND}: ") == 1 and f"2 replicas, {BATCH // 2} samples of each batch to one" in text
    assert text.count("Accuracy (%) of") == text.count("Written to") == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == results[0]["metrics"]
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    # What was evaluated in parts, filled up, is what was predicted site by site.
    val = metrics["splits"]["val"]
    assert len(history) == 2 and val["count"] == len(sites)
    assert history["val_accuracy"].max() == pytest.approx(val["accuracy"], abs=1e-6)
    model = keras.models.load_model(tmp_path / "out" / "model.keras")
    assert np.isfinite(model.predict(np.zeros((2, 16, 16, 6), "float32"), verbose=0)).all()
    assert method != "erm" or type(model).__name__ == "Functional"


def test_a_choice_of_another_backend_is_refused():
    other = {"mirrored": "data_parallel", "data_parallel": "mirrored"}[KIND]
    with pytest.raises(ValueError, match=f"--distribution {other}: {BACKEND} has {KIND}. Choose that, auto or none"):
        distribution.distribute(other)


def test_processes_that_would_each_do_the_whole_job_are_refused(monkeypatch):
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES" if BACKEND == "jax" else "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each would do the whole job"):
        distribution.distribute("none")


def test_each_process_of_torch_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK is not, .* Start by torchrun"):
        distribution._own_gpu("cuda", 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distribution._own_gpu("cuda", 4) == 3
    with pytest.raises(ValueError, match="process 3 on a machine of 1 GPUs: one process for each, which sees them all"):
        distribution._own_gpu("cuda", 1)
    with pytest.raises(ValueError, match="KERAS_TORCH_DEVICE=cuda:0: each of several processes takes a GPU of its own"):
        distribution._own_gpu("cuda:0", 4)


def test_one_device_is_said_to_be_one(capsys, monkeypatch):
    if BACKEND == "tensorflow":
        config = distribution.tf.config
        one = {"GPU": [], "CPU": config.list_logical_devices("CPU")[:1]}
        monkeypatch.setattr(config, "list_logical_devices", one.__getitem__)
    found = distribution.distribute(KIND)
    found.say(7)
    assert (found.kind, found.replicas, found.worker) == ("none", 1, (0, 1))
    assert found.accuracy() == {"metrics": ["accuracy"]} and found.evaluation({"worker": (0, 1)}) == {"worker": (0, 1)}
    said = capsys.readouterr().out
    assert f"--distribution {KIND}: there is one device only" in said and "batch 7" in said


def test_a_batch_that_does_not_divide_is_refused():
    found = distribution.Distribution(KIND, ["cpu:0", "cpu:1", "cpu:2"])
    with pytest.raises(ValueError, match="--batch-size 32 is over all .*among 3 replicas. .*multiple of 3, such as 30"):
        found.say(32)
    with pytest.raises(ValueError, match="such as 3"):
        found.say(2)
    assert found.accuracy() == {"weighted_metrics": ["accuracy"]}


def test_the_failure_of_the_first_process_ends_all(tmp_path, records):
    """An output folder in use is seen by the first process alone."""
    if BACKEND == "tensorflow":
        pytest.skip("one process")
    (tmp_path / "notes.txt").write_text("mine")
    script = ROOT / "recipes" / "rxrx1.py"
    commands = [[script, *map(str, OPTIONS), "--records", records, "--output", tmp_path]] * 2
    codes, texts = run_together(commands, cwd=tmp_path, KERAS_BACKEND=BACKEND)
    assert codes[0] not in (0, None) and codes[1] != 0
    assert "is in use: expected a new or empty folder" in texts[0] and "Traceback" not in texts[0]
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.skipif(BACKEND == "tensorflow", reason="one process")
@pytest.mark.skipif(BACKEND == "jax" and not os.environ.get("KILLS"), reason="by hand (KILLS=1): minutes of compiling")
def test_processes_that_are_told_to_leave_go_on_to_the_same_end(records, tmp_path):
    options = [*OPTIONS, "--epochs", 10, "--method", "erm", "--records", records, "--resume", "--output"]

    def start(output):
        port = free_port()
        command = [sys.executable, ROOT / "recipes" / "rxrx1.py", *map(str, [*options, output])]
        return [
            subprocess.Popen(command, env=environment(i, 2, port) | {"KERAS_BACKEND": BACKEND}, cwd=tmp_path)
            for i in range(2)
        ]

    def end(processes):
        try:
            return [process.wait(PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()

    assert end(start(tmp_path / "whole")) == [0, 0]
    processes = start(tmp_path / "cut")
    while not any(process.poll() for process in processes) and not [*(tmp_path / "cut" / "checkpoints").glob("0*")]:
        time.sleep(0.05)
    processes[1].terminate()  # the other one is told by it
    assert end(processes) == [75, 75]
    assert not (tmp_path / "cut" / "metrics.json").exists()
    assert end(start(tmp_path / "cut")) == [0, 0]
    for name in ("metrics.json", "history.csv", "predictions.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
