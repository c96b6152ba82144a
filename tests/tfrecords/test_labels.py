import pytest

from tfrecords.labels import class_map
from tfrecords.sources import read_sites


def test_the_class_of_a_sirna_is_its_id_and_treatments_come_first(release_tree):
    classes = class_map(read_sites(release_tree))
    assert [row["value"] for row in classes] == [0, 1, 2, 3]
    assert [row["name"] for row in classes] == ["s20", "s21", "s22", "EMPTY"]
    assert [row["treatment"] for row in classes] == [True, True, False, False]


def test_gaps_are_closed_and_controls_follow_treatments(release_tree):
    sites = read_sites(release_tree)
    sites["sirna_id"] = sites["sirna_id"].map({0: 900, 1: 30, 2: 5, 3: 7}).astype("Int64")
    assert [row["value"] for row in class_map(sites)] == [30, 900, 5, 7]


def test_other_columns_are_numbered_by_name(release_tree):
    assert [row["name"] for row in class_map(read_sites(release_tree), "cell_type")] == ["HUVEC", "RPE"]


@pytest.mark.parametrize(
    "column, message",
    [
        ("sirna", "sirna s20 goes with 2 values of sirna_id: 0, 1"),
        ("sirna_id", "sirna_id 0 goes with 2 values of sirna: s20, s21"),
    ],
)
def test_an_id_and_a_name_that_do_not_match_are_refused(release_tree, column, message):
    sites = read_sites(release_tree)
    sites.loc[sites["sirna"] == "s21", column] = {"sirna": "s20", "sirna_id": 0}[column]
    with pytest.raises(ValueError, match=message):
        class_map(sites)


def test_an_unknown_column_and_no_labels_at_all_are_refused(release_tree):
    sites = read_sites(release_tree)
    with pytest.raises(ValueError, match="Unknown label column 'gene'. Expected one of sirna_id, cell_type"):
        class_map(sites, "gene")
    sites["sirna_id"] = sites["sirna_id"].mask(sites["sirna_id"] >= 0)
    with pytest.raises(ValueError, match="No site has a label in the column 'sirna_id'"):
        class_map(sites)
    assert class_map(sites, trained=False) == []  # to be predicted, it needs none


def test_an_id_without_a_name_is_its_own_name(release_tree):
    sites = read_sites(release_tree)
    sites["sirna"] = None
    assert [row["name"] for row in class_map(sites)] == ["0", "1", "2", "3"]
