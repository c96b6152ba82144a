"""Reads a CSV table as text and checks each column, so that an error can name file, row and column."""

import numpy as np
import pandas as pd

FILE, ROW = "_file", "_row"


def read_table(path, columns, optional=()):
    """Reads a CSV file with every value as text, and remembers which file and row each came from.

    Args:
        path: `pathlib.Path` of the file.
        columns: names that must be there; others are dropped.
        optional: further names that are kept where they are there.

    Returns:
        pandas.DataFrame of str (empty text where the file has none), with the file's name and the row, counted as an
        editor counts lines, in two further columns.

    Raises:
        ValueError: if the file cannot be read as CSV, lacks a column, or holds no row.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path.name} is empty. Expected the columns {', '.join(columns)} and a row a site.") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read as a CSV table: {error}. Download or export it again.") from None
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path.name} lacks the column {', '.join(map(repr, missing))}. Expected {', '.join(columns)}; "
            f"found {', '.join(table.columns)}. Download or export the table again."
        )
    if not len(table):
        raise ValueError(f"{path.name} has a header but no rows: nothing to build. Download or export it again.")
    kept = [*columns, *(name for name in optional if name in table.columns and name not in columns)]
    table = table[kept].fillna("")
    table[FILE] = path.name
    table[ROW] = np.arange(2, len(table) + 2)
    return table


def check_cells(table, column, good, expected):
    """Raises a ValueError that names file, row, column, what was expected and what was found, unless all is `good`.

    Args:
        table: as `read_table` gives it.
        column: name of the column to speak of.
        good: boolean array, a value a row.
        expected: how a good value looks, to be read after "Expected".
    """
    good = np.asarray(good, bool)
    if good.all():
        return
    first = table.iloc[int(np.argmin(good))]
    count = int((~good).sum())
    more = f" ({count - 1} further rows are wrong likewise.)" if count > 1 else ""
    raise ValueError(
        f"{first[FILE]}, row {first[ROW]}, column {column!r}: expected {expected}; found {first[column]!r}. "
        f"Correct the table.{more}"
    )


def check_sites(table):
    """Checks the columns that every layout has, and gives `plate` and `site` as integers.

    The forms are RxRx1's: an experiment is CELLTYPE-NN, a well is a row A-P and a column 01-24, a well has two sites.
    They also keep a path made of these values inside the source folder.

    Raises:
        ValueError: at the first cell that is not well formed, and at a site that is listed twice.
    """
    table = table.copy()
    _match(table, "experiment", r"[A-Za-z0-9]+-\d{2,}", "CELLTYPE-NN such as HUVEC-01")
    _match(table, "plate", r"[1-9]\d{0,3}", "a plate number such as 1")
    _match(table, "well", r"[A-P](0[1-9]|1\d|2[0-4])", "a well of a 384-well plate, A01 to P24")
    _match(table, "site", r"[12]", "1 or 2")
    for column, values in (
        ("well_type", ("treatment", "positive_control", "negative_control")),
        ("dataset", ("train", "val", "test")),
    ):
        check_cells(table, column, table[column].isin(values), f"one of {', '.join(values)}")
    prefix = table["experiment"].str.split("-").str[0]
    check_cells(table, "cell_type", table["cell_type"] == prefix, "the cell type in the experiment's name")
    table["plate"] = table["plate"].astype("int64")
    table["site"] = table["site"].astype("int64")
    well_id = table["experiment"] + "_" + table["plate"].astype(str) + "_" + table["well"]
    # Kaggle calls a well's name id_code.
    name = "id_code" if "id_code" in table.columns else "well_id"
    check_cells(table, name, table[name] == well_id, "EXPERIMENT_PLATE_WELL of the same row")
    site_id = well_id + "_" + table["site"].astype(str)
    check_cells(table, "site_id", table["site_id"] == site_id, "EXPERIMENT_PLATE_WELL_SITE of the same row")
    twice = table["site_id"].duplicated()
    if twice.any():
        second = table[twice].iloc[0]
        first = table[table["site_id"] == second["site_id"]].iloc[0]
        raise ValueError(
            f"{second[FILE]}, row {second[ROW]}: the site {second['site_id']!r} is a duplicate of {first[FILE]}, row "
            f"{first[ROW]}. Expected each site once; {int(twice.sum())} rows repeat one. Remove the repeated rows."
        )
    return table


def _match(table, column, pattern, expected):
    codes, values = pd.factorize(table[column])
    good = pd.Series(values, dtype=object).astype(str).str.fullmatch(pattern).to_numpy(bool)
    check_cells(table, column, good[codes], expected)
