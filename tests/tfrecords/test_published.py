import shutil
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfrecords.preprocess import standardize
from tfrecords.published import published_files, read_published

SHAPE = (4, 4, 6)
EXPERIMENTS = ("HUVEC-16", "HUVEC-17", "HUVEC-18", "RPE-07")


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, SHAPE, dtype=np.uint8)


def write(path, places, sirna=True):
    """Exactly the keys of rxrx1-utils; `sirna` is left out where it is unknown."""

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), "GZIP") as writer:
        for number, experiment, plate, site in places:
            values = dict(image=pixels(number).tobytes(), well=b"B%02d" % (number % 20 + 3), well_type=b"treatment")
            values |= dict(experiment=experiment.encode(), cell_type=experiment.split("-")[0].encode())
            values |= dict(plate=plate, site=site) | (dict(sirna=number) if sirna else {})
            features = tf.train.Features(feature={key: feature(value) for key, value in values.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for i in range(3):
        write(folder / f"random-42/train/{i:03d}.tfrecord", [(i * 4 + k, "RPE-01", 1, 1 + k % 2) for k in range(4)])
    write(folder / "random-42/test/000.tfrecord", [(50 + k, "RPE-08", 2, 1) for k in range(3)], sirna=False)
    return folder


@pytest.fixture(scope="module")
def by_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "by_exp_plate_site-42"
    for i, experiment in enumerate(EXPERIMENTS):
        for site in (1, 2):
            write(folder / f"{experiment}_p1_s{site}.tfrecord", [(i * 10 + site, experiment, 1, site)])
    return folder


def test_published_records_are_read_in_their_order(shuffled):
    data = read_published(shuffled, "train", batch_size=5, image_shape=SHAPE, count=12, metadata=True)
    assert data.cardinality() == 3
    labels = []
    for images, batch_labels, metadata in data:
        expected = standardize(np.stack([pixels(number) for number in batch_labels.numpy()]))
        np.testing.assert_allclose(images, expected, atol=1e-5)
        for number, site_id in zip(batch_labels.numpy(), metadata["site_id"].numpy(), strict=True):
            assert site_id.decode() == f"RPE-01_1_B{number % 20 + 3:02d}_{1 + number % 4 % 2}"
        labels += batch_labels.numpy().tolist()
    assert labels == list(range(12))
    assert metadata["well_id"].numpy()[-1] == b"RPE-01_1_B14"


@pytest.mark.parametrize("count", [None, 12])
def test_the_order_of_training_is_a_function_of_seed_and_epoch(shuffled, count):
    def labels(data):
        return [tuple(labels.numpy()) for _, labels in data]

    options = dict(batch_size=4, image_shape=SHAPE, training=True, count=count)
    data = read_published(shuffled, "train", seed=3, **options)
    assert data.element_spec[0].shape == (4, *SHAPE)
    assert data.options().experimental_optimization.map_parallelization is False
    look = iter(data.map(lambda _, labels: labels))
    next(look)  # A look that is broken off is not counted.
    time.sleep(1)  # What is fetched ahead, is fetched by now.
    del look
    epochs = [labels(data) for _ in range(3)]
    assert len(set(map(str, epochs))) == 3
    assert all(sorted(sum(epoch, ())) == list(range(12)) for epoch in epochs)
    tf.random.set_seed(5)
    assert labels(read_published(shuffled, "train", seed=3, first_epoch=2, **options)) == epochs[2]
    assert labels(read_published(shuffled, "train", seed=4, **options)) != epochs[0]
    data = iter(read_published(shuffled, "train", seed=3, **options).repeat())  # nobody asks behind the last batch
    again = [tuple(next(data)[1].numpy()) for _ in range(9)]
    assert [again[:3], again[3:6], again[6:]] == epochs


@pytest.mark.any_backend
def test_each_epoch_of_fit_has_its_own_order(shuffled):
    """With a known length Keras asks for that many batches and for none behind them."""
    seen = []

    def loss(labels, outputs):
        seen.append([int(label) for label in labels])
        return keras.ops.mean(outputs)

    model = keras.Sequential([keras.Input(SHAPE), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(12)])
    model.compile("sgd", loss, run_eagerly=True)
    options = dict(batch_size=4, image_shape=SHAPE, training=True)
    model.fit(read_published(shuffled, "train", count=12, **options), epochs=3, verbose=0)
    data = read_published(shuffled, "train", **options)
    assert seen == [labels.numpy().tolist() for _ in range(3) for _, labels in data]


@pytest.mark.parametrize("count, batch_size", [(10, 5), (8, 4), (13, 5), (16, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_count_stops_the_reading(shuffled, count, batch_size, training):
    options = dict(batch_size=batch_size, image_shape=SHAPE, training=training, count=count)
    batches = iter(read_published(shuffled, "train", **options))
    steps = count // batch_size if training else -(-count // batch_size)
    with pytest.raises(tf.errors.FailedPreconditionError, match=f"{count} element"):
        for _ in range(steps):  # as Keras does
            next(batches)


def test_images_of_another_size_are_refused(shuffled):
    for shape in ((4, 4, 3), (2, 4, 6), (8, 4, 6)):
        data = read_published(shuffled, "train", batch_size=4, image_shape=shape)
        size = np.prod(shape)
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"images of {size} bytes. Found .*has *.*96"):
            next(iter(data))


def test_fewer_records_than_a_batch_are_said(shuffled):
    options = dict(batch_size=13, image_shape=SHAPE, training=True)
    with pytest.raises(ValueError, match="fewer records than a batch of 13"):
        read_published(shuffled, "train", count=12, **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match="split train has fewer records than a batch of 13"):
        list(read_published(shuffled, "train", **options))


def test_options_are_those_of_other_records(shuffled, by_place, tmp_path):
    (images, _), *_ = read_published(shuffled, "train", batch_size=2, image_shape=SHAPE, normalize=None)
    np.testing.assert_array_equal(images, np.stack([pixels(0), pixels(1)]))
    for bad in ({"dtype": "uint8"}, {"seed": -1}, {"batch_size": 0}, {"normalize": 3}):
        (name,) = bad
        with pytest.raises(ValueError, match=name):
            read_published(shuffled, "train", **{"batch_size": 2, **bad})
    with pytest.raises(ValueError, match="gs://bucket/tfrecords is a URL: published records are read from a folder"):
        read_published("gs://bucket/tfrecords", "train", batch_size=2)
    shutil.copytree(shuffled / "random-42", tmp_path / "random-42")
    shutil.copytree(by_place, tmp_path / "by_exp_plate_site-42")
    with pytest.raises(ValueError, match="holds both layouts, whose splits differ. Name one: .*random-42 or .*by_exp"):
        read_published(tmp_path, "train", batch_size=2)


def test_test_sites_have_no_label(shuffled):
    data = read_published(shuffled / "random-42", "test", batch_size=2, image_shape=SHAPE, metadata=True)
    assert [labels.numpy().tolist() for _, labels, _ in data] == [[-1, -1], [-1]]
    with pytest.raises(tf.errors.InvalidArgumentError, match="has no siRNA.* pass metadata=True"):
        list(read_published(shuffled, "test", batch_size=2, image_shape=SHAPE))


def test_files_of_one_experiment_and_site_make_the_splits_of_wilds(by_place):
    names = {split: [path.stem for path in published_files(by_place, split)] for split in ("train", "id_test", "val")}
    assert names == {
        "train": ["HUVEC-16_p1_s1", "RPE-07_p1_s1"],
        "id_test": ["HUVEC-16_p1_s2", "RPE-07_p1_s2"],
        "val": ["HUVEC-17_p1_s1", "HUVEC-17_p1_s2"],
    }
    data = read_published(by_place.parent, "test", batch_size=2, image_shape=SHAPE, dtype="bfloat16")
    assert [labels.numpy().tolist() for _, labels in data] == [[21, 22]]
    assert data.element_spec[0].dtype == tf.bfloat16


def test_a_folder_without_them_says_what_was_expected(tmp_path, shuffled):
    with pytest.raises(ValueError, match="no published records of the split 'val'. Expected val/NNN.tfrecord"):
        read_published(shuffled, "val", batch_size=2)


def test_a_damaged_file_stops_the_reading_and_is_named(tmp_path):
    """Wherever it is, but in what does not matter: time and system in the header, the checksum over all records."""
    for i in range(3):
        write(tmp_path / f"train/{i:03d}.tfrecord", [(k, "RPE-01", 1, 1) for k in range(40)])
    path = tmp_path / "train/001.tfrecord"
    sound = path.read_bytes()
    end = len(sound)
    for place in (0, 15, end // 2, end - 1):
        damaged = bytearray(sound)
        damaged[place] ^= 64
        path.write_bytes(damaged)
        if place < 2:
            with pytest.raises(ValueError, match=f"{path} is not compressed by GZIP"):
                read_published(tmp_path, "train", batch_size=1, image_shape=SHAPE)
            continue
        for training in (True, False):
            data = read_published(tmp_path, "train", batch_size=1, image_shape=SHAPE, training=training)
            with pytest.raises(tf.errors.InvalidArgumentError, match=f"{path}: the file is damaged"):
                pytest.fail(f"byte {place} of {end}: read {len(list(data))} batches")
    path.write_bytes(sound)
    data = read_published(tmp_path, "train", batch_size=1, image_shape=SHAPE)
    path.write_bytes(sound[: end // 2])
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{path}: the file is damaged"):
        list(data)
    path.unlink()
    with pytest.raises(tf.errors.NotFoundError, match=str(path)):
        list(data)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path} is no whole GZIP file: it has 0 bytes"):
        read_published(tmp_path, "train", batch_size=1, image_shape=SHAPE)
