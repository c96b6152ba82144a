import pandas as pd
import pytest

from tfrecords.listing import list_sites


def test_kinds_part_a_split(records_tree):
    both = list_sites(records_tree, "val", ("treatment", "control"))
    parts = [list_sites(records_tree, "val", kind) for kind in ("treatment", "control")]
    assert len(both) == 8 and sorted(both["site_id"]) == sorted([*parts[0]["site_id"], *parts[1]["site_id"]])
    assert set(parts[0]["well_type"]) == {"treatment"} and "treatment" not in set(parts[1]["well_type"])


def test_labels_and_names_come_along(records_tree):
    row = list_sites(records_tree, "test").set_index("site_id").loc["HUVEC-18_1_B04_2"]
    assert (row["sirna"], row["sirna_id"], row["label"], row["plate"]) == ("s21", 1, 1, 1)


def test_what_is_not_there_is_named(records_tree, records):
    with pytest.raises(ValueError, match="Unknown split 'valid'"):
        list_sites(records_tree, "valid")
    with pytest.raises(ValueError, match="Unknown kinds \\('controls',\\)"):
        list_sites(records_tree, "val", ("controls",))
    shard = sorted(records.glob("val/*treatment*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"val/HUVEC-17_treatment.* has \d+ bytes, expected .*tfrecords.verify"):
        list_sites(records, "val")
    shard.unlink()
    with pytest.raises(ValueError, match="tfrecord is missing"):
        list_sites(records, "val")
    (records / "index.csv").write_text("")
    with pytest.raises(ValueError, match="index.csv is missing or was changed"):
        list_sites(records, "train")


def test_a_split_that_was_not_built_is_empty(release, edit_table, tmp_path):
    from tfrecords.build import build_records

    edit_table(release, lambda table: table[table["dataset"] != "val"])
    build_records(release, tmp_path / "records")
    with pytest.raises(ValueError, match=r"The split 'val' is empty.* train \(8\), id_test \(8\), test \(8\)"):
        list_sites(tmp_path / "records", "val")


def test_a_split_without_treatments_says_so(release, edit_table, tmp_path):
    from tfrecords.build import build_records

    edit_table(release, lambda table: table[(table["dataset"] != "val") | (table["well"] == "B02")])
    build_records(release, tmp_path / "records")
    with pytest.raises(ValueError, match=r"'val' has 2 sites, but none of kind treatment. Pass kinds=\('control',\)"):
        list_sites(tmp_path / "records", "val")


def test_some_experiments_alone(records_tree):
    every = list_sites(records_tree, "train")
    names = sorted(set(every["experiment"]))
    assert len(names) > 1
    for wanted in (names[0], names[:1]):
        found = list_sites(records_tree, "train", experiments=wanted)
        pd.testing.assert_frame_equal(found, every[every["experiment"] == names[0]].reset_index(drop=True))
    pd.testing.assert_frame_equal(list_sites(records_tree, "train", experiments=names), every)
    for wanted, message in ((["HUVEC-99"], "received 'HUVEC-99'"), ([], "received none"), (5, "received 5")):
        with pytest.raises(ValueError, match=f"some of {names[0]}.* the split 'train' .*{message}"):
            list_sites(records_tree, "train", experiments=wanted)
