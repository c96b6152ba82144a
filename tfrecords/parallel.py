"""Runs one function over many tasks: in this process, in processes of its own, or on any executor."""

import argparse
import functools
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager

from tfrecords.cluster import GOES_ON, connect, killed_workers
from tfrecords.faults import MOST, Faults
from tfrecords.progress import progress_bar

# Below this many bytes of pixels one process has done all before a second one has started.
_BYTES_FOR_PROCESSES = 2e9
# Tasks handed to an executor whose number of workers cannot be asked; the rest wait as they are, unmade.
_IN_FLIGHT = 64
_LOOK = 5  # seconds between looks at whether anybody still works


def run_tasks(function, tasks, *, workers, total, size, name) -> Iterator:
    """Runs `function` on each task and gives the results as they come, with progress, rate and time left.

    No more than a bounded number of tasks exist at a time, so that memory does not grow with their number. After an
    error nothing new is begun, and the error is raised. `Faults` of files are collected first, from the other tasks.

    Args:
        function: of one task; with processes, importable by name.
        tasks: iterable of (task, number of sites in it).
        workers: number of processes; a `concurrent.futures.Executor`; the address of a Dask scheduler, such as
            `tcp://host:8786`; or None for one process a core, and this process alone where there is little to do.
        total: number of sites in all tasks.
        size: bytes of pixels in all tasks.
        name: what is done, for the progress bar.

    Yields:
        Each task's result, in no particular order.

    Raises:
        OSError: if a process or a cluster is lost.
    """
    messages = []
    with (
        progress_bar(total, name, **({} if total else {"disable": True})) as progress,
        _executor(workers, size) as (executor, most, check),
    ):
        running = {}
        try:
            for task, count in tasks:
                if len(messages) >= MOST:
                    break
                if executor is None:
                    yield from _result(functools.partial(function, task), messages)
                    progress.update(count)
                    continue
                running[executor.submit(function, task)] = count
                if len(running) >= most():
                    yield from _harvest(running, progress, messages, check)
            while running and len(messages) < MOST:
                yield from _harvest(running, progress, messages, check)
        except BrokenExecutor:
            raise ChildProcessError(
                "A process ended abruptly: it was killed, perhaps because memory ran out, which fewer processes "
                "(--workers) take less of; or the script that starts it does its work on import, and not below "
                f"`if __name__ == '__main__':`. {GOES_ON}"
            ) from None
        finally:
            # They must not write on when the folder is no longer held. Only these executors say whether a task has
            # begun: Dask's lets one that runs be cancelled, and runs it to its end.
            says = isinstance(executor, (ProcessPoolExecutor, ThreadPoolExecutor))
            _await([future for future in running if not (says and future.cancel())], check)
    if messages:
        raise Faults(sorted(messages)[:MOST])


def refuse_in_new_process():
    """Raises a RuntimeError in a process that runs its parent's script again while it starts."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "Processes are started from a script that begins its work when it is imported, as each of them does. Put "
            "what the script does below `if __name__ == '__main__':`, or pass workers=1."
        )


def add_workers(parser):
    """Adds `--workers` and `--scheduler` to a command line; both fill in `workers`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--workers", type=_positive, help="number of processes (default: one a core; 1 where little is to do)"
    )
    group.add_argument("--scheduler", dest="workers", metavar="tcp://HOST:PORT", help="run on a Dask cluster instead")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {number}")
    return number


def _harvest(running, progress, messages, check):
    done, _ = wait(running, _LOOK, FIRST_COMPLETED)
    while not done:
        check()
        done, _ = wait(running, _LOOK, FIRST_COMPLETED)
    for future in done:
        count = running.pop(future)
        yield from _result(future.result, messages)
        progress.update(count)


def _result(call, messages):
    try:
        result = call()
    except Faults as faults:
        messages += faults.messages
    except CancelledError as error:
        raise ConnectionError(f"The scheduler lost a task ({error}). {GOES_ON}") from None
    except Exception as error:
        if not killed_workers(error):
            raise
        raise ChildProcessError(
            f"Workers of the cluster died at one task, perhaps because memory ran out ({error}). {GOES_ON}"
        ) from None
    else:
        yield result


def _await(running, check):
    try:
        while wait(running, _LOOK).not_done:
            check()
    except ConnectionError:
        pass  # of a cluster that is lost


def _nothing():
    pass


@contextmanager
def _executor(workers, size):
    if isinstance(workers, Executor):
        yield workers, lambda: max(_IN_FLIGHT, 2 * getattr(workers, "_max_workers", 0)), _nothing
        return
    if isinstance(workers, str):
        with connect(workers) as (executor, most, check):
            yield executor, most, check
        return
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = workers if size >= _BYTES_FOR_PROCESSES else 1
    if workers <= 1:
        yield None, lambda: 1, _nothing
        return
    # Not forked: TensorFlow's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_process)
    try:
        yield executor, lambda: 2 * workers, _nothing
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _begin_process():
    # Before TensorFlow looks for GPUs, in the tasks that need it.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    end_with_parent()


def end_with_parent():
    """Lets this process end when the one that started it does: killed, that cannot stop its processes, and they would
    write on into a folder that no one holds."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
