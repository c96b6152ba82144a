import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.losses import DistributionAlignment, coral, jensen_shannon, mmd, symmetric_kl
from tests.gradients import finite_difference, gradient

RANDOM = np.random.default_rng(4)
CLEAN = RANDOM.normal(size=(6, 5)).astype("float32")
PERTURBED = (CLEAN + RANDOM.normal(size=(6, 5))).astype("float32")
LOGIT_KINDS = ["symmetric_kl", "jensen_shannon"]
KINDS = [*LOGIT_KINDS, "coral", "mmd"]


def value(kind, clean, perturbed, **kwargs):
    return float(DistributionAlignment(kind, **kwargs)(clean, perturbed))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def plain_symmetric_kl(clean, perturbed):
    total = 0.0
    for a, b in zip(clean, perturbed, strict=True):
        p, q = softmax(a), softmax(b)
        total += 0.5 * np.sum(p * np.log(p / q)) + 0.5 * np.sum(q * np.log(q / p))
    return total / len(clean)


def plain_jensen_shannon(clean, perturbed):
    total = 0.0
    for a, b in zip(clean, perturbed, strict=True):
        p, q = softmax(a), softmax(b)
        mixture = np.clip((p + q) / 2, 1e-7, 1.0)
        total += 0.5 * np.sum(p * np.log(p / mixture)) + 0.5 * np.sum(q * np.log(q / mixture))
    return total / len(clean)


def plain_coral(clean, perturbed):
    d = clean.shape[1]
    total = 0.0
    for i in range(d):
        for j in range(d):
            c = [np.sum((x[:, i] - x[:, i].mean()) * (x[:, j] - x[:, j].mean())) for x in (clean, perturbed)]
            total += ((c[0] - c[1]) / (len(clean) - 1)) ** 2
    return total / (4 * d * d)


def plain_bandwidth(clean, perturbed):
    rows = np.concatenate([clean, perturbed])
    return np.mean([np.sum((a - b) ** 2) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])


def plain_mmd(clean, perturbed, h=None):
    h = plain_bandwidth(clean, perturbed) if h is None else h

    def k(a, b):
        return np.mean([np.exp(-np.sum((a - b) ** 2) / (factor * h)) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)])

    total = 0.0
    for i in range(len(clean)):
        for j in range(len(clean)):
            total += k(clean[i], clean[j]) + k(perturbed[i], perturbed[j]) - 2 * k(clean[i], perturbed[j])
    return total / len(clean) ** 2


PLAIN = {
    "symmetric_kl": plain_symmetric_kl,
    "jensen_shannon": plain_jensen_shannon,
    "coral": plain_coral,
    "mmd": plain_mmd,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_is_zero_with_zero_gradient_where_nothing_differs(kind, size):
    x = size * CLEAN
    assert abs(value(kind, x, x)) < 1e-6
    slope = gradient(lambda z: DistributionAlignment(kind, two_sided=False)(x, z), x)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_is_symmetric_and_not_negative(kind):
    for size in (1e-3, 0.1, 1.0, 10.0):
        there, back = value(kind, CLEAN, CLEAN + size * PERTURBED), value(kind, CLEAN + size * PERTURBED, CLEAN)
        assert there >= -1e-6
        np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-6)
    assert value(kind, CLEAN, PERTURBED) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_golden_values(kind):
    expected = PLAIN[kind](CLEAN.astype("float64"), PERTURBED.astype("float64"))
    np.testing.assert_allclose(value(kind, CLEAN, PERTURBED), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_formula(kind):
    clean, perturbed = CLEAN.astype("float64"), PERTURBED.astype("float64")
    plain = PLAIN[kind]
    if kind == "mmd":  # the bandwidth is a constant in the gradient
        h = plain_bandwidth(clean, perturbed)
        plain = lambda a, b: plain_mmd(a, b, h)  # noqa: E731
    slope = gradient(lambda z: DistributionAlignment(kind)(CLEAN, z), PERTURBED)
    np.testing.assert_allclose(slope, finite_difference(lambda z: plain(clean, z), perturbed), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_a_constant_added_to_the_logits_changes_nothing(kind):
    shift = np.array([[3.0], [-2.0], [0.5], [7.0], [0.0], [1.0]], "float32")
    np.testing.assert_allclose(value(kind, CLEAN + shift, PERTURBED), value(kind, CLEAN, PERTURBED), rtol=1e-4)


@pytest.mark.parametrize("kind", ["coral", "mmd"])
def test_embeddings_may_be_shifted_together_and_reordered(kind):
    before = value(kind, CLEAN, PERTURBED)
    np.testing.assert_allclose(value(kind, CLEAN + 5.0, PERTURBED + 5.0), before, rtol=1e-4)
    np.testing.assert_allclose(value(kind, CLEAN[::-1].copy(), PERTURBED), before, rtol=1e-4)


def test_coral_sees_covariances_only_and_mmd_sees_means_too():
    assert value("coral", CLEAN, CLEAN + 2.0) < 1e-6
    assert value("mmd", CLEAN, CLEAN + 2.0) > 0.1


def test_jensen_shannon_lies_below_log_two():
    far = np.array([[50.0, 0.0, 0.0]], "float32"), np.array([[0.0, 50.0, 0.0]], "float32")
    np.testing.assert_allclose(value("jensen_shannon", *far), np.log(2.0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_one_sided_holds_the_clean_side_and_two_sided_draws_both(kind, two_sided):
    alignment = DistributionAlignment(kind, two_sided=two_sided)
    assert np.any(gradient(lambda z: alignment(z, PERTURBED), CLEAN) != 0.0) == two_sided
    assert np.any(gradient(lambda z: alignment(CLEAN, z), PERTURBED) != 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_returns_one_value_per_sample(kind):
    values = ops.convert_to_numpy(DistributionAlignment(kind, reduction=None)(CLEAN, PERTURBED))
    assert values.shape == (6,)
    np.testing.assert_allclose(values.mean(), value(kind, CLEAN, PERTURBED), rtol=1e-5)
    if kind in LOGIT_KINDS:
        alone = [value(kind, CLEAN[i : i + 1], PERTURBED[i : i + 1]) for i in range(6)]
        np.testing.assert_allclose(values, alone, rtol=1e-4, atol=1e-6)
    else:
        assert (values == values[0]).all()


def test_functions_stand_alone():
    assert ops.shape(symmetric_kl(CLEAN, PERTURBED)) == ops.shape(jensen_shannon(CLEAN, PERTURBED)) == (6,)
    assert ops.shape(coral(CLEAN, PERTURBED)) == ops.shape(mmd(CLEAN, PERTURBED)) == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("a", "b"), [(1, -1), (1, 0), (0, 1), (1, 1), (0, 0)])
def test_is_finite_at_extremes(kind, a, b):
    extreme = np.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], "float32")
    clean, perturbed = a * extreme, b * extreme
    alignment = DistributionAlignment(kind, two_sided=True)
    assert np.isfinite(float(alignment(clean, perturbed)))
    assert np.isfinite(gradient(lambda z: alignment(z, perturbed), clean)).all()
    assert np.isfinite(gradient(lambda z: alignment(clean, z), perturbed)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_finite(kind):
    assert np.isfinite(value(kind, CLEAN[:1], PERTURBED[:1]))
    assert np.isfinite(gradient(lambda z: DistributionAlignment(kind)(CLEAN[:1], z), PERTURBED[:1])).all()
    assert kind != "coral" or value(kind, CLEAN[:1], PERTURBED[:1]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_collapsed_embeddings_are_finite(kind):
    x = np.full((6, 5), 0.1234567, "float32")
    assert abs(value(kind, x, x)) < 1e-6
    assert np.isfinite(gradient(lambda z: DistributionAlignment(kind)(x, z), x)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_cast_up(kind, half):
    a, b = ops.cast(100.0 * CLEAN, half), ops.cast(100.0 * PERTURBED, half)
    for result in (DistributionAlignment(kind)(a, b), DistributionAlignment(kind).call(a, b)):
        assert keras.backend.standardize_dtype(result.dtype) == "float32"
        assert np.isfinite(ops.convert_to_numpy(result)).all()
    expected = value(kind, ops.cast(a, "float32"), ops.cast(b, "float32"))
    np.testing.assert_allclose(float(DistributionAlignment(kind)(a, b)), expected, rtol=1e-5)


def test_weight_is_left_to_the_model():
    assert value("symmetric_kl", CLEAN, PERTURBED, weight=6.0) == value("symmetric_kl", CLEAN, PERTURBED)


def test_says_what_it_compares():
    assert [DistributionAlignment(kind).on for kind in KINDS] == ["logits", "logits", "embeddings", "embeddings"]


def test_unknown_kind_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'symmetric_kl', 'jensen_shannon', 'coral', 'mmd'.*kind='kl'"):
        DistributionAlignment("kl")


@pytest.mark.parametrize("weight", [-0.1, np.nan, np.inf])
def test_weight_is_not_negative(weight):
    with pytest.raises(ValueError, match="`weight` must be a finite number >= 0"):
        DistributionAlignment(weight=weight)


@pytest.mark.parametrize("argument", ["two_sided", "synchronized"])
def test_a_switch_is_a_bool(argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be True or False"):
        DistributionAlignment(**{argument: "yes"})


@pytest.mark.parametrize("shape", [(5, 5), (6, 4), (6,), (6, 5, 1)])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises(ValueError, match="two logits of one shape"):
        DistributionAlignment()(CLEAN, np.zeros(shape, "float32"))


def test_serialization_round_trip():
    alignment = DistributionAlignment("mmd", 2.5, two_sided=True, synchronized=False, reduction="sum", name="agreement")
    config = keras.losses.serialize(alignment)
    assert config["registered_name"] == "keras_abra>DistributionAlignment"
    again = keras.losses.deserialize(config)
    assert type(again) is DistributionAlignment and again.get_config() == alignment.get_config()
    assert (again.kind, again.weight, again.two_sided, again.synchronized) == ("mmd", 2.5, True, False)
