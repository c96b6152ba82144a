import pandas as pd
import pytest

from tfrecords.sources import COLUMNS, find_layout, read_sites


def test_layouts_are_recognized(release_tree, kaggle_tree):
    assert find_layout(release_tree) == "rxrx1"
    assert find_layout(kaggle_tree) == "kaggle"


def test_a_row_is_a_site_with_the_columns_of_rxrx1(release_tree):
    sites = read_sites(release_tree)
    assert list(sites.columns) == [*COLUMNS, "path"]
    assert len(sites) == 32 and sites["site_id"].is_unique
    row = sites.set_index("site_id").loc["RPE-01_1_B03_2"]
    assert (row["experiment"], row["plate"], row["well"], row["site"]) == ("RPE-01", 1, "B03", 2)
    assert (row["sirna"], row["sirna_id"], row["cell_type"]) == ("s20", 0, "RPE")
    assert row["path"] == "images/RPE-01/Plate1/B03_s2_w{channel}.png"


def test_kaggle_wells_become_two_sites_and_test_labels_are_unknown(kaggle_tree, release_tree):
    sites, release = (
        read_sites(tree).sort_values("site_id", ignore_index=True) for tree in (kaggle_tree, release_tree)
    )
    same = ["site_id", "well_id", "cell_type", "experiment", "plate", "well", "site", "well_type"]
    pd.testing.assert_frame_equal(sites[same], release[same], check_dtype=False)
    withheld = (sites["dataset"] == "test") & (sites["well_type"] == "treatment")
    assert sites.loc[withheld, ["sirna", "sirna_id"]].isna().all(axis=None)
    assert (sites.loc[~withheld, "sirna_id"] == release.loc[~withheld, "sirna_id"]).all()
    assert sites["path"].str.match(r"(train|test)/[A-Z]+-\d\d/Plate1/").all()


def test_sirna_names_are_numbered_treatments_first_in_the_order_of_their_numbers(tmp_path, kaggle_tables):
    names = {0: "sirna_250", 1: "sirna_62", 2: "sirna_7", 3: "UNTREATED"}
    kaggle_tables(tmp_path, lambda row: names[row.sirna_id])
    sites = read_sites(tmp_path)
    numbers = dict(sites[["sirna", "sirna_id"]].dropna().drop_duplicates().itertuples(index=False))
    assert numbers == {"sirna_62": 0, "sirna_250": 1, "sirna_7": 2, "UNTREATED": 3}


def test_labels_written_as_floats_are_read(release, edit_table):
    edit_table(release, lambda table: table.assign(sirna_id=table["sirna_id"] + ".0"))
    assert set(read_sites(release)["sirna_id"]) == {0, 1, 2, 3}


def test_integers_and_names_mixed_are_refused(tmp_path, kaggle_tables):
    kaggle_tables(tmp_path, lambda row: "sirna_3" if row.sirna_id == 1 else row.sirna_id)
    with pytest.raises(ValueError, match="train.csv, row 3, column 'sirna': expected an integer .* found 'sirna_3'"):
        read_sites(tmp_path)


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No tables recognized .* metadata.csv .* found neither"):
        read_sites(tmp_path)
    (tmp_path / "train.csv").touch()
    with pytest.raises(ValueError, match="found only \\['train.csv'\\]"):
        read_sites(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        read_sites(tmp_path / "nowhere")
