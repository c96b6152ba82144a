"""Writes the damaged files of a finished folder anew, from its source."""

from pathlib import Path

import pandas as pd

from tfrecords.build import list_tasks, make_index, to_csv
from tfrecords.check_folder import check_shards, verify_records
from tfrecords.folder import compare_options, hold
from tfrecords.intensity import ranges_of
from tfrecords.listing import read_index
from tfrecords.manifest import EXCLUDED, INDEX, UNFINISHED, hash_bytes, read_manifest
from tfrecords.mirror import CACHE
from tfrecords.parallel import run_tasks
from tfrecords.prepare import OPTIONS, prepare_build
from tfrecords.remote import is_remote
from tfrecords.whole import write_whole
from tfrecords.write import scan_shard, write_shard


def repair_records(dest, source=None, workers=None, faults=None):
    """Writes the files in which `verify_records` found a fault anew, byte by byte as they were, and checks them again.

    All other files stay untouched. Shards, the index and the list of excluded sites can be repaired; a damaged manifest
    cannot: it is what says how the rest must be. Files that the manifest does not know are left to you, except what a
    killed build left half-written.

    Args:
        dest: folder of records.
        source: folder that they were built from; by default the one in the manifest.
        workers: as for `build_records`.
        faults: what `verify_records` found; by default it is asked.

    Returns:
        (names of the files written anew, list of the `Fault` that stay).

    Raises:
        ValueError: if the folder is in use, or the source's tables, files or pixels are not those of the build. What
            was repaired before that stays so.
    """
    if is_remote(dest):
        raise ValueError(
            f"{dest} cannot be repaired in place. If the copy on this machine is what is damaged, remove it (below the "
            f"folder that {CACHE} names, by default ~/.cache/tfrecords); else repair the folder that was uploaded, and "
            "upload it again."
        )
    dest = Path(dest)
    manifest = read_manifest(dest)
    faults = verify_records(dest, workers) if faults is None else faults
    source = Path(manifest["source"] if source is None else source)
    broken = {fault.file for fault in faults}
    shards = [shard for shard in manifest["shards"] if shard["name"] in broken]
    tables = broken & {INDEX, EXCLUDED}
    with hold(dest):
        stay = [fault for fault in faults if _stays(fault, dest, shards, tables)]
        if not shards and not tables:
            return [], stay
        if not source.is_dir():
            raise ValueError(
                f"The source {str(source)!r}, from which the records were built, is not there. Name the folder that "
                "holds the same tables and images: `python -m tfrecords.verify DEST --repair --source FOLDER`."
            )
        left_out = None if EXCLUDED in tables else pd.read_csv(dest / EXCLUDED, dtype=str, keep_default_na=False)
        given = {name: manifest["options"][name] for name in OPTIONS}
        prepared = prepare_build(source, **given, excluded=left_out)
        compare_options(dest, manifest["options"], prepared.options, "was built")
        wanted = {shard["name"]: shard["sha256"] for shard in shards}
        tasks = (
            (task._replace(sha256=wanted[task.name]), count)
            for task, count in list_tasks(source, dest, prepared, ranges_of(manifest))
            if task.name in wanted
        )
        total, size = (sum(shard[key] for shard in shards) for key in ("count", "bytes"))
        for _ in run_tasks(write_shard, tasks, workers=workers, total=total, size=size, name="repair"):
            pass
        if tables:
            _repair_tables(dest, manifest, prepared, tables)
        stay += check_shards(dest, manifest, read_index(dest, manifest), shards, workers)
    return sorted(wanted) + sorted(tables), stay


def _stays(fault, dest, shards, tables):
    if fault.file in {*tables, UNFINISHED} or any(fault.file == shard["name"] for shard in shards):
        return False
    return (dest / fault.file).exists()  # What a killed build left is gone by now.


def _repair_tables(dest, manifest, prepared, tables):
    made = {EXCLUDED: prepared.excluded}
    if INDEX in tables:
        # The offsets of the records are in the shards only.
        written = {shard.name: scan_shard(dest / shard.name, shard.name) for shard in prepared.shards}
        made[INDEX] = make_index(prepared, written)
    for name in sorted(tables):
        data = to_csv(made[name])
        if hash_bytes(data) != manifest["index" if name == INDEX else "excluded"]["sha256"]:
            raise ValueError(
                f"{dest / name} cannot be repaired: the source gives other rows than it gave to the build. Build the "
                "records again, into a new folder."
            )
        write_whole(dest / name, data)
