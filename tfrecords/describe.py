"""Says what a finished folder holds, and draws a contact sheet: `python -m tfrecords.describe DEST`."""

import argparse
import sys
import textwrap
from pathlib import Path

import pandas as pd

from tfrecords.contact_sheet import write_contact_sheet
from tfrecords.devices import keep_tensorflow_off_gpu
from tfrecords.listing import KINDS, read_index
from tfrecords.manifest import EXCLUDED, channel_names, read_manifest
from tfrecords.mirror import local_folder
from tfrecords.splits import SPLITS


def describe_records(dest):
    """Says what a finished folder holds. Reads the manifest and the tables, and no shard.

    Args:
        dest: folder of records, or URL of one.

    Returns:
        str of some lines: origin, sizes and encoding; splits x cell types x experiments; sites of a class in each
        split; sites that were left out, by reason.

    Raises:
        ValueError: if the folder is not whole.
    """
    dest = local_folder(dest)
    manifest = read_manifest(dest)
    index = read_index(dest, manifest)
    return "\n".join(
        [
            *_describe_files(dest, manifest),
            "",
            "Sites by split and cell type:",
            _count_sites(index).to_string(index=False),
            *_list_experiments(index),
            "",
            f"Sites of a class ({manifest['options']['label']}, {len(manifest['classes']):,} classes):",
            _count_classes(index).to_string(index=False),
            "",
            *_count_excluded(dest, manifest),
        ]
    )


def _describe_files(dest, manifest):
    options, shards = manifest["options"], manifest["shards"]
    height, width, channels = manifest["image_shape"]
    total = sum(shard["count"] for shard in shards)
    size = sum(shard["bytes"] for shard in shards)
    each = f"{size / total / 1e3:,.1f} kB a site"
    yield f"{dest}: {total:,} sites in {len(shards):,} files, {size / 1e9:,.3f} GB ({each})"
    yield f"from {manifest['source']} ({options['layout']}), splits {options['splits']}, seed {options['seed']}"
    shown = ", ".join(map(str, channel_names(manifest)))
    encoding = f"{options['encoding']}, {height} x {width} pixels, channels {shown}"
    given = [f"{name} {options[name]}" for name in ("crop", "image_size") if options[name] is not None]
    yield "; ".join([f"encoding {encoding}", *given])
    for split in SPLITS:
        parts = [shard for shard in shards if shard["split"] == split]
        if parts:
            yield f"  {split}: {len(parts):,} files, {sum(shard['bytes'] for shard in parts) / 1e9:,.3f} GB"


def _count_sites(index):
    rows = []
    for split in SPLITS:
        of_split = index[index["split"] == split]
        for cell_type, part in [*of_split.groupby("cell_type", sort=True), ("all", of_split)]:
            if len(part):
                treated = part["well_type"] == "treatment"
                wells = part[["experiment", "plate", "well"]]
                rows.append(
                    {
                        "split": split,
                        "cell type": cell_type,
                        "experiments": part["experiment"].nunique(),
                        "plates": len(wells[["experiment", "plate"]].drop_duplicates()),
                        "wells": len(wells.drop_duplicates()),
                        "sites": len(part),
                        KINDS[0]: int(treated.sum()),
                        KINDS[1]: int((~treated).sum()),
                        "unlabelled": int(part["label"].isna().sum()),
                    }
                )
    return pd.DataFrame(rows)


def _list_experiments(index):
    for split in SPLITS:
        counts = index[index["split"] == split].groupby("experiment", sort=True).size()
        if len(counts):
            text = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            yield textwrap.fill(f"{split}: {text}", 118, subsequent_indent="  ", break_on_hyphens=False)


def _count_classes(index):
    rows = []
    for split in SPLITS:
        counts = index.loc[index["split"] == split, "label"].dropna().value_counts()
        if len(counts):
            rows.append(
                {
                    "split": split,
                    "classes": len(counts),
                    "min": int(counts.min()),
                    "median": float(counts.median()),
                    "mean": round(float(counts.mean()), 2),
                    "max": int(counts.max()),
                }
            )
    return pd.DataFrame(rows, columns=["split", "classes", "min", "median", "mean", "max"])


def _count_excluded(dest, manifest):
    if not manifest["excluded"]["count"]:
        return ["No site was left out."]
    reasons = pd.read_csv(Path(dest) / EXCLUDED, dtype=str, keep_default_na=False)["reason"].value_counts()
    return [f"{len(reasons):,} reasons to leave out {manifest['excluded']['count']:,} sites:"] + [
        f"  {count:,}: {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]


def _place(dest):
    dest, here = Path(dest).resolve(), Path.cwd()
    return dest.parent / f"{dest.name}_contact_sheet.png" if here.is_relative_to(dest) else "contact_sheet.png"


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tfrecords.describe", description=__doc__)
    parser.add_argument("dest", help="folder of records, or URL of one")
    parser.add_argument(
        "--sheet",
        help="picture to write, not in DEST (default: contact_sheet.png here, or beside DEST if here is in it)",
    )
    arguments = parser.parse_args(argv)
    keep_tensorflow_off_gpu()
    sheet = arguments.sheet or _place(arguments.dest)
    try:
        print(describe_records(arguments.dest))
        write_contact_sheet(arguments.dest, sheet)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
