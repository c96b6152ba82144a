"""RxRx1-WILDS as published: name the siRNA, of all 1,139, in experiments never seen.

    python recipes/rxrx1_wilds.py                                 # embedded synthetic screen, minutes on two CPU cores
    python recipes/rxrx1_wilds.py --data RXRX1 --records RECORDS  # 125,510 sites, 25 GB of records, a GPU wanted

`--data` is RxRx1-WILDS's own folder or, since that cannot be downloaded any more, RxRx1's or Kaggle's: its first three
channels, cut to the centre 256 of 512 pixels, are the same images. Treatments and controls are trained on and scored,
each site by itself; the epoch is chosen by `acc_avg` on the OOD validation experiments; test is scored once. `erm` is
WILDS's baseline (published: val 19.4 %, test 29.9 %, id_test 35.9 %); the other methods have the neck of rxrx1.py.

A job that was stopped goes on with the same command line and `--resume` (see rxrx1.py).

Output folder: `rxrx1_split:SPLIT_seed:SEED_epoch:best_pred.csv` for val, test and id_test, which the WILDS leaderboard
takes (a class a line, in the order of metadata.csv), `model.keras`, `history.csv` and, written last, `metrics.json`.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "5")  # seconds: a log file is no place for a moving bar

import keras
import numpy as np
from coupled_adam import CoupledAdam
from distribution import add_option, as_saved, distribute, functional
from hparams import EMBEDDED, REAL
from job import (
    as_command,
    find_sites,
    fit,
    images_of,
    is_built,
    is_mixed,
    predict,
    predictions,
    say_unlabelled,
    source_of,
    write_results,
)
from methods import build_model, check_backbone, check_backbone_weights, make_backbone, make_schedule, softmax_loss
from options import (
    add_adversary,
    add_mixed_precision,
    add_training,
    check_numbers,
    check_of_method,
    check_on_nan,
    folder_or_url,
)
from output_folder import at_work, finished, make_output, refusal_leaves_nothing
from rxrx1 import check_data, check_left_records, embedded_screen, is_embedded
from scores import print_scores, score_labelled
from wilds_scores import count_lacking, in_table_order, prediction_file, wilds_metrics

from tfrecords import build_records, class_names, keep_freed_memory, read_manifest, read_records
from tfrecords.listing import KINDS
from tfrecords.manifest import channel_names
from tfrecords.sources import find_layout

CHANNELS, CROP = (1, 2, 3), 256
# p-lambda/wilds, examples/configs/datasets.py: ResNet-50 with ImageNet's weights, batch 72, Adam 1e-3, weight decay
# 1e-5 (coupled), 5,415 steps of warm-up, cosine, 90 epochs. For the other methods also those of rxrx1.py.
PUBLISHED = REAL | {
    "backbone": "ResNet50",
    "weights": "imagenet",
    "epochs": 90,
    "batch_size": 72,
    "learning_rate": 1e-3,
    "weight_decay": 1e-5,
    "warmup_steps": 5415,
}
SMALL = EMBEDDED | {"normalize": "image", "weight_decay": 1e-5, "epochs": 30}


def main(argv=None):
    args = parse(argv)
    check_data(args)
    distribution = distribute(args.distribution)
    settings = dict(SMALL if is_embedded(args) else PUBLISHED)
    settings.update({name: value for name, value in vars(args).items() if name in settings and value is not None})
    if args.perturb_after:
        settings["stages"] = args.perturb_after
    settings["weights"] = which_weights(args.weights, settings["backbone"])
    same = {"method": args.method, "mixed_precision": args.mixed_precision}
    asked = {"recipe": "rxrx1_wilds", "seed": args.seed, "backend": keras.backend.backend()}
    asked |= same | settings | source_of(args)
    if metrics := distribution.first(lambda: finished(args.output, args.resume, asked)):
        return metrics
    check_backbone(settings["backbone"], args.method, settings["stages"])
    check_backbone_weights(settings["backbone"], settings["weights"], len(CHANNELS))
    check_on_nan(args.on_nan, args.method)
    check_of_method(args)
    distribution.say(settings["batch_size"])
    output = distribution.output(lambda: make_output(args.output, "rxrx1_wilds", args.resume))
    with at_work(output, alone=distribution.processes == 1):
        return train_and_score(args, settings, same, distribution, output)


def train_and_score(args, settings, same, distribution, output):
    """The job itself, in its output folder."""
    keras.utils.set_random_seed(args.seed)
    if args.mixed_precision:
        keras.config.set_dtype_policy(f"mixed_{args.mixed_precision}")

    with refusal_leaves_nothing(output):
        records, table = distribution.first(lambda: prepare_records(args, output))
        records = folder_or_url(str(records))
        check_records(records, is_embedded(args))
        names, values = class_names(records, KINDS), [row["value"] for row in read_manifest(records)["classes"]]
        splits = {s: sites for s in ("id_test", "val", "test") if (sites := find_sites(records, s, KINDS)) is not None}
        for sites in splits.values() if table is not None else ():
            in_table_order(sites, table)  # now, and not after hours of training
        labelled = [split for split in say_unlabelled(splits) if has_labelled_treatments(split, splits[split])]
        options = {"batch_size": settings["batch_size"], "kinds": KINDS, "worker": distribution.worker}
        read_train = functools.partial(read_records, records, "train", training=True, seed=args.seed, **options)
        options = distribution.evaluation(options)
        steps, shape = int(read_train().cardinality()), tuple(read_manifest(records)["image_shape"])
    print(f"{args.method} on {keras.backend.backend()}: {steps} steps an epoch, {len(names)} classes, images {shape}")

    with distribution.scope():
        keras.utils.set_random_seed(args.seed)  # what came before must not count
        model = (
            plain(settings, shape, names) if args.method == "erm" else build_model(args.method, settings, shape, names)
        )
        optimizer = CoupledAdam(make_schedule(settings, steps), l2=settings["weight_decay"])
        model.compile(optimizer=optimizer, **distribution.accuracy(), **softmax_loss(args.method))
    fit(model, read_train, records, labelled, options, settings, output, args.seed, same, distribution, args.on_nan)
    # Saved with an optimizer that not only this recipe knows.
    model.compile("adam", metrics=["accuracy"], **softmax_loss(args.method))
    model.optimizer.build(model.trainable_variables)
    as_saved(model).save(output / "model.keras")

    metrics = {"recipe": "rxrx1_wilds", "method": args.method, "backend": keras.backend.backend(), "seed": args.seed}
    metrics |= {"splits": {}, "wilds": {}}
    tables = []
    for split, sites in splits.items():
        logits = predict(model, records, split, options)
        tables.append(predictions(sites, split, logits, names))
        if table is not None:
            predicted = np.asarray(values)[logits.argmax(axis=1)[in_table_order(sites, table)]]
            np.savetxt(output / prediction_file(split, args.seed), predicted, fmt="%d")
            lacking = count_lacking(records, split)
            if lacking:
                print(
                    f"WARNING: {prediction_file(split, args.seed)} has {len(predicted):,} lines and not "
                    f"{len(predicted) + lacking:,}, which WILDS's evaluation wants: the other sites are not in the "
                    "records (excluded.csv)."
                )
        if split in labelled:
            metrics["splits"][split] = score_labelled(sites, logits)
            metrics["wilds"][split] = wilds_metrics(metrics["splits"][split])
    metrics |= {
        "normalize": "image",
        "images": images_of(records),
        "channels": channel_names(read_manifest(records)),
        "kinds": [*KINDS],
        "classes": names,
    }
    metrics["options"] = same | settings | {"on_nan": args.on_nan} | source_of(args)
    write_results(output, tables, metrics)
    print_scores(metrics, mixed=is_mixed(records))
    print(f"Written to {output}")
    return metrics


def has_labelled_treatments(split, sites):
    """Whether the split can be scored as WILDS does; of Kaggle's test experiments controls alone have labels."""
    treatments = sites[sites["well_type"] == "treatment"]
    if not len(treatments) or treatments["label"].notna().any():
        return True
    print(f"Not scored: of {split} controls alone have labels, which are other classes than WILDS's figures are of.")
    return False


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="RxRx1-WILDS, RxRx1 or Kaggle folder, or `embedded` (default)")
    parser.add_argument("--records", type=folder_or_url, help="folder of TFRecords to keep or reuse, or URL of one")
    parser.add_argument("--output", type=Path, help="new or empty folder (default: runs/rxrx1_wilds-0001 and so on)")
    parser.add_argument("--method", choices=("erm", "arcface", "dsu", "abra"), default="erm")
    add_adversary(parser)
    parser.add_argument("--epochs", type=int, help="default: 90, or 30 on the embedded screen")
    parser.add_argument("--backbone", help="tiny_resnet or a model of keras.applications (default: ResNet50)")
    parser.add_argument("--batch-size", type=int, help="global, over all devices (default: 72)")
    add_training(parser, "imagenet; of tiny_resnet, none")
    add_option(parser)
    add_mixed_precision(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, ("epochs", "batch_size"))
    return args


def which_weights(asked, backbone):
    """The weights that the backbone begins with, as text, or None; of keras.applications by default ImageNet's."""
    if asked is None:
        return None if backbone == "tiny_resnet" else "imagenet"
    return None if asked == "none" else asked


def check_records(records, embedded):
    """Refuses records of other classes or splits than WILDS's, and points out images that are not WILDS's."""
    manifest = read_manifest(records)
    for name, expected in (("label", "sirna_id"), ("splits", "wilds")):
        if (found := manifest["options"][name]) != expected:
            raise ValueError(f"The records in {records} were built with --{name} {found}; RxRx1-WILDS's is {expected}.")
    shape, channels = tuple(manifest["image_shape"]), channel_names(manifest)
    if not embedded and (shape, channels) != ((CROP, CROP, len(CHANNELS)), [*CHANNELS]):
        print(
            f"WARNING: the records in {records} have images of {shape}, channels {channels}. RxRx1-WILDS's have "
            f"{CROP} x {CROP} pixels of channels {[*CHANNELS]}: scores and prediction files are not to be compared "
            "with its own."
        )


def prepare_records(args, output):
    """The records, built if need be, and metadata.csv for the order of the prediction files, if there is one."""
    records, source = args.records or output / "records", args.data
    if args.data is None and is_built(records):
        check_left_records(args, records)
        source = Path(read_manifest(records)["source"])
    elif args.data is None:
        source = embedded_screen(output)
        build_records(source, records, channels=CHANNELS)
    else:
        cut = {} if find_layout(source) == "wilds" else {"channels": CHANNELS, "crop": CROP}
        build_records(source, records, **cut)
    if not (source / "metadata.csv").is_file():
        print(f"No prediction files: {source}/metadata.csv, which gives their order, is not there.")
        return records, None
    return records, source / "metadata.csv"


def plain(settings, shape, names):
    """WILDS's network: the backbone, its mean over positions, and a linear layer."""
    backbone = make_backbone(settings["backbone"], shape, settings["weights"])
    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    return functional(backbone.input, keras.layers.Dense(len(names), dtype="float32")(x))


if __name__ == "__main__":
    keep_freed_memory()
    as_command("rxrx1_wilds.py", main)
