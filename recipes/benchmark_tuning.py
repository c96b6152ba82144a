"""Measure what a trial of `ABRAHyperModel` costs beyond its training, beside plain KerasTuner on a plain Keras model.

    python recipes/benchmark_tuning.py                     # embedded screen, tiny_resnet, 5 epochs a trial
    python recipes/benchmark_tuning.py --records RECORDS   # records that are there already

A trial is a build, a training and KerasTuner's own work. For each of the two, in turn and in one process: a search of a
few trials, and as many builds and trainings of the same model on the same data without a tuner. `overhead` is the first
over the second; it is to be no larger for ABRA than 1.1 times that of the plain model. Processor time; trials per hour
are of the clock on the wall. The last line of the output is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_tuner
from hparams import EMBEDDED
from methods import PERTURB, build_model, make_optimizer, softmax_loss
from tune_margin import EMBEDDED_SPACES, ScreenHyperModel

from keras_abra.tuning import DurableSearch
from keras_abra.tuning.hyper_model import SPACES
from tfrecords import build_records, class_names, read_manifest, read_records, write_screen


class PlainHyperModel(keras_tuner.HyperModel):
    """The same backbone, neck and records as a plain Keras model; the learning rate is searched."""

    def __init__(self, records, settings, cache):
        super().__init__()
        self.settings, self.names = settings, class_names(records)
        self.shape = tuple(read_manifest(records)["image_shape"])
        options = {"batch_size": settings["batch_size"], "cache": cache}
        self.train = read_records(records, "train", training=True, **options)
        self.val = read_records(records, "val", **options)

    def build(self, hp):
        keras.utils.set_random_seed(0)
        rate = hp.Float("learning_rate", 1e-3, 1e-2, sampling="log")
        model = build_model("erm", self.settings, self.shape, self.names)
        optimizer = make_optimizer({**self.settings, "learning_rate": rate}, int(self.train.cardinality()))
        model.compile(optimizer=optimizer, metrics=["accuracy"], **softmax_loss("erm"))
        return model

    def fit(self, hp, model, **kwargs):
        return model.fit(self.train, validation_data=self.val, shuffle=False, **kwargs)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="folder of TFRecords (default: the embedded screen's)")
    parser.add_argument("--epochs", type=int, default=5, help="of a trial")
    parser.add_argument("--trials", type=int, default=3, help="of a search")
    parser.add_argument("--repeats", type=int, default=5, help="searches of each; medians are taken over them")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        records = args.records or Path(folder) / "records"
        if args.records is None:
            write_screen(Path(folder) / "screen")
            build_records(Path(folder) / "screen", records)
        table = measure(args, records, Path(folder))
    print(f"{'':6} trials/hour  a trial, s  of it training  overhead")
    for name in ("plain", "abra"):
        row = table[name]
        print(f"{name:6} {row['trials_per_hour']:11.0f} {row['trial']:11.2f} {row['training']:15.2f} "
              f"{row['overhead']:9.3f}")  # fmt: skip
    print(f"overhead, ABRA / plain: {table['overhead_ratio']:.3f}")
    print(json.dumps(table))


def measure(args, records, folder):
    settings = {**EMBEDDED, "stages": PERTURB["tiny_resnet"], "epochs": args.epochs, "normalize": "image"}
    fixed = {name: settings[name] for name in SPACES if name not in ("margin", "scale", "stages")}
    fixed["stages"] = "+".join(settings["stages"])
    spaces = {name: EMBEDDED_SPACES[name] for name in ("margin", "scale")}
    abra = ScreenHyperModel(records, settings, "val", search=spaces, fixed=fixed)
    models = {
        "plain": (PlainHyperModel(records, settings, abra.cache), keras_tuner.RandomSearch),
        "abra": (abra, type("Search", (DurableSearch, keras_tuner.RandomSearch), {})),
    }
    seconds = {name: {"trial": [], "training": [], "wall": []} for name in models}
    for repeat in range(-1, args.repeats):  # the first is not counted
        for name, (hypermodel, kind) in models.items():
            project = {"directory": folder, "project_name": f"{name}{repeat}", "max_trials": args.trials, "seed": 1}
            tuner = kind(hypermodel, keras_tuner.Objective("val_accuracy", "max"), **project)
            start, wall = time.process_time(), time.perf_counter()
            tuner.search(epochs=args.epochs, verbose=0)
            trial, wall = time.process_time() - start, time.perf_counter() - wall
            tried = [tuner.oracle.trials[i].hyperparameters for i in tuner.oracle.end_order]
            start = time.process_time()
            for hp in tried:
                hypermodel.fit(hp, hypermodel.build(hp), epochs=args.epochs, verbose=0)
            training = time.process_time() - start
            if repeat >= 0:
                for key, value in (("trial", trial), ("training", training), ("wall", wall)):
                    seconds[name][key].append(value / args.trials)
            print(f"{name} {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
    table = {"backend": keras.backend.backend(), "epochs": args.epochs, "trials": args.trials, "repeats": args.repeats}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values["trial"], values["training"], strict=True)]
        table[name] = {
            "trial": statistics.median(values["trial"]),
            "training": statistics.median(values["training"]),
            "trials_per_hour": 3600 / statistics.median(values["wall"]),
            "overhead": statistics.median(ratios),
            "overheads": ratios,
        }
    table["overhead_ratio"] = table["abra"]["overhead"] / table["plain"]["overhead"]
    return table


if __name__ == "__main__":
    main()
