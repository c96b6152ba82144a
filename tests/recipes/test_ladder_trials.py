"""Trials of the ladder's methods, on the validation experiments of a screen of their own."""

import json

import keras
import ladder_cell
import ladder_runs
import pytest
from ladder_methods import METHODS, method_settings, random_control
from ladder_trials import DEVELOPMENT, trial_settings

from tests.recipes.tiny_ladder import RULE, SCREEN, result_of, start

pytestmark = pytest.mark.usefixtures("tiny_ladder")


def test_trials_never_see_test_and_the_best_on_val_is_used(tmp_path, monkeypatch):
    seen = []

    def fake(one, screens):
        seen.append(one)
        value = one["settings"]["learning_rate"] / 0.02  # the largest rate is the best
        return result_of({split: value for split in one["splits"]})

    monkeypatch.setattr(ladder_cell, "run_cell", fake)
    monkeypatch.setattr(ladder_runs, "prepare_screen", lambda task: None)
    start(tmp_path, "--methods", "erm", "arcface", "erm", "--trials", "8", "--seeds", "2")
    trials = [one for one in seen if one["screen"]["seed"] == DEVELOPMENT]
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


def test_the_trial_that_is_best_over_several_screens_is_used(tmp_path, monkeypatch):
    seen = []

    def fake(one, screens):
        seen.append(one)
        rate, lucky = one["settings"]["learning_rate"], one["screen"]["seed"] == DEVELOPMENT
        value = 0.9 if lucky and rate == 0.02 else 0.002 / rate  # the largest on one screen, the smallest on all
        return result_of({split: value for split in one["splits"]})

    monkeypatch.setattr(ladder_cell, "run_cell", fake)
    monkeypatch.setattr(ladder_runs, "prepare_screen", lambda task: None)
    arguments = ("--methods", "erm", "--trials", "8", "--seeds", "1")
    start(tmp_path / "one", *arguments)
    assert seen[-1]["settings"]["learning_rate"] == 0.02
    seen.clear()
    start(tmp_path / "three", *arguments, "--trial-screens", "3")
    tried = [(one["screen"]["seed"], one["seed"]) for one in seen[:-1]]
    assert sorted(tried) == sorted([(DEVELOPMENT + i, i) for i in range(3)] * 8)
    assert seen[-1]["settings"]["learning_rate"] == 0.005
    tuned = ("--tuned", str(tmp_path / "three" / "tuned.json"))
    seen.clear()
    start(tmp_path / "again", *arguments, "--trial-screens", "3", *tuned)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="was chosen by other trials than this run makes"):
        start(tmp_path / "again", *arguments, *tuned)
    for more in (("--first-screen", "1002"), ("--trials", "0")):
        with pytest.raises(SystemExit):
            start(tmp_path / "again", *arguments, "--trial-screens", "3", *more)


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
    screen = SCREEN | {"seed": DEVELOPMENT}
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
    monkeypatch.setattr(ladder_runs, "prepare_screen", lambda task: None)
    start(tmp_path, "--methods", "erm", "--trials", "12", "--seeds", "1")
    assert len(seen) == len({*seen}) == 9 + 1  # three rates, three decays

    def refuses(one, screens):
        raise ValueError("received 3")

    monkeypatch.setattr(ladder_cell, "run_cell", refuses)
    with pytest.raises(ValueError, match="arcface-screen2000-seed0-.*: received 3"):
        start(tmp_path, "--methods", "arcface", "--seeds", "1")


@pytest.mark.any_backend
@pytest.mark.parametrize("arguments", [(), ("--trials", "0"), ("--trials", "8", "--rates", "0.1"), ("--trials", "8")])
def test_tuned_settings_need_trials_and_a_file(tmp_path, capsys, arguments):
    missing = arguments == ("--trials", "8")
    file = "nowhere.json" if missing else __file__
    with pytest.raises(SystemExit):
        start(tmp_path, "--methods", "erm", "--tuned", file, *arguments)
    expected = "--tuned nowhere.json is no file" if missing else "--tuned needs --trials N, as many as it was made with"
    assert expected in capsys.readouterr().err


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


def test_abra_on_another_methods_batches_is_offered_what_that_one_is():
    for under, own in (("cutmix", {"learning_rate", "weight_decay", "alpha"}), ("ben", {"learning_rate"})):
        for name in (f"abra_random:{under}", f"abra:{under}"):
            for i in range(8):
                trial, its = trial_settings(name, i), trial_settings(under, i)
                assert {key: trial[key] for key in own} == {key: its[key] for key in own}
                assert trial["radius"] == METHODS["abra"]["radius"] and trial["head"] == "abra"


def test_a_method_at_abras_compute_is_offered_what_it_is_without():
    for method in ("erm", "arcface", "dsu", "dsu:learning_rate=0.004"):
        base, *rate = method.split(":")
        more = ":".join([f"{base}_more", *rate])
        for i in range(8):
            assert trial_settings(more, i) == trial_settings(method, i) | {"compute": "abra"}


@pytest.mark.any_backend
def test_a_choice_made_on_another_backend_is_refused(tmp_path):
    tuned = {"trials": 8, "screen": SCREEN | {"seed": DEVELOPMENT}, "backend": "jax", "settings": {}}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    with pytest.raises(ValueError, match="was chosen on jax, and this run is on tensorflow"):
        start(tmp_path, "--methods", "erm", "--trials", "8", "--tuned", str(tmp_path / "tuned.json"))


def test_what_a_name_says_is_not_searched():
    for name, key, value in (
        ("cosface:learning_rate=0.004", "learning_rate", 0.004),
        ("abra:margin=0.0", "margin", 0.0),
        ("abra_random:radius=3.0", "radius", 3.0),
        ("abra_random:cutmix:learning_rate=0.004", "learning_rate", 0.004),
    ):
        trials = [trial_settings(name, i) for i in range(8)]
        assert {settings[key] for settings in trials} == {value}
        assert len({json.dumps(settings) for settings in trials}) == 8
