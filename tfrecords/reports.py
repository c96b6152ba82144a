"""What a build says of its tables before it writes: what is left out, what lacks, what will not go well."""

import decimal
import re
import unicodedata
from pathlib import PurePath

from tfrecords.channels import describe_missing, list_files
from tfrecords.images import channel_files
from tfrecords.leaks import place_of_well
from tfrecords.manifest import EXCLUDED
from tfrecords.splits import LEFT_OUT, SPLITS, natural

# How other programs write that there is nothing.
_MISSING = ("na", "n/a", "nan", "none", "null", "<na>", "-", "--", "?", ".", "empty", "blank", "unknown", "unassigned")
_WHOLE = re.compile(r"(?<![\d.])(\d+)\.0+(?![\d.])")


def report_similar(values, column):
    """Texts that a person would take for one: that differ in blanks, case, or how a number in them is written."""
    alike = {}
    for value in values.unique():
        key = unicodedata.normalize("NFKC", " ".join(value.split()))
        key = _WHOLE.sub(r"\1", key)  # taxol 1.0 and taxol 1
        key = place_of_well(key).casefold()  # A1 and A01
        alike.setdefault(decimal.Decimal(key) if re.fullmatch(r"\d+(\.\d+)?", key, re.ASCII) else key, []).append(value)
    groups = [", ".join(map(repr, same)) for same in alike.values() if len(same) > 1]
    if groups:
        more = f"; and {len(groups) - 3:,} more such groups" if len(groups) > 3 else ""
        print(
            f"WARNING: the column {column!r} has {'; '.join(groups[:3])}{more}, which are taken for different ones. "
            "Write them alike in the table if they are not."
        )


def report_unused(found):
    """Columns of the table that are called as ours are, and that the description does not name."""
    if found:
        print(
            f"The table has columns that are called {', '.join(found)}, which the description does not name: they are "
            f"not used. Add such as `{found[0]} = {found[0]!r}` to its columns if they mean what ours do."
        )


def report_shared(files, channel):
    shared = files["path"].duplicated(keep=False)
    if shared.any():
        first = files[shared].iloc[0]
        print(
            f"WARNING: {int(shared.sum()):,} sites have the channel {channel!r} in common with other sites of their "
            f"well, such as {first['row']} the file {first['path']!r}. Name in its template what tells sites apart, "
            "unless it is an overview of the well."
        )


def report_half_labelled(places, sites):
    treated = sites["well_type"] == "treatment"
    labelled = (sites["sirna"] != "")[treated].groupby(places[treated]).agg(["any", "all"])
    half = labelled.index[labelled["any"] & ~labelled["all"]]
    if len(half):
        first = sites[treated & (places == half[0]) & (sites["sirna"] == "")].iloc[0]
        print(
            f"WARNING: {len(half):,} wells have a label in some of their rows and none in others, such as "
            f"{first['row']}: sites without one are neither trained on nor scored. Write it into every row of the well."
        )


def report_missing_words(labels, column):
    words = labels[labels.str.casefold().isin(_MISSING)].value_counts()
    if len(words):
        print(
            f"WARNING: the column {column!r} says {words.index[0]!r} in the rows of {words.iloc[0]:,} sites, which is "
            "taken for the name of a treatment. Leave cells empty where it is unknown, or name it among the controls."
        )


def report_classes(prepared):
    sites, label = prepared.sites, prepared.options["label"]
    trained, scored = (sites[sites["split"].isin(splits)] for splits in (("train",), SPLITS[1:]))
    if len(prepared.classes) == 1 and len(trained):
        print(
            f"WARNING: all sites are of one class, {prepared.classes[0]['name']!r} in the column "
            f"{label!r}: there is nothing to tell apart. Fill that column, or take another label."
        )
    names = {row["value"]: row["name"] for row in prepared.classes}
    unknown = scored.loc[scored[label].notna() & ~scored[label].isin(trained[label]), label]
    if len(trained) and len(unknown):
        first = sorted({str(names[value]) for value in unknown.unique()})
        more = f" and {len(first) - 3:,} more" if len(first) > 3 else ""
        print(
            f"WARNING: {len(first):,} of {len(names):,} classes have no site in train ({', '.join(first[:3])}{more}): "
            f"{len(unknown):,} sites of other splits are of them, which no model can name right."
        )


def report_numbers(sites):
    for kind in ("plate", "site"):
        names = sites[f"{kind}_name"]
        if not (names.str.lstrip("0").replace("", "0") == sites[kind].astype(str)).all():  # 01 is 1
            first = sites.loc[sites[kind].idxmin()]
            print(
                f"The {kind}s are numbered in the order of their names, as they are not all numbers, each written in "
                f"one way: {first[f'{kind}_name']!r} is {first[kind]}. Names stand in predictions and in list_sites."
            )


def report_left_out(sites):
    left = sites.loc[sites["split"] == LEFT_OUT, "experiment"]
    if len(left):
        names = sorted(set(left), key=natural)
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        print(
            f"{len(left):,} sites of {len(names):,} experiments are in no split: {', '.join(names[:5])}{more}. "
            f"They are left out, and listed in {EXCLUDED}."
        )


def report_emptied(sites, complete):
    for split in SPLITS:
        if split in set(sites["split"]) and split not in set(complete["split"]):
            print(f"WARNING: no site of the split {split} is left: it is empty.")


def report_controls(sites, described, listed):
    if not described:
        if sites["sirna"].notna().any():
            print("No controls are described: every label is taken for a treatment, and none is left to normalize by.")
        return
    negative = sites["well_type"] == "negative_control"
    if listed and not negative.any():
        print(f"WARNING: none of the {listed:,} sites of negative controls is left, which --normalize plate needs.")
    has = negative.groupby([sites["experiment"], sites["plate_name"]]).any()
    if has.any() and not has.all():
        lacking = [f"{plate} of {experiment}" for experiment, plate in has.index[~has]]
        print(
            f"WARNING: {len(lacking):,} of {len(has):,} plates have no negative control, such as "
            f"{', '.join(lacking[:3])}, which --normalize plate needs. Look whether theirs are written otherwise (what "
            "is not named as a control is a treatment), or whether their files lack."
        )


def report_missing(source, sites, reasons, channels, strict, own):
    report = describe_missing(sites, reasons)
    if report is None:
        return
    files = [file for file, _ in channel_files(sites["path"][reasons != ""].iloc[0], channels)]
    expected = next((file for file in files if not (source / file).exists()), files[0])
    none = (reasons != "").all()
    correct = "correct the table or the screen's description" if own else "correct the table, or take another layout"
    near, others = _instead(source, expected)
    looked = f"Expected files such as {expected} below {str(source)!r}."
    if near is not None:
        looked += f" There is {near!r}: {correct}."
    elif none:
        looked += f" {others}Put the expected ones there, or {correct}."
    if none:
        raise ValueError(f"{report}\nNo site is complete: nothing to build. {looked}")
    if strict:
        raise ValueError(f"{report}\n{looked} Expected all of every site: add them, or build without strict.")
    many = "WARNING: " if (reasons != "").mean() > 0.5 else ""
    print(f"{many}{report}\n{looked} Such sites are left out, and listed in {EXCLUDED}.")


def _instead(source, file):
    """What there is in place of a file that lacks: one of nearly its name, or None, and a sentence of the others."""
    place, parts = source, file.split("/")
    while len(parts) > 1 and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    there = sorted(name for name in list_files(place) - {parts[0]} if not name.startswith("."))
    near = next((name for name in there if _as_read(name) == _as_read(parts[0])), None)
    ending, kind = PurePath(parts[0]).suffix.casefold(), "files"
    others = [name for name in there if PurePath(name).suffix.casefold() == ending]
    if len(parts) > 1:
        others, kind = [name for name in there if (place / name).is_dir()], "folders"
    where = f"{place.relative_to(source).as_posix()!r} has" if place != source else "There are"
    return near, f"{where} {len(others):,} other {kind}, such as {others[0]!r}. " if others else ""


def _as_read(name):
    """A name without what a person overlooks: leading zeros, a `.0`, case, and how letters are composed."""
    name = re.sub(r"(\d)\.0(?!\d)", r"\1", unicodedata.normalize("NFC", name).casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", name)
