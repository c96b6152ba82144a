"""The order in which sites are trained on: a function of seed and epoch, and of nothing else."""

import numpy as np
import tensorflow as tf

from tfrecords.listing import list_sites
from tfrecords.manifest import read_manifest

# Shards read at once. Each is of one experiment, so many are needed for a batch to be a mixture of experiments.
_CYCLE = 64
# Memory for shuffling: 340 sites of 512 x 512 x 6 bytes, 2,700 of WILDS's 256 x 256 x 3.
_SHUFFLE_BYTES = 512 * 2**20
_MOST_SHUFFLED = 8192


def shuffle_buffer(image_shape):
    """Number of sites from which the next one is drawn, for images of `(height, width, channels)` in bytes."""
    return int(np.clip(_SHUFFLE_BYTES // np.prod(image_shape), 1, _MOST_SHUFFLED))


def shuffle_shards(read_shard, shards, buffer, seed, epoch):
    """One epoch: shards in random order, interleaved, and shuffled again through a buffer.

    The order depends on the number of records in each shard and not on what they hold: with site numbers in place of
    records, the same function says which sites a step will see.

    Args:
        read_shard: function of a shard's number (int64 tensor) that gives a `tf.data.Dataset`.
        shards: number of shards.
        buffer: see `shuffle_buffer`.
        seed, epoch: integers or int64 tensors, 0 or more.

    Returns:
        tf.data.Dataset of the elements of all shards.
    """
    seeds = tf.stack([tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64)])
    draws = tf.random.stateless_uniform((shards + 1,), seeds, None, None, tf.int64, alg="philox")
    order = tf.cast(tf.argsort(draws[1:], stable=True), tf.int64)
    records = tf.data.Dataset.from_tensor_slices(order).interleave(
        read_shard, min(_CYCLE, shards), block_length=1, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    # Otherwise the global seed, which has nothing to do with it, would change the order. This is the traced function's.
    tf.compat.v1.set_random_seed(1)
    return records.shuffle(buffer, seed=draws[0], reshuffle_each_iteration=False)


def site_ids_of_step(dest, split, *, batch_size, epoch, step, kinds=("treatment",), seed=0):
    """Names the sites of one training step, say of the one whose loss was not finite. No image is read for it.

    Args:
        dest, split, batch_size, kinds, seed: as `read_records` was given them with `training=True`.
        epoch: pass over the data, from 0, counted on from `first_epoch`.
        step: batch inside the epoch, from 0.

    Returns:
        List of `batch_size` site ids, in the order of the batch.

    Raises:
        ValueError: if an epoch has no such step.
    """
    sites = list_sites(dest, split, kinds)
    steps = len(sites) // batch_size
    if not 0 <= step < steps or epoch < 0:
        raise ValueError(
            f"There is no step {step} in epoch {epoch}: an epoch has {steps} steps of {batch_size} sites, counted "
            "from 0."
        )
    counts = sites.groupby("shard", sort=True).size().to_numpy()
    ends = tf.constant(counts.cumsum(), tf.int64)
    starts = ends - counts
    buffer = shuffle_buffer(read_manifest(dest)["image_shape"])

    def shuffle(epoch):
        return shuffle_shards(lambda i: tf.data.Dataset.range(starts[i], ends[i]), len(counts), buffer, seed, epoch)

    with tf.device("CPU:0"):
        rows = tf.data.Dataset.from_tensors(np.int64(epoch)).flat_map(shuffle).skip(step * batch_size).take(batch_size)
        return sites["site_id"].iloc[list(rows.as_numpy_iterator())].tolist()


class Passes:
    """Counts the passes over a data set. A pass counts once its last batch was handed out.

    Keras looks at a first batch before it trains, with an iterator that it then drops: such a look must not use up an
    epoch, so starting a pass is not what counts. The count lives in TensorFlow, not in Python: a pipeline that calls
    Python from its own threads can hang the process at its exit.
    """

    def __init__(self, first_epoch=0):
        # Not a tf.Variable: the scope of a strategy would make one of it for each replica.
        with tf.device("CPU:0"):
            self._table = tf.lookup.experimental.MutableHashTable(
                tf.int64, tf.int64, default_value=first_epoch, experimental_is_anonymous=True
            )

    def begin(self):
        """The epoch of the pass that begins now: int64 tensor."""
        return self._table.lookup(tf.constant(0, tf.int64))

    def finish(self, epoch):
        """Notes that the last batch of `epoch` was handed out. Gives the operation, for a control dependency."""
        following = tf.maximum(self.begin(), epoch + 1)
        return self._table.insert(tf.constant(0, tf.int64), following)
