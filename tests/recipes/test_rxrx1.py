"""The main job, now and then as a user starts it: another process, another working directory."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import rxrx1
import rxrx1_wilds
from hparams import EMBEDDED, REAL, read_hparams
from job import find_sites
from methods import build_model, check_backbone, make_backbone
from output_folder import at_work, make_output

from keras_abra import ResumableRun
from tfrecords import build_records, channel_statistics, class_names, read_records, verify_records
from tfrecords.locks import HAS_LOCKS

RECIPE = Path(__file__).parents[2] / "recipes" / "rxrx1.py"


def start(folder, *arguments):
    """As a user does."""
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    command = [sys.executable, str(RECIPE), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def job(*arguments):
    """In this process."""
    return rxrx1.main([*map(str, arguments), "--distribution", "none"])


@pytest.fixture(scope="session")
def screen(small_screen):
    return small_screen(24)


SPLITS = ("train", "id_test", "val", "test")
OPTIONS = ("--backbone", "tiny_resnet", "--image-size", 24, "--batch-size", 8, "--epochs", 2)


@pytest.mark.parametrize(
    "method",
    ["abra", "erm", *(pytest.param(m, marks=pytest.mark.any_backend) for m in ("dsu", "cutmix", "abra --cutmix"))],
)
def test_it_trains_scores_and_saves(method, screen, tmp_path, monkeypatch, capsys):
    arguments = ("--data", screen, "--method", *method.split(), *OPTIONS)
    if method == "abra":
        process = start(tmp_path, *arguments)
        said, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
    else:
        monkeypatch.chdir(tmp_path)
        job(*arguments)
        said = capsys.readouterr().out
    assert ("--normalize plate helped most" in said) == method.startswith("abra")
    output = tmp_path / "runs" / "rxrx1-0001"
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["method"], metrics["backend"], metrics["seed"]) == (method.split()[0], keras.backend.backend(), 0)
    assert metrics["options"]["cutmix"] == ("--cutmix" in method)
    assert set(metrics["splits"]) == {"id_test", "val", "test"} and len(metrics["classes"]) == 8
    predictions, wells, classes = (pd.read_csv(output / f"{name}.csv") for name in ("predictions", "wells", "classes"))
    for name, split in metrics["splits"].items():
        rows = predictions[predictions.split == name]
        assert split["count"] == len(rows) == sum(part["count"] for part in split["cell_type"].values())
        assert split["accuracy"] == pytest.approx((rows.predicted_1 == rows.sirna).mean())
        rows = wells[wells.split == name]
        assert split["well_accuracy"] == pytest.approx((rows.predicted_1 == rows.sirna).mean())
        assert classes[classes.split == name]["sites"].sum() == split["count"] == rows["sites"].sum()
    assert len(pd.read_csv(output / "history.csv")) == 2
    assert "Accuracy (%) of" in said and "test" in said
    model = keras.models.load_model(output / "model.keras")
    assert model.predict(np.zeros((1, 24, 24, 6), "float32"), verbose=0).shape == (1, 8)
    assert sorted(p.name for p in output.iterdir()) == [
        "classes.csv", "history.csv", "metrics.json", "model.keras", "predictions.csv", "records", "wells.csv",
    ]  # fmt: skip


@pytest.mark.any_backend
def test_images_may_be_standardized_by_the_controls_of_their_plate(screen, tmp_path, monkeypatch):
    """The model of the job sees in every split what `channel_statistics` gives of all sites of its experiments."""
    fed = []
    monkeypatch.setattr(rxrx1, "fit", lambda model, read_train, *rest: fed.append((read_train(), rest[2])))
    arguments = ("--data", screen, "--records", tmp_path / "records", "--method", "erm", *OPTIONS)
    assert job(*arguments, "--output", tmp_path / "image")["normalize"] == "image"
    assert job(*arguments, "--normalize", "plate", "--output", tmp_path / "plate")["normalize"] == "plate"
    (alone, _), (train, val) = fed
    parts = {"train": ["train", "id_test"], "id_test": ["train", "id_test"], "val": "val", "test": "test"}
    controls = {
        s: channel_statistics(tmp_path / "records", part, group="plate", well_types="negative_control")
        for s, part in parts.items()
    }
    assert (controls["train"]["sites"] == 2).all()  # both sites of the one well
    pd.testing.assert_frame_equal(val["normalize"], controls["val"])
    expected = read_records(
        tmp_path / "records", "train", batch_size=8, training=True, seed=0, normalize=controls["train"]
    )
    images, expected, others = (next(data.as_numpy_iterator())[0] for data in (train, expected, alone))
    np.testing.assert_array_equal(images, expected)
    assert np.abs(images - others).max() > 0.1
    model = keras.models.load_model(tmp_path / "plate" / "model.keras")
    for split in SPLITS[1:]:
        data = read_records(tmp_path / "records", split, batch_size=8, normalize=controls[split])
        predicted = pd.read_csv(tmp_path / "plate" / "predictions.csv").query("split == @split")["predicted_1"]
        names = class_names(tmp_path / "records", ("treatment",))
        answers = model.predict(data.map(lambda image, label: image), verbose=0).argmax(1)
        assert [names[i] for i in answers] == list(predicted)


@pytest.mark.any_backend
def test_a_normalization_that_cannot_be_is_named(screen, tmp_path):
    table = pd.read_csv(screen / "metadata.csv")
    shutil.copytree(screen, tmp_path / "screen")
    table[table["well_type"] != "negative_control"].to_csv(tmp_path / "screen" / "metadata.csv", index=False)
    arguments = ("--data", tmp_path / "screen", "--method", "erm", *OPTIONS)
    with pytest.raises(ValueError, match="'train' has no wells of the types"):
        job(*arguments, "--normalize", "plate", "--output", tmp_path / "out")
    lacking = (table["well_type"] == "negative_control") & (table["experiment"] == "RPE-03") & (table["plate"] == 2)
    assert lacking.any()
    table[~lacking].to_csv(tmp_path / "screen" / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="'test' cannot be standardized by plate: .*RPE-03, plate 2.*--normalize"):
        job(*arguments, "--normalize", "plate", "--output", tmp_path / "lacking")
    assert not (tmp_path / "lacking" / "history.csv").exists()  # before anything is trained
    hparams = tmp_path / "hparams.json"
    hparams.write_text(json.dumps({"settings": {"normalize": "well"}}))
    with pytest.raises(ValueError, match="normalize must be one of image, experiment, plate; found 'well'"):
        job(*arguments, "--hparams", hparams, "--output", tmp_path / "well")
    assert not (tmp_path / "well").exists()  # before anything is built


@pytest.mark.any_backend
def test_records_are_kept_and_used_again(screen, tmp_path):
    records = tmp_path / "records"
    build_records(screen, records)
    job("--records", records, "--method", "arcface", *OPTIONS, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").is_file() and not (tmp_path / "out" / "records").exists()


@pytest.mark.any_backend
def test_an_error_of_the_user_is_a_message(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    process = start(tmp_path, "--output", tmp_path / "out")
    errors = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert "is in use: expected a new or empty folder" in errors
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.any_backend
def test_records_of_other_options_are_refused_and_of_large_images_pointed_out(screen, tmp_path, capsys):
    records = tmp_path / "records"
    build_records(screen, records)
    for flag, value in (("--label", "cell_type"), ("--image-size", 16)):
        with pytest.raises(ValueError, match=f"{flag} {value}: the records in"):
            job("--records", records, flag, value, "--output", tmp_path / f"out{flag}")
        assert not (tmp_path / f"out{flag}").exists()  # where nothing was written, none is left to be "in use"
    arguments = rxrx1.parse(["--records", str(records)])
    for size, warned in ((11, True), (12, False), (None, False)):
        assert rxrx1.prepare_records(arguments, {"image_size": size}, tmp_path) == records
        assert ("have 24 pixels; the settings are made for 11." in capsys.readouterr().out) == warned


@pytest.mark.any_backend
def test_kaggle_sites_without_a_label_are_predicted_and_not_scored(screen, tmp_path):
    """Kaggle's test.csv has no siRNAs: two of its experiments are val and test here."""
    table = pd.read_csv(screen / "metadata.csv").drop_duplicates("well_id").rename(columns={"well_id": "id_code"})
    table["sirna"] = table["sirna_id"]
    names = {"HUVEC-02": "HUVEC-17", "RPE-02": "RPE-08"}  # of val, as RxRx1 has it
    table["id_code"] = table["id_code"].replace(names, regex=True)
    data = tmp_path / "kaggle"
    for dataset, rows in table.groupby(table["dataset"].where(table["dataset"] == "train", "test")):
        rows = rows.assign(experiment=rows["experiment"].replace(names))
        columns = ["id_code", "experiment", "plate", "well", "sirna"]
        treatment = rows["well_type"] == "treatment"
        rows.loc[treatment, columns[: 5 if dataset == "train" else 4]].to_csv(
            data_file(data, f"{dataset}.csv"), index=False
        )
        rows.loc[~treatment, [*columns, "well_type"]].to_csv(data_file(data, f"{dataset}_controls.csv"), index=False)
        for old in set(table.loc[rows.index, "experiment"]):
            shutil.copytree(screen / "images" / old, data / dataset / names.get(old, old))
    job("--data", data, "--output", tmp_path / "out", "--method", "arcface", *OPTIONS)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert set(metrics["splits"]) == {"id_test"} and set(predictions["split"]) == {"id_test", "val", "test"}


@pytest.mark.any_backend
def test_sites_without_a_label_are_left_out_of_training_choice_and_scores(screen, tmp_path, capsys):
    shutil.copytree(screen, tmp_path / "screen")
    table = pd.read_csv(tmp_path / "screen" / "metadata.csv", dtype=str, keep_default_na=False)
    wells = [rows["well_id"].iloc[0] for _, rows in table[table["well_type"] == "treatment"].groupby("dataset")]
    table.loc[table["well_id"].isin(wells), ["sirna", "sirna_id"]] = ""
    table.to_csv(tmp_path / "screen" / "metadata.csv", index=False)
    job("--data", tmp_path / "screen", "--output", tmp_path / "out", "--method", "erm", *OPTIONS)
    said = capsys.readouterr().out
    assert "Not trained on: 1 of 16 sites of train, which have no label" in said
    assert "Predicted, not scored: 2 of 32 sites of val, which have no label" in said
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert {name: (split["count"], (predictions["split"] == name).sum()) for name, split in scores.items()} == {
        "id_test": (15, 16), "val": (30, 32), "test": (30, 32)
    }  # fmt: skip
    assert "val_accuracy" in pd.read_csv(tmp_path / "out" / "history.csv")


def data_file(folder, name):
    folder.mkdir(exist_ok=True)
    return folder / name


@pytest.mark.any_backend
def test_real_files_go_through_the_same_code(rxrx1_sample, tmp_path, capsys):
    data, records, output = (tmp_path / name for name in ("rxrx1", "records", "out"))
    shutil.copytree(rxrx1_sample / "kaggle-2019", data)
    shutil.copytree(rxrx1_sample / "rxrx1-images", data, dirs_exist_ok=True)
    options = ("--backbone", "tiny_resnet", "--image-size", 64, "--batch-size", 4, "--epochs", 2)
    job("--data", data, "--records", records, "--output", output, "--label", "cell_type", *options)
    assert "missing channels" in "".join(capsys.readouterr())
    assert verify_records(records) == []
    history = pd.read_csv(output / "history.csv")
    assert len(history) == 2 and np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("method", ["arcface", pytest.param("erm", marks=pytest.mark.any_backend)])
def test_a_loss_that_is_not_finite_names_the_sites(method, screen, tmp_path, monkeypatch):
    monkeypatch.setitem(REAL, "learning_rate", float("nan"))
    with pytest.raises(SystemExit, match="became nan in epoch 0, step 1 .*\n.*Sites of that step: (HUVEC|RPE)-01_"):
        job("--data", screen, "--method", method, "--output", tmp_path / "out", *OPTIONS)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_loss_that_is_not_finite_may_be_left_out(screen, tmp_path, monkeypatch):
    monkeypatch.setitem(REAL, "radius", 1e38)
    arguments = (
        "--data",
        screen,
        "--output",
        tmp_path / "out",
        "--on-nan",
        "skip",
        "--perturb-after",
        "stem",
        *OPTIONS,
    )
    with pytest.raises(ValueError, match="--on-nan skip is for the methods of ABRAModel"):
        job(*arguments, "--method", "erm")
    with pytest.warns(UserWarning, match="step was left out. Sites of that step: (HUVEC|RPE)-01_"):
        with contextlib.suppress(SystemExit):
            job(*arguments)


@pytest.mark.any_backend
def test_a_job_that_is_told_to_leave_goes_on_with_resume(screen, tmp_path, capsys):
    whole, output = tmp_path / "whole", tmp_path / "out"
    arguments = ("--data", screen, "--records", tmp_path / "records", "--method", "arcface", *OPTIONS)
    arguments = (*arguments, "--epochs", 8)  # of two steps each: some are left when it is told
    job(*arguments, "--output", whole)
    process = start(tmp_path, *arguments, "--output", output, "--resume")
    while process.poll() is None and not any((output / "checkpoints").glob("0*")):
        time.sleep(0.02)
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode == 75 and "SIGTERM: left in epoch" in errors and "--resume the job goes on" in errors
    assert not (output / "metrics.json").exists()
    capsys.readouterr()
    job(*arguments, "--output", output, "--resume")
    assert "Goes on in epoch" in capsys.readouterr().out
    for name in ("history.csv", "metrics.json", "predictions.csv"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in whole.iterdir())


@pytest.mark.parametrize("asked", [True, False])
def test_a_job_whose_processes_are_gone_after_the_signal_is_to_be_tried_again(asked, screen, tmp_path, monkeypatch):
    def gone(self, batch, logs=None):
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(ResumableRun, "on_train_batch_begin", gone)
    with pytest.raises(SystemExit if asked else RuntimeError, match="75" if asked else "closed by peer"):
        job("--data", screen, "--output", tmp_path / "out", *OPTIONS)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_that_ended_has_nothing_to_resume(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text('{"method": "abra"}')
    assert rxrx1.main(["--output", str(tmp_path), "--resume"]) == {"method": "abra"}
    assert "there is nothing to resume" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another job, which ended: method 'abra', now 'erm'"):
        rxrx1.main(["--output", str(tmp_path), "--resume", "--method", "erm"])
    with pytest.raises(ValueError, match="--resume needs --output"):
        rxrx1.main(["--resume"])


@pytest.mark.any_backend
def test_a_finished_job_of_other_options_is_none_to_resume(tmp_path):
    options = {"method": "erm", "mixed_precision": None, "on_nan": "stop", **EMBEDDED}
    (tmp_path / "metrics.json").write_text(json.dumps({"recipe": "rxrx1", "method": "erm", "options": options}))
    same = ["--output", str(tmp_path), "--resume", "--method", "erm"]
    assert rxrx1.main(same)["recipe"] == "rxrx1"
    for more, message in {
        ("--epochs", "900"): "epochs 45, now 900",
        ("--normalize", "image"): "normalize 'plate', now 'image'",
        ("--mixed-precision",): "mixed_precision None, now 'float16'",
    }.items():
        with pytest.raises(ValueError, match=f"holds another job, which ended: {message}"):
            rxrx1.main([*same, *more])
    with pytest.raises(ValueError, match="recipe 'rxrx1', now 'rxrx1_wilds'"):
        rxrx1_wilds.main(same)


@pytest.mark.any_backend
def test_a_finished_job_on_other_data_is_none_to_resume(tmp_path):
    options = {"data": str((tmp_path / "a").resolve()), "records": None, "label": None}
    (tmp_path / "metrics.json").write_text(json.dumps({"recipe": "rxrx1", "options": options}))
    same = ["--output", str(tmp_path), "--resume", "--data", str(tmp_path / "a")]
    assert rxrx1.main(same)["recipe"] == "rxrx1"
    for more, message in {
        ("--data", str(tmp_path / "b")): "data '.*a', now '.*b'",
        ("--label", "cell_type"): "label None, now 'cell_type'",
    }.items():
        with pytest.raises(ValueError, match=f"holds another job, which ended: {message}"):
            rxrx1.main([*same, *more])


@pytest.mark.any_backend
def test_an_adversary_follows_the_covariance_unless_told_otherwise():
    def structure(**settings):
        model = build_model("abra", EMBEDDED | settings, (24, 24, 6), ["a", "b"])
        return [stage.structure for stage in model.stages]

    assert structure() == ["diagonal"] * 2 and structure(steps=1) == ["low_rank"] * 2
    assert structure(steps=1, structure="diagonal") == ["diagonal"] * 2
    assert structure(structure="low_rank") == ["low_rank"] * 2


@pytest.mark.any_backend
@pytest.mark.parametrize("recipe", [rxrx1, rxrx1_wilds])
def test_options_of_other_methods_are_refused(recipe, tmp_path):
    arguments = ["--backbone", "tiny_resnet", "--output", str(tmp_path / "out"), "--distribution", "none"]
    with pytest.raises(ValueError, match="--steps 1 is of --method abra: dsu has no adversary"):
        recipe.main([*arguments, "--method", "dsu", "--steps", "1"])
    with pytest.raises(ValueError, match="--structure low_rank is of --method abra; received --method arcface"):
        recipe.main([*arguments, "--method", "arcface", "--structure", "low_rank"])
    with pytest.raises(ValueError, match="--cutmix is for abra, dsu and arcface: plain .* is --method cutmix"):
        rxrx1.main([*arguments, "--method", "erm", "--cutmix"])
    with pytest.raises(ValueError, match="--perturb-after is of --method abra and dsu: erm perturbs nothing"):
        recipe.main([*arguments, "--method", "erm", "--perturb-after", "stem"])
    assert not (tmp_path / "out").exists()


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": "32"}, "batch_size must be a whole number; found '32'"),
        ({"epochs": 0}, "epochs must be a whole number; found 0"),
        ({"margin": True}, "margin must be a number; found True"),
        ({"alignment": 1}, "alignment must be a text; found 1"),
        ({"cutmix_alpha": "1"}, "cutmix_alpha must be a number; found '1'"),
        ({"stages": "stem"}, "stages must be a list of names of layers; found 'stem'"),
        ({"marginn": 0.1}, "unknown settings marginn"),
        ({"margin": float("nan")}, "`margin` is an angle in radians"),
        ({"alignment": "foo"}, "Unknown kind of alignment|`kind` must be one of"),
        ({"structure": "x"}, "`structure` must be one of"),
        ({"steps": -2}, "`steps` must be an integer of at least 0"),
        ({"normalize": "well"}, "normalize must be one of image, experiment, plate; found 'well'"),
        ({"learning_rate": -1}, "learning_rate must be above 0; found -1"),
        ({"cutmix_alpha": 0.0}, "cutmix_alpha must be above 0; found 0.0"),
        ({"warmup_steps": 500.0}, r"warmup_steps must be a whole number of steps, or a share .* found 500.0"),
        ({"warmup": 1.5}, r"warmup must be a whole number of steps, or a share of all in \[0, 1\); found 1.5"),
    ],
)
def test_settings_of_a_file_are_checked(tmp_path, settings, message):
    file = tmp_path / "best.json"
    file.write_text(json.dumps({"settings": REAL | {"patience": 3, "stages": ["stem"], "margin": 0}}))
    assert read_hparams(file, dict(EMBEDDED))["patience"] == 3
    file.write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match=f"--hparams .*best.json: .*({message})"):
        read_hparams(file, dict(EMBEDDED))


@pytest.mark.any_backend
def test_a_mistyped_folder_of_records_is_not_filled_with_the_embedded_screen(tmp_path):
    with pytest.raises(ValueError, match="my_scren holds no finished records. Name the --data"):
        job("--records", tmp_path / "my_scren", "--output", tmp_path / "out")
    assert not any(tmp_path.iterdir())
    args = rxrx1.parse(["--data", "embedded", "--records", str(tmp_path / "new")])
    rxrx1.check_data(args)
    assert args.data is None and rxrx1.is_embedded(args)


@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["resnet50", "imagenet_utils", "no_such_network"])
def test_a_backbone_that_is_none_is_refused_at_once(name, screen, tmp_path):
    with pytest.raises(ValueError, match=f"--backbone {name} is neither tiny_resnet nor a model of keras.applications"):
        job("--data", screen, "--method", "erm", "--backbone", name, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.any_backend
def test_a_split_whose_files_are_gone_is_no_split_that_was_never_built(screen, tmp_path, capsys):
    build_records(screen, tmp_path / "records")
    next((tmp_path / "records" / "val").iterdir()).unlink()
    with pytest.raises(ValueError, match="is missing. Run `python -m tfrecords.verify"):
        find_sites(tmp_path / "records", "val", ("treatment", "control"))
    table = pd.read_csv(screen / "metadata.csv")
    shutil.copytree(screen, tmp_path / "screen")
    table[table["dataset"] != "val"].to_csv(tmp_path / "screen" / "metadata.csv", index=False)
    build_records(tmp_path / "screen", tmp_path / "without")
    assert find_sites(tmp_path / "without", "val", ("treatment",)) is None
    assert "no sites of the split val (of treatment)" in capsys.readouterr().out


@pytest.mark.any_backend
def test_what_was_built_before_a_refusal_is_gone_on_with(screen, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ("--data", screen, "--method", "erm", "--output", output, *OPTIONS)
    with pytest.raises(ValueError, match="batch_size"):
        job(*arguments, "--batch-size", 5000)
    assert f"In {output} stay records: the same command with --output {output} goes on." in capsys.readouterr().err
    with pytest.raises(ValueError, match="are of another screen than the embedded one. Repeat --data, or name them by"):
        job(*arguments[2:])
    job(*arguments)
    assert "already holds these records: nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is in use: expected a new or empty folder. Choose another, or remove it."):
        job(*arguments)


@pytest.mark.any_backend
@pytest.mark.skipif(not HAS_LOCKS, reason="the system has no locks")
def test_of_two_jobs_in_one_folder_the_second_is_refused(tmp_path):
    output = make_output(tmp_path / "out", "rxrx1")
    with at_work(output):
        for resume in (False, True):
            with pytest.raises(ValueError, match="out is in use: another process is at work there. Wait for its end"):
                make_output(tmp_path / "out", "rxrx1", resume)
    with at_work(make_output(tmp_path / "out", "rxrx1", True)):
        pass


@pytest.mark.any_backend
def test_a_job_told_to_leave_before_it_trains_is_to_be_tried_again(tmp_path):
    process = start(tmp_path, "--output", tmp_path / "out", "--epochs", 1)
    while process.poll() is None and not (tmp_path / "out" / "screen").is_dir():
        time.sleep(0.02)
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode == 75 and f"SIGTERM: with --output {tmp_path / 'out'} --resume the job goes" in errors
    assert not any((tmp_path / "out").glob("*.json"))


@pytest.mark.any_backend
def test_records_of_another_screen_are_not_taken_for_the_embedded_one(screen, tmp_path):
    build_records(screen, tmp_path / "records")
    with pytest.raises(ValueError, match="--data embedded: the records in .* are of another screen. Leave --data out"):
        job("--data", "embedded", "--records", tmp_path / "records", "--output", tmp_path / "out")


@pytest.mark.any_backend
def test_stages_of_a_file_are_where_abra_perturbs(tmp_path, monkeypatch):
    def check(name, method, stages):
        raise KeyError(stages)

    monkeypatch.setattr(rxrx1, "check_backbone", check)
    file = tmp_path / "best.json"
    for stages, method, expected in ([], "abra", []), (["stage1"], "abra", ["stage1"]), (["stage1"], "dsu", None):
        file.write_text(json.dumps({"settings": {"stages": stages}}))
        with pytest.raises(KeyError) as asked:
            job("--hparams", file, "--method", method)
        assert asked.value.args == (expected,)
    model = build_model("abra", EMBEDDED | {"stages": []}, (24, 24, 6), ["a", "b"])
    assert not model.stages


@pytest.mark.any_backend
def test_backbones_are_given_standardized_images_as_they_are():
    rescaling = keras.layers.Rescaling | keras.layers.Normalization
    for name in ("EfficientNetV2B0", "MobileNetV3Small"):
        assert not any(isinstance(layer, rescaling) for layer in make_backbone(name, (64, 64, 3)).layers)
    with pytest.raises(ValueError, match="--backbone EfficientNetB0 rescales grey levels inside"):
        check_backbone("EfficientNetB0", "erm", None)
