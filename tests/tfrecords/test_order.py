import pytest
import tensorflow as tf

from tfrecords.listing import list_sites
from tfrecords.order import Passes, shuffle_buffer, shuffle_shards, site_ids_of_step


def order(seed, epoch, buffer=10):
    def read_shard(i):
        return tf.data.Dataset.range(i * 10, i * 10 + 10)

    data = tf.data.Dataset.from_tensors(tf.constant(epoch, tf.int64))
    return [int(i) for i in data.flat_map(lambda epoch: shuffle_shards(read_shard, 5, buffer, seed, epoch))]


def test_an_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(sorted(found) == list(range(50)) for found in orders.values())
    assert len({tuple(found) for found in orders.values()}) == 9
    tf.random.set_seed(99)
    assert order(1, 2) == orders[1, 2]


def test_neighbours_come_from_many_shards():
    found = order(0, 0)
    assert all(len({i // 10 for i in found[k : k + 10]}) >= 4 for k in range(0, 50, 10))


def test_the_buffer_is_bounded_in_bytes_and_number():
    assert shuffle_buffer((512, 512, 6)) == 341
    assert shuffle_buffer((256, 256, 3)) == 2730
    assert shuffle_buffer((8, 8, 6)) == 8192


def test_the_steps_of_an_epoch_hold_each_site_once(records_tree):
    known = set(list_sites(records_tree, "train", ("treatment", "control"))["site_id"])
    named = [
        site_ids_of_step(records_tree, "train", batch_size=4, epoch=3, step=step, kinds=("treatment", "control"))
        for step in range(2)
    ]
    assert sorted(sum(named, [])) == sorted(known)


def test_a_step_that_does_not_exist_is_refused(records_tree):
    with pytest.raises(ValueError, match="no step 2 in epoch 0: an epoch has 2 steps of 2 sites"):
        site_ids_of_step(records_tree, "train", batch_size=2, epoch=0, step=2)


def test_only_a_finished_pass_counts_and_only_once():
    passes = Passes(first_epoch=4)
    assert passes.begin() == passes.begin() == 4
    passes.finish(4)
    passes.finish(4)
    assert passes.begin() == 5
