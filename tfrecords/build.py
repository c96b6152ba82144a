"""Builds TFRecords from a screen: `python -m tfrecords.build SOURCE DEST`."""

import argparse
import sys
from pathlib import Path

import pandas as pd

from tfrecords.channels import CHANNELS, describe_missing, find_missing
from tfrecords.devices import keep_tensorflow_off_gpu, leave_gpu_to_backend
from tfrecords.folder import claim, finish, is_finished
from tfrecords.images import load_channel
from tfrecords.labels import LABELS, class_map
from tfrecords.manifest import EXCLUDED, INDEX, SCHEMA, hash_bytes, package_versions, read_manifest, write_whole
from tfrecords.parallel import run_tasks
from tfrecords.plan import SITES_PER_SHARD, hash_plan, plan_shards
from tfrecords.sources import COLUMNS, find_layout, read_sites
from tfrecords.splits import SPLITS, assign_splits, count_splits
from tfrecords.write import Task, write_shard


def build_records(source, dest, *, image_size=None, seed=0, strict=False, label="sirna_id", workers=None):
    """Builds TFRecords from an RxRx1 or Kaggle tree.

    Sites that lack channel files are reported and left out. The same call on a finished folder does nothing; after a
    broken-off build it continues, keeping the shards that are whole.

    Args:
        source: folder with the tables and images, see `read_sites`.
        dest: folder to write; new, empty, or of the same build.
        image_size: edge of the images in pixels, made by averaging areas, so that the whole field of view stays (WILDS
            instead cut out the centre); None (default) keeps the size on disk.
        seed: integer that orders the sites inside the shards.
        strict: make a missing channel file an error.
        label: column that gives the classes: `sirna_id` (default), `cell_type`, `experiment` or `well_type`.
        workers: number of processes, or a `concurrent.futures.Executor` to write with. By default one for each core,
            and this process alone for a small screen.

    Returns:
        The manifest, see `read_manifest`.

    Raises:
        ValueError: if a table, an image or the output folder is not as it must be, naming the culprit.
    """
    leave_gpu_to_backend()
    source, dest = Path(source), Path(dest)
    layout = find_layout(source)
    sites = read_sites(source)
    classes = class_map(sites, label)
    sites["split"] = assign_splits(sites)
    reasons = find_missing(source, sites)
    _report_missing(source, sites, reasons, strict)
    complete = sites[reasons == ""]
    excluded = sites.loc[reasons != "", ["site_id", "split"]].assign(reason=reasons[reasons != ""])
    size = load_channel(source / f"{min(complete['prefix'])}_w{CHANNELS[0]}.png").shape
    if image_size is not None and not 1 <= image_size <= min(size):
        raise ValueError(f"The image size {image_size} is not between 1 and the {min(size)} pixels on disk.")
    shards = plan_shards(complete, seed)
    options = {
        "schema": SCHEMA,
        "layout": layout,
        "label": label,
        "image_size": image_size,
        "seed": seed,
        "channels": list(CHANNELS),
        "sites_per_shard": SITES_PER_SHARD,
        "plan": hash_plan(shards),
        "table": hash_bytes(complete[[*COLUMNS]].sort_values("site_id").to_csv(index=False).encode())[:16],
    }
    if is_finished(dest, options):
        print(f"{dest} already holds these records: nothing to do.")
        return read_manifest(dest)
    with claim(dest, options):
        tasks = _tasks(source, dest, complete, shards, size, image_size)
        pixels = len(complete) * size[0] * size[1] * len(CHANNELS)
        results = run_tasks(write_shard, tasks, workers=workers, total=len(complete), size=pixels, name="records")
        written = {result.name: result for result in results}
        manifest = {
            "schema": SCHEMA,
            "source": str(source),
            "options": options,
            "image_shape": [*((image_size, image_size) if image_size else size), len(CHANNELS)],
            "classes": classes,
            "experiments": {
                name: sorted(set(complete.loc[complete["split"] == name, "experiment"])) for name in SPLITS
            },
            "cell_types": sorted(set(complete["cell_type"])),
            "versions": package_versions(),
        }
        index = _index(complete, shards, classes, label)
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
        for key, name, table in (("index", INDEX, index), ("excluded", EXCLUDED, excluded.sort_values("site_id"))):
            data = table.to_csv(index=False, lineterminator="\n").encode()
            write_whole(dest / name, data)
            manifest[key] = {"file": name, "count": len(table), "sha256": hash_bytes(data)}
        finish(dest, manifest)
    counts = ", ".join(f"{name} {count:,}" for name, count in count_splits(complete["split"]).items())
    print(f"Wrote {len(complete):,} sites in {len(shards):,} files to {dest}: {counts}.")
    return manifest


def _report_missing(source, sites, reasons, strict):
    report = describe_missing(sites, reasons)
    if report is None:
        return
    if strict:
        raise ValueError(f"{report}\nExpected all channel files of every site. Add them, or build without strict.")
    if (reasons != "").all():
        raise ValueError(
            f"{report}\nNo site in {str(source)!r} is complete: nothing to build. Expected files such as "
            f"{sites['prefix'].iloc[0]}_w1.png below it; put the images beside the tables."
        )
    print(f"{report}\nThey are left out, and listed in {EXCLUDED}.")


def _tasks(source, dest, sites, shards, size, image_size):
    columns = [*COLUMNS, "prefix"]
    sites = sites[columns].astype({"sirna_id": object}).set_index("site_id", drop=False)
    sites["sirna_id"] = sites["sirna_id"].where(sites["sirna_id"].notna(), None)
    for shard in shards:
        rows = sites.loc[[*shard.site_ids]].to_dict("records")
        yield Task(str(source), str(dest), shard.name, rows, CHANNELS, size, image_size), len(rows)


def _index(sites, shards, classes, label):
    places = pd.DataFrame(
        [(site_id, shard.name, record) for shard in shards for record, site_id in enumerate(shard.site_ids)],
        columns=["site_id", "shard", "record"],
    )
    index = places.merge(sites[[*COLUMNS, "split"]], on="site_id", how="left", validate="one_to_one")
    index["label"] = index[label].map({row["value"]: i for i, row in enumerate(classes)}).astype("Int64")
    return index


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tfrecords.build", description=__doc__)
    parser.add_argument(
        "source", help="folder with metadata.csv and images/, or Kaggle's four tables, train/ and test/"
    )
    parser.add_argument("dest", help="folder to write; new, empty, or of the same build")
    parser.add_argument("--image-size", type=int, help="edge in pixels, by averaging areas (default: as on disk)")
    parser.add_argument("--seed", type=int, default=0, help="orders the sites inside the files (default: 0)")
    parser.add_argument("--strict", action="store_true", help="a site that lacks channel files is an error")
    parser.add_argument("--label", choices=LABELS, default="sirna_id", help="column of the classes (default: sirna_id)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one a core; 1 for a small screen)")
    arguments = vars(parser.parse_args(argv))
    keep_tensorflow_off_gpu()
    try:
        build_records(**arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
