"""What a folder of records says of itself. Written last: a folder without it is not whole."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

from tfrecords.remote import find_transport, is_remote, remote_url
from tfrecords.splits import SPLITS

SCHEMA = 2
MANIFEST = "manifest.json"
INDEX = "index.csv"
EXCLUDED = "excluded.csv"
UNFINISHED = "unfinished.json"
_KEYS = (
    "source",
    "options",
    "image_shape",
    "planes",
    "classes",
    "experiments",
    "cell_types",
    "shards",
    "index",
    "excluded",
    "versions",
)


def read_manifest(dest):
    """Reads the manifest of a folder that `build_records` finished.

    Args:
        dest: folder of records, or URL of one, see `mirror.local_folder`.

    Returns:
        dict: `schema`; `source` and `options` of the build; `image_shape` (height, width, channels); `planes` (see
        `write.encode_site`; None for raw pixels); `classes` (see `labels.class_map`); `experiments` of each split,
        sorted (an experiment's number is its place in `experiments["train"]`); `cell_types`; `repeated_layouts` (see
        `leaks.find_repeats`); `intensity` (experiment, plate, channel, low, high, where grey levels were scaled);
        `names` of plates and sites that are no numbers, and their numbers; `shards` (name, split, experiment, kind,
        count, labelled, bytes, sha256); `index` and `excluded` (file, sha256, count); `versions`.

    Raises:
        ValueError: if the folder is missing, is not whole, or was written by a newer release.
    """
    path = f"{remote_url(dest)}/{MANIFEST}" if is_remote(dest) else Path(dest) / MANIFEST
    data = _read_remote(path) if is_remote(dest) else _read_local(path)
    try:
        manifest = json.loads(data.decode())
        schema = manifest["schema"]
        if schema == SCHEMA:
            missing = [key for key in _KEYS if key not in manifest]
            experiments = manifest.get("experiments", SPLITS)
            missing += [f"experiments of {split}" for split in SPLITS if split not in experiments]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            if manifest.pop("checksum", None) != hash_bytes(to_json(manifest)):
                raise ValueError("its content does not fit its checksum")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Remove the folder and build it again."
        ) from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}; expected {SCHEMA}. Build the records again with this release.")
    return manifest


def _read_local(path):
    if path.is_file():
        return path.read_bytes()
    if not path.parent.is_dir():
        found = "there is no such folder"
    elif (path.parent / UNFINISHED).exists():
        found = "the build was broken off and left parts of a data set"
    elif (path.parent / INDEX).is_file():
        raise ValueError(
            f"{str(path.parent)!r} has lost its {MANIFEST}, without which no record can be trusted. Copy it back, or "
            "build the records again into a new folder."
        )
    else:
        found = f"there is no {MANIFEST}"
    raise ValueError(
        f"{str(path.parent)!r} holds no finished records: {found}. Expected a folder written to the end by "
        "`python -m tfrecords.build SOURCE DEST`; run that command (again) first."
    )


def _read_remote(url):
    try:
        return find_transport(url).read(url)
    except FileNotFoundError:
        raise ValueError(
            f"{url.rsplit('/', 1)[0]!r} holds no finished records: there is no {MANIFEST}. Build a folder here with "
            "`python -m tfrecords.build SOURCE DEST`, and copy the whole of it there, the manifest last."
        ) from None


def class_names(dest, kinds=("treatment",)):
    """Names of the classes in the order of their labels: `class_names(dest)[label]`.

    Args:
        dest: folder of records.
        kinds: as for `read_records`. siRNAs of treatments have the lowest labels, so that without controls there are
            fewer classes (1,108 instead of 1,139 in RxRx1).
    """
    manifest = read_manifest(dest)
    treatments_only = manifest["options"]["label"] == "sirna_id" and "control" not in kinds
    return [row["name"] for row in manifest["classes"] if row["treatment"] or not treatments_only]


def seal(manifest):
    """The manifest's JSON text as bytes, with a checksum of its other content."""
    manifest = json.loads(to_json(manifest))  # As it will be read: tuples are lists, numbers as keys are texts.
    manifest.pop("checksum", None)
    return to_json(manifest | {"checksum": hash_bytes(to_json(manifest))})


def to_json(value):
    """JSON text as bytes, equal for equal values."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def hash_bytes(data):
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def package_versions():
    """Releases that wrote the records: dict of name -> version."""
    versions = {"python": platform.python_version()}
    for name in ("keras-abra", "tensorflow", "numpy", "pandas", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def channel_names(manifest):
    """The channels of the images in their order: names where the screen has some, else numbers on disk."""
    options = manifest["options"]
    names = (options.get("screen") or {}).get("channels") or []
    return [names[n - 1] if n <= len(names) else n for n in options["channels"]]
