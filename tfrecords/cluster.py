"""A Dask cluster as an executor."""

import socket
import sys
import threading
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager
from urllib.parse import urlsplit

# Tasks handed out per thread of the cluster: one that runs, and one so that none waits for the way here and back.
_AHEAD = 2
_LOOK = 5  # seconds between looks at how many workers there are
GOES_ON = "What was finished stays: the same command goes on where this one stopped."


@contextmanager
def connect(address, timeout=30):
    """Connects to the scheduler of a Dask cluster. Needs the extra `dask`.

    Its workers need this package, and must see source and destination under the same paths.

    Args:
        address: such as `tcp://host:8786`.
        timeout: seconds to wait for the scheduler and a first worker. Default 30, three times Dask's own.

    Yields:
        (executor, most, check): a `concurrent.futures.Executor`; a function that gives how many tasks to hand to it at
        a time, for the workers that it has by now; a function to call now and then, which raises a ConnectionError
        when the scheduler is gone, or was without workers at each call of the last `timeout` seconds.

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
        client = _within(3 * timeout, Client, address, timeout=timeout, set_as_default=False)
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
        cluster = _Cluster(client, address, timeout)
        # Each writes the same bytes under the same name, so a task may be run again where a worker is lost. A result is
        # taken as it is; an error is ours to raise.
        yield client.get_executor(pure=False), cluster.most, cluster.check


def killed_workers(error):
    """Whether an error is Dask's for a task at which worker after worker died."""
    module = sys.modules.get("distributed.scheduler")
    return module is not None and isinstance(error, module.KilledWorker)


class _Cluster:
    def __init__(self, client, address, timeout):
        self.client, self.address, self.timeout = client, address, timeout
        self.threads, self.asked, self.empty_since = 0, -_LOOK, None

    def most(self):
        if time.monotonic() - self.asked >= _LOOK:
            self.threads = sum(self._workers().values()) or self.threads
            self.asked = time.monotonic()
        return _AHEAD * max(self.threads, 1)

    def check(self):
        if self._workers():
            self.empty_since = None
            return
        now = time.monotonic()
        if self.empty_since is None:
            self.empty_since = now
        if now - self.empty_since >= self.timeout:
            raise ConnectionError(
                f"The Dask scheduler at {self.address!r} has had no workers for {self.timeout} seconds. Start some "
                f"with `dask worker {self.address}`. {GOES_ON}"
            )

    def _workers(self):
        try:
            return self.client.ncores()
        except Exception as error:  # Dask has many, of no common kind.
            raise ConnectionError(f"The Dask scheduler at {self.address!r} is gone ({error}). {GOES_ON}") from None


def _within(seconds, function, *args, **kwargs):
    """What a function gives. A ValueError if it does not come back: Dask waits for ever for the answer of what listens
    there and is no scheduler."""
    outcome = Future()

    def call():
        try:
            outcome.set_result(function(*args, **kwargs))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    if wait([outcome], seconds).not_done:
        raise ValueError("something listens there, and does not answer as a scheduler does")
    return outcome.result()


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
