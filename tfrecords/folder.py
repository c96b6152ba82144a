"""Takes the output folder for one build: refuses one that is in use, knows one that is finished or was broken off."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

from tfrecords.locks import HAS_LOCKS, lock
from tfrecords.manifest import EXCLUDED, INDEX, MANIFEST, UNFINISHED, hash_bytes, read_manifest, seal
from tfrecords.whole import explain_no_space, remove_temporary, sync_folder, write_whole

# Options that follow from the others and the source. (`intensity`, as the user gave it, is part of `screen`.)
FOLLOWING = ("intensity", "plan", "table")


def is_finished(dest, options):
    """Whether `dest` already holds what a build with `options` would write.

    Args:
        dest: output folder.
        options: dict of all that decides what is written.

    Raises:
        ValueError: if it holds something else, saying what differs, files that are not from a build, or a finished
            build of which a file is missing or has another size.
    """
    dest = Path(dest)
    if not dest.exists():
        return False
    if not dest.is_dir():
        raise ValueError(f"The output {str(dest)!r} is a file. Name a new or empty folder.")
    if (dest / MANIFEST).exists():
        manifest = read_manifest(dest)
        compare_options(dest, manifest["options"], options, "was built")
        for path in _changed_files(dest, manifest):
            raise ValueError(
                f"{path} is missing or was changed after the build. Run `python -m tfrecords.verify {dest} --repair`."
            )
        return True
    if (dest / UNFINISHED).exists():
        begun, _ = _read_unfinished(dest)
        if begun is not None:
            # Tables and files may have changed since: `claim` removes the shards that are other ones now.
            given = [{key: value for key, value in one.items() if key not in FOLLOWING} for one in (begun[0], options)]
            compare_options(dest, *given, "was begun")
        elif any(dest.glob("*/*.tfrecord")):
            raise ValueError(
                f"The output folder {str(dest)!r} holds shards, and {UNFINISHED} does not say of which build: they "
                "cannot be trusted. Remove the folder, or name another."
            )
        return False
    if (dest / INDEX).is_file() and any(dest.glob("*/*.tfrecord")):
        read_manifest(dest)  # says that it was lost
    content = sorted(path.name for path in dest.iterdir())
    if content:
        raise ValueError(
            f"The output folder {str(dest)!r} is in use: it holds {', '.join(content[:3])}"
            f"{' and more' if len(content) > 3 else ''}, which no build of records wrote. Name a new or empty folder."
        )
    return False


def _changed_files(dest, manifest):
    """What can be told without reading the shards."""
    for shard in manifest["shards"]:
        path = dest / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            yield path
    for name, key in ((INDEX, "index"), (EXCLUDED, "excluded")):
        path = dest / name
        if not path.is_file() or hash_bytes(path.read_bytes()) != manifest[key]["sha256"]:
            yield path


@contextmanager
def claim(dest, options, shards):
    """Holds `dest` for one build: gives True if it is finished, as another process may have done in the meantime.

    Until the manifest stands in its place, a file says that the folder is unfinished.

    Where the source's tables or files changed since the build was begun (a site left out because its file is damaged),
    the shards that would be other ones now are removed; the rest is kept.

    Args:
        dest: output folder; made if need be.
        options: dict of all that decides what is written.
        shards: dict of a shard's name -> digest, of `Prepared.digests`.

    Raises:
        ValueError: if another process is building into the folder, or finished it meanwhile with other options.
    """
    Path(dest).mkdir(parents=True, exist_ok=True)
    with hold(dest) as file:
        if is_finished(dest, options):
            yield True
            return
        begun, length = _read_unfinished(Path(dest))
        if begun != json.loads(json.dumps([options, shards])):
            _remove_others(Path(dest), begun[1] if begun else {}, shards)
            # A further line: a kill in between leaves the one before, and never shards of which nothing is known.
            with explain_no_space(file.name):
                file.truncate(length)
                data = json.dumps([options, shards], sort_keys=True).encode() + b"\n"
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            sync_folder(dest)
        yield False


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def hold(dest):
    """Keeps other builds out of `dest`, and removes what killed ones left half-written.

    Its mark stays behind where there is no manifest in the end: there, it says that the folder is unfinished.

    The lock is the system's: it lives as long as the process, however that ends. On network file systems it is as good
    as their `flock`.

    Yields:
        The file that marks the folder as unfinished, open for reading and appending.

    Raises:
        ValueError: if another process holds the folder.
    """
    marker = Path(dest) / UNFINISHED
    with open(marker, "a+b", buffering=0) as file:
        if HAS_LOCKS and not (lock(file, wait=False) is not False and _is_at(file, marker)):
            raise ValueError(
                f"The output folder {str(dest)!r} is in use: another build is writing into it. "
                "Wait for its end, or name another folder."
            )
        try:
            remove_temporary(dest)
            yield file
        finally:
            if HAS_LOCKS and (Path(dest) / MANIFEST).exists():
                marker.unlink(missing_ok=True)
    if not HAS_LOCKS and (Path(dest) / MANIFEST).exists():
        marker.unlink(missing_ok=True)  # Windows removes no open file.


def tidy(dest):
    """Removes what a build left that was killed between writing the manifest and its end."""
    if (Path(dest) / UNFINISHED).exists():
        with hold(dest):
            pass


def finish(dest, manifest):
    """Writes the manifest, by which the folder becomes whole."""
    write_whole(Path(dest) / MANIFEST, seal(manifest))


def _remove_others(dest, before, now):
    for name in before:
        if now.get(name) != before[name] and (dest / name).exists():
            (dest / name).unlink()
            sync_folder((dest / name).parent)


def _read_unfinished(dest):
    """The last whole line, [options, shards], and where it ends; (None, 0) if there is none: broken off before any
    shard."""
    data = (dest / UNFINISHED).read_bytes()
    end = data.rfind(b"\n") + 1
    if not end:
        return None, 0
    try:
        mark = json.loads(data[:end].splitlines()[-1])
        if not isinstance(mark, list) or [type(part) for part in mark] != [dict, dict]:
            raise ValueError("it is not of the form of this release")
    except ValueError as error:
        raise ValueError(
            f"{dest / UNFINISHED} is damaged, or of another release ({error}): what was begun there cannot be gone on "
            "with. Remove the folder, or name another."
        ) from None
    return mark, end


def _differences(before, now, keys, place=""):
    for key in keys:
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            parts = [part for part in sorted({*one, *other}) if one.get(part) != other.get(part)]
            yield from _differences(one, other, parts, f"{place}{key}.")
        else:
            yield f"{place}{key} {one!r}, now {other!r}"


def compare_options(dest, before, now, verb):
    """Raises a ValueError that names the options in which two builds differ, if they do."""
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if not differing:
        return
    given = [key for key in differing if key not in FOLLOWING]  # which follow the options that were given
    lines = "; ".join(_differences(before, now, given or differing))
    hint = "" if given else f" ({differing[0]}: the source's tables or files are not what they were then)"
    raise ValueError(
        f"The output folder {str(dest)!r} is in use: it {verb} with other options: {lines}{hint}. "
        "Repeat these options, name another folder, or remove this one."
    )
