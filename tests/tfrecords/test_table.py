import pandas as pd
import pytest

from tfrecords.sources import read_sites


def set_cell(column, value, row=3):
    def change(table):
        table.loc[row - 2, column] = value

    return change


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("experiment", "HUVEC", "expected CELLTYPE-NN such as HUVEC-01; found 'HUVEC'"),
        ("experiment", "../HUVEC-01", "expected CELLTYPE-NN"),
        ("plate", "one", "expected a plate number such as 1; found 'one'"),
        ("plate", "0", "expected a plate number"),
        ("well", "B2", "expected a well of a 384-well plate, A01 to P24; found 'B2'"),
        ("well", "Q02", "expected a well"),
        ("site", "3", "expected 1 or 2; found '3'"),
        ("well_type", "control", "expected one of treatment, positive_control, negative_control; found 'control'"),
        ("dataset", "id_test", "expected one of train, val, test; found 'id_test'"),
        ("cell_type", "RPE", "expected the cell type in the experiment's name; found 'RPE'"),
        ("well_id", "HUVEC-01_2_B02", "expected EXPERIMENT_PLATE_WELL of the same row"),
        ("site_id", "HUVEC-01_1_B02", "expected EXPERIMENT_PLATE_WELL_SITE of the same row"),
        ("sirna_id", "s20", "expected a whole number such as 384, .*; found 's20'"),
    ],
)
def test_a_bad_cell_is_named_by_file_row_and_column(release, edit_table, column, value, message):
    edit_table(release, set_cell(column, value))
    with pytest.raises(ValueError, match=f"metadata.csv, row 3, column '{column}': {message}"):
        read_sites(release)


def test_more_of_the_same_are_counted(release, edit_table):
    edit_table(release, lambda table: table.assign(plate="x"))
    with pytest.raises(ValueError, match=r"row 2, .*31 further rows"):
        read_sites(release)


def test_a_duplicate_site_names_both_rows(release, edit_table):
    edit_table(release, lambda table: pd.concat([table, table.iloc[[4]]]))
    with pytest.raises(ValueError, match="metadata.csv, row 34: the site 'HUVEC-01_1_B04_1' is a duplicate .* row 6"):
        read_sites(release)


def test_a_well_in_two_kaggle_tables_is_a_duplicate(tmp_path, kaggle_tables, edit_table):
    kaggle_tables(tmp_path, lambda row: row.sirna_id)
    train = pd.read_csv(tmp_path / "train.csv", dtype=str)
    edit_table(tmp_path, lambda table: pd.concat([table, train.iloc[[0]][table.columns]]), "test.csv")
    with pytest.raises(
        ValueError, match="test.csv, row 6: the site 'HUVEC-01_1_B03_1' is a duplicate of train.csv, row 2"
    ):
        read_sites(tmp_path)


def test_a_missing_column_is_named(release, edit_table):
    edit_table(release, lambda table: table.drop(columns="plate"))
    with pytest.raises(ValueError, match="metadata.csv lacks the column 'plate'. Expected site_id, .* found site_id"):
        read_sites(release)


@pytest.mark.parametrize("text, message", [("", "is empty"), ("header", "has a header but no rows")])
def test_an_empty_table_is_refused(release, text, message):
    path = release / "metadata.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n" if text else "")
    with pytest.raises(ValueError, match=f"metadata.csv {message}"):
        read_sites(release)


def test_a_file_that_is_no_table_is_refused(release):
    (release / "metadata.csv").write_bytes(b"\x89PNG\xff\xfe,\n\xff")
    with pytest.raises(ValueError, match="metadata.csv cannot be read as a CSV table"):
        read_sites(release)
