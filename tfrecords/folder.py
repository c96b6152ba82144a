"""Takes the output folder for one build: refuses one that is in use, knows one that is finished or was broken off."""

import json
from contextlib import contextmanager
from pathlib import Path

from tfrecords.manifest import MANIFEST, UNFINISHED, read_manifest, to_json, write_whole

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
        ValueError: if it holds something else, saying what differs, or files that are not from a build.
    """
    dest = Path(dest)
    if not dest.exists():
        return False
    if not dest.is_dir():
        raise ValueError(f"The output {str(dest)!r} is a file. Name a new or empty folder.")
    if (dest / MANIFEST).exists():
        _compare(dest, read_manifest(dest)["options"], options, "was built")
        return True
    if (dest / UNFINISHED).exists():
        begun = _read_unfinished(dest)
        if begun is not None:
            _compare(dest, begun, options, "was begun")
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

    Raises:
        ValueError: if another process is building into the folder.
    """
    dest = Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    marker = dest / UNFINISHED
    # Held open and locked, not replaced: the lock lives as long as the process, however that ends.
    with open(marker, "a+b") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"The output folder {str(dest)!r} is in use: another build is writing into it. "
                    "Wait for its end, or name another folder."
                ) from None
        file.truncate(0)
        file.write(to_json(options))
        file.flush()
        yield
    marker.unlink(missing_ok=True)


def finish(dest, manifest):
    """Writes the manifest, by which the folder becomes whole."""
    write_whole(Path(dest) / MANIFEST, to_json(manifest))


def _read_unfinished(dest):
    try:
        return json.loads((dest / UNFINISHED).read_text(encoding="utf-8"))
    except ValueError:
        return None  # Broken off while this very file was written, before any shard.


def _compare(dest, before, now, verb):
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if not differing:
        return
    lines = "; ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
    changed = {"plan", "table"} & set(differing)
    hint = f" ({sorted(changed)[0]}: the source's tables or files are not what they were then)" if changed else ""
    raise ValueError(
        f"The output folder {str(dest)!r} is in use: it {verb} with other options: {lines}{hint}. "
        "Repeat these options, name another folder, or remove this one."
    )
