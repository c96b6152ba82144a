import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_abra import uncertainty as maths
from keras_abra.feature_statistics import feature_statistics, shift_statistics
from keras_abra.layers import FeatureStatisticsUncertainty
from tests.gradients import gradient

STRUCTURES = ["diagonal", "low_rank", "domain"]


def features(batch=6, channels=4, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(batch, 5, 5, channels)) * random.uniform(0.5, 2, (batch, 1, 1, channels))
    return (x + random.normal(size=(batch, 1, 1, channels))).astype("float32")


def built(structure="diagonal", shape=(6, 5, 5, 4), **kwargs):
    if structure == "domain":
        kwargs = {"num_experiments": 3, **kwargs}
    layer = FeatureStatisticsUncertainty(structure, seed=1, **kwargs)
    layer.build(shape)
    return layer


def measured(layer, x, experiment=None):
    statistics = ops.concatenate(feature_statistics(x), axis=-1)
    if layer.structure == "domain":
        layer.update_means(statistics, experiment)
    return layer.uncertainty(statistics, experiment)


EXPERIMENT = np.array([0, 1, 2, 0, 1, 2], "int32")


def test_zero_offsets_change_nothing_and_have_a_gradient():
    x = features()
    outputs, _ = shift_statistics(x, ops.zeros((6, 8)))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(outputs), x)
    weight = features(seed=1)
    slope = gradient(lambda d: shift_statistics(x, d)[0] * ops.convert_to_tensor(weight), np.zeros((6, 8), "float32"))
    mu, sigma = x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)
    np.testing.assert_allclose(slope[:, :4], weight.sum((1, 2)), rtol=1e-4, atol=1e-4)
    standard = (x - mu[:, None, None]) / sigma[:, None, None]
    np.testing.assert_allclose(slope[:, 4:], (weight * standard).sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_offsets_move_the_statistics_by_that_much():
    x, offsets = features(), np.full((6, 8), 0.25, "float32")
    outputs, before = shift_statistics(x, offsets)
    after = np.concatenate([keras.ops.convert_to_numpy(s) for s in feature_statistics(outputs)], axis=1)
    np.testing.assert_allclose(after - keras.ops.convert_to_numpy(before), 0.25, atol=1e-4)


def test_a_perturbed_deviation_stays_between_a_tenth_and_ten_times_its_own():
    x = features()
    sigma = np.sqrt(x.var((1, 2)) + 1e-6)
    for offset, factor in ((-100.0, 0.1), (1000.0, 10.0)):
        outputs, _ = shift_statistics(x, np.full((6, 8), offset, "float32"))
        np.testing.assert_allclose(np.std(keras.ops.convert_to_numpy(outputs), (1, 2)), factor * sigma, rtol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_grey_levels_as_integers_are_refused(training):
    with pytest.raises(ValueError, match="takes feature maps of a float type.* Received: uint8. Put keras.layers.Resc"):
        built()(np.full((6, 5, 5, 4), 200, "uint8"), training=training)
    with pytest.raises(ValueError, match="Received: uint8"):
        FeatureStatisticsUncertainty()(keras.Input((5, 5, 4), dtype="uint8"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_symbolic_output_has_the_type_of_the_real_one(dtype):
    image = keras.Input((5, 5, 4), dtype=dtype)
    output = FeatureStatisticsUncertainty(dtype="mixed_float16")(image)
    found = keras.Model(image, output)(features().astype(dtype), training=True)
    assert output.dtype == dtype == keras.backend.standardize_dtype(found.dtype)


def test_without_training_it_is_the_identity():
    layer = built("domain")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(features())), features())


def test_one_sample_has_no_spread_and_stays():
    for structure in ("diagonal", "low_rank"):
        x = features(batch=1)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(built(structure)(x, training=True)), x)


def test_one_experiment_alone_has_no_direction():
    layer, x = built("domain"), features()
    same = np.zeros(6, "int32")
    layer(x, experiment=same, training=True)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x, experiment=same, training=True)), x)


def test_the_diagonal_spread_is_the_standard_deviation_over_the_batch():
    x = features()
    statistics = np.concatenate([x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)], axis=1)
    spread = keras.ops.convert_to_numpy(measured(built(), x).spread)[0]
    np.testing.assert_allclose(spread, statistics.std(0, ddof=1), rtol=1e-4)


def test_low_rank_factors_give_the_empirical_covariance():
    x = features()
    statistics = np.concatenate([x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)], axis=1)
    factors = keras.ops.convert_to_numpy(measured(built("low_rank"), x).factors)
    np.testing.assert_allclose(factors.T @ factors, np.cov(statistics.T), rtol=1e-3, atol=1e-5)


def test_domain_factors_give_the_covariance_of_the_experiments_means():
    x = features()
    statistics = np.concatenate([x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)], axis=1)
    means = np.stack([statistics[EXPERIMENT == e].mean(0) for e in range(3)])
    factors = keras.ops.convert_to_numpy(measured(built("domain"), x, EXPERIMENT).factors)
    np.testing.assert_allclose(factors.T @ factors, np.cov(means.T), rtol=1e-3, atol=1e-5)


def test_means_are_centred_within_their_group():
    x, experiment = features(batch=8), np.arange(8, dtype="int32") % 4
    layer = built("domain", (8, 5, 5, 4), num_experiments=4, experiment_groups=[0, 0, 1, 1])
    statistics = np.concatenate([x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)], axis=1)
    means = np.stack([statistics[experiment == e].mean(0) for e in range(4)])
    centred = means - np.stack([means[:2].mean(0)] * 2 + [means[2:].mean(0)] * 2)
    factors = keras.ops.convert_to_numpy(measured(layer, x, experiment).factors)
    np.testing.assert_allclose(factors, centred / np.sqrt(4 - 2), rtol=1e-3, atol=1e-5)


def test_running_means_start_at_first_sight_and_then_move_by_a_tenth():
    layer = built("domain")
    ones, threes = ops.ones((2, 8)), 3 * ops.ones((2, 8))
    layer.update_means(ones, np.array([0, 0]))
    layer.update_means(threes, np.array([0, 2]))
    means = keras.ops.convert_to_numpy(layer.experiment_means)
    np.testing.assert_allclose(means[:, 0], [0.9 * 1 + 0.1 * 3, 0, 3], rtol=1e-5)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.experiments_seen), [1, 0, 1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_draw_has_the_radius_whatever_the_structure(structure):
    layer, x = built(structure, radius=0.7), features()
    uncertain = measured(layer, x, EXPERIMENT)
    size = maths.size(uncertain, layer.draw(uncertain, 6))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(size), 0.7 * np.sqrt(8), rtol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_normal_draw_has_the_expected_size(structure):
    layer, x = built(structure, radius=None), features()
    uncertain = measured(layer, x, EXPERIMENT)
    squares = keras.ops.convert_to_numpy(maths.size(uncertain, layer.draw(uncertain, 4000))) ** 2
    assert abs(squares.mean() - 8) < 5 * squares.std() / np.sqrt(4000)


def test_statistics_that_do_not_vary_are_not_counted_and_not_moved():
    x = features()
    x[..., 0] = 2.0
    layer = built(radius=1.0)
    uncertain = measured(layer, x)
    assert float(layer.length(uncertain)) == pytest.approx(np.sqrt(6))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x, training=True))[..., 0], 2.0)


def test_samples_are_perturbed_each_in_its_own_way():
    x = np.repeat(features(batch=1), 4, axis=0)
    offsets = maths.offsets(measured(built(), features()), built().draw(measured(built(), features()), 4))
    outputs = keras.ops.convert_to_numpy(shift_statistics(x, offsets)[0])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-2


@pytest.mark.parametrize("structure", STRUCTURES)
def test_ascent_stays_on_the_sphere_and_climbs(structure):
    layer, x = built(structure), features()
    uncertain = measured(layer, x, EXPERIMENT)
    start, length = layer.draw(uncertain, 6), layer.length(uncertain)
    slope = np.random.default_rng(5).normal(size=(6, 8)).astype("float32")
    end = maths.ascend(uncertain, start, slope, length, 0.5)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(maths.size(uncertain, end)), float(length), rtol=1e-4)
    climb = ops.sum((maths.offsets(uncertain, end) - maths.offsets(uncertain, start)) * slope, axis=1)
    assert keras.ops.convert_to_numpy(climb).mean() > 0.05


@pytest.mark.parametrize("step_size", [0.5, 2.0])
def test_how_much_of_the_worst_case_is_chance(step_size):
    """The README: a step of eta leaves a cosine of 1 / sqrt(1 + eta^2) to the draw it started from."""
    layer, x = built(shape=(64, 4, 4, 64)), np.random.default_rng(6).normal(size=(64, 4, 4, 64)).astype("float32")
    uncertain = measured(layer, x)
    start, length = layer.draw(uncertain, 64), layer.length(uncertain)
    slope = np.random.default_rng(7).normal(size=(64, 128)).astype("float32")
    end = maths.ascend(uncertain, start, slope, length, step_size)
    before, after = (
        np.array(keras.ops.convert_to_numpy(maths.offsets(uncertain, d) / uncertain.spread)) for d in (start, end)
    )
    cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosines.mean() == pytest.approx(1 / np.sqrt(1 + step_size**2), abs=0.02)


def test_rows_without_a_usable_gradient_keep_the_random_start():
    layer, x = built(), features()
    uncertain = measured(layer, x)
    start, length = layer.draw(uncertain, 6), layer.length(uncertain)
    slope = np.ones((6, 8), "float32")
    slope[0], slope[1, 3], slope[2, 0], slope[3] = 0, np.nan, np.inf, 1e-30
    end = keras.ops.convert_to_numpy(maths.ascend(uncertain, start, slope, length, 0.5))
    start = keras.ops.convert_to_numpy(start)
    np.testing.assert_allclose(end[:3], start[:3], rtol=1e-6)
    assert np.isfinite(end).all()
    assert (np.abs(end[3:] - start[3:]).max(1) > 1e-3).all()  # a tiny gradient is a direction like any other


def test_a_row_that_is_not_finite_spoils_the_shared_slope_of_its_own_experiment_alone():
    layer = built(shared_by="experiment")
    slopes = np.arange(48, dtype="float32").reshape(6, 8)
    slopes[1, 2], slopes[4] = np.nan, 1.0  # both of experiment 1
    found = keras.ops.convert_to_numpy(layer.shared_slopes(slopes, EXPERIMENT))
    assert not np.isfinite(found[[1, 4]]).any()
    for rows in ([0, 3], [2, 5]):
        np.testing.assert_allclose(found[rows], np.tile(slopes[rows].sum(0), (2, 1)))


def test_a_step_of_zero_keeps_the_start():
    layer, x = built(), features()
    uncertain = measured(layer, x)
    start = layer.draw(uncertain, 6)
    end = maths.ascend(uncertain, start, np.ones((6, 8), "float32"), layer.length(uncertain), 0.0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(end), keras.ops.convert_to_numpy(start), rtol=1e-5)


def test_without_radius_it_is_dsu():
    """DSU: beta = mu + eps S_mu, gamma = sigma + eps S_sigma, but for our clip; and the spread has a gradient."""
    layer, x = built(radius=None, shape=(6, 5, 5, 4)), features()
    mu, sigma = x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)
    other = built(radius=None)
    eps = keras.ops.convert_to_numpy(other.draw(measured(other, x), 6))
    beta, gamma = mu + eps[:, :4] * mu.std(0, ddof=1), sigma + eps[:, 4:] * sigma.std(0, ddof=1)
    free = np.broadcast_to((gamma == np.clip(gamma, 0.1 * sigma, 10 * sigma))[:, None, None], x.shape)
    expected = (x - mu[:, None, None]) / sigma[:, None, None] * gamma[:, None, None] + beta[:, None, None]
    found = keras.ops.convert_to_numpy(layer(x, training=True))
    assert free.mean() > 0.9
    np.testing.assert_allclose(found[free], expected[free], rtol=1e-3, atol=1e-4)

    # What one sample is given moves the others through the spread; a fixed radius keeps samples apart.
    def through_others(radius):
        layer = built(radius=radius)
        return np.abs(gradient(lambda x: layer(x, training=True)[0], x)[1:]).max()

    assert through_others(None) > 1e-4
    assert through_others(0.5) == 0


def test_with_probability_one_half_it_acts_in_about_half_of_the_steps():
    layer, x = built(probability=0.5), features()
    moved = [np.abs(keras.ops.convert_to_numpy(layer(x, training=True)) - x).max() > 0 for _ in range(60)]
    assert 15 < sum(moved) < 45


def test_a_share_of_the_samples_is_perturbed():
    x = np.repeat(features(batch=6), 100, axis=0)
    moved = np.abs(keras.ops.convert_to_numpy(built(perturbed_share=0.3)(x, training=True)) - x).max((1, 2, 3)) > 0
    assert 120 < moved.sum() < 240


@pytest.mark.parametrize("radius", [0.7, None])
@pytest.mark.parametrize("structure", ["diagonal", "domain"])
def test_samples_of_one_experiment_share_one_draw_of_the_same_size(structure, radius):
    layer, x = built(structure, radius=radius, shared_by="experiment"), features()
    uncertain, experiment = measured(layer, x, EXPERIMENT), np.arange(3000, dtype="int32") // 3
    shared = layer.share(uncertain, layer.draw(uncertain, 3000), experiment)
    size = keras.ops.convert_to_numpy(maths.size(uncertain, shared))[::3]
    shared = keras.ops.convert_to_numpy(shared).reshape(1000, 3, -1)
    np.testing.assert_allclose(shared, np.repeat(shared[:, :1], 3, axis=1), rtol=1e-4, atol=1e-5)
    assert np.abs(shared[1:, 0] - shared[:-1, 0]).max(1).min() > 1e-2
    if radius is None:
        assert abs((size**2).mean() - 8) < 5 * (size**2).std() / np.sqrt(1000)
    else:
        np.testing.assert_allclose(size, 0.7 * np.sqrt(8), rtol=1e-4)


def test_the_layer_by_itself_shares_its_draw_too():
    x = np.concatenate([features(batch=3)] * 2)
    shared, own = (
        keras.ops.convert_to_numpy(built(shared_by=by)(x, EXPERIMENT, training=True)) for by in ("experiment", None)
    )
    np.testing.assert_allclose(shared[:3], shared[3:], atol=1e-5)
    assert np.abs(own[:3] - own[3:]).max((1, 2, 3)).min() > 1e-2


def test_draws_differ_from_step_to_step_and_repeat_with_the_seed():
    x = features()
    first, second = built(), built()
    a, b = (keras.ops.convert_to_numpy(first(x, training=True)) for _ in range(2))
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(a, keras.ops.convert_to_numpy(second(x, training=True)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_statistics_are_float32_under_mixed_precision(policy):
    x = features() * 100 + 300  # squares overflow float16
    layer = FeatureStatisticsUncertainty(seed=1, dtype=policy)
    outputs = layer(ops.cast(x, policy.removeprefix("mixed_")), training=True)
    assert keras.backend.standardize_dtype(outputs.dtype) == policy.removeprefix("mixed_")
    reference = keras.ops.convert_to_numpy(built()(x, training=True))
    outputs = keras.ops.convert_to_numpy(ops.cast(outputs, "float32"))
    np.testing.assert_allclose(outputs, reference, rtol=0.05, atol=0.05 * np.abs(reference).max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "full"}, "`structure` must be one of"),
        ({"radius": 0}, "`radius` must be a positive number"),
        ({"radius": "big"}, "`radius` must be a positive number"),
        ({"probability": 0.0}, "`probability` must lie in"),
        ({"perturbed_share": 1.5}, "`perturbed_share` must lie in"),
        ({"start": "one"}, "`start` must be one of"),
        ({"start": "zero", "steps": 0}, "needs an ascent step"),
        ({"shared_by": "plate"}, "`shared_by` must be None or"),
        ({"search_loss": "focal"}, "`search_loss` must be one of"),
        ({"adversary_every": 0}, "`adversary_every` must be an integer"),
        ({"ramp_radius": 1}, "`ramp_radius` must be True or False"),
        ({"learned_scale": 1}, "`learned_scale` must be True or False"),
        ({"learned_scale": True, "steps": 1}, "`learned_scale` needs steps=0, .* Received: steps=1"),
        ({"learned_scale": True, "radius": None}, "`learned_scale` needs .* radius=None"),
        ({"learned_scale": True, "structure": "low_rank"}, "`learned_scale` needs .* structure='low_rank'"),
        ({"steps": -1}, "`steps` must be an integer"),
        ({"steps": 1.5}, "`steps` must be an integer"),
        ({"step_size": -0.1}, "`step_size` must be a number"),
        ({"structure": "domain"}, "`num_experiments` must be an integer of at least 2"),
        ({"structure": "domain", "num_experiments": 1}, "`num_experiments` must be an integer of at least 2"),
        (
            {"structure": "domain", "num_experiments": 2, "experiment_groups": [1, 0]},
            "nothing would be perturbed.* Received: \\[1, 0\\]",
        ),
        ({"synchronized": None}, "`synchronized` must be True or False"),
        ({"num_experiments": 3}, "belong to structure 'domain'"),
        (
            {"structure": "domain", "num_experiments": 3, "experiment_groups": [0, 1]},
            "one group number >= 0 for each of the 3",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureStatisticsUncertainty(**arguments)


@pytest.mark.parametrize("option", [{"step_size": 2.0}, {"search_loss": "softmax"}, {"adversary_every": 4}])
def test_options_of_an_adversary_that_does_not_act_are_named(option):
    with pytest.warns(UserWarning, match="belong to the adversary.*`steps` is 0"):
        FeatureStatisticsUncertainty(**option)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureStatisticsUncertainty(steps=1, **option)
        FeatureStatisticsUncertainty()


def test_the_default_structure_is_that_of_the_ladder():
    """Low-rank with an adversary, else diagonal, as the jobs have it; what is named stays."""
    chosen = {steps: FeatureStatisticsUncertainty(steps=steps) for steps in (0, 1, 3)}
    assert {steps: layer.structure for steps, layer in chosen.items()} == {0: "diagonal", 1: "low_rank", 3: "low_rank"}
    assert FeatureStatisticsUncertainty("diagonal", steps=1).structure == "diagonal"
    assert type(chosen[1]).from_config(chosen[1].get_config()).structure == "low_rank"


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match="needs feature maps"):
        FeatureStatisticsUncertainty()(np.zeros((2, 3), "float32"), training=True)
    with pytest.raises(ValueError, match="needs experiment ids in training"):
        built("domain")(features(), training=True)
    with pytest.raises(ValueError, match="shared_by='experiment' and needs experiment ids"):
        built(shared_by="experiment")(features(), training=True)


def test_the_config_gives_the_same_layer():
    arguments = {"radius": 0.3, "probability": 0.5, "steps": 2, "step_size": 0.1, "synchronized": False}
    arguments |= {"perturbed_share": 0.5, "start": "zero", "shared_by": "experiment", "search_loss": "softmax"}
    arguments |= {"adversary_every": 2, "ramp_radius": True}
    layer = built("domain", experiment_groups=[0, 0, 1], **arguments)
    assert {name: layer.get_config()[name] for name in arguments} == arguments
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == layer.get_config()

    layer = built(learned_scale=True)
    assert keras.layers.deserialize(keras.layers.serialize(layer)).learned_scale


@pytest.mark.parametrize("structure", ["diagonal", "domain"])
def test_a_learned_scale_shares_the_size_out_and_keeps_it(structure):
    layer = built(structure, learned_scale=True, radius=0.4)
    uncertain = measured(layer, features(), EXPERIMENT)
    points = layer.draw(uncertain, 6)
    log_scale = np.linspace(-3, 3, layer.log_scale.shape[0]).astype("float32")
    scaled = maths.stretch(uncertain, points, ops.convert_to_tensor(log_scale))
    np.testing.assert_allclose(maths.size(uncertain, scaled), maths.size(uncertain, points), rtol=1e-5)
    ratio = keras.ops.convert_to_numpy(scaled / points)
    np.testing.assert_allclose(ratio / ratio[:, :1], [np.exp(2 * np.tanh(log_scale) - 2 * np.tanh(-3))] * 6, rtol=1e-4)
    assert np.all(keras.ops.convert_to_numpy(maths.stretch(uncertain, points, layer.log_scale.value) == points))


def test_a_learned_scale_by_itself_climbs_the_loss_that_the_rest_descends():
    x, weight = features(), features(seed=1)

    def loss(log_scale):
        layer = built(learned_scale=True, radius=0.4)  # its first draw
        with keras.StatelessScope(state_mapping=[(layer.log_scale, ops.convert_to_tensor(log_scale))]):
            return ops.sum(layer(x, training=True) * ops.convert_to_tensor(weight))

    start = np.linspace(-0.5, 0.5, 8).astype("float32")
    slope, step = gradient(loss, start), 1e-2
    for i in range(8):
        change = step * np.eye(8, dtype="float32")[i]
        expected = (float(loss(start + change)) - float(loss(start - change))) / (2 * step)
        assert -slope[i] == pytest.approx(expected, rel=0.03, abs=0.03)
    assert np.abs(slope).max() > 0.3


def test_it_trains_inside_a_plain_model():
    image = keras.Input((8, 8, 2))
    x = FeatureStatisticsUncertainty(radius=None, probability=0.5, seed=0)(keras.layers.Conv2D(3, 3)(image))
    model = keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.random.default_rng(0).normal(size=(8, 8, 8, 2)).astype("float32"), np.arange(8) % 2
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"][0])
