"""One cell of the ladder: one method trained on one screen with one seed, and scored."""

import time

import keras
import numpy as np
import pandas as pd
from contenders.batch_statistics import predict_by_group, with_batch_statistics
from contenders.typical_variation import nearest_class, typical_variation
from converge import Converge
from ladder_contenders import build_contender, more_compute, takes_experiments
from ladder_screens import batch_filled, groups_together, screen_records, split_images, training_data
from scores import embedding_quality, score

from keras_abra import NonFiniteLossError
from keras_abra.non_finite_loss import StopOnNonFiniteLoss
from tfrecords import class_names, read_manifest

WARMUP_SHARE = 0.1  # of the fewest steps: the margin's ramp, as in the main job


def run_cell(cell, screens):
    """Trains and scores.

    Args:
        cell: dict with the method's `settings`, `screen` (see `ladder_screens.screen_records`), `seed`, `rule` (the
            numbers of `Converge`) and `splits`, those that are scored. Test images are read only if `test` is one.
        screens: folder of screens.

    Returns:
        dict of plain values: `splits` (accuracy, by well, cell type and experiment), `test_time` (the same of `test`
        with AdaBN, nearest class and, where there are controls, TVN), `embedding` (effective rank and separation of
        classes on `test`), epochs, steps, seconds.
    """
    settings, rule = cell["settings"], cell["rule"]
    records = screen_records(screens, cell["screen"])
    manifest = read_manifest(records)
    shape, classes = tuple(manifest["image_shape"]), len(class_names(records, ("treatment",)))
    cell_types = [name.split("-")[0] for name in manifest["experiments"]["train"]]
    train = training_data(records, settings, cell["seed"], classes, takes_experiments(settings))
    steps = int(train.cardinality())
    warmup = round(WARMUP_SHARE * steps * (rule["warmup"] + rule["least"]))

    keras.utils.clear_session()
    keras.utils.set_random_seed(cell["seed"])
    contender = build_contender(settings, shape, classes, cell_types, warmup)
    network = contender.network
    logits = keras.Model(network.input, network.outputs[0])
    adaptive = with_batch_statistics(logits)
    images = {split: split_images(records, split, settings) for split in cell["splits"] if split != "test"}

    def predict(split):
        sites, pixels = images[split]
        if settings.get("batch_statistics"):
            return predict_by_group(adaptive, pixels, groups_together(sites, settings))
        return logits.predict(pixels, batch_size=128, verbose=0)

    def accuracy():
        return float(np.mean(predict("val").argmax(1) == images["val"][0]["label"].to_numpy("int64")))

    stretch = more_compute(settings, shape, classes, warmup)
    converge = Converge(accuracy, settings["learning_rate"], **rule, stretch=stretch)
    diverged = False
    try:
        contender.model.fit(
            train, epochs=converge.longest, callbacks=[converge, StopOnNonFiniteLoss()], verbose=0, shuffle=False
        )
    except NonFiniteLossError:
        diverged = True  # scored as it is: at chance
    if "test" in cell["splits"]:
        images["test"] = split_images(records, "test", settings)
    epochs = len(converge.seconds)
    result = {
        "splits": {split: score(images[split][0], np.nan_to_num(predict(split))) for split in cell["splits"]},
        "epochs": epochs,
        "held": None if converge.fall is None else converge.fall - rule["warmup"],
        "at_most": converge.at_most,
        "steps": epochs * steps,
        "step_seconds": float(np.median(converge.seconds[1:] or converge.seconds or [0.0]) / steps),
        "step_cost": contender.cost and contender.cost * batch_filled(records, settings, steps),
        "diverged": diverged,
        "val_by_epoch": converge.accuracies,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "backend": keras.backend.backend(),
    }
    if "test" in cell["splits"] and not diverged:
        embed = _embedder(network, settings)
        result["embedding"] = embedding_quality(embed(*images["test"]), images["test"][0]["label"])
        result["test_time"] = _test_time(records, settings, embed, adaptive, images["test"], classes)
    return result


def _embedder(network, settings):
    """Function of (sites, images) that gives embeddings, with batch statistics if that is how the method predicts."""
    model = keras.Model(network.input, network.outputs[1])
    if not settings.get("batch_statistics"):
        return lambda sites, pixels: model.predict(pixels, batch_size=128, verbose=0)
    adaptive = with_batch_statistics(model)
    return lambda sites, pixels: predict_by_group(adaptive, pixels, groups_together(sites, settings))


def _test_time(records, settings, embed, adaptive, test, classes):
    """Scores of `test` with what takes an experiment's images, or its controls, together."""
    sites, pixels = test
    parts = [split_images(records, "train", settings), test]
    controls = any(not row["treatment"] for row in read_manifest(records)["classes"])
    for split in ("train", "test") if controls else ():
        found, images = split_images(records, split, settings, ("control",))
        negative = (found["well_type"] == "negative_control").to_numpy()
        parts.append((found[negative], images[negative]))
    rows = np.concatenate([embed(*part) for part in parts])
    joint = rows  # with batch statistics, of a group's treatments and controls in one batch
    if controls and settings.get("batch_statistics"):
        joint = _embed_together(embed, parts)
    counts = np.cumsum([len(found) for found, _ in parts])
    experiment = np.concatenate([found["experiment"].to_numpy(str) for found, _ in parts])
    labels = parts[0][0]["label"].to_numpy("int64")
    scores = {"adabn": score(sites, predict_by_group(adaptive, pixels, sites["experiment"]))}
    embeddings = {"nearest_class": rows}
    if controls:
        embeddings["tvn"] = typical_variation(joint, np.arange(len(rows)) >= counts[1], experiment)
    for name, embedded in embeddings.items():
        cosines = nearest_class(embedded[: counts[0]], labels, embedded[counts[0] : counts[1]], classes)
        scores[name] = score(sites, cosines)
    return scores


def _embed_together(embed, parts):
    """Embeddings of the parts, train and test and the controls of each, with each split as one call."""
    rows = [None] * len(parts)
    for first, controls in ((0, 2), (1, 3)):
        (sites, images), (more, others) = parts[first], parts[controls]
        found = embed(pd.concat([sites, more], ignore_index=True), np.concatenate([images, others]))
        rows[first], rows[controls] = found[: len(sites)], found[len(sites) :]
    return np.concatenate(rows)
