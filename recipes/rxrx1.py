"""Train on some experiments of a cellular screen, name the siRNA in experiments never seen.

    python recipes/rxrx1.py                                     # embedded synthetic screen, minutes on two CPU cores
    python recipes/rxrx1.py --data RXRX1 --records RECORDS      # the real screen: 125,510 sites, 49 GB, GPUs wanted

Without arguments: writes the embedded screen, builds TFRecords, trains ABRA with `model.fit`, chooses the epoch by
accuracy on the validation experiments, scores the test experiments once, prints a table. `--method erm | cutmix |
arcface | dsu` trains the same backbone and neck without ABRA (cutmix: plain training on images mixed by CutMix, which
`--cutmix` adds to the others). It trains on all devices that it finds, and in all processes that are started;
`--distribution` says otherwise (recipes/distribution.py):

    torchrun --nproc-per-node 8 recipes/rxrx1.py --data RXRX1 --records RECORDS     # torch, eight GPUs

A job that was stopped goes on with the same command line and `--resume`, from the checkpoints it left in `--output`, to
the same result, bit for bit on a CPU. SIGTERM makes it save and leave with exit code 75.

Output folder: `model.keras`, `history.csv`, `predictions.csv` (by site), `wells.csv` (by well: the mean of its sites'
probabilities), `classes.csv` (how often each class is told right) and, written last, `metrics.json`.
"""

import argparse
import functools
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "5")  # seconds: a log file is no place for a moving bar

import keras
from distribution import add_option, as_saved, distribute
from hparams import EMBEDDED, REAL, read_hparams
from job import (
    as_command,
    find_sites,
    fit,
    images_of,
    is_built,
    is_mixed,
    kinds_to_name,
    predict,
    predictions,
    say_unlabelled,
    source_of,
    write_results,
)
from methods import build_model, check_backbone, check_backbone_weights, make_optimizer, mix_training, softmax_loss
from normalization import NORMALIZATIONS, normalization
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
from scores import print_scores, score_labelled

from tfrecords import (
    build_records,
    class_names,
    keep_freed_memory,
    list_sites,
    read_manifest,
    read_records,
    write_screen,
)
from tfrecords.labels import LABELS
from tfrecords.manifest import channel_names
from tfrecords.screen_layout import layout

EMBEDDED_DATA = "embedded"
DATA_HELP = "RxRx1 release or Kaggle folder, or `embedded` (default): the embedded screen"

WHAT_HELPED = (
    "On the screens measured so far --method erm did what ABRA does, for less, and --normalize plate helped most "
    '(where every plate has a negative control): README, "What helps, as measured".'
)


def main(argv=None):
    args = parse(argv)
    check_data(args)
    distribution = distribute(args.distribution)
    settings = dict(EMBEDDED if is_embedded(args) else REAL)
    settings.update(read_hparams(args.hparams, settings))
    if args.method != "abra":  # those of a file are where ABRA perturbs
        settings["stages"] = None
    settings.update({k: v for k, v in vars(args).items() if k in settings and v is not None})
    if settings["weights"] == "none":
        settings["weights"] = None
    if args.perturb_after:
        settings["stages"] = args.perturb_after
    same = {"method": args.method, "cutmix": args.cutmix, "mixed_precision": args.mixed_precision}
    asked = {"recipe": "rxrx1", "seed": args.seed, "backend": keras.backend.backend()}
    asked |= same | settings | source_of(args)
    if metrics := distribution.first(lambda: finished(args.output, args.resume, asked)):
        return metrics
    check_backbone(settings["backbone"], args.method, settings["stages"])
    built = args.records is not None and is_built(args.records)
    channels = read_manifest(args.records)["image_shape"][-1] if built else None
    check_backbone_weights(settings["backbone"], settings["weights"], channels)
    check_on_nan(args.on_nan, args.method)
    check_of_method(args)
    distribution.say(settings["batch_size"])
    if args.method == "abra" and settings["normalize"] == "image":
        print(WHAT_HELPED)
    output = distribution.output(lambda: make_output(args.output, "rxrx1", args.resume))
    with at_work(output, alone=distribution.processes == 1):
        return train_and_score(args, settings, same, distribution, output)


def train_and_score(args, settings, same, distribution, output):
    """The job itself, in its output folder."""
    keras.utils.set_random_seed(args.seed)
    if args.mixed_precision:
        keras.config.set_dtype_policy(f"mixed_{args.mixed_precision}")

    with refusal_leaves_nothing(output):
        records = folder_or_url(str(distribution.first(lambda: prepare_records(args, settings, output))))
        kinds = kinds_to_name(records)
        names = class_names(records, kinds)
        splits = {s: sites for s in ("id_test", "val", "test") if (sites := find_sites(records, s, kinds)) is not None}
        labelled = say_unlabelled({"train": list_sites(records, "train", kinds), **splits})
        options = {"batch_size": settings["batch_size"], "kinds": kinds, "worker": distribution.worker}
        normalize = functools.cache(lambda split: normalization(records, split, settings["normalize"], kinds))
        read = functools.partial(
            *(read_records, records, "train"),
            training=True,
            labelled_only=True,
            seed=args.seed,
            normalize=normalize("train"),
            **options,
        )
        options = distribution.evaluation(options)
        evaluated = {split: options | {"normalize": normalize(split)} for split in splits}
        steps = int(read().cardinality())
        shape = tuple(read_manifest(records)["image_shape"])

    def read_train(**start):
        return mix_training(read(**start), same, len(names), args.seed, settings["cutmix_alpha"])

    print(
        f"{args.method} on {keras.backend.backend()}: {steps} steps an epoch, {len(names)} classes, images {shape}",
        flush=True,
    )

    with distribution.scope():
        keras.utils.set_random_seed(args.seed)  # what came before must not count
        model = build_model(args.method, settings, shape, names)
        optimizer = make_optimizer(settings, steps)
        model.compile(optimizer=optimizer, **distribution.accuracy(), **softmax_loss(args.method))
    options = evaluated.get("val", options)
    fit(model, read_train, records, labelled, options, settings, output, args.seed, same, distribution, args.on_nan)
    as_saved(model).save(output / "model.keras")

    metrics = {"recipe": "rxrx1", "method": args.method, "normalize": settings["normalize"]}
    metrics |= {"backend": keras.backend.backend(), "seed": args.seed, "splits": {}}
    tables = []
    for split, sites in splits.items():
        logits = predict(model, records, split, evaluated[split])
        tables.append(predictions(sites, split, logits, names))
        if split in labelled:
            metrics["splits"][split] = score_labelled(sites, logits)
    metrics |= {"channels": channel_names(read_manifest(records)), "images": images_of(records)}
    metrics |= {"kinds": [*kinds], "classes": names}
    metrics["options"] = same | settings | {"on_nan": args.on_nan} | source_of(args)
    write_results(output, tables, metrics)
    print_scores(metrics, mixed=is_mixed(records))
    print(f"Written to {output}")
    return metrics


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument(
        "--records",
        type=folder_or_url,
        help="folder of TFRecords to keep or reuse, or URL of one (default: in the output folder)",
    )
    parser.add_argument("--output", type=Path, help="new or empty folder (default: runs/rxrx1-0001 and so on, here)")
    parser.add_argument("--method", choices=("abra", "dsu", "arcface", "cutmix", "erm"), default="abra")
    parser.add_argument(
        "--cutmix", action="store_true", help="train abra, dsu or arcface on images mixed by CutMix, as cutmix is"
    )
    add_adversary(parser)
    parser.add_argument("--epochs", type=int, help="default: 45, or 90 with --data")
    parser.add_argument(
        "--backbone", help="tiny_resnet or a model of keras.applications (default: tiny_resnet, ResNet50 with --data)"
    )
    parser.add_argument(
        "--normalize",
        choices=NORMALIZATIONS,
        help="what images are standardized by: themselves, all images of their experiment, or the negative controls of "
        "their plate (default: themselves; of the embedded screen, plates)",
    )
    parser.add_argument("--image-size", type=int, help="pixels (default: as on disk, or 256 with --data)")
    parser.add_argument("--batch-size", type=int, help="global, over all devices (default: 32, or 72 with --data)")
    parser.add_argument("--hparams", type=Path, help="JSON of settings, as recipes/tune_margin.py writes it")
    parser.add_argument(
        "--label",
        choices=LABELS,
        help="what the classes are (default: sirna_id; of a screen of your own that is the column its description "
        "calls sirna)",
    )
    add_training(parser, "none")
    add_option(parser)
    add_mixed_precision(parser)
    args = parser.parse_args(argv)
    check_numbers(parser, args, ("epochs", "image_size", "batch_size"))
    return args


def check_data(args):
    """Reads `--data embedded`, the embedded screen by name; and refuses `--records` from which nothing can be read and
    for which no data are named: a mistyped folder would be filled with the embedded screen."""
    embedded = args.data == Path(EMBEDDED_DATA)
    args.data, named = (None, True) if embedded else (args.data, args.data is not None)
    if embedded and args.records is not None and is_built(args.records) and not is_embedded(args):
        raise ValueError(
            f"--data {EMBEDDED_DATA}: the records in {args.records} are of another screen. Leave --data out to train "
            "on that one, or name another --records."
        )
    if not named and args.records is not None and not is_built(args.records):
        raise ValueError(
            f"--records {args.records} holds no finished records. Name the --data to build them from, or --data "
            f"{EMBEDDED_DATA} for the embedded screen."
        )


def check_left_records(args, records):
    """Refuses what a job on other data left in the output folder: these would be trained on with the embedded screen's
    settings."""
    if args.records is None and read_manifest(records)["experiments"] != embedded_experiments():
        raise ValueError(
            f"The records in {records} are of another screen than the embedded one. Repeat --data, or name them by "
            "--records."
        )


def is_embedded(args):
    """Whether the job is the embedded screen: no data given, and no records of another screen."""
    if args.data is not None or args.records is None or not is_built(args.records):
        return args.data is None
    return read_manifest(args.records)["experiments"] == embedded_experiments()


def embedded_experiments():
    table = layout(seed=0)
    names = {split: sorted(set(rows["experiment"])) for split, rows in table.groupby("dataset")}
    return {split: names["train" if split == "id_test" else split] for split in ("train", "id_test", "val", "test")}


def prepare_records(args, settings, output):
    records = args.records or output / "records"
    if args.data is None and is_built(records):
        check_left_records(args, records)
        manifest = read_manifest(records)
        built = {"label": manifest["options"]["label"], "image_size": manifest["image_shape"][0]}
        for name, asked in (("label", args.label), ("image_size", args.image_size)):
            if asked is not None and asked != built[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} {asked}: the records in {records} were built with {built[name]}. "
                    "Leave it out, or give another --records folder and --data to build from."
                )
        if built["image_size"] > 2 * (settings["image_size"] or built["image_size"]):
            print(
                f"WARNING: the images in {records} have {built['image_size']} pixels; the settings are made for "
                f"{settings['image_size']}. For less memory and time build records with --image-size or --crop."
            )
        return records
    source = args.data or embedded_screen(output)
    build_records(source, records, image_size=settings["image_size"], label=args.label or "sirna_id")
    return records


def embedded_screen(output):
    """The folder of the embedded screen, drawn if it is not there."""
    source = output / "screen"
    if not (source / "metadata.csv").is_file():
        shutil.rmtree(source, ignore_errors=True)  # half-written by a job that was stopped
        write_screen(source)
    return source


if __name__ == "__main__":
    keep_freed_memory()
    as_command("rxrx1.py", main)
