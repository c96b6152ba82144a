"""The table of a screen of one's own -> one row a site, as RxRx1 has it."""

import functools
import urllib.parse
from pathlib import Path

import pandas as pd

from tfrecords.images import CHANNEL
from tfrecords.labels import WELL_TYPES
from tfrecords.leaks import place_of_well
from tfrecords.own_paths import combine, fields_of, fill_template
from tfrecords.own_screen import COLUMN_NAMES, told_otherwise
from tfrecords.reports import (
    report_half_labelled,
    report_missing_words,
    report_shared,
    report_similar,
    report_unused,
)
from tfrecords.splits import SPLITS, natural
from tfrecords.table import FILE, ROW, check_cells, check_one_treatment, find_repeated, plain, read_table

_LONGEST = 200
_CONTROL = r"[\x00-\x1f\x7f]"
_APART = "Say which column tells sites apart, or remove the repeated row; of rows for each channel keep one."
_NO_PLATE = "No column is named as the plate: each experiment is taken for one."
_OURS = ("plate", "site", "cell_type", "sirna", "well_type", "dataset")


def read_own_sites(source, screen, split_column=None):
    """Reads a screen's table into the columns of `sources.read_sites`.

    Nothing need look like RxRx1: experiments, wells and labels are any text, and plates and sites that are not whole
    numbers are numbered in their natural order. Labels get `sirna_id` by rank: treatments, then positive, then
    negative controls, each in natural order (2 before 10); an empty one is unknown.

    Args:
        source: folder of the images.
        screen: dict of `own_screen.read_screen`.
        split_column: as for `read_sites`.

    Returns:
        pandas.DataFrame: RxRx1's 11 columns, `path`, `plate_name`, `site_name` (as the table has them), `row` (which
        file and row), and `own_split` if `split_column` was asked for. `dataset` is empty for experiments that no list
        of splits names, and train for all if nothing says otherwise.

    Raises:
        ValueError: naming file, row and column of a value that cannot be, a site listed twice, or a path that leaves
            the source folder.
    """
    columns = screen["columns"]
    images = screen["images"]
    templates = [images[name] for name in screen["channels"]] if isinstance(images, dict) else [images]
    own = () if split_column is None else (split_column,)
    ours = {*columns, *({"site"} if "sites" in screen else ())}
    of_table = [name for template in templates for name in fields_of(template) if name not in ours]
    made = {text: fields_of(text) for text in columns.values() if "{" in text}  # of several columns
    read = [name for text in columns.values() for name in made.get(text, [text])]
    used = [*dict.fromkeys([*read, *of_table, *own])]
    raw = read_table(
        Path(source) / screen["table"],
        used,
        optional=[name for name in _OURS if name not in {*columns, *used} | told_otherwise(screen)],
        advice=functools.partial(_advice_on_columns, templates[0], ours),
    )
    for text in made:
        raw[text] = combine(text, raw, is_label=text == columns.get("sirna"))
    report_unused([name for name in _OURS if name in raw and name not in used])
    if "plate" not in columns:
        print(f"{_NO_PLATE} Add `plate = ...` to the columns if it has several.")
    if "sites" in screen:
        count = len(raw)
        raw = raw.loc[raw.index.repeat(len(screen["sites"]))].reset_index(drop=True)
        raw["_site"] = screen["sites"] * count
    sites = pd.DataFrame({"row": raw[FILE] + ", row " + raw[ROW].astype(str)})
    texts = {name: (raw[theirs], theirs) for name, theirs in columns.items()}
    texts.setdefault("plate", (pd.Series("1", index=raw.index), "plate"))
    texts.setdefault("site", (raw["_site"], "sites") if "sites" in screen else (pd.Series("1", raw.index), "site"))
    texts.setdefault("cell_type", (pd.Series(screen.get("cell_type", "unknown"), index=raw.index), "cell_type"))
    texts.setdefault("sirna", (pd.Series("", index=raw.index), "sirna"))
    for name in ("experiment", "well", "plate", "site", "cell_type", "sirna"):
        values, theirs = texts[name]
        good = ~values.str.contains(_CONTROL) & ((values != "") | (name == "sirna"))
        check_cells(raw.assign(**{theirs: values}), theirs, good, f"the {name}, a text without control characters")
        sites[name] = values if name != "sirna" else values.where(values.str.strip() != "", "")
        report_similar(values, theirs)
    short = sites["experiment"].map(lambda name: len(urllib.parse.quote(name, safe="")) <= _LONGEST)
    theirs = texts["experiment"][1]
    check_cells(
        raw, theirs, short, f"a name that a file's can hold (at most {_LONGEST} bytes, with %XX for other signs)"
    )
    for name in ("plate", "site"):
        sites[f"{name}_name"] = sites[name]
        sites[name] = _numbers(sites[name])
    sites["well_type"] = _well_types(raw, screen, sites["sirna"])
    sites["dataset"] = _datasets(raw, screen, sites["experiment"])
    if "dataset" in columns and not own:
        _check_experiments(sites["experiment"], sites["dataset"], columns["dataset"], sites["row"])
    sites["well_id"] = sites["experiment"] + "_" + sites["plate"].astype(str) + "_" + sites["well"]
    sites["site_id"] = sites["well_id"] + "_" + sites["site"].astype(str)
    _check_wells(sites)
    _check_once(sites, "site_id", "site", _APART if "plate" in columns else f"{_NO_PLATE} {_APART}")
    places = sites["experiment"] + "_" + sites["plate"].astype(str) + "_" + sites["well"].map(place_of_well)  # A1, A01
    controls = (sites["sirna"] == "") & (sites["well_type"] != "treatment")  # not unknown: known to hold nothing
    check_one_treatment(places, sites["sirna"].mask(controls, "no label"), sites["well_type"], sites["row"])
    report_half_labelled(places, sites)
    treated = sites["well_type"] == "treatment"
    report_missing_words(sites["sirna"][treated], texts["sirna"][1])
    sites["sirna_id"] = rank_labels(sites["sirna"], sites["well_type"])
    sites["sirna"] = sites["sirna"].where(sites["sirna"] != "", None)
    known = texts | {name: (raw[name], name) for name in of_table}
    sites["path"] = _paths(templates, screen, known, raw, source)
    advice = "Name in the template what tells sites apart, or correct the table."
    _check_once(sites, "path", "file", advice)
    if sites["path"].map(type).eq(tuple).all():  # a file for each channel
        twice = sites["path"].map(lambda files: len({*files}) < len(files))
        if twice.any():
            first = sites[twice].iloc[0]
            raise ValueError(
                f"{first['row']}: several channels of one site have the same file, among {', '.join(first['path'])} "
                f"({int(twice.sum()):,} such sites). Expected a file of its own for each. Correct the table."
            )
        for i in range(len(sites["path"].iloc[0])):
            # The sites of a well may share one, such as an overview.
            files = sites.assign(path=sites["path"].str[i])
            _check_once(files.drop_duplicates(["well_id", "path"]), "path", "file", advice)
            report_shared(files, screen["channels"][i])
    if own:
        good = raw[split_column].isin(("", *SPLITS))
        check_cells(raw, split_column, good, f"one of {', '.join(SPLITS)}, or nothing")
        sites["own_split"] = raw[split_column]
    return sites


def rank_labels(names, well_types):
    """Numbers the names: treatments, then positive, then negative controls, each in natural order.

    Args:
        names: pandas.Series of str, empty where unknown.
        well_types: pandas.Series of `labels.WELL_TYPES`.

    Returns:
        pandas.Series of Int64, missing where unknown.
    """
    pairs = pd.DataFrame({"name": names, "well_type": well_types})[names != ""].drop_duplicates()
    rank = {}
    for well_type in WELL_TYPES:
        for name in sorted(
            set(pairs.loc[pairs["well_type"] == well_type, "name"]), key=lambda name: (natural(name), name)
        ):
            rank.setdefault(name, len(rank))
    return names.map(rank).astype("Int64")


def _advice_on_columns(template, named, lacking):
    """What to do about columns that the table lacks; `named`: those of ours that the description names."""
    advice = (
        f"Correct the names of columns, the fields of the images' template {template!r}, or the table; a column of "
        "another table must be joined to it first."
    )
    unnamed = next((name for name in lacking if name in COLUMN_NAMES and name not in named), None)
    if unnamed is None:
        return advice
    sites = ', or list the sites of each well, `sites = ["1", "2"]`' if unnamed == "site" else ""
    return f"Name the table's column that is our {unnamed}, `{unnamed} = ...`{sites}. Or: {advice}"


def _numbers(texts):
    values = sorted(set(texts), key=lambda text: (natural(text), text))
    whole = all(text.isascii() and text.isdecimal() and len(text) <= 18 for text in values)
    numbers = [int(text) for text in values] if whole else []
    if not whole or len(set(numbers)) < len(values):
        numbers = range(1, len(values) + 1)
    return texts.map(dict(zip(values, numbers, strict=True))).astype("int64")


def _well_types(raw, screen, sirna):
    column = screen["columns"].get("well_type")
    if column is not None:
        named = screen.get("well_types") or {kind: [kind] for kind in WELL_TYPES}
        meanings = {value: kind for kind, values in named.items() for value in values}
        if "treatment" not in named:
            _check_found(meanings, raw[column], column, screen["table"])
            others = sorted({*raw[column]} - {*meanings})
            more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
            print(
                f"The column {column!r} tells the controls: its other values ({', '.join(map(repr, others[:5]))}{more})"
                " are treatments."
            )
            return raw[column].map(lambda value: meanings.get(value, "treatment"))
        words = ", ".join(meaning or "nothing" for meaning in meanings)
        hint = "" if "" in meanings or (raw[column] != "").all() else '; `treatment = [""]` takes empty cells for such'
        check_cells(raw, column, raw[column].isin(list(meanings)), f"one of {words}{hint}")
        return raw[column].map(meanings)
    controls = screen.get("controls", {})
    kinds = {value: f"{kind}_control" for kind, values in controls.items() for value in values}
    other = (
        ' Where another column tells controls: `well_type = "Compound"` under `columns` and, in place of `controls`, '
        '`negative_control = ["DMSO"]` under `well_types`.'
    )
    _check_found(kinds, sirna, screen["columns"].get("sirna", "sirna"), screen["table"], other)
    return sirna.map(lambda value: kinds.get(value, "treatment"))


def _check_found(controls, values, column, table, other=""):
    absent = sorted(set(controls) - set(values))
    if absent:
        values = sorted(set(values) - {""}, key=lambda value: (plain(value) != plain(absent[0]), value))
        raise ValueError(
            f"The control {absent[0]!r} is in no row of {table}. Expected a value of the column {column!r}, "
            f"{'such as ' + ', '.join(map(repr, values[:3])) if values else 'which has none'}.{other}"
        )


def _datasets(raw, screen, experiments):
    column = screen["columns"].get("dataset")
    if column is not None:
        check_cells(raw, column, raw[column].isin(("train", "val", "test", "")), "one of train, val, test, or nothing")
        return raw[column]
    if "splits" not in screen:
        return pd.Series("train", index=raw.index)
    of = {experiment: split for split, names in screen["splits"].items() for experiment in names}
    absent = sorted(set(of) - set(experiments))
    if absent:
        raise ValueError(
            f"The experiment {absent[0]!r} of the splits is in no row of {screen['table']}. Found "
            f"{', '.join(map(repr, sorted(set(experiments))[:5]))}."
        )
    return experiments.map(lambda experiment: of.get(experiment, ""))


def _check_experiments(experiments, splits, column, rows):
    known = pd.DataFrame({"experiment": experiments, "split": splits, "row": rows})
    for first, second, _ in find_repeated(known.drop_duplicates(["experiment", "split"]), "experiment"):
        raise ValueError(
            f"{second['row']}, column {column!r}: the experiment {second['experiment']!r} is in "
            f"{second['split'] or 'no split'}, and in {first['row']} in {first['split'] or 'no split'}. Expected each "
            "experiment in one of train, val and test: otherwise its appearance is learned before it is tested. "
            "Correct the table."
        )


def _paths(templates, screen, columns, raw, source):
    prefix = screen.get("prefix", "")
    paths = [fill_template(template, columns, raw, source, prefix) for template in templates]
    if isinstance(screen["images"], dict):
        return pd.Series(list(zip(*paths, strict=True)), index=raw.index, dtype=object)
    numbered = screen["channels"] == [str(1 + i) for i in range(len(screen["channels"]))]
    if CHANNEL not in screen["images"] or numbered:
        return paths[0]
    # Names instead of numbers stand in the files' names.
    return paths[0].map(lambda path: tuple(path.replace(CHANNEL, name) for name in screen["channels"]))


def _check_wells(sites):
    wells = sites.drop_duplicates(["experiment", "plate", "well"])
    for first, second, _ in find_repeated(wells, "well_id"):
        raise ValueError(
            f"{second['row']}: the well {second['well']!r} of {second['experiment']!r} and {first['row']}: "
            f"{first['well']!r} of {first['experiment']!r} both get the name {second['well_id']!r}, "
            "EXPERIMENT_PLATE_WELL. Replace the '_' in one of the names by another sign."
        )


def _check_once(sites, column, name, advice):
    for first, second, count in find_repeated(sites, column):
        raise ValueError(
            f"{second['row']}: the {name} {second[column]!r} is a duplicate of {first['row']}. Expected each {name} "
            f"once; {count} rows repeat one. {advice}"
        )
