"""The ladder on screens of four classes and 24 pixels."""

import json

import keras
import ladder
import ladder_cell
import ladder_methods
import numpy as np
import pandas as pd
import pytest
from ladder_contenders import build_contender
from ladder_methods import ABLATION, METHODS, method_settings, random_control, trial_settings
from ladder_screens import screen_records

from keras_abra.losses import CosFace
from tfrecords.locks import lock_file

SCREEN = {"batch_effect": 1.0, "image_size": 24, "treatments": 4, "train": 4, "val": 2, "test": 2}
RULE = {"warmup": 1, "patience": 1, "smooth": 1, "least": 1, "most": 2, "decay": 0.5}
# Fewer channels than 8, and oneDNN writes past its memory in strided 1 x 1 convolutions (uxlfoundation/oneDNN 6035).
TINY = {"batch_size": 8, "width": 8, "embedding_dim": 6}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Every preset at its smallest."""
    for name, value in TINY.items():
        monkeypatch.setitem(ladder_methods.COMMON, name, value)
    for plan in ladder.PRESETS.values():
        for name, value in (("screen", SCREEN), ("rule", RULE)):
            monkeypatch.setitem(plan, name, value)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One folder for all tests: screens are drawn once."""
    return tmp_path_factory.mktemp("ladder")


def start(output, *arguments):
    return ladder.main([*arguments, "--workers", "1", "--output", str(output)])


def cell(method, seed=0):
    plan = ladder.PRESETS["quick"]
    screen = SCREEN | {"seed": plan["first_screen"]}
    return ladder.make_cell(method, method_settings(method), screen, seed, plan, ["id_test", "val", "test"])


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
    file = ladder.cell_file(output, once)
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


def result_of(accuracies, diverged=False):
    """What `run_cell` gives, for the accuracy on each split."""
    splits = {
        split: {
            "accuracy": value,
            "well_accuracy": value,
            "cell_type": {},
            "experiment": {"HUVEC-01": {"accuracy": value, "count": 1}},
        }
        for split, value in accuracies.items()
    }
    done = {"epochs": 1, "steps": 1, "step_seconds": 1.0, "step_cost": 1.0, "at_most": False}
    return done | {"diverged": diverged, "splits": splits}


def test_trials_never_see_test_and_the_best_on_val_is_used(tmp_path, monkeypatch):
    seen = []

    def fake(one, screens):
        seen.append(one)
        value = one["settings"]["learning_rate"] / 0.02  # the largest rate is the best
        return result_of({split: value for split in one["splits"]})

    monkeypatch.setattr(ladder_cell, "run_cell", fake)
    monkeypatch.setattr(ladder, "prepare_screen", lambda task: None)
    start(tmp_path, "--methods", "erm", "arcface", "erm", "--trials", "8", "--seeds", "2")
    trials = [one for one in seen if one["screen"]["seed"] == ladder.DEVELOPMENT]
    final = [one for one in seen if one not in trials]
    assert len(trials) == 16 and all(one["splits"] == ["id_test", "val"] for one in trials)
    assert [one["screen"]["seed"] for one in final] == [2000, 2000, 2001, 2001]
    assert all("test" in one["splits"] and one["settings"]["learning_rate"] == 0.02 for one in final)
    tuned = tmp_path / "tuned.json"
    assert json.loads(tuned.read_text())["settings"]["erm"]["learning_rate"] == 0.02

    seen.clear()
    start(tmp_path / "again", "--methods", "erm", "dsu", "--trials", "8", "--seeds", "1", "--tuned", str(tuned))
    assert [one["method"] for one in seen] == ["dsu"] * 8 + ["erm", "dsu"]
    assert seen[8]["settings"] == final[0]["settings"] != method_settings("erm")
    again = json.loads((tmp_path / "again/tuned.json").read_text())["settings"]
    assert list(again) == ["erm", "dsu"] and again["erm"] == final[0]["settings"]
    start(tmp_path / "again", "--methods", "erm", "--trials", "8", "--seeds", "1")
    kept = json.loads((tmp_path / "again/tuned.json").read_text())
    assert kept["settings"]["dsu"] == again["dsu"] and kept["rule"] == RULE
    assert kept["backend"] == keras.backend.backend()
    start(tmp_path / "again", "--methods", "erm", "--trials", "2", "--seeds", "1")  # chosen otherwise: not beside those
    assert list(json.loads((tmp_path / "again/tuned.json").read_text())["settings"]) == ["erm"]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda tuned: tuned.pop("settings"), (), "no tuned.json of a ladder"),
        (lambda tuned: tuned["settings"].update(erm=0.02), (), "no tuned.json of a ladder"),
        (lambda tuned: tuned.update(settings=["erm"]), (), "no tuned.json of a ladder"),
        (lambda tuned: tuned.update(rule=RULE | {"most": 9}), (), "other trials than this run makes"),
        (lambda tuned: None, ("--treatments", "8"), "other trials than this run makes"),
        (lambda tuned: tuned.update(trials=7), (), "other trials than this run makes"),
        (lambda tuned: None, ("--normalize", "plate"), "erm is another method here: it differs in normalize"),
        (lambda tuned: tuned["settings"]["erm"].pop("width"), (), "differs in width"),
        (
            lambda tuned: tuned["settings"]["erm"].update(learning_rate=0.3),
            (),
            "the settings of erm are none of its trials",
        ),
        (lambda tuned: tuned["settings"]["erm"].update(radius=1.0), (), "differs in radius"),
    ],
)
def test_settings_that_were_chosen_otherwise_are_refused(tmp_path, change, arguments, message):
    screen = SCREEN | {"seed": ladder.DEVELOPMENT}
    tuned = {"trials": 8, "screen": screen, "settings": {"erm": trial_settings("erm", 3)}}
    change(tuned)
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    with pytest.raises(ValueError, match=message):
        start(tmp_path, "--methods", "erm", "--trials", "8", "--tuned", str(tmp_path / "tuned.json"), *arguments)


@pytest.mark.any_backend
def test_a_trial_is_made_once_where_the_grid_has_no_more_and_its_error_names_it(tmp_path, monkeypatch):
    seen = []

    def fake(one, screens):
        seen.append(json.dumps(one))
        return result_of({split: 0.5 for split in one["splits"]})

    monkeypatch.setattr(ladder_cell, "run_cell", fake)
    monkeypatch.setattr(ladder, "prepare_screen", lambda task: None)
    start(tmp_path, "--methods", "erm", "--trials", "12", "--seeds", "1")
    assert len(seen) == len({*seen}) == 9 + 1  # three rates, three decays

    def refuses(one, screens):
        raise ValueError("received 3")

    monkeypatch.setattr(ladder_cell, "run_cell", refuses)
    with pytest.raises(ValueError, match="arcface-screen2000-seed0-.*: received 3"):
        start(tmp_path, "--methods", "arcface", "--seeds", "1")


def test_with_batch_statistics_an_experiments_controls_are_embedded_with_its_treatments():
    def embed(sites, images):  # less the mean of its experiment
        return images - np.stack([images[(sites["experiment"] == e).to_numpy()].mean(0) for e in sites["experiment"]])

    names = (["a", "b", "a"], ["c", "c"], ["b", "a"], ["c"])
    values = ([1.0, 2, 3], [4, 6], [10, 20], [8])
    parts = [(pd.DataFrame({"experiment": n}), np.float64(v)[:, None]) for n, v in zip(names, values, strict=True)]
    found = ladder_cell._embed_together(embed, parts)
    np.testing.assert_allclose(found[:, 0], [-7, -4, -5, -2, 0, 4, 12, 2])  # means 8 of a, 6 of b, 6 of c


@pytest.mark.any_backend
@pytest.mark.parametrize("arguments", [(), ("--trials", "0"), ("--trials", "8", "--rates", "0.1"), ("--trials", "8")])
def test_tuned_settings_need_trials_and_a_file(tmp_path, capsys, arguments):
    file = "nowhere.json" if arguments == ("--trials", "8") else __file__
    with pytest.raises(SystemExit):
        start(tmp_path, "--methods", "erm", "--tuned", file, *arguments)
    assert "--tuned takes a file" in capsys.readouterr().err


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
    monkeypatch.setattr(ladder, "prepare_screen", lambda task: None)
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
    first = sorted([ladder.DEVELOPMENT, *(plan["first_screen"] for plan in ladder.PRESETS.values())])
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


def test_every_method_has_as_many_trials_each_another_and_first_its_own():
    for method in METHODS:
        trials = [trial_settings(method, i) for i in range(8)]
        assert trials[0] == method_settings(method)
        assert len({json.dumps(t, sort_keys=True) for t in trials}) == 8
        assert {t["head"] for t in trials} == {trials[0]["head"]}


def test_an_adversary_is_offered_the_settings_of_its_random_control():
    for method in ("abra", "abra:zero_start", "abra:radius=0.5", "abra:norms=auxiliary:learning_rate=0.01"):
        control, differs = random_control(method), {"steps", "start"}
        for i in range(10):
            own, its = ({k: v for k, v in trial_settings(m, i).items() if k not in differs} for m in (method, control))
            assert own == its


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
    monkeypatch.setattr(ladder, "prepare_screen", lambda task: None)
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


SEARCHES = ["shared", "part", "zero_start", "adversary_every=4", "search_loss=softmax", "ramp_radius", "learned_scale"]
SEARCHES += [
    "shared+domain_cell_type+radius=1",
    "domain_cell_type+radius=1+zero_start",
    "norms=auxiliary",
    "norms=moving",
    "ben",
]
SEARCHES += ["norms=clean+shared+domain_cell_type+radius=1"]


@pytest.mark.parametrize("method", [*METHODS, "abra:structure=domain_cell_type", *(f"abra:{s}" for s in SEARCHES)])
def test_every_contender_is_built_and_answers(method):
    contender = build_contender(method_settings(method), (24, 24, 6), 4, ["HUVEC", "HUVEC", "RPE"], 2)
    logits, embedding = contender.network(np.zeros((2, 24, 24, 6), "float32"))
    assert tuple(logits.shape) == (2, 4) and tuple(embedding.shape) == (2, 6)
    assert (contender.cost is None) == (method in ("csu", "adv_bn"))
    assert (contender.cost or 1) == pytest.approx(1) or method.startswith("abra")
    trained = {id(v) for v in contender.model.trainable_variables}
    assert {id(v) for v in contender.network.trainable_variables} <= trained  # what is scored is what is trained


@pytest.mark.parametrize(
    "method, kind, after",
    [
        ("dsu", "FeatureStatisticsUncertainty", ["stem", "stage1", "stage2", "stage3"]),
        ("dsu_softmax", "FeatureStatisticsUncertainty", ["stem", "stage1", "stage2", "stage3"]),
        ("mixstyle", "MixStyle", ["stem", "stage1", "stage2"]),
        ("csu", "CorrelatedStyleUncertainty", ["stem", "stage1", "stage2", "stage3"]),
        ("adv_style", "AdvStyle", ["stem", "stage1", "stage2", "stage3"]),
    ],
)
def test_layers_stand_behind_the_stages_they_are_meant_for(method, kind, after):
    network = build_contender(method_settings(method), (24, 24, 6), 4, ["RPE"], 2).network
    flat = [*layers_of(network)]
    found = [before.name for before, layer in zip(flat, flat[1:], strict=False) if type(layer).__name__ == kind]
    assert found == after
    plain = build_contender(method_settings("erm"), (24, 24, 6), 4, ["RPE"], 2).network
    assert not any(type(layer).__name__ == kind for layer in layers_of(plain))


def layers_of(model):
    """In the order in which they are called, those of sub-models in the place of these; without inputs."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


def test_the_adversary_of_adv_style_and_the_discriminator_do_not_decay():
    for method, name in (("adv_style", "spread_change"), ("dann", "discriminator")):
        model = build_contender(method_settings(method), (24, 24, 6), 4, ["RPE", "RPE"], 2).model
        decays = [v.path for v in model.trainable_variables if model.optimizer._use_weight_decay(v)]
        assert any(name in v.path for v in model.trainable_variables) and decays
        assert not [path for path in decays if name in path]


def test_penalties_between_experiments_have_the_mini_batches_of_their_control():
    own = {name: method_settings(name)["batches"] for name in METHODS}
    assert {name for name, kind in own.items() if kind == "experiments"} == {
        "erm_of_experiments", "coral", "irm", "vrex"
    }  # fmt: skip
    assert own["group_dro"] == own["dann"] == own["erm"] == "random"


def test_abra_takes_the_margin_of_cosface():
    contender = build_contender(method_settings("abra_random:loss=cosface"), (24, 24, 6), 4, ["RPE"], 2)
    loss = contender.model.loss_function
    assert (type(loss), loss.margin, loss.scale) == (CosFace, 0.1, 12.0)


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
    with pytest.raises(ValueError, match="Unknown method 'dsuu'. Expected some of erm, arcface"):
        ladder.main(["--methods", "dsuu", "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_backend_is_part_of_a_cell_and_how_groups_are_measured():
    assert cell("erm")["backend"] == keras.backend.backend()
    assert "statistics" not in cell("erm") and cell("normalize_plate")["statistics"] == "of all splits"


def test_what_a_name_says_is_not_searched():
    for name, key, value in (
        ("cosface:learning_rate=0.004", "learning_rate", 0.004),
        ("abra:margin=0.0", "margin", 0.0),
        ("abra_random:radius=3.0", "radius", 3.0),
    ):
        trials = [trial_settings(name, i) for i in range(8)]
        assert {settings[key] for settings in trials} == {value}
        assert len({json.dumps(settings) for settings in trials}) == 8


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
