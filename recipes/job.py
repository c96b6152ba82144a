"""What the jobs have in common: folders, training with the epoch chosen on val, prediction, results."""

import json
import sys
from pathlib import Path

import keras
import pandas as pd
import tensorflow as tf

from keras_abra import ABRAModel, NonFiniteLossError
from keras_abra.non_finite_loss import StopOnNonFiniteLoss
from tfrecords import list_sites, read_records, site_ids_of_step
from tfrecords.remote import is_remote


def folder_or_url(text):
    return text if is_remote(text) else Path(text)


def is_built(records):
    """Whether finished records are there: to be read, not built."""
    return is_remote(records) or (records / "manifest.json").is_file()


def make_output(folder, name):
    """The output folder, made: the given one, which must be new or empty, or `runs/NAME-0001` and so on."""
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"--output {folder} is in use: expected a new or empty folder. Choose another, or remove it."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (runs / f"{name}-{number:04d}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return runs / f"{name}-{number:04d}"


def find_sites(records, split, kinds):
    try:
        return list_sites(records, split, kinds)
    except ValueError as error:
        print(f"Not predicted: {error}")
        return None


def make_strategy():
    if keras.backend.backend() == "tensorflow" and len(tf.config.list_physical_devices("GPU")) > 1:
        strategy = tf.distribute.MirroredStrategy()
        print(f"MirroredStrategy on {strategy.num_replicas_in_sync} GPUs")
        return strategy
    return tf.distribute.get_strategy()


def fit(model, train, records, splits, options, settings, output, seed):
    """Trains, and leaves the model with the weights of the epoch that was best on the validation experiments."""
    callbacks = [keras.callbacks.CSVLogger(output / "history.csv")]
    validation = None
    if "val" in splits:
        validation = read_records(records, "val", **options)
        weights = output / "best.weights.h5"
        callbacks.append(
            keras.callbacks.ModelCheckpoint(weights, "val_accuracy", save_best_only=True, save_weights_only=True)
        )
        if settings["patience"]:
            callbacks.append(keras.callbacks.EarlyStopping("val_accuracy", patience=settings["patience"], mode="max"))
    verbose, epochs = 1 if sys.stdout.isatty() else 2, settings["epochs"]
    if not isinstance(model, ABRAModel):
        callbacks.append(StopOnNonFiniteLoss())
    try:
        model.fit(train, validation_data=validation, epochs=epochs, callbacks=callbacks, verbose=verbose, shuffle=False)
    except NonFiniteLossError as error:
        where = {"batch_size": options["batch_size"], "kinds": options["kinds"], "seed": seed}
        sites = site_ids_of_step(records, "train", epoch=error.epoch, step=error.step, **where)
        raise SystemExit(f"{error}\nSites of that step: {', '.join(sites)}") from error
    if validation is not None:
        model.load_weights(weights)
        weights.unlink()


def predict(model, records, split, options):
    """Logits of a split, in the order of `list_sites`."""
    images = read_records(records, split, metadata=True, **options).map(lambda image, *_: image)
    return model.predict(images, verbose=0)


def write_results(output, tables, metrics):
    pd.concat(tables or [pd.DataFrame()]).to_csv(output / "predictions.csv", index=False)
    temporary = output / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    temporary.replace(output / "metrics.json")
