"""tensorflow-io, whose file systems TensorFlow can use by itself, on the one release it was built for.

Its newest release, 0.37.1, has native code for TensorFlow 2.16 only. There it reads `s3://`, `az://` and `http(s)://`.
What was found with it and a server of the S3 protocol on this machine (tests/tfrecords/test_tfio.py runs it):

- Once a process has used `s3://`, it aborts at its end with "pure virtual method called" and status 134, whatever it
  returned (tensorflow/io #1912, #2039; mended after 0.37.1 by #2120, never released). Reading itself is right. `load`
  ends the process before the faulty destructors, with its own status.
- It seems to hang if `S3_ENDPOINT` has no scheme: it then speaks TLS, whatever `S3_USE_HTTPS` says, and tries a plain
  server again for 50 s at each call before it reports that there is no such file. Write `http://` in front.
"""

import atexit
import ctypes
import functools
import importlib.metadata
import sys

RELEASE, TENSORFLOW = "0.37.1", "2.16"


def installed():
    """Releases of (tensorflow-io, tensorflow) that are installed, each None if it is not."""

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return version("tensorflow-io"), next(filter(None, map(version, ("tensorflow", "tensorflow-cpu"))), None)


def is_made_for_this_tensorflow():
    """Whether tensorflow-io is installed beside the TensorFlow that its native code was built for."""
    release, tensorflow = installed()
    return release == RELEASE and (tensorflow or "").startswith(f"{TENSORFLOW}.")


def describe_mismatch():
    """A sentence on the pair that works, if tensorflow-io is installed beside another TensorFlow; else no text."""
    release, tensorflow = installed()
    if release is None or is_made_for_this_tensorflow():
        return ""
    return (
        f"tensorflow-io {release} is installed, but its file systems do not load on TensorFlow {tensorflow}: the pair "
        f'that works is tensorflow-io {RELEASE} with tensorflow {TENSORFLOW}, pip install "keras-abra[io]"'
    )


def load():
    """Imports tensorflow-io, by which TensorFlow learns `s3://`, `az://` and `http(s)://`.

    Raises:
        ImportError: if it is not installed, or was not built for this TensorFlow.
    """
    if not is_made_for_this_tensorflow():
        raise ImportError(describe_mismatch() or 'tensorflow-io is not installed: pip install "keras-abra[io]"')
    import tensorflow_io

    if sys.platform == "linux":
        _register()
    return tensorflow_io


@functools.cache
def _register():
    atexit.register(_end_before_its_destructors)


def _end_before_its_destructors():
    # What is registered last runs first, with the process's exit status: no destructor of a library comes after it.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)
