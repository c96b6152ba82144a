"""Writes a file so that it is there whole or not at all."""

import errno
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

_ENDING = ".tmp"
_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # of file systems that sync none, some of networks among them
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def open_whole(path):
    """Opens a file for writing under a temporary name; at the end it is synced and renamed, and its folder synced.

    The temporary name is like no other, so that a process left over from a killed build does not write into the file
    of the next one.

    Args:
        path: where the file is to stand. Its folder must exist.

    Yields:
        A binary file. After an error it is removed, and what stood under `path` stays.

    Raises:
        OSError: if there is no space left, naming the file and what to do.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_ENDING}")
    try:
        with explain_no_space(path), open(temporary, "wb", buffering=2**20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def explain_no_space(path):
    """Turns the system's error for a full disk, or a used up quota, into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise OSError(
            error.errno,
            f"No space is left to write {path} ({error.strerror}). What was finished stays. Make space, and repeat the "
            "same command: it goes on where it stopped",
        ) from None


def write_whole(path, data):
    """Writes bytes so that the file is there whole or not at all, see `open_whole`."""
    with open_whole(path) as file:
        file.write(data)


def remove_temporary(folder):
    """Removes what killed writers left in `folder` and below it."""
    for path in Path(folder).rglob(f".*{_ENDING}"):
        path.unlink(missing_ok=True)


def sync_folder(folder):
    """Makes a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDERS:
            raise
    finally:
        os.close(handle)
