import errno
import hashlib
import os
import stat

import numpy as np
import pytest
import tensorflow as tf

from tfrecords.sources import read_sites
from tfrecords.whole import write_whole
from tfrecords.write import Task, encode_site, scan_shard, write_shard


@pytest.fixture
def task(release, tmp_path):
    sites = read_sites(release).head(3).astype({"sirna_id": object}).to_dict("records")
    sites[2]["sirna_id"] = None
    return Task(str(release), str(tmp_path), "train/a.tfrecord", sites, (1, 2, 3, 4, 5, 6), (8, 8), None, None)


def test_what_is_written_is_read_back_equal(task, tmp_path, pixels_of):
    write_shard(task)
    records = list(tf.data.TFRecordDataset(str(tmp_path / task.name)).as_numpy_iterator())
    assert len(records) == 3
    for record, site in zip(records, task.sites, strict=True):
        feature = tf.train.Example.FromString(record).features.feature
        image = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8).reshape(8, 8, 6)
        np.testing.assert_array_equal(image, pixels_of(site["site_id"]))
        for key in ("well", "well_type", "experiment", "cell_type", "site_id"):
            assert feature[key].bytes_list.value[0].decode() == site[key]
        for key in ("plate", "site"):
            assert feature[key].int64_list.value[0] == site[key]
        assert ("sirna" in feature) == (site["sirna_id"] is not None)


def test_a_record_has_the_keys_of_recursion_and_site_id(task):
    example = tf.train.Example.FromString(encode_site(task.sites[0], [bytes(8 * 8 * 6)]))
    keys = {"image", "well", "well_type", "experiment", "cell_type", "plate", "site", "sirna"}
    assert set(example.features.feature) == keys | {"site_id"}


def test_a_shard_is_described_by_bytes_checksum_and_count(task, tmp_path):
    written = write_shard(task)
    data = (tmp_path / task.name).read_bytes()
    assert (written.bytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (written.name, written.count) == (task.name, 3)
    records = list(tf.data.TFRecordDataset(str(tmp_path / task.name)).as_numpy_iterator())
    assert [data[offset + 12 :][: len(record)] for offset, record in zip(written.offsets, records, strict=True)] == (
        records
    )


def test_writing_twice_gives_equal_bytes(task, tmp_path):
    first = write_shard(task)
    assert write_shard(task._replace(name="train/b.tfrecord")).sha256 == first.sha256


def test_a_shard_that_is_whole_is_kept_and_one_that_is_not_is_replaced(task, tmp_path):
    first = write_shard(task)
    path = tmp_path / task.name
    before = path.stat().st_mtime_ns
    assert write_shard(task) == first and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-1])
    assert scan_shard(path, task.name) is None
    assert write_shard(task) == first


def test_a_bad_image_leaves_no_file(task, release, tmp_path):
    path = release / task.sites[1]["path"].replace("{channel}", "4")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="_w4.png: expected a whole PNG"):
        write_shard(task)
    assert list((tmp_path / "train").iterdir()) == []


def test_a_file_system_that_syncs_no_folders_is_one_to_write_to(tmp_path, monkeypatch):
    def fails(number):
        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr("os.fsync", fails(errno.EINVAL))
    write_whole(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    monkeypatch.setattr("os.fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "file", b"data")
