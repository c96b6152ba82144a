import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tfrecords.example import encode_example


def by_tensorflow(features):
    example = tf.train.Example()
    for key, values in features.items():
        kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list"
        getattr(example.features.feature[key], kind).value.extend(values)
    return example.SerializeToString(deterministic=True)


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 129, 16383, 16384, 100_000, 3_000_000])
def test_bytes_are_tensorflows_at_every_length_of_a_length(length):
    # No key begins with another one: that is where releases of protobuf differ in their order.
    features = {"image": [bytes(length)], "well": [b"B02"], "plate": [length], "a" * 130: [b"x", b"", b"yz" * 100]}
    assert encode_example(features) == by_tensorflow(features)


def test_random_features_are_what_tensorflow_reads():
    rng = np.random.default_rng(0)
    for _ in range(200):
        features = {}
        for _ in range(rng.integers(1, 9)):
            count = rng.integers(1, 5)
            numbers = [int(n) for n in rng.integers(0, 2 ** rng.integers(1, 63), count)]
            texts = [rng.bytes(rng.integers(0, 300)) for _ in range(count)]
            features[f"Schlüssel {rng.integers(1000)}"] = numbers if rng.random() < 0.5 else texts
        found = tf.train.Example.FromString(encode_example(features))
        assert found == tf.train.Example.FromString(by_tensorflow(features))


def test_keys_are_in_order():
    keys = ["site_id", "well", "site", "well_type", "sirna"]
    data = encode_example({key: [b"-"] for key in keys})
    assert sorted(keys) == sorted(keys, key=lambda key: data.index(f"{key}\x12".encode()))


def test_a_build_does_without_tensorflow():
    script = "import sys, tfrecords.build, tfrecords.write; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
