"""Reads the TFRecords that Recursion published with RxRx1 (rxrx1-utils, images2tfrecords): GZIP, treatments only."""

import os
import re
from pathlib import Path

import numpy as np
import tensorflow as tf

from tfrecords import preprocess
from tfrecords.devices import leave_gpu_to_backend
from tfrecords.frames import FOOTER, HEADER
from tfrecords.normalize import normalizer
from tfrecords.order import Passes, handed_out_when_asked
from tfrecords.read import check_options
from tfrecords.remote import is_remote
from tfrecords.splits import VAL_EXPERIMENTS
from tfrecords.views import make_views

# Files read at once, as in rxrx1-utils.
_CYCLE = 32
# Memory for shuffling: 340 sites of 512 x 512 x 6 bytes.
_SHUFFLE_BYTES = 512 * 2**20
_MOST_SHUFFLED = 8192
# Header and trailer around nothing.
_SMALLEST_GZIP = 20
_GZIP = b"\x1f\x8b"  # first two bytes
# RxRx1's training experiments are those up to this number.
_LAST_TRAINING = {"HEPG2": 7, "HUVEC": 16, "RPE": 7, "U2OS": 3}
_NAME = re.compile(r"(?P<experiment>(?P<cell_type>[A-Z0-9]+)-(?P<number>\d+))_p(?P<plate>\d+)_s(?P<site>\d+)\.tfrecord")
_TEXTS = ("image", "well", "well_type", "experiment", "cell_type")


def read_published(
    folder,
    split,
    *,
    batch_size,
    image_shape=(512, 512, 6),
    count=None,
    training=False,
    seed=0,
    first_epoch=0,
    augment=preprocess.augment,
    normalize=preprocess.standardize,
    dtype="float32",
    metadata=False,
):
    """Reads `random-42/{train,test}/*.tfrecord` or `by_exp_plate_site-42/*_p*_s*.tfrecord` as batches.

    Compressed files have no place at which a record could be looked up. So they are streamed: the order in training is
    that of the files, shuffled, interleaved and shuffled again in a buffer, still a function of seed and epoch; there
    is no choice of batches, no cache and no part for a worker (build records from the release for these). A file that
    is damaged stops the reading where it ends too early, and is named.

    Args:
        folder: one of the two layouts, or the folder that holds one of them.
        split: `train` or `test` of `random-42`; of the other layout, whose files are of one experiment and site,
            `train`, `id_test`, `val` or `test` as RxRx1-WILDS has them.
        batch_size: sites in a batch.
        image_shape: (height, width, channels) of the records. Default: RxRx1's.
        count: number of records, if it is known; the length of the dataset is known then. Another number than there
            are stops the reading.
        training: shuffle, augment, leave out the last batch where it is not full.
        seed, first_epoch, augment, dtype: as for `read_records`.
        normalize: function of the images, or None, as for `read_records`.
        metadata: as for `read_records`; `site_id` and `well_id` are put together from the other keys.

    Returns:
        tf.data.Dataset as of `read_records`. A label is the record's `sirna`, 0 to 1107.

    Raises:
        ValueError: if there are no such files, one is cut to nothing or not compressed, `count` is less than a batch in
            training, or for options that `read_records` refuses. While iterating, a `tf.errors.InvalidArgumentError`
            for a record without a label, which `metadata` allows, for images of another size than `image_shape`, for a
            damaged file, which it names, and in training for fewer records than a batch; a
            `tf.errors.FailedPreconditionError` for another number of records than `count`.
    """
    check_options(batch_size, seed, first_epoch, dtype)
    if normalize is not None and not callable(normalize):
        raise ValueError(f"normalize must be a function of images or None; received {type(normalize)}.")
    if training and count is not None and count < batch_size:
        raise ValueError(_too_few(split, batch_size))
    leave_gpu_to_backend()
    paths = [str(path) for path in published_files(folder, split)]
    sizes = [_unpacked_size(path) for path in paths]
    passes = Passes(first_epoch)
    whole = training or (count is not None and count % batch_size == 0)
    normalized = normalizer(normalize, None)

    def load(epoch, step, records, last):
        records = tf.ensure_shape(records, (batch_size if whole else None,))
        features = {key: tf.io.FixedLenFeature([], tf.string) for key in _TEXTS}
        features |= {key: tf.io.FixedLenFeature([], tf.int64) for key in ("plate", "site")}
        parsed = tf.io.parse_example(records, features | {"sirna": tf.io.FixedLenFeature([], tf.int64, -1)})
        images = _decode(parsed.pop("image"), image_shape)
        labels = tf.cast(parsed.pop("sirna"), tf.int32)
        seeds = tf.random.experimental.stateless_fold_in(tf.stack([seed, epoch]), step)
        views = make_views(images, None, seeds, augment if training else None, normalized, dtype)
        if metadata:
            return epoch, last, (views, labels, _with_ids(parsed))
        message = "A record has no siRNA. Sites without a label can be predicted, not trained on: pass metadata=True."
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(labels >= 0), [message])]):
            return epoch, last, (views, tf.identity(labels))

    def read_epoch(epoch):
        if training:
            records = _shuffled(paths, sizes, image_shape, seed, epoch)
        else:
            records = tf.data.Dataset.from_tensor_slices((paths, np.array(sizes, np.int64))).flat_map(_whole_file)
        if count is not None:
            records = records.apply(tf.data.experimental.assert_cardinality(count))
        batches = _one_behind(records.batch(batch_size, training), _too_few(split, batch_size))
        batches = batches.enumerate().map(lambda step, batch: (epoch, step, *batch))
        return batches.map(load, tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)

    data = tf.data.Dataset.range(1).map(lambda _: passes.begin()).flat_map(read_epoch)
    data = data.map(lambda epoch, last, batch: passes.hand_out(batch, epoch, last))
    if count is not None:
        steps = count // batch_size if training else -(-count // batch_size)
        data = data.apply(tf.data.experimental.assert_cardinality(steps))
    return data.with_options(handed_out_when_asked())


def published_files(folder, split):
    """Lists the files of a split, sorted. Arguments and errors as of `read_published`."""
    if is_remote(folder):
        raise ValueError(f"{folder} is a URL: published records are read from a folder. Copy them first (gsutil cp).")
    folder = Path(folder)
    layouts = [folder / name for name in ("random-42", "by_exp_plate_site-42") if (folder / name).is_dir()]
    if len(layouts) == 2:
        raise ValueError(
            f"{str(folder)!r} holds both layouts, whose splits differ. Name one: {' or '.join(map(str, layouts))}."
        )
    folder = (layouts or [folder])[0]
    named = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.glob("*.tfrecord"))]
    if any(match for _, match in named):
        files = [path for path, match in named if match and _split_of(match) == split]
    else:
        files = sorted((folder / split).glob("*.tfrecord"))
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no published records of the split {split!r}. Expected {split}/NNN.tfrecord (split "
            "train or test), or files such as HUVEC-01_p1_s1.tfrecord (split train, id_test, val or test)."
        )
    return files


def _split_of(match):
    if int(match["number"]) <= _LAST_TRAINING.get(match["cell_type"], 0):
        return "train" if match["site"] == "1" else "id_test"
    return "val" if match["experiment"] in VAL_EXPERIMENTS else "test"


def _unpacked_size(path):
    """Bytes of the content of a GZIP file, modulo 2 ** 32: its last four bytes, little-endian."""
    size = os.path.getsize(path)
    if size < _SMALLEST_GZIP:
        raise ValueError(f"{path} is no whole GZIP file: it has {size} bytes. Download it again.")
    with open(path, "rb") as file:
        if file.read(2) != _GZIP:
            raise ValueError(
                f"{path} is not compressed by GZIP, as published records are: it was unpacked when it was copied, or "
                "is damaged. Download it again as it is."
            )
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(), "little")


def _whole_file(path, size):
    """The records of one file. It fails where they are not all there, which TensorFlow does without a name."""
    # A file that cannot be opened would give its error again and again (tensorflow #25700). This names it, once.
    first_byte = tf.data.FixedLengthRecordDataset(path, 1).take(1)

    def read(_):
        records = tf.data.TFRecordDataset(path, "GZIP").map(lambda record: (record, False)).ignore_errors()
        return records.concatenate(tf.data.Dataset.from_tensors(("", True)))

    def add_up(total, record, end):
        message = [path, ": the file is damaged. Nothing was skipped: the reading stopped here. Download it again."]
        with tf.control_dependencies([tf.debugging.Assert(~end | (total % 2**32 == size), [tf.strings.join(message)])]):
            return total + HEADER + tf.cast(tf.strings.length(record), tf.int64) + FOOTER, (record, end)

    records = first_byte.flat_map(read).scan(tf.constant(0, tf.int64), lambda total, element: add_up(total, *element))
    return records.filter(lambda record, end: ~end).map(lambda record, end: record)


def _shuffled(paths, sizes, image_shape, seed, epoch):
    seeds = tf.stack([tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64)])
    draws = tf.random.stateless_uniform((len(paths) + 1,), seeds, None, None, tf.int64, alg="philox")
    order = tf.argsort(draws[1:], stable=True)
    files = tf.data.Dataset.from_tensor_slices(
        (tf.gather(paths, order), tf.gather(tf.constant(sizes, tf.int64), order))
    )
    records = files.interleave(
        _whole_file,
        min(_CYCLE, len(paths)),
        block_length=1,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    buffer = int(np.clip(_SHUFFLE_BYTES // np.prod(image_shape), 1, _MOST_SHUFFLED))
    # Otherwise the global seed, which has nothing to do with it, would change the order. This is the traced function's.
    tf.compat.v1.set_random_seed(1)
    return records.shuffle(buffer, seed=draws[0], reshuffle_each_iteration=False)


def _decode(texts, image_shape):
    """uint8 `(batch, height, width, channels)` of raw bytes."""
    sizes, expected = tf.strings.length(texts), int(np.prod(image_shape))
    message = f"image_shape {tuple(image_shape)} means images of {expected} bytes. Found a record whose image has "
    wrong = tf.strings.as_string(tf.gather(sizes, tf.argmax(sizes != expected, output_type=tf.int32)))
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(sizes == expected), [message, wrong])]):
        images = tf.reshape(tf.io.decode_raw(texts, tf.uint8), (-1, *image_shape))
    return tf.ensure_shape(images, (texts.shape[0], *image_shape))


def _one_behind(batches, message):
    """Pairs of a batch of texts and whether it is the last one, each given when the next was looked for. So what is
    wrong behind the last batch is found before that is handed out. An InvalidArgumentError where there is no batch."""
    none = tf.zeros((0,), tf.string)

    def step(before, now):
        last = tf.size(now) == 0
        with tf.control_dependencies([tf.debugging.Assert(~last | (tf.size(before) > 0), [message])]):
            return now, (tf.identity(before), last)

    return batches.concatenate(tf.data.Dataset.from_tensors(none)).scan(none, step).skip(1)


def _too_few(split, batch_size):
    return f"The split {split} has fewer records than a batch of {batch_size}: no step would be left. Lower batch_size."


def _with_ids(parsed):
    plate, site = (tf.strings.as_string(parsed[key]) for key in ("plate", "site"))
    parsed["well_id"] = tf.strings.join([parsed["experiment"], plate, parsed["well"]], separator="_")
    parsed["site_id"] = tf.strings.join([parsed["well_id"], site], separator="_")
    return parsed
