"""The search, once as a user starts it and then in this process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import pandas as pd
import pytest

pytest.importorskip("keras_tuner")

import rxrx1  # noqa: E402
import tune_margin  # noqa: E402

from tfrecords import build_records  # noqa: E402
from tfrecords.locks import HAS_LOCKS  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"
OPTIONS = ("--backbone", "tiny_resnet", "--batch-size", "8", "--epochs", "2", "--trials", "2", "--output", "out")


@pytest.fixture(scope="module")
def records(small_screen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "records"
    build_records(small_screen(24), folder)
    return folder


def start(name, folder, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    command = [sys.executable, str(RECIPES / name), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def tune(*arguments):
    return tune_margin.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def search(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    process = start("tune_margin.py", folder, "--records", records, *OPTIONS)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return folder, output


@pytest.mark.any_backend
def test_every_trial_stands_in_the_table_and_the_picture(search):
    folder, output = search
    trials = pd.read_csv(folder / "out" / "trials.csv")
    assert len(trials) == 2 and set(trials["status"]) == {"COMPLETED"}
    assert trials["margin"].between(0, 0.6).all() and trials["margin"].nunique() == 2
    assert (folder / "out" / "margin.png").stat().st_size > 5000
    best = json.loads((folder / "out" / "best.json").read_text())
    assert best["val_accuracy"] == pytest.approx(trials["val_accuracy"].max())
    assert "Best: val accuracy" in output


@pytest.mark.any_backend
def test_the_printed_command_gives_the_accuracy_again(search, monkeypatch):
    folder, output = search
    monkeypatch.chdir(folder)
    command = next(line for line in output.splitlines() if line.startswith("Train it: ")).split()[2:]
    assert command[:2] == ["python", "recipes/rxrx1.py"]
    accuracy = rxrx1.main([*command[2:], "--output", "again"])["splits"]["val"]["accuracy"]
    assert accuracy == pytest.approx(json.loads((folder / "out" / "best.json").read_text())["val_accuracy"], abs=1e-6)


@pytest.mark.any_backend
def test_a_finished_search_is_resumed_without_training(search, records, monkeypatch, capsys):
    folder, _ = search
    monkeypatch.chdir(folder)
    before = (folder / "out" / "trials.csv").read_text()
    tune("--records", records, *OPTIONS, "--resume")
    output = capsys.readouterr().out
    assert "Best: val accuracy" in output and "Epoch" not in output
    assert (folder / "out" / "trials.csv").read_text() == before


@pytest.mark.any_backend
def test_another_search_is_refused_by_what_differs(search, records, monkeypatch):
    monkeypatch.chdir(search[0])
    with pytest.raises(ValueError, match="holds another search: seed 0, now 3"):
        tune("--records", records, *OPTIONS, "--seed", "3", "--resume")
    with pytest.raises(ValueError, match="holds this search already: add --resume"):
        tune("--records", records, *OPTIONS)


@pytest.mark.any_backend
def test_a_search_that_has_not_begun_binds_the_folder_to_nothing(tmp_path):
    """The data were named wrongly, and now are not."""
    with pytest.raises(ValueError, match="nowhere"):
        tune("--data", tmp_path / "nowhere", *OPTIONS[:-1], tmp_path / "out")
    (tmp_path / "out" / "records.sha256").write_text("of other records")
    tune_margin.claim_output(tmp_path / "out", {"data": "here"}, resume=False)
    assert not (tmp_path / "out" / "records.sha256").exists()
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == {"data": "here"}
    (tmp_path / "out" / "trials").mkdir()
    with pytest.raises(ValueError, match="holds another search: data 'here', now 'there'"):
        tune_margin.claim_output(tmp_path / "out", {"data": "there"}, resume=False)


@pytest.mark.any_backend
def test_the_test_experiments_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        tune("--validation-split", "test")
    assert "--validation-split test: margins are chosen on val" in capsys.readouterr().err


@pytest.mark.any_backend
def test_a_step_size_without_steps_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        tune("--search", "margin", "step_size")
    assert "step_size needs steps beside it" in capsys.readouterr().err


@pytest.mark.any_backend
def test_an_error_of_the_user_is_a_message(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    process = start("tune_margin.py", tmp_path, *OPTIONS)
    errors = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert "--output out is in use, and not by a search" in errors


@pytest.mark.any_backend
def test_a_killed_search_goes_on(records, tmp_path, monkeypatch):
    process = start("tune_margin.py", tmp_path, "--records", records, *OPTIONS)
    for line in process.stdout:
        if line.startswith("Trial 1 Complete"):
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    monkeypatch.chdir(tmp_path)
    first = json.loads(Path("out/trials/trial_0/trial.json").read_text())
    tune("--records", records, *OPTIONS, "--resume")
    assert json.loads(Path("out/trials/trial_0/trial.json").read_text()) == first
    assert len(pd.read_csv("out/trials.csv")) == 2


@pytest.mark.any_backend
def test_too_many_failures_in_a_row_are_a_message_and_a_table(records, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("no memory")

    monkeypatch.setattr(tune_margin, "FAILURES", 2)
    monkeypatch.setattr(tune_margin.ScreenHyperModel, "fit", fails)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="consecutive failures.*reasons of all trials stand in trials.csv"):
        tune("--records", records, *OPTIONS, "--trials", "4")
    assert "no memory" in Path("out/trials.csv").read_text()


@pytest.mark.any_backend
def test_trials_on_other_records_are_not_compared(search, small_screen, tmp_path, monkeypatch):
    monkeypatch.chdir(search[0])
    build_records(small_screen(24), tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="holds a search on other records than"):
        tune("--records", tmp_path / "other", *OPTIONS, "--resume")


@pytest.mark.any_backend
def test_a_setting_is_confirmed_by_seeds_of_its_own_and_only_once(tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        output = Path(command[command.index("--output") + 1])
        started.append((command[command.index("--hparams") + 1], int(command[command.index("--seed") + 1])))
        output.mkdir(parents=True, exist_ok=True)
        if "--resume" in command:
            (output / "metrics.json").write_text('{"splits": {"test": {"accuracy": 0.5}}}')
        return SimpleNamespace(returncode=0)

    def confirm(margin):
        (tmp_path / "best.json").write_text(json.dumps({"settings": {"margin": margin}}))
        command = ["python", "recipes/rxrx1.py", "--hparams", str(tmp_path / "best.json"), "--seed", "3"]
        args = SimpleNamespace(output=tmp_path, seed=3, executions=2)
        tune_margin.confirm(args, command, {"margin": 0.2})
        return [(Path(hparams).stem, seed) for hparams, seed in started]

    monkeypatch.setattr(subprocess, "run", run)
    once = confirm(0.1)
    assert once == [(name, seed) for name in ("best", "default") for seed in (5, 6, 7)]  # trials had 3 and 4
    assert confirm(0.1) == once
    assert confirm(0.3)[6:] == [("best", seed) for seed in (5, 6, 7)]  # another best: none of the old scores
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(returncode=1))
    with pytest.raises(ValueError, match="A training to confirm failed"):
        confirm(0.4)


@pytest.mark.any_backend
@pytest.mark.skipif(not HAS_LOCKS, reason="the system has no locks")
def test_a_search_that_runs_is_not_gone_on_with(tmp_path):
    with tune_margin.alone(tmp_path):
        with pytest.raises(ValueError, match="is in use: another process is at work on this search"):
            tune("--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.any_backend
def test_a_worker_of_another_search_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_margin, "LONGEST_WAIT", 0)
    monkeypatch.setattr(tune_margin, "REPLACES", 0)
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker-1")
    with pytest.raises(ValueError, match="No chief has begun a search in .*out. Start it with the same --output"):
        tune("--output", tmp_path / "out")
    tune_margin.claim_output(tmp_path / "out", {"tuner": "grid"}, resume=False)
    with pytest.raises(ValueError, match="holds another search: .*tuner 'grid', now 'random'"):
        tune("--output", tmp_path / "out")


@pytest.mark.any_backend
def test_several_processes_that_are_no_workers_are_refused(monkeypatch):
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES" if keras.backend.backend() == "jax" else "WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes were started, and each would do the whole search"):
        tune()
