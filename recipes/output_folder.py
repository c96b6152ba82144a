"""A job's output folder: made, held while the job is at work, gone on in, and known as that of a job that ended."""

import contextlib
import json
import shutil
import signal
import sys
import threading
from pathlib import Path

from keras_abra import ResumableRun
from tfrecords.locks import HAS_LOCKS, lock_file

CHECKPOINTS = "checkpoints"  # in the output folder, while the job runs
_LOCK = "lock"  # among them
_PREPARED = {CHECKPOINTS, "records", "screen"}  # what stands in the output folder before training
_held = {}


def make_output(folder, name, resume=False):
    """The output folder, made and held, see `at_work`: the given one, which must be new or empty, or `runs/NAME-0001`
    and so on. It may also be that of a job that was stopped before it trained and, with `resume`, at any time."""
    if folder is not None:
        stopped = (folder / CHECKPOINTS).is_dir()
        goes_on = stopped and (resume or (HAS_LOCKS and _only_prepared(folder)))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not goes_on:
            hint = ", or go on with the job that was stopped there with --resume" if stopped else ""
            raise ValueError(
                f"--output {folder} is in use: expected a new or empty folder. Choose another, or remove it{hint}."
            )
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        return _hold(folder)
    if resume:
        raise ValueError("--resume needs --output, the folder of the job that was stopped.")
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (runs / f"{name}-{number:04d}" / CHECKPOINTS).mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return _hold(runs / f"{name}-{number:04d}")


def _only_prepared(folder):
    names = {path.name for path in folder.iterdir()}
    return names <= _PREPARED and {path.name for path in (folder / CHECKPOINTS).iterdir()} <= {_LOCK}


def _hold(folder):
    if HAS_LOCKS:
        held = lock_file(folder / CHECKPOINTS / _LOCK, wait=False)
        if held is None:
            raise ValueError(f"--output {folder} is in use: another process is at work there. Wait for its end.")
        _held[folder] = held
    return folder


@contextlib.contextmanager
def at_work(output, alone=True):
    """Within it, the output folder of `make_output` is kept from other processes; and SIGTERM ends the job with the
    exit code of one that goes on with `--resume`, also while records are built or splits scored.

    Args:
        output: the folder.
        alone: whether this is the job's one process. Others end at SIGTERM as they do: they may be waiting for each
            other.
    """

    def leave(number, frame):
        print(f"\nSIGTERM: with --output {output} --resume the job goes on.", file=sys.stderr, flush=True)
        raise SystemExit(ResumableRun.EXIT_CODE)

    caught = alone and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if caught else None
    try:
        yield
    finally:
        if caught:
            signal.signal(signal.SIGTERM, before)
        _release(output)


@contextlib.contextmanager
def refusal_leaves_nothing(output):
    """An output folder in which nothing was written when an error came is removed: it would be taken for one in use. Of
    one with records it is said that they stay."""
    try:
        yield
    except Exception:
        made = sorted({path.name for path in output.iterdir()} & (_PREPARED - {CHECKPOINTS})) if output.is_dir() else []
        if made:
            names = " and ".join(made)
            print(f"In {output} stay {names}: the same command with --output {output} goes on.", file=sys.stderr)
        else:
            with contextlib.suppress(OSError):  # not empty, or another process was first
                (output / CHECKPOINTS / _LOCK).unlink(missing_ok=True)
                (output / CHECKPOINTS).rmdir()
                output.rmdir()
        raise


def finished(folder, resume, asked):
    """The metrics of a job that ended, if it is to be resumed; else None.

    Raises:
        ValueError: if what was `asked`, by the names of `metrics.json` and of its `options`, is another job.
    """
    if not resume or folder is None or not (folder / "metrics.json").is_file():
        return None
    metrics = json.loads((folder / "metrics.json").read_text())
    before, now = metrics | metrics.get("options", {}), json.loads(json.dumps(asked))
    differing = [
        f"{name} {before[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if differing:
        raise ValueError(
            f"--output {folder} holds another job, which ended: {'; '.join(differing)}. Name a new folder."
        )
    remove_checkpoints(folder)
    print(f"{folder} holds a finished job: there is nothing to resume.")
    return metrics


def remove_checkpoints(output):
    """Of a job that ended."""
    _release(output)  # network file systems keep a file that is open
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def _release(output):
    if output in _held:
        _held.pop(output).close()
