"""A small run that is killed and started again; its end must be that of an unbroken one, byte for byte.

`python -m tests.killed_run RECORDS FOLDER REPLICAS CHAIN...` trains once unbroken, and then once for each CHAIN of
comma-separated events: a run is started, ended by the first event, started again, ended by the next, and at last left
to its end. Prints a JSON list with, for each chain, the exit codes and what differs at the end. Events:

- `step-N`: signal 9 at the end of the N-th step of the process;
- `save-N`: signal 9 at the N-th thing that the checkpoints do on disk;
- `time-X`: signal 9 after X seconds from the first checkpoint;
- `term-N`, `validation-N`: SIGTERM inside the N-th step, or inside the N-th batch of validation.

Each run is a fork of this process, which so imports the backend only once.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import keras
import numpy as np

from keras_abra import ResumableRun, run_state
from tests.replicas import two_replicas
from tests.tiny import tiny_backbone, tiny_model
from tfrecords import read_manifest, read_records

EPOCHS, EVERY, BATCH = 4, 3, 4
KINDS = ("treatment", "control")


class Events(keras.callbacks.Callback):
    """Ends the process at an event."""

    def __init__(self, kill, checkpoints):
        super().__init__()
        self.what, number = kill.split("-")
        self.left = float(number)
        if self.what == "save":
            sys.addaudithook(self.audit)
        if self.what == "time":
            threading.Thread(target=self.wait, args=(checkpoints,), daemon=True).start()

    def count(self, what, number=signal.SIGKILL):
        if what == self.what:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), number)

    def wait(self, checkpoints):
        while not any(checkpoints.glob("0*")):
            time.sleep(0.01)
        time.sleep(self.left)
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and "checkpoints" in str(arguments):
            self.count("save")

    def on_train_batch_begin(self, batch, logs=None):
        self.count("term", signal.SIGTERM)

    def on_train_batch_end(self, batch, logs=None):
        self.count("step")

    def on_test_batch_begin(self, batch, logs=None):
        self.count("validation", signal.SIGTERM)


def build(manifest, replicas):
    model = tiny_model(
        "domain",
        backbone=tiny_backbone(shape=tuple(manifest["image_shape"])),
        classes=len(manifest["classes"]),
        warmup=0.5,
        layer={"num_experiments": len(manifest["experiments"]["train"])},
    )
    more = {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 5}
    optimizer = keras.optimizers.AdamW(1e-2, **(more if replicas == 1 else {}))  # not under MirroredStrategy
    model.compile(optimizer, metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")])
    return model


def strategy_of(replicas):
    if replicas == 1:
        return contextlib.nullcontext()
    if keras.backend.backend() == "jax":
        assert len(keras.distribution.list_devices()) == replicas
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))
        return contextlib.nullcontext()
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return two_replicas().scope()


def train(records, folder, replicas, kill):
    folder.mkdir(exist_ok=True)
    manifest = read_manifest(records)
    with strategy_of(replicas):
        model = build(manifest, replicas)
    callbacks = [
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=10.0),
        keras.callbacks.CSVLogger(folder / "history.csv"),
        keras.callbacks.ModelCheckpoint(
            folder / "best.weights.h5", "val_loss", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
    ]
    run = ResumableRun(folder / "checkpoints", every=EVERY, callbacks=callbacks)
    events = Events(kill, folder / "checkpoints")
    validation = read_records(records, "val", batch_size=32, kinds=KINDS)
    options = {"batch_size": BATCH, "kinds": KINDS, "training": True, "experiment_ids": True, "seed": 4}
    for part in run.parts(EPOCHS):
        history = model.fit(
            read_records(records, "train", **options, **part.start),
            validation_data=validation,
            epochs=part.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[run, events],
        )
    np.savez(folder / "end.npz", **run_state.read_values(model))
    (folder / "end.json").write_text(json.dumps({"history": history.history, "epochs": history.epoch}))


def fork(*arguments):
    """Trains in a child; gives its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        code = 1
        try:
            train(*arguments)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(folder, other):
    """Names of what is not the same, byte for byte, at the end of two runs."""
    with np.load(folder / "end.npz") as a, np.load(other / "end.npz") as b:
        names = {*a.files} ^ {*b.files}
        names |= {n for n in a.files if n in b.files and (a[n].dtype, a[n].tobytes()) != (b[n].dtype, b[n].tobytes())}
        assert len(a.files) > 50
    files = ("end.json", "history.csv")
    return sorted(names) + [name for name in files if (folder / name).read_bytes() != (other / name).read_bytes()]


def main(records, folder, replicas, *chains):
    records, folder, replicas = Path(records), Path(folder), int(replicas)
    whole = folder / "whole"
    assert fork(records, whole, replicas, "none-0") == 0
    results = []
    for chain in chains:
        events = [*chain.split(","), "none-0"]
        codes = [fork(records, folder / chain, replicas, event) for event in events]
        results.append({"chain": chain, "codes": codes, "differences": differences(folder / chain, whole)})
        print(results[-1], file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
