"""Finished records -> tf.data pipelines of batches."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from tfrecords import preprocess
from tfrecords.devices import leave_gpu_to_backend
from tfrecords.listing import list_sites
from tfrecords.manifest import read_manifest
from tfrecords.mirror import local_folder
from tfrecords.order import Passes, shuffle_buffer, shuffle_shards

# A megabyte at a time; TensorFlow's default, a quarter of it, costs more calls, and newer releases log it.
_READ_BYTES = 2**20

_FEATURES = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "well": tf.io.FixedLenFeature([], tf.string),
    "well_type": tf.io.FixedLenFeature([], tf.string),
    "experiment": tf.io.FixedLenFeature([], tf.string),
    "cell_type": tf.io.FixedLenFeature([], tf.string),
    "site_id": tf.io.FixedLenFeature([], tf.string),
    "plate": tf.io.FixedLenFeature([], tf.int64),
    "site": tf.io.FixedLenFeature([], tf.int64),
    "sirna": tf.io.FixedLenFeature([], tf.int64, default_value=-1),
}


def read_records(
    dest,
    split,
    *,
    batch_size,
    kinds=("treatment",),
    training=False,
    seed=0,
    first_epoch=0,
    experiment_ids=False,
    metadata=False,
    drop_remainder=None,
    augment=preprocess.augment,
):
    """Reads a split as batches of standardized images and labels.

    In training, each pass over the returned dataset shuffles all sites anew; the order is a function of `seed` and
    epoch only, so a resumed run sees what an unbroken one would have seen, and `site_ids_of_step` can name the sites
    of a step. A pass that is broken off before its last batch is not counted: the next one repeats its order. (Keras
    looks at a first batch in this way. A `tf.distribute` strategy then fetches some more ahead, so that an epoch of
    fewer than about five steps may be used up by it.) Without training, the order is that of `list_sites`.

    Args:
        dest: folder of records, or URL of one (`gs://`, `s3://`, `az://`, `https://`), whose shards are fetched first,
            see `mirror.local_folder`.
        split: `train`, `id_test`, `val` or `test`.
        batch_size: sites in a batch; the global one where a `tf.distribute` strategy divides it.
        kinds: `("treatment",)` (default), `("control",)` or both.
        training: shuffle and augment.
        seed: integer, 0 or more, of order and augmentation.
        first_epoch: epoch of the first pass, for a run that continues.
        experiment_ids: give `{"image": ..., "experiment": int32 (batch,)}` instead of the image; the number is the
            place in the manifest's `experiments["train"]`.
        metadata: give a dict as third element, for a loop of one's own (Keras would take it for weights): `site_id`,
            `well_id`, `well`, `well_type`, `experiment`, `cell_type` (str), `plate`, `site` (int64), each `(batch,)`.
        drop_remainder: leave out the last batch where it is not full. Default: in training.
        augment: function of (uint8 images `(batch, height, width, channels)`, seed `(2,)`) applied in training; None
            for none. Default: WILDS's, `preprocess.augment`.

    Returns:
        tf.data.Dataset with known cardinality of (float32 images `(batch, height, width, channels)`, int32 labels
        `(batch,)`). Labels index `class_names`; an unknown one is -1 and allowed with `metadata` only.

    Raises:
        ValueError: if the folder is not whole, nothing matches, or the options do not fit together. While iterating, a
            damaged record stops the pass with a `tf.errors.DataLossError`; `python -m tfrecords.verify` names it.
    """
    leave_gpu_to_backend()
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    dest = local_folder(dest, (split,), kinds)
    manifest = read_manifest(dest)
    sites = list_sites(dest, split, kinds)
    drop_remainder = training if drop_remainder is None else drop_remainder
    _check(dest, split, sites, manifest, batch_size, seed, first_epoch, experiment_ids, metadata, drop_remainder)
    shape = manifest["image_shape"]
    label, classes = manifest["options"]["label"], [row["value"] for row in manifest["classes"]]
    train_experiments = manifest["experiments"]["train"]
    names = sorted(set(sites["shard"]))
    paths = tf.constant([str(Path(dest) / name) for name in names])

    def load(epoch, step, records):
        parsed = tf.io.parse_example(records, _FEATURES)
        pixels = tf.io.decode_raw(parsed["image"], tf.uint8)
        images = tf.ensure_shape(tf.reshape(pixels, (-1, *shape)), (records.shape[0], *shape))
        if training and augment is not None:
            images = augment(images, tf.random.experimental.stateless_fold_in(tf.stack([seed, epoch]), step))
        images = preprocess.standardize(images)
        labels = _place_of(parsed["sirna" if label == "sirna_id" else label], classes)
        batch = (images, labels)
        if experiment_ids:
            batch = ({"image": images, "experiment": _place_of(parsed["experiment"], train_experiments)}, labels)
        if metadata:
            batch += (_metadata(parsed),)
        return epoch, step, batch

    steps = len(sites) // batch_size if drop_remainder else -(-len(sites) // batch_size)
    even = drop_remainder or len(sites) % batch_size == 0
    passes = Passes(first_epoch)

    def read_epoch(epoch):
        if training:
            buffer = shuffle_buffer(shape)
            records = shuffle_shards(lambda i: _open(paths[i]), len(names), buffer, seed, epoch)
        else:
            records = _open(paths)
        return records.batch(batch_size, even).enumerate().map(lambda step, batch: (epoch, step, batch))

    def hand_out(epoch, step, batch):
        # The last stage and no parallel one: it runs when a batch is asked for, not when it is prefetched.
        note = tf.cond(step == steps - 1, lambda: tf.group(passes.finish(epoch)), tf.no_op)
        with tf.control_dependencies([note]):
            return tf.nest.map_structure(tf.identity, batch)

    dataset = tf.data.Dataset.range(1).map(lambda _: passes.begin())
    dataset = dataset.flat_map(read_epoch).map(load, tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)
    dataset = dataset.map(hand_out).apply(tf.data.experimental.assert_cardinality(steps))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_optimization.inject_prefetch = False
    return dataset.with_options(options)


def _check(dest, split, sites, manifest, batch_size, seed, first_epoch, experiment_ids, metadata, drop_remainder):
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("first_epoch", first_epoch, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more; received {value!r}.")
    if drop_remainder and len(sites) < batch_size:
        raise ValueError(
            f"The split {split!r} has {len(sites)} sites, fewer than a batch of {batch_size}: no step would be left. "
            f"Lower batch_size to {len(sites)} or less."
        )
    unknown = int(sites["label"].isna().sum())
    if unknown and not metadata:
        raise ValueError(
            f"{unknown} of the {len(sites)} sites of the split {split!r} have no label (first: "
            f"{sites.loc[sites['label'].isna(), 'site_id'].iloc[0]!r}). They can be predicted, not trained on or "
            "scored: pass metadata=True, or build from tables that hold the labels."
        )
    strange = sorted(set(sites["experiment"]) - set(manifest["experiments"]["train"]))
    if experiment_ids and strange:
        raise ValueError(
            f"The experiment {strange[0]!r} of the split {split!r} is not among the training experiments, so that it "
            "has no number. Read this split without experiment_ids."
        )


def _open(paths):
    return tf.data.TFRecordDataset(paths, buffer_size=_READ_BYTES)


def _place_of(values, names):
    match = tf.cast(tf.equal(values[:, None], tf.constant(names, values.dtype)[None, :]), tf.int32)
    return tf.where(tf.reduce_any(match > 0, axis=1), tf.argmax(match, axis=1, output_type=tf.int32), -1)


def _metadata(parsed):
    known = {key: value for key, value in parsed.items() if key not in ("image", "sirna")}
    plate = tf.strings.as_string(parsed["plate"])
    known["well_id"] = tf.strings.join([parsed["experiment"], plate, parsed["well"]], separator="_")
    return known
