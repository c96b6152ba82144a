import numpy as np
import pytest
import tensorflow as tf

from tfrecords.preprocess import augment, draw_moves, move, standardize


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (64, 6, 6, 3), dtype=np.uint8)


def test_each_channel_of_each_image_has_mean_0_and_unbiased_deviation_1(images):
    result = standardize(images).numpy().astype(np.float64)
    assert result.shape == images.shape
    np.testing.assert_allclose(result.mean(axis=(1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(result.std(axis=(1, 2), ddof=1), 1, rtol=1e-6)


def test_standardize_is_what_wilds_does(images):
    scaled = images / 255.0
    expected = (scaled - scaled.mean((1, 2), keepdims=True)) / scaled.std((1, 2), ddof=1, keepdims=True)
    np.testing.assert_allclose(standardize(images), expected, atol=1e-5)


def test_gain_and_offset_of_a_channel_vanish(images):
    moved = images * np.array([0.1, 2.0, 7.0], np.float32) + np.array([5.0, -3.0, 0.0], np.float32)
    np.testing.assert_allclose(standardize(moved), standardize(images), atol=1e-4)


@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_flat_channel_becomes_0_and_leaves_the_others_alone(level):
    images = np.random.default_rng(1).integers(0, 256, (2, 512, 512, 2), dtype=np.uint8)
    expected = standardize(images).numpy()[..., 1]
    images[..., 0] = level
    result = standardize(images).numpy()
    assert (result[..., 0] == 0).all()
    np.testing.assert_array_equal(result[..., 1], expected)


def test_one_grey_level_of_one_pixel_is_not_flat():
    images = np.full((1, 512, 512, 1), 200, np.uint8)
    images[0, 3, 4, 0] = 201
    assert standardize(images).numpy()[0, 3, 4, 0] == pytest.approx(512, rel=1e-2)


def symmetries(image):
    return [np.rot90(flip, turns) for flip in (image, image[:, ::-1]) for turns in range(4)]


def test_augment_gives_each_of_the_eight_symmetries_about_equally_often():
    image = np.arange(36 * 2).reshape(6, 6, 2)
    moved = augment(tf.constant(np.broadcast_to(image, (800, 6, 6, 2))), (1, 2)).numpy()
    matches = np.array([[np.array_equal(one, other) for other in symmetries(image)] for one in moved])
    assert (matches.sum(axis=1) == 1).all()
    assert (matches.sum(axis=0) > 60).all()  # 100 expected, standard deviation 9.4


def test_images_moved_one_by_one_are_those_of_the_batch(images):
    for seed in ((1, 2), (5, 0)):
        moves = draw_moves(len(images), seed)
        assert len({tuple(one) for one in moves.numpy().tolist()}) == 8
        expected = augment(images, seed)
        np.testing.assert_array_equal([move(tf.constant(a), b) for a, b in zip(images, moves, strict=True)], expected)
    with pytest.raises(ValueError, match="must be square; received 4 x 6 pixels"):
        move(tf.zeros((4, 6, 1)), moves[0])


@pytest.mark.parametrize("shape", [(6, 6, 3), (520, 300, 5), (1, 1, 1)])
def test_one_image_alone_is_standardized_as_in_a_batch(shape):
    """In blocks of rows, the last of them smaller; bright images that hardly differ among them."""
    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, shape, np.uint8), rng.integers(253, 256, shape, np.uint8)):
        levels = image.astype(np.float64)
        with np.errstate(all="ignore"):
            expected = (levels - levels.mean((0, 1))) / levels.std((0, 1), ddof=1)
        expected[~np.isfinite(expected)] = 0
        one = standardize(tf.constant(image[None]))[0]
        np.testing.assert_allclose(one, expected, atol=2e-5)
        np.testing.assert_allclose(
            one, standardize(tf.constant(np.stack([image] * 2)))[0], atol=2e-4
        )  # Its mean is rounded.


def test_augment_is_a_function_of_the_seed_and_keeps_the_type(images):
    images = tf.constant(images)
    first, again, other = (augment(images, seed).numpy() for seed in ((3, 4), (3, 4), (3, 5)))
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_images_that_are_not_square_cannot_be_turned():
    with pytest.raises(ValueError, match="must be square; received 4 x 6 pixels"):
        augment(tf.zeros((2, 4, 6, 1)), (0, 0))
