import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tfrecords.composition import (
    batches_across,
    batches_of_experiments,
    batches_with_controls,
    batches_within,
    permute,
    random_batches,
)

EXPERIMENTS, PLATES, CLASSES = 5, 3, 12


def table():
    """5 experiments of 3 plates with 4 classes and 2 controls each, 2 sites a well; one treatment is missing."""
    rows = []
    for experiment in range(EXPERIMENTS):
        for label in range(CLASSES):
            plate = (label // 4 + experiment) % PLATES + 1
            rows += [(f"E{experiment}", plate, "treatment", label)] * 2
        for plate in range(1, PLATES + 1):
            rows += [(f"E{experiment}", plate, kind, label) for kind, label in (("positive_control", 12),) * 2]
            rows += [(f"E{experiment}", plate, "negative_control", 13)]
    sites = pd.DataFrame(rows, columns=["experiment", "plate", "well_type", "label"])
    sites = sites[~((sites["experiment"] == "E1") & (sites["label"] == 3))]
    return sites.sample(frac=1, random_state=0).reset_index(drop=True)


def steps(plan, seed=0, epoch=0):
    rows = np.array(plan.rows(seed, tf.constant(epoch, tf.int64)))
    assert rows.shape[0] == plan.steps
    return rows


def treatments():
    sites = table()
    return sites[sites["well_type"] == "treatment"].reset_index(drop=True)


ALL = {
    "random": (random_batches(), treatments(), 8),
    "experiment": (batches_within("experiment"), treatments(), 8),
    "plate": (batches_within("plate"), treatments(), 4),
    "across": (batches_across(2, 4), treatments(), 8),
    "experiments": (batches_of_experiments(2), treatments(), 8),
    "controls": (batches_with_controls(2), table(), 6),
}


@pytest.mark.parametrize("name", ALL)
def test_a_plan_is_a_function_of_seed_and_epoch_and_of_no_global_seed(name):
    batches, sites, size = ALL[name]
    plan = batches(sites, size, shuffle=True, drop=True)
    plans = {}
    for seed in range(2):
        for epoch in range(2):
            tf.random.set_seed(seed + 2 * epoch)
            plans[seed, epoch] = steps(plan, seed, epoch)
            assert plans[seed, epoch].shape == (plan.steps, size)
    assert len({rows.tobytes() for rows in plans.values()}) == 4
    tf.random.set_seed(9)
    again = batches(sites, size, shuffle=True, drop=True)
    np.testing.assert_array_equal(steps(again, 1, 0), plans[1, 0])
    traced = tf.function(again.rows, input_signature=[tf.TensorSpec((), tf.int64)] * 2)
    np.testing.assert_array_equal(traced(1, 0), plans[1, 0])


def test_random_batches_hold_each_site_once_and_mix_experiments():
    sites = treatments()
    rows = steps(random_batches()(sites, 8, shuffle=True, drop=True))
    assert len(set(rows.ravel())) == rows.size == len(sites) // 8 * 8
    assert all(sites["experiment"][batch].nunique() >= 3 for batch in rows)


def test_without_shuffling_the_order_is_that_of_the_table_and_the_rest_is_padding():
    plan = random_batches()(treatments(), 8, shuffle=False, drop=False)
    rows = steps(plan).ravel()
    assert len(treatments()) == 118 and (plan.scored, plan.padded) == (118, 2)
    assert rows.tolist() == [*range(118), ~0, ~1]
    np.testing.assert_array_equal(steps(plan, seed=5, epoch=3).ravel(), rows)
    assert random_batches()(treatments()[:16], 8, shuffle=False, drop=False).padded == 0


@pytest.mark.parametrize("group, size", [("experiment", 7), ("plate", 5)])
def test_each_batch_is_of_one_group(group, size):
    sites = treatments()
    keys = ["experiment"] if group == "experiment" else ["experiment", "plate"]
    counts = sites.groupby(keys).size()
    plan = batches_within(group)(sites, size, shuffle=True, drop=True)
    rows = steps(plan)
    assert plan.steps == (counts // size).sum() and plan.padded == 0
    assert len(set(rows.ravel())) == rows.size == plan.scored
    assert all(len(sites.loc[batch, keys].drop_duplicates()) == 1 for batch in rows)
    order = [tuple(sites.loc[batch[0], keys]) for batch in rows]
    assert order != sorted(order)  # Groups take turns.
    left_out = [set(range(len(sites))) - set(steps(plan, epoch=epoch).ravel()) for epoch in range(20)]
    assert not set.intersection(*left_out)  # What is left out changes.


def test_evaluated_groups_are_whole_and_padded_from_themselves():
    sites = treatments()
    rows = steps(batches_within("plate")(sites, 5, shuffle=False, drop=False))
    scored = rows[rows >= 0]
    assert sorted(scored) == list(range(len(sites))) and (rows < 0).any()
    seen = np.where(rows < 0, ~rows, rows)
    assert all(len(sites.loc[batch, ["experiment", "plate"]].drop_duplicates()) == 1 for batch in seen)


def test_a_group_that_would_never_be_seen_is_refused():
    with pytest.raises(ValueError, match="E1 2 has 6 sites, fewer than a batch of 8.*Lower batch_size to 6 or less"):
        batches_within("plate")(treatments().query("experiment == 'E1'"), 8, shuffle=True, drop=True)
    with pytest.raises(ValueError, match="Unknown group 'well'. Expected 'experiment' or 'plate'"):
        batches_within("well")


def test_batches_across_hold_the_same_classes_in_each_experiment():
    sites = treatments()
    plan = batches_across(2, 4)(sites, 8, shuffle=True, drop=True)
    assert plan.steps == (CLASSES // 4) * (EXPERIMENTS // 2)
    stood_in = 0
    for epoch in range(6):
        rows = steps(plan, epoch=epoch)
        for batch in rows:
            labels = sites["label"][batch].to_numpy().reshape(2, 4)
            assert (labels[0] == labels[1]).all() and len(set(labels[0])) == 4
            experiments = sites["experiment"][batch].to_numpy().reshape(2, 4)
            for row, kinds in zip(experiments, labels, strict=True):
                strange = {kind for name, kind in zip(row, kinds, strict=True) if name != pd.Series(row).mode()[0]}
                assert strange <= {3}  # Only the class that E1 lacks.
                stood_in += len(strange)
        assert set(sites["label"][rows.ravel()]) == set(range(CLASSES))
    assert stood_in


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((2, 4), dict(batch_size=9), r"makes batches of 8 sites; received batch_size=9"),
        ((6, 1), dict(batch_size=6), "1 to 5 experiments, as the split has; received 6"),
        ((1, 13), dict(batch_size=13), "1 to 12 classes, as the split has; received 13"),
        ((2, 4), dict(batch_size=8, shuffle=False), "read evaluation data with other batches"),
    ],
)
def test_batches_across_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        batches_across(*arguments)(treatments(), **dict(shuffle=True, drop=True) | options)


def test_batches_of_experiments_are_of_so_many_drawn_anew_and_of_any_class():
    sites = treatments()
    plan = batches_of_experiments(3)(sites, 12, shuffle=True, drop=True)
    assert (plan.steps, plan.scored, plan.padded) == (len(sites) // 12, len(sites) // 12 * 12, 0)
    trios, seen, kinds = set(), set(), []
    for epoch in range(20):
        for batch in steps(plan, epoch=epoch):
            names = sites["experiment"][batch].to_numpy().reshape(3, 4)
            assert all(len(set(row)) == 1 for row in names) and len(set(names[:, 0])) == 3
            assert len(set(batch)) == 12
            trios.add(tuple(sorted(names[:, 0])))
            kinds.append(sites["label"][batch].nunique())
        seen |= set(batch)
    assert len(trios) == 10 and np.mean(kinds) > 6  # of 5 experiments, and of 12 classes; across: 4
    assert {*sites["experiment"][[*seen]]} == {*sites["experiment"]}
    counts = np.bincount(np.concatenate([steps(plan, epoch=epoch).ravel() for epoch in range(200)]))
    each = sites.assign(times=counts).groupby("experiment")["times"]
    assert (each.max() < 1.6 * each.min()).all() and each.sum().max() < 1.1 * each.sum().min()


def test_an_experiment_of_few_sites_repeats_them():
    sites = treatments()
    few = sites[(sites["experiment"] != "E2") | (sites.index == sites.index[sites["experiment"] == "E2"][0])]
    few = few.reset_index(drop=True)
    (row,) = np.flatnonzero(few["experiment"] == "E2")
    rows = steps(batches_of_experiments(5)(few, 10, shuffle=True, drop=True))
    assert ((rows == row).sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    "experiments, options, message",
    [
        (6, dict(batch_size=6), "needs so many experiments, and the split has 5"),
        (0, dict(batch_size=6), "needs so many experiments, and the split has 5"),
        (4, dict(batch_size=6), "a batch_size that is a multiple of 4; received batch_size=6"),
        (2, dict(batch_size=6, shuffle=False), "batches_of_experiments draws sites .* read evaluation data with other"),
    ],
)
def test_batches_of_experiments_that_cannot_be_are_refused(experiments, options, message):
    with pytest.raises(ValueError, match=message):
        batches_of_experiments(experiments)(treatments(), **dict(shuffle=True, drop=True) | options)


def test_controls_of_the_same_plate_are_shown_and_not_scored():
    sites = table()
    plan = batches_with_controls(2)(sites, 6, shuffle=True, drop=True)
    assert (plan.scored, plan.padded) == (4 * plan.steps, 0)
    shown = []
    for rows in steps(plan):
        seen = np.where(rows < 0, ~rows, rows)
        assert len(sites.loc[seen, ["experiment", "plate"]].drop_duplicates()) == 1
        assert (sites["well_type"][rows[rows >= 0]] == "treatment").all() and (rows >= 0).sum() == 4
        assert (sites["well_type"][~rows[rows < 0]] != "treatment").all() and len(set(rows)) == 6
        assert [int((part < 0).sum()) for part in np.split(rows, 2)] == [1, 1]  # Each half has its share.
        shown += (~rows[rows < 0]).tolist()
    plates = sites.loc[(sites["well_type"] != "treatment"), ["experiment", "plate"]]
    assert len(shown) == 2 * plan.steps and len(set(shown)) >= 40 and len(plates) == 45


def test_with_controls_every_treatment_is_evaluated_once():
    sites = table()
    rows = steps(batches_with_controls(1)(sites, 4, shuffle=False, drop=False))
    assert sorted(rows[rows >= 0]) == np.flatnonzero(sites["well_type"] == "treatment").tolist()


def test_a_plate_without_controls_is_named():
    sites = table().query("not (experiment == 'E2' and plate == 3 and well_type != 'treatment')").reset_index(drop=True)
    with pytest.raises(ValueError, match=r"E2 3 has no controls to show. Read with kinds=\('treatment', 'control'\)"):
        batches_with_controls(2)(sites, 6, shuffle=True, drop=True)
    with pytest.raises(ValueError, match="controls must be between 1 and batch_size - 1 = 5; received 6"):
        batches_with_controls(6)(sites, 6, shuffle=True, drop=True)


def test_a_permutation_is_golden():
    """Equal on every release: a run that continues elsewhere sees what it would have seen."""
    assert permute((1, 2), 8).numpy().tolist() == [5, 2, 6, 1, 7, 3, 4, 0]
