import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from tfrecords import cluster as cluster_module
from tfrecords import parallel
from tfrecords.build import build_records, main
from tfrecords.cluster import connect
from tfrecords.verify import main as verify

Client = pytest.importorskip("distributed", reason="needs the extra dask: pip install 'keras-abra[dask]'").Client


def start(folder, what, *options):
    file = folder / "scheduler.json"
    log = open(folder / f"{what}-{len(list(folder.iterdir()))}.log", "wb")
    command = [
        sys.executable,
        "-m",
        f"distributed.cli.dask_{what}",
        "--scheduler-file",
        file,
        "--no-dashboard",
        *options,
    ]
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)


def _address(file):
    """None until the whole file is there: Dask writes it in place, and half of it may be seen."""
    with suppress(OSError, ValueError, KeyError):
        return json.loads(file.read_text())["address"]


@contextmanager
def cluster(folder, workers):
    processes = [start(folder, "scheduler", "--host", "127.0.0.1", "--port", "0")]
    try:
        deadline = time.monotonic() + 120
        while (address := _address(folder / "scheduler.json")) is None:
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.1)
        processes += [
            start(folder, "worker", "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1") for _ in range(workers)
        ]
        with Client(address, timeout=120, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
        yield address, processes
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """Address of a Dask scheduler with two workers, each a process of its own."""
    with cluster(tmp_path_factory.mktemp("dask"), 2) as (address, _):
        yield address


@pytest.mark.parametrize("lost, message", [(1, "has had no workers for 3 seconds"), (0, "scheduler.*(is gone|lost)")])
def test_a_cluster_that_is_lost_is_an_error_that_says_what_to_do(tmp_path, monkeypatch, lost, message):
    monkeypatch.setattr(parallel, "connect", lambda address: connect(address, timeout=3))
    monkeypatch.setattr(parallel, "_LOOK", 1)
    with cluster(tmp_path, 1) as (address, processes):
        tasks = ((seconds, 1) for seconds in (0, 120, 120, 120))
        results = parallel.run_tasks(time.sleep, tasks, workers=address, total=4, size=0, name="test")
        next(results)
        os.killpg(processes[lost].pid, signal.SIGKILL)
        with pytest.raises(OSError, match=f"{message}.*the same command goes on"):
            next(results)


def test_a_cluster_builds_the_same_and_verifies(scheduler, release_tree, records_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # The workers run elsewhere: a relative path must not be theirs to understand.
    assert main([str(release_tree), "records", "--scheduler", scheduler]) == 0
    files = {path.relative_to(records_tree) for path in records_tree.rglob("*") if path.is_file()}
    assert {path.relative_to("records") for path in Path("records").rglob("*") if path.is_file()} == files
    for name in files:
        assert (tmp_path / "records" / name).read_bytes() == (records_tree / name).read_bytes()
    assert verify(["records", "--scheduler", scheduler]) == 0
    assert "no faults in 12 files" in capsys.readouterr().out


def test_both_workers_take_part_and_errors_come_back(scheduler, release, tmp_path):
    with connect(scheduler) as (executor, most, _):
        assert most() == 4
        assert len(set(executor.map(lambda _: time.sleep(0.2) or os.getpid(), range(8)))) == 2
    path = release / "images/RPE-01/Plate1/B03_s2_w5.png"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="B03_s2_w5.png: expected a whole PNG file"):
        build_records(release, tmp_path / "records", workers=scheduler)


def test_no_task_runs_on_behind_an_error(scheduler, tmp_path):
    """Dask says that it has cancelled a task which runs, and lets it run."""
    late = tmp_path / "late"

    def run(seconds):
        if seconds == 0:
            raise OSError("task 0 is bad")
        time.sleep(seconds)
        late.write_text("done")

    with pytest.raises(OSError, match="task 0 is bad"):
        list(parallel.run_tasks(run, [(3, 1), (0, 1)], workers=scheduler, total=2, size=0, name="test"))
    assert late.exists()


def test_workers_that_come_later_are_used_and_a_short_absence_is_none(monkeypatch):
    workers, now = {"a": 2}, [0.0]
    monkeypatch.setattr(cluster_module.time, "monotonic", lambda: now[0])
    found = cluster_module._Cluster(SimpleNamespace(ncores=lambda: workers), "tcp://host:8786", 30)
    assert found.most() == 4
    workers["b"] = 6
    now[0] = 600.0
    assert found.most() == 16
    workers.clear()
    found.check()  # for the first time in ten minutes
    now[0] = 629.0
    found.check()
    workers["c"] = 1
    found.check()
    workers.clear()
    now[0] = 700.0
    found.check()
    now[0] = 730.0
    with pytest.raises(ConnectionError, match="has had no workers for 30 seconds"):
        found.check()


def test_workers_that_die_at_a_task_are_an_error_that_says_what_to_do():
    from distributed.scheduler import KilledWorker

    class Kills(Executor):
        def submit(self, function, task):
            future = Future()
            future.set_exception(KilledWorker("shard", SimpleNamespace(address="tcp://worker:1"), 3))
            return future

    with pytest.raises(OSError, match="Workers of the cluster died at one task.*the same command goes on"):
        list(parallel.run_tasks(time.sleep, [(0, 1)], workers=Kills(), total=1, size=0, name="test"))


def test_what_listens_and_is_no_scheduler_is_said():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"No Dask scheduler answers at '{address}' .something listens there"):
            with connect(address, timeout=1):
                pass


def test_where_no_scheduler_answers_is_said():
    for address in ("tcp://127.0.0.1:9", "no-such-host.invalid:8786", "foo", "tcp://127.0.0.1", "127.0.0.1:x"):
        began = time.monotonic()
        with pytest.raises(ValueError, match=f"No Dask scheduler answers at {address!r}.*tcp://host:8786"):
            with connect(address, timeout=1):
                pass
        assert time.monotonic() - began < 60, address


def test_without_distributed_the_install_line_is_given(release_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([str(release_tree), str(tmp_path / "records"), "--scheduler", "tcp://127.0.0.1:9"]) == 1
    assert "pip install 'keras-abra[dask]'" in capsys.readouterr().err
