import gzip
import sys

import pandas as pd
import pytest

from tfrecords.sources import read_sites
from tfrecords.table import check_cells, read_table


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


def test_two_treatments_in_one_well_name_both_rows(release, edit_table):
    def change(table):
        table.loc[1, ["sirna", "sirna_id"]] = table.loc[4, ["sirna", "sirna_id"]].tolist()
        return table

    edit_table(release, change)
    with pytest.raises(
        ValueError, match="metadata.csv, row 3: the well '.*' has '.*' .*, and in metadata.csv, row 2 it"
    ):
        read_sites(release)


def test_a_table_of_another_encoding_or_separator_is_told_apart(release):
    path = release / "metadata.csv"
    text = path.read_text()
    path.write_text(text.replace("HUVEC", "Bäcker"), encoding="latin-1")
    with pytest.raises(ValueError, match="metadata.csv cannot be read .* Expected a text in UTF-8"):
        read_sites(release)
    for sign in ";\t":
        path.write_text(text.replace(",", sign))
        with pytest.raises(ValueError, match="metadata.csv is not separated by commas: found 'site_id"):
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
    with pytest.raises(ValueError, match="lacks the column 'Site_ID '. .* There is 'site_id', which differs in blanks"):
        read_table(release / "metadata.csv", ["Site_ID "])
    with pytest.raises(ValueError, match="metadata.csv lacks the column 'plate'. Expected site_id, .* found site_id"):
        read_sites(release)


@pytest.mark.parametrize("text, message", [("", "is empty"), ("header", "has a header but no rows")])
def test_an_empty_table_is_refused(release, text, message):
    path = release / "metadata.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n" if text else "")
    with pytest.raises(ValueError, match=f"metadata.csv {message}"):
        read_sites(release)


def test_lines_above_the_header_are_told(tmp_path):
    for above in ("Exported 2024; v3\n\n", 'Database,"x\ny"\n', "Database,x\n\n"):
        (tmp_path / "wells.csv").write_text(f"{above}Plate,Well,Row\n1,A1,1\n")
        with pytest.raises(ValueError, match="wells.csv has its columns in line 3. Remove the lines above it"):
            read_table(tmp_path / "wells.csv", ["Well", "Plate"])
    with pytest.raises(ValueError, match="wells.csv lacks the column 'Well', 'Site'"):
        read_table(tmp_path / "wells.csv", ["Well", "Site"])


def test_a_spreadsheet_is_refused(tmp_path):
    (tmp_path / "wells.XLSX").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="wells.XLSX is a spreadsheet. Expected a CSV or Parquet table"):
        read_table(tmp_path / "wells.XLSX", ["Well"])


def test_a_file_that_is_no_table_is_refused(release):
    (release / "metadata.csv").write_bytes(b"\x89PNG\xff\xfe,\n\xff")
    with pytest.raises(ValueError, match="metadata.csv cannot be read as a CSV table"):
        read_sites(release)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [lines[0], lines[1], lines[2][:30]], "row 3: expected 11 values as in the header; found 2"),
        (lambda lines: [lines[0], lines[1] + ",more"], "row 2: expected 11 values .*; found 12"),
        (lambda lines: [*lines[:2], lines[2] + ",more"], "row 3: expected 11 values .*; found 12"),
        (lambda lines: [lines[0] + ",well", *(line + ",B02" for line in lines[1:])], "has two columns 'well'"),
        (lambda lines: [*lines[:2], '"' + lines[2]], "cannot be read as a CSV table"),
    ],
)
def test_rows_and_headers_that_do_not_fit_are_refused(release, change, message):
    path = release / "metadata.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=f"metadata.csv,? ?{message}"):
        read_sites(release)


def test_blank_lines_are_passed_over_and_counted(release):
    path = release / "metadata.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", *lines[1:], "", ""]))
    assert len(read_sites(release)) == 32
    path.write_text("\n".join([lines[0], "", lines[1].replace(",B02,", ",B2,")]))
    with pytest.raises(ValueError, match="metadata.csv, row 3, column 'well'"):
        read_sites(release)


def test_a_packed_table_is_read_and_one_cut_short_refused(tmp_path):
    path = tmp_path / "wells.csv.gz"
    packed = gzip.compress(b"a,b\n1,2\n" * 50)
    path.write_bytes(packed)
    assert list(read_table(path, ["a"])["a"][:2]) == ["1", "a"]
    for damaged in (packed[:-20], b"a,b\n1,2\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="wells.csv.gz cannot be read as a CSV table: .* Download or export it"):
            read_table(path, ["a"])


def test_a_parquet_table_is_read_as_text(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra `parquet`")
    path = tmp_path / "wells.parquet"
    columns = {"a": [1.0, None, 3.0], "b": ["x", None, "NA"], "c": [True, False, True], "d": [0.5, 1.5, 2.0]}
    pd.DataFrame(columns).to_parquet(path)
    table = read_table(path, ["a", "b", "c", "d"])
    assert table[["a", "b", "c", "d"]].values.tolist() == [
        ["1", "x", "True", "0.5"],
        ["", "", "False", "1.5"],
        ["3", "NA", "True", "2"],
    ]
    with pytest.raises(ValueError, match="wells.parquet, row 2, column 'a': expected a number; found ''"):
        check_cells(table, "a", table["a"] != "", "a number")
    with pytest.raises(ValueError, match="wells.parquet lacks the column 'e'. Expected a, e; found a, b, c, d"):
        read_table(path, ["a", "e"])
    path.rename(tmp_path / "WELLS.PARQUET")
    assert len(read_table(tmp_path / "WELLS.PARQUET", ["a"])) == 3
    (tmp_path / "WELLS.PARQUET").rename(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="wells.parquet cannot be read as a Parquet table"):
        read_table(path, ["a"])


def test_without_pyarrow_a_parquet_table_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: `pip install 'keras-abra\[parquet\]'`"):
        read_table(tmp_path / "wells.parquet", ["a"])


def test_of_a_parquet_table_no_more_is_read_than_is_kept(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow, of the extra `parquet`")
    pd.DataFrame({name: ["1", "2"] for name in ("a", "b", "feature_1", "feature_2")}).to_parquet(tmp_path / "w.parquet")
    whole, asked = parquet.read_table, []

    def read(path, columns):
        asked.append(columns)
        return whole(path, columns=columns)

    monkeypatch.setattr(parquet, "read_table", read)
    assert list(read_table(tmp_path / "w.parquet", ["b"], optional=["a", "c"])["b"]) == ["1", "2"]
    assert asked == [["b", "a"]]
