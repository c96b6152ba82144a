"""The system's locks on files: they live as long as the process that has them, however it ends."""

import errno

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

HAS_LOCKS = fcntl is not None
_NOT_HERE = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


def lock(file, shared=False, wait=True):
    """Locks an open file until it is closed.

    Args:
        file: open file, of which `name` is its path.
        shared: whether others may have it in the same way.
        wait: whether to wait while another process holds it.

    Returns:
        Whether it is ours; None where the system or the file system has no locks (the latter is said).
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise OSError(error.errno, f"{file.name} cannot be locked: {error.strerror}") from error
        print(
            f"WARNING: the file system of {file.name} has no locks ({error.strerror}). Nothing keeps two processes "
            "from writing there at the same time: start one alone."
        )
        return None
    return True


def lock_file(path, shared=False, wait=True, sure=False):
    """An open file that is locked until it is closed; None if another process holds it and `wait` is false, or, with
    `sure`, where there are no locks."""
    file = open(path, "a+")  # NFS locks as fcntl does: what is shared must be readable, what is not, writable
    found = lock(file, shared, wait)
    if found or (found is None and not sure):
        return file
    file.close()
    return None
