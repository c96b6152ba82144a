"""What a build says of its tables before it writes: what is left out, what lacks, what will not go well."""

import re
import unicodedata

from tfrecords.channels import describe_missing, list_files
from tfrecords.images import channel_files
from tfrecords.manifest import EXCLUDED
from tfrecords.splits import LEFT_OUT, SPLITS, natural


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


def report_missing(source, sites, reasons, channels, strict):
    report = describe_missing(sites, reasons)
    if report is None:
        return
    if strict:
        raise ValueError(f"{report}\nExpected all channel files of every site. Add them, or build without strict.")
    if (reasons != "").all():
        files = [file for file, _ in channel_files(sites["path"].iloc[0], channels)]
        expected = next((file for file in files if not (source / file).exists()), files[0])
        found = _nearly(source, expected)
        advice = (
            f"There is {found!r}: correct the table or the template" if found else "Put the images beside the tables"
        )
        raise ValueError(
            f"{report}\nNo site in {str(source)!r} is complete: nothing to build. Expected files such as "
            f"{expected} below it. {advice}."
        )
    print(f"{report}\nThey are left out, and listed in {EXCLUDED}.")


def _nearly(source, file):
    """A file whose name differs from the expected one in leading zeros, a `.0`, case, or how letters are composed."""

    def plain(name):
        name = re.sub(r"(\d)\.0(?!\d)", r"\1", unicodedata.normalize("NFC", name).casefold())
        return re.sub(r"0+(?=\d)", "", name)

    folder, _, name = file.rpartition("/")
    names = sorted(list_files(source / folder) - {name})
    return next((found for found in names if plain(found) == plain(name)), None)
