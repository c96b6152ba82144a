"""Name the siRNA in the experiments of a screen, with a model that was trained before.

    python recipes/predict.py runs/rxrx1-0001/model.keras RECORDS --output predictions.csv
    python recipes/predict.py MODEL RECORDS --split val --ada-bn --output adapted.csv

RECORDS is a folder of `python -m tfrecords.build`, or `records` in the output folder of a job. Images are standardized
as in the job that trained the model, by what its `metrics.json` says. `--ada-bn` gives the batch normalizations the
statistics of each experiment in turn (`keras_abra.ada_bn`), without labels. Writes one row a site with the five most
probable classes, and prints the accuracy where labels are known. One process, one device.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pandas as pd
from job import folder_or_url
from normalization import NORMALIZATIONS, normalization
from scores import predictions_table, print_scores, score

from keras_abra import ada_bn
from tfrecords import class_names, list_sites, read_manifest, read_records


def main(argv=None):
    args = parse(argv)
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already. Name a new file, or remove it.")
    if not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}.")
    manifest = read_manifest(args.records)
    kinds = ("treatment",) if manifest["options"]["label"] == "sirna_id" else ("treatment", "control")
    names = class_names(args.records, kinds)
    model = load(args.model, tuple(manifest["image_shape"]), names)
    normalize = normalization(args.records, args.split, args.normalize or normalization_of_job(args.model))
    tables, logits = [], []
    for experiment in sorted(set(list_sites(args.records, args.split, kinds)["experiment"])):
        tables.append(list_sites(args.records, args.split, kinds, experiment))
        data = read_records(
            args.records,
            args.split,
            batch_size=args.batch_size,
            kinds=kinds,
            experiments=experiment,
            normalize=normalize,
            metadata=True,
        ).map(lambda image, *_: image)
        with ada_bn(model, data) if args.ada_bn else contextlib.nullcontext():
            logits.append(model.predict(data, verbose=0))
        print(f"{experiment}: {len(tables[-1])} sites", flush=True)
    sites, logits = pd.concat(tables, ignore_index=True), np.concatenate(logits)
    temporary = args.output.with_name(args.output.name + ".tmp")
    predictions_table(sites, args.split, logits, names).to_csv(temporary, index=False)
    temporary.replace(args.output)
    print(f"Written to {args.output}")
    if sites["label"].isna().any():
        return None
    scores = {"splits": {args.split: score(sites, logits)}}
    print_scores(scores, f"{args.model}{' with AdaBN' if args.ada_bn else ''}")
    return scores


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.keras, in the output folder of a job")
    parser.add_argument("records", type=folder_or_url, help="folder of TFRecords, or URL of one")
    parser.add_argument("--split", default="test", choices=("train", "id_test", "val", "test"), help="default: test")
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="as recipes/rxrx1.py (default: as the job did)")
    parser.add_argument("--ada-bn", action="store_true", help="batch normalizations with each experiment's statistics")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--output", type=Path, required=True, help="new CSV file")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1; received {args.batch_size}")
    return args


def load(file, shape, names):
    """The model, if it fits the records."""
    if not file.is_file():
        raise ValueError(f"{file} is no file. Expected the model.keras of a job that ended.")
    try:
        model = keras.models.load_model(file, compile=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is no model that can be loaded: {error}") from error
    found = tuple(model.backbone.input_shape[1:] if hasattr(model, "backbone") else model.input_shape[1:])
    if found != shape:
        raise ValueError(f"{file} takes images of {found}, and the records have {shape}.")
    own = getattr(model, "class_names", None)
    classes = model.num_classes if hasattr(model, "num_classes") else model.output_shape[-1]
    if classes != len(names) or (own is not None and [*own] != [*map(str, names)]):
        raise ValueError(f"{file} was trained on other classes ({classes}) than the records have ({len(names)}).")
    return model


def normalization_of_job(model):
    """What the job says that wrote the model."""
    metrics = model.with_name("metrics.json")
    if not metrics.is_file():
        raise ValueError(f"There is no {metrics}, which would say how images were standardized. Pass --normalize.")
    try:
        return json.loads(metrics.read_text()).get("normalize", "image")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{metrics} is none of a job ({error}). Pass --normalize.") from error


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"predict.py: error: {error}")
