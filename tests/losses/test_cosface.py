import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.losses import ArcFace, CosFace, cosface_logits
from tests.gradients import finite_difference, gradient

RANDOM = np.random.default_rng(2)
COSINE = RANDOM.uniform(-1.0, 1.0, size=(6, 5)).astype("float32")
LABELS = np.array([0, 1, 2, 3, 4, 0])


def plain_loss(labels, cosine, margin, scale):
    values = []
    for c, y in zip(np.array(cosine, "float64"), labels, strict=True):
        z = scale * c
        z[y] = scale * (c[y] - margin)
        values.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[y])
    return np.array(values)


def test_margin_zero_is_exactly_the_scaled_cosine():
    for margin in (0.0, ops.convert_to_tensor(0.0)):
        logits = ops.convert_to_numpy(cosface_logits(LABELS, COSINE, margin, 30.0))
        np.testing.assert_array_equal(logits, np.float32(30.0) * COSINE)


def test_agrees_with_arcface_where_neither_has_a_margin():
    one, other = CosFace(margin=0.0), ArcFace(margin=0.0)
    np.testing.assert_allclose(float(one(LABELS, COSINE)), float(other(LABELS, COSINE)), rtol=1e-6)


def test_the_margin_comes_off_the_true_class_only():
    moved = ops.convert_to_numpy(cosface_logits(LABELS, COSINE, 0.25, 2.0)) - 2.0 * COSINE
    np.testing.assert_allclose(moved, -0.5 * np.eye(5)[LABELS], atol=1e-6)


def test_a_larger_margin_costs_more():
    costs = [ops.convert_to_numpy(CosFace(margin=m).call(LABELS, COSINE)) for m in (0.0, 0.2, 0.5, 1.0)]
    assert (np.diff(costs, axis=0) > 0.0).all()


@pytest.mark.parametrize("margin", [0.0, 0.35, 1.0])
def test_golden_values_and_gradient(margin):
    loss = CosFace(margin=margin, scale=10.0, reduction="sum")
    np.testing.assert_allclose(float(loss(LABELS, COSINE)), plain_loss(LABELS, COSINE, margin, 10.0).sum(), rtol=1e-5)
    expected = finite_difference(lambda c: plain_loss(LABELS, c, margin, 10.0), COSINE)
    np.testing.assert_allclose(gradient(lambda c: loss(LABELS, c), COSINE), expected, rtol=1e-3, atol=1e-4)


def test_each_class_of_a_mixed_sample_has_its_share_of_the_margin():
    shares = np.stack([0.25 * np.eye(5)[a] + 0.75 * np.eye(5)[b] for a, b in zip(LABELS, LABELS[::-1], strict=True)])
    moved = ops.convert_to_numpy(cosface_logits(shares, COSINE, 0.25, 2.0)) - 2.0 * COSINE
    np.testing.assert_allclose(moved, -0.5 * shares, atol=1e-6)
    expected = keras.losses.categorical_crossentropy(shares, 2.0 * COSINE - 0.5 * shares, from_logits=True)
    actual = CosFace(margin=0.25, scale=2.0, reduction=None)(shares, COSINE)
    np.testing.assert_allclose(ops.convert_to_numpy(actual), ops.convert_to_numpy(expected), rtol=1e-5)


def test_ramp_scales_the_margin():
    logits = CosFace(margin=0.4, scale=10.0).margin_logits(LABELS, COSINE, ramp=ops.convert_to_tensor(0.5))
    expected = cosface_logits(LABELS, COSINE, 0.2, 10.0)
    np.testing.assert_allclose(ops.convert_to_numpy(logits), ops.convert_to_numpy(expected), atol=1e-5)


def test_a_label_that_is_no_class_is_nan():
    values = ops.convert_to_numpy(CosFace().call(np.array([0, -1, 2, 5, 4, 0]), COSINE))
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, True, False, False])


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_cosines_are_cast_up(half):
    loss = CosFace()(LABELS, ops.cast(COSINE, half))
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    rounded = ops.convert_to_numpy(ops.cast(ops.cast(COSINE, half), "float32"))
    np.testing.assert_allclose(float(loss), plain_loss(LABELS, rounded, 0.35, 30.0).mean(), rtol=1e-5)


@pytest.mark.parametrize("margin", [-0.1, 1.1, 28.6, np.nan, None])
def test_margin_is_a_difference_of_cosines(margin):
    with pytest.raises(ValueError, match=r"difference of cosines, in \[0, 1\], not an angle"):
        CosFace(margin=margin)


def test_scale_is_positive():
    with pytest.raises(ValueError, match="`scale` must be a positive, finite number"):
        CosFace(scale=0.0)


def test_serialization_round_trip():
    loss = CosFace(margin=0.2, scale=12.0, reduction="none", name="cosine_margin")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is CosFace and again.get_config() == loss.get_config()
    assert (again.margin, again.scale, again.reduction, again.name) == (0.2, 12.0, "none", "cosine_margin")
