import errno
import os

import pytest

from tfrecords.folder import claim, finish, is_finished
from tfrecords.locks import lock_file
from tfrecords.manifest import SCHEMA, hash_bytes

OPTIONS = {"seed": 0, "plan": "a"}
SHARDS = {"train/one.tfrecord": "1", "val/two.tfrecord": "2"}
KEYS = ("source", "image_shape", "planes", "classes", "cell_types", "shards", "index", "excluded", "versions")
MANIFEST = dict.fromkeys(KEYS) | {
    "schema": SCHEMA,
    "options": OPTIONS,
    "shards": [],
    "index": {"sha256": hash_bytes(b"table")},
    "excluded": {"sha256": hash_bytes(b"table")},
    "experiments": {split: [] for split in ("train", "id_test", "val", "test")},
}


def write_tables(folder):
    for name in ("index", "excluded"):
        (folder / f"{name}.csv").write_bytes(b"table")


def test_a_folder_is_finished_when_its_manifest_stands(tmp_path):
    dest = tmp_path / "records"
    assert not is_finished(dest, OPTIONS)
    with claim(dest, OPTIONS, SHARDS):
        assert [path.name for path in dest.iterdir()] == ["unfinished.json"]
        write_tables(dest)
        finish(dest, MANIFEST)
    assert is_finished(dest, OPTIONS)
    assert sorted(path.name for path in dest.iterdir()) == ["excluded.csv", "index.csv", "manifest.json"]


def test_other_options_are_named(tmp_path):
    with claim(tmp_path, OPTIONS, SHARDS):
        write_tables(tmp_path)
        finish(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match="in use: it was built with other options: seed 0, now 1. Repeat"):
        is_finished(tmp_path, OPTIONS | {"seed": 1})
    with pytest.raises(ValueError, match="plan 'a', now 'b' .plan: the source's tables or files are not"):
        is_finished(tmp_path, OPTIONS | {"plan": "b"})


def test_a_broken_off_build_can_be_continued_but_not_changed(tmp_path):
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, OPTIONS, SHARDS):
        raise KeyboardInterrupt
    assert not is_finished(tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="in use: it was begun with other options: seed 0, now 2"):
        is_finished(tmp_path, OPTIONS | {"seed": 2})


@pytest.mark.parametrize("killed_at", [None, 0, 20])  # bytes of the new line that were written
def test_shards_that_would_be_other_ones_now_are_removed_and_the_rest_is_kept(tmp_path, killed_at):
    def begin(options, shards):
        with pytest.raises(KeyboardInterrupt), claim(tmp_path, options, shards):
            for name in shards:
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
            raise KeyboardInterrupt

    def there():
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}

    begin(OPTIONS, SHARDS)
    before = (tmp_path / "unfinished.json").read_bytes()
    changed = {"train/one.tfrecord": "1", "val/two.tfrecord": "3"}
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, OPTIONS | {"plan": "b"}, changed):
        assert there() == {"train/one.tfrecord"}
        raise KeyboardInterrupt
    if killed_at is not None:
        line = (tmp_path / "unfinished.json").read_bytes()[len(before) :]
        (tmp_path / "unfinished.json").write_bytes(before + line[:killed_at])
    begin(OPTIONS | {"plan": "b"}, changed)
    assert there() == set(SHARDS)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, OPTIONS | {"plan": "c"}, {"val/two.tfrecord": "3"}):
        assert there() == {"val/two.tfrecord"}
        raise KeyboardInterrupt


@pytest.mark.parametrize("mark", ['{"seed": 0}\n', '["a", "b"]\n', "{\n 1\n}\n"])
def test_a_mark_of_another_form_is_named(tmp_path, mark):
    (tmp_path / "unfinished.json").write_text(mark)
    with pytest.raises(ValueError, match="unfinished.json is damaged, or of another release .* Remove the folder"):
        is_finished(tmp_path, OPTIONS)


def test_a_foreign_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is in use: it holds thesis.tex, which no build of records wrote"):
        is_finished(tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="is a file"):
        is_finished(tmp_path / "thesis.tex", OPTIONS)


def test_a_folder_that_another_build_finished_meanwhile_is_finished(tmp_path):
    with claim(tmp_path, OPTIONS, SHARDS) as finished:
        assert not finished
        write_tables(tmp_path)
        finish(tmp_path, MANIFEST)
    with claim(tmp_path, OPTIONS, SHARDS | {"val/two.tfrecord": "3"}) as finished:
        assert finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["excluded.csv", "index.csv", "manifest.json"]


def test_two_builds_at_once_are_refused(tmp_path):
    pytest.importorskip("fcntl", reason="file locks are POSIX's")
    with claim(tmp_path, OPTIONS, SHARDS):
        with (
            pytest.raises(ValueError, match="in use: another build is writing into it"),
            claim(tmp_path, OPTIONS, SHARDS),
        ):
            pass


def test_locks_work_where_they_are_those_of_nfs(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="file locks are POSIX's")
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)  # which looks at how the file was opened, as NFS 4 does
    for shared in (True, False):
        with lock_file(tmp_path / "lock", shared=shared) as file:
            assert file.name == str(tmp_path / "lock")


@pytest.mark.parametrize("number, gone_on", [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_said_and_other_errors_name_the_file(
    tmp_path, monkeypatch, capsys, number, gone_on
):
    fcntl = pytest.importorskip("fcntl", reason="file locks are POSIX's")

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    if gone_on:
        with claim(tmp_path, OPTIONS, SHARDS) as finished:
            assert not finished
        assert lock_file(tmp_path / "lock") and lock_file(tmp_path / "lock", wait=False, sure=True) is None
        assert f"WARNING: the file system of {tmp_path}" in capsys.readouterr().out
    else:
        with pytest.raises(OSError, match=f"{tmp_path}.* cannot be locked"), claim(tmp_path, OPTIONS, SHARDS):
            pass
