import os
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tfrecords.parallel import run_tasks


def double(task):
    return 2 * task


def run(count, workers, function=double):
    tasks = ((i, 1) for i in range(count))
    return run_tasks(function, tasks, workers=workers, total=count, size=0, name="test")


def test_every_result_comes_once_whoever_runs_it():
    with ThreadPoolExecutor(3) as threads:
        for workers in (None, 1, threads):
            assert sorted(run(200, workers)) == list(range(0, 400, 2))


def test_no_more_than_a_bounded_number_of_tasks_exists():
    class Instant(Executor):
        def submit(self, function, task):
            future = Future()
            future.set_result(function(task))
            return future

    made = []
    tasks = ((made.append(i) or i, 1) for i in range(1000))
    results = run_tasks(double, tasks, workers=Instant(), total=1000, size=0, name="test")
    next(results)
    assert len(made) == 64
    assert len(list(results)) == 999


def test_an_error_ends_the_work_and_is_raised():
    begun = []

    def fail_at_70(task):
        begun.append(task)
        if task == 70:
            raise ValueError("task 70 is bad")

    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match="task 70 is bad"):
        list(run(1000, threads, fail_at_70))
    assert len(begun) < 200


def test_a_process_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(OSError, match="A process ended abruptly: .* memory .*the same command goes on"):
        list(run_tasks(os._exit, [(9, 1)], workers=2, total=1, size=0, name="test"))


def test_a_lost_task_is_an_error_that_says_what_to_do():
    class Loses(Executor):
        def submit(self, function, task):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(OSError, match="The scheduler lost a task .*the same command goes on"):
        list(run(3, Loses()))


def test_no_task_runs_on_behind_an_error():
    done = []

    def slow(task):
        if task == 0:
            raise OSError("task 0 is bad")
        time.sleep(0.5)
        done.append(task)

    with ThreadPoolExecutor(2) as threads:
        with pytest.raises(OSError, match="task 0 is bad"):
            list(run(50, threads, slow))
        count = len(done)
        time.sleep(0.7)
        assert len(done) == count < 49


def test_nothing_to_do_shows_no_empty_bar(capsys):
    assert list(run_tasks(abs, [], workers=1, total=0, size=0, name="repair")) == []
    assert capsys.readouterr().err == ""
    assert list(run_tasks(abs, [(-1, 1)], workers=1, total=1, size=1, name="repair")) == [1]
    assert "repair" in capsys.readouterr().err


def test_a_script_that_works_on_import_is_told_to_keep_below_main(release_tree, tmp_path):
    script = tmp_path / "build.py"
    script.write_text(
        "from tfrecords import build_records\n"
        f"build_records({str(release_tree)!r}, {str(tmp_path / 'records')!r}, workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert found.returncode == 1 and "RuntimeError: Processes are started from a script that begins its" in found.stderr
    assert "its work on import, and not below `if __name__ == '__main__':`" in found.stderr
    assert "in use" not in found.stderr
