"""Files under a URL: `gs://` by TensorFlow itself, `s3://`, `az://` and `https://` by fsspec or tensorflow-io."""

import re
import sys
from typing import Any, NamedTuple

from tfrecords import tfio

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/{1,2}(?=[^/])")
_EXTRA = 'pip install "keras-abra[remote]"'


class Transport(NamedTuple):
    """Two functions of a URL: `read(url)` gives bytes, `copy(url, path)` writes a local file."""

    read: Any
    copy: Any


def is_remote(dest):
    """Whether a path is a URL. A `pathlib.Path` made of one, which has lost a slash, counts as well."""
    return bool(_URL.match(str(dest)))


def remote_url(dest):
    """The URL of a folder, without a slash at its end.

    Raises:
        ValueError: if it holds a password or a query, such as a signature. They would end up in logs.
    """
    url = _URL.sub(r"\1://", str(dest), count=1).rstrip("/")
    bare = re.sub(r"[?#].*", "", re.sub(r"//[^/]*@", "//", url))
    if bare != url:
        raise ValueError(
            f"The address {bare!r} came with a user name, a password or a query. Expected a plain URL: leave them to "
            "the environment, where each file system looks for them (AWS_ACCESS_KEY_ID, AZURE_STORAGE_ACCOUNT_NAME, "
            "GOOGLE_APPLICATION_CREDENTIALS, or a file in fsspec's configuration folder)."
        )
    return url


def find_transport(url):
    """Chooses what reads a URL: TensorFlow, if it knows the scheme; else tensorflow-io, where it works; else fsspec.

    Raises:
        ImportError: if a package is missing, with the line that installs it.
        ValueError: if nothing knows the scheme.
    """
    import tensorflow as tf  # Here, not above: a local folder's tables are read without it.

    scheme = url.split("://")[0]
    unknown = scheme not in tf.io.gfile.get_registered_schemes()
    if (unknown or "tensorflow_io" in sys.modules) and tfio.is_made_for_this_tensorflow():
        tfio.load()
    if scheme in tf.io.gfile.get_registered_schemes():
        return Transport(_wrapped(_read_tensorflow), _wrapped(_copy_tensorflow))
    try:
        import fsspec
    except ImportError as error:
        hint = tfio.describe_mismatch()
        raise ImportError(
            f"{scheme}:// needs fsspec and its file system, which is not installed: {_EXTRA}{hint and f'. {hint}'}"
        ) from error
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs a package that is not installed ({error}): {_EXTRA}") from error
    except ValueError:
        raise ValueError(
            f"Unknown scheme {scheme!r} of {url}. Expected gs, s3, az, https, or another one that fsspec knows."
        ) from None
    return Transport(_wrapped(_read_fsspec), _wrapped(_copy_fsspec))


def _wrapped(function):
    """Gives errors of all libraries two types: FileNotFoundError, and OSError for the rest."""
    import tensorflow as tf

    def call(url, *path):
        try:
            return function(url, *path)
        except (FileNotFoundError, tf.errors.NotFoundError) as error:
            raise FileNotFoundError(f"{url}: there is no such file") from error
        except Exception as error:
            raise OSError(f"{url} cannot be read ({type(error).__name__}: {str(error)[:300]})") from error

    return call


def _read_tensorflow(url):
    import tensorflow as tf

    with tf.io.gfile.GFile(url, "rb") as file:
        return file.read()


def _copy_tensorflow(url, path):
    import tensorflow as tf

    tf.io.gfile.copy(url, str(path), overwrite=True)


def _read_fsspec(url):
    from fsspec.core import url_to_fs

    system, name = url_to_fs(url)
    return system.cat_file(name)


def _copy_fsspec(url, path):
    from fsspec.core import url_to_fs

    system, name = url_to_fs(url)
    system.get_file(name, str(path))
