"""Checkpoints on disk, each there whole or not at all. Arrays, JSON and copies of files; no Keras.

A checkpoint is a folder `00000012` that is written under another name, synced, and renamed; its `manifest.json` has
length and SHA-256 of every file.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # of file systems that sync none, some of networks among them
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


class Checkpoint(NamedTuple):
    """A checkpoint as it was read.

    Attributes:
        path: its folder.
        arrays: dict of NumPy arrays.
        state: what `json` can write.
        files: paths of the copies of files, by name.
    """

    path: Path
    arrays: dict
    state: Any
    files: dict


def write_checkpoint(folder, arrays, state, files=None, keep=2):
    """Writes the next checkpoint, and removes all but the last `keep`.

    Args:
        folder: where checkpoints stand; made if need be.
        arrays: dict of NumPy arrays.
        state: what `json` can write.
        files: dict, name to path, of files to copy.
        keep: number of checkpoints to keep, this one among them. Default 2.

    Returns:
        Path of the checkpoint.

    Raises:
        OSError: if there is no space left. The checkpoints before stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = _numbered(folder)
    number = 1 + max((int(p.name) for p in folder.iterdir() if _is_number(p.name)), default=0)
    path = folder / f"{number:08d}"
    temporary = folder / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with _explain_no_space(path, known):
            temporary.mkdir()
            manifest = {}
            with _synced(temporary / "arrays.npz") as file:
                np.savez(file, **{name: _plain(array) for name, array in arrays.items()})
            types = {name: str(array.dtype) for name, array in arrays.items()}
            with _synced(temporary / "state.json") as file:
                file.write(json.dumps({"state": state, "dtypes": types}).encode())
            for name, source in (files or {}).items():
                _copy(Path(source), temporary / f"file-{name}")
            for file in sorted(temporary.iterdir()):
                manifest[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            with _synced(temporary / "manifest.json") as file:
                file.write(json.dumps(manifest, indent=1).encode())
            _sync_folder(temporary)
            os.rename(temporary, path)
            _sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _numbered(folder)[:-keep]:
        _remove(old)
    return path


def read_checkpoint(folder, clean=True):
    """Reads the newest whole checkpoint; warns of newer ones that are damaged.

    Args:
        folder: where checkpoints stand.
        clean: remove damaged ones, and what killed processes left.

    Returns:
        A `Checkpoint`, or None if there is none yet.

    Raises:
        ValueError: if there are checkpoints, and all are damaged.
        OSError: if one cannot be read for now (permission, a network's fault): nothing is removed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for left in folder.glob(".*.tmp") if clean else ():
        shutil.rmtree(left, ignore_errors=True)
    damaged = []
    for path in reversed(_numbered(folder)):
        fault = _fault(path)
        if fault is None:
            for other, _ in damaged if clean else ():
                _remove(other)
            return _read(path)
        damaged.append((path, fault))
        warnings.warn(f"The checkpoint {path} is damaged ({fault}): the one before is used.", stacklevel=2)
    if damaged:
        raise ValueError(
            f"All checkpoints in {folder} are damaged: {'; '.join(f'{p.name}: {fault}' for p, fault in damaged)}. "
            "Remove the folder to start anew."
        )
    return None


def _numbered(folder):
    return sorted(p for p in folder.iterdir() if _is_number(p.name) and p.is_dir())


def _is_number(name):
    return name.isdigit() and len(name) == 8


def _remove(path):
    gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # a half-removed one must not look damaged
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _fault(path):
    """What is wrong with a checkpoint; None if it is whole.

    Raises:
        OSError: if that cannot be told, because a file that is there cannot be read.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (*_MISSING, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {type(error).__name__}"
    if not {"arrays.npz", "state.json"} <= expected.keys():
        return "manifest.json names no arrays.npz or state.json"
    for name, (size, checksum) in expected.items():
        try:
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
            if _sha256(path / name) != checksum:
                return f"{name} has another checksum"
        except _MISSING as error:
            return f"{name}: {error.strerror}"
    return None


def _read(path):
    content = json.loads((path / "state.json").read_bytes())
    with np.load(path / "arrays.npz", allow_pickle=False) as stored:
        arrays = {name: _typed(stored[name], dtype) for name, dtype in content["dtypes"].items()}
    files = {file.name.removeprefix("file-"): file for file in path.glob("file-*")}
    return Checkpoint(path, arrays, content["state"], files)


def _plain(array):
    """As a type that NumPy writes: bfloat16 and its like, of another package, are integers of their size."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.isbuiltin == 2 else array


def _typed(array, dtype):
    if str(array.dtype) == dtype:
        return array
    import ml_dtypes

    return array.view(getattr(ml_dtypes, dtype))


def _copy(source, target):
    data = source.stat()  # no link to the same file in the checkpoint before: one fault would damage both
    with open(source, "rb") as opened, _synced(target) as file:
        shutil.copyfileobj(opened, file, 2**20)
    os.utime(target, ns=(data.st_atime_ns, data.st_mtime_ns))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _synced(path):
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder):
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_FOLDERS:
                raise
        finally:
            os.close(handle)


@contextmanager
def _explain_no_space(path, known):
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        left = f"The last whole checkpoint, {known[-1]}, stays" if known else "There is no checkpoint before it"
        raise OSError(
            error.errno,
            f"No space is left to write the checkpoint {path} ({error.strerror}). {left}. Make space, and start the "
            "same run again",
        ) from None
