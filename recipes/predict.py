"""Name the siRNA in the experiments of a screen, with a model that was trained before.

    python recipes/predict.py runs/rxrx1-0001/model.keras RECORDS --output predictions.csv
    python recipes/predict.py MODEL RECORDS --split val --ada-bn --output adapted.csv

RECORDS is a folder of `python -m tfrecords.build`, or `records` in the output folder of a job. Class names, and what
images are standardized by, are those of the job that trained the model (its `metrics.json`): the records may be of some
of its compounds, or have no labels. `--ada-bn` gives the batch normalizations the statistics of each experiment in turn
(`keras_abra.ada_bn`), without labels. Writes one row a site with the five most probable classes, with `--by-well FILE`
another table with a row a well (the mean of its sites' probabilities), with `--embeddings FILE` one with the embedding
that the classes are told by (of length 1), and prints the accuracy where labels are known. Wells of controls are left
out if the job was trained without them; `--controls` predicts and embeds them too. One process, one device.
"""

import argparse
import contextlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pandas as pd
from job import as_command, images_of, kinds_to_name
from normalization import NORMALIZATIONS, normalization
from options import folder_or_url
from scores import describe_sites, predictions_table, print_scores, score_labelled, wells_table
from weights import load_model

from keras_abra import ada_bn
from tfrecords import class_names, list_sites, read_manifest, read_records
from tfrecords.listing import KINDS
from tfrecords.manifest import channel_names


def main(argv=None):
    args = parse(argv)
    files = {"--output": args.output, "--by-well": args.by_well, "--embeddings": args.embeddings}
    files = {option: file for option, file in files.items() if file is not None}
    for option, file in files.items():
        check_new(f"{option} {file}", file)
        if twice := [other for other in files if other < option and files[other] == file]:
            raise ValueError(f"{option} and {twice[0]} are one file, {file}. Name two.")
    if args.embeddings is not None and args.embeddings.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--embeddings {args.embeddings}: expected a name that ends in .csv or .parquet.")
    if args.embeddings is not None and args.embeddings.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError("--embeddings: Parquet files need pyarrow: pip install pyarrow, or write a .csv file.")
    job = read_job(args.model, args.normalize)
    manifest = read_manifest(args.records)
    kinds = KINDS if args.controls else job["kinds"] or kinds_to_name(args.records)
    model, names = load(args.model, tuple(manifest["image_shape"]), job)
    if job["channels"] not in (None, found := channel_names(manifest)):
        print(
            f"WARNING: the model was trained on the channels {job['channels']}, and these records have {found}. Where "
            "that is more than other names for the same stains, its answers mean nothing."
        )
    if job["images"] not in (None, found := images_of(args.records)):
        print(
            f"WARNING: the model was trained on images of {job['images']}, and these records have {found}. Build them "
            "with the same options, unless another microscope needs others to come to the same scale and brightness."
        )
    counts = list_sites(args.records, args.split, kinds)["experiment"].value_counts()
    normalize = normalization(args.records, args.split, job["normalize"], kinds)
    left_out = sum(
        shard["count"] for shard in manifest["shards"] if shard["split"] == args.split and shard["kind"] not in kinds
    )
    if left_out:
        print(f"Not predicted: {left_out:,} sites of control wells (with --controls they are)")
    if args.ada_bn and counts.min() < 2:
        raise ValueError(f"--ada-bn needs 2 sites or more of an experiment; {counts.idxmin()} has one. Leave it out.")
    tables, logits, embeddings = [], [], []
    embed = args.embeddings and embedder(model)
    for experiment in sorted(counts.index):
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
            if embed:
                embeddings.append(embed(data))
        print(f"{experiment}: {len(tables[-1])} sites", flush=True)
    sites, logits = pd.concat(tables, ignore_index=True), np.concatenate(logits)
    sites["label"] = labels(sites["label"], class_names(args.records, kinds), names)
    write_table(args.output, predictions_table(sites, args.split, logits, names).to_csv)
    if args.by_well is not None:
        write_table(args.by_well, wells_table(sites, args.split, logits, names).to_csv)
    if embed:
        table = embeddings_table(sites, args.split, np.concatenate(embeddings))
        write_table(args.embeddings, table.to_parquet if args.embeddings.suffix == ".parquet" else table.to_csv)
    known = sites["label"].notna()
    if not known.all():
        print(f"Predicted, not scored: {(~known).sum()} sites without a label among the model's classes")
    if not known.any():
        return None
    scores = {"splits": {args.split: score_labelled(sites, logits)}}
    print_scores(scores, f"{args.model}{' with AdaBN' if args.ada_bn else ''}")
    return scores


def check_new(what, file):
    if file.exists():
        raise ValueError(f"{what} is there already. Name a new file, or remove it.")
    if not file.parent.is_dir():
        raise ValueError(f"{what}: there is no folder {file.parent}.")


def embedder(model):
    """Function of data that gives what the head sees, as vectors of length 1: `(sites, dim)`."""
    if hasattr(model, "embed"):
        return lambda data: model.embed(data, verbose=0)
    network = keras.Model(model.input, model.layers[-1].input)

    def embed(data):
        found = network.predict(data, verbose=0).astype("float32")
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    return embed


def embeddings_table(sites, split, embeddings):
    """Which site it is, as in the predictions, and `embedding_1` and so on, one row a site."""
    names = [f"embedding_{i + 1}" for i in range(embeddings.shape[1])]
    return pd.concat([describe_sites(sites, split), pd.DataFrame(embeddings, columns=names)], axis=1)


def write_table(file, write):
    """Whole or not at all, by a method of a table."""
    temporary = file.with_name(file.name + ".tmp")
    write(temporary, index=False)
    temporary.replace(file)
    print(f"Written to {file}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.keras, in the output folder of a job")
    parser.add_argument("records", type=folder_or_url, help="folder of TFRecords, or URL of one")
    parser.add_argument("--split", default="test", choices=("train", "id_test", "val", "test"), help="default: test")
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="as recipes/rxrx1.py (default: as the job did)")
    parser.add_argument("--ada-bn", action="store_true", help="batch normalizations with each experiment's statistics")
    parser.add_argument("--controls", action="store_true", help="wells of controls too, for --ada-bn as well")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--output", type=Path, required=True, help="new CSV file, a row a site")
    parser.add_argument("--by-well", type=Path, help="new CSV file, a row a well")
    parser.add_argument(
        "--embeddings",
        type=Path,
        help="new file (.csv, or .parquet, which needs pyarrow) of each site's embedding; takes a second pass",
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1 + args.ada_bn:
        parser.error(f"--batch-size must be at least {1 + args.ada_bn}; received {args.batch_size}")
    return args


def read_job(model, normalize):
    """What the job that wrote the model says of it: `normalize`, unless it is given; `classes`, their names in the
    model's order; the `kinds` of wells that it was trained on, their `channels`, and of the `images` how they came from
    the files (None where it does not say)."""
    file = model.with_name("metrics.json")
    if not file.is_file() and normalize is None:
        raise ValueError(f"There is no {file}, which would say how images were standardized. Pass --normalize.")
    try:
        job = json.loads(file.read_text()) if file.is_file() else {}
        job = {"normalize": normalize or job.get("normalize", "image")} | {
            name: job.get(name) for name in ("classes", "kinds", "channels", "images")
        }
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is none of a job: {error}") from error
    if job["normalize"] not in NORMALIZATIONS:
        raise ValueError(f"{file}: unknown normalization {job['normalize']!r}. Expected one of {NORMALIZATIONS}.")
    return job


def load(file, shape, job):
    """The model, if it takes such images, and the names of its classes."""
    model = load_model(file)
    found = tuple(model.backbone.input_shape[1:] if hasattr(model, "backbone") else model.input_shape[1:])
    if len(found) != len(shape) or any(a not in (None, b) for a, b in zip(found, shape, strict=True)):
        raise ValueError(f"{file} takes images of {found}, and the records have {shape}.")
    names = getattr(model, "class_names", None) or job["classes"]
    classes = model.num_classes if hasattr(model, "num_classes") else model.output_shape[-1]
    if not names or len(names) != classes:
        raise ValueError(
            f"The names of the {classes} classes of {file} are not known: expected them in the metrics.json beside it, "
            f"where recipes/rxrx1.py writes them; found {len(names) if names else 'none'}."
        )
    return model, [*map(str, names)]


def labels(column, names, own):
    """Labels of the records, whose classes have these names, as numbers of the model's `own` classes, by name."""
    place = {name: i for i, name in enumerate(own)}
    found = [place.get(str(names[label])) if pd.notna(label) else None for label in column]
    return pd.array(found, "Int64")


if __name__ == "__main__":
    as_command("predict.py", main)
