"""The order in which sites are trained on: a function of seed and epoch, and of nothing else."""

import tensorflow as tf

from tfrecords.composition import random_batches
from tfrecords.listing import keep_labelled, list_sites


def site_ids_of_step(
    dest,
    split,
    *,
    batch_size,
    epoch,
    step,
    kinds=("treatment",),
    seed=0,
    batches=None,
    experiments=None,
    labelled_only=False,
    drop_remainder=None,
    pad=False,
):
    """Names the sites of one training step, say of the one whose loss was not finite. No image is read for it.

    Args:
        dest, split, batch_size, kinds, seed, batches, experiments, labelled_only, drop_remainder, pad: as
            `read_records` was given them with `training=True`. With several workers, a batch here is that of all of
            them together.
        epoch: pass over the data, from 0, counted on from `first_epoch`.
        step: batch inside the epoch, from 0.

    Returns:
        List of site ids, in the order of the batch, controls given as context among them; a last batch that is not full
        has fewer than `batch_size`, unless `pad` fills it.

    Raises:
        ValueError: if an epoch has no such step.
    """
    sites = list_sites(dest, split, kinds, experiments)
    sites = keep_labelled(sites, split) if labelled_only else sites
    drop = not pad if drop_remainder is None else drop_remainder
    plan = (batches or random_batches())(sites, batch_size, shuffle=True, drop=drop)
    if not 0 <= step < plan.steps or epoch < 0:
        raise ValueError(
            f"There is no step {step} in epoch {epoch}: an epoch has {plan.steps} steps of {batch_size} sites, counted "
            "from 0."
        )
    with tf.device("CPU:0"):
        rows = plan.rows(seed, epoch)[step].numpy()
    if not plan.weighted(batch_size, pad):  # what fills the last batch is left out of it
        rows = rows[rows >= 0]
    return [sites["site_id"].iloc[max(row, ~row)] for row in rows.tolist()]


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

    def hand_out(self, batch, epoch, last):
        """The batch; the `last` of an epoch finishes it. For the last stage of a pipeline, no parallel one: it runs
        when a batch is asked for, not when it is prefetched."""
        note = tf.cond(last, lambda: tf.group(self.finish(epoch)), tf.no_op)
        with tf.control_dependencies([note]):
            return tf.nest.map_structure(tf.identity, batch)


def handed_out_when_asked():
    """Options of a dataset of counted `Passes`: a batch is handed out when it is asked for, none ahead of it.

    What TensorFlow would add by itself is switched off: a prefetch at the end, and threads for a later `map`.
    """
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.experimental_optimization.inject_prefetch = False
    options.experimental_optimization.map_parallelization = False
    return options
