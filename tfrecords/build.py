"""Builds TFRecords from a screen: `python -m tfrecords.build SOURCE DEST`."""

import argparse
import os
import sys
from pathlib import Path

import pandas as pd

from tfrecords.channels import find_newer
from tfrecords.faults import MOST, Faults
from tfrecords.folder import claim, finish, is_finished, tidy
from tfrecords.intensity import list_ranges
from tfrecords.labels import LABELS
from tfrecords.manifest import EXCLUDED, INDEX, MANIFEST, SCHEMA, hash_bytes, package_versions, read_manifest
from tfrecords.measure import find_ranges
from tfrecords.own_screen import add_screen, take_screen
from tfrecords.parallel import add_workers, refuse_in_new_process, run_tasks
from tfrecords.prepare import ENCODINGS, prepare_build
from tfrecords.remote import is_remote
from tfrecords.reports import report_classes
from tfrecords.sources import COLUMNS, LAYOUTS
from tfrecords.splits import SCHEMES, SPLITS, count_splits
from tfrecords.whole import write_whole
from tfrecords.write import Task, check_images, write_shard


def build_records(
    source,
    dest,
    *,
    layout="auto",
    splits=None,
    label="sirna_id",
    channels=None,
    crop=None,
    image_size=None,
    encoding="raw",
    seed=0,
    exclude_leaks=False,
    screen=None,
    strict=False,
    workers=None,
):
    """Builds TFRecords from an RxRx1, RxRx1-WILDS or Kaggle tree, or from a screen of one's own.

    RxRx1-WILDS itself cannot be downloaded any more; `channels=(1, 2, 3), crop=256` makes its images from RxRx1's.

    Sites that lack channel files are reported and left out. The same call on a finished folder does nothing; after a
    broken-off build it continues, keeping the shards that are whole and of which neither rows nor image files were
    changed since.

    Args:
        source: folder with the tables and images, see `read_sites`.
        dest: folder to write; new, empty, or of the same build.
        layout: `rxrx1`, `wilds`, `kaggle` or `screen`; `auto` (default) recognizes it, see `sources.find_layout`.
        splits: scheme of the splits, see `splits.assign_splits`; default `wilds`, its official one, and `table` for
            a screen of one's own.
        label: column that gives the classes: `sirna_id` (default), `cell_type`, `experiment` or `well_type`.
        channels: numbers of the channels, or names in a screen of one's own (an integer is a name there, too, where
            names are numbers), in the order wanted; None (default) for all. Files of the others need not be there.
        crop: edge in pixels of a square cut out of the centre, as WILDS did, before any resizing; None (default) keeps
            the whole field of view.
        image_size: edge of the images in pixels, made by averaging areas, so that the field of view stays; None
            (default) keeps the size on disk, or of the crop.
        encoding: `raw` pixels (default), the fastest to read; or `png`, about half of that for cell images: the
            original files where nothing is cropped or resized, else encoded anew, without loss.
        seed: integer that orders the sites inside the shards.
        exclude_leaks: leave out plates whose layout comes again in a split further from training (train, val, test);
            without it (default) they are only named. See `leaks.find_repeats` and `leaks.repeating_sites`.
        screen: what describes a screen of one's own, a dict or a TOML file, see `own_screen.read_screen`; by default
            `screen.toml` in the source, if it is there.
        strict: make a missing channel file an error.
        workers: number of processes, a `concurrent.futures.Executor`, or the address of a Dask scheduler, to write
            with. By default one process for each core, and this one alone for a small screen. Processes import the
            script that calls this: what it does must stand below `if __name__ == "__main__":`.

    Returns:
        The manifest, see `read_manifest`.

    Raises:
        ValueError: if a table, an image or the output folder is not as it must be, naming the culprit.
    """
    refuse_in_new_process()
    for name, folder in (("source", source), ("output", dest)):
        if is_remote(folder):
            raise ValueError(
                f"The {name} {str(folder)!r} is a URL. Build from a folder of this machine into another, and copy that "
                "as a whole, the manifest last: read_records takes URLs."
            )
    source, dest = Path(source), Path(dest)
    prepared = prepare_build(
        source,
        layout=layout,
        splits=splits,
        label=label,
        channels=channels and [*map(str, channels)],
        crop=crop,
        image_size=image_size,
        encoding=encoding,
        seed=seed,
        exclude_leaks=exclude_leaks,
        screen=screen,
        strict=strict,
    )
    options, sites, excluded, classes, shards, size, planes, repeats = prepared
    report_classes(prepared)
    if is_finished(dest, options):
        tidy(dest)
        return _read_finished(source, dest, prepared)
    digests = prepared.digests(source)
    with claim(dest, options, digests) as finished:
        if finished:
            return _read_finished(source, dest, prepared)
        pixels = len(sites) * size[0] * size[1] * len(options["channels"])
        ranges = _find_ranges(source, dest, prepared, pixels, workers)
        tasks = list_tasks(source, dest, prepared, ranges)
        results = run_tasks(write_shard, tasks, workers=workers, total=len(sites), size=pixels, name="records")
        written = {result.name: result for result in results}
        manifest = {
            "schema": SCHEMA,
            "source": os.path.abspath(source),
            "options": options,
            "image_shape": list(prepared.image_shape),
            "planes": planes and list(planes),
            "classes": classes,
            "experiments": {name: sorted(set(sites.loc[sites["split"] == name, "experiment"])) for name in SPLITS},
            "cell_types": sorted(set(sites["cell_type"])),
            "repeated_layouts": repeats.to_dict("records"),
            "intensity": list_ranges(ranges, options["channels"]),
            "names": _names(sites),
            "versions": package_versions(),
        }
        index = make_index(prepared, written)
        labelled = index.groupby("shard")["label"].count()
        manifest["shards"] = [
            {
                **{key: getattr(shard, key) for key in ("name", "split", "experiment", "kind")},
                "count": len(shard.site_ids),
                "labelled": int(labelled[shard.name]),
                "bytes": written[shard.name].bytes,
                "sha256": written[shard.name].sha256,
            }
            for shard in shards
        ]
        for key, name, table in (("index", INDEX, index), ("excluded", EXCLUDED, excluded)):
            data = to_csv(table)
            write_whole(dest / name, data)
            manifest[key] = {"file": name, "count": len(table), "sha256": hash_bytes(data)}
        if prepared.digests(source) != digests:
            raise ValueError(
                f"Images in {source} were changed while they were read: the records would be of different states. "
                "Repeat the command when they stay as they are: it makes anew only what they are in."
            )
        finish(dest, manifest)
    counts = ", ".join(f"{name} {count:,}" for name, count in count_splits(sites["split"]).items())
    print(f"Wrote {len(sites):,} sites in {len(shards):,} files to {dest}: {counts}.")
    return manifest


def _read_finished(source, dest, prepared):
    manifest = read_manifest(dest)
    print(f"{dest} already holds these records: nothing to do. (tfrecords.verify checks contents.)")
    if os.path.abspath(source) != manifest["source"]:
        print(f"WARNING: they were built from {manifest['source']}, and not from {source}.")
    moment = (dest / MANIFEST).stat().st_mtime
    newer = find_newer(source, prepared.sites["path"], prepared.options["channels"], moment)
    if newer:
        print(
            f"WARNING: {len(newer):,} of the image files are newer than these records, such as {newer[0]}. If they "
            "were changed, and not only copied, the records hold what they were before: build into a new folder."
        )
    return manifest


def list_tasks(source, dest, prepared, ranges=None):
    """Gives a pair of `write.Task` and its number of sites for each shard, one after the other.

    Args:
        source, dest: as for `build_records`.
        prepared: `prepare.Prepared`.
        ranges: of `measure.find_ranges`, or of a manifest by `intensity.ranges_of`; None for files as they are.
    """
    options = prepared.options
    sites = prepared.sites[[*COLUMNS, "path"]].astype({"sirna_id": object}).set_index("site_id", drop=False)
    sites["sirna_id"] = sites["sirna_id"].where(sites["sirna_id"].notna(), None)
    for shard in prepared.shards:
        rows = sites.loc[[*shard.site_ids]].to_dict("records")
        for row in rows if ranges else ():
            row["ranges"] = ranges[row["experiment"], row["plate"]]
        task = Task(
            source=os.path.abspath(source),
            dest=os.path.abspath(dest),
            name=shard.name,
            sites=rows,
            channels=tuple(options["channels"]),
            size=prepared.size,
            crop=options["crop"],
            image_size=options["image_size"],
            planes=prepared.planes,
        )
        yield task, len(rows)


def _find_ranges(source, dest, prepared, pixels, workers):
    try:
        return find_ranges(source, prepared.sites, prepared.options, prepared.size, workers)
    except Faults as faults:
        messages = faults.messages
    if len(messages) >= MOST:
        raise Faults(messages)
    # What was measured are some of the images: what is wrong with the others is named as well.
    tasks, count = list_tasks(source, dest, prepared), len(prepared.sites)
    try:
        for _ in run_tasks(check_images, tasks, workers=workers, total=count, size=pixels, name="check"):
            pass
    except Faults as faults:
        messages = sorted({*messages, *faults.messages})
    raise Faults(messages[:MOST])


def _names(sites):
    return {
        f"{kind}s": dict(sorted(set(zip(sites[f"{kind}_name"], sites[kind].tolist(), strict=True))))
        for kind in ("plate", "site")
        if f"{kind}_name" in sites and (sites[f"{kind}_name"] != sites[kind].astype(str)).any()
    }


def make_index(prepared, written):
    """The index of all records: a row for each site, with place and label.

    Args:
        prepared: of `prepare_build`.
        written: dict of a shard's name -> `write.Written`.
    """
    places = pd.DataFrame(
        [
            (site_id, shard.name, record, offset)
            for shard in prepared.shards
            for record, (site_id, offset) in enumerate(zip(shard.site_ids, written[shard.name].offsets, strict=True))
        ],
        columns=["site_id", "shard", "record", "offset"],
    )
    index = places.merge(prepared.sites[[*COLUMNS, "split"]], on="site_id", how="left", validate="one_to_one")
    numbers = {row["value"]: i for i, row in enumerate(prepared.classes)}
    index["label"] = index[prepared.options["label"]].map(numbers).astype("Int64")
    return index


def to_csv(table):
    """A table as the bytes of a CSV file, equal on every system."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def _list(text):
    return tuple(text.split(","))


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tfrecords.build", description=__doc__)
    parser.add_argument("source", help="folder with metadata.csv and images/, or Kaggle's tables, train/ and test/")
    parser.add_argument("dest", help="folder to write; new, empty, or of the same build")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="default: recognized by the files")
    parser.add_argument("--splits", help=f"one of {', '.join(SCHEMES)} (default: wilds; of an own screen, table)")
    parser.add_argument("--channels", type=_list, help="such as 1,2,3, in the order wanted (default: all)")
    parser.add_argument("--crop", type=int, help="edge in pixels of the centre to cut out (default: the whole field)")
    parser.add_argument("--image-size", type=int, help="edge in pixels, by averaging areas (default: as on disk)")
    parser.add_argument("--encoding", choices=ENCODINGS, default="raw", help="raw pixels (default), or PNG files")
    parser.add_argument("--seed", type=int, default=0, help="orders the sites inside the files (default: 0)")
    parser.add_argument(
        "--exclude-leaks", action="store_true", help="leave out plates whose layout comes again further from training"
    )
    parser.add_argument("--strict", action="store_true", help="a site that lacks channel files is an error")
    parser.add_argument("--label", choices=LABELS, default="sirna_id", help="column of the classes (default: sirna_id)")
    add_screen(parser)
    add_workers(parser)
    arguments = vars(parser.parse_args(argv))
    try:
        arguments["screen"] = take_screen(arguments)
        build_records(**arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
