import time

import numpy as np
import pytest
import tensorflow as tf

from tfrecords.augmentation import cutmix, gain_and_bias, mix_batches, random_resized_crop, turn_and_crop
from tfrecords.read import read_records

SEED = (3, 4)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)


def windows(image, smallest):
    """Every window that may be cut out, enlarged by a plain loop as OpenCV's INTER_NEAREST does it."""
    edge = len(image)
    for size in range(round(edge * smallest), edge + 1):
        for top in range(edge - size + 1):
            for left in range(edge - size + 1):
                found = np.empty_like(image)
                for y in range(edge):
                    for x in range(edge):
                        found[y, x] = image[top + int(y * size / edge), left + int(x * size / edge)]
                yield (size, top, left), found


def test_a_crop_is_a_window_enlarged_by_the_nearest_pixel_and_all_windows_come(images):
    one = np.broadcast_to(np.arange(8 * 8 * 2, dtype=np.uint8).reshape(8, 8, 2), (3000, 8, 8, 2))
    known = {found.tobytes(): place for place, found in windows(one[0], 0.5)}
    moved = random_resized_crop(tf.constant(one), SEED).numpy()
    assert moved.dtype == np.uint8
    places = [known[image.tobytes()] for image in moved]  # KeyError: no such window.
    assert set(places) == set(known.values())
    sizes = np.bincount([size for size, _, _ in places])[4:]
    assert (np.abs(sizes - 600) < 110).all()  # 5 sizes, equally likely: standard deviation 22.


def test_a_crop_of_the_whole_changes_nothing_and_other_shapes_keep_their_ratio(images):
    np.testing.assert_array_equal(random_resized_crop(images, SEED, smallest=1), images)
    assert random_resized_crop(images[:, :, :4], SEED).shape == (200, 8, 4, 3)
    with pytest.raises(ValueError, match="above 0 and at most 1; received 0"):
        random_resized_crop(images, SEED, smallest=0)


def test_turned_and_cropped_images_are_windows_of_symmetries(images):
    one = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    turned = [np.rot90(flip, turns) for flip in (one, one[:, ::-1]) for turns in range(4)]
    known = {found.tobytes() for image in turned for _, found in windows(image, 0.5)}
    moved = turn_and_crop(tf.constant(np.broadcast_to(one, (200, 8, 8, 1))), SEED).numpy()
    assert {image.tobytes() for image in moved} <= known
    assert len({image.tobytes() for image in moved}) > 100


def test_each_channel_of_each_image_has_its_own_gain_and_bias():
    normal = np.random.default_rng(1).normal(size=(500, 6, 6, 4)).astype(np.float32)
    moved = gain_and_bias(normal, SEED).numpy()
    gains, biases = np.empty((500, 4)), np.empty((500, 4))
    for i in range(500):
        for channel in range(4):
            before, after = normal[i, ..., channel].ravel(), moved[i, ..., channel].ravel()
            gains[i, channel], biases[i, channel] = np.polyfit(before, after, 1)
            np.testing.assert_allclose(after, gains[i, channel] * before + biases[i, channel], atol=1e-5)
    for draws, centre in ((gains, 1), (biases, 0)):
        assert draws.mean() == pytest.approx(centre, abs=0.01) and draws.std() == pytest.approx(0.1, rel=0.06)
        assert abs(np.corrcoef(draws.T)[~np.eye(4, dtype=bool)]).max() < 0.2
    assert abs(np.corrcoef(gains.ravel(), biases.ravel())[0, 1]) < 0.1


def test_batches_are_mixed_anew_in_each_epoch_and_alike_where_a_run_goes_on(records_tree):
    def read(**options):
        data = read_records(records_tree, "train", batch_size=2, training=True, seed=3, **options)
        return [images.numpy().tobytes() for images, _ in mix_batches(data, cutmix, 4, seed=5)]

    first, second, rest = read(), read(first_epoch=1), read(first_epoch=1, first_step=1)
    assert len(first) == 2 and read() == first and rest == second[1:]
    assert not {*first} & {*second}
    data = read_records(records_tree, "train", batch_size=2, training=True, seed=3)
    plain = [images.numpy().tobytes() for images, _ in data]
    assert plain != first
    mixed = mix_batches(read_records(records_tree, "train", batch_size=2, training=True, seed=3), cutmix, 4, seed=5)
    assert data.options().experimental_optimization.map_parallelization is False
    look = iter(mixed)
    next(look)  # as Keras does at first: it uses up no epoch
    time.sleep(1)  # what is fetched ahead, is fetched by now
    del look
    assert [images.numpy().tobytes() for images, _ in mixed] == first
    _, soft = next(iter(mix_batches(data, cutmix, 4, seed=5)))
    np.testing.assert_allclose(soft.numpy().sum(1), 1, rtol=1e-6)


def test_cutmix_pastes_one_box_and_mixes_labels_by_its_area(images):
    labels = np.arange(200) % 5
    areas = []
    for step in range(25):
        mixed, soft = cutmix(images, labels, (7, step), classes=5)
        changed = (mixed.numpy() != images).any(axis=(0, 3))
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        area = len(rows) * len(columns) / 64
        assert changed.sum() == len(rows) * len(columns)  # One rectangle, the same in each image.
        areas.append(area)
        for i in (0, 99):
            same = (images[:, changed] == mixed.numpy()[i, changed]).all(axis=(1, 2))
            partners = np.flatnonzero(same)
            expected = np.eye(5)[labels[i]] * (1 - area)
            if area:
                expected = [expected + np.eye(5)[labels[j]] * area for j in partners]
            else:
                expected = [expected]
            assert any(np.allclose(soft[i], each, atol=1e-6) for each in expected)
        np.testing.assert_allclose(tf.reduce_sum(soft, axis=1), 1, atol=1e-6)
    assert 0.1 < np.mean(areas) < 0.5 and len(set(areas)) > 8


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_boxes_of_cutmix_have_the_published_areas(alpha):
    """Sides are square roots of a share from Beta(alpha, alpha), centres uniform, what is outside is cut: as many boxes
    are as small as of 20,000 drawn by NumPy."""
    rng = np.random.default_rng(0)
    half, centre = np.sqrt(rng.beta(alpha, alpha, (20000, 1))) / 2, rng.uniform(size=(20000, 2))
    wanted = np.sort((np.minimum(centre + half, 1) - np.maximum(centre - half, 0)).prod(1))
    images, labels = np.zeros((8, 64, 64, 1), "float32"), np.arange(8)
    soft = [cutmix(images, labels, (3, step), classes=8, alpha=alpha)[1].numpy() for step in range(400)]
    found = np.sort([1 - own.diagonal().min() for own in soft])  # none has only itself for a partner
    below = [np.searchsorted(values, np.linspace(0.02, 0.98, 49)) / len(values) for values in (wanted, found)]
    assert np.abs(below[0] - below[1]).max() < 0.08  # of 400 draws of the same: in 99 of 100 cases


@pytest.mark.parametrize("function", [random_resized_crop, turn_and_crop, gain_and_bias])
def test_choices_are_functions_of_the_seed(images, function):
    images = tf.constant(images, tf.float32)
    first, again, other = (function(images, seed).numpy() for seed in (SEED, SEED, (3, 5)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    traced = tf.function(function)(images, tf.constant(SEED))
    np.testing.assert_array_equal(traced, first)
