"""Augmentations of mini-batches beyond WILDS's: those of the best solution of RxRx1's competition on Kaggle.

Published as kaggle-rcic-1st (dataset.py, main.py): mirrored, transposed, a random square of at least half the edge
resized by the nearest pixel; after normalization a gain and a bias for each channel; CutMix. Read with
`augment=(turn_and_crop, gain_and_bias)` for all but the last. Choices are functions of a seed, one for each image.
"""

import tensorflow as tf

from tfrecords import preprocess


def turn_and_crop(images, seed):
    """One of the eight symmetries of a square (`preprocess.augment`), then `random_resized_crop`."""
    seeds = tf.random.experimental.stateless_split(seed, 2)
    return random_resized_crop(preprocess.augment(images, seeds[0]), seeds[1])


def random_resized_crop(images, seed, smallest=0.5):
    """Cuts out a window of the shape of the image at a random place and enlarges it by repeating pixels.

    Args:
        images: `(batch, height, width, channels)` of any type; all channels of an image are cut alike.
        seed: int `(2,)`.
        smallest: height of the smallest window, as a part of the image's. Heights are whole pixels, equally likely.
            Default: the winner's, 0.5.

    Returns:
        Images of the same shape and type.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must be above 0 and at most 1; received {smallest}.")
    images = tf.convert_to_tensor(images)
    batch, (height, width) = tf.shape(images)[0], images.shape[1:3]
    draws = tf.random.stateless_uniform((3, batch, 1), seed, dtype=tf.float64, alg="philox")
    least = max(1, round(height * smallest))
    cut = least + tf.cast(draws[0] * (height - least + 1), tf.int32)
    source = []
    for draw, edge in ((draws[1], height), (draws[2], width)):
        size = tf.maximum(1, cut * edge // height)
        first = tf.cast(draw * tf.cast(edge - size + 1, tf.float64), tf.int32)
        # As OpenCV's INTER_NEAREST: the pixel that the upper left corner falls into.
        source.append(first + tf.range(edge)[None, :] * size // edge)
    index = source[0][:, :, None] * width + source[1][:, None, :]
    pixels = tf.reshape(images, (batch, height * width, images.shape[3]))
    moved = tf.gather(pixels, tf.reshape(index, (batch, height * width)), batch_dims=1)
    return tf.ensure_shape(tf.reshape(moved, tf.shape(images)), images.shape)


def gain_and_bias(images, seed, gain=0.1, bias=0.1):
    """Multiplies each channel of each image by a draw from N(1, gain), and adds one from N(0, bias).

    For normalized images: `preprocess.standardize` would undo it.

    Args:
        images: float `(batch, height, width, channels)`.
        seed: int `(2,)`.
        gain, bias: standard deviations, in deviations of the normalized channel. Defaults: the winner's.
    """
    shape = tf.shape(images)
    draws = tf.random.stateless_normal((2, shape[0], 1, 1, shape[3]), seed, dtype=images.dtype, alg="philox")
    return images * (1 + gain * draws[0]) + bias * draws[1]


def cutmix(images, labels, seed, classes, alpha=1.0):
    """Pastes a box of another image of the mini-batch into each image, and mixes the labels by area.

    Yun et al. 2019 (arXiv 1905.04899), as the winner did: one box for the mini-batch, in the same place of each image,
    whose part of the area is drawn from Beta(alpha, alpha) and cut at the border. On a dataset of `read_records`:
    `mix_batches(data, cutmix, classes, seed)`; the loss takes shares of classes (Keras's
    `CategoricalCrossentropy`, `keras_abra.ABRAModel`).

    Args:
        images: `(batch, height, width, channels)` of any type.
        labels: integers `(batch,)`.
        seed: integers `(2,)`.
        classes: number of classes.
        alpha: of the Beta distribution. Default: the winner's and the paper's, 1.

    Returns:
        The images, and float32 labels `(batch, classes)` that add up to 1.
    """
    images = tf.convert_to_tensor(images)
    seed = tf.cast(tf.stack(seed), tf.int64)
    seeds = [tf.random.experimental.stateless_fold_in(seed, i) for i in range(3)]
    batch, (height, width) = tf.shape(images)[0], images.shape[1:3]
    partner = tf.argsort(tf.random.stateless_uniform((batch,), seeds[0], None, None, tf.int64, alg="philox"))
    gammas = tf.random.stateless_gamma((2,), seeds[1], alpha, dtype=tf.float64)
    share = gammas[0] / tf.reduce_sum(gammas)
    centre = tf.random.stateless_uniform((2,), seeds[2], dtype=tf.float64, alg="philox")
    inside, area = [], 1
    for i, edge in enumerate((height, width)):
        half = tf.sqrt(share) * edge / 2
        first, last = (tf.round(tf.clip_by_value(centre[i] * edge + sign * half, 0, edge)) for sign in (-1, 1))
        place = tf.range(edge, dtype=tf.float64)
        inside.append((place >= first) & (place < last))
        area *= last - first
    box = (inside[0][:, None] & inside[1][None, :])[None, :, :, None]
    mixed = tf.where(box, tf.gather(images, partner), images)
    pasted = tf.cast(area / (height * width), tf.float32)
    own = tf.one_hot(labels, classes)
    return mixed, (1 - pasted) * own + pasted * tf.gather(own, partner)


def mix_batches(data, mix, classes, seed=0, **options):
    """Mixes the images and labels of each batch of a dataset, by `cutmix` or a function like it.

    What is drawn for a batch is a function of `seed` and of the batch's own labels, in their order: it differs from
    step to step and from epoch to epoch, and is the same where a run goes on inside an epoch.

    Args:
        data: dataset of (images, integer labels), of `read_records`.
        mix: function of (images, labels, seed `(2,)`, classes, **options) that gives images and soft labels.
        classes: number of classes.
        seed: integer.
        **options: of `mix`.

    Returns:
        The dataset of (images, float32 labels `(batch, classes)`).
    """

    def mixed(images, labels):
        labels = tf.cast(labels, tf.int64)
        place = tf.range(1, tf.size(labels) + 1, dtype=tf.int64)
        draw = tf.reduce_sum((labels + 1) * place**2)
        return mix(images, labels, (tf.constant(seed, tf.int64), draw), classes, **options)

    return data.map(mixed)  # one at a time: `read_records` counts a batch as taken when it is asked for
