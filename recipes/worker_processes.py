"""Tasks in processes of one core each, which end with the one that started them."""

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

from tfrecords.parallel import end_with_parent


@contextlib.contextmanager
def processes(count):
    """Gives a function like `map`, which runs in this process or in `count` others of one core each; results as they
    come."""
    if count <= 1:
        yield map
        return
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[name] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
    context = multiprocessing.get_context("spawn")
    count = count if os.name == "posix" else min(count, 61)  # Windows waits for no more
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent)

    def run(function, tasks):
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            yield future.result()

    try:
        yield run
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
