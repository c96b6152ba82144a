"""What RxRx1-WILDS does to an image before a model sees it, on whole batches.

From p-lambda/wilds, examples/transforms.py: a rotation by 0, 90, 180 or 270 degrees and a horizontal flip with
probability 0.5 in training; always each channel of each image to mean 0 and standard deviation 1.
"""

import tensorflow as tf

# Floats of a block of rows, a megabyte.
_CACHED = 2**18


def standardize(images):
    """Gives each channel of each image mean 0 and standard deviation 1 (unbiased, as torch's; a flat channel gives 0).

    A gain or an offset of a channel, such as the scaling of grey levels to 0-1, has no influence on the result.

    Args:
        images: `(batch, height, width, channels)`, uint8 or any number.

    Returns:
        float32 of the same shape.
    """
    images = tf.convert_to_tensor(images)
    if images.dtype == tf.uint8 and images.shape.is_fully_defined() and images.shape[0] == 1:
        return _standardize_one(images[0])[None]
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


def _standardize_one(image):
    """As `standardize`, for one uint8 image, in blocks of rows that stay in the processor's cache."""
    height, width, channels = image.shape
    pixels = tf.reshape(image, (height, width * channels))
    # Sums of at most 256 squares of grey levels are exact in float32: below 2 ** 24.
    step = max(1, min(256, _CACHED // (width * channels)))
    sizes = [min(step, height - first) for first in range(0, height, step)]
    blocks = tf.split(pixels, sizes)
    sums = tf.zeros((2, channels), tf.float64)
    for block, size in zip(blocks, sizes, strict=True):
        # One block after the other, and its squares in the place of its levels.
        with tf.control_dependencies([sums]):
            levels = tf.cast(block, tf.float32)
        ones = tf.ones((1, size))
        total = tf.matmul(ones, levels)
        with tf.control_dependencies([total]):
            squares = tf.matmul(ones, tf.square(levels))
        both = tf.cast(tf.concat([total, squares], axis=0), tf.float64)
        sums += tf.reduce_sum(tf.reshape(both, (2, width, channels)), axis=1)
    count = height * width
    mean = sums[0] / count
    variance = (sums[1] - sums[0] * mean) / max(count - 1, 1)
    # A flat channel is so up to rounding in float64; grey levels that differ at all have a larger variance.
    gain = tf.where(variance > 1e-8, tf.math.rsqrt(tf.maximum(variance, 1e-8)), 0.0)
    mean, gain = (tf.tile(tf.cast(values, tf.float32), (width,)) for values in (mean, gain))
    done = []
    for block in blocks:
        with tf.control_dependencies([gain, *done[-1:]]):
            levels = tf.cast(tf.identity(block), tf.float32)
        done.append((levels - mean) * gain)
    return tf.reshape(done[0] if len(done) == 1 else tf.concat(done, axis=0), image.shape)


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
    size = _edge(images.shape[1:])
    shape = tf.shape(images)
    transpose, upside_down, mirror = tf.unstack(draw_moves(shape[0], seed)[:, :, None, None], axis=1)
    # One gather of whole pixels: several times faster than a transpose, and than a choice between eight moved copies.
    forward = tf.range(size)
    row = tf.where(upside_down, forward[::-1, None], forward[:, None])
    column = tf.where(mirror, forward[::-1], forward)
    source = tf.where(transpose, column * size + row, row * size + column)
    pixels = tf.reshape(images, (shape[0], size * size, shape[3]))
    moved = tf.gather(pixels, tf.reshape(source, (shape[0], size * size)), batch_dims=1)
    return tf.ensure_shape(tf.reshape(moved, shape), images.shape)


def draw_moves(count, seed):
    """Draws what `augment` does to each of `count` images: bool `(count, 3)`, transpose, upside down, mirror."""
    return tf.transpose(tf.random.stateless_uniform((3, count), seed=seed) < 0.5)


def move(image, moves):
    """Does to one image what `draw_moves` has drawn for it, and nothing else: a third of the time of `augment`.

    Args:
        image: `(size, size, channels)` of any type.
        moves: bool `(3,)`.
    """
    size = _edge(image.shape)
    transpose, upside_down, mirror = tf.unstack(moves)
    image = tf.cond(transpose, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    image = tf.cond(upside_down, lambda: tf.gather(image, tf.range(size - 1, -1, -1)), lambda: image)
    return tf.cond(mirror, lambda: tf.reverse(image, (1,)), lambda: image)


def _edge(shape):
    height, width = shape[:2]
    if height != width:
        raise ValueError(
            f"Images turned by 90 degrees must be square; received {height} x {width} pixels (height x width). "
            "Build the records with an image size, or read them with augment=None."
        )
    return height
