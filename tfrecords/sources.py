"""Tables of a screen -> one row a site."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from tfrecords.images import CHANNEL
from tfrecords.own_screen import SCREEN_FILE, read_screen
from tfrecords.own_sites import rank_labels, read_own_sites
from tfrecords.splits import SPLITS
from tfrecords.table import cell_types_of, check_cells, check_sites, read_table

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
# What the loader of RxRx1-WILDS reads (p-lambda/wilds, rxrx1_dataset.py); its siRNAs are numbered as RxRx1's.
_WILDS_COLUMNS = ("dataset", "site", "experiment", "plate", "well", "cell_type", "sirna_id")
TREATMENTS, NEGATIVE_CONTROL = 1108, 1138
LAYOUTS = ("auto", "rxrx1", "wilds", "kaggle", "screen")
SITES_PER_WELL = 2


def find_layout(source):
    """Recognizes the layout of a source folder.

    `"kaggle"` has the competition's four tables. RxRx1's release and RxRx1-WILDS both have metadata.csv and images/:
    the first folder of images found tells whether a site is a file for each channel (`B02_s1_w1.png`, `"rxrx1"`) or
    one RGB file (`B02_s1.png`, `"wilds"`). Without any image it is `"rxrx1"`.

    `"screen"` is one's own, described in screen.toml.

    Raises:
        ValueError: if the folder does not exist or holds none of them.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"The source {str(source)!r} is not a folder. Pass the folder that holds the tables.")
    if (source / SCREEN_FILE).is_file():
        return "screen"
    if (source / "metadata.csv").is_file():
        return "wilds" if _has_rgb_files(source / "images") else "rxrx1"
    missing = [name for name in KAGGLE_TABLES if not (source / name).is_file()]
    if not missing:
        return "kaggle"
    found = f"only {sorted(set(KAGGLE_TABLES) - set(missing))}" if len(missing) < len(KAGGLE_TABLES) else "neither"
    raise ValueError(
        f"No tables recognized in {str(source)!r}. Expected metadata.csv (RxRx1 release, beside images/) or "
        f"{', '.join(KAGGLE_TABLES)} (Kaggle, beside train/ and test/); found {found}. "
        f"Pass the folder that holds the tables, or describe a screen of your own in {SCREEN_FILE}."
    )


def read_sites(source, layout="auto", split_column=None, screen=None):
    """Reads the tables of an RxRx1, RxRx1-WILDS or Kaggle tree into one table with a row for each site.

    Kaggle's rows are wells: each becomes sites 1 and 2. Its siRNAs are integers (2019) or names such as `sirna_250`
    and `UNTREATED` (today); names get their `sirna_id` by rank: treatments, then positive, then negative controls,
    each in the order of the number in the name. WILDS's table may hold no more than what its loader reads; the other
    columns then follow from these. Images are not looked at, but to tell WILDS from the release.

    Args:
        source: folder with the tables, see `find_layout`.
        layout: one of `LAYOUTS`; `"auto"` (default) recognizes it.
        split_column: a further column that names a split for each row, or nothing for rows to leave out.
        screen: what describes a screen of one's own, see `own_screen.read_screen`; None unless `layout` is `screen`.

    Returns:
        pandas.DataFrame sorted as the tables are: RxRx1's 11 columns (`plate` and `site` int64, `sirna` str or
        missing, `sirna_id` Int64, missing where the label is unknown), `path`, where the site's files are (see
        `images.channel_files`), and `own_split` if `split_column` was asked for. Of a screen of one's own also
        `plate_name` and `site_name`, see `own_sites.read_own_sites`.

    Raises:
        ValueError: naming file, row and column of a missing column, an empty table, a duplicate site, or a value that
            is not what the column holds.
    """
    source = Path(source)
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Expected one of {', '.join(LAYOUTS)}.")
    layout = find_layout(source) if layout == "auto" else layout
    if layout == "screen":
        return read_own_sites(source, read_screen(source, screen), split_column)
    own = () if split_column is None else (split_column,)
    raw = {"rxrx1": _read_release, "wilds": _read_wilds, "kaggle": _read_kaggle}[layout](source, own)
    sites = check_sites(raw)
    sites["sirna_id"] = _sirna_ids(sites)
    sites["sirna"] = sites["sirna"].where(sites["sirna"] != "", None)
    top = sites["dataset"] if layout == "kaggle" else "images"
    folder = top + "/" + sites["experiment"] + "/Plate" + sites["plate"].astype(str)
    ending = ".png" if layout == "wilds" else f"_w{CHANNEL}.png"
    sites["path"] = folder + "/" + sites["well"] + "_s" + sites["site"].astype(str) + ending
    columns = [*COLUMNS, "path"]
    if own:
        check_cells(
            sites, split_column, sites[split_column].isin(("", *SPLITS)), f"one of {', '.join(SPLITS)}, or nothing"
        )
        sites["own_split"] = sites[split_column]
        columns.append("own_split")
    return sites[columns].reset_index(drop=True)


def _read_release(source, own):
    return read_table(source / "metadata.csv", (*COLUMNS, *own))


def _read_wilds(source, own):
    sites = read_table(source / "metadata.csv", (*_WILDS_COLUMNS, *own), optional=COLUMNS)
    number = pd.to_numeric(sites["sirna_id"], errors="coerce")
    kind = np.select(
        [number < TREATMENTS, number < NEGATIVE_CONTROL], ["treatment", "positive_control"], "negative_control"
    )
    well_id = sites["experiment"] + "_" + sites["plate"] + "_" + sites["well"]
    derived = {
        "well_type": kind,
        "sirna": sites["sirna_id"],
        "well_id": well_id,
        "site_id": well_id + "_" + sites["site"],
    }
    return sites.assign(**{name: value for name, value in derived.items() if name not in sites})


def _read_kaggle(source, own):
    parts = []
    for name in KAGGLE_TABLES:
        columns = ["id_code", "experiment", "plate", "well"]
        columns += ["sirna"] if name != "test.csv" else []
        columns += ["well_type"] if name.endswith("_controls.csv") else []
        part = read_table(source / name, [*columns, *own])
        part["dataset"] = name.split("_")[0].removesuffix(".csv")
        for column, value in (("sirna", ""), ("well_type", "treatment")):
            if column not in columns:
                part[column] = value
        parts.append(part)
    wells = pd.concat(parts, ignore_index=True)
    wells["cell_type"] = cell_types_of(wells["experiment"])
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
    return rank_labels(sites["sirna"], sites["well_type"])


def _has_rgb_files(images):
    for folder in sorted(images.glob("*/*")):
        names = [path.stem for path in folder.glob("*.png")] if folder.is_dir() else []
        if names:
            return not any(re.search(r"_s\d+_w\d+$", name) for name in names)
    return False
