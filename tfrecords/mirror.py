"""Remote records -> a local copy of the part that is wanted, which the rest reads like any other folder."""

import contextlib
import hashlib
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from tfrecords.locks import HAS_LOCKS, lock_file
from tfrecords.manifest import EXCLUDED, INDEX, MANIFEST, hash_bytes, read_manifest, seal
from tfrecords.progress import progress_bar
from tfrecords.remote import find_transport, is_remote, remote_url
from tfrecords.whole import sync_folder, write_whole

CACHE, CACHE_GB = "TFRECORDS_CACHE", "TFRECORDS_CACHE_GB"
_DOWNLOADS = 8
_TRIES = 3
_KEPT_FREE = 0.1  # of the disk, where no limit is set
_in_use = {}


def local_folder(dest, splits=(), kinds=(), shards=()):
    """Gives a folder on this machine with the records of `dest`: itself, or a copy if `dest` is a URL.

    A copy holds the manifest, the tables and the shards asked for. Shards are fetched whole, several at once, before
    anything is read; each is checked against the manifest's SHA-256 and renamed into its place, so that a broken-off
    run leaves nothing half-written and the next one goes on. Processes on one machine share a copy: one fetches, the
    others wait. Records that were built anew under the same URL get a copy of their own.

    Copies lie in the folder that the environment variable TFRECORDS_CACHE names (default: tfrecords in the user's cache
    folder). They take at most TFRECORDS_CACHE_GB (default: all but a tenth of the disk); copies that no process uses
    make room, those longest unused first.

    Args:
        dest: folder of records, or URL of one.
        splits, kinds: whose shards must be there.
        shards: names of others that must be there.

    Returns:
        pathlib.Path.

    Raises:
        ValueError: if the records are not whole, or do not fit.
        OSError: if a file cannot be read, after three tries.
    """
    if not is_remote(dest):
        return Path(dest)
    url = remote_url(dest)
    manifest = read_manifest(url)
    wanted = [
        row for row in manifest["shards"] if row["name"] in shards or (row["split"] in splits and row["kind"] in kinds)
    ]
    for row in wanted:
        name = PurePosixPath(row["name"])
        if name.is_absolute() or ".." in name.parts or "\\" in row["name"]:
            raise ValueError(f"{url}/{MANIFEST} names the file {row['name']!r}, outside its folder. It is not trusted.")
    cache = Path(
        os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tfrecords"
    )
    data = seal(manifest)
    key = f"{re.sub(r'[^A-Za-z0-9._-]', '_', url.rsplit('/', 1)[-1])}-{hash_bytes(data)[:16]}"
    folder = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    used = cache / f"{key}.used"
    if used not in _in_use:  # Held until the process ends, so that no other one clears the copy.
        _in_use[used] = lock_file(used, shared=True)
    used.touch()
    with contextlib.closing(lock_file(cache / f"{key}.fetched")):
        folder.mkdir(exist_ok=True)
        write_whole(folder / MANIFEST, data)
        transport = find_transport(url)
        for name, entry in ((INDEX, manifest["index"]), (EXCLUDED, manifest["excluded"])):
            if not (folder / name).is_file() or hash_bytes((folder / name).read_bytes()) != entry["sha256"]:
                data = transport.read(f"{url}/{name}")
                if hash_bytes(data) != entry["sha256"]:
                    raise ValueError(f"{url}/{name} is not the file that the manifest names. Upload the records again.")
                write_whole(folder / name, data)
        missing = [row for row in wanted if not _is_whole(folder, row)]
        if missing:
            _make_room(cache, key, url, sum(row["bytes"] for row in missing))
            _fetch_all(transport, url, folder, missing)
    return folder


def how_to_mend(dest):
    """What to do about a damaged file of `dest`, a folder of records or a copy made by `local_folder`: a sentence."""
    for used in _in_use:
        if Path(dest) == used.parent / used.name.removesuffix(".used"):
            return f"This is a copy of remote records: remove {dest}, so that it is fetched anew."
    return f"Run `python -m tfrecords.verify {dest} --repair`."


def _is_whole(folder, row):
    path = folder / row["name"]
    return path.is_file() and path.stat().st_size == row["bytes"]


def _fetch_all(transport, url, folder, rows):
    bar = progress_bar(sum(row["bytes"] for row in rows), f"fetch {folder.name}", "B", unit_scale=True)
    with bar, ThreadPoolExecutor(_DOWNLOADS) as pool:
        quoted = quote if url.startswith(("http://", "https://")) else str  # a name may hold a percent sign
        futures = [
            pool.submit(_fetch, transport, f"{url}/{quoted(row['name'])}", folder / row["name"], row) for row in rows
        ]
        try:
            for future, row in zip(futures, rows, strict=True):
                future.result()
                bar.update(row["bytes"])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _fetch(transport, url, path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        for attempt in range(_TRIES):
            try:
                transport.copy(url, temporary)
                break
            except FileNotFoundError:
                raise ValueError(f"{url} is missing, though the manifest names it. Upload the records again.") from None
            except OSError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(4**attempt)
        with open(temporary, "rb+") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if found != row["sha256"]:
            raise ValueError(
                f"{url} came with {temporary.stat().st_size} bytes (expected {row['bytes']}) and another checksum than "
                "the manifest's. Run `python -m tfrecords.verify` on the folder it was copied from; upload it again."
            )
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(cache, key, url, needed):
    """Removes copies that no process uses until `needed` bytes fit, those longest unused first."""
    limit = os.environ.get(CACHE_GB)
    if limit:
        try:
            room = float(limit) * 1e9 - _size(cache)
        except ValueError:
            raise ValueError(f"{CACHE_GB}={limit!r} is no number. Expected gigabytes, such as 200.") from None
    else:
        disk = shutil.disk_usage(cache)
        room = disk.free - _KEPT_FREE * disk.total
    others = [path for path in cache.glob("*.used") if path.stem != key]
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if room >= needed or not HAS_LOCKS:  # on Windows two processes may fetch the same file: nothing is cleared
            break
        held = lock_file(path, wait=False, sure=True)
        if held is not None:
            with contextlib.closing(held):
                room += _size(cache / path.stem)
                shutil.rmtree(cache / path.stem, ignore_errors=True)
    if room < needed:
        rule = f"within {CACHE_GB}={limit}" if limit else "if a tenth of the disk is left free"
        raise ValueError(
            f"{url}: {needed / 1e9:,.3f} GB of shards do not fit into {cache}: there is room for "
            f"{max(room, 0) / 1e9:,.3f} GB {rule}. Set {CACHE} to a folder on a larger disk, raise {CACHE_GB}, or read "
            "fewer splits or kinds."
        )


def _size(folder):
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed or removed it
            total += path.stat().st_size if path.is_file() else 0
    return total
