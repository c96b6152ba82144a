"""Two devices of one process, for tests of `MirroredStrategy`."""

import functools


@functools.cache  # a second strategy in one process gives its collectives the keys of the first, and they mix
def two_replicas():
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([d.name for d in tf.config.list_logical_devices()[:2]])
