"""A Dask cluster as an executor."""

import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

# Tasks handed out per thread of the cluster: one that runs, and one so that none waits for the way here and back.
_AHEAD = 2
GOES_ON = "What was finished stays: the same command goes on where this one stopped."


@contextmanager
def connect(address, timeout=30):
    """Connects to the scheduler of a Dask cluster. Needs the extra `dask`.

    Its workers need this package, and must see source and destination under the same paths.

    Args:
        address: such as `tcp://host:8786`.
        timeout: seconds to wait for the scheduler and a first worker. Default 30, three times Dask's own.

    Yields:
        (executor, most, check): a `concurrent.futures.Executor`; how many tasks to hand to it at a time; a function to
        call now and then, which raises a ConnectionError when the scheduler is gone, or was without workers at each
        call of the last `timeout` seconds.

    Raises:
        ValueError: if nothing answers there, or no worker is known to it.
        ImportError: if `distributed` is not installed.
    """
    try:
        from distributed import Client
    except ImportError:
        raise ImportError(
            "A Dask scheduler needs the package distributed, which is not installed. Run `pip install "
            "'keras-abra[dask]'`, with the release of the cluster."
        ) from None
    try:
        _probe(address, timeout)
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No Dask scheduler answers at {address!r} ({error}). Expected an address such as tcp://host:8786, which "
            "`dask scheduler` prints when it starts."
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError:
            raise ValueError(
                f"The Dask scheduler at {address!r} has no workers. Start some with `dask worker {address}`."
            ) from None
        threads = sum(client.ncores().values())
        # Each writes the same bytes under the same name, so a task may be run again where a worker is lost. A result is
        # taken as it is; an error is ours to raise.
        yield client.get_executor(pure=False), _AHEAD * threads, _watch(client, address, timeout)


def _watch(client, address, timeout):
    last = time.monotonic()

    def check():
        nonlocal last
        try:
            workers = client.ncores()
        except Exception as error:  # Dask has many, of no common kind.
            raise ConnectionError(f"The Dask scheduler at {address!r} is gone ({error}). {GOES_ON}") from None
        if workers:
            last = time.monotonic()
        elif time.monotonic() - last >= timeout:
            raise ConnectionError(
                f"The Dask scheduler at {address!r} has had no workers for {timeout} seconds. Start some with "
                f"`dask worker {address}`. {GOES_ON}"
            )

    return check


def _probe(address, timeout):
    """Raises an OSError or ValueError if nothing listens there. Dask's client tries twice as long as it is told to, and
    also where there is no such host."""
    url = urlsplit(address if "://" in address else f"tcp://{address}")
    if url.scheme not in ("tcp", "tls"):
        return
    if not url.hostname or not url.port:
        raise ValueError("it has no host or no port")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((url.hostname, url.port), timeout).close()
            return
        except socket.gaierror:
            raise
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)
