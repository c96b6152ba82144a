import shutil

import pytest
from PIL import Image

from tfrecords.build import build_records
from tfrecords.manifest import read_manifest
from tfrecords.repair import repair_records
from tfrecords.verify import main, verify_records

NAME = "train/RPE-01_treatment_00000-of-00001.tfrecord"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def flip(path, place, bit=0x10):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def test_only_what_is_damaged_is_written_and_becomes_what_it_was(records, records_tree, capsys):
    flip(records / NAME, 400)
    (records / "val/HUVEC-17_control_00000-of-00001.tfrecord").unlink()
    (records / "train/.left.tfrecord.0123abcd.tmp").touch()  # As a killed build leaves it.
    before = times(records)
    assert main([str(records)]) == 1
    assert main([str(records), "--repair"]) == 0
    out = capsys.readouterr().out
    assert f"Repaired 2 of the files: {NAME}, val/HUVEC-17_control_00000-of-00001.tfrecord." in out
    assert content(records) == content(records_tree)
    after = times(records)
    assert {name for name in before if after.get(name) != before[name]} == {
        NAME,
        "train/.left.tfrecord.0123abcd.tmp",
    }
    assert repair_records(records) == ([], [])


def test_index_and_excluded_are_made_anew(release, tmp_path):
    (release / "images/RPE-01/Plate1/B03_s2_w5.png").unlink()
    build_records(release, tmp_path / "records")
    before = content(tmp_path / "records")
    flip(tmp_path / "records/index.csv", 300)
    (tmp_path / "records/excluded.csv").unlink()
    flip(tmp_path / "records" / NAME, 400)  # Where the records begin is in the shards: this one has to come first.
    mended, stay = repair_records(tmp_path / "records")
    assert (mended, stay) == ([NAME, "excluded.csv", "index.csv"], [])
    assert content(tmp_path / "records") == before and verify_records(tmp_path / "records") == []


def test_what_the_manifest_does_not_know_is_left_to_its_owner(records, capsys):
    (records / "notes.txt").write_text("mine")
    flip(records / NAME, 400)
    assert main([str(records), "--repair"]) == 1
    assert "not repaired: notes.txt: a stray file" in capsys.readouterr().out
    assert (records / "notes.txt").read_text() == "mine"
    assert [fault.file for fault in verify_records(records)] == ["notes.txt"]


def test_another_source_is_refused_and_nothing_changes(release, tmp_path, edit_table, capsys):
    dest = tmp_path / "records"
    build_records(release, dest)
    flip(dest / NAME, 400)
    before = content(dest)

    moved = shutil.copytree(release, tmp_path / "moved")
    path = moved / "images/RPE-01/Plate1/B03_s1_w5.png"
    Image.new("L", (8, 8)).save(path)
    with pytest.raises(ValueError, match=f"{NAME} cannot be repaired: the images in .*moved give other bytes"):
        repair_records(dest, moved)
    edit_table(moved, lambda table: table.assign(sirna=table["sirna"].replace("s20", "s99")))
    with pytest.raises(ValueError, match="table .*the source's tables or files are not what they were then"):
        repair_records(dest, moved)
    shutil.rmtree(release)
    assert main([str(dest), "--repair"]) == 1
    assert "is not there. Name the folder" in capsys.readouterr().err
    assert content(dest) == before


def test_a_source_that_moved_can_be_named(release, tmp_path):
    dest = tmp_path / "records"
    build_records(release, dest)
    whole = content(dest)
    flip(dest / NAME, 400)
    release.rename(tmp_path / "moved")
    assert main([str(dest), "--repair", "--source", str(tmp_path / "moved")]) == 0
    assert content(dest) == whole


def test_a_damaged_manifest_is_noticed_wherever_it_is(records):
    path = records / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 97):
        flip(path, place, 1)
        with pytest.raises(ValueError, match="manifest.json (is damaged|has schema)"):
            read_manifest(records)
        path.write_bytes(data)


def test_a_file_that_came_since_does_not_stand_in_the_way(release, tmp_path):
    path, late = release / "images/RPE-01/Plate1/B03_s2_w5.png", tmp_path / "late.png"
    path.rename(late)
    dest = tmp_path / "records"
    build_records(release, dest)
    whole = content(dest)
    late.rename(path)
    flip(dest / NAME, 400)
    assert repair_records(dest) == ([NAME], []) and content(dest) == whole


def test_what_a_killed_repair_left_is_no_stray_file(records, records_tree):
    flip(records / NAME, 400)
    (records / "unfinished.json").touch()
    assert repair_records(records) == ([NAME], []) and content(records) == content(records_tree)
