"""Tables of a screen -> one row a site."""

import re
from pathlib import Path

import pandas as pd

from tfrecords.table import check_cells, check_sites, read_table

KAGGLE_TABLES = ("train.csv", "test.csv", "train_controls.csv", "test_controls.csv")
COLUMNS = (
    "site_id",
    "well_id",
    "cell_type",
    "dataset",
    "experiment",
    "plate",
    "well",
    "site",
    "well_type",
    "sirna",
    "sirna_id",
)
SITES_PER_WELL = 2
KINDS = ("treatment", "positive_control", "negative_control")


def find_layout(source):
    """Recognizes the layout of a source folder: `"rxrx1"` (metadata.csv) or `"kaggle"` (the competition's four tables).

    Raises:
        ValueError: if the folder does not exist or holds neither.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"The source {str(source)!r} is not a folder. Pass the folder that holds the tables.")
    if (source / "metadata.csv").is_file():
        return "rxrx1"
    missing = [name for name in KAGGLE_TABLES if not (source / name).is_file()]
    if not missing:
        return "kaggle"
    found = f"only {sorted(set(KAGGLE_TABLES) - set(missing))}" if len(missing) < len(KAGGLE_TABLES) else "neither"
    raise ValueError(
        f"No tables recognized in {str(source)!r}. Expected metadata.csv (RxRx1 release, beside images/) or "
        f"{', '.join(KAGGLE_TABLES)} (Kaggle, beside train/ and test/); found {found}. "
        "Pass the folder that holds the tables."
    )


def read_sites(source):
    """Reads the tables of an RxRx1 or Kaggle tree into one table with a row for each site.

    Kaggle's rows are wells: each becomes sites 1 and 2. Its siRNAs are integers (2019) or names such as `sirna_250`
    and `UNTREATED` (today); names get their `sirna_id` by rank: treatments, then positive, then negative controls,
    each in the order of the number in the name. Images are not looked at.

    Args:
        source: folder with the tables, see `find_layout`.

    Returns:
        pandas.DataFrame sorted as the tables are: RxRx1's 11 columns (`plate` and `site` int64, `sirna` str or
        missing, `sirna_id` Int64, missing where the label is unknown) and `prefix`, the path of the site's channel
        files in the source up to `_w1.png`.

    Raises:
        ValueError: naming file, row and column of a missing column, an empty table, a duplicate site, or a value that
            is not what the column holds.
    """
    source = Path(source)
    layout = find_layout(source)
    raw = _read_release(source) if layout == "rxrx1" else _read_kaggle(source)
    sites = check_sites(raw)
    sites["sirna_id"] = _sirna_ids(sites)
    sites["sirna"] = sites["sirna"].where(sites["sirna"] != "", None)
    top = "images" if layout == "rxrx1" else sites["dataset"]
    folder = top + "/" + sites["experiment"] + "/Plate" + sites["plate"].astype(str)
    sites["prefix"] = folder + "/" + sites["well"] + "_s" + sites["site"].astype(str)
    return sites[[*COLUMNS, "prefix"]].reset_index(drop=True)


def _read_release(source):
    return read_table(source / "metadata.csv", COLUMNS)


def _read_kaggle(source):
    parts = []
    for name in KAGGLE_TABLES:
        columns = ["id_code", "experiment", "plate", "well"]
        columns += ["sirna"] if name != "test.csv" else []
        columns += ["well_type"] if name.endswith("_controls.csv") else []
        part = read_table(source / name, columns)
        part["dataset"] = name.split("_")[0].removesuffix(".csv")
        for column, value in (("sirna", ""), ("well_type", "treatment")):
            if column not in columns:
                part[column] = value
        parts.append(part)
    wells = pd.concat(parts, ignore_index=True)
    wells["cell_type"] = wells["experiment"].str.split("-").str[0]
    wells["well_id"] = wells["id_code"]
    wells["sirna_id"] = wells["sirna"].where(wells["sirna"].str.fullmatch(r"\d+(\.0+)?"), "")
    wells = wells.loc[wells.index.repeat(SITES_PER_WELL)].reset_index(drop=True)
    wells["site"] = [str(1 + i % SITES_PER_WELL) for i in range(len(wells))]
    wells["site_id"] = wells["well_id"] + "_" + wells["site"]
    return wells


def _sirna_ids(sites):
    given = sites["sirna_id"] != ""
    named = ~given & (sites["sirna"] != "")
    if not named.any():
        check_cells(
            sites,
            "sirna_id",
            sites["sirna_id"].str.fullmatch(r"(\d+(\.0+)?)?"),
            "a whole number such as 384, or nothing where the label is unknown",
        )
        return pd.to_numeric(sites["sirna_id"].where(given, None)).astype("Float64").astype("Int64")
    if given.any():
        check_cells(sites, "sirna", ~named, "an integer as in the other rows: integers and names cannot be mixed")
    names = sites.loc[named, ["sirna", "well_type"]].drop_duplicates()
    rank = {}
    for kind in KINDS:
        for name in sorted(set(names.loc[names["well_type"] == kind, "sirna"]), key=_natural):
            rank.setdefault(name, len(rank))
    return sites["sirna"].map(rank).astype("Int64")


def _natural(name):
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
