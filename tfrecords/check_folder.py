"""Checks every file and every record of a finished folder."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from tfrecords.check_record import check_record, expectations
from tfrecords.devices import leave_gpu_to_backend
from tfrecords.frames import read_frames
from tfrecords.listing import KINDS, read_index
from tfrecords.manifest import EXCLUDED, INDEX, MANIFEST, hash_bytes, read_manifest
from tfrecords.mirror import local_folder
from tfrecords.parallel import refuse_in_new_process, run_tasks
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
    refuse_in_new_process()
    leave_gpu_to_backend()
    dest = local_folder(dest, SPLITS, KINDS)
    manifest = read_manifest(dest)
    faults = [*_check_files(dest, manifest), *_check_experiments(manifest)]
    try:
        index = read_index(dest, manifest)
    except ValueError as error:
        index = None
        faults.append(Fault(INDEX, None, str(error)))
    faults += check_shards(dest, manifest, index, manifest["shards"], workers)
    if index is not None:
        if len(index) != sum(shard["count"] for shard in manifest["shards"]):
            faults.append(Fault(INDEX, None, f"lists {len(index)} sites, not the number of records in {MANIFEST}"))
        for row in index[index["site_id"].duplicated()].itertuples():
            faults.append(Fault(row.shard, row.record, f"the site {row.site_id} is in another record as well"))
    return faults


def check_shards(dest, manifest, index, shards, workers=None):
    """Checks some shards of a folder.

    Args:
        dest: folder of records.
        manifest: of `read_manifest`.
        index: of `read_index`, or None to check no more than frames, counts and checksums.
        shards: entries of the manifest's `shards`. Files that are missing are passed over.
        workers: as for `build_records`.

    Returns:
        List of `Fault`, sorted by file and record.
    """
    there = [shard for shard in shards if (Path(dest) / shard["name"]).is_file()]
    expected = expectations(manifest)
    places = None if index is None else index.groupby("shard").indices

    def tasks():
        for shard in there:
            rows = None if index is None else index.iloc[places.get(shard["name"], [])].to_dict("records")
            yield (os.path.abspath(dest), shard, rows, expected), shard["count"]

    total, size = (sum(shard[key] for shard in there) for key in ("count", "bytes"))
    results = run_tasks(_check_shard, tasks(), workers=workers, total=total, size=size, name="verify")
    return sorted((fault for found in results for fault in found), key=lambda fault: fault.file)


def _check_experiments(manifest):
    # WILDS's mixed-to-test trains on the first sites of the test experiments: that is its purpose.
    if manifest["options"].get("splits") == "mixed-to-test":
        return
    home = {}
    for split in ("train", "val", "test"):
        for experiment in manifest["experiments"][split]:
            if home.setdefault(experiment, split) != split:
                yield Fault(MANIFEST, None, f"the experiment {experiment} is in {home[experiment]} and {split}")


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
        elif rows is not None and number >= len(rows):
            faults.append(Fault(name, number, "a record too many"))
        elif rows is not None:
            faults += [Fault(name, number, text) for text in check_record(record, rows[number], shard, expected)]
    listed = shard["count"] if rows is None else len(rows)
    if seen != shard["count"] or shard["count"] != listed:
        text = f"{seen - lost} records could be read; the manifest counts {shard['count']}, the index {listed}"
        faults.append(Fault(name, None, text))
    if digest.hexdigest() != shard["sha256"]:
        faults.append(Fault(name, None, "the checksum of the file is not the manifest's"))
    return faults
