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
    next(iter(data))  # A look that is broken off is not counted.
    epochs = [labels(data) for _ in range(3)]
    assert len(set(map(str, epochs))) == 3
    assert all(sorted(sum(epoch, ())) == list(range(12)) for epoch in epochs)
    tf.random.set_seed(5)
    assert labels(read_published(shuffled, "train", seed=3, first_epoch=2, **options)) == epochs[2]
    assert labels(read_published(shuffled, "train", seed=4, **options)) != epochs[0]


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
    for place in (0, 1, 15, end // 3, end // 2, end - 30, end - 1):
        damaged = bytearray(sound)
        damaged[place] ^= 64
        path.write_bytes(damaged)
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
