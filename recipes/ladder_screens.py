"""The screens of the ladder, and what a training sees of one."""

import re
import shutil
from pathlib import Path

import numpy as np
from contenders.mixup import mixup
from ladder_methods import TOGETHER
from normalization import normalization
from real_screens import write_digits, write_painted

from tfrecords import (
    batches_of_experiments,
    batches_within,
    build_records,
    cutmix,
    gain_and_bias,
    list_sites,
    mix_batches,
    read_records,
    write_screen,
)
from tfrecords.preprocess import augment
from tfrecords.screen_phenotype import CELL_TYPES


def screen_records(folder, screen, data=None):
    """Folder of the records of a screen; drawn and built if they are not there, anew where a kill cut that off.

    Args:
        folder: where screens are kept.
        screen: dict with `seed`, `batch_effect` (see `write_screen`), `image_size`, `treatments` and the numbers of
            experiments `train`, `val` and `test`, dealt to the four cell types in turn; or with `seed`, `kind` (one of
            `painted`, `mnist-usps`, `usps-mnist`) and options of `real_screens`.
        data: folder of the real images, if it must be built of those.

    Raises:
        ValueError: if there are no such images.
    """
    name = re.sub(r"[^a-z0-9_.]+", "-", "-".join(f"{key}{screen[key]}" for key in sorted(screen)))
    records, pictures = Path(folder) / name / "records", Path(folder) / name / "pictures"
    if not (records / "manifest.json").is_file():
        shutil.rmtree(Path(folder) / name, ignore_errors=True)
        build_records(pictures, records, channels=_draw(pictures, screen, data))
        shutil.rmtree(pictures)
    return records


def _draw(folder, screen, data):
    """Writes the pictures; gives the channels they have, None for RxRx1's six."""
    kind, options = screen.get("kind"), {key: value for key, value in screen.items() if key != "kind"}
    if kind == "painted":
        write_painted(folder, data, **options)
    elif kind is not None:
        write_digits(folder, data, kind.split("-")[0], **options)
        return (1,)
    else:
        counts = {split: options.pop(split) for split in ("train", "val", "test")}
        write_screen(folder, experiments={split: _deal(count) for split, count in counts.items()}, **options)
    return None


def _deal(count):
    return {name: len(range(i, count, len(CELL_TYPES))) for i, name in enumerate(CELL_TYPES) if i < count}


def training_data(records, settings, seed, classes, experiments):
    """The mini-batches of `fit`: the same order for every method that draws them at random.

    Args:
        records: folder.
        settings: of the method.
        seed: of order and augmentation.
        classes: number of classes.
        experiments: whether the model takes experiment ids.
    """
    size = settings["batch_size"]
    batches = {
        "random": lambda: None,
        "experiment": lambda: batches_within("experiment"),
        "plate": lambda: batches_within("plate"),
        "experiments": lambda: batches_of_experiments(TOGETHER),
    }[settings["batches"]]()
    data = read_records(
        records,
        "train",
        batch_size=size,
        training=True,
        seed=seed,
        batches=batches,
        drop_remainder=settings["batches"] != "plate",  # a plate has fewer sites than a mini-batch
        augment={"wilds": augment, "gain_and_bias": (augment, gain_and_bias), "none": None}[settings["augment"]],
        normalize=normalization(records, "train", settings["normalize"]),
        experiment_ids=experiments,
        cache="memory",
    )
    if "mix" not in settings:
        return data
    mix = {"mixup": mixup, "cutmix": cutmix}[settings["mix"]]
    return mix_batches(data, mix, classes, seed, alpha=settings["alpha"])


def batch_filled(records, settings, steps):
    """Mean size of the mini-batches of an epoch of so many steps, in `batch_size`: those of a plate are smaller."""
    if settings["batches"] != "plate":  # which are full
        return 1.0
    return len(list_sites(records, "train")) / (steps * settings["batch_size"])


def groups_together(sites, settings):
    """The group of each site, whose images a method with batch statistics takes together."""
    experiments = sites["experiment"].astype(str)
    return experiments + "-" + sites["plate"].astype(str) if settings["batches"] == "plate" else experiments


def split_images(records, split, settings, kinds=("treatment",)):
    """Table of a split's sites and their normalized images, in one order."""
    sites = list_sites(records, split, kinds)
    normalize = normalization(records, split, settings["normalize"], kinds)
    data = read_records(records, split, batch_size=128, kinds=kinds, metadata=True, normalize=normalize)
    return sites, np.concatenate([images for images, *_ in data.as_numpy_iterator()])
