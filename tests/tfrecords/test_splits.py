import pytest

from tfrecords.sources import read_sites
from tfrecords.splits import assign_splits, check_split, count_splits


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
    with pytest.raises(ValueError, match="The experiment 'HUVEC-01' lies in test and train"):
        assign_splits(sites)


def test_an_empty_split_and_an_unknown_one_are_named():
    counts = count_splits(["train", "train", "test"])
    check_split("train", counts)
    with pytest.raises(ValueError, match=r"The split 'val' is empty.*train \(2\), test \(1\)"):
        check_split("val", counts)
    with pytest.raises(ValueError, match="Unknown split 'valid'. Expected one of train, id_test, val, test"):
        check_split("valid", counts)
