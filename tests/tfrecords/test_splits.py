import pandas as pd
import pytest

from tfrecords.build import build_records
from tfrecords.sources import read_sites
from tfrecords.splits import assign_folds, assign_splits, check_split, count_splits
from tfrecords.verify import verify_records


def test_no_experiment_lies_in_two_of_train_val_and_test(release_tree, kaggle_tree):
    for tree in (release_tree, kaggle_tree):
        sites = read_sites(tree)
        part = assign_splits(sites).replace("id_test", "train")
        assert (part.groupby(sites["experiment"]).nunique() == 1).all()


def test_train_is_site_1_and_id_test_is_site_2_of_the_same_experiments(release_tree):
    sites = read_sites(release_tree)
    sites["split"] = assign_splits(sites)
    for split, site in (("train", 1), ("id_test", 2)):
        rows = sites[sites["split"] == split]
        assert set(rows["site"]) == {site} and set(rows["experiment"]) == {"HUVEC-01", "RPE-01"}
    assert set(sites.loc[sites["split"] == "test", "site"]) == {1, 2}


def test_val_of_the_table_is_used_and_otherwise_that_of_wilds(release_tree, kaggle_tree):
    assert not (read_sites(kaggle_tree)["dataset"] == "val").any()
    for tree in (release_tree, kaggle_tree):
        sites = read_sites(tree)
        split = assign_splits(sites)
        assert set(sites.loc[split == "val", "experiment"]) == {"HUVEC-17"}
        assert count_splits(split) == {"train": 8, "id_test": 8, "val": 8, "test": 8}


def test_an_experiment_in_two_parts_is_refused(release_tree):
    sites = read_sites(release_tree)
    sites.loc[0, "dataset"] = "test"
    with pytest.raises(
        ValueError, match="The experiment 'HUVEC-01' lies in test .site HUVEC-01_1_B02_1. and train .site HUVEC"
    ):
        assign_splits(sites)


def test_an_empty_split_and_an_unknown_one_are_named():
    counts = count_splits(["train", "train", "test"])
    check_split("train", counts)
    with pytest.raises(ValueError, match=r"The split 'val' is empty.*train \(2\), test \(1\)"):
        check_split("val", counts)
    with pytest.raises(ValueError, match="Unknown split 'valid'. Expected one of train, id_test, val, test"):
        check_split("valid", counts)


def screen(train, test, val=()):
    """A table with two sites of one well in each experiment."""
    parts = [(name, part) for part, names in (("train", train), ("val", val), ("test", test)) for name in names]
    rows = [(f"{name}_{site}", name, name.split("-")[0], part, site) for name, part in parts for site in (1, 2)]
    return pd.DataFrame(rows, columns=["site_id", "experiment", "cell_type", "dataset", "site"])


RXRX1 = screen(
    train=["HUVEC-01", "HUVEC-02", "HUVEC-03", "HUVEC-10", "RPE-01", "RPE-02"],
    test=["HUVEC-17", "HUVEC-18", "HUVEC-19", "RPE-08", "RPE-09"],
)


def split_of(sites, scheme):
    split = assign_splits(sites, scheme)
    return {(row.experiment, row.site): name for row, name in zip(sites.itertuples(), split, strict=True)}


def test_mixed_to_test_trades_the_lowest_training_experiments_for_site_1_of_the_test_experiments():
    split = split_of(RXRX1, "mixed-to-test")
    for experiment, parts in {
        "HUVEC-01": ("", ""),
        "HUVEC-02": ("", ""),
        "HUVEC-03": ("train", ""),
        "HUVEC-10": ("train", ""),
        "RPE-01": ("", ""),
        "RPE-02": ("train", ""),
        "HUVEC-17": ("val", "val"),
        "HUVEC-18": ("train", "test"),
        "HUVEC-19": ("train", "test"),
        "RPE-08": ("val", "val"),
        "RPE-09": ("train", "test"),
    }.items():
        assert (split[experiment, 1], split[experiment, 2]) == parts, experiment


def test_rxrx1_and_kaggle_take_both_sites_and_kaggle_the_public_experiments_for_val():
    assert count_splits(assign_splits(RXRX1, "rxrx1")) == {"train": 12, "id_test": 0, "val": 0, "test": 10}
    assert count_splits(assign_splits(RXRX1, "kaggle")) == {"train": 12, "id_test": 0, "val": 4, "test": 6}
    named = screen(["A-01"], ["A-02"], val=["A-03"])
    assert count_splits(assign_splits(named, "rxrx1"))["test"] == 4
    assert count_splits(assign_splits(named, "kaggle")) == {"train": 2, "id_test": 0, "val": 2, "test": 2}
    assert count_splits(assign_splits(RXRX1, "table")) == {"train": 12, "id_test": 0, "val": 0, "test": 10}


@pytest.mark.parametrize("folds", [2, 3, 5, 6])
def test_every_training_experiment_is_val_in_exactly_one_fold_and_test_stays_test(folds):
    val = []
    for fold in range(1, folds + 1):
        split = assign_splits(RXRX1, f"kfold-{folds}-{fold}")
        assert set(RXRX1.loc[split == "test", "experiment"]) == set(RXRX1.loc[RXRX1["dataset"] == "test", "experiment"])
        assert set(split) == {"train", "val", "test"} and (split.groupby(RXRX1["experiment"]).nunique() == 1).all()
        val += sorted(set(RXRX1.loc[split == "val", "experiment"]))
    assert sorted(val) == sorted(set(RXRX1.loc[RXRX1["dataset"] == "train", "experiment"]))


def test_folds_are_even_in_each_cell_type_and_do_not_depend_on_row_order():
    sites = screen([f"HUVEC-{i:02d}" for i in range(1, 17)] + [f"RPE-{i:02d}" for i in range(1, 8)], [])
    folds = pd.Series(assign_folds(sites, 5))
    assert folds.value_counts().between(4, 5).all()
    assert folds[folds.index.str.startswith("HUVEC")].value_counts().between(3, 4).all()
    assert folds[folds.index.str.startswith("RPE")].value_counts().between(1, 2).all()
    assert assign_folds(sites.sample(frac=1, random_state=1), 5) == folds.to_dict()


@pytest.mark.parametrize(
    "scheme, message",
    [
        ("official", "Unknown scheme of splits 'official'. Expected one of wilds, mixed-to-test, rxrx1, kaggle, table"),
        ("kfold-5-6", "'kfold-5-6' is no fold: expected 2 or more folds, counted from 1"),
        ("kfold-1-1", "'kfold-1-1' is no fold"),
        ("kfold-7-1", "7 folds need as many training experiments; found 6"),
    ],
)
def test_a_scheme_that_cannot_be_is_refused(scheme, message):
    with pytest.raises(ValueError, match=message):
        assign_splits(RXRX1, scheme)


def test_a_mixed_build_verifies_and_lists_what_the_scheme_leaves_out(release_tree, tmp_path):
    dest = tmp_path / "records"
    manifest = build_records(release_tree, dest, splits="mixed-to-test")
    assert manifest["experiments"]["train"] == ["HUVEC-18", "RPE-01"] and manifest["experiments"]["test"] == [
        "HUVEC-18"
    ]
    assert verify_records(dest) == []
    excluded = pd.read_csv(dest / "excluded.csv")
    assert len(excluded) == 12 and set(excluded["reason"]) == {"left out by the splits mixed-to-test"}


def test_a_column_of_ones_own_names_the_splits(release, edit_table, tmp_path):
    own = {"HUVEC-01": "test", "RPE-01": "train", "HUVEC-17": "val", "HUVEC-18": ""}
    edit_table(release, lambda table: table.assign(fold=table["experiment"].map(own)))
    manifest = build_records(release, tmp_path / "records", splits="column:fold")
    assert manifest["experiments"] == {"train": ["RPE-01"], "id_test": [], "val": ["HUVEC-17"], "test": ["HUVEC-01"]}
    assert manifest["excluded"]["count"] == 8
    edit_table(release, lambda table: table.assign(fold="fold 1"))
    with pytest.raises(
        ValueError, match="metadata.csv, row 2, column 'fold': expected one of train, .* found 'fold 1'"
    ):
        read_sites(release, split_column="fold")
    assert read_sites(release, split_column="dataset").eval("own_split == dataset").all()
    with pytest.raises(ValueError, match="metadata.csv, row 2, column 'plate': expected one of train, .* found 1"):
        read_sites(release, split_column="plate")
    with pytest.raises(ValueError, match="metadata.csv lacks the column 'half'"):
        read_sites(release, split_column="half")


def test_an_experiment_of_two_cell_types_is_dealt_once():
    rows = [(f"{cell}-{number}", kind) for number in range(5) for cell in ("day",) for kind in ("HUVEC", "RPE")]
    sites = pd.DataFrame(rows, columns=["experiment", "cell_type"])
    assert sorted(assign_folds(sites, 5).values()) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="6 folds need as many training experiments; found 5"):
        assign_folds(sites, 6)
