import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

keras_tuner = pytest.importorskip("keras_tuner")

from keras_abra.losses import CosFace  # noqa: E402
from keras_abra.tuning import ABRAHyperModel, DurableSearch, repair_project  # noqa: E402
from tests.processes import PATIENCE, free_port  # noqa: E402
from tests.replicas import two_replicas  # noqa: E402
from tests.tiny import CLASSES, smooth_backbone, tiny_backbone, tiny_batch  # noqa: E402

STAGES = [["stem"], ["stem", "stage1"]]


def hypermodel(**kwargs):
    defaults = {
        "search": {"margin": (0.0, 0.5), "scale": [4.0, 8.0]},
        "embedding_dim": 6,
        "seed": 5,
        "compile_arguments": {"metrics": ["accuracy"], "run_eagerly": True},
    }
    return ABRAHyperModel(lambda: tiny_backbone(dropout=0.0), CLASSES, STAGES, **{**defaults, **kwargs})


def declared(model, **values):
    """What a tuner finds in `build` with these choices: `(settings, names that are searched in them)`."""
    hp = keras_tuner.HyperParameters()
    hp.values.update(values)
    settings = model.settings(hp)
    return settings, {p.name for p in hp.space if hp.is_active(p)}


# The spaces.


def test_everything_is_searched_by_default_from_the_package_defaults():
    settings, names = declared(hypermodel(search=None))
    assert names == set(settings)
    assert settings == {
        "margin": 0.5,
        "scale": 30.0,
        "warmup": 0.1,
        "stages": "stem",
        "radius": 0.15,
        "steps": 0,
        "alignment": "symmetric_kl",
        "alignment_weight": 1.0,
        "learning_rate": 1e-3,
        "weight_decay": 1e-5,
    }


def test_what_a_choice_makes_meaningless_is_not_searched():
    model = hypermodel(search=None)
    model.stages["none"] = []
    adversary = {"radius", "steps", "step_size", "alignment", "alignment_weight"}
    settings, names = declared(model, stages="none")
    assert not adversary & names and not adversary & settings.keys()
    settings, names = declared(model, steps=0, alignment="none")
    assert not {"step_size", "alignment_weight"} & names and {"radius", "steps", "alignment"} <= names


def test_fixed_and_left_out():
    model = hypermodel(search=["margin", "step_size"], fixed={"steps": 3, "radius": 0.2})
    settings, names = declared(model)
    assert names == {"margin", "step_size"}
    assert (settings["steps"], settings["radius"], settings["scale"]) == (3, 0.2, 30.0)
    assert declared(hypermodel(search=["margin", "step_size"], fixed={"steps": 0}))[1] == {"margin"}


def test_the_default_lies_in_a_space_of_ones_own():
    settings, _ = declared(hypermodel(search={"margin": (0.0, 0.3), "scale": [4.0, 8.0], "steps": [3]}))
    assert (settings["margin"], settings["scale"], settings["steps"]) == (0.3, 4.0, 3)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"search": ["marginn"]}, "Unknown hyperparameters: marginn. Expected some of margin, scale"),
        ({"search": ["margin"], "fixed": {"margin": 0.1}}, "both name margin"),
        ({"search": {"margin": (0.5, 0.1)}}, "space of 'margin' must be .low, high. with low < high.*Received: .0.5"),
        ({"search": {"steps": (0, 3)}}, "space of 'steps' must be a list of choices"),
        ({"uncertainty": {"radius": 1.0}}, "`uncertainty` names radius: give that in `search`"),
        ({"uncertainty": {"start": "one"}}, "`start` must be one of"),
        ({"uncertainty": {"start": "zero"}, "search": ["steps"]}, "refused with steps=0 .* needs an ascent step"),
        ({"uncertainty": {"learned_scale": True}, "search": ["steps"]}, "refused with steps=1 .*needs steps=0"),
        ({"loss": "cosface"}, "`loss` must be a class, ArcFace or CosFace"),
        ({"alignment": {"weight": 2.0}}, "`alignment` names weight: give `alignment`, `alignment_weight` in `search`"),
        ({"alignment": {"two_sided": 1}}, "`two_sided` must be True or False"),
        ({"warmup": 0.2}, "warmup: give `stages` and `warmup` in `search`"),
        ({"perturb_after": ["stem"]}, "perturb_after: give `stages`"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        hypermodel(**arguments)


def test_stages_are_lists():
    with pytest.raises(ValueError, match="`stages` must be a list of lists.*Received: .'stem'"):
        ABRAHyperModel(tiny_backbone, CLASSES, ["stem"])


# The model.


def test_the_model_has_the_values():
    hp = keras_tuner.HyperParameters()
    chosen = {"margin": 0.3, "scale": 9.0, "stages": "stem+stage1", "steps": 0, "radius": 0.7, "alignment": "mmd"}
    hp.values.update({**chosen, "alignment_weight": 2.0, "learning_rate": 0.01, "weight_decay": 0.1, "warmup": 0.2})
    model = hypermodel(search=None).build(hp)
    assert (model.loss_function.margin, model.loss_function.scale) == (0.3, pytest.approx(9.0))
    assert (model.perturb_after, model.warmup) == (["stem", "stage1"], 0.2)
    assert (model.uncertainty.steps, model.uncertainty.radius) == (0, 0.7)
    assert (model.alignment.kind, model.alignment.weight) == ("mmd", 2.0)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    assert model.optimizer.weight_decay == 0.1


def test_the_uncertainty_has_more_arguments():
    uncertainty = {"structure": "domain", "num_experiments": 3, "shared_by": "experiment"}
    model = hypermodel(uncertainty=uncertainty, fixed={"radius": 0.3})
    made = model.make(model.settings(keras_tuner.HyperParameters())).uncertainty.get_config()
    assert {name: made[name] for name in uncertainty} == uncertainty and made["radius"] == 0.3


def test_another_margin_and_more_arguments_of_alignment():
    hp = keras_tuner.HyperParameters()
    model = hypermodel(loss=CosFace, alignment={"two_sided": True}, fixed={"warmup": 0.2, "alignment": "mmd"})
    made = model.make(model.settings(hp))
    assert (type(made.loss_function), made.loss_function.margin) == (CosFace, 0.35)
    assert (made.alignment.kind, made.alignment.two_sided) == ("mmd", True)
    model = hypermodel(alignment={"two_sided": True}, fixed={"alignment": "none"})
    assert model.make(model.settings(hp)).alignment.weight == 0


def test_what_an_adversary_needs_is_checked_with_the_steps_that_may_come():
    model = hypermodel(search=["margin"], uncertainty={"start": "zero"}, fixed={"steps": 1})
    assert model.make(model.settings(keras_tuner.HyperParameters())).uncertainty.start == "zero"
    model = hypermodel(search=["margin"], uncertainty={"learned_scale": True})
    assert model.make(model.settings(keras_tuner.HyperParameters())).uncertainty.learned_scale


def test_executions_have_seeds_of_their_own_and_are_repeatable():
    x, y = tiny_batch()
    hp = keras_tuner.HyperParameters()

    def losses(model):
        found = []
        for _ in range(2):
            built = model.build(hp)
            model.build(hp)  # as a tuner does without training it
            built = model.build(hp)
            found.append(model.fit(hp, built, x, y, batch_size=8, verbose=0).history["loss"][0])
        return found

    first, second = losses(hypermodel()), losses(hypermodel())
    assert first == second
    assert first[0] != first[1]


# Searches.


def search(folder, kind=keras_tuner.RandomSearch, model=None, epochs=1, **kwargs):
    tuner = type("Search", (DurableSearch, kind), {})
    arguments = {} if kind is keras_tuner.Hyperband else {"max_trials": 3}
    tuner = tuner(
        model or hypermodel(),
        keras_tuner.Objective("val_accuracy", "max"),
        directory=folder,
        project_name="search",
        seed=1,
        **{**arguments, **kwargs},
    )
    x, y = tiny_batch(16)
    tuner.search(x, y, validation_data=(x, y), epochs=epochs, batch_size=8, verbose=0)
    return tuner


@pytest.mark.parametrize(
    "kind",
    [
        "Hyperband",
        *(
            pytest.param(k, marks=pytest.mark.any_backend)
            for k in ("RandomSearch", "BayesianOptimization", "GridSearch")
        ),
    ],
)
def test_every_tuner_gives_working_objects(tmp_path, kind):
    kwargs = {"max_epochs": 2, "factor": 2} if kind == "Hyperband" else {}
    tuner = search(tmp_path, getattr(keras_tuner, kind), **kwargs)
    ended = [trial for trial in tuner.oracle.trials.values() if trial.status == "COMPLETED"]
    assert len(ended) >= 3
    best = tuner.get_best_hyperparameters()[0]
    assert 0.0 <= best.get("margin") <= 0.5
    x, y = tiny_batch(16)
    model = tuner.get_best_models()[0]
    accuracy = model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)["accuracy"]
    assert accuracy == pytest.approx(tuner.oracle.get_best_trials()[0].score, abs=1e-6)


@pytest.mark.any_backend
def test_weights_of_bad_trials_are_removed(tmp_path):
    tuner = search(tmp_path, max_trials=4)
    weights = list((tmp_path / "search").glob("trial_*/*.weights.h5"))
    assert [path.parent.name for path in weights] == [f"trial_{tuner.oracle.get_best_trials()[0].trial_id}"]
    assert len(list((tmp_path / "search").glob("trial_*/trial.json"))) == 4


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tmp_path):
    class Failing(ABRAHyperModel):
        def make_optimizer(self, hp, values):
            if values["scale"] == 8.0:
                return keras.optimizers.SGD(1e30)  # the loss is soon not finite
            return super().make_optimizer(hp, values)

    model = Failing(
        lambda: tiny_backbone(dropout=0.0),
        CLASSES,
        STAGES,
        search={"scale": [4.0, 8.0], "margin": [0.1, 0.2]},
        embedding_dim=6,
    )
    tuner = search(tmp_path, keras_tuner.GridSearch, model, epochs=3, max_trials=4, max_consecutive_failed_trials=3)
    trials = tuner.oracle.trials.values()
    failed = [trial for trial in trials if trial.status == "FAILED"]
    assert sorted(trial.hyperparameters.get("scale") for trial in failed) == [8.0, 8.0]
    assert all("NonFiniteLossError" in trial.message and "epoch" in trial.message for trial in failed)
    assert [trial.hyperparameters.get("scale") for trial in trials if trial.status == "COMPLETED"] == [4.0, 4.0]


def test_executions_of_a_trial_differ(tmp_path):
    tuner = search(tmp_path, max_trials=1, executions_per_trial=2)
    (trial,) = tuner.oracle.trials.values()
    values = trial.metrics.get_history("loss")[0].value
    assert len(values) == 1 and tuner.hypermodel.execution_seed(trial.hyperparameters) == 5 + 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_trials_train_under_mirrored_strategy(tmp_path):
    replicas = []

    class Watched(ABRAHyperModel):
        def fit(self, hp, model, *args, **kwargs):
            replicas.append(model.distribute_strategy.num_replicas_in_sync)
            return super().fit(hp, model, *args, **kwargs)

    # Replicas validate with their own moving statistics, but save the mean of them: here there are none.
    model = Watched(smooth_backbone, CLASSES, STAGES[:1], search={"margin": (0.0, 0.5)}, embedding_dim=None, seed=5)
    tuner = search(tmp_path, model=model, max_trials=1, distribution_strategy=two_replicas())
    assert replicas == [2]
    assert [trial.status for trial in tuner.oracle.trials.values()] == ["COMPLETED"]
    x, y = tiny_batch(16)
    accuracy = tuner.get_best_models()[0].evaluate(x, y, batch_size=8, verbose=0, return_dict=True)["accuracy"]
    assert accuracy == pytest.approx(tuner.oracle.get_best_trials()[0].score, abs=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="HParams are written by TensorFlow")
def test_tensorboard_gets_the_hyperparameters(tmp_path):
    tuner = type("Search", (DurableSearch, keras_tuner.RandomSearch), {})(
        hypermodel(), "val_accuracy", max_trials=1, directory=tmp_path, project_name="search"
    )
    x, y = tiny_batch(16)
    board = keras.callbacks.TensorBoard(tmp_path / "logs")
    tuner.search(x, y, validation_data=(x, y), epochs=1, batch_size=8, verbose=0, callbacks=[board])
    content = b"".join(path.read_bytes() for path in (tmp_path / "logs").rglob("*tfevents*"))
    assert b"_hparams_" in content and b"margin" in content


# Processes of their own: they are killed, or speak to each other.

SCRIPT = """
import os, sys, time
import keras, keras_tuner
sys.path.insert(0, {root!r})
from tests.tuning.test_hyper_model import hypermodel
from tests.tiny import tiny_batch
from keras_abra.tuning import DurableSearch, repair_project

class Report(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        print("trial begins", flush=True)
        time.sleep({pause})

kind = type("Search", (DurableSearch, getattr(keras_tuner, {kind!r})), {{}})
role = os.environ.get("KERASTUNER_TUNER_ID", "chief")
if role == "chief":
    print("again", repair_project({folder!r} + "/search"), flush=True)
else:  # two workers begin together
    open({folder!r} + "/" + role, "w").close()
    while not all(os.path.exists({folder!r} + f"/worker-{{i}}") for i in (1, 2)):
        time.sleep(0.05)
tuner = kind(hypermodel(), keras_tuner.Objective("val_accuracy", "max"), directory={folder!r}, project_name="search",
             seed=1, **{arguments!r})
x, y = tiny_batch(16)
tuner.search(x, y, validation_data=(x, y), epochs=2, batch_size=8, verbose=0, callbacks=[Report()])
print("done", flush=True)
"""


def script(folder, kind="RandomSearch", pause=0.0, arguments=None):
    root = str(Path(__file__).parents[2])
    return SCRIPT.format(
        root=root, folder=str(folder), kind=kind, pause=pause, arguments=arguments or {"max_trials": 4}
    )


def start(code, environment=None):
    variables = {**os.environ, "KERAS_BACKEND": keras.backend.backend(), **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def records(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("search/trial_*/trial.json")}


@pytest.mark.any_backend
def test_a_killed_search_goes_on(tmp_path, capsys):
    """Of Hyperband, which has most to know; recipes/test_tune_margin.py kills another."""
    kind, arguments = "Hyperband", {"max_epochs": 2, "factor": 2}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    exec(script(unbroken, kind, arguments=arguments), {})
    cut = start(script(broken, kind, pause=1.0, arguments=arguments))
    seen = 0
    for line in cut.stdout:
        seen += line.startswith("trial begins")
        if seen == 3:  # in the midst of the third trial
            cut.kill()
            break
    cut.communicate()
    before = {name: trial for name, trial in records(broken).items() if trial["status"] == "COMPLETED"}
    assert len(before) == 2
    capsys.readouterr()
    exec(script(broken, kind, arguments=arguments), {})
    assert "again ['" in capsys.readouterr().out
    after = records(broken)
    assert {name: after[name] for name in before} == before
    assert after.keys() == records(unbroken).keys()
    assert {trial["status"] for trial in after.values()} == {"COMPLETED"}

    def values(trials):
        return {name: trial["hyperparameters"]["values"] for name, trial in trials.items()}

    assert values(after) == values(records(unbroken))


class Cut(keras.callbacks.Callback):
    """Ends the process's search at the beginning of a trial, as Ctrl-C does."""

    begun = 0

    def __init__(self, trial):
        super().__init__()
        self.trial = trial

    def on_train_begin(self, logs=None):
        Cut.begun += 1
        if Cut.begun == self.trial:
            raise KeyboardInterrupt


@pytest.mark.any_backend
def test_a_grid_search_goes_on_where_it_was(tmp_path, monkeypatch):
    """Killed in a trial, and asked for more trials than it had."""

    def search(name, trials, cut=None):
        monkeypatch.setattr(Cut, "begun", 0)
        kind = type("Search", (DurableSearch, keras_tuner.GridSearch), {})
        again = repair_project(tmp_path / name)
        model = hypermodel(search={"margin": [0.1, 0.2, 0.3], "scale": [4.0, 8.0]})
        tuner = kind(model, keras_tuner.Objective("val_accuracy", "max"), trials, directory=tmp_path, project_name=name)
        x, y = tiny_batch(8)
        arguments = {"epochs": 1, "batch_size": 8, "verbose": 0, "callbacks": [Cut(cut)]}
        try:
            tuner.search(x, y, validation_data=(x, y), **arguments)
        except KeyboardInterrupt:
            assert cut
        ended = [tuner.oracle.trials[t].hyperparameters.values for t in tuner.oracle.end_order]
        return again, Cut.begun, ended

    _, _, expected = search("whole", 6)
    assert len({json.dumps(values) for values in expected}) == 6
    assert search("cut", 4, cut=3)[1:] == (3, expected[:2])
    again, begun, ended = search("cut", 4)
    assert again == ["2"] and (begun, ended) == (2, expected[:4])
    assert search("cut", 6)[1:] == (2, expected)


@pytest.mark.any_backend
def test_a_trial_that_ended_is_not_run_again(tmp_path):
    """A chief's state names it among those that run until the next trial ends."""
    state = {"start_order": ["0", "1"], "end_order": ["0"], "ongoing_trials": {"a": "0", "b": "1"}}
    (tmp_path / "oracle.json").write_text(json.dumps(state))
    for trial_id, status in (("0", "FAILED"), ("1", "RUNNING")):
        (tmp_path / f"trial_{trial_id}").mkdir()
        (tmp_path / f"trial_{trial_id}" / "trial.json").write_text(json.dumps({"status": status}))
    assert repair_project(tmp_path) == ["1"]
    assert json.loads((tmp_path / "oracle.json").read_text()) == state | {"ongoing_trials": {"b": "1"}}
    (tmp_path / "trial_1" / "trial.json").write_text(json.dumps({"status": "COMPLETED"}))
    assert repair_project(tmp_path) == []
    found = json.loads((tmp_path / "oracle.json").read_text())
    assert (found["end_order"], found["ongoing_trials"]) == (["0", "1"], {})


@pytest.mark.any_backend
def test_half_a_file_is_taken_back_to_the_whole_one(tmp_path):
    from keras_abra.tuning import repair_project

    search(tmp_path, max_trials=2)
    project = tmp_path / "search"
    for name in ("oracle.json", "trial_1/trial.json"):
        (project / name).write_text((project / name).read_text()[:40])
    (project / "trial_2").mkdir()
    assert repair_project(project) == []
    assert not (project / "trial_2").exists()
    tuner = search(tmp_path, max_trials=3)
    assert len(tuner.oracle.trials) == 3
    assert {t.status for t in tuner.oracle.trials.values()} <= {"COMPLETED", "RUNNING"}


@pytest.mark.any_backend
def test_a_state_that_cannot_be_read_loses_no_trial(tmp_path):
    from keras_abra.tuning import repair_project

    search(tmp_path, max_trials=1)
    project = tmp_path / "search"
    (project / "oracle.json").write_text("{")
    (project / "oracle.json.whole").unlink()
    before = sorted(path.name for path in project.rglob("*"))
    with pytest.raises(ValueError, match="oracle.json is not whole.* which knows trial_0. Nothing was removed"):
        repair_project(project)
    assert sorted(path.name for path in project.rglob("*")) == before
    trial = project / "trial_0" / "trial.json"
    trial.write_text(trial.read_text().replace("COMPLETED", "RUNNING"))  # none has ended: nothing to lose
    assert repair_project(project) == [] and not trial.exists() and not (project / "oracle.json").exists()


@pytest.mark.any_backend
def test_copies_are_whole_while_the_state_is_written_and_others_copy(tmp_path):
    from keras_abra.tuning import project

    state, stop, failed = tmp_path / "oracle.json", threading.Event(), []
    text = json.dumps({"trials": [*range(20000)]})

    def write():
        while not stop.is_set():
            with open(state, "w") as file:
                for i in range(0, len(text), 9000):
                    file.write(text[i : i + 9000])
                    file.flush()

    def copy():
        try:
            for _ in range(100):
                project.backup_project(tmp_path)
                if (copied := tmp_path / "oracle.json.whole").exists():
                    json.loads(copied.read_text())
        except Exception as error:
            failed.append(error)

    state.write_text(text)
    project.backup_project(tmp_path)
    threads = [threading.Thread(target=target) for target in (write, copy, copy)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert failed == [] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.any_backend
def test_a_chief_and_two_workers(tmp_path):
    oracle = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": str(free_port())}
    names = ("chief", "worker-1", "worker-2")
    processes = [start(script(tmp_path, pause=1.0), {**oracle, "KERASTUNER_TUNER_ID": name}) for name in names]
    try:
        results = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("done" in output for output, _ in results), [errors[-1000:] for _, errors in results]
    assert len(records(tmp_path)) == 4
    assert {trial["status"] for trial in records(tmp_path).values()} == {"COMPLETED"}
    trained = [output.count("trial begins") for output, _ in results]
    assert trained[0] == 0 and sum(trained) == 4
    weights = list(tmp_path.glob("search/trial_*/*.weights.h5"))
    assert 1 <= len(weights) <= 2  # each worker knows its own trials


def test_predictions_of_the_best_model_need_nothing_else(tmp_path):
    model = search(tmp_path, max_trials=1).get_best_models()[0]
    model.save(tmp_path / "best.keras")
    x, _ = tiny_batch()
    again = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def test_stages_and_steps_of_the_ramp_are_taken_as_the_model_takes_them():
    model = hypermodel(search=["margin"], fixed={"stages": ["stem", "stage1"], "warmup": 500})
    made = model.make(model.settings(keras_tuner.HyperParameters()))
    assert (made.perturb_after, made.warmup) == (["stem", "stage1"], 500)
    model = hypermodel(search={"stages": [["stem", "stage1"], ["stem"]], "warmup": [100, 200]})
    made = model.make(model.settings(keras_tuner.HyperParameters()))
    assert (made.perturb_after, made.warmup) == (["stem", "stage1"], 100)
    with pytest.raises(ValueError, match="The stages 'stage2' are none of `stages`: stem"):
        hypermodel(fixed={"stages": ["stage2"]})
