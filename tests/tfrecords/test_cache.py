import gc
import threading

import numpy as np
import pytest
import tensorflow as tf

from tfrecords import cache as cache_module
from tfrecords.listing import list_sites
from tfrecords.locks import lock_file
from tfrecords.manifest import read_manifest, seal
from tfrecords.read import read_records

BOTH = ("treatment", "control")


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_cached_pixels_are_the_same_and_the_records_are_read_no_more(records, tmp_path, where):
    cache = where if where == "memory" else tmp_path / "cache"
    options = dict(batch_size=3, kinds=BOTH, training=True, seed=3)
    plain = read_records(records, "train", **options)
    cached = read_records(records, "train", cache=cache, **options)
    expected = [[image.numpy() for image, _ in plain] for _ in range(2)]
    for path in records.glob("*/*.tfrecord"):
        path.unlink()
    for epoch in expected:
        for (images, _), before in zip(cached, epoch, strict=True):
            np.testing.assert_array_equal(images, before)
    assert cached.element_spec[0].shape == (3, 8, 8, 6)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("inside", "lies in the folder of records"),
        ("../table.csv", "table.csv' is a file. Name a folder"),
        (3, "cache is 'memory'"),
    ],
)
def test_a_place_for_the_cache_that_is_none_is_refused(records, cache, message):
    (records.parent / "table.csv").touch()
    with pytest.raises(ValueError, match=message):
        read_records(records, "train", batch_size=3, cache=records / cache if isinstance(cache, str) else cache)
    assert not (records / "inside").exists()


def test_a_disk_that_is_too_small_is_said_before_it_is_filled(records, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: (9000, 8000, 1000))
    with pytest.raises(OSError, match=r"The cache .*here needs 0.0 GB for 4 images, and has 0.0 GB free. Make space"):
        read_records(records, "train", batch_size=3, cache=tmp_path / "here")
    assert not [*(tmp_path / "here").glob("*.tfrecord")]


def test_pipelines_share_the_memory_for_as_long_as_one_of_them_exists(records, monkeypatch):
    from tfrecords import cache

    reads = []
    monkeypatch.setattr(cache, "_all", lambda *args, whole=cache._all: reads.append(1) or whole(*args))
    options = dict(batch_size=2, cache="memory")
    first = read_records(records, "train", **options)
    second = read_records(records, "train", training=True, seed=5, **options)
    assert len(reads) == 1
    read_records(records, "val", **options)
    assert len(reads) == 2
    del first
    gc.collect()
    assert len(list(second)) == 2 and len(cache._held) == 1
    del second
    gc.collect()
    assert not cache._held
    read_records(records, "train", **options)
    assert len(reads) == 3


def test_a_cache_is_found_again_and_not_taken_for_another(records_tree, records, tmp_path):
    cache = tmp_path / "cache"
    options = dict(batch_size=2, cache=cache)
    read_records(records_tree, "train", **options)
    (first,) = cache.glob("*.tfrecord")
    before = first.stat().st_mtime_ns
    read_records(records, "train", **options)  # The same manifest.
    assert first.stat().st_mtime_ns == before and len(list(cache.glob("*.tfrecord"))) == 1
    read_records(records_tree, "train", kinds=BOTH, **options)
    read_records(records_tree, "val", **options)
    manifest = read_manifest(records)
    (records / "manifest.json").write_bytes(seal(manifest | {"source": "elsewhere"}))
    read_records(records, "train", **options)
    assert len(list(cache.glob("*.tfrecord"))) == 4


def test_processes_fill_a_cache_once_and_what_killed_ones_left_is_removed(records_tree, tmp_path, monkeypatch):
    fills, fill = [], cache_module._fill
    monkeypatch.setattr(cache_module, "_fill", lambda path, *rest: fills.append(path) or fill(path, *rest))
    read_records(records_tree, "train", batch_size=2, cache=tmp_path / "first")
    (path,) = (tmp_path / "first").glob("*.tfrecord")
    data = path.read_bytes()
    path.unlink()
    left = path.with_name(f".{path.name}.0a1b2c3d.tmp")
    left.write_bytes(b"half")
    held = lock_file(path.with_suffix(".lock"))
    waiting = threading.Thread(
        target=read_records, args=(records_tree, "train"), kwargs=dict(batch_size=2, cache=path.parent)
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and len(fills) == 1  # another process is filling it
    path.write_bytes(data)
    held.close()
    waiting.join(30)
    assert not waiting.is_alive() and len(fills) == 1 and left.exists()
    path.unlink()
    read_records(records_tree, "train", batch_size=2, cache=path.parent)
    assert path.read_bytes() == data and len(fills) == 2 and not left.exists()


def test_a_cut_cache_is_made_anew_and_a_damaged_image_stops_the_reading(records_tree, tmp_path):
    expected = [images.numpy() for images, _ in read_records(records_tree, "train", batch_size=2)]
    read_records(records_tree, "train", batch_size=2, cache=tmp_path)
    (path,) = tmp_path.glob("*.tfrecord")
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    again = read_records(records_tree, "train", batch_size=2, cache=tmp_path)
    assert path.read_bytes() == data
    np.testing.assert_array_equal([images.numpy() for images, _ in again], expected)
    spoiled = bytearray(data)
    spoiled[len(data) * 5 // 8] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{path.name}, record 2: damaged. Remove this file"):
        list(read_records(records_tree, "train", batch_size=2, cache=tmp_path))


def test_a_damaged_record_is_named_while_the_cache_is_filled(records, tmp_path):
    path = records / list_sites(records, "train")["shard"][2]
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    gc.collect()  # No other pipeline holds these pixels.
    for cache in ("memory", tmp_path):
        with pytest.raises(tf.errors.InvalidArgumentError, match="RPE-01_treatment.*record 0: damaged"):
            read_records(records, "train", batch_size=2, cache=cache)
    assert not list(tmp_path.glob("*.tfrecord")) and not list(tmp_path.glob(".*tmp"))
