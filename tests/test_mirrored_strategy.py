"""Two replicas take the step that one device takes on the global batch."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.layers import FeatureStatisticsUncertainty
from tests.recording import RecordingOptimizer
from tests.replicas import two_replicas
from tests.tiny import smooth_backbone, tiny_batch, tiny_model

if keras.backend.backend() != "tensorflow":
    pytest.skip("MirroredStrategy is TensorFlow's", allow_module_level=True)

import tensorflow as tf


def one_step(strategy, structure, monkeypatch):
    """Gradients, logs and running means after one step on eight samples from a fixed start."""

    def start(self, uncertain, batch):
        rows = ops.shape(uncertain.spread if uncertain.factors is None else uncertain.factors[:, 0])[-1]
        return ops.tile(ops.cos(ops.cast(ops.arange(rows), "float32"))[None], (batch, 1))

    monkeypatch.setattr(FeatureStatisticsUncertainty, "draw", start)
    x, y = tiny_batch()
    with strategy.scope():
        model = tiny_model(structure, 2, backbone=smooth_backbone(), embedding_dim=None)
        optimizer = RecordingOptimizer()
        model.compile(optimizer=optimizer, metrics=["accuracy"])
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    logs = model.fit(data.with_options(options), verbose=0, shuffle=False).history
    stage = model.stages[0]
    means = [stage.experiment_means.numpy()] if structure == "domain" else []
    return optimizer.recorded(), logs, means


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "domain"])
def test_gradients_logs_and_means_equal_those_of_one_device(structure, monkeypatch):
    expected, logs, means = one_step(tf.distribute.get_strategy(), structure, monkeypatch)
    gradients, new_logs, new_means = one_step(two_replicas(), structure, monkeypatch)
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in expected))
    for g, e in zip(gradients, expected, strict=True):
        assert np.linalg.norm(g - e) <= 1e-4 * max(np.linalg.norm(e), 1e-3 * whole)
    for name, value in logs.items():
        assert new_logs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for a, b in zip(new_means, means, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_replicas_draw_different_noise():
    strategy = two_replicas()
    with strategy.scope():
        layer = FeatureStatisticsUncertainty(seed=1)
        layer.build((4, 8, 8, 3))

    @tf.function
    def draw():
        uncertain = layer.uncertainty(tf.constant(np.random.default_rng(0).normal(size=(4, 6)), tf.float32))
        return strategy.run(lambda: layer.draw(uncertain, 4))

    first, second = (value.numpy() for value in draw().values)
    assert np.abs(first - second).max() > 0.1


def test_compiling_for_xla_is_refused():
    with two_replicas().scope():
        model = tiny_model()
        with pytest.raises(ValueError, match="jit_compile=True does not work under a tf.distribute strategy"):
            model.compile("adam", jit_compile=True)
