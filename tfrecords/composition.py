"""Which sites share a mini-batch. Plans of an epoch: pure functions of the index, a seed and the epoch."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# What makes a group of sites.
GROUPS = {"experiment": ("experiment",), "plate": ("experiment", "plate")}


class Plan(NamedTuple):
    """The steps of an epoch.

    `rows(seed, epoch)` gives int64 `(steps, batch)`: row numbers of the table of sites, where `~row` stands for a site
    that is shown and not scored (padding, or context). `scored` is how many are scored in an epoch, `padded` how many
    places are padding. `starts` are those of the shares of workers, and the end, where each reads a share of the sites
    alone. `context` are the row numbers of sites that are never scored, None where there are no such.
    """

    steps: int
    rows: Callable
    scored: int
    padded: int = 0
    starts: tuple | None = None
    context: np.ndarray | None = None

    def weighted(self, batch_size, pad):
        """Whether batches have weights: to be filled, or with sites that are context."""
        return pad or self.steps * batch_size > self.scored + self.padded

    def share(self, number, workers, sites):
        """The rows, as a slice of `sites` many, that worker `number` of so many may be asked for."""
        if self.starts is None or len(self.starts) != workers + 1:
            return slice(0, sites)
        return slice(self.starts[number], self.starts[number + 1])


def random_batches():
    """Every batch is drawn from all sites; each site comes once in an epoch. The default of `read_records`."""

    def compose(sites, batch_size, *, shuffle, drop):
        groups = np.zeros(len(sites), np.int64)
        return _grouped(groups, ["the split"], batch_size, shuffle, drop)

    return compose


def batches_within(group):
    """Every batch is of one experiment or of one plate, so that batch normalization sees one experimental batch.

    After Lin & Lu 2022 (BEN, bioRxiv 2022.10.14.512286), whose code takes plates; the fifth of the Kaggle competition
    found the accuracy of an early model to rise from 40 % (random) to 60 % (experiment) and 70 % (plate), with batch
    statistics at test time too. In training each group's last, smaller batch is left out, of other sites in each epoch;
    without training it is kept or, with `pad`, filled with unscored sites of the same group.

    Args:
        group: `"experiment"` or `"plate"`.
    """
    if group not in GROUPS:
        raise ValueError(f"Unknown group {group!r}. Expected {' or '.join(map(repr, GROUPS))}.")

    def compose(sites, batch_size, *, shuffle, drop):
        return _grouped(*_number(sites, GROUPS[group]), batch_size, shuffle, drop)

    return compose


def batches_across(experiments, classes):
    """Every batch holds the same few classes in each of a few experiments: what a loss on pairs of sites needs.

    An epoch pairs each set of classes with each set of experiments once, both drawn anew, and takes a random site of
    the class in the experiment. Where an experiment has none, a site of the class from any experiment takes its place.
    So classes are seen equally often, while a site may come not at all or twice. For training.

    Args:
        experiments: number of experiments in a batch.
        classes: number of classes in a batch; `batch_size` is the product of both.
    """

    def compose(sites, batch_size, *, shuffle, drop):
        if not shuffle or not drop:
            raise ValueError(_draws("batches_across"))
        if experiments * classes != batch_size:
            raise ValueError(
                f"batches_across({experiments}, {classes}) makes batches of {experiments * classes} sites; received "
                f"batch_size={batch_size}. Pass the product of both."
            )
        if sites["label"].isna().any():
            raise ValueError("batches_across needs the label of every site; some of this split have none.")
        experiment, names = _number(sites, ["experiment"])
        label, kinds = _number(sites, ["label"])
        for wanted, there, what in ((experiments, len(names), "experiments"), (classes, len(kinds), "classes")):
            if not 1 <= wanted <= there:
                raise ValueError(f"batches_across needs 1 to {there} {what}, as the split has; received {wanted}.")
        rows = tf.constant(np.lexsort((experiment, label)))
        counts = np.zeros((len(kinds), len(names)), np.int64)
        np.add.at(counts, (label, experiment), 1)
        starts = np.concatenate([[0], counts.ravel().cumsum()[:-1]]).reshape(counts.shape)
        rounds, turns = len(kinds) // classes, len(names) // experiments

        def draw(seed, epoch):
            seeds = fold_seeds(seed, epoch, 4)
            chosen = permute(seeds[0], len(kinds))[: rounds * classes]
            chosen = tf.reshape(chosen, (rounds, 1, 1, classes))
            among = tf.argsort(_bits(seeds[1], (rounds, len(names))), axis=1, stable=True)
            among = tf.reshape(among[:, : turns * experiments], (rounds, turns, experiments, 1))
            shape = (rounds, turns, experiments, classes)
            cell = tf.stack([tf.broadcast_to(chosen, shape), tf.broadcast_to(tf.cast(among, tf.int64), shape)], axis=-1)
            count = tf.gather_nd(counts, cell)
            anywhere = tf.broadcast_to(tf.gather(counts.sum(axis=1), chosen), shape)
            first = tf.where(count > 0, tf.gather_nd(starts, cell), tf.gather(starts[:, 0], cell[..., 0]))
            share = tf.random.stateless_uniform(shape, seeds[2], dtype=tf.float64, alg="philox")
            place = tf.cast(share * tf.cast(tf.where(count > 0, count, anywhere), tf.float64), tf.int64)
            steps = tf.reshape(tf.gather(rows, first + place), (rounds * turns, batch_size))
            return tf.gather(steps, permute(seeds[3], rounds * turns))

        return Plan(rounds * turns, draw, rounds * turns * batch_size)

    return compose


def batches_of_experiments(experiments):
    """Every batch is of a few experiments, each with as many sites: what a penalty between experiments needs.

    As WILDS's group loader has it (p-lambda/wilds, `GroupSampler`): in each step other experiments, and of each of them
    other sites, all drawn anew; an epoch has as many steps as there are whole batches of sites. So a site may come not
    at all or twice. An experiment with fewer sites than its part repeats them. For training.

    Args:
        experiments: number of experiments in a batch; `batch_size` is a multiple of it.
    """

    def compose(sites, batch_size, *, shuffle, drop):
        if not shuffle or not drop:
            raise ValueError(_draws("batches_of_experiments"))
        experiment, names = _number(sites, ["experiment"])
        if not 1 <= experiments <= len(names) or batch_size % experiments:
            raise ValueError(
                f"batches_of_experiments({experiments}) needs so many experiments, and the split has {len(names)}, and "
                f"a batch_size that is a multiple of {experiments}; received batch_size={batch_size}."
            )
        rows = tf.constant(np.argsort(experiment, kind="stable"))
        counts = np.bincount(experiment)
        starts = counts.cumsum() - counts
        steps, part = len(sites) // batch_size, batch_size // experiments

        def draw(seed, epoch):
            seeds = fold_seeds(seed, epoch, 2)
            chosen = tf.argsort(_bits(seeds[0], (steps, len(names))), axis=1, stable=True)[:, :experiments]
            keys = _bits(seeds[1], (steps, experiments, int(counts.max())))
            count = tf.gather(counts, chosen)[..., None]
            there = tf.range(int(counts.max()), dtype=tf.int64) < count
            keys = tf.bitwise.invert(tf.where(there, keys, keys.dtype.max))  # the least have become the greatest
            order = tf.math.top_k(keys, min(part, int(counts.max()))).indices
            turn = tf.range(part, dtype=tf.int64) % count  # repeats where there are fewer
            place = tf.gather(tf.cast(order, tf.int64), turn, axis=2, batch_dims=2)
            return tf.gather(rows, tf.reshape(tf.gather(starts, chosen)[..., None] + place, (steps, batch_size)))

        return Plan(steps, draw, steps * batch_size)

    return compose


def _draws(name):
    return (
        f"{name} draws sites at random and so does not visit all: pass training=True without pad or "
        "drop_remainder=False, and read evaluation data with other batches."
    )


def batches_with_controls(controls):
    """Every batch is of one plate: treatments, and among them some controls of the plate as context.

    The controls have weight 0 in the batch, by which they are known. They are spread evenly over it, so that each
    replica or worker has its share, and taken in turn; a plate with fewer repeats them. They need no label: to
    train on, those without one have the label 0. Read with `kinds=("treatment", "control")`.

    Args:
        controls: number of controls in each batch; the rest of `batch_size` are treatments.
    """

    def compose(sites, batch_size, *, shuffle, drop):
        if not 1 <= controls < batch_size:
            raise ValueError(f"controls must be between 1 and batch_size - 1 = {batch_size - 1}; received {controls}.")
        groups, names = _number(sites, GROUPS["plate"])
        treated = (sites["well_type"] == "treatment").to_numpy()
        targets, context = np.flatnonzero(treated), np.flatnonzero(~treated)
        lacking = sorted(set(groups[targets]) - set(groups[context]))
        if lacking:
            raise ValueError(
                f"{names[lacking[0]]} has no controls to show. Read with kinds=('treatment', 'control'), and without "
                "labelled_only, which leaves out those without a label; if a plate has none at all, use "
                "batches_within('plate')."
            )
        plan = _grouped(groups[targets], names, batch_size - controls, shuffle, drop)
        counts = np.bincount(groups[context], minlength=len(names))
        starts = counts.cumsum() - counts
        sizes = (batch_size - controls, controls)
        columns = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes]).argsort(kind="stable")

        def draw(seed, epoch):
            marked = plan.rows(seed, epoch)
            rows = tf.gather(targets, tf.where(marked < 0, ~marked, marked))
            plates = tf.gather(groups, rows[:, 0])
            order = permute(fold_seeds(seed, epoch, 3)[2], len(context)) if shuffle else np.arange(len(context))
            order = tf.gather(context, order)
            order = tf.gather(order, tf.argsort(tf.gather(groups, order), stable=True))
            # Each batch goes on among its plate's controls where the batch of this plate before it has stopped.
            turn = _rank(plates)[:, None] * controls + tf.range(controls, dtype=tf.int64)
            shown = tf.gather(starts, plates)[:, None] + turn % tf.gather(counts, plates)[:, None]
            rows = tf.where(marked < 0, ~rows, rows)
            return tf.gather(tf.concat([rows, ~tf.gather(order, shown)], axis=1), columns, axis=1)

        return Plan(plan.steps, draw, plan.scored, plan.padded, context=context)

    return compose


def permute(seeds, count):
    """A random order of `count` numbers, int64, from seeds `(2,)`; the same on each machine and release."""
    return tf.cast(tf.argsort(_bits(seeds, (count,)), stable=True), tf.int64)


def fold_seeds(seed, epoch, count):
    """Seeds `(2,)` of a plan's so many draws."""
    start = tf.stack([tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64)])
    return [tf.random.experimental.stateless_fold_in(start, i) for i in range(count)]


def _grouped(groups, names, batch_size, shuffle, drop):
    """Batches inside each group. `groups`: the group number of each row."""
    counts = np.bincount(groups, minlength=len(names))
    least = counts[counts > 0].min()
    places = []
    for i, count in enumerate(counts):
        if 0 < count < batch_size and drop:
            raise ValueError(
                f"{names[i]} has {count} sites, fewer than a batch of {batch_size}, so that none of them would be "
                f"seen. Lower batch_size to {least} or less, the smallest such group."
            )
        steps = count // batch_size if drop else -(-count // batch_size)
        place = np.arange(steps * batch_size)
        row = counts[:i].sum() + place % max(count, 1)
        place = np.where(place < count, row, ~row)  # Padding repeats sites of the group.
        places.append(place.reshape(steps, batch_size))
    places = np.concatenate(places)
    scored = places >= 0
    seen = np.where(scored, places, ~places)

    def draw(seed, epoch):
        seeds = fold_seeds(seed, epoch, 2)
        order = permute(seeds[0], len(groups)) if shuffle else tf.range(len(groups), dtype=tf.int64)
        order = tf.gather(order, tf.argsort(tf.gather(groups, order), stable=True))
        rows = tf.gather(order, seen)
        rows = tf.where(scored, rows, ~rows)
        # The batches of one group are exchangeable, and one with padding has its place like any other.
        return tf.gather(rows, permute(seeds[1], len(places))) if shuffle and len(counts) > 1 else rows

    return Plan(len(places), draw, int(scored.sum()), int((~scored).sum()))


def _number(sites, columns):
    """Number of the group of each row, int64, and the groups' names."""
    groups = sites.groupby(list(columns), sort=True)
    rows = groups.head(1).sort_values(list(columns))[list(columns)].to_numpy(object)
    return groups.ngroup().to_numpy(np.int64), [" ".join(map(str, row)) for row in rows]


def _rank(values):
    """How many equal values stand before each one."""
    order = tf.argsort(values, stable=True)
    ordered = tf.gather(values, order)
    first = tf.searchsorted(ordered, ordered, side="left")
    rank = tf.range(tf.size(values)) - first
    return tf.cast(tf.tensor_scatter_nd_update(rank, order[:, None], rank), tf.int64)


def _bits(seeds, shape):
    return tf.random.stateless_uniform(shape, seeds, None, None, tf.int64, alg="philox")
