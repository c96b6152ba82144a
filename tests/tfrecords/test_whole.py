import os
import subprocess
import sys

import pytest

from tfrecords.whole import open_whole, remove_temporary, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_stands_and_nothing_else(tmp_path):
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(KeyError), open_whole(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyError
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_a_killed_writer_leaves_is_not_the_file_and_can_be_removed(tmp_path, call):
    script = f"""
import os, signal
from tfrecords.whole import write_whole
os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_whole({str(tmp_path / "file")!r}, b"new")
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    remove_temporary(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_named_with_what_to_do(tmp_path):
    resource = pytest.importorskip("resource", reason="limits are POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="No space is left to write .*file .*Make space, and repeat the same command"):
            write_whole(tmp_path / "file", os.urandom(101))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())
