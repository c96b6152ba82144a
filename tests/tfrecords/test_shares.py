from collections import Counter

import numpy as np
import pytest
import tensorflow as tf

from tfrecords.listing import list_sites
from tfrecords.order import site_ids_of_step
from tfrecords.read import read_records
from tfrecords.shares import batches_from_shares

BOTH = ("treatment", "control")


def read(records, batches, worker, size, **options):
    """For each step of a pass, the (site id, weight) of the scored sites and of the others."""
    data = read_records(
        records, "train", batch_size=size, kinds=BOTH, metadata=True, batches=batches, worker=worker, **options
    )
    steps = []
    for _, labels, *weights, metadata in data:
        names = [name.decode() for name in metadata["site_id"].numpy()]
        assert len(names) == len(labels) == size // worker[1]
        steps.append(list(zip(names, weights[0].numpy() if weights else [1] * len(names), strict=True)))
    assert len(steps) == data.cardinality()
    return steps


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_twice_or_dropped(records_tree, workers, training):
    options = dict(size=2 * workers, pad=True, training=training, seed=3)
    parts = [read(records_tree, batches_from_shares(workers), (i, workers), **options) for i in range(workers)]
    assert len({len(part) for part in parts}) == 1
    scored = Counter(name for part in parts for step in part for name, weight in step if weight)
    assert scored == Counter(list_sites(records_tree, "train", BOTH)["site_id"])


def test_each_worker_reads_shards_of_its_own(records_tree):
    sites = list_sites(records_tree, "train", BOTH).set_index("site_id")
    assert sites["shard"].nunique() == 4
    shards = []
    for i in range(2):
        data = read(records_tree, batches_from_shares(2), (i, 2), 4, training=True)
        shards.append({sites["shard"][name] for step in data for name, _ in step})
    assert [len(names) for names in shards] == [2, 2] and not shards[0] & shards[1]


def test_workers_see_together_what_one_would_have_seen_and_it_can_be_named(records_tree):
    batches = batches_from_shares(2)
    options = dict(size=4, training=True, seed=2)
    for epoch in range(2):
        one = read(records_tree, batches, (0, 1), first_epoch=epoch, **options)
        parts = [read(records_tree, batches, (i, 2), first_epoch=epoch, **options) for i in range(2)]
        assert [first + second for first, second in zip(*parts, strict=True)] == one
        for step, batch in enumerate(one):
            named = dict(batch_size=4, kinds=BOTH, seed=2, batches=batches, epoch=epoch, step=step)
            assert [name for name, _ in batch] == site_ids_of_step(records_tree, "train", **named)


def test_shares_differ_by_one_site_and_what_is_left_out_changes():
    plan = batches_from_shares(4)(range(30), 8, shuffle=True, drop=True)  # Of 7, 8, 7 and 8 sites.
    assert (plan.steps, plan.scored, plan.padded) == (3, 24, 0)
    left_out = []
    for epoch in range(20):
        rows = np.array(plan.rows(1, tf.constant(epoch, tf.int64)))
        assert rows.shape == (3, 8) and len(set(rows.ravel())) == 24
        for share, (low, high) in enumerate([(0, 7), (7, 15), (15, 22), (22, 30)]):
            part = rows[:, 2 * share : 2 * share + 2]
            assert part.min() >= low and part.max() < high
        left_out.append(set(range(30)) - set(rows.ravel()))
    assert not set.intersection(*left_out)
    plan = batches_from_shares(4)(range(30), 8, shuffle=False, drop=False)
    rows = plan.rows(0, 0).numpy()
    assert (plan.steps, plan.scored, plan.padded) == (4, 30, 2)
    assert sorted(rows[rows >= 0]) == list(range(30)) and sorted(~rows[rows < 0]) == [0, 15]


@pytest.mark.parametrize("workers, size", [(3, 4), (0, 4), (9, 9)])
def test_shares_that_cannot_be_are_refused(records_tree, workers, size):
    with pytest.raises(ValueError, match=rf"batches_from_shares\({workers}\) needs a batch_size that is a multiple"):
        read_records(records_tree, "train", batch_size=size, kinds=BOTH, batches=batches_from_shares(workers))


@pytest.mark.parametrize("cache", ["memory", "folder", None])
def test_a_worker_needs_and_keeps_the_shards_of_its_share_alone(records, tmp_path, cache):
    options = dict(batch_size=4, kinds=BOTH, batches=batches_from_shares(2), worker=(1, 2), training=True, seed=1)
    options["cache"] = cache if cache != "folder" else tmp_path / "cache"
    expected = [images.numpy() for images, _ in read_records(records, "train", **options | {"cache": None})]
    shards = list_sites(records, "train", BOTH)["shard"].unique()
    for name in shards[:2]:
        (records / name).unlink()
    data = read_records(records, "train", **options)
    if cache is not None:
        for name in shards[2:]:
            (records / name).unlink()
    for (images, _), before in zip(data, expected, strict=True):
        np.testing.assert_array_equal(images, before)
    if cache == "folder":
        (file,) = options["cache"].glob("*.tfrecord")
        assert file.stat().st_size == 4 * (8 * 8 * 6 + 16)
    with pytest.raises(ValueError, match="is missing. Run"):
        read_records(records, "train", **options | {"worker": (0, 2), "cache": None})
