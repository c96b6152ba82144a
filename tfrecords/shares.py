"""Mini-batches for workers that read shards of their own."""

import numpy as np
import tensorflow as tf

from tfrecords.composition import Plan, fold_seeds, permute


def batches_from_shares(workers):
    """The i-th part of every batch is drawn from the i-th share of the sites, so that workers read shards of their own.

    For `worker=(i, workers)`, where disks or memories of the machines should not hold all images: a worker's shards are
    the only ones that must be on its disk or are fetched from a URL, and its sites the only ones that `cache` keeps.
    The sites, in the order
    of the shards, are cut into `workers` shares that differ by one site at most; a shard at a cut is read by both
    neighbours, and no other by two workers. As with every composition, the batches do not depend on who reads them: one
    worker alone sees what all see together. A share has few experiments, and so has a worker's part of a batch; this
    matters where batch normalization takes its statistics on each worker.

    In training each share's last, smaller part of a batch is left out, of other sites in each epoch: at most
    `batch_size` sites. Without training, or with `pad`, all are kept, and parts filled with unscored sites of
    the share. All workers take the same number of steps.

    Args:
        workers: number of shares; `batch_size` is a multiple of it.
    """

    def compose(sites, batch_size, *, shuffle, drop):
        if workers < 1 or batch_size % workers or len(sites) < workers:
            raise ValueError(
                f"batches_from_shares({workers}) needs a batch_size that is a multiple of {workers}, and a site for "
                f"each worker; received batch_size={batch_size} and {len(sites)} sites."
            )
        size = batch_size // workers
        starts = [len(sites) * i // workers for i in range(workers + 1)]
        counts = np.diff(starts)
        steps = counts.min() // size if drop else -(-counts.max() // size)
        place = np.arange(steps * size)
        rows = [start + place % count for start, count in zip(starts, counts, strict=False)]
        rows = [np.where(place < count, row, ~row).reshape(-1, size) for row, count in zip(rows, counts, strict=True)]
        rows = np.concatenate(rows, axis=1)
        scored = rows >= 0
        seen = np.where(scored, rows, ~rows)

        def draw(seed, epoch):
            order = tf.range(len(sites), dtype=tf.int64)
            if shuffle:
                seeds = fold_seeds(seed, epoch, workers)
                shares = zip(starts, seeds, counts.tolist(), strict=False)
                order = tf.concat([start + permute(each, count) for start, each, count in shares], axis=0)
            drawn = tf.gather(order, seen)
            return tf.where(scored, drawn, ~drawn)

        return Plan(int(steps), draw, int(scored.sum()), int((~scored).sum()), tuple(starts))

    return compose
