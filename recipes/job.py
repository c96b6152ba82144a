"""What the jobs have in common: training with the epoch chosen on val, prediction, results."""

import hashlib
import json
import os
import sys
from pathlib import Path

import keras
import pandas as pd
import tensorflow as tf
from distribution import leave
from methods import SOFTMAX, label_alike
from output_folder import CHECKPOINTS, remove_checkpoints
from scores import classes_table, predictions_table, wells_table

from keras_abra import NonFiniteLossError, ResumableRun, SkipNonFinite
from keras_abra.fit_arguments import symbolic_batch
from keras_abra.non_finite_loss import StopOnNonFiniteLoss
from tfrecords import class_names, list_sites, read_manifest, read_records, site_ids_of_step
from tfrecords.image_batches import complaint_in
from tfrecords.listing import KINDS
from tfrecords.remote import is_remote
from tfrecords.whole import write_whole

EVERY = 200  # steps between checkpoints inside an epoch


def as_command(name, main):
    """Runs a recipe from the command line. What the user can mend, a damaged record among it, is a line there."""
    try:
        main()
        leave()
    except tf.errors.InvalidArgumentError as error:
        if (complaint := complaint_in(error)) is None:
            raise
        sys.exit(f"{name}: error: {complaint}")
    except (ValueError, OSError, ImportError) as error:  # the last two: records at a URL, a full disk
        sys.exit(f"{name}: error: {error}")


def is_built(records):
    """Whether finished records are there: to be read, not built."""
    return is_remote(records) or (records / "manifest.json").is_file()


def kinds_to_name(records):
    """The kinds of wells whose class is named: treatments, or all where the label is another than the siRNA."""
    return ("treatment",) if read_manifest(records)["options"]["label"] == "sirna_id" else KINDS


def is_mixed(records):
    """Whether test has experiments that are trained on: by WILDS's `mixed-to-test`."""
    experiments = read_manifest(records)["experiments"]
    return bool({*experiments["test"]} & {*experiments["train"]})


def images_of(records):
    """How the records' images came from the files: what a model must be given alike."""
    options = read_manifest(records)["options"]
    return {name: options.get(name) for name in ("crop", "image_size", "intensity")}


def hash_shards(records):
    """What tells these records from all others."""
    shards = json.dumps(read_manifest(records)["shards"])  # their checksums among it
    return hashlib.sha256(shards.encode()).hexdigest()


def source_of(args):
    """What the command line says of the data: another job is one on other data, too."""
    records = args.records if args.records is None or is_remote(args.records) else str(args.records.resolve())
    data = None if args.data is None else str(args.data.resolve())
    return {"data": data, "records": records, "label": getattr(args, "label", None)}


def find_sites(records, split, kinds):
    """The sites of a split, or None where none were built. Raises what is wrong with those that were."""
    if any(shard["split"] == split and shard["kind"] in kinds for shard in read_manifest(records)["shards"]):
        return list_sites(records, split, kinds)
    print(f"Not predicted: the records in {records} have no sites of the split {split} (of {' or '.join(kinds)})")
    return None


def fit(model, read_train, records, splits, options, settings, output, seed, same, distribution, on_nan="stop"):
    """Trains, and leaves the model with the weights of the epoch that was best on the validation experiments. Goes on
    from the checkpoints in `output`, if there are any.

    Args:
        model: compiled.
        read_train: function of `first_epoch` and `first_step` that gives the training data from there on.
        records, splits, options: the folder, the splits with labels, and how `read_records` is called.
        settings: with `epochs` and `patience`.
        output: folder.
        seed: of the order of training.
        same: dict of what must not have changed when the job goes on.
        distribution: see `distribution.py`.
        on_nan: whether a step with a loss or gradient that is not finite ends the job ("stop") or is left out ("skip").
    """
    callbacks = [keras.callbacks.CSVLogger(output / "history.csv")]
    validation = None
    if "val" not in splits:
        early = ", and training does not end early" if settings["patience"] else ""
        print(f"No epoch can be chosen: val has no sites that are scored. The last epoch's weights are kept{early}.")
    else:
        validation = read_records(records, "val", labelled_only=True, **options)
        validation = label_alike(validation, same, len(class_names(records, options["kinds"])))
        weights = output / "best.weights.h5"
        callbacks.append(
            keras.callbacks.ModelCheckpoint(weights, "val_accuracy", save_best_only=True, save_weights_only=True)
        )
        if settings["patience"]:
            callbacks.append(keras.callbacks.EarlyStopping("val_accuracy", patience=settings["patience"], mode="max"))
    verbose, epochs = 1 if sys.stdout.isatty() else 2, settings["epochs"]
    where = {"batch_size": options["batch_size"], "kinds": options["kinds"], "seed": seed, "labelled_only": True}

    def sites_of(epoch, step):
        return f"Sites of that step: {', '.join(site_ids_of_step(records, 'train', epoch=epoch, step=step, **where))}"

    callbacks.insert(0, SkipNonFinite(explain=sites_of) if on_nan == "skip" else StopOnNonFiniteLoss())
    same = {**same, **settings, "seed": seed, "records": hash_shards(records)}
    checkpoints = Path(distribution.first(lambda: (output / CHECKPOINTS).resolve()))  # of which all processes go on
    if not checkpoints.is_dir():
        raise ValueError(
            f"{checkpoints.parent}, the output folder of the first process, is not there in this one. All machines "
            "must share it, as they share the records: name a shared --output."
        )
    run = ResumableRun(checkpoints, every=EVERY, callbacks=callbacks, options=same)
    run.AGAIN = f"With --output {checkpoints.parent} --resume the job goes on."
    if position := run.position:
        print(f"Goes on in epoch {position[0]} at step {position[1]} (both from 0)", flush=True)
    common = {"validation_data": validation, "callbacks": [run], "verbose": verbose, "shuffle": False}
    with distribution.scope():  # which else uses up the data of a short epoch: Keras looks at a first batch
        model._symbolic_build(data_batch=symbolic_batch(read_train()))
    model._maybe_symbolic_build = lambda **_: None  # under a TensorFlow strategy it looks whether all is built or not
    try:
        for part in run.parts(epochs):
            model.fit(read_train(**part.start), epochs=part.epochs, **common)
    except NonFiniteLossError as error:
        can_skip = on_nan == "stop" and same["method"] not in SOFTMAX
        hint = "\nWith --resume --on-nan skip the job goes on, and leaves such steps out." if can_skip else ""
        raise SystemExit(f"{error}\n{sites_of(error.epoch, error.step)}{hint}") from error
    except Exception as error:
        if not run.asked_to_leave:
            raise
        print(f"Told to leave, and a step failed, as it does when other processes are gone: {error}", file=sys.stderr)
        raise SystemExit(run.EXIT_CODE) from error
    if validation is not None:
        model.load_weights(distribution.first(lambda: weights.resolve()))
        distribution.wait()
        weights.unlink(missing_ok=True)


def predict(model, records, split, options):
    """Logits of a split, in the order of `list_sites`."""
    images = read_records(records, split, metadata=True, **options).map(lambda image, *_: image)
    sites = len(list_sites(records, split, options["kinds"]))
    return model.predict(images, verbose=0)[:sites]  # behind them: what fills the last batch up


def say_unlabelled(splits):
    """Prints what is left out of training and scores, and gives the splits that have a label."""
    for split, sites in splits.items():
        if unknown := sites["label"].isna().sum():
            what = "Not trained on" if split == "train" else "Predicted, not scored"
            print(f"{what}: {unknown} of {len(sites)} sites of {split}, which have no label")
    return [split for split, sites in splits.items() if sites["label"].notna().any()]


def predictions(sites, split, logits, names):
    """The tables of `write_results` of a split."""
    return [make(sites, split, logits, names) for make in (predictions_table, wells_table)]


def write_results(output, tables, metrics):
    """Writes `predictions.csv`, `wells.csv` and `classes.csv` of the splits' `predictions` and, last, the metrics."""
    if tables:
        sites, wells = (pd.concat(of_splits, ignore_index=True) for of_splits in zip(*tables, strict=True))
        named = {"predictions": sites, "wells": wells, "classes": classes_table(sites, wells)}
    else:
        named = dict.fromkeys(("predictions", "wells", "classes"), pd.DataFrame())
    for name, table in named.items():
        table.to_csv(output / f"{name}.csv", index=False)
    for path in output.iterdir():  # before the mark that they are whole, and before the checkpoints go
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    write_whole(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    remove_checkpoints(output)
