"""Finished records -> tf.data pipelines of batches."""

import functools

import numpy as np
import tensorflow as tf

from tfrecords import preprocess
from tfrecords.cache import cached_images
from tfrecords.composition import random_batches
from tfrecords.devices import leave_gpu_to_backend
from tfrecords.image_batches import image_batches
from tfrecords.listing import fetch_shards, keep_labelled, list_sites
from tfrecords.manifest import channel_names, read_manifest
from tfrecords.mirror import local_folder
from tfrecords.normalize import normalizer
from tfrecords.order import Passes, handed_out_when_asked
from tfrecords.record_images import record_images
from tfrecords.views import go_one_by_one, make_views, view_one

DTYPES = ("float32", "bfloat16", "float16")


def read_records(
    dest,
    split,
    *,
    batch_size,
    kinds=("treatment",),
    experiments=None,
    labelled_only=False,
    training=False,
    seed=0,
    first_epoch=0,
    first_step=0,
    batches=None,
    drop_remainder=None,
    pad=False,
    augment=preprocess.augment,
    normalize=preprocess.standardize,
    dtype="float32",
    experiment_ids=False,
    metadata=False,
    cache=None,
    worker=(0, 1),
    deterministic=True,
):
    """Reads a split as batches of normalized images and labels.

    In training, each pass over the returned dataset shuffles all sites anew; the order is a function of `seed` and
    epoch only, so a resumed run sees what an unbroken one would have seen, and `site_ids_of_step` can name the sites
    of a step. A pass that is broken off before its last batch is not counted: the next one repeats its order. (Keras
    looks at a first batch in this way, `ABRAModel` does not. What fetches more ahead then, a `tf.distribute` strategy,
    `class_weight`, or a parallel `map` or `prefetch` behind this dataset, may use up an epoch of few steps by it.)
    Without training, the order is that of `list_sites`.

    Args:
        dest: folder of records, or URL of one (`gs://`, `s3://`, `az://`, `https://`), whose shards are fetched first,
            see `mirror.local_folder`.
        split: `train`, `id_test`, `val` or `test`.
        batch_size: sites in a batch; the global one where a `tf.distribute` strategy or `worker` divides it.
        kinds: `("treatment",)` (default), `("control",)` or both.
        experiments: names of some of the split's experiments. Default: all.
        labelled_only: leave out sites without a label. Default: they are an error, but with `metadata`.
        training: shuffle and augment.
        seed: integer, 0 or more, of order and augmentation.
        first_epoch: epoch of the first pass, for a run that continues. A pass counts once its last batch was given: a
            short one cannot be told from the look at a batch by which Keras (not `ABRAModel`) builds metrics on JAX and
            torch.
        first_step: for a run that continues inside an epoch: leaves out the batches of `first_epoch` before this one,
            whose images are not read; order and augmentation are those of the whole epoch. The dataset is then the rest
            of this epoch and no other, and its cardinality that of the rest: Keras takes one length for all epochs of a
            `fit`. So `fit(rest, initial_epoch=e, epochs=e + 1)`, then `fit` with a dataset of `first_epoch` e + 1.
        batches: which sites share a batch, see `tfrecords.composition`: `random_batches()` (default),
            `batches_within(group)`, `batches_across(experiments, classes)`, `batches_of_experiments(experiments)`,
            `batches_with_controls(controls)`, `batches_from_shares(workers)`.
        drop_remainder: leave out the last batch (of each group) where it is not full. Default: in training, unless
            `pad`.
        pad: fill batches that are not full with sites of weight 0, and give the weights: every batch has the static
            shape `(batch_size, ...)`, no site is missing, and Keras's `evaluate` is exact with `weighted_metrics`.
        augment: function of (uint8 images `(batch, height, width, channels)`, seed `(2,)`) applied in training; or a
            pair of such functions, the second of which is given the normalized images; None for none. Default: WILDS's,
            `preprocess.augment`. More in `tfrecords.augmentation`.
        normalize: function of the images; or a table of `channel_statistics`, by which each channel gets mean 0 and
            deviation 1 over an experiment, a plate or a split; None for grey levels, 0 to 255. Default: each image by
            itself, as WILDS, `preprocess.standardize`.
        dtype: of the images, `float32` (default), `bfloat16` or `float16`; all is computed in float32.
        experiment_ids: give `{"image": ..., "experiment": int32 (batch,)}` instead of the image; the number is the
            place in the manifest's `experiments["train"]`.
        metadata: give a dict as last element, for a loop of one's own (Keras would take it for weights): `site_id`,
            `well_id`, `well`, `well_type`, `experiment`, `cell_type` (str), `plate`, `site` (int64), each `(batch,)`.
        cache: `"memory"`, or a folder, to keep the decoded pixels in; None (default) for none. See `cached_images`.
        worker: (number of this worker, number of workers). Each gives its part, `batch_size / workers`, of every
            batch, and all take the same number of steps: together they see exactly what one alone would see, in the
            same steps (augmented differently). Each reads from all shards and caches all images, or, with
            `batches=batches_from_shares(workers)`, those of its share alone. Default: `(0, 1)`.
        deterministic: give the batches in their order (default). False lets a batch that is ready overtake a late one,
            where `augment` or `normalize` are not the defaults; what is in a batch stays the same.

    Returns:
        tf.data.Dataset with known cardinality of (images `(batch, height, width, channels)`, int32 labels `(batch,)`),
        and float32 weights `(batch,)` with `pad` or controls as context. Scored sites have equal weights whose mean
        over an epoch, with the zeros, is 1: Keras divides a loss by the size of the batch and not by its weights.
        Labels index `class_names`; an unknown one is -1 and allowed with `metadata` only, or 0 of a control that is
        context.

    Raises:
        ValueError: if the folder is not whole, nothing matches, or the options do not fit together. While iterating, a
            damaged record stops the pass with a `tf.errors.InvalidArgumentError` that names file and record.
    """
    leave_gpu_to_backend()
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    folder = local_folder(dest)
    manifest = read_manifest(folder)
    sites = list_sites(folder, split, kinds, experiments, check=False)
    sites = keep_labelled(sites, split) if labelled_only else sites
    check_options(batch_size, seed, first_epoch, dtype, first_step, worker)
    if drop_remainder is None:
        drop_remainder = training and not pad
    if drop_remainder and len(sites) < batch_size:
        raise ValueError(
            f"The split {split!r} has {len(sites)} sites, fewer than a batch of {batch_size}: no step would be left. "
            f"Lower batch_size to {len(sites)} or less."
        )
    plan = (batches or random_batches())(sites, batch_size, shuffle=training, drop=drop_remainder)
    if plan.context is not None and not metadata:  # a loss takes no label that there is not, with weight 0 either
        shown = sites.index.isin(sites.index[plan.context])
        sites = sites.assign(label=sites["label"].mask(shown & sites["label"].isna(), 0))
    _check_sites(split, sites, manifest, experiment_ids, metadata)
    if first_step >= plan.steps:
        raise ValueError(
            f"There is no step {first_step}: an epoch has {plan.steps} steps, counted from 0. To continue behind the "
            f"last of them, pass first_epoch={first_epoch + 1} and no first_step."
        )
    places = plan.steps * batch_size
    weighted = plan.weighted(batch_size, pad)
    ragged = plan.padded and not weighted
    number, workers = worker
    if ragged and workers > 1:
        raise ValueError("The last batch is not full, so that workers would get unequal parts. Pass pad=True.")
    size = batch_size // workers
    share = plan.share(number, workers, len(sites))
    dest = fetch_shards(dest, manifest, {*sites["shard"].iloc[share]})
    source = record_images(dest, sites, manifest)
    if cache is not None:
        source = cached_images(source, dest, sites, share, cache)
    normalized = normalizer(normalize, sites, channel_names(manifest))
    labels = tf.constant(sites["label"].fillna(-1).to_numpy(np.int32))
    experiments = {name: i for i, name in enumerate(manifest["experiments"]["train"])}
    experiment = tf.constant(sites["experiment"].map(experiments).fillna(-1).to_numpy(np.int32))
    known = _metadata(sites) if metadata else None
    augment = augment if training else None
    singly = go_one_by_one(augment, normalize)
    steps = plan.steps - first_step

    def seeds_of(epoch, step):
        return tf.random.experimental.stateless_fold_in(tf.stack([seed, epoch]), step * workers + number)

    def read_epoch(epoch):
        rows = plan.rows(tf.constant(seed, tf.int64), epoch)
        rows = tf.ensure_shape(rows, (plan.steps, batch_size))[first_step:, number * size : (number + 1) * size]
        each, view = None, None
        if singly:
            view = functools.partial(view_one, dtype=dtype)
        if singly and augment is not None:
            moves = tf.data.Dataset.range(first_step, plan.steps)
            each = moves.map(lambda step: preprocess.draw_moves(size, seeds_of(epoch, step))).unbatch()
        batches = image_batches(source, tf.reshape(rows, (steps * size,)), size, view, each)
        return batches.enumerate(first_step).map(lambda step, batch: (epoch, step, *batch))

    def finish(epoch, step, marked, images):
        if ragged:
            marked, images = _leave_out_padding(marked, images)
        rows = tf.where(marked < 0, -1 - marked, marked)
        if not singly:
            images = make_views(images, rows, seeds_of(epoch, step), augment, normalized, dtype)
        if experiment_ids:
            images = {"image": images, "experiment": tf.gather(experiment, rows)}
        batch = (images, tf.gather(labels, rows))
        if weighted:
            batch += (tf.where(marked >= 0, tf.constant(places / plan.scored, tf.float32), 0.0),)
        if metadata:
            batch += ({key: tf.gather(values, rows) for key, values in known.items()},)
        return epoch, batch

    passes = Passes(first_epoch)

    def begin():
        return _begin_rest(passes, first_epoch) if first_step else passes.begin()

    def hand_out(step, element):
        epoch, batch = element
        return passes.hand_out(batch, passes.begin() if first_step else epoch, step == plan.steps - 1)

    dataset = tf.data.Dataset.range(1).map(lambda _: begin()).flat_map(read_epoch)
    dataset = dataset.map(finish, tf.data.AUTOTUNE, deterministic=deterministic)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    dataset = dataset.enumerate(first_step).map(hand_out)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    options = handed_out_when_asked()
    # TensorFlow fails to fuse a look into a table with the batches.
    options.experimental_optimization.map_and_batch_fusion = cache != "memory"
    if singly:
        options.threading.max_intra_op_parallelism = 1  # Many images at once, each in one thread.
    return dataset.with_options(options)


def _leave_out_padding(marked, images):
    def leave_out():
        return tf.boolean_mask(marked, marked >= 0), tf.boolean_mask(images, marked >= 0)

    return tf.cond(tf.reduce_all(marked >= 0), lambda: (marked, images), leave_out)


def _begin_rest(passes, epoch):
    # A look at the first batches, which may use up a short rest, and the pass itself: a third is a mistake.
    message = (
        f"This dataset is the rest of epoch {epoch}, and was passed over already. Read the later epochs with "
        f"read_records(first_epoch={epoch + 1}), without first_step."
    )
    with tf.control_dependencies([tf.debugging.Assert(passes.begin() < epoch + 2, [message])]):
        return tf.constant(epoch, tf.int64)


def check_options(batch_size, seed, first_epoch, dtype, first_step=0, worker=(0, 1)):
    """Raises the ValueError of `read_records` for options that are none, whatever the data."""
    integers = {"batch_size": (batch_size, 1), "seed": (seed, 0)}
    integers |= {"first_epoch": (first_epoch, 0), "first_step": (first_step, 0)}
    for name, (value, least) in integers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more; received {value!r}.")
    pair = isinstance(worker, (tuple, list)) and len(worker) == 2
    number, workers = worker if pair and all(isinstance(n, (int, np.integer)) for n in worker) else (1, 1)
    if not 0 <= number < workers or batch_size % workers:
        raise ValueError(
            f"worker must be (number from 0, number of workers), and batch_size a multiple of the latter; received "
            f"worker={worker!r} and batch_size={batch_size}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; received {dtype!r}.")


def _check_sites(split, sites, manifest, experiment_ids, metadata):
    unknown = int(sites["label"].isna().sum())
    if unknown and not metadata:
        raise ValueError(
            f"{unknown} of the {len(sites)} sites of the split {split!r} have no label (first: "
            f"{sites.loc[sites['label'].isna(), 'site_id'].iloc[0]!r}). They can be predicted, not trained on or "
            "scored: pass labelled_only=True to leave them out, metadata=True to predict them, or build from tables "
            "that hold the labels."
        )
    strange = sorted(set(sites["experiment"]) - set(manifest["experiments"]["train"]))
    if experiment_ids and strange:
        raise ValueError(
            f"The experiment {strange[0]!r} of the split {split!r} is not among the training experiments, so that it "
            "has no number. Read this split without experiment_ids."
        )


def _metadata(sites):
    texts = ("site_id", "well_id", "well", "well_type", "experiment", "cell_type")
    known = {key: tf.constant(sites[key].to_numpy(str)) for key in texts}
    return known | {key: tf.constant(sites[key].to_numpy(np.int64)) for key in ("plate", "site")}
