"""Training on replicas beyond one even step: uneven batches, epochs, clipping, loss scales, accumulation, noise."""

import keras
import numpy as np
import pytest

from keras_abra import fit_arguments
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.models import ABRAModel
from tests import replicas as on
from tests.tiny import CLASSES, smooth_backbone, tiny_backbone, tiny_batch, tiny_model

if keras.backend.backend() != "tensorflow":
    pytest.skip("MirroredStrategy is TensorFlow's", allow_module_level=True)

import tensorflow as tf

from keras_abra.backend import tensorflow as ours
from tests.test_mirrored_strategy import BOUND, check_logs, check_state

ALONE = tf.distribute.get_strategy()


def smooth(structure="diagonal", **kwargs):
    return tiny_model(structure, backbone=smooth_backbone(), embedding_dim=None, **kwargs)


def compiled(strategy, model=smooth, optimizer=lambda: keras.optimizers.SGD(0.01), **kwargs):
    with strategy.scope():
        built = model()
        on.set_values(built)
        built.compile(metrics=["accuracy"], optimizer=optimizer(), **kwargs)
    return built


def test_an_uneven_first_batch_gives_the_gradients_of_one_device(monkeypatch):
    def model():
        return tiny_model("low_rank", backbone=tiny_backbone(dropout=0.0, synchronized=True))

    x, y = tiny_batch(13)  # 4, 4, 4, 1
    on.draw_by_sample(monkeypatch)
    expected, found = on.train(ALONE, model, x, y), on.train(on.mirrored(4), model, x, y)
    assert on.distance(found.gradients, expected.gradients) <= BOUND
    check_state(found.state, expected.state)
    check_logs(found.history, expected.history)


def test_data_that_the_strategy_has_divided_already():
    """Their length is a property, and not a method."""
    strategy, (x, y) = on.mirrored(2), tiny_batch(16)
    model = compiled(strategy, lambda: smooth(warmup=0.5), run_eagerly=True)
    data = strategy.experimental_distribute_dataset(on.pipeline(x, y, 8))
    with pytest.raises(ValueError, match="does not tell its length. Give `steps_per_epoch`"):
        model.fit(data, verbose=0)
    assert np.isfinite(model.fit(data, steps_per_epoch=2, verbose=0).history["loss"]).all()
    assert keras.ops.convert_to_numpy(model.ramp.progress)[1] == 1


@pytest.mark.parametrize("samples, batch, left", [(13, 8, 5), (14, 8, 6), (9, 16, 9)])
def test_batches_that_leave_a_replica_without_a_sample_are_refused_before_training(samples, batch, left):
    model, (x, y) = compiled(on.mirrored(4)), tiny_batch(samples)
    message = f"4 replicas needs a sample .* {samples} samples in batches of {batch}, of which one has {left}"
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, batch_size=batch, verbose=0)
    parts = next(iter(on.mirrored(4).experimental_distribute_dataset(on.pipeline(x, y, left))))
    parts = on.mirrored(4).experimental_local_results(parts[1])
    assert min(int(part.shape[0]) for part in parts) == 0  # so TensorFlow divides them
    arguments = fit_arguments.bind(keras.Model.fit, (model, *tiny_batch(15)), {"batch_size": 8})
    fit_arguments.check(model, arguments)


def test_no_batch_is_looked_at_before_the_first_epoch():
    """What is fetched for a look, and ahead of it, may be the whole of a short epoch."""
    x, y = tiny_batch(8)
    begun = []

    def batches():
        begun.append(1)
        yield from [(x, y), (x, y)]

    spec = tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape, tf.as_dtype(v.dtype)), (x, y))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    data = data.apply(tf.data.experimental.assert_cardinality(2))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    history = compiled(on.mirrored(2)).fit(data.with_options(options), epochs=2, verbose=0, shuffle=False).history
    assert len(begun) == 2 and len(history["accuracy"]) == 2


def test_compiled_epochs_with_uneven_ends_log_and_evaluate_exactly(monkeypatch):
    on.draw_by_sample(monkeypatch)
    (x, y), (images, labels) = tiny_batch(14), tiny_batch(19, seed=1)
    results = []
    for strategy in (ALONE, on.mirrored(2, collectives=True)):
        model = compiled(strategy)
        history = model.fit(on.pipeline(x, y, 8), epochs=2, verbose=0, shuffle=False).history  # 4 + 4, 3 + 3
        weights = np.linspace(0, 2, 19, dtype="float32")
        scores = [
            model.evaluate(on.pipeline(images, labels, 8), verbose=0, return_dict=True),  # 4 + 4, 4 + 4, 2 + 1
            model.evaluate(images, labels, batch_size=17, sample_weight=weights, verbose=0, return_dict=True),
        ]
        results.append((history, *scores))
    for found, expected in zip(results[1], results[0], strict=True):
        check_logs(found, expected)


def test_a_replica_without_a_sample_is_named():
    x, y = tiny_batch(7)  # 2, 2, 2, 1: enough; then 1, 1, 1, 0
    with pytest.raises(ValueError, match="left a replica without a sample.*drop_remainder=True"):
        compiled(on.mirrored(4, collectives=True)).fit(on.pipeline(*tiny_batch(10), 7), verbose=0, shuffle=False)


@pytest.mark.parametrize("clipping", [{"clipnorm": 0.02}, {"global_clipnorm": 0.05}, {"clipvalue": 0.002}])
@pytest.mark.parametrize("replica_by_replica", [False, True])
def test_the_sum_is_clipped_and_not_the_parts(monkeypatch, clipping, replica_by_replica):
    x, y = tiny_batch()
    on.draw_by_sample(monkeypatch)
    expected = on.train(ALONE, smooth, x, y, optimizer=lambda: on.RecordingOptimizer(**clipping))
    if replica_by_replica:
        monkeypatch.setattr(ours, "_agreed", lambda optimizer, gradients, scale: gradients)
    found = on.train(on.mirrored(2), smooth, x, y, optimizer=lambda: on.RecordingOptimizer(**clipping))
    far = on.distance(found.gradients, expected.gradients)
    assert far > 100 * BOUND if replica_by_replica else far <= BOUND


@pytest.fixture
def half_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield lambda **clipping: keras.optimizers.LossScaleOptimizer(
        on.RecordingOptimizer(**clipping), initial_scale=2.0**8
    )
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("clipping", [{}, {"global_clipnorm": 0.05}])
def test_with_half_precision_and_a_loss_scale(monkeypatch, half_precision, clipping):
    x, y = tiny_batch()
    on.draw_by_sample(monkeypatch)
    expected = on.train(ALONE, smooth, x, y, optimizer=lambda: half_precision(**clipping))
    found = on.train(on.mirrored(2), smooth, x, y, optimizer=lambda: half_precision(**clipping), eagerly=False)
    keras.config.set_dtype_policy("float32")
    exact = on.train(ALONE, smooth, x, y, optimizer=lambda: on.RecordingOptimizer(**clipping))
    rounding = on.distance(expected.gradients, exact.gradients)  # of this processor's float16, on one device
    assert 1e-4 < rounding < 0.02
    assert on.distance(found.gradients, exact.gradients) <= 2 * rounding
    np.testing.assert_allclose(found.history["loss"], expected.history["loss"], rtol=1e-3)


@pytest.mark.parametrize("clipping", [{}, {"clipvalue": 0.05}])
def test_an_overflow_on_one_replica_makes_all_skip_the_step(half_precision, clipping):
    x, y = tiny_batch()
    x["image"][-1, 0, 0, 0] = np.inf
    strategy = on.mirrored(2)
    model = compiled(strategy, optimizer=lambda: half_precision(**clipping), run_eagerly=True)
    before = [v.numpy() for v in model.trainable_variables]
    model.fit(on.pipeline(x, y, 8), verbose=0, shuffle=False)
    for value, v in zip(before, model.trainable_variables, strict=True):
        for local in strategy.experimental_local_results(v.value):
            np.testing.assert_array_equal(local.numpy(), value)
    assert [v.numpy() for v in (model.optimizer.iterations, model.optimizer.dynamic_scale)] == [0, 2.0**7]


def test_accumulated_gradients_are_those_of_one_device(monkeypatch):
    x, y = tiny_batch(16)
    on.draw_by_sample(monkeypatch)
    steps = [
        on.train(s, smooth, x, y, 8, optimizer=lambda: on.RecordingOptimizer(gradient_accumulation_steps=2))
        for s in (ALONE, on.mirrored(2))
    ]
    assert on.distance(steps[1].gradients, steps[0].gradients) <= BOUND
    assert np.linalg.norm(steps[0].gradients[0]) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps_per_execution": 2}, "several steps an execution"),
        (
            {"optimizer": lambda: keras.optimizers.SGD(gradient_accumulation_steps=2)},
            "cannot compile gradient accumulation",
        ),
        (
            {
                "optimizer": lambda: keras.optimizers.SGD(gradient_accumulation_steps=2, clipnorm=1.0),
                "run_eagerly": True,
            },
            "Keras clips accumulated gradients replica by replica",
        ),
    ],
)
def test_what_keras_fails_at_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compiled(on.mirrored(2), **arguments)


def masked_features(monkeypatch, seed, own=True):
    """Clean features of the replicas' equal parts, behind dropout, in a step with real noise; and the new seeds."""
    seen, embed = {}, ABRAModel.embed_features

    def record(self, features, training, **kwargs):
        if training:
            replica = int(tf.distribute.get_replica_context().replica_id_in_sync_group)
            seen.setdefault(replica, []).append(features.numpy())
        return embed(self, features, training, **kwargs)

    def model():
        image = keras.Input((8, 8, 2))
        x = keras.layers.Conv2D(3, 3, name="stem")(image)
        x = keras.layers.Dropout(0.5, seed=seed)(x)
        backbone = keras.Model(image, keras.layers.Conv2D(4, 3)(x))
        return ABRAModel(
            backbone,
            CLASSES,
            ["stem"],
            embedding_dim=None,
            warmup=0,
            uncertainty=FeatureStatisticsUncertainty(seed=seed),
        )

    x, y = tiny_batch(4)
    x, y = {name: np.tile(v, (2,) + (1,) * (v.ndim - 1)) for name, v in x.items()}, np.tile(y, 2)
    with monkeypatch.context() as patch:
        patch.setattr(ABRAModel, "embed_features", record)
        if not own:
            patch.setattr("keras_abra.fused_step._own_seeds", lambda model, state: state)
        step = on.train(on.mirrored(2), model, x, y)
    return {replica: features[0] for replica, features in seen.items()}, step


def test_replicas_have_masks_of_their_own_and_all_is_a_function_of_the_seed(monkeypatch):
    features, step = masked_features(monkeypatch, 1)
    assert np.abs(features[0] - features[1]).max() > 0.1
    for first, second in step.state:
        np.testing.assert_array_equal(first, second)  # the seeds stay common, and count on
    shared, common = masked_features(monkeypatch, 1, own=False)
    np.testing.assert_array_equal(shared[0], shared[1])  # what Keras does
    check_state(step.state, [values[:1] for values in common.state])
    again, other = masked_features(monkeypatch, 1)[1], masked_features(monkeypatch, 2)[1]
    assert on.distance(again.gradients, step.gradients) <= 1e-6
    assert on.distance(other.gradients, step.gradients) > 0.1
