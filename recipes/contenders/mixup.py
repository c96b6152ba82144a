import tensorflow as tf


def mixup(images, labels, seed, classes, alpha=0.2):
    """Mixes each image with another of the mini-batch, and the labels alike.

        x' = l x + (1 - l) x_j,   y' = l y + (1 - l) y_j,   l ~ Beta(alpha, alpha), one for the mini-batch,

    j a random permutation. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Takes what
    `tfrecords.augmentation.cutmix` takes; the loss needs soft labels.

    Args:
        images: float `(batch, height, width, channels)`.
        labels: integers `(batch,)`.
        seed: integers `(2,)`.
        classes: number of classes.
        alpha: of the Beta distribution. Default: DomainBed's, 0.2.

    Returns:
        The images, and float32 labels `(batch, classes)`.
    """
    seed = tf.cast(tf.stack(seed), tf.int64)
    seeds = [tf.random.experimental.stateless_fold_in(seed, i) for i in range(2)]
    partner = tf.argsort(tf.random.stateless_uniform((tf.shape(images)[0],), seeds[0], None, None, tf.int64, "philox"))
    gammas = tf.random.stateless_gamma((2,), seeds[1], alpha, dtype=tf.float64)
    share = tf.cast(gammas[0] / tf.maximum(tf.reduce_sum(gammas), 1e-300), images.dtype)
    own = tf.one_hot(labels, classes)
    mixed = share * images + (1 - share) * tf.gather(images, partner)
    share = tf.cast(share, tf.float32)
    return mixed, share * own + (1 - share) * tf.gather(own, partner)
