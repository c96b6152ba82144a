"""The order in which sites are trained on: a function of seed and epoch, and of nothing else."""

import numpy as np

from tfrecords.listing import list_sites


def epoch_order(count, seed, epoch):
    """A random order of `count` sites: a permutation as int64, a function of `(seed, epoch)` (both 0 or more)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)


def site_ids_of_step(dest, split, *, batch_size, epoch, step, kinds=("treatment",), seed=0):
    """Names the sites of one training step, say of the one whose loss was not finite.

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
    order = epoch_order(len(sites), seed, epoch)
    return sites["site_id"].iloc[order[step * batch_size : (step + 1) * batch_size]].tolist()


class Passes:
    """Counts the passes over a data set. A pass counts once its last batch was handed out.

    Keras looks at a first batch before it trains, with an iterator that it then drops: such a look must not use up an
    epoch, so starting a pass is not what counts.
    """

    def __init__(self, first_epoch=0):
        self.epoch = first_epoch

    def begin(self):
        """The epoch of the pass that begins now."""
        return np.int64(self.epoch)

    def finish(self, epoch):
        """Notes that the last batch of `epoch` was handed out."""
        self.epoch = max(self.epoch, int(epoch) + 1)
        return np.int64(self.epoch)
