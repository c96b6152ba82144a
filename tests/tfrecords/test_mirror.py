"""Remote records in TensorFlow's in-memory file system `ram://`, which stands for any other."""

import json
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tfrecords import mirror
from tfrecords.build import build_records
from tfrecords.contact_sheet import write_contact_sheet
from tfrecords.listing import list_sites
from tfrecords.manifest import class_names, read_manifest, seal
from tfrecords.mirror import local_folder
from tfrecords.normalize import channel_statistics
from tfrecords.order import site_ids_of_step
from tfrecords.read import read_records
from tfrecords.remote import Transport, find_transport
from tfrecords.shares import batches_from_shares
from tfrecords.verify import verify_records

BOTH = ("treatment", "control")


def upload(folder, url):
    if tf.io.gfile.exists(url):
        tf.io.gfile.rmtree(url)  # Writing over a file of `ram://` leaves the end of a longer one.
    for path in folder.rglob("*.*"):
        tf.io.gfile.makedirs(f"{url}/{path.parent.relative_to(folder)}")
        with tf.io.gfile.GFile(f"{url}/{path.relative_to(folder)}", "wb") as file:
            file.write(path.read_bytes())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TFRECORDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "_in_use", {})
    return tmp_path / "cache"


@pytest.fixture
def url(records_tree, cache):
    url = f"ram://{uuid.uuid4()}/records"
    upload(records_tree, url)
    return url


@pytest.fixture
def copies(monkeypatch):
    """Names of the shards fetched; `copies.hook`, if set, is called in place of each copy."""

    class Copies(list):
        hook = None

    copies = Copies()

    def find(url):
        transport = find_transport(url)

        def copy(url, path):
            copies.append(url.rsplit("/", 1)[-1])
            (copies.hook or transport.copy)(url, path)

        return Transport(transport.read, copy)

    monkeypatch.setattr(mirror, "find_transport", find)
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: None)
    return copies


def shards(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tfrecord"))


def test_a_local_folder_is_used_as_it_is(records_tree):
    assert local_folder(str(records_tree), ("train",), BOTH) == records_tree


def test_a_url_is_read_like_a_folder_and_only_what_is_wanted_is_fetched(url, records_tree, copies):
    assert read_manifest(url) == read_manifest(records_tree) and class_names(url) == class_names(records_tree)
    pd.testing.assert_frame_equal(list_sites(url, "val"), list_sites(records_tree, "val"))
    assert copies == []
    remote, local = (read_records(dest, "val", batch_size=2, metadata=True) for dest in (url, records_tree))
    for ours, theirs in zip(remote, local, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, ours, theirs)
    val = [row["name"] for row in read_manifest(url)["shards"] if row["split"] == "val" and row["kind"] == "treatment"]
    assert shards(local_folder(url)) == sorted(val) and len(copies) == len(val)
    options = dict(batch_size=2, epoch=0, step=1)
    assert site_ids_of_step(url, "train", **options) == site_ids_of_step(records_tree, "train", **options)
    assert verify_records(url) == [] and len(copies) == len(read_manifest(url)["shards"])
    next(iter(read_records(url, "train", batch_size=2)))
    assert len(copies) == len(read_manifest(url)["shards"])


def test_what_was_built_anew_under_the_same_url_is_fetched_anew(url, release_tree, tmp_path):
    before = local_folder(url, ("val",), BOTH)
    build_records(release_tree, tmp_path / "other", seed=1)
    upload(tmp_path / "other", url)
    after = local_folder(url, ("val",), BOTH)
    assert before != after and shards(before) == shards(after)
    assert all((after / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in shards(after))


def test_a_broken_off_download_leaves_nothing_half_written_and_the_next_one_goes_on(url, copies):
    def half(url, path):
        Path(path).write_bytes(b"half")
        raise OSError("connection reset")

    local_folder(url, ("val",), BOTH)
    whole = shards(local_folder(url))
    copies.hook = half
    with pytest.raises(OSError, match="connection reset"):
        local_folder(url, ("test",), BOTH)
    folder = local_folder(url)
    assert shards(folder) == whole and not list(folder.rglob("*.tmp"))
    copies.hook = None
    copies.clear()
    local_folder(url, ("val", "test"), BOTH)
    assert len(copies) == len(shards(folder)) - len(whole) > 0


def test_a_damaged_copy_is_named_with_the_way_to_mend_it(url):
    folder = local_folder(url, ("val",), BOTH)
    (path,) = (folder / name for name in shards(folder) if "treatment" in str(name))
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"This is a copy of remote records: remove {folder}, so"):
        for _ in read_records(url, "val", batch_size=2):
            pass
    shutil.rmtree(folder)
    assert sum(len(labels) for _, labels in read_records(url, "val", batch_size=2)) == 4


def test_a_connection_that_fails_twice_is_tried_a_third_time(url, copies):
    failures = []

    def flaky(url, path):
        failures.append(url)
        if len(failures) < 3:
            raise OSError("connection reset")
        find_transport(url).copy(url, path)

    copies.hook = flaky
    assert len(shards(local_folder(url, ("val",), ("treatment",)))) == 1 and len(failures) == 3


def test_a_file_that_is_not_the_manifests_is_refused(url, records_tree, copies):
    name = next(row["name"] for row in read_manifest(url)["shards"] if row["split"] == "val")
    data = bytearray((records_tree / name).read_bytes())
    data[100] ^= 1
    with tf.io.gfile.GFile(f"{url}/{name}", "wb") as file:
        file.write(bytes(data))
    with pytest.raises(ValueError, match=rf"{name} came with \d+ bytes .* another checksum than the manifest's"):
        local_folder(url, ("val",), BOTH)
    assert name not in shards(local_folder(url))
    tf.io.gfile.remove(f"{url}/{name}")
    with pytest.raises(ValueError, match=f"{name} is missing, though the manifest names it"):
        local_folder(url, ("val",), BOTH)
    tf.io.gfile.copy(f"{url}/manifest.json", f"{url}/index.csv", overwrite=True)
    shutil.rmtree(local_folder(url))
    with pytest.raises(ValueError, match="index.csv is not the file that the manifest names"):
        local_folder(url)
    tf.io.gfile.remove(f"{url}/manifest.json")
    with pytest.raises(ValueError, match="holds no finished records: there is no manifest.json"):
        read_manifest(url)


def test_a_manifest_cannot_name_files_outside_its_folder(url, records_tree, cache):
    text = (records_tree / "manifest.json").read_text()
    name = next(row["name"] for row in read_manifest(url)["shards"] if row["split"] == "val")
    for bad in ("../../stolen.tfrecord", "/stolen.tfrecord"):
        tf.io.gfile.remove(f"{url}/manifest.json")
        with tf.io.gfile.GFile(f"{url}/manifest.json", "wb") as file:
            file.write(seal(json.loads(text.replace(name, bad))))
        with pytest.raises(ValueError, match=f"names the file '{bad}', outside its folder"):
            local_folder(url, ("val",), BOTH)
    assert not cache.exists()


def test_at_once_one_fetches_and_the_others_wait(url, copies):
    def slow(url, path):
        threading.Event().wait(0.3)  # `time.sleep` does nothing here
        find_transport(url).copy(url, path)

    copies.hook = slow
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: local_folder(url, ("val", "test"), BOTH), range(4)))
    assert len(folders) == 1 and sorted(copies) == sorted(Path(name).name for name in shards(folders.pop()))


def test_the_cache_is_bounded_and_gives_up_what_nobody_uses(url, records_tree, cache, monkeypatch):
    first = local_folder(url, ("train",), BOTH)
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    monkeypatch.setenv("TFRECORDS_CACHE_GB", str(1.2 * size / 1e9))
    other = f"ram://{uuid.uuid4()}/other"
    upload(records_tree, other)
    with pytest.raises(ValueError, match=r"GB of shards do not fit into .*within TFRECORDS_CACHE_GB=.*read fewer"):
        local_folder(other, ("train",), BOTH)
    assert shards(first)
    for file in list(mirror._in_use.values()):  # As at the end of the process that used it.
        file.close()
    mirror._in_use.clear()
    assert shards(local_folder(other, ("train",), BOTH)) and not first.exists()


def test_only_what_is_shown_or_measured_or_of_ones_share_is_fetched(url, copies, tmp_path):
    write_contact_sheet(url, tmp_path / "sheet.png", columns=1)
    assert len(copies) == 2  # a site of each of two cell types
    copies.clear()
    channel_statistics(url, "test", group="plate", well_types=("negative_control",))
    assert copies == ["HUVEC-18_control_00000-of-00001.tfrecord"]
    copies.clear()
    shutil.rmtree(local_folder(url))
    read_records(url, "train", batch_size=2, kinds=BOTH, batches=batches_from_shares(2), worker=(1, 2))
    assert sorted(copies) == [f"RPE-01_{kind}_00000-of-00001.tfrecord" for kind in ("control", "treatment")]


def test_a_limit_that_is_no_number_is_named(url, monkeypatch):
    monkeypatch.setenv("TFRECORDS_CACHE_GB", "much")
    with pytest.raises(ValueError, match="TFRECORDS_CACHE_GB='much' is no number. Expected gigabytes"):
        local_folder(url, ("val",), BOTH)
