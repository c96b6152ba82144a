import pytest

from tfrecords.folder import claim, finish, is_finished
from tfrecords.manifest import SCHEMA

OPTIONS = {"seed": 0, "plan": "a"}
KEYS = ("source", "image_shape", "planes", "classes", "cell_types", "shards", "index", "excluded", "versions")
MANIFEST = dict.fromkeys(KEYS) | {
    "schema": SCHEMA,
    "options": OPTIONS,
    "shards": [],
    "experiments": {split: [] for split in ("train", "id_test", "val", "test")},
}


def test_a_folder_is_finished_when_its_manifest_stands(tmp_path):
    dest = tmp_path / "records"
    assert not is_finished(dest, OPTIONS)
    with claim(dest, OPTIONS):
        assert [path.name for path in dest.iterdir()] == ["unfinished.json"]
        finish(dest, MANIFEST)
    assert is_finished(dest, OPTIONS)
    assert [path.name for path in dest.iterdir()] == ["manifest.json"]


def test_other_options_are_named(tmp_path):
    with claim(tmp_path, OPTIONS):
        finish(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match="in use: it was built with other options: seed 0, now 1. Repeat"):
        is_finished(tmp_path, OPTIONS | {"seed": 1})
    with pytest.raises(ValueError, match="plan 'a', now 'b' .plan: the source's tables or files are not"):
        is_finished(tmp_path, OPTIONS | {"plan": "b"})


def test_a_broken_off_build_can_be_continued_but_not_changed(tmp_path):
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, OPTIONS):
        raise KeyboardInterrupt
    assert not is_finished(tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="in use: it was begun with other options: seed 0, now 2"):
        is_finished(tmp_path, OPTIONS | {"seed": 2})


def test_a_foreign_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is in use: it holds thesis.tex, which no build of records wrote"):
        is_finished(tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="is a file"):
        is_finished(tmp_path / "thesis.tex", OPTIONS)


def test_two_builds_at_once_are_refused(tmp_path):
    pytest.importorskip("fcntl", reason="file locks are POSIX's")
    with claim(tmp_path, OPTIONS):
        with pytest.raises(ValueError, match="in use: another build is writing into it"), claim(tmp_path, OPTIONS):
            pass
