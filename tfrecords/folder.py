"""Takes the output folder for one build: refuses one that is in use, knows one that is finished or was broken off."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

from tfrecords.manifest import MANIFEST, UNFINISHED, read_manifest, seal, to_json
from tfrecords.whole import explain_no_space, remove_temporary, sync_folder, write_whole

try:
    import fcntl
except ImportError:  # Not on Windows: there, two builds into one folder at once are not noticed.
    fcntl = None


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
        for shard in manifest["shards"]:
            path = dest / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path} is missing or was changed after the build. "
                    f"Run `python -m tfrecords.verify {dest} --repair`."
                )
        return True
    if (dest / UNFINISHED).exists():
        begun = _read_unfinished(dest)
        if begun is not None:
            compare_options(dest, begun, options, "was begun")
        return False
    content = sorted(path.name for path in dest.iterdir())
    if content:
        raise ValueError(
            f"The output folder {str(dest)!r} is in use: it holds {', '.join(content[:3])}"
            f"{' and more' if len(content) > 3 else ''}, which no build of records wrote. Name a new or empty folder."
        )
    return False


@contextmanager
def claim(dest, options):
    """Holds `dest` for one build. Until the manifest stands in its place, a file says that the folder is unfinished.

    Args:
        dest: output folder; made if need be.
        options: dict of all that decides what is written.

    Raises:
        ValueError: if another process is building into the folder, or finished it meanwhile with other options.
    """
    Path(dest).mkdir(parents=True, exist_ok=True)
    with hold(dest) as file:
        is_finished(dest, options)
        # Only the first time: a kill in between would leave shards, and nothing to say of which options they are.
        if _read_unfinished(Path(dest)) is None:
            with explain_no_space(file.name):
                file.truncate(0)
                data = to_json(options)
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            sync_folder(dest)
        yield


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
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = not os.path.samestat(os.fstat(file.fileno()), os.stat(marker))
            except (BlockingIOError, FileNotFoundError):
                taken = True
            if taken:
                raise ValueError(
                    f"The output folder {str(dest)!r} is in use: another build is writing into it. "
                    "Wait for its end, or name another folder."
                )
        try:
            remove_temporary(dest)
            yield file
        finally:
            if fcntl is not None and (Path(dest) / MANIFEST).exists():
                marker.unlink(missing_ok=True)
    if fcntl is None and (Path(dest) / MANIFEST).exists():
        marker.unlink(missing_ok=True)  # Windows removes no open file.


def tidy(dest):
    """Removes what a build left that was killed between writing the manifest and its end."""
    if (Path(dest) / UNFINISHED).exists():
        with hold(dest):
            pass


def finish(dest, manifest):
    """Writes the manifest, by which the folder becomes whole."""
    write_whole(Path(dest) / MANIFEST, seal(manifest))


def _read_unfinished(dest):
    try:
        return json.loads((dest / UNFINISHED).read_text(encoding="utf-8"))
    except ValueError:
        return None  # Broken off while this very file was written, before any shard.


def compare_options(dest, before, now, verb):
    """Raises a ValueError that names the options in which two builds differ, if they do."""
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if not differing:
        return
    lines = "; ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
    changed = set() if "seed" in differing else {"plan", "table"} & set(differing)  # the plan follows the seed
    hint = f" ({sorted(changed)[0]}: the source's tables or files are not what they were then)" if changed else ""
    raise ValueError(
        f"The output folder {str(dest)!r} is in use: it {verb} with other options: {lines}{hint}. "
        "Repeat these options, name another folder, or remove this one."
    )
