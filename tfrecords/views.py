"""From pixels to what a model sees: augmentation on bytes, then normalization, then what is added to it."""

import tensorflow as tf

from tfrecords import preprocess


def make_views(images, rows, seeds, augment, normalize, dtype):
    """Augments and normalizes one batch.

    Args:
        images: uint8 `(batch, height, width, channels)`.
        rows: int64 `(batch,)`, numbers of the sites, or None where `normalize` does not need them.
        seeds: int `(2,)` of this batch.
        augment: function of (images, seeds), a pair of which the second is given the normalized images, or None.
        normalize: function of (images, rows).
        dtype: of the result.
    """
    before, after = augment if isinstance(augment, (tuple, list)) else (augment, None)
    if before is not None:
        images = before(images, seeds)
    images = normalize(images, rows)
    if after is not None:
        images = after(images, tf.random.experimental.stateless_fold_in(seeds, 1))
    return tf.cast(images, dtype)


def go_one_by_one(augment, normalize):
    """Whether images can be augmented and normalized one by one, in the processor's cache: in half the time.

    So it is for WILDS's own two, which look at each image by itself. Of a function of the user's that is not known.
    """
    return augment in (None, preprocess.augment) and normalize is preprocess.standardize


def view_one(image, moves=None, dtype="float32"):
    """What `make_views` gives for one image with WILDS's augmentation, or none, and standardized.

    Args:
        image: uint8 `(height, width, channels)`.
        moves: of `preprocess.draw_moves`.
        dtype: of the result.
    """
    if moves is not None:
        image = preprocess.move(image, moves)
    return tf.cast(preprocess.standardize(image[None])[0], dtype)
