"""Tasks in processes of one core each, which end with the one that started them."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed


class processes:
    """Runs a function over tasks, in this process or in `count` others of one core each; results as they come."""

    def __init__(self, count):
        self.count, self.executor = count, None

    def __enter__(self):
        if self.count > 1:
            for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
                os.environ[name] = "1"
            os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
            context = multiprocessing.get_context("spawn")
            count = self.count if os.name == "posix" else min(self.count, 61)  # Windows waits for no more
            self.executor = ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent)
        return self.run

    def run(self, function, tasks):
        if self.executor is None:
            yield from map(function, tasks)
            return
        for future in as_completed([self.executor.submit(function, task) for task in tasks]):
            yield future.result()

    def __exit__(self, *error):
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)


def end_with_parent():
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
