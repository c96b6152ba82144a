"""Reads a CSV or Parquet table as text and checks each column, so that an error can name file, row and column."""

import csv
import gzip
import itertools
import zlib

import numpy as np
import pandas as pd

from tfrecords.labels import WELL_TYPES

FILE, ROW = "_file", "_row"
PARQUET = (".parquet", ".pq")
_PREAMBLE = 50  # lines that may stand above a table's header


def read_table(path, columns, optional=(), advice="Download or export the table again."):
    """Reads a CSV or Parquet file with every value as text, and remembers which file and row each came from.

    Args:
        path: `pathlib.Path` of the file; `.parquet` or `.pq`, or CSV in UTF-8, which may be packed (`.csv.gz`).
        columns: names that must be there; others are dropped.
        optional: further names that are kept where they are there.
        advice: what the user may do if a column lacks, or a function of a list of those that do.

    Returns:
        pandas.DataFrame of str (empty text where the file has none), with the file's name and the row in two further
        columns: the line of a CSV file, the number, from 1, of a row in a Parquet file.

    Raises:
        ValueError: if the file cannot be read, lacks a column or has it twice, or holds no row or too short a one.
        ImportError: if it is a Parquet file and there is no pyarrow.
    """
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise ValueError(f"{path.name} is a spreadsheet. Expected a CSV or Parquet table: save it as 'CSV UTF-8'.")
    read = _read_parquet if path.suffix.lower() in PARQUET else _read_csv
    try:
        table = read(path, columns, optional, advice)
    except FileNotFoundError:
        raise ValueError(f"There is no table {str(path)!r}. Correct its name, or put it there.") from None
    if not len(table):
        raise ValueError(f"{path.name} has a header but no rows: nothing to build. Download or export it again.")
    table[FILE] = path.name
    return table


def _read_csv(path, columns, optional, advice):
    # The standard library's reader, not that of pandas, which fills up rows that are too short, takes the first column
    # for a name of the rows where they are too long, and does not tell the line of any.
    rows, places, seen = [], [], {}
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None:
                raise ValueError(
                    f"{path.name} is empty. Expected the columns {', '.join(columns)} and a row a site or a well."
                )
            kept = _check_header(path, header, columns, optional, advice, reader)
            pick = [header.index(name) for name in kept]
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path.name}, row {line}: expected {len(header)} values as in the header; found {len(row)}. "
                        "Is the file cut short, or a comma not in quotes? Download or export it again."
                    )
                if row:
                    # A text that comes often is kept once.
                    rows.append([seen.setdefault(row[place], row[place]) for place in pick])
                    places.append(line)
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} cannot be read as a CSV table: {error}. Expected a text in UTF-8: save it as 'CSV UTF-8'."
        ) from None
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name} cannot be read as a CSV table: {error}. Download or export it again.") from None
    # Python's own texts, not pyarrow's where that is installed, whose patterns differ.
    table = pd.DataFrame(rows, columns=kept, dtype=object)
    table[ROW] = np.array(places, np.int64)
    return table


def _read_parquet(path, columns, optional, advice):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"{path.name} is a Parquet table, which needs pyarrow: `pip install 'keras-abra[parquet]'`, or export CSV."
        ) from None
    try:
        names = pyarrow.parquet.read_schema(path).names
        kept = _check_header(path, names, columns, optional, advice)
        table = pyarrow.parquet.read_table(path, columns=kept)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path.name} cannot be read as a Parquet table: {error}. Export it again.") from None
    columns = {name: [_as_text(value) for value in table[name].to_pylist()] for name in kept}
    table = pd.DataFrame(columns, dtype=object)
    table[ROW] = np.arange(1, len(table) + 1)
    return table


def _as_text(value):
    if value is None or value != value:
        return ""
    # A column of whole numbers in which one is missing has often become one of floats.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _check_header(path, header, columns, optional, advice, later=()):
    missing = [name for name in columns if name not in header]
    if missing and any({*columns} <= {*line} for line in itertools.islice(later, _PREAMBLE)):
        raise ValueError(f"{path.name} has its columns in line {later.line_num}. Remove the lines above it.")
    if missing and len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        raise ValueError(f"{path.name} is not separated by commas: found {header[0]!r}. Save it with commas.")
    if missing:
        alike = [name for name in header if plain(name) in map(plain, missing)]
        hint = f" There is {', '.join(map(repr, alike))}, which differs in blanks or capitals." if alike else ""
        raise ValueError(
            f"{path.name} lacks the column {', '.join(map(repr, missing))}. Expected {', '.join(columns)}; "
            f"found {', '.join(header)}.{hint} {advice(missing) if callable(advice) else advice}"
        )
    kept = [*dict.fromkeys([*columns, *(name for name in optional if name in header)])]
    twice = [name for name in kept if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path.name} has two columns {twice[0]!r}. Expected each name once: rename or remove one.")
    return kept


def plain(text):
    """A text without what a person overlooks: blanks around it, several for one, and case."""
    return " ".join(text.split()).casefold()


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
    found = first[column].item() if isinstance(first[column], np.generic) else first[column]
    count = int((~good).sum())
    more = f" ({count - 1} further rows are wrong likewise.)" if count > 1 else ""
    raise ValueError(
        f"{first[FILE]}, row {first[ROW]}, column {column!r}: expected {expected}; found {found!r}. "
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
        ("well_type", WELL_TYPES),
        ("dataset", ("train", "val", "test")),
    ):
        check_cells(table, column, table[column].isin(values), f"one of {', '.join(values)}")
    good = table["cell_type"] == cell_types_of(table["experiment"])
    check_cells(table, "cell_type", good, "the cell type in the experiment's name")
    table["plate"] = table["plate"].astype("int64")
    table["site"] = table["site"].astype("int64")
    well_id = table["experiment"] + "_" + table["plate"].astype(str) + "_" + table["well"]
    # Kaggle calls a well's name id_code.
    name = "id_code" if "id_code" in table.columns else "well_id"
    check_cells(table, name, table[name] == well_id, "EXPERIMENT_PLATE_WELL of the same row")
    site_id = well_id + "_" + table["site"].astype(str)
    check_cells(table, "site_id", table["site_id"] == site_id, "EXPERIMENT_PLATE_WELL_SITE of the same row")
    rows = table[FILE] + ", row " + table[ROW].astype(str)
    for first, second, count in find_repeated(table.assign(row=rows), "site_id"):
        raise ValueError(
            f"{second['row']}: the site {second['site_id']!r} is a duplicate of {first['row']}. Expected each site "
            f"once; {count} rows repeat one. Remove the repeated rows."
        )
    check_one_treatment(well_id, table["sirna"], table["well_type"], rows)
    return table


def find_repeated(table, key):
    """Gives, if any row has the `key` of an earlier one, the first such pair: (earlier, later, how many rows have)."""
    twice = table[key].duplicated()
    if twice.any():
        second = table[twice].iloc[0]
        yield table[table[key] == second[key]].iloc[0], second, int(twice.sum())


def check_one_treatment(wells, labels, kinds, rows):
    """Raises a ValueError that names two rows of one well with different labels, or of different kinds.

    Args:
        wells: pandas.Series of str, the well of each row.
        labels: pandas.Series of str; empty where unknown, which goes with any.
        kinds: pandas.Series of str, the kinds of the wells.
        rows: pandas.Series of str, file and row of each.
    """
    known = pd.DataFrame({"well": wells, "label": labels, "kind": kinds, "row": rows})[(labels != "").to_numpy()]
    for first, second, _ in find_repeated(known.drop_duplicates(["well", "label", "kind"]), "well"):
        raise ValueError(
            f"{second['row']}: the well {second['well']!r} has {second['label']!r} ({second['kind']}), and in "
            f"{first['row']} it has {first['label']!r} ({first['kind']}). Expected one treatment a well: correct the "
            "table."
        )


def cell_types_of(experiments):
    """What stands before the hyphen of each experiment's name, as in HUVEC-01: Series of str."""
    return experiments.map({name: name.split("-")[0] for name in experiments.unique()})


def _match(table, column, pattern, expected):
    codes, values = pd.factorize(table[column])
    good = pd.Series(values, dtype=object).astype(str).str.fullmatch(pattern).to_numpy(bool)
    check_cells(table, column, good[codes], expected)
