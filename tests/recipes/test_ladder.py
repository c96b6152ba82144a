"""The ladder on screens of four classes and 24 pixels."""

import json

import keras
import ladder
import ladder_cell
import ladder_runs
import numpy as np
import pandas as pd
import pytest
from ladder_methods import ABLATION, METHODS, method_settings, random_control
from ladder_screens import screen_records
from ladder_trials import DEVELOPMENT

from tests.recipes.tiny_ladder import SCREEN, result_of, start
from tfrecords.locks import lock_file

pytestmark = pytest.mark.usefixtures("tiny_ladder")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One folder for all tests: screens are drawn once."""
    return tmp_path_factory.mktemp("ladder")


def cell(method, seed=0):
    plan = ladder.PRESETS["quick"]
    screen = SCREEN | {"seed": plan["first_screen"]}
    return ladder_runs.make_cell(method, method_settings(method), screen, seed, plan, ["id_test", "val", "test"])


@pytest.mark.any_backend
def test_a_run_that_was_cut_goes_on_and_repeats_nothing(output, monkeypatch):
    run_cell, ran = ladder_cell.run_cell, []

    def once(one, screens):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(one["method"])
        return run_cell(one, screens)

    monkeypatch.setattr(ladder_cell, "run_cell", once)
    with pytest.raises(KeyboardInterrupt):
        start(output, "--methods", "erm", "abra", "--seeds", "1")
    assert ran == ["erm"] and not (output / "ladder.md").exists()
    files = sorted((output / "cells").iterdir())
    assert len(files) == 1 and json.loads(files[0].read_text())["cell"]["method"] == "erm"
    before = files[0].read_bytes()

    monkeypatch.setattr(
        ladder_cell, "run_cell", lambda one, screens: ran.append(one["method"]) or run_cell(one, screens)
    )
    table = start(output, "--methods", "erm", "abra", "--seeds", "1")
    assert ran == ["erm", "abra"] and files[0].read_bytes() == before
    assert list(table["method"]) == ["erm", "abra"] and np.isfinite(table["vs_erm"][1])
    start(output, "--methods", "abra", "erm", "--seeds", "1")
    assert ran == ["erm", "abra"]
    assert {"ladder.md", "ladder.csv", "test_time.csv", "cells.csv"} <= {p.name for p in output.iterdir()}
    cells = pd.read_csv(output / "cells.csv")
    assert set(cells["split"]) == {"id_test", "val", "test", "adabn", "nearest_class", "tvn"}


def test_a_cell_run_twice_gives_the_same_numbers(output):
    """The first time is that of the test before."""
    once = cell("abra")
    file = ladder_runs.cell_file(output, once)
    if not file.exists():
        start(output, "--methods", "abra", "--seeds", "1")
    first = json.loads(file.read_text())["result"]
    second = json.loads(json.dumps(ladder_cell.run_cell(once, output / "screens")))
    for result in (first, second):
        for what in ("step_seconds", "finished", "commit", "machine"):
            result.pop(what, None)
    assert first == second
    assert set(first["splits"]) == {"id_test", "val", "test"}
    assert set(first["test_time"]) == {"adabn", "nearest_class", "tvn"}
    assert 1 <= first["embedding"]["effective_rank"] <= 6 and 0 < first["embedding"]["separation"] < 1
    assert first["steps"] == 2 * first["epochs"] and 3 <= first["epochs"] <= 4  # 16 sites, batches of 8


@pytest.mark.any_backend
def test_no_image_of_test_is_read_before_training_has_ended(output, monkeypatch):
    said, read = [], ladder_cell.split_images

    class Watched(ladder_cell.Converge):
        def on_train_end(self, logs=None):
            said.append("the end")

    monkeypatch.setattr(ladder_cell, "Converge", Watched)
    monkeypatch.setattr(ladder_cell, "split_images", lambda *args: said.append(args[1]) or read(*args))
    ladder_runs.prepare_screen((output, cell("erm")["screen"], None))
    ladder_cell.run_cell(cell("erm"), output / "screens")
    before, after = said[: said.index("the end")], said[said.index("the end") :]
    assert sorted(before) == ["id_test", "val"] and "test" in after and "val" not in after


def test_with_batch_statistics_an_experiments_controls_are_embedded_with_its_treatments():
    def embed(sites, images):  # less the mean of its experiment
        return images - np.stack([images[(sites["experiment"] == e).to_numpy()].mean(0) for e in sites["experiment"]])

    names = (["a", "b", "a"], ["c", "c"], ["b", "a"], ["c"])
    values = ([1.0, 2, 3], [4, 6], [10, 20], [8])
    parts = [(pd.DataFrame({"experiment": n}), np.float64(v)[:, None]) for n, v in zip(names, values, strict=True)]
    found = ladder_cell._embed_together(embed, parts)
    np.testing.assert_allclose(found[:, 0], [-7, -4, -5, -2, 0, 4, 12, 2])  # means 8 of a, 6 of b, 6 of c


@pytest.mark.any_backend
def test_of_several_rates_the_one_that_is_best_on_the_screens_val_is_reported(tmp_path, monkeypatch):
    """Also where another would be better on test or on other screens' val; a training that diverged counts as none
    right."""
    val = {"erm": {0.01: 0.4, 0.02: 0.5, 0.005: 0.3}, "arcface": {0.01: 0.6, 0.02: 0.9, 0.005: 0.2}}

    def fake(one, screens):
        rate, method = one["settings"]["learning_rate"], one["method"].split(":")[0]
        values = {"id_test": 0.5, "val": val[method][rate] - 0.1 * one["seed"], "test": 1 - 10 * rate}
        return result_of(values, diverged=(method, rate, one["seed"]) == ("arcface", 0.02, 1))

    monkeypatch.setattr(ladder_cell, "run_cell", fake)
    monkeypatch.setattr(ladder_runs, "prepare_screen", lambda task: None)
    rates = ["--rates", "0.005", "0.01", "0.02"]
    table = start(tmp_path, "--methods", "erm", "arcface", "--seeds", "2", *rates)
    assert list(table["method"]) == ["erm", "arcface"]
    np.testing.assert_allclose(table["test"], [80, 85])
    np.testing.assert_allclose(table["vs_erm"][1], 5)
    page = (tmp_path / "ladder.md").read_text()
    assert "| erm | 25.0 (0) | 35.0 (0) | 45.0 (2) |" in page and "| arcface | 15.0 (0) | 55.0 (1) | 45.0 (1) |" in page
    for wrong in (["--rates", "0.01", "0.01"], ["--rates", "0"], ["--rates", "0.1", "--trials", "2"]):
        with pytest.raises(SystemExit):
            start(tmp_path, "--methods", "erm", *wrong)
    for method in ("erm:learning_rate=0.1", "abra:start=zero", "abra:zero_start:learning_rate=0.1"):
        with pytest.raises(ValueError, match=method):
            start(tmp_path, "--methods", method, "--rates", "0.1")


def test_screens_of_one_end_serve_no_other():
    first = sorted([DEVELOPMENT, *(plan["first_screen"] for plan in ladder.PRESETS.values())])
    assert min(np.diff(first)) >= 1000 and 0 not in first


@pytest.mark.any_backend
def test_other_screens_may_be_taken(tmp_path, capsys):
    args = ladder.parse(["--first-screen", "5000", "--seeds", "2"])
    plan = ladder.make_plan(args)
    assert args.output.name == "ladder-quick-from5000" and ladder.PRESETS["quick"]["first_screen"] == 2000
    cells = ladder.final_cells(plan, {method: {} for method in plan["methods"]})
    assert {one["screen"]["seed"] for one in cells} == {5000, 5001}
    for refused, message in ((["--first-screen", "-1"], "at least 0"), (["--first-screen", "996"], "screen 1000")):
        with pytest.raises(SystemExit):
            ladder.parse(["--preset", "full", *refused])
        assert message in capsys.readouterr().err


def test_longer_trainings_are_so_by_the_rule_of_all_methods(tmp_path):
    rule = ladder.PRESETS["quick"]["rule"]
    longer = ladder.make_plan(ladder.parse(["--longer", "3", "--output", str(tmp_path)]))["rule"]
    assert longer == rule | {name: 3 * rule[name] for name in ("patience", "least", "most")}
    assert ladder.make_plan(ladder.parse(["--output", str(tmp_path)]))["rule"] == rule
    with pytest.raises(SystemExit):
        ladder.parse(["--longer", "0"])


def test_a_screen_may_have_one_shift_alone(tmp_path):
    args = ladder.parse(["--shift", "focus", "--batch-effect", "2", "--output", str(tmp_path)])
    screen = ladder.make_plan(args)["screen"]
    assert screen["batch_effect"] == {"focus": 2.0} and ladder.PRESETS["quick"]["screen"]["batch_effect"] == 1.0
    records = screen_records(tmp_path, screen | {"seed": 0})
    assert records == screen_records(tmp_path, screen | {"seed": 0}) and "batch_effect-focus-2.0" in str(records)


def test_a_screen_may_have_other_numbers(tmp_path, capsys):
    plain, changed = (
        ladder.make_plan(ladder.parse(["--output", str(tmp_path), *more]))["screen"]
        for more in ([], ["--train-experiments", "6", "--treatments", "12"])
    )
    assert changed == plain | {"train": 6, "treatments": 12} and plain == SCREEN
    for refused in (["--treatments", "10"], ["--treatments", "0"], ["--screen", "painted", "--treatments", "8"]):
        with pytest.raises(SystemExit):
            ladder.parse(refused)
        assert "--treatments" in capsys.readouterr().err


def test_all_methods_may_share_a_normalization(tmp_path, monkeypatch):
    seen = []

    def fake(one, screens):
        seen.append(one)
        return result_of({split: 0.5 for split in one["splits"]})

    monkeypatch.setattr(ladder_cell, "run_cell", fake)
    monkeypatch.setattr(ladder_runs, "prepare_screen", lambda task: None)
    start(tmp_path, "--methods", "erm", "abra", "--seeds", "1", "--trials", "2", "--normalize", "plate")
    assert len(seen) == 6 and {one["settings"]["normalize"] for one in seen} == {"plate"}
    assert seen[0]["settings"] == method_settings("normalize_plate")
    with pytest.raises(ValueError, match="--normalize is for all methods, and normalize_experiment have their own"):
        start(tmp_path, "--methods", "erm", "normalize_experiment", "--normalize", "plate")
    plain, plates = (ladder.parse(["--preset", "full", *more]) for more in ([], ["--normalize", "plate"]))
    assert plain.output != plates.output
    methods = [set(ladder.make_plan(args)["methods"]) for args in (plain, plates)]
    assert methods[0] - methods[1] == {"normalize_experiment", "normalize_plate"}


def test_every_adversary_has_its_random_control():
    for method in ABLATION:
        if method.startswith("abra:"):
            control, own = method_settings(random_control(method)), method_settings(method)
            assert control["steps"] == 0 and "learned_scale" not in control
            assert own["steps"] > 0 or own["learned_scale"]
            differs = {name for name, value in own.items() if control.get(name) != value}
            assert differs <= {"steps", "step_size", "start", "search_loss", "adversary_every", "learned_scale"}, method
    assert random_control("abra") == "abra_random" and random_control("abra_random:shared") is None
    assert random_control("abra:zero_start") == "abra_random"


def test_penalties_between_experiments_have_the_mini_batches_of_their_control():
    own = {name: method_settings(name)["batches"] for name in METHODS}
    assert {name for name, kind in own.items() if kind == "experiments"} == {
        "erm_of_experiments", "coral", "irm", "vrex"
    }  # fmt: skip
    assert own["group_dro"] == own["dann"] == own["erm"] == "random"


def test_methods_whose_code_was_mended_are_other_trainings():
    assert {name for name in METHODS if "code" in cell(name)} == {"adv_bn", "ben", "ben_plate"}


def test_two_ladders_do_not_share_a_folder(tmp_path):
    with lock_file(tmp_path / "lock", wait=False):
        with pytest.raises(ValueError, match="in use by another ladder"):
            start(tmp_path, "--methods", "erm", "--seeds", "1")
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]


def test_a_method_may_have_a_rate_of_its_own():
    own = method_settings("arcface:learning_rate=5e-3", learning_rate=2e-3, augment="none")
    assert own == method_settings("arcface") | {"learning_rate": 0.005, "augment": "none"}
    assert random_control("abra:learning_rate=0.01") == "abra_random:learning_rate=0.01"
    assert random_control("abra:zero_start:learning_rate=1e-2") == "abra_random:learning_rate=1e-2"
    assert random_control("abra:margin=0.0:learning_rate=0.01") == "abra_random:margin=0.0:learning_rate=0.01"
    assert method_settings("abra:margin=0.0:learning_rate=0.01") == method_settings("abra:margin=0.0") | {
        "learning_rate": 0.01
    }
    for name in ("erm:learning_rate=", "erm:learning_rate=fast", "erm:margin=0.3", "ermm:learning_rate=0.1"):
        with pytest.raises(ValueError, match=f"Unknown method '{name}'"):
            method_settings(name)


def test_an_unknown_method_is_named_and_no_folder_made(tmp_path):
    with pytest.raises(ValueError, match="Unknown method 'dsuu'. Did you mean one of dsu"):
        ladder.main(["--methods", "dsuu", "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_backend_is_part_of_a_cell_and_how_groups_are_measured():
    assert cell("erm")["backend"] == keras.backend.backend()
    assert "statistics" not in cell("erm") and cell("normalize_plate")["statistics"] == "of all splits"


def test_on_digits_no_method_goes_by_the_name_of_another(tmp_path):
    arguments = ["--screen", "mnist-usps", "--data", "digits", "--preset", "full"]
    assert "gain_and_bias" not in ladder.make_plan(ladder.parse(arguments))["methods"]
    with pytest.raises(ValueError, match="augmentation of --screen mnist-usps .* gain_and_bias have their own"):
        ladder.make_plan(ladder.parse([*arguments, "--methods", "erm", "gain_and_bias"]))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "arguments, lacking, named",
    [
        (["--screen", "mnist-usps", "--data", "digits"], ["coral", "irm", "vrex", "erm_of_experiments"], "irm"),
        (["--screen", "mnist-usps", "--data", "digits"], ["normalize_plate"], "normalize_plate"),
        (["--screen", "mnist-usps", "--data", "digits"], ["abra:structure=domain"], "abra:structure=domain"),
        (["--train-experiments", "3"], ["coral", "irm", "vrex", "erm_of_experiments"], "coral"),
        (["--train-experiments", "1"], ["abra_random:structure=domain"], "abra_random:structure=domain"),
        (["--train-experiments", "4"], ["abra:structure=domain_cell_type"], "abra:structure=domain_cell_type"),
    ],
)
def test_what_cannot_be_trained_on_a_screen_is_left_out_or_refused_at_the_start(capsys, arguments, lacking, named):
    preset = "ablation" if named in ABLATION else "full"
    methods = ladder.make_plan(ladder.parse(["--preset", preset, *arguments]))["methods"]
    assert not {*lacking} & {*methods} and {"erm", "arcface", "dsu", "abra_random", "abra"} <= {*methods}
    assert f"Without {named}: it needs" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{named} needs .* on these screens"):
        ladder.make_plan(ladder.parse([*arguments, "--methods", "erm", named]))


@pytest.mark.any_backend
def test_digits_have_no_controls_to_be_standardized_by():
    with pytest.raises(ValueError, match="erm needs negative controls on each plate, and there are none"):
        ladder.make_plan(ladder.parse(["--screen", "usps-mnist", "--data", "digits", "--normalize", "plate"]))


def test_screens_of_as_many_experiments_as_are_needed_lack_nothing():
    for train, methods in ((4, ["coral"]), (2, ["abra:structure=domain"]), (5, ["abra:structure=domain_cell_type"])):
        arguments = ["--preset", "ablation", "--train-experiments", str(train), "--methods", *methods]
        assert ladder.make_plan(ladder.parse(arguments))["methods"] == methods


def test_other_real_images_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        ladder.check_same_data(tmp_path, tmp_path / "a")
    with pytest.raises(ValueError, match="has screens of the images in .*/a: name another --output"):
        ladder.check_same_data(tmp_path, tmp_path / "b")


@pytest.mark.any_backend
def test_a_folder_of_data_that_is_none_does_not_bind_the_output(tmp_path):
    with pytest.raises(ValueError, match="--data .*nope is no folder"):
        start(tmp_path / "out", "--screen", "usps-mnist", "--data", str(tmp_path / "nope"))
    assert not (tmp_path / "out" / "data.json").exists()
