"""What RxRx1-WILDS does to an image before a model sees it, on whole batches.

From p-lambda/wilds, examples/transforms.py: a rotation by 0, 90, 180 or 270 degrees and a horizontal flip with
probability 0.5 in training; always each channel of each image to mean 0 and standard deviation 1.
"""

import tensorflow as tf


def standardize(images):
    """Gives each channel of each image mean 0 and standard deviation 1 (unbiased, as torch's; a flat channel gives 0).

    A gain or an offset of a channel, such as the scaling of grey levels to 0-1, has no influence on the result.

    Args:
        images: `(batch, height, width, channels)`, uint8 or any number.

    Returns:
        float32 of the same shape.
    """
    images = tf.convert_to_tensor(images)
    shape = tf.shape(images)
    batch, height, width, channels = shape[0], shape[1], shape[2], shape[3]
    count = tf.cast(height * width, tf.float32)
    # Whole rows (width and channels together) are long vectors: twice as fast as a reduction that leaves the channels.
    rows = tf.cast(tf.reshape(images, (batch, height, width * channels)), tf.float32)

    # A product with ones adds up the rows; it takes half as long as a reduction.
    ones = tf.ones((batch, 1, height))

    def channel_sum(values):
        return tf.reduce_sum(tf.reshape(tf.matmul(ones, values), (batch, width, channels)), axis=1)

    def as_row(values):
        return tf.tile(values, (1, width))[:, None, :]

    rows -= as_row(channel_sum(rows) / count)
    variance = channel_sum(tf.square(rows)) / tf.maximum(count - 1.0, 1.0)
    # Grey levels that differ at all have a larger variance than this; what is below is rounding of the mean.
    flat = variance <= (1e-8 if images.dtype.is_integer else 0.0)
    gain = tf.where(flat, 0.0, tf.math.rsqrt(tf.where(flat, 1.0, variance)))
    return tf.ensure_shape(tf.reshape(rows * as_row(gain), shape), images.shape)


def augment(images, seed):
    """Turns each image by 0, 90, 180 or 270 degrees, then mirrors it left-right with probability 0.5.

    These are the eight symmetries of a square, each equally often. Three fair coins choose among them: one for the
    transpose, one for each flip.

    Args:
        images: `(batch, size, size, channels)`, of any type; all channels of an image are moved alike.
        seed: int `(2,)`; equal seeds give equal choices.

    Returns:
        The moved images, of the same shape and type.

    Raises:
        ValueError: if the images are not square.
    """
    images = tf.convert_to_tensor(images)
    size, width = images.shape[1], images.shape[2]
    if size != width:
        raise ValueError(
            f"Images turned by 90 degrees must be square; received {size} x {width} pixels (height x width). "
            "Build the records with an image size, or read them with augment=None."
        )
    shape = tf.shape(images)
    transpose, upside_down, mirror = tf.unstack(
        tf.random.stateless_uniform((3, shape[0], 1, 1), seed=seed) < 0.5, axis=0
    )
    if images.shape[0] == 1:
        # What is chosen for one image is done for this one only: a third of the gather's time.
        image = tf.cond(transpose[0, 0, 0], lambda: tf.transpose(images[0], (1, 0, 2)), lambda: images[0])
        image = tf.cond(upside_down[0, 0, 0], lambda: tf.gather(image, tf.range(size - 1, -1, -1)), lambda: image)
        return tf.cond(mirror[0, 0, 0], lambda: tf.reverse(image, (1,)), lambda: image)[None]
    # One gather of whole pixels: several times faster than a transpose, and than a choice between eight moved copies.
    forward = tf.range(size)
    row = tf.where(upside_down, forward[::-1, None], forward[:, None])
    column = tf.where(mirror, forward[::-1], forward)
    source = tf.where(transpose, column * size + row, row * size + column)
    pixels = tf.reshape(images, (shape[0], size * size, shape[3]))
    moved = tf.gather(pixels, tf.reshape(source, (shape[0], size * size)), batch_dims=1)
    return tf.ensure_shape(tf.reshape(moved, shape), images.shape)
