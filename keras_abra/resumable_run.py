import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import keras

from keras_abra import backend, run_state
from keras_abra.callback_state import (
    callback_files,
    describe_callbacks,
    read_arguments,
    read_callbacks,
    restore_files,
    set_callbacks,
    settle_direction,
    writes_file,
)
from keras_abra.checkpoint_folder import read_checkpoint, write_checkpoint
from keras_abra.plain_values import decode, encode
from keras_abra.same_run import check_same_run, describe_run
from keras_abra.termination import Termination


class Part(NamedTuple):
    """A part of a run that is one call of `fit`.

    Attributes:
        start: `{"first_epoch": ..., "first_step": ...}`, where its data must begin.
        epochs: the `epochs` of `fit`, at which the part ends.
    """

    start: dict
    epochs: int


class ResumableRun(keras.callbacks.Callback):
    """Keeps checkpoints of a whole run; the same program, started again, goes on as if it had not been stopped.

    With any data that start anew in each epoch, and any model of Keras:

        model.fit(x, y, epochs=90, callbacks=[ResumableRun("runs/a/checkpoints", callbacks=[CSVLogger("history.csv")])])

    goes on from the end of the last epoch. Data whose reader can begin anywhere go on from inside an epoch:

        run = ResumableRun("runs/a/checkpoints", every=200, callbacks=[CSVLogger("history.csv")])
        for part in run.parts(epochs=90):
            train = tfrecords.read_records(folder, "train", batch_size=72, training=True, **part.start)
            model.fit(train, epochs=part.epochs, callbacks=[run], shuffle=False)

    On one machine with deterministic kernels the end is the same, bit for bit, as that of a run that was never stopped:
    weights, optimizer, moving statistics (of each replica), seeds, ramp, running means, metrics, history, and the state
    and files of `callbacks`. The order of data with a random order of their own must be a function of the epoch, or
    come from Python's, NumPy's or torch's global generator (TensorFlow's cannot be stored; on JAX with a GPU Keras
    draws a batch ahead, and inside an epoch it must be a function of epoch and step). In epochs of few steps, a model
    other than `ABRAModel` whose metrics are not built yet makes Keras look at a batch on JAX and torch, and that
    counts as a pass over `read_records`'s data.

    Checkpoints are written at the end of each epoch, every `every` steps, and when SIGTERM asks the process to leave:
    it finishes the step, saves, and leaves with exit code 75 (`EXIT_CODE`, "try again later"), in validation after a
    batch of it. Without `parts`, which alone go on inside an epoch, it leaves without saving. So it does after 20 s
    without an end of a step, or of a checkpoint that was being written. SIGTERM can be caught in the main thread only.
    Each checkpoint is written aside, synced, renamed, and has checksums; the last two are kept.

    In several processes the first one writes, to a folder that all of them share, and alone calls `CSVLogger` and
    `ModelCheckpoint`; `parts` and `position` are to be asked in every one. It is enough that one is asked to leave:
    they agree after each step, and leave together. The global generators go on in all of them from the first one's
    state: a random order of data must be a function of epoch and process there.

    Of a model with several optimizers only `model.optimizer` is stored.

    NumPy's format with Keras's own variables, and not Orbax or `tf.train.Checkpoint`: of these neither stores the
    values of single replicas, a metric's accumulators and the callbacks on all three backends, and
    `BackupAndRestore` restores the epoch only and writes in place.

    Args:
        folder: where the checkpoints stand.
        every: steps between checkpoints inside an epoch; None for none. Needs `parts`.
        callbacks: callbacks whose state is kept: `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`, `CSVLogger`,
            `SwapEMAWeights` and your own (attributes that hold plain values, NumPy arrays and generators or Keras
            variables, in lists, dicts, sets and the like; a warning names what cannot be stored). They are called by
            this one; do not give them to `fit` a second time. When the run goes on they must be the same, but that a
            `SkipNonFinite` may be added. What callbacks outside log is in the `History` of this call of `fit` alone.
        options: dict, as `json` writes it, of what must not change when the run goes on and the model does not show:
            seed, batch size, checksum of the data's manifest.

    Raises:
        ValueError: if the checkpoints in `folder` are of another run (naming what differs), or all damaged, or if the
            data do not begin where the run goes on; under `MultiWorkerMirroredStrategy`, whose processes cannot agree
            on a checkpoint here (several processes of JAX or torch can).
        OSError: if there is no space for a checkpoint; the one before stays.
    """

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
    AGAIN = "Start the same again to go on."  # what a process that leaves says
    PATIENCE = 70.0  # seconds until all processes see what one has written; NFS lists a folder anew after 60
    GRACE = 20.0  # seconds from SIGTERM to the end of the step; clusters kill after 30, and leaving takes some

    def __init__(self, folder, every=None, callbacks=(), options=None):
        super().__init__()
        if every is not None and not (isinstance(every, int) and every >= 1):
            raise ValueError(f"`every` must be a number of steps, 1 or more, or None. Received: {every!r}")
        try:
            json.dumps(options)
        except TypeError as error:
            raise ValueError(f"`options` must be what `json` writes ({error}). Received: {options!r}") from None
        self.folder, self.every, self.options = Path(folder), every, options
        self.callbacks = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks)
        self._arguments, self._lost = read_arguments(self.callbacks), None
        self._part = self._total = self._steps = self._description = None
        self._termination = Termination(self.GRACE, self.EXIT_CODE, self._last, self._is_inside_fit)
        self._training = False
        self._forget()

    def parts(self, epochs):
        """The calls of `fit` that are left up to `epochs`: the rest of a broken epoch, and the epochs behind it.

        Yields:
            A `Part` each. None are left only if the run ended before its last epoch, or there: then one `fit` without
            steps sets the model to its end.
        """
        self._total = epochs
        try:
            found = self._newest()
            if found is not None and found.state["step"]:
                state = found.state
                start = {"first_epoch": state["epoch"], "first_step": state["begin"]}
                self._part = Part(start, state["epoch"] + 1)
                yield self._part
                found = self._newest()
            if found is None or found.state["epoch"] < epochs or self._part is None:
                epoch = 0 if found is None else found.state["epoch"]
                self._part = Part({"first_epoch": epoch, "first_step": 0}, epochs)
                yield self._part
        finally:
            self._part = None
            self.close()

    @property
    def position(self):
        """`(epoch, step)` of the newest whole checkpoint, both from 0; None if there is none."""
        found = self._newest()
        return None if found is None else (found.state["epoch"], found.state["step"])

    def close(self):
        """Gives SIGTERM back, if `fit` was left by an error."""
        self._termination.release()

    def _newest(self):
        backend.wait_for_processes()  # the one that writes may still be writing
        end = None
        while True:
            found = complaint = None
            try:
                found = read_checkpoint(self.folder, clean=not backend.process_index())
                number = 0 if found is None else int(found.path.name)
            except (ValueError, OSError) as error:  # as of a list of checkpoints that have been removed since
                complaint, number = error, -1
            newest = backend.largest_of_processes(number)
            if not backend.in_any_process(number != newest):
                if complaint is not None:
                    raise complaint
                return found
            end = end or time.monotonic() + self.PATIENCE
            if backend.in_any_process(time.monotonic() > end):
                raise ValueError(
                    f"Processes see different checkpoints in {self.folder}: the newest is {newest:08d}, and some see "
                    "an older one or none. Name a folder that all share."
                ) from complaint
            time.sleep(1)

    def _forget(self):
        self._rows, self._epochs = {}, []
        self._epoch = self._step = 0  # of the next batch
        self._first = self._begin = 0  # batches at which the data and the last execution of steps began
        self._replay = self._replayed = self._metrics = self._logs = None
        self._saved = None
        self._stopped = False

    # Keras calls these.

    def _called(self):
        """The callbacks of this process: one file has one writer."""
        return [c for c in self.callbacks if not (writes_file(c) and backend.process_index())]

    def _call(self, name, *args):
        for callback in self._called():
            with backend.alone() if writes_file(callback) else contextlib.nullcontext():
                getattr(callback, name)(*args)

    def set_params(self, params):
        super().set_params(params)
        whole = params if self._part is None or not params else {**params, "epochs": self._total}  # not the part's
        self._call("set_params", whole)

    def set_model(self, model):
        if model is not self._model:
            self._description = None
        super().set_model(model)
        self._call("set_model", model)

    def on_train_begin(self, logs=None):
        if self.every is not None and self._part is None:
            raise ValueError(
                f"every={self.every} saves inside an epoch, and a run that goes on there must be given the rest of its "
                "data: call fit in `for part in run.parts(epochs=...):` with data that begin at part.start."
            )
        if keras.backend.backend() == "tensorflow" and backend.process_count(self.model) > 1:
            raise ValueError(
                "A ResumableRun does not work with the several processes of MultiWorkerMirroredStrategy: each would "
                "write checkpoints of its own. Train in several processes of JAX or torch, or on one machine."
            )
        self._forget()
        self._build()
        for path in callback_files(self.callbacks).values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if not backend.process_index():
            self.folder.mkdir(parents=True, exist_ok=True)  # what cannot be is said before an epoch
        if self._description is None:
            self._description = describe_run(self.model, self.options)
            self._description["callbacks"] = describe_callbacks(self.callbacks)
        found = self._newest()
        if found is not None:
            self._check(found)
        self._call("on_train_begin", logs)
        self._training = True
        self._termination.catch()
        if found is None:
            return
        self._restore(found, ("model", "optimizer", "keras"))  # metrics may not be built yet
        self._replay = found if self._step else None
        epochs = self.params.get("epochs", self._epoch)
        self.model._initial_epoch = epochs if self._stopped else min(self._epoch, epochs)
        self._saved = found.path

    def _check(self, found):
        """Refuses a checkpoint that is not of this run or not where its data begin."""
        rate = run_state.learning_rate(self.model, found.arrays)
        check_same_run(found.state["run"], self._description, self.folder, rate)
        self._description = found.state["run"]
        if found.state["step"] and self._part is None:
            raise ValueError(
                f"The newest checkpoint in {self.folder} is inside an epoch, at step {found.state['step']} of epoch "
                f"{found.state['epoch']}. Go on with `for part in run.parts(epochs=...):`."
            )
        self._epoch, self._step = found.state["epoch"], found.state["step"]
        self._first = self._begin = found.state["begin"]
        self._check_length(found.state["steps"])

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if self._replay is None:
            self._step = self._first = self._begin = 0
        self._set_history()
        self.model._initial_epoch = None  # of this `fit` only
        self._call("on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        if self._replay is None:
            self._replayed = None
            self._begin = self._first + batch
            self._call("on_train_batch_begin", self._begin, logs)

    def on_train_batch_end(self, batch, logs=None):
        if self._replay is not None:  # the last steps before the checkpoint, done over: now all variables are there
            self._restore(self._replay)
            self._replayed = self._logs = self._replay.state["logs"]
            self._replay = None
            self._leave_if_asked(save=False)
            return
        settle_direction(self._called())
        self._call("on_train_batch_end", self._first + batch, logs)
        self._logs = logs
        before, self._step = self._step, min(self._first + batch + 1, self._length() or sys.maxsize)
        due = self.every is not None and self._step // self.every > before // self.every
        if due and not self._termination.asked:
            self._save(self._epoch, self._step)
        self._leave_if_asked(save=self._part is not None)

    def on_epoch_end(self, epoch, logs=None):
        if self._replayed and self._replayed.keys() != self.model.get_metrics_result().keys():
            logs.update(self._replayed)  # Keras took the logs of the step done over, and not the restored metrics
        self._call("on_epoch_end", epoch, logs)
        self._epochs.append(epoch)
        for name, value in (logs or {}).items():
            self._rows.setdefault(name, []).append(value)
        self._stopped = bool(self.model.stop_training)
        self._steps = self._length() or (None if self._stopped else self._step)  # it may have stopped inside
        self._save(epoch + 1, 0)
        self._leave_if_asked(save=False)

    def on_train_end(self, logs=None):
        self._training = False
        self.model._initial_epoch = None
        self._set_history()
        self._call("on_train_end", logs)
        self._leave_if_asked(save=False)
        self._termination.release(again=True)  # it may have come while this process waited for the others

    def on_test_begin(self, logs=None):
        if self._training:  # validation clears the metrics of the epoch
            self._metrics = run_state.read_values(self.model, ("metrics",))
        self._call("on_test_begin", logs)

    def on_test_end(self, logs=None):
        self._call("on_test_end", logs)

    def on_test_batch_begin(self, batch, logs=None):
        self._call("on_test_batch_begin", batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        self._call("on_test_batch_end", batch, logs)
        if self._training:
            self._leave_if_asked(save=self._part is not None, metrics=self._metrics)

    # Save and restore.

    def _save(self, epoch, step, metrics=None):
        if backend.process_index():
            return
        groups = [group for group in run_state.GROUPS if group != "metrics" or metrics is None]
        arrays = {**run_state.read_values(self.model, groups), **(metrics or {})}
        generators, more = run_state.read_generators()
        states, values, lost = read_callbacks(self.callbacks, self._arguments)
        history = {}
        for name, row in self._rows.items():
            try:
                history[name] = encode(row, values, f"history-{name}")
            except TypeError:
                lost = [*lost, f"logs {name!r}"]
        if lost and lost != self._lost:
            self._lost = lost
            warnings.warn(
                f"Checkpoints lack {', '.join(lost)} of the callbacks: expected plain values, NumPy arrays and "
                "generators and Keras variables, in lists, dicts and the like.",
                stacklevel=2,
            )
        state = {
            "epoch": epoch,
            "step": step,
            "begin": self._begin if step else 0,
            "steps": self._length() if step else self._steps,
            "stopped": self._stopped,
            "logs": _floats(self._logs) if step else None,
            "history": history,
            "epochs": self._epochs,
            "generators": generators,
            "callbacks": states,
            "run": self._description,
        }
        files = {name: path for name, path in callback_files(self.callbacks).items() if path.is_file()}
        self._saved = write_checkpoint(self.folder, {**arrays, **more, **values}, state, files)

    def _restore(self, found, groups=run_state.GROUPS):
        state, arrays = found.state, found.arrays
        run_state.set_values(self.model, arrays, groups)
        run_state.set_generators(state["generators"], arrays)
        set_callbacks(self.callbacks, state["callbacks"], arrays)
        if not backend.process_index():
            restore_files(self.callbacks, found.files)
        self._rows = {name: decode(row, arrays) for name, row in state["history"].items()}
        self._epochs, self._steps, self._stopped = list(state["epochs"]), state["steps"], state["stopped"]
        self._set_history()

    def _set_history(self):
        history = getattr(self.model, "history", None)
        if isinstance(history, keras.callbacks.History):
            history.history |= {name: list(values) for name, values in self._rows.items()}
            history.epoch = list(self._epochs)

    def _build(self):
        if not self.model.built:
            raise ValueError(
                "A run is restored into a model that is built. Call the model once, or give it an Input, before `fit`."
            )
        optimizer = self.model.optimizer
        if not optimizer.built:
            strategy = getattr(self.model, "distribute_strategy", None)
            if strategy is None:
                optimizer.build(self.model.trainable_variables)
            else:
                with strategy.scope():
                    optimizer.build(self.model.trainable_variables)

    def _length(self):
        """Steps of a whole epoch; None if the data do not tell."""
        steps = self.params.get("steps")
        return None if steps is None else self._first + steps

    def _check_length(self, stored):
        length = self._length()
        if stored is not None and length is not None and length != stored:
            raise ValueError(
                f"The run goes on at step {self._step} of epoch {self._epoch}, and an epoch has {stored} steps. "
                f"Expected: data of {stored - self._first} steps, from step {self._first} on. Received: "
                f"{length - self._first} steps. Give fit the same data as before, beginning at part.start."
            )

    def _last(self):
        saved = f"the last checkpoint is {self._saved}" if self._saved else "there is no checkpoint yet"
        if backend.process_index():
            saved = "checkpoints are the first process's"
        return f"left in epoch {self._epoch} before step {self._step}; {saved}. {self.AGAIN}"

    def _is_inside_fit(self, frame):
        """Whether `fit` is running; after an error in it nothing of this is called any more."""
        while frame is not None:
            if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is self._model:
                return True
            frame = frame.f_back
        return False

    @property
    def asked_to_leave(self):
        """Whether SIGTERM came. Then `fit` may fail because another process left, its step not having ended in time."""
        return self._termination.asked

    def _leave_if_asked(self, save, metrics=None):
        if backend.in_any_process(self._termination.asked):  # all leave after the same step
            if save:
                self._termination.wait()
                self._save(self._epoch, self._step, metrics)
            self._termination.leave()


def _floats(logs):
    """Of the logs of a step, those that are numbers."""
    found = {}
    for name, value in (logs or {}).items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = float(value)
    return found
