import pytest

from tfrecords.composition import batches_within
from tfrecords.listing import list_sites
from tfrecords.order import Passes, site_ids_of_step
from tfrecords.read import read_records


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


def test_the_steps_of_a_padded_epoch_and_of_one_with_a_smaller_last_batch_can_be_named(records_tree):
    for options in ({"pad": True}, {"drop_remainder": False}):
        batches = batches_within("experiment")
        read = dict(batch_size=3, kinds=("treatment", "control"), seed=1, batches=batches, **options)
        data = read_records(records_tree, "train", training=True, metadata=True, **read)
        for step, (*_, metadata) in enumerate(data):
            seen = [name.decode() for name in metadata["site_id"].numpy()]
            assert seen == site_ids_of_step(records_tree, "train", epoch=0, step=step, **read)
        assert step == 3
