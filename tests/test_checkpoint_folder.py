"""A checkpoint is there whole or not at all."""

import json

import numpy as np
import pytest

from keras_abra import checkpoint_folder
from keras_abra.checkpoint_folder import read_checkpoint, write_checkpoint

ARRAYS = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array(7), "c": np.zeros((0, 2), "uint8")}


def write(folder, number, **more):
    return write_checkpoint(folder, {**ARRAYS, "n": np.array(number)}, {"n": number}, **more)


def test_what_is_written_is_read_back(tmp_path):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    arrays = {**ARRAYS, "low": np.array([1.5, -2], bfloat16)}
    (tmp_path / "log.csv").write_text("epoch\n0\n")
    state = {"epoch": 3, "loss": 0.1 + 0.2, "best": float("inf"), "rows": [1, None, "x"]}
    path = write_checkpoint(tmp_path / "new", arrays, state, {"log": tmp_path / "log.csv"})
    found = read_checkpoint(tmp_path / "new")
    assert found.path == path and found.state == state
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].tobytes() == array.tobytes()
        assert found.arrays[name].shape == array.shape
    assert found.files["log"].read_text() == "epoch\n0\n"


def test_no_checkpoint_yet(tmp_path):
    assert read_checkpoint(tmp_path) is None and read_checkpoint(tmp_path / "none") is None


def test_arrays_of_text_of_fields_and_of_times_are_read_back(tmp_path):
    arrays = {
        "text": np.array(["abc", "d"]),
        "fields": np.zeros(3, [("a", "f4"), ("b", "i8")]),
        "days": np.array(["2020-01-01"], "M8[D]"),
        "big": np.arange(3, dtype=">f4"),
    }
    write_checkpoint(tmp_path, arrays, {})
    for name, array in read_checkpoint(tmp_path).arrays.items():
        assert array.dtype == arrays[name].dtype and array.tobytes() == arrays[name].tobytes()


def test_what_cannot_be_read_for_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    paths = [write(tmp_path, n) for n in range(2)]

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "_sha256", refuse)
        with pytest.raises(PermissionError, match="00000002"):
            read_checkpoint(tmp_path)
    assert sorted(tmp_path.iterdir()) == paths and read_checkpoint(tmp_path).state == {"n": 1}


def test_a_file_that_has_the_name_of_the_next_one_is_left_alone(tmp_path):
    write(tmp_path, 0)
    (tmp_path / "00000002").write_text("mine")
    assert write(tmp_path, 1).name == "00000003" and read_checkpoint(tmp_path).state == {"n": 1}
    assert (tmp_path / "00000002").read_text() == "mine"


def test_the_last_two_are_kept(tmp_path):
    paths = [write(tmp_path, n) for n in range(4)]
    assert sorted(tmp_path.iterdir()) == paths[2:]
    assert read_checkpoint(tmp_path).state == {"n": 3}


def damage(path, name, how):
    file = path / name
    data = bytearray(file.read_bytes())
    match how:
        case "cut":
            data = data[: len(data) // 2]
        case "flip":
            data[len(data) // 2] ^= 1
        case "gone":
            return file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
@pytest.mark.parametrize("name", ["arrays.npz", "state.json", "manifest.json", "file-log"])
def test_a_damaged_one_is_known_and_the_one_before_is_used(name, how, tmp_path):
    (tmp_path / "log.csv").write_text("epoch\n0\n")
    for n in range(2):
        path = write(tmp_path / "run", n, files={"log": tmp_path / "log.csv"})
    damage(path, name, how)
    with pytest.warns(UserWarning, match=r"00000002 is damaged \(.*\): the one before is used"):
        found = read_checkpoint(tmp_path / "run")
    assert found.state == {"n": 0} and int(found.arrays["n"]) == 0
    write(tmp_path / "run", 2)
    assert read_checkpoint(tmp_path / "run").state == {"n": 2}
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_if_all_are_damaged_that_is_an_error(tmp_path):
    for n in range(2):
        damage(write(tmp_path, n), "arrays.npz", "flip")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="All checkpoints .* are damaged: .*checksum.*anew"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("stop", ["arrays.npz", "state.json", "manifest.json"])
def test_one_that_was_never_finished_is_not_seen(stop, tmp_path, monkeypatch):
    write(tmp_path, 0)

    class Killed(BaseException):
        pass

    def sync(path):
        if path.name == stop:
            raise Killed
        return real(path)

    real = checkpoint_folder._synced
    monkeypatch.setattr(checkpoint_folder, "_synced", sync)
    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies not
    with pytest.raises(Killed):
        write(tmp_path, 1)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert read_checkpoint(tmp_path).state == {"n": 0}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("limit", [200, 1500])
def test_on_a_full_disk_the_last_whole_one_stays(limit, tmp_path):
    resource = pytest.importorskip("resource", reason="limits are POSIX's")
    path = write(tmp_path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="No space is left to write the checkpoint .*00000002 .*00000001, stays"):
            write_checkpoint(tmp_path, {"large": np.random.default_rng(0).random(10000)}, {"n": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*tmp_path.iterdir()] == [path]
    assert read_checkpoint(tmp_path).state == {"n": 0}


def test_each_checkpoint_has_files_of_its_own(tmp_path):
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    first = write(tmp_path / "run", 0, files={"w": tmp_path / "weights"})
    second = write(tmp_path / "run", 1, files={"w": tmp_path / "weights"})
    assert not (first / "file-w").samefile(second / "file-w")
    (tmp_path / "weights").write_bytes(b"y" * 1000)
    third = write(tmp_path / "run", 2, files={"w": tmp_path / "weights"})
    assert (second / "file-w").read_bytes() == b"x" * 1000 and (third / "file-w").read_bytes() == b"y" * 1000
    assert json.loads((third / "manifest.json").read_text())["file-w"]["bytes"] == 1000
