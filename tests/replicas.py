"""Devices of one process, for tests of `MirroredStrategy`."""

import functools


@functools.cache  # strategies on the same devices would give their collectives the same keys, and these mix
def mirrored(number):
    """A strategy with that many replicas."""
    import tensorflow as tf

    class Strategy(tf.distribute.MirroredStrategy):
        _collective_key_base = 100_000 * number  # where TensorFlow's own tests put several strategies apart

    return Strategy([d.name for d in tf.config.list_logical_devices()[:number]])


def two_replicas():
    return mirrored(2)
