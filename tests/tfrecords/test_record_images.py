import os

import numpy as np
import pytest
import tensorflow as tf

from tfrecords.build import build_records
from tfrecords.frames import frame, read_frames
from tfrecords.image_batches import image_batches
from tfrecords.listing import list_sites
from tfrecords.manifest import read_manifest
from tfrecords.read import read_records
from tfrecords.record_images import record_images

BOTH = ("treatment", "control")


def test_any_sites_are_read_in_any_order(records_tree, pixels_of):
    sites = list_sites(records_tree, "train", BOTH)
    source = record_images(records_tree, sites, read_manifest(records_tree))
    for rows in ([3], [7, 0, 7], list(range(8))):
        expected = np.stack([pixels_of(site_id) for site_id in sites["site_id"][rows]])
        data = image_batches(source, tf.constant(rows, tf.int64), 2)
        assert [len(images) for _, images in data] == [2] * (len(rows) // 2) + [1] * (len(rows) % 2)
        np.testing.assert_array_equal(np.concatenate([images for _, images in data]), expected)
        np.testing.assert_array_equal(np.concatenate([found for found, _ in data]), rows)
        assert data.element_spec[1].shape == (None if len(rows) % 2 else 2, 8, 8, 6)


@pytest.mark.parametrize("options", [{}, {"crop": 4}, {"channels": (1, 2, 3)}])
def test_png_records_have_the_pixels_of_raw_ones(release_tree, tmp_path, options):
    data = []
    for encoding in ("raw", "png"):
        build_records(release_tree, tmp_path / encoding, encoding=encoding, **options)
        read = dict(batch_size=3, kinds=BOTH, augment=None, normalize=lambda images: tf.cast(images, tf.float32))
        data.append(read_records(tmp_path / encoding, "train", training=True, **read))
    assert data[0].element_spec == data[1].element_spec
    for (raw, _), (png, _) in zip(*data, strict=True):
        np.testing.assert_array_equal(raw, png)


def test_a_png_that_cannot_be_decoded_is_named(release_tree, tmp_path):
    """Its record is whole: the file was like that when it was built."""
    build_records(release_tree, tmp_path, encoding="png")
    site = list_sites(tmp_path, "train").iloc[0]
    path = tmp_path / site["shard"]
    records = [record for record, _ in read_frames(path)]
    example = tf.train.Example.FromString(records[0])
    image = example.features.feature["image"].bytes_list.value
    image[2] = image[2][:40] + bytes(len(image[2]) - 40)
    records[0] = example.SerializeToString()
    path.write_bytes(b"".join(part for record in records for part in (frame(record)[0], record, frame(record)[1])))
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{site['shard']}, record 0: damaged"):
        list(read_records(tmp_path, "train", batch_size=2))


def damage(records, shard, change):
    path = records / shard
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(place):
    def change(data):
        data[place] ^= 4

    return change


def test_a_flipped_bit_stops_the_reading_and_its_record_is_named(records):
    """Anywhere: length, its checksum, keys, image, last checksum. RECORD_FLIPS=200 for as many."""
    sites = list_sites(records, "train", BOTH)
    data = [read_records(records, "train", batch_size=2, kinds=BOTH, training=training) for training in (True, False)]
    rng = np.random.default_rng(0)
    for i in range(int(os.environ.get("RECORD_FLIPS", 24))):
        rows = sites[sites["shard"] == rng.choice(sites["shard"].unique())]
        path = records / rows["shard"].iloc[0]
        sound = path.read_bytes()
        place = int(rng.integers(len(sound))) if i >= 16 else i
        damage(records, path, flip(place))
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            list(data[i % 2])
        number = rows["record"][rows["offset"] <= place].max()
        site_id = rows["site_id"].iloc[number]
        message = f"{path}, record {number}: damaged, missing or not of the site {site_id}. Nothing was skipped"
        assert message in str(caught.value), place
        assert f"python -m tfrecords.verify {records} --repair" in str(caught.value)
        path.write_bytes(sound)
    assert [sum(len(labels) for _, labels in each) for each in data] == [8, 8]


def test_only_the_damaged_record_is_affected(records):
    sites = list_sites(records, "train")
    damage(records, sites["shard"][2], flip(3))  # A length, by which a reader of the whole file would be lost.
    source = record_images(records, sites, read_manifest(records))
    assert len(list(image_batches(source, tf.constant([0, 1, 3], tf.int64), 3))) == 1
    rows = tf.constant([0, 1, 2, 3, 0, 1], tf.int64)
    for size in (1, 2, 3, 4, 5, 6, 7):
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=f"record {sites['record'][2]}: damaged.*{sites['site_id'][2]}"
        ):
            list(image_batches(source, rows, size))


def test_a_sound_record_of_another_site_is_not_taken(records):
    sites = list_sites(records, "train")
    first, second = (sites[sites["shard"] == sites["shard"][2]]["offset"]).tolist()

    def swap(data):
        data[:] = data[second:] + data[first:second]

    damage(records, sites["shard"][2], swap)
    with pytest.raises(tf.errors.InvalidArgumentError, match="record 0: damaged, missing or not of the site RPE-01"):
        list(read_records(records, "train", batch_size=4))


def test_a_shard_that_vanishes_is_named(records):
    data = read_records(records, "train", batch_size=4)
    (records / list_sites(records, "train")["shard"][2]).unlink()
    with pytest.raises(tf.errors.InvalidArgumentError, match="RPE-01_treatment.*record 0: damaged, missing"):
        list(data)


def test_fit_stops_with_the_name_of_the_record_on_this_backend(records):
    import keras

    sites = list_sites(records, "train", BOTH)
    place = sites.iloc[5]
    damage(records, place["shard"], flip(place["offset"] + 300))
    inputs = keras.Input((8, 8, 6))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = read_records(records, "train", batch_size=2, kinds=BOTH, training=True)
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        model.fit(data, epochs=2, verbose=0)
    assert f"{place['shard']}, record {place['record']}: damaged" in str(caught.value)
    with pytest.raises(tf.errors.InvalidArgumentError, match="--repair"):
        model.evaluate(read_records(records, "train", batch_size=2, kinds=BOTH), verbose=0)
