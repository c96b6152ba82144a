"""A run that is killed and started again ends where the unbroken run ends.

`KILLS=10 pytest tests/test_resumable_run.py` kills more often.
"""

import collections
import json
import os
import random
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

from keras_abra import ABRAModel, ResumableRun, callback_state, resumable_run, run_state
from tests.processes import ROOT, xla_flags
from tfrecords import build_records, write_screen

KILLS = int(os.environ.get("KILLS", 0))
BACKEND = keras.backend.backend()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """32 sites in 2 experiments to train on, 16 pixels."""
    folder = tmp_path_factory.mktemp("resumable")
    few = {split: {"HUVEC": 1, "RPE": 1} for split in ("train", "val", "test")}
    write_screen(folder / "screen", image_size=16, treatments=4, experiments=few)
    build_records(folder / "screen", folder / "records")
    return folder / "records"


def run(records, folder, replicas, chains):
    environment = {
        **os.environ,
        "KERAS_BACKEND": BACKEND,
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(replicas),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "tests.killed_run", records, folder, str(replicas), *chains]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def check(results):
    for result in results:
        assert result["differences"] == [], result
        events = result["chain"].split(",")
        for event, code in zip(events, result["codes"], strict=False):
            assert code == (75 if event.split("-")[0] in ("term", "validation") else -9), result
        assert result["codes"][len(events) :] == [0], result


def chains(seed):
    """Random moments for `KILLS` kills, half of them inside an epoch and two inside a save, and half as many SIGTERMs;
    or a chain of three in one run."""
    draw = random.Random(seed)
    if not KILLS:
        return [f"step-{draw.choice([5, 10, 12])},save-{draw.randint(2, 20)},validation-1"]
    inside = [f"step-{s}" for s in draw.sample([s for s in range(4, 31) if s % 8], KILLS // 2)]
    saving = [f"save-{n}" for n in draw.sample(range(20, 120), 2)]
    anywhere = [f"time-{draw.random() * 3:.2f}" for _ in range(max(KILLS - KILLS // 2 - 2, 1))]
    asked = [f"term-{s}" for s in draw.sample(range(4, 31), KILLS // 2 - 1)] + ["validation-3"]
    return inside + saving + anywhere + asked


def test_killed_at_any_moment_it_ends_where_the_unbroken_run_ends(records, tmp_path):
    check(run(records, tmp_path, 1, chains(1)))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no replicas in one process on torch")
@pytest.mark.skipif(not KILLS, reason="by hand (KILLS=10): two minutes and more")
def test_on_two_replicas_too(records, tmp_path):
    check(run(records, tmp_path, 2, chains(2)))


# In this process: any model and any data.


def plain_model(units=3, rate=0.5):
    """Runs eagerly on TensorFlow, where tracing takes longer; the job above that is killed is traced."""
    keras.utils.set_random_seed(5)
    image = keras.Input((4,))
    x = keras.layers.Dropout(rate, seed=1)(keras.layers.BatchNormalization()(keras.layers.Dense(units)(image)))
    model = keras.Model(image, keras.layers.Dense(2)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"], run_eagerly=BACKEND == "tensorflow")
    return model


def arrays(samples=24):
    draw = np.random.default_rng(0)
    return draw.normal(size=(samples, 4)).astype("float32"), draw.integers(0, 2, samples)


class Interrupt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.epoch, self.batch = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, self.batch):
            raise KeyboardInterrupt


FIT = {"batch_size": 8, "verbose": 0, "shuffle": False}


def history_callbacks(folder):
    return [
        keras.callbacks.CSVLogger(folder / "history.csv"),
        keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True),
    ]


def fit(folder, model=None, data=None, stop=None, epochs=5, options=None):
    model = model or plain_model()
    run = ResumableRun(folder / "checkpoints", callbacks=history_callbacks(folder), options=options)
    given = [run] if stop is None else [run, Interrupt(*stop)]
    try:
        history = model.fit(*(data or arrays()), **FIT, epochs=epochs, callbacks=given)
    finally:
        run.close()
    return model, history


def end_of(model, history, folder):
    values = {name: value.tobytes() for name, value in run_state.read_values(model, ("model", "optimizer")).items()}
    return values, history.history, history.epoch, (folder / "history.csv").read_text()


def test_any_model_goes_on_from_the_last_epoch(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    expected = end_of(*fit(tmp_path / "whole"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", stop=(3, 1))
    model, history = fit(tmp_path / "broken")
    assert end_of(model, history, tmp_path / "broken") == expected
    assert history.epoch == [0, 1, 2, 3, 4] and len(pd.read_csv(tmp_path / "broken" / "history.csv")) == 5
    model, history = fit(tmp_path / "broken")  # a run that has ended is at its end again
    assert end_of(model, history, tmp_path / "broken") == expected


def test_it_goes_on_to_more_epochs_in_the_same_process(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    expected = end_of(*fit(tmp_path / "whole"), tmp_path / "whole")
    model, _ = fit(tmp_path / "parts", epochs=2)
    again, history = fit(tmp_path / "parts", model=model)
    assert again is model and end_of(model, history, tmp_path / "parts") == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": dict(units=4)}, r"model .*units is 3 in the checkpoint and 4 now"),
        ({"model": dict(rate=0.4)}, r"model .*rate is 0.5 in the checkpoint and 0.4 now"),
        ({"options": {"seed": 1}}, r"option seed is 0 in the checkpoint and 1 now"),
        ({"options": {}}, r"option seed is there in the checkpoint only"),
        ({"data": arrays(32)}, r"an epoch has 3 steps. Expected: data of 3 steps.*Received: 4 steps"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    fit(tmp_path, epochs=1, options={"seed": 0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = plain_model(**change.pop("model", {}))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model=model, **{"options": {"seed": 0}, "epochs": 2, **change})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"perturb_after": ["stage_2"]}, r"perturb_after, by the layers' numbers, is 1 in the checkpoint and 2 now"),
        ({"class_names": ["s_1", "s_0"]}, r"class_names\[0\] is 's_0' in the checkpoint and 's_1' now"),
    ],
)
def test_names_that_differ_by_a_number_are_others(changed, message, tmp_path):
    """Those of layers and classes are the user's own, though Keras numbers layers in the same way."""

    def run(**changed):
        image = keras.Input((8, 8, 2))
        x = keras.layers.Conv2D(4, 3, name="stage_1")(image)
        x = keras.layers.Conv2D(4, 3, name="stage_2")(x)
        backbone = keras.Model(image, keras.layers.Conv2D(4, 3)(x))
        options = {"perturb_after": ["stage_1"], "class_names": ["s_0", "s_1"], "embedding_dim": 4, "warmup": 0}
        model = ABRAModel(backbone, 2, **(options | changed))
        model.compile("sgd", run_eagerly=True)
        data = np.zeros((8, 8, 8, 2), "float32") + np.arange(8)[:, None, None, None], np.arange(8) % 2
        resumable = ResumableRun(tmp_path)
        try:
            return model.fit(*data, batch_size=4, epochs=2, verbose=0, callbacks=[resumable]).epoch
        finally:
            resumable.close()

    run()
    with pytest.raises(ValueError, match=message):
        run(**changed)
    assert run() == [0, 1]


def test_layers_that_were_made_before_do_not_count(tmp_path):
    fit(tmp_path, epochs=1)
    keras.layers.Dense(1), keras.layers.Dropout(0.1)  # they move on the numbers in names
    assert fit(tmp_path, epochs=2)[1].epoch == [0, 1]


def test_a_damaged_checkpoint_costs_an_epoch_and_no_more(tmp_path):
    (tmp_path / "whole").mkdir()
    expected = end_of(*fit(tmp_path / "whole"), tmp_path / "whole")
    fit(tmp_path, epochs=3)
    file = max((tmp_path / "checkpoints").iterdir()) / "arrays.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="00000003 is damaged .*: the one before is used"):
        model, history = fit(tmp_path)
    assert end_of(model, history, tmp_path) == expected


class Diary(keras.callbacks.Callback):
    """State in an argument, and in containers of every kind."""

    def __init__(self, count=0, places=("a",), sums=None, given=None):
        super().__init__()
        self.count, self.places, self.sums = count, places, np.zeros(2, "float32") if sums is None else sums
        self.given = np.random.default_rng(4) if given is None else given
        self.losses, self.last, self.seen, self.pair = {}, collections.deque(maxlen=2), set(), (1, 2)
        self.counter, self.order = collections.Counter(), collections.OrderedDict()
        self.lists, self.noise = collections.defaultdict(list), np.random.default_rng(3)
        self.mean, self.variable, self.raw = np.float32(0), keras.Variable(0.0, dtype="float32"), b""
        self.texts, self.rows, self.file = np.array(["a"]), np.zeros(1, [("a", "f4"), ("b", "i8")]), None

    def on_epoch_end(self, epoch, logs=None):
        self.sums = self.sums + np.float32(logs["loss"])
        self.counter[f"epoch {epoch}"] += 1
        self.order[epoch] = str(epoch)
        self.order.move_to_end(epoch, last=False)
        self.lists[epoch // 2].append(epoch)
        self.mean = self.mean * np.float32(0.9) + np.float32(logs["loss"])
        self.variable.assign_add(self.noise.random() + self.given.random())
        self.raw += bytes([epoch])
        self.texts = np.append(self.texts, f"epoch {epoch}")
        self.rows["a"] += self.mean
        self.file = Path("logs") / str(epoch)
        logs["noise"], logs["vector"] = self.noise.random(), np.full(2, self.mean)
        self.count += 1
        self.losses[epoch] = logs["loss"]
        self.last.append(epoch)
        self.seen |= {epoch}
        self.pair = (self.pair[1], epoch)


def test_own_callbacks_keep_what_they_have_counted(tmp_path, recwarn):
    def fit(folder, epochs):
        diary = Diary(given=np.random.default_rng(4))
        run = ResumableRun(folder, callbacks=diary)
        history = plain_model().fit(*arrays(), **FIT, epochs=epochs, callbacks=[run]).history
        return diary, history

    whole, expected = fit(tmp_path / "whole", 5)
    first, _ = fit(tmp_path / "parts", 3)
    diary, history = fit(tmp_path / "parts", 5)
    assert (diary.count, diary.places, diary.seen) == (5, ("a",), {0, 1, 2, 3, 4})
    assert [*diary.losses] == [0, 1, 2, 3, 4] and {**diary.losses, **first.losses} == diary.losses
    assert (diary.last, diary.last.maxlen, diary.pair) == (collections.deque([3, 4]), 2, (3, 4))
    for name in set(vars(diary)) - {"_model", "params", "validation_data"}:
        mine, theirs = getattr(diary, name), getattr(whole, name)
        assert type(mine) is type(theirs), name
        if name in ("noise", "given"):
            mine, theirs = mine.random(), theirs.random()
        if name == "variable":
            mine, theirs = float(mine.value), float(theirs.value)
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
    assert diary.mean.dtype == "float32" and diary.rows["a"].any()
    np.testing.assert_equal(history, expected)
    assert not [str(warning.message) for warning in recwarn if "Checkpoints lack" in str(warning.message)]


def test_state_that_cannot_be_stored_is_named(tmp_path):
    diary = Diary()
    diary.losses["model"], diary.handle, diary.function = object(), object(), print
    run = ResumableRun(tmp_path, callbacks=[diary])
    with pytest.warns(UserWarning, match=r"Checkpoints lack Diary.handle, Diary.losses of the callbacks"):
        plain_model().fit(*arrays(), verbose=0, shuffle=False, callbacks=[run])


class Patient(keras.callbacks.EarlyStopping):
    """Changes an argument of its base class."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.patience += 1


def test_an_argument_of_keras_that_a_subclass_changes_is_state(tmp_path):
    def patience(epochs):
        patient = Patient("loss", patience=3, min_delta=0.5)
        plain_model().fit(*arrays(), **FIT, epochs=epochs, callbacks=[ResumableRun(tmp_path, callbacks=[patient])])
        return patient.patience, patient.min_delta

    assert patience(2) == (5, -0.5) and patience(4) == (7, -0.5)


def test_logs_of_vectors_and_a_checkpoint_of_the_best_after_some_batches(tmp_path):
    image = keras.Input((4,))
    (x, y), labels = arrays(), np.eye(2, dtype="float32")

    def fit(folder, stop=None):
        keras.utils.set_random_seed(1)
        model = keras.Model(image, keras.layers.Dense(2, activation="softmax")(image))
        model.compile("adam", "categorical_crossentropy", metrics=[keras.metrics.F1Score()])
        best = keras.callbacks.ModelCheckpoint(folder / "best.keras", "loss", save_best_only=True, save_freq=2)
        run = ResumableRun(folder / "c", callbacks=[best])
        given = [run] if stop is None else [run, Interrupt(*stop)]
        try:
            history = model.fit(x, labels[y], **FIT, epochs=4, callbacks=given).history
        finally:
            run.close()
        return history, best.best

    expected, best = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop=(2, 1))
    history, again = fit(tmp_path / "cut")
    np.testing.assert_equal(history, expected)
    assert again == best and np.shape(expected["f1_score"]) == (4, 2)


class StopInside(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.model.stop_training = True


def test_a_run_that_was_ended_inside_an_epoch_is_at_its_end_again(tmp_path):
    def fit():
        run = ResumableRun(tmp_path, callbacks=[StopInside()])
        return plain_model().fit(*arrays(), **FIT, epochs=4, callbacks=[run]).history

    assert len(fit()["loss"]) == 1 and fit() == fit()


class LogsMore(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["more"] = epoch


def test_what_callbacks_outside_log_stays_in_the_history(tmp_path):
    history = plain_model().fit(*arrays(), **FIT, epochs=3, callbacks=[ResumableRun(tmp_path), LogsMore()]).history
    assert history["more"] == [0, 1, 2] and len(history["loss"]) == 3


def test_folders_that_are_not_there_are_made_and_what_cannot_be_is_said_at_once(tmp_path):
    log = keras.callbacks.CSVLogger(tmp_path / "runs" / "a" / "history.csv")
    plain_model().fit(*arrays(), **FIT, callbacks=[ResumableRun(tmp_path / "runs" / "a" / "c", callbacks=[log])])
    assert len(pd.read_csv(tmp_path / "runs" / "a" / "history.csv")) == 1
    (tmp_path / "file").write_text("mine")
    begun = []
    watch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    with pytest.raises(FileExistsError, match="file"):
        plain_model().fit(*arrays(), **FIT, callbacks=[watch, ResumableRun(tmp_path / "file")])
    assert begun == []
    with pytest.raises(ValueError, match="`options` must be what `json` writes"):
        ResumableRun(tmp_path, options={"data": tmp_path})


def test_one_run_given_another_model_is_checked_anew(tmp_path):
    run = ResumableRun(tmp_path)
    plain_model().fit(*arrays(), **FIT, callbacks=[run])
    with pytest.raises(ValueError, match="units is 3 in the checkpoint and 4 now"):
        plain_model(units=4).fit(*arrays(), **FIT, epochs=2, callbacks=[run])


def test_another_kind_of_learning_rate_is_named(tmp_path):
    def fit(rate):
        model = plain_model()
        model.compile(keras.optimizers.Adam(rate), model.loss)
        model.fit(*arrays(), **FIT, callbacks=[ResumableRun(tmp_path)])

    fit(keras.optimizers.schedules.CosineDecay(0.1, 9))
    with pytest.raises(ValueError, match="of another run: compile optimizer config learning_rate is .*CosineDecay"):
        fit(0.1)


class KillAtEnd(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.at = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_signal_behind_the_last_save_of_an_epoch_is_not_lost(tmp_path, epoch):
    with pytest.raises(SystemExit, match="75"):
        plain_model().fit(*arrays(), **FIT, epochs=3, callbacks=[ResumableRun(tmp_path), KillAtEnd(epoch)])
    history = plain_model().fit(*arrays(), **FIT, epochs=3, callbacks=[ResumableRun(tmp_path)])
    assert history.epoch == [0, 1, 2]


def test_a_signal_behind_the_last_question_of_fit_does_what_it_did_before(tmp_path, monkeypatch):
    got = []

    def waits_for_others(flag):
        if flag_at_the_end:
            os.kill(os.getpid(), signal.SIGTERM)
        return flag

    class End(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            flag_at_the_end.append(1)

    flag_at_the_end = []
    monkeypatch.setattr("keras_abra.backend.in_any_process", waits_for_others)
    before = signal.signal(signal.SIGTERM, lambda *args: got.append(args[0]))
    try:
        run = ResumableRun(tmp_path, callbacks=[End()])
        plain_model().fit(*arrays(), **FIT, epochs=1, callbacks=[run])
        assert got == [signal.SIGTERM] and run.asked_to_leave
    finally:
        signal.signal(signal.SIGTERM, before)


def test_after_an_error_in_fit_the_signal_does_again_what_it_did(tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *args: got.append(args[0]))
    try:
        with pytest.raises(KeyboardInterrupt):
            plain_model().fit(*arrays(), **FIT, epochs=2, callbacks=[ResumableRun(tmp_path), Interrupt(1, 1)])
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "callbacks",
    [
        [],
        [keras.callbacks.EarlyStopping("loss"), keras.callbacks.TerminateOnNaN()],
        [keras.callbacks.ReduceLROnPlateau("loss")],
        [keras.callbacks.EarlyStopping("accuracy")],
    ],
)
def test_other_callbacks_are_refused_and_nothing_is_touched(callbacks, tmp_path):
    def fit(callbacks, epochs):
        run = ResumableRun(tmp_path / "c", callbacks=callbacks)
        plain_model().fit(*arrays(), epochs=epochs, verbose=0, shuffle=False, callbacks=[run])

    fit([keras.callbacks.EarlyStopping("loss")], 1)
    (tmp_path / "log.csv").write_text("epoch\n0\n")
    with pytest.raises(ValueError, match="of another run: callbacks.* in the checkpoint"):
        fit([*callbacks, *([keras.callbacks.CSVLogger(tmp_path / "log.csv")] if not callbacks else [])], 2)
    assert (tmp_path / "log.csv").read_text() == "epoch\n0\n"


@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_whose_rate_a_callback_has_lowered_goes_on_and_another_rate_is_refused(scaled, tmp_path):
    def make():
        model = plain_model()
        if scaled:
            model.compile(keras.optimizers.LossScaleOptimizer(model.optimizer), model.loss)
        return model

    model = make()

    def fit(model, epochs):
        lower = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0)
        run = ResumableRun(tmp_path, callbacks=[lower])
        return model.fit(*arrays(), epochs=epochs, verbose=0, shuffle=False, callbacks=[run]).epoch

    assert fit(model, 3) == [0, 1, 2] and float(model.optimizer.learning_rate) < 0.05
    assert fit(model, 4) == [0, 1, 2, 3]  # the same object, in a notebook
    assert fit(make(), 5) == [0, 1, 2, 3, 4]
    other = make()
    other.optimizer.learning_rate = 0.03
    with pytest.raises(ValueError, match="learning_rate is 0.1.* in the checkpoint and 0.0(3|29)"):
        fit(other, 6)


class MoreLogs(keras.Model):
    """Logs a number that is no metric."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, y_pred, sample_weight) | {"extra": keras.ops.max(y_pred)}


class Terminate(keras.callbacks.Callback):
    def __init__(self, epoch=None):
        super().__init__()
        self.epoch = self.now = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_test_batch_begin(self, batch, logs=None):
        if self.epoch is not None and self.now == self.epoch:
            os.kill(os.getpid(), signal.SIGTERM)


def test_logs_that_are_no_metrics_survive_a_stop_in_validation(tmp_path):
    def fit(folder, stop=None):
        plain, (x, y) = plain_model(), arrays()
        model = MoreLogs(plain.inputs, plain.outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"])
        run = ResumableRun(folder, every=2)
        for part in run.parts(3):
            begin = 8 * part.start["first_step"]
            history = model.fit(
                *(x[begin:], y[begin:]),
                **{"batch_size": 8, "epochs": part.epochs, "verbose": 0, "shuffle": False},
                validation_data=(x[:8], y[:8]),
                callbacks=[run, Terminate(stop)],
            ).history
        return history

    expected = fit(tmp_path / "whole")
    with pytest.raises(SystemExit, match="75"):
        fit(tmp_path / "cut", stop=1)
    assert set(expected) == {"loss", "accuracy", "extra", "val_loss", "val_accuracy", "val_extra"}
    assert fit(tmp_path / "cut") == expected


class Batches(keras.utils.PyDataset):
    """Of 8 samples; sends SIGTERM when a certain one is asked for, which is while its step is computed."""

    def __init__(self, begin=0, terminate=None):
        super().__init__()
        self.begin, self.terminate = begin, terminate

    def __len__(self):
        return 3 - self.begin

    def __getitem__(self, index):
        self.terminate = None if self.terminate is None else self.terminate - 1
        if self.terminate == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return tuple(array[8 * (self.begin + index) :][:8] for array in arrays())


@pytest.mark.parametrize("terminate", [(4, None), (6, None), (None, 5)])
def test_a_signal_while_a_step_is_computed_loses_nothing(terminate, tmp_path):
    """On JAX the model's variables are not there then: the step has been given their memory."""

    def fit(folder, training=None, validation=None):
        run, model = ResumableRun(folder, every=100), plain_model()
        for part in run.parts(3):
            options = {"epochs": part.epochs, "verbose": 0, "shuffle": False, "callbacks": [run]}
            data = Batches(part.start["first_step"], training)
            history = model.fit(data, **options, validation_data=Batches(0, validation)).history
        return history, run_state.read_values(model)

    history, values = fit(tmp_path / "whole")
    with pytest.raises(SystemExit, match="75"):
        fit(tmp_path / "cut", *terminate)
    assert (0, 0) < ResumableRun(tmp_path / "cut").position < (3, 0)
    again, found = fit(tmp_path / "cut")
    assert again == history
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in values.items()}


def test_a_step_that_does_not_end_does_not_hold_the_process(tmp_path):
    """In a child, which it ends: a sleep in the place of the step."""
    fit(tmp_path, epochs=1)
    run = ResumableRun(tmp_path / "checkpoints", callbacks=history_callbacks(tmp_path))
    assert run.position == (1, 0)
    child = os.fork()
    if child == 0:
        sys.stderr = open(tmp_path / "said", "w")
        run._termination.grace, run._termination.alive = 0.2, lambda frame: True
        run._termination.catch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ResumableRun.EXIT_CODE
    said = (tmp_path / "said").read_text()
    assert "SIGTERM: neither a step nor the writing of a checkpoint ended within 0.2 s; left in epoch 0 before" in said
    assert fit(tmp_path, epochs=3)[1].epoch == [0, 1, 2]


def test_the_checkpoint_that_is_written_on_leaving_may_take_its_time(tmp_path, monkeypatch):
    """No timer runs while it is written, also not that of a second signal."""
    write, timers = resumable_run.write_checkpoint, []

    def noted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        timers.append(run._termination._timer)
        return write(*args)

    class Terminate(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(resumable_run, "write_checkpoint", noted)
    run = ResumableRun(tmp_path, every=100)
    with pytest.raises(SystemExit, match="75"):
        for part in run.parts(3):
            data = Batches(part.start["first_step"])
            plain_model().fit(data, epochs=part.epochs, verbose=0, shuffle=False, callbacks=[run, Terminate()])
    assert timers == [None] and ResumableRun(tmp_path).position == (0, 1)


def test_a_folder_that_not_all_processes_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_run.backend, "largest_of_processes", lambda number: max(number, 7))
    monkeypatch.setattr(ResumableRun, "PATIENCE", 1e-9)
    with pytest.raises(ValueError, match="the newest is 00000007, and some see an older .* that all share"):
        list(ResumableRun(tmp_path).parts(1))


def test_a_checkpoint_that_another_process_has_written_is_waited_for(tmp_path, monkeypatch):
    """As where NFS lists a folder as it was a minute ago."""
    (tmp_path / "seen").mkdir()
    fit(tmp_path / "seen")
    newest = sorted((tmp_path / "seen" / "checkpoints").glob("0*"))[-1]
    newest.rename(tmp_path / "late")
    for other in newest.parent.iterdir():  # gone but still listed: no reason to give up
        shutil.rmtree(other)
        other.mkdir()
    monkeypatch.setattr(resumable_run.backend, "largest_of_processes", lambda number: max(number, int(newest.name)))
    monkeypatch.setattr(resumable_run.backend, "in_any_process", bool)
    monkeypatch.setattr(resumable_run.time, "sleep", lambda seconds: (tmp_path / "late").rename(newest))
    with pytest.warns(UserWarning, match="is damaged"):
        assert ResumableRun(newest.parent)._newest().path == newest


def test_a_full_disk_ends_training_and_the_checkpoint_before_stays(tmp_path):
    resource = pytest.importorskip("resource", reason="limits are POSIX's")
    (tmp_path / "whole").mkdir()
    expected = end_of(*fit(tmp_path / "whole"), tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        run = ResumableRun(tmp_path / "checkpoints", callbacks=history_callbacks(tmp_path))
        with pytest.raises(OSError, match="No space is left to write .*00000003 .*00000002, stays"):
            plain_model().fit(*arrays(), **FIT, epochs=5, callbacks=[Full(), run])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run.close()
    model, history = fit(tmp_path)
    assert end_of(model, history, tmp_path) == expected


def test_steps_left_out_are_counted_on(tmp_path):
    """A run that was broken between two steps that are not finite stops where the unbroken one does."""
    from keras_abra import NonFiniteLossError, SkipNonFinite
    from tests.test_skip_non_finite import Batches, batches, compiled

    def fit(folder, stop=None):
        found = batches(bad=(1, 2, 3), count=5)
        run = ResumableRun(folder, every=1, callbacks=[SkipNonFinite(most=2)])
        try:
            for part in run.parts(1):
                model = compiled()
                begin = part.start["first_step"]
                given = [run, Interrupt(0, stop)] if stop else [run]
                model.fit(Batches(found[begin:]), epochs=part.epochs, verbose=0, shuffle=False, callbacks=given)
        finally:
            run.close()

    with pytest.warns(UserWarning, match="left out"), pytest.raises(KeyboardInterrupt):
        fit(tmp_path, stop=3)
    with pytest.raises(NonFiniteLossError, match="finite 3 steps in a row, the last in epoch 0, step 3"):
        fit(tmp_path)


def test_a_run_that_stopped_at_a_step_that_is_not_finite_goes_on_without_such_steps(tmp_path):
    from keras_abra import NonFiniteLossError, SkipNonFinite
    from tests.test_skip_non_finite import Batches, batches, compiled

    def fit(found, epochs, *more):
        run = ResumableRun(tmp_path / "c", callbacks=[keras.callbacks.CSVLogger(tmp_path / "history.csv"), *more])
        try:
            return compiled().fit(Batches(found), epochs=epochs, verbose=0, shuffle=False, callbacks=[run]).history
        finally:
            run.close()

    fit(batches(bad=()), 1)
    with pytest.raises(NonFiniteLossError, match="epoch 1, step 1"):
        fit(batches(), 3)
    with pytest.warns(UserWarning, match="in epoch 1, step 1"):
        history = fit(batches(), 3, SkipNonFinite())
    assert np.isfinite(history["loss"]).all() and len(history["loss"]) == 3 and history["skipped"] == [1, 1]
    assert pd.read_csv(tmp_path / "history.csv")["epoch"].tolist() == [0, 1, 2]


def test_callbacks_see_the_epochs_of_the_run_inside_its_parts_too(tmp_path):
    class Seen(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append((epoch, self.params["epochs"]))

    def fit(*more):
        run = ResumableRun(tmp_path, every=1, callbacks=[Seen()])
        for part in run.parts(3):
            data = Batches(part.start["first_step"])
            plain_model().fit(data, epochs=part.epochs, verbose=0, shuffle=False, callbacks=[run, *more])

    seen = []
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupt(1, 1))
    fit()
    assert seen == [(0, 3), (1, 3), (1, 3), (2, 3)]


def test_of_several_processes_the_first_alone_writes_the_files_of_callbacks(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_run.backend, "process_index", lambda: 1)
    best = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras", "loss", save_best_only=True)
    stop = keras.callbacks.EarlyStopping("loss", patience=9)
    callbacks = [best, keras.callbacks.CSVLogger(tmp_path / "history.csv"), stop]
    plain_model().fit(*arrays(), **FIT, epochs=2, callbacks=[ResumableRun(tmp_path / "c", callbacks=callbacks)])
    assert [*tmp_path.iterdir()] == [] and np.isfinite(stop.best)


def test_an_argument_that_changes_in_its_middle_is_state():
    values = {"sums": np.zeros(2000)}
    before = callback_state._plain(values)
    values["sums"][1000] = 1
    assert callback_state._plain(values) != before == callback_state._plain({"sums": np.zeros(2000)})


def test_every_needs_the_parts_of_a_run(tmp_path):
    with pytest.raises(ValueError, match="every=2 saves inside an epoch.*for part in run.parts"):
        plain_model().fit(*arrays(), verbose=0, callbacks=[ResumableRun(tmp_path / "c", every=2)])
    with pytest.raises(ValueError, match="`every` must be a number of steps, 1 or more, or None. Received: 0"):
        ResumableRun(tmp_path, every=0)


def test_data_that_do_not_begin_where_the_run_goes_on_are_refused(tmp_path):
    x, y = arrays()
    with pytest.raises(KeyboardInterrupt):
        run = ResumableRun(tmp_path, every=1)
        for part in run.parts(2):
            plain_model().fit(
                x, y, batch_size=8, epochs=part.epochs, shuffle=False, verbose=0, callbacks=[run, Interrupt(0, 2)]
            )
    run = ResumableRun(tmp_path, every=1)
    assert run.position == (0, 2)
    with pytest.raises(ValueError, match="goes on at step 2 of epoch 0.*Expected: data of 2 steps, from step 1 on"):
        for part in run.parts(2):
            assert part.start == {"first_epoch": 0, "first_step": 1}
            plain_model().fit(x, y, batch_size=8, epochs=part.epochs, shuffle=False, verbose=0, callbacks=[run])


def test_sigterm_is_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before
