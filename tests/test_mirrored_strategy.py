"""Replicas take the step that one device takes on the global batch."""

import functools
import itertools

import keras
import numpy as np
import pytest

from keras_abra import backend, fused_step, uncertainty
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import DistributionAlignment
from keras_abra.perturbed_norms import SharedMomentsNorm
from tests import replicas as on
from tests.tiny import EXPERIMENTS, mixed, smooth_backbone, tiny_backbone, tiny_batch, tiny_model

if keras.backend.backend() != "tensorflow":
    pytest.skip("MirroredStrategy is TensorFlow's", allow_module_level=True)

import tensorflow as tf

ONE, TWO = ("stem",), ("stem", "stage1")
BOUND = 1e-4
NONE = DistributionAlignment(weight=0.0)


def alignment(kind, two_sided=False, **kwargs):
    return DistributionAlignment(kind, 0.8, two_sided=two_sided, **kwargs)


def build(structure="diagonal", stages=TWO, steps=1, aligned=None, synchronized=True, layer=None):
    backbone = tiny_backbone(dropout=0.0, synchronized=synchronized)
    return tiny_model(structure, steps, stages, backbone, layer, alignment=aligned or alignment("symmetric_kl"))


def both(monkeypatch, number, model, labels=None):
    """The step on one device and on that many replicas."""
    x, y = tiny_batch()
    y = y if labels is None else labels(y)
    on.draw_by_sample(monkeypatch)
    expected = on.train(tf.distribute.get_strategy(), model, x, y)
    return expected, on.train(on.mirrored(number), model, x, y)


def check_state(state, expected):
    for values, (value,) in zip(state, expected, strict=True):
        for replica in values:
            np.testing.assert_allclose(replica, value, rtol=1e-4, atol=1e-5)


def check_logs(history, expected):
    assert history.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "number, structure, stages, steps, aligned",
    [
        (2, "diagonal", TWO, 1, alignment("symmetric_kl", two_sided=True)),
        (2, "low_rank", ONE, 2, alignment("jensen_shannon")),
        (2, "domain", TWO, 2, alignment("mmd", two_sided=True)),
        (2, "low_rank", TWO, 1, alignment("coral", two_sided=True)),
        (2, "diagonal", ONE, 2, alignment("mmd")),
        (4, "low_rank", TWO, 0, alignment("jensen_shannon", two_sided=True)),
        (4, "domain", ONE, 1, alignment("coral")),
        (2, "diagonal", TWO, 0, NONE),
    ],
)
def test_with_synchronized_batch_norm_the_step_is_that_of_one_device(
    monkeypatch, number, structure, stages, steps, aligned
):
    expected, found = both(monkeypatch, number, lambda: build(structure, stages, steps, aligned))
    assert on.distance(found.gradients, expected.gradients) <= BOUND
    check_state(found.state, expected.state)
    check_logs(found.history, expected.history)


def test_labels_may_be_shares_of_classes(monkeypatch):
    expected, found = both(monkeypatch, 2, build, mixed)
    assert on.distance(found.gradients, expected.gradients) <= BOUND
    check_logs(found.history, expected.history)


@pytest.mark.parametrize("kind", ["clean", "moving", "auxiliary"])
def test_other_normalizations_of_the_perturbed_branch_are_synchronized_too(monkeypatch, kind):
    def model():
        backbone = tiny_backbone(dropout=0.0, synchronized=True)
        return tiny_model("diagonal", 1, TWO, backbone, perturbed_norms=kind)

    expected, found = both(monkeypatch, 2, model)
    assert on.distance(found.gradients, expected.gradients) <= BOUND
    check_state(found.state, expected.state)
    if kind == "clean":
        monkeypatch.setattr(
            SharedMomentsNorm, "_batch_moments", lambda self, x, axis: keras.ops.moments(x, [0, 1, 2][:axis])
        )
        apart = on.train(on.mirrored(2), model, *tiny_batch())
        assert on.distance(apart.gradients, expected.gradients) > 10 * BOUND


def test_a_learned_scale_climbs_the_loss_of_all_replicas(monkeypatch):
    expected, found = both(monkeypatch, 2, lambda: build("diagonal", TWO, 0, layer={"learned_scale": True}))
    assert on.distance(found.gradients, expected.gradients) <= BOUND
    names = [v.path.split("/")[-1] for v in found.model.trainable_variables]
    pairs = [
        pair for name, *pair in zip(names, found.gradients, expected.gradients, strict=True) if name == "log_scale"
    ]
    assert len(pairs) == 2 and all(on.distance([a], [b]) <= BOUND and np.abs(b).max() > 0 for a, b in pairs)


@pytest.mark.parametrize("number, structure", [(2, "diagonal"), (4, "low_rank")])
def test_an_experiment_on_several_replicas_shares_one_perturbation(monkeypatch, number, structure):
    def model():
        return build(structure, TWO, 2, layer={"shared_by": "experiment"})

    expected, found = both(monkeypatch, number, model)
    assert on.distance(found.gradients, expected.gradients) <= BOUND
    monkeypatch.setattr(FeatureStatisticsUncertainty, "shared_slopes", lambda self, slopes, experiment: slopes)
    apart = on.train(on.mirrored(number), model, *tiny_batch())
    assert on.distance(apart.gradients, expected.gradients) > 10 * BOUND


@pytest.mark.parametrize(
    "number, structure, stages, steps, aligned",
    [
        (2, "diagonal", TWO, 2, alignment("symmetric_kl", two_sided=True)),
        (2, "low_rank", TWO, 1, alignment("jensen_shannon")),
        (2, "diagonal", ONE, 1, NONE),
        (2, "domain", TWO, 2, alignment("symmetric_kl")),
        (2, "diagonal", TWO, 1, alignment("coral", two_sided=True)),
        (2, "diagonal", ONE, 1, alignment("mmd")),
    ],
)
def test_with_plain_batch_norm_it_is_the_mean_of_the_parts_given_the_global_spread(
    monkeypatch, number, structure, stages, steps, aligned
):
    def model():
        return build(structure, stages, steps, aligned, synchronized=False)

    x, y = tiny_batch()
    check_mean_of(on.one_after_another(monkeypatch, number, model, x, y), monkeypatch, number, model, x, y)


@pytest.mark.parametrize("structure, kind", [("diagonal", "coral"), ("low_rank", "mmd")])
def test_not_synchronized_at_all_each_replica_is_a_device_of_its_own(monkeypatch, structure, kind):
    def model():
        aligned = alignment(kind, two_sided=True, synchronized=False)
        return build(structure, TWO, 1, aligned, synchronized=False, layer={"synchronized": False})

    x, y = tiny_batch()
    parts = []
    for first in (0, 4):
        on.draw_by_sample(monkeypatch, first)
        part = {name: value[first : first + 4] for name, value in x.items()}
        parts.append(on.train(tf.distribute.get_strategy(), model, part, y[first : first + 4]))
    check_mean_of(parts, monkeypatch, 2, model, x, y)


def check_mean_of(parts, monkeypatch, number, model, x, y):
    on.draw_by_sample(monkeypatch)
    found = on.train(on.mirrored(number), model, x, y)
    mean = [np.mean(gradients, axis=0) for gradients in zip(*(part.gradients for part in parts), strict=True)]
    assert on.distance(found.gradients, mean) <= BOUND
    names = [v.path for v in found.model.non_trainable_variables]
    members = np.array([np.bincount(part, minlength=EXPERIMENTS) for part in np.split(x["experiment"], number)])
    for name, values, *parts_values in zip(names, found.state, *(part.state for part in parts), strict=True):
        if name.endswith("experiment_means"):  # one state: that of all samples of an experiment
            weights = (members / members.sum(0))[..., None]
            parts_values = [[sum(w * value for w, (value,) in zip(weights, parts_values, strict=True))]] * number
        for replica, (value,) in zip(values, parts_values, strict=True):
            np.testing.assert_allclose(replica, value, rtol=1e-4, atol=1e-5, err_msg=name)
    check_logs(found.history, {name: np.mean([p.history[name] for p in parts], axis=0) for name in found.history})


# Mutants: each of these mistakes is seen by the comparison above.


def undivided(call):
    """The term whose mean is the `call`-th to be taken in a step counts once for each replica."""

    def mutate(monkeypatch, model):
        right = fused_step._weighted_mean

        def wrong(*args):
            mean, calls = right(*args), itertools.count()
            return lambda values: mean(values) * (2 if next(calls) == call else 1)

        monkeypatch.setattr(fused_step, "_weighted_mean", wrong)

    return mutate


def undivided_regularizer(name):
    def mutate(monkeypatch, model):
        for regularizer in {getattr(layer, name, None) for layer in model.backbone.layers} - {None}:
            regularizer.l2 = 2 * regularizer.l2

    return mutate


def per_replica(where):
    """The spread of a replica's own part, in the search or where the perturbation is made of its coordinates."""

    class Both(uncertainty.Uncertainty):
        pass

    def mutate(monkeypatch, model):
        measure, function = FeatureStatisticsUncertainty.uncertainty, getattr(uncertainty, where)

        def both(self, statistics, experiment=None):
            found = Both(*measure(self, statistics, experiment))
            found.own = uncertainty.diagonal(statistics, synchronized=False)
            return found

        monkeypatch.setattr(FeatureStatisticsUncertainty, "uncertainty", both)
        monkeypatch.setattr(uncertainty, where, lambda u, *args: function(getattr(u, "own", u), *args))

    return mutate


def shared_noise(monkeypatch, model):
    on.draw_by_sample(monkeypatch, shared=True)


def not_synchronized(monkeypatch, model):
    model.alignment.synchronized = False


def detached(name):
    """Sums or rows of all replicas, the gradient of each replica's loss kept to itself."""

    def mutate(monkeypatch, model):
        right = getattr(backend, name)

        def own(value):
            if name == "global_sum":
                return value
            before = tf.distribute.get_replica_context().replica_id_in_sync_group * tf.shape(value)[0]
            after = tf.shape(right(tf.stop_gradient(value)))[0] - before - tf.shape(value)[0]
            return tf.pad(value, [[before, after], [0, 0]])

        def wrong(value):
            return (
                right(value) if value.dtype != tf.float32 else tf.stop_gradient(right(value) - own(value)) + own(value)
            )

        monkeypatch.setattr(backend, name, wrong)

    return mutate


MUTANTS = {
    "the clean loss is not divided": undivided(0),
    "the perturbed loss is not divided": undivided(1),
    "the alignment is not divided": undivided(2),
    "the regularization of weights is not divided": undivided_regularizer("kernel_regularizer"),
    "the regularization of activity is not divided": undivided_regularizer("activity_regularizer"),
    "the search takes the spread of a replica": per_replica("ascend"),
    "the perturbation takes the spread of a replica": per_replica("offsets"),
    "replicas share noise": shared_noise,
}
ALIGNMENT_MUTANTS = {
    "each replica aligns its own rows": not_synchronized,
    "rows keep their gradients to themselves": detached("global_rows"),
}


@functools.cache
def reference(kind):
    with pytest.MonkeyPatch.context() as monkeypatch:
        on.draw_by_sample(monkeypatch)
        return on.train(tf.distribute.get_strategy(), lambda: base(kind), *tiny_batch())


def base(kind):
    return build(aligned=alignment(kind, two_sided=True))


def mutated_distance(kind, mutate, monkeypatch):
    expected = reference(kind)  # before anything is mutated
    on.draw_by_sample(monkeypatch)

    def model():
        built = base(kind)
        mutate(monkeypatch, built)
        return built

    return on.distance(on.train(on.mirrored(2), model, *tiny_batch()).gradients, expected.gradients)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_that(monkeypatch, mutant):
    assert mutated_distance("symmetric_kl", MUTANTS[mutant], monkeypatch) > 10 * BOUND


@pytest.mark.parametrize("mutant", ALIGNMENT_MUTANTS)
@pytest.mark.parametrize("kind", ["coral", "mmd"])
def test_the_comparison_of_alignments_over_the_batch_sees_that(monkeypatch, kind, mutant):
    assert mutated_distance(kind, ALIGNMENT_MUTANTS[mutant], monkeypatch) > 10 * BOUND


def test_the_comparison_sees_a_covariance_of_the_replica(monkeypatch):
    def mutated():
        monkeypatch.setattr(uncertainty, "low_rank", lambda statistics, synchronized: right(statistics, False))
        return build("low_rank", ONE)

    right, (x, y) = uncertainty.low_rank, tiny_batch()
    on.draw_by_sample(monkeypatch)
    expected = on.train(tf.distribute.get_strategy(), lambda: build("low_rank", ONE), x, y)
    assert on.distance(on.train(on.mirrored(2), mutated, x, y).gradients, expected.gradients) > 10 * BOUND


def test_the_comparison_sees_running_means_of_the_replica(monkeypatch):
    right, everybody = FeatureStatisticsUncertainty.update_means, backend.global_sum

    def own(*args):
        backend.global_sum = lambda value: value  # no replica waits in here: they run one after another
        right(*args)
        backend.global_sum = everybody

    def mutated():
        monkeypatch.setattr(FeatureStatisticsUncertainty, "update_means", own)
        return build("domain", ONE)

    x, y = tiny_batch()
    on.draw_by_sample(monkeypatch)
    expected = on.train(tf.distribute.get_strategy(), lambda: build("domain", ONE), x, y)
    found = on.train(on.mirrored(2), mutated, x, y)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_state(found.state, expected.state)


# DSU: the layer in a plain model, whose spread has a gradient.


def dsu(perturb=True):
    image = keras.Input((8, 8, 2), name="image")
    experiment = keras.Input((), name="experiment", dtype="int32")
    x = keras.layers.Conv2D(3, 3, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.01))(image)
    if perturb:
        x = FeatureStatisticsUncertainty(radius=None, seed=1)(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="tanh")(x))
    x = keras.layers.Dense(5, activation="softmax")(x)
    return keras.Model({"image": image, "experiment": experiment}, x)


@pytest.mark.parametrize("mutant", [None, "global_sum"])
def test_dsu_has_the_gradient_through_the_spread_of_all_replicas(monkeypatch, mutant):
    x, y = tiny_batch()
    on.draw_by_sample(monkeypatch)
    expected = on.train(tf.distribute.get_strategy(), dsu, x, y)
    if mutant:
        detached(mutant)(monkeypatch, None)
    found = on.train(on.mirrored(2), dsu, x, y)
    if mutant:
        assert on.distance(found.gradients, expected.gradients) > 10 * BOUND
    else:
        assert on.distance(found.gradients, expected.gradients) <= BOUND
        check_logs(found.history, expected.history)


# Noise.


def test_replicas_draw_different_noise():
    strategy = on.mirrored(2)
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
    with on.mirrored(2).scope():
        model = tiny_model()
        with pytest.raises(ValueError, match="jit_compile=True does not work under a tf.distribute strategy"):
            model.compile("adam", jit_compile=True)


# What replicas send each other in a step.


def floats_sent(model):
    """Numbers that a replica gives to each collective operation of one compiled step on four samples of its own; for
    rows that are gathered the number of such operations is all that the graph knows."""
    strategy = on.mirrored(2, collectives=True)
    with strategy.scope():
        built = model()
        loss = {} if hasattr(built, "ramp") else {"loss": "sparse_categorical_crossentropy"}
        built.compile(optimizer=keras.optimizers.SGD(), **loss)
        built.optimizer.build(built.trainable_variables)
    batch = next(iter(strategy.experimental_distribute_dataset(on.pipeline(*tiny_batch(), 8))))
    step = tf.function(lambda batch: strategy.run(built.train_step, args=(batch,))).get_concrete_function(batch)
    operations = [op for op in step.graph.get_operations() if op.device.endswith("CPU:0")]
    reduced = [int(np.prod(op.inputs[0].shape)) for op in operations if op.type == "CollectiveReduceV2"]
    gathered = sum(op.type == "CollectiveGatherV2" and op.inputs[0].dtype == tf.float32 for op in operations)
    return sorted(reduced), gathered, sum(int(np.prod(v.shape)) for v in built.trainable_variables)


def test_plain_training_sends_its_gradients():
    sent, gathered, weights = floats_sent(lambda: dsu(perturb=False))
    assert (sent, gathered) == ([weights], 0)


@pytest.mark.parametrize(
    "structure, statistics, rows",
    [
        ("diagonal", [1, 6, 6], 0),  # of 3 channels: count, then 2 C sums and 2 C sums of squares
        ("low_rank", [], 1),  # 2 C numbers a sample
        ("domain", [3, 18], 0),  # of 3 experiments: counts and sums
    ],
)
def test_a_step_sends_its_gradients_and_the_statistics(structure, statistics, rows):
    sent, gathered, weights = floats_sent(lambda: tiny_model(structure, 2, ONE, smooth_backbone(), embedding_dim=None))
    batch_and_logs = [1] * 6
    assert sent == sorted([weights, *statistics, *batch_and_logs])
    assert gathered == rows
