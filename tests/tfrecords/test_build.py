import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tfrecords.build import build_records, main
from tfrecords.manifest import read_manifest
from tfrecords.prepare import prepare_build


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_line_builds_and_says_so(release_tree, tmp_path, capsys):
    assert main([str(release_tree), str(tmp_path / "records"), "--label", "cell_type", "--seed", "3"]) == 0
    assert "Wrote 32 sites in 12 files" in (out := capsys.readouterr().out)
    assert "train 8, id_test 8, val 8, test 8" in out
    options = read_manifest(tmp_path / "records")["options"]
    assert (options["label"], options["seed"]) == ("cell_type", 3)


def test_an_error_of_the_command_line_is_one_message_and_a_status(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "records")]) == 1
    assert "nowhere' is not a folder" in capsys.readouterr().err


def test_nothing_but_the_records_and_three_files_stays(records_tree):
    names = {path.name for path in records_tree.iterdir()}
    assert names == {"train", "id_test", "val", "test", "manifest.json", "index.csv", "excluded.csv"}
    assert all(path.suffix == ".tfrecord" for path in records_tree.glob("*/*"))


def test_building_again_does_nothing_and_other_options_are_refused(release_tree, records, capsys):
    before = content(records)
    build_records(release_tree, records)
    assert "nothing to do" in capsys.readouterr().out and content(records) == before
    with pytest.raises(ValueError, match="was built with other options: image_size None, now 4; .*seed 0, now 1"):
        build_records(release_tree, records, image_size=4, seed=1)
    assert content(records) == before


def test_a_finished_folder_that_lacks_a_shard_is_not_taken_for_whole(release_tree, records):
    shard = next(records.glob("train/*.tfrecord"))
    data = shard.read_bytes()
    for change in (shard.unlink, lambda: shard.write_bytes(data[:-1])):
        change()
        with pytest.raises(ValueError, match=f"{shard.name} is missing or was changed .* --repair"):
            build_records(release_tree, records)
    shard.write_bytes(data)
    build_records(release_tree, records)


@pytest.mark.parametrize("workers", ["0", "-2", "many"])
def test_a_number_of_workers_that_is_none_is_refused(release_tree, tmp_path, workers, capsys):
    with pytest.raises(SystemExit):
        main([str(release_tree), str(tmp_path / "records"), "--workers", workers])
    assert "--workers" in capsys.readouterr().err


def test_a_changed_source_is_noticed(release, edit_table, tmp_path):
    build_records(release, tmp_path / "records")
    edit_table(release, lambda table: table.assign(sirna=table["sirna"].replace("s20", "s99")))
    with pytest.raises(ValueError, match="table .*the source's tables or files are not what they were then"):
        build_records(release, tmp_path / "records")


def test_a_foreign_folder_is_refused_before_anything_is_written(release_tree, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is in use: it holds notes.txt"):
        build_records(release_tree, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_row_order_does_not_matter(release, edit_table, records_tree, tmp_path):
    edit_table(release, lambda table: table.sample(frac=1, random_state=0))
    build_records(release, tmp_path / "records")
    shuffled, straight = content(tmp_path / "records"), content(records_tree)
    for name, data in straight.items():
        if name.name != "manifest.json":
            assert shuffled[name] == data


def test_an_executor_writes_the_same(release_tree, records_tree, tmp_path):
    with ThreadPoolExecutor(3) as executor:
        build_records(release_tree, tmp_path / "records", workers=executor)
    assert content(tmp_path / "records") == content(records_tree)


def test_a_spoiled_image_stops_the_build_and_the_folder_is_not_taken_for_whole(release, records_tree, tmp_path):
    path = release / "images/RPE-01/Plate1/B03_s2_w5.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    dest = tmp_path / "records"
    with pytest.raises(ValueError, match=r"RPE-01/Plate1/B03_s2_w5.png: expected a whole PNG file; found .*truncated"):
        build_records(release, dest)
    with pytest.raises(ValueError, match="holds no finished records: the build was broken off"):
        read_manifest(dest)
    path.write_bytes(whole)
    build_records(release, dest)
    wanted, found = content(records_tree), content(dest)
    assert {name: data for name, data in found.items() if name.name != "manifest.json"} == {
        name: data for name, data in wanted.items() if name.name != "manifest.json"
    }


def test_an_image_of_another_size_stops_the_build(release, tmp_path):
    Image.new("L", (9, 8)).save(release / "images/RPE-01/Plate1/B03_s2_w5.png")
    first = "images/HUVEC-01/Plate1/B02_s1_w1.png"
    with pytest.raises(ValueError, match=rf"B03_s2_w5.png: expected 8 x 8 pixels .* as in {first}; found 8 x 9"):
        build_records(release, tmp_path / "records")


@pytest.mark.parametrize("workers", [1, 2])
def test_all_spoiled_images_are_named_at_once_and_the_rest_is_built(release, tmp_path, workers):
    spoiled = {"RPE-01/Plate1/B03_s1_w5.png", "RPE-01/Plate1/B04_s1_w2.png", "HUVEC-18/Plate1/C03_s2_w1.png"}
    for name in spoiled:
        (release / "images" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="3 files are not as expected:") as caught:
        build_records(release, tmp_path / "records", workers=workers)
    assert all(str(caught.value).count(f"{name}: expected a whole PNG file") == 1 for name in spoiled)
    assert len([*(tmp_path / "records").glob("*/*.tfrecord")]) == len(prepare_build(release).shards) - 2


def test_a_screen_that_is_wrong_altogether_is_not_read_to_its_end(release, tmp_path):
    for path in (release / "images").rglob("*.png"):
        path.write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(release / "images/HUVEC-01/Plate1/B02_s1_w1.png")
    with pytest.raises(ValueError, match="30 files are not as expected or more; the rest was not looked at:"):
        build_records(release, tmp_path / "records")


def test_an_image_changed_since_is_pointed_out_after_the_build_and_written_anew_before_its_end(
    release, records_tree, tmp_path, capsys
):
    dest, path = tmp_path / "records", release / "images/RPE-01/Plate1/B03_s1_w5.png"
    build_records(release, dest)
    capsys.readouterr()
    digests = prepare_build(release).digests(release)
    build_records(release, dest)
    assert "WARNING" not in capsys.readouterr().out
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(path)
    os.utime(path, (time.time() - 1000,) * 2)  # as a copy has the time of its original
    build_records(release, dest)
    assert (
        "WARNING: 1 of the image files are newer than these records, such as images/RPE-01" in capsys.readouterr().out
    )
    assert content(dest) == content(records_tree) | {Path("manifest.json"): (dest / "manifest.json").read_bytes()}
    build_records(Path(shutil.copytree(release, tmp_path / "copy")), dest)
    assert f"WARNING: they were built from {release}, and not from {tmp_path / 'copy'}" in capsys.readouterr().out
    mark = [read_manifest(dest)["options"], digests]
    (dest / "unfinished.json").write_text(json.dumps(mark) + "\n")  # as before its last rename
    (dest / "manifest.json").unlink()
    times = {name: (dest / name).stat().st_mtime_ns for name in content(dest)}
    build_records(release, dest)
    anew = [
        str(name) for name in times if name.suffix == ".tfrecord" and (dest / name).stat().st_mtime_ns != times[name]
    ]
    assert len(anew) == 1 and "RPE-01" in anew[0]
    build_records(release, tmp_path / "unbroken")
    assert content(dest) == content(tmp_path / "unbroken")


def test_a_build_begun_with_another_source_is_done_again(release, tmp_path):
    """The other has the same tables, and other pixels in files of the same size and time."""
    other = Path(shutil.copytree(release, tmp_path / "other"))
    for path in (other / "images").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)
        os.utime(path, ns=((release / path.relative_to(other)).stat().st_mtime_ns,) * 2)
    last = other / "images/RPE-01/Plate1/C03_s2_w6.png"
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="C03_s2_w6.png: expected a whole PNG file"):
        build_records(other, tmp_path / "records")
    assert len([*(tmp_path / "records").glob("*/*.tfrecord")]) == 11
    build_records(release, tmp_path / "records")
    build_records(release, tmp_path / "unbroken")
    assert content(tmp_path / "records") == content(tmp_path / "unbroken")


def test_images_changed_while_they_are_read_are_an_error_and_what_they_are_in_is_made_anew(release, tmp_path):
    path = release / "images/HUVEC-01/Plate1/B02_s1_w1.png"

    class Changes(Executor):
        """Behind the last shard changes an image of the first."""

        def submit(self, function, task):
            future = Future()
            future.set_result(function(task))
            if task.name.startswith("val/HUVEC-17_treatment"):
                Image.fromarray(np.full((8, 8), 77, np.uint8)).save(path)
            return future

    with pytest.raises(ValueError, match="were changed while they were read.* Repeat the command"):
        build_records(release, tmp_path / "records", workers=Changes())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*/*.tfrecord")}
    build_records(release, tmp_path / "records")
    assert [path.name for path, before in times.items() if path.stat().st_mtime_ns != before] == [
        "HUVEC-01_control_00000-of-00001.tfrecord"
    ]
    build_records(release, tmp_path / "unbroken")
    assert content(tmp_path / "records") == content(tmp_path / "unbroken")


def test_files_that_cannot_be_opened_are_named_with_the_others(release, tmp_path):
    for name, spoil in (
        ("B03_s1_w1", lambda path: path.write_bytes(b"")),
        ("B04_s1_w1", lambda path: path.mkdir()),
    ):
        path = release / f"images/RPE-01/Plate1/{name}.png"
        path.unlink()
        spoil(path)
    first = release / "images/HUVEC-01/Plate1/B02_s1_w1.png"  # of which the size is taken
    first.unlink()
    first.mkdir()
    with pytest.raises(ValueError, match="3 files are not as expected") as caught:
        build_records(release, tmp_path / "records")
    for name in ("B04_s1_w1", "B02_s1_w1"):
        assert f"{name}.png: cannot be read (" in str(caught.value)


def test_a_link_that_leads_nowhere_is_a_missing_file(release, tmp_path, capsys):
    """As git-annex leaves what was not fetched."""
    path = release / "images/RPE-01/Plate1/B03_s2_w5.png"
    path.unlink()
    path.symlink_to("no")
    assert build_records(release, tmp_path / "records")["excluded"]["count"] == 1
    assert "missing channels w5: 1 (RPE-01_1_B03_2)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["index.csv", "excluded.csv"])
def test_a_finished_folder_with_a_damaged_table_is_not_taken_for_whole(release_tree, records, name):
    data = (records / name).read_bytes()
    (records / name).write_bytes(data[:-3])
    with pytest.raises(ValueError, match=f"{name} is missing or was changed .* tfrecords.verify .* --repair"):
        build_records(release_tree, records)
    (records / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing or was changed"):
        build_records(release_tree, records)


def test_shards_of_which_nothing_is_known_are_not_gone_on_with(release_tree, records):
    (records / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has lost its manifest.json"):
        build_records(release_tree, records)
    (records / "unfinished.json").touch()
    with pytest.raises(ValueError, match="holds shards, and unfinished.json does not say of which build"):
        build_records(release_tree, records)


def test_a_url_is_no_place_to_build_in(release_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="The output 's3://bucket/records' is a URL. Build from a folder of this"):
        build_records(release_tree, "s3://bucket/records")
    with pytest.raises(ValueError, match="The source 's3://bucket/rxrx1' is a URL"):
        build_records("s3://bucket/rxrx1", tmp_path / "records")
    assert not [*tmp_path.iterdir()]


def test_damaged_files_may_be_removed_and_the_build_goes_on_without_their_sites(release, tmp_path):
    dest, path = tmp_path / "records", release / "images/RPE-01/Plate1/B03_s1_w5.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="B03_s1_w5.png: expected a whole PNG file"):
        build_records(release, dest)
    times = {path: path.stat().st_mtime_ns for path in dest.glob("*/*.tfrecord")}
    assert len(times) == 11
    path.unlink()
    build_records(release, dest)
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    build_records(release, tmp_path / "unbroken")
    assert content(dest) == content(tmp_path / "unbroken")


def test_a_split_without_any_image_is_pointed_out(release, tmp_path, capsys):
    shutil.rmtree(release / "images/HUVEC-17")
    build_records(release, tmp_path / "records")
    assert "WARNING: no site of the split val is left: it is empty." in capsys.readouterr().out


def test_where_no_file_of_a_channel_is_there_one_of_that_channel_is_named(release, tmp_path):
    for path in release.rglob("*_w3.png"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"Expected files such as \S+_w3.png below .*. '\S+' has 40 other files, such as '\S+_w1.png'"
    ):
        build_records(release, tmp_path / "records")


def test_sites_without_all_channels_are_left_out_reported_and_listed(release, tmp_path, capsys):
    (release / "images/RPE-01/Plate1/B03_s2_w5.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 32 sites lack[\s\S]*missing channels w5: 1 \(RPE-01_1_B03_2\)[\s\S]*strict"
    ):
        build_records(release, tmp_path / "records", strict=True)
    assert not (tmp_path / "records").exists()
    manifest = build_records(release, tmp_path / "records")
    assert "missing channels w5: 1 (RPE-01_1_B03_2)" in capsys.readouterr().out
    excluded = pd.read_csv(tmp_path / "records/excluded.csv")
    assert excluded.values.tolist() == [["RPE-01_1_B03_2", "id_test", "missing channels w5"]]
    assert manifest["excluded"]["count"] == 1 and manifest["index"]["count"] == 31


def test_tables_without_images_build_nothing(release, tmp_path):
    shutil.rmtree(release / "images")
    with pytest.raises(ValueError, match="No site is complete: nothing to build. Expected files such as images/"):
        build_records(release, tmp_path / "records")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("size", [0, 9])
def test_an_image_size_that_cannot_be_is_refused(release_tree, tmp_path, size):
    with pytest.raises(ValueError, match=f"image size {size} is not between 1 and the 8 pixels on disk"):
        build_records(release_tree, tmp_path / "records", image_size=size)


def test_processes_write_the_same(release_tree, records_tree, tmp_path):
    build_records(release_tree, tmp_path / "records", workers=2)
    assert content(tmp_path / "records") == content(records_tree)


def test_a_killed_build_continues_where_it_stopped(release_tree, records_tree, tmp_path):
    dest = tmp_path / "records"
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os
import tfrecords.build as build
write, written = build.write_shard, []
def write_two(task):
    written.append(write(task))
    return written[-1] if len(written) < 2 else os._exit(9)
build.write_shard = write_two
build.build_records({str(release_tree)!r}, {str(dest)!r})
"""
    )
    assert subprocess.run([sys.executable, script], capture_output=True, timeout=600).returncode == 9
    assert "plan" in json.loads((dest / "unfinished.json").read_text())[0]
    times = {path: path.stat().st_mtime_ns for path in dest.rglob("*.tfrecord")}
    assert len(times) == 2
    build_records(release_tree, dest)
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert content(dest) == content(records_tree)
