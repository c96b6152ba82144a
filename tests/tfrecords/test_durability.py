"""What a build survives: being killed, another build, a full disk, shards damaged while it was away.

`KILLS=20 pytest tests/tfrecords/test_durability.py` kills more often.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from tfrecords.build import build_records
from tfrecords.prepare import prepare_build
from tfrecords.verify import verify_records

KILLS = int(os.environ.get("KILLS", 1))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.tfrecord")}


def test_killed_before_any_step_it_goes_on_to_the_same_bytes(release_tree, tmp_path):
    script = Path(__file__).with_name("kill_build.py")
    command = [sys.executable, script, release_tree, tmp_path, str(20 * KILLS)]
    kills = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=600).stdout)
    assert len(kills) >= 20
    # Planning, writing a shard, renaming it, and what comes behind the shards, the manifest among it.
    assert kills[0]["step"] == "open metadata.csv" and kills[0]["shards"] == 0
    assert {"record", "sync", "rename"} <= {kill["step"].split(" ")[0] for kill in kills}
    assert max(kill["shards"] for kill in kills) == 12
    for kill in kills:
        assert kill["equal"] and kill["kept"], kill


def test_killed_at_any_moment_with_its_processes_it_goes_on_to_the_same_bytes(release_tree, records_tree, tmp_path):
    for number in range(KILLS):
        dest = tmp_path / f"records-{number}"
        workers = "1" if KILLS == 1 else "2"
        command = [sys.executable, "-m", "tfrecords.build", release_tree, dest, "--workers", workers]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = random.Random(number).randrange(1, 5)  # of twelve shards
        while process.poll() is None and len([*dest.rglob("*.tfrecord")]) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        assert content(dest) == content(records_tree)


def test_a_shard_damaged_since_is_written_again_and_no_other(release_tree, records, records_tree):
    (records / "manifest.json").rename(records / "unfinished.json")
    options = json.loads((records / "unfinished.json").read_text())["options"]
    mark = [options, prepare_build(release_tree).digests(release_tree)]
    (records / "unfinished.json").write_text(json.dumps(mark) + "\n")
    names = sorted(shard_times(records))
    for path, place in zip(names[:3], (2, 300, -2), strict=True):  # In a length, in pixels, in the last checksum.
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
    before = shard_times(records)
    build_records(release_tree, records)
    assert content(records) == content(records_tree)
    after = shard_times(records)
    assert [path for path in names if after[path] != before[path]] == names[:3]


def test_of_two_builds_into_one_folder_one_stops_and_says_why(release_tree, records_tree, tmp_path):
    refused = []

    class SecondBuild(Executor):
        """Before a first shard is written, starts another build into the same folder."""

        def submit(self, function, task):
            if not refused:
                with pytest.raises(ValueError, match="is in use: another build is writing into it. Wait for") as error:
                    build_records(release_tree, tmp_path / "records")
                refused.append(error)
            future = Future()
            future.set_result(function(task))
            return future

    build_records(release_tree, tmp_path / "records", workers=SecondBuild())
    assert refused and content(tmp_path / "records") == content(records_tree)


@pytest.mark.parametrize("limit, shards", [(300, 0), (900, 0), (3000, 12)])
def test_a_file_that_may_not_grow_is_an_error_and_the_rest_stays(limit, shards, release_tree, records_tree, tmp_path):
    resource = pytest.importorskip("resource", reason="limits are POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="No space is left to write .* Make space, and repeat the same command"):
            build_records(release_tree, tmp_path / "records")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    times = shard_times(tmp_path / "records")
    assert len(times) == shards
    build_records(release_tree, tmp_path / "records")
    assert content(tmp_path / "records") == content(records_tree)
    assert times.items() <= shard_times(tmp_path / "records").items()


def test_on_a_full_disk_the_build_stops_and_goes_on_when_there_is_space(release_tree, records_tree, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small tmpfs here; the test with a limit on the size of files does the same")
    try:
        with pytest.raises(OSError, match="No space is left to write .*tfrecord .* repeat the same command"):
            build_records(release_tree, disk / "records")
        times = shard_times(disk / "records")
        assert 0 < len(times) < 12
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        build_records(release_tree, disk / "records")
        assert content(disk / "records") == content(records_tree) and verify_records(disk / "records") == []
        assert times.items() <= shard_times(disk / "records").items()
    finally:
        subprocess.run(["umount", disk], check=True)
