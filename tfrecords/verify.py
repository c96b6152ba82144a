"""Checks every record of a finished folder: `python -m tfrecords.verify DEST`."""

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from tfrecords.check_record import check_record, expectations
from tfrecords.devices import keep_tensorflow_off_gpu, leave_gpu_to_backend
from tfrecords.frames import read_frames
from tfrecords.listing import KINDS, read_index
from tfrecords.manifest import EXCLUDED, INDEX, MANIFEST, hash_bytes, read_manifest
from tfrecords.mirror import local_folder
from tfrecords.parallel import add_workers, run_tasks
from tfrecords.splits import SPLITS


class Fault(NamedTuple):
    """Something wrong: `record` is its number in the file, or None where the file as a whole is meant."""

    file: str
    record: int | None
    message: str

    def __str__(self):
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{place}: {self.message}"


def verify_records(dest, workers=None):
    """Checks files, checksums, frames, keys, images, labels, places and counts, and goes on after a fault.

    Args:
        dest: folder of records, or URL of one, all of which is fetched first.
        workers: as for `build_records`.

    Returns:
        List of `Fault`; empty if all is well.

    Raises:
        ValueError: if the folder is not whole, so that there is nothing to compare with.
    """
    leave_gpu_to_backend()
    dest = local_folder(dest, SPLITS, KINDS)
    manifest = read_manifest(dest)
    faults = list(_check_files(dest, manifest))
    try:
        index = read_index(dest, manifest)
    except ValueError as error:
        return [*faults, Fault(INDEX, None, str(error))]
    home = {}
    # WILDS's mixed-to-test trains on the first sites of the test experiments: that is its purpose.
    kept_apart = ("train", "val", "test") if manifest["options"].get("splits") != "mixed-to-test" else ()
    for split in kept_apart:
        for experiment in manifest["experiments"][split]:
            if home.setdefault(experiment, split) != split and manifest["options"].get("splits") != "mixed-to-test":
                faults.append(
                    Fault(MANIFEST, None, f"the experiment {experiment} is in {home[experiment]} and {split}")
                )
    size = sum(shard["bytes"] for shard in manifest["shards"])
    tasks = _tasks(dest, manifest, index)
    results = run_tasks(_check_shard, tasks, workers=workers, total=len(index), size=size, name="verify")
    faults += sorted((fault for found in results for fault in found), key=lambda fault: fault.file)
    if len(index) != sum(shard["count"] for shard in manifest["shards"]):
        faults.append(Fault(INDEX, None, f"lists {len(index)} sites, not the number of records in {MANIFEST}"))
    for row in index[index["site_id"].duplicated()].itertuples():
        faults.append(Fault(row.shard, row.record, f"the site {row.site_id} is in another record as well"))
    return faults


def _tasks(dest, manifest, index):
    expected = expectations(manifest)
    places = index.groupby("shard").indices
    for shard in manifest["shards"]:
        if (dest / shard["name"]).is_file():
            rows = index.iloc[places.get(shard["name"], [])].to_dict("records")
            yield (os.path.abspath(dest), shard, rows, expected), shard["count"]


def _check_files(dest, manifest):
    known = {shard["name"] for shard in manifest["shards"]} | {MANIFEST, INDEX, EXCLUDED}
    found = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    for name in sorted(known - found):
        yield Fault(name, None, "the file is missing")
    for name in sorted(found - known):
        yield Fault(name, None, "a stray file, which the manifest does not know")
    if EXCLUDED in found and hash_bytes((dest / EXCLUDED).read_bytes()) != manifest["excluded"]["sha256"]:
        yield Fault(EXCLUDED, None, "was changed after the build")


def _check_shard(task):
    dest, shard, rows, expected = task
    path, name = Path(dest) / shard["name"], shard["name"]
    digest = hashlib.sha256()
    faults = []
    seen = lost = 0
    for number, (record, fault) in enumerate(read_frames(path, digest)):
        seen = number + 1
        if record is None:
            lost += 1
            faults.append(Fault(name, number, fault))
        elif number >= len(rows):
            faults.append(Fault(name, number, "a record too many"))
        else:
            faults += [Fault(name, number, text) for text in check_record(record, rows[number], shard, expected)]
    if seen != shard["count"] or shard["count"] != len(rows):
        text = f"{seen - lost} records could be read; the manifest counts {shard['count']}, the index {len(rows)}"
        faults.append(Fault(name, None, text))
    if digest.hexdigest() != shard["sha256"]:
        faults.append(Fault(name, None, "the checksum of the file is not the manifest's"))
    return faults


def main(argv=None):
    """The command line; returns the exit status: 0 if all is well, 1 after a fault."""
    parser = argparse.ArgumentParser(prog="python -m tfrecords.verify", description=__doc__)
    parser.add_argument("dest", help="folder of records")
    add_workers(parser)
    arguments = parser.parse_args(argv)
    dest = arguments.dest
    keep_tensorflow_off_gpu()
    try:
        faults = verify_records(dest, arguments.workers)
        manifest = read_manifest(dest)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(fault)
    shards = manifest["shards"]
    print(
        f"{dest}: {len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'} in {len(shards):,} files with "
        f"{sum(shard['count'] for shard in shards):,} records, {sum(shard['bytes'] for shard in shards) / 1e6:,.1f} MB."
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
