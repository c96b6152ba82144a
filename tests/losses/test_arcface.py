import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.losses import ArcFace, arcface_logits
from tests.gradients import finite_difference, gradient

RANDOM = np.random.default_rng(1)
COSINE = RANDOM.uniform(-0.95, 0.95, size=(6, 5)).astype("float32")
LABELS = np.array([0, 1, 2, 3, 4, 0])


def phi(c, m):
    theta = np.arccos(c)
    return np.cos(theta + m) if theta + m < np.pi else c - m * np.sin(np.pi - m)


def plain_logits(labels, cosine, margin, scale):
    out = scale * np.array(cosine, "float64")
    for i, y in enumerate(labels):
        out[i, y] = scale * phi(float(cosine[i, y]), margin)
    return out


def plain_loss(labels, cosine, margin, scale):
    logits = plain_logits(labels, cosine, margin, scale)
    return np.array([np.log(np.exp(z - z.max()).sum()) + z.max() - z[y] for z, y in zip(logits, labels, strict=True)])


def losses(y, cosine, **kwargs):
    return ops.convert_to_numpy(ArcFace(reduction=None, **kwargs)(y, cosine))


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.0, 1.5])
def test_adds_the_margin_at_every_angle(margin):
    degrees = np.arange(1, 180)
    cosine = np.zeros((179, 3), "float32")
    cosine[:, 1] = np.cos(np.radians(degrees))
    logits = ops.convert_to_numpy(arcface_logits(np.ones(179, "int32"), cosine, margin, 30.0))
    np.testing.assert_allclose(logits, plain_logits(np.ones(179, int), cosine, margin, 30.0), atol=2e-3)
    beyond = np.radians(degrees) + margin > np.pi
    assert beyond.any() == (margin > 0.1)
    for branch in (beyond, ~beyond):  # the logit falls with the angle on either
        assert (np.diff(logits[branch, 1]) < 0.0).all()


@pytest.mark.parametrize("of", [float, np.float32, ops.convert_to_tensor, lambda m: keras.Variable(m, trainable=False)])
def test_margin_zero_is_exactly_the_scaled_cosine(of):
    cosine = np.concatenate([COSINE, np.array([[1.0, -1.0, 0.0, 1.0, -1.0]] * 2, "float32")])
    labels = np.array([*LABELS, 0, 1])
    logits = arcface_logits(labels, cosine, of(0.0), 30.0)
    expected = 30.0 * ops.clip(ops.convert_to_tensor(cosine), -1.0 + 1e-7, 1.0 - 1e-7)
    np.testing.assert_array_equal(ops.convert_to_numpy(logits), ops.convert_to_numpy(expected))


def test_margin_zero_is_the_scaled_cosine_softmax():
    softmax = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = ArcFace(margin=0.0, scale=10.0)
    np.testing.assert_allclose(float(loss(LABELS, COSINE)), float(softmax(LABELS, 10.0 * COSINE)), rtol=1e-5)


@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_ramp_scales_the_margin(ramp):
    loss = ArcFace(margin=0.5, scale=10.0)
    for given in (ramp, ops.convert_to_tensor(ramp), keras.Variable(ramp, trainable=False)):
        logits = ops.convert_to_numpy(loss.margin_logits(LABELS, COSINE, ramp=given))
        np.testing.assert_allclose(logits, plain_logits(LABELS, COSINE, 0.5 * ramp, 10.0), atol=1e-4)


def test_a_larger_margin_costs_more():
    costs = [losses(LABELS, COSINE, margin=m) for m in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert (np.diff(costs, axis=0) > 0.0).all()


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.2])
def test_golden_values(margin):
    expected = plain_loss(LABELS, COSINE, margin, 30.0)
    np.testing.assert_allclose(losses(LABELS, COSINE, margin=margin), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(float(ArcFace(margin=margin)(LABELS, COSINE)), expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.2])
def test_gradient_is_the_true_one(margin):
    loss = ArcFace(margin=margin, scale=10.0, reduction="sum")
    expected = finite_difference(lambda c: plain_loss(LABELS, c, margin, 10.0), COSINE)
    np.testing.assert_allclose(gradient(lambda c: loss(LABELS, c), COSINE), expected, rtol=1e-3, atol=1e-4)


def plain_loss_of_shares(shares, cosine, margin, scale):
    """As the first place of RxRx1's Kaggle competition mixes them."""
    moved = [
        [scale * (y * phi(c, margin) + (1 - y) * c) for y, c in zip(*row, strict=True)]
        for row in zip(shares, cosine, strict=True)
    ]
    logits = np.array(moved) - np.max(moved, axis=1, keepdims=True)
    return -(shares * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.2])
def test_each_class_of_a_mixed_sample_has_its_share_of_the_margin(margin):
    shares = np.stack([0.25 * np.eye(5)[a] + 0.75 * np.eye(5)[b] for a, b in zip(LABELS, LABELS[::-1], strict=True)])
    loss = ArcFace(margin=margin, scale=10.0, reduction="sum")
    golden = plain_loss_of_shares(shares, COSINE.astype("float64"), margin, 10.0)
    np.testing.assert_allclose(losses(shares, COSINE, margin=margin, scale=10.0), golden, rtol=1e-5)
    expected = finite_difference(lambda c: plain_loss_of_shares(shares, c, margin, 10.0), COSINE)
    np.testing.assert_allclose(gradient(lambda c: loss(shares, c), COSINE), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(losses(np.eye(5)[LABELS], COSINE), losses(LABELS, COSINE))


def test_gradient_has_the_factor_of_the_angle():
    cosine, margin = np.array([[0.6, 0.1]], "float32"), 0.5
    slope = gradient(lambda c: arcface_logits([0], c, margin, 1.0)[:, 0], cosine)
    theta = np.arccos(0.6)
    factor = np.sin(theta + margin) / np.sin(theta)
    np.testing.assert_allclose(slope, [[factor, 0.0]], rtol=1e-5)
    assert abs(factor - 1.0) > 0.1  # the straight-through gradient would have 1 here


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("corner", [1.0, -1.0, 1.0000002, -1.0000002, 0.9999999, -0.9999999, 0.0])
def test_is_finite_at_the_corners(corner, margin):
    cosine = np.full((1, 5), corner, "float32")
    loss = ArcFace(margin=margin)
    assert np.isfinite(float(loss([2], cosine)))
    assert np.isfinite(gradient(lambda c: loss([2], c), cosine)).all()
    ramped = gradient(lambda m: arcface_logits([2], cosine, m, 30.0), np.float32(margin))
    assert np.isfinite(ramped).all()


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_takes_labels_of_any_number_type(dtype, shape):
    y = LABELS.astype(dtype).reshape(shape)
    expected = plain_loss(LABELS, COSINE, 0.5, 30.0)
    np.testing.assert_allclose(losses(y, COSINE), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(ArcFace().call(y, COSINE)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 5, 1108, 2**32, 1.5, np.nan])
def test_a_label_that_is_no_class_is_nan_and_touches_no_other_sample(bad):
    y = np.array([0, bad, 2, 3, 4, 0])
    values = losses(y, COSINE)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, False, False, False])
    assert np.isnan(float(ArcFace()(y, COSINE)))
    slope = gradient(lambda c: ArcFace(reduction=None)(y, c), COSINE)
    expected = gradient(lambda c: ArcFace(reduction=None)(LABELS, c), COSINE)
    np.testing.assert_allclose(np.delete(slope, 1, axis=0), np.delete(expected, 1, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(slope[1], 0.0)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_label_that_is_no_class_is_nan_in_the_compiled_graph(policy):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Activation("linear", dtype=policy)])
    model.compile(loss=ArcFace())
    assert np.isfinite(model.evaluate(COSINE, LABELS, verbose=0))
    assert np.isnan(model.evaluate(COSINE, np.where(LABELS == 3, 5, LABELS), verbose=0))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_cosines_are_cast_up(half):
    cosine = ops.cast(COSINE, half)
    loss = ArcFace()(LABELS, cosine)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert keras.backend.standardize_dtype(ArcFace().call(LABELS, cosine).dtype) == "float32"
    expected = plain_loss(LABELS, ops.convert_to_numpy(ops.cast(cosine, "float32")), 0.5, 30.0).mean()
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


def test_trains_a_compiled_model():
    keras.utils.set_random_seed(0)
    inputs = RANDOM.normal(size=(20, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.UnitNormalization()])
    model.add(keras.layers.Dense(5, use_bias=False, kernel_constraint=keras.constraints.UnitNorm(0)))
    model.compile(keras.optimizers.Adam(0.01), loss=ArcFace(scale=5.0))
    history = model.fit(inputs, np.arange(20) % 5, epochs=5, verbose=0, sample_weight=np.ones(20)).history["loss"]
    assert np.isfinite(history).all() and history[-1] < history[0]


def test_sample_weights_weigh():
    weights = np.array([1.0, 0.0, 2.0, 0.0, 0.0, 0.0], "float32")
    expected = (plain_loss(LABELS, COSINE, 0.5, 30.0) * weights).sum() / 6
    np.testing.assert_allclose(float(ArcFace()(LABELS, COSINE, sample_weight=weights)), expected, rtol=1e-5)


@pytest.mark.parametrize("margin", [-0.1, np.pi / 2, 2.0, np.nan, np.inf, None, "0.5"])
def test_margin_is_an_angle_below_a_right_one(margin):
    with pytest.raises(ValueError, match=r"angle in radians, in \[0, pi/2\)"):
        ArcFace(margin=margin)


def test_a_margin_in_degrees_is_told_its_radians():
    with pytest.raises(ValueError, match="If it is in degrees, pass 0.5000"):
        ArcFace(margin=28.648)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, None])
def test_scale_is_positive(scale):
    with pytest.raises(ValueError, match="`scale` must be a positive, finite number"):
        ArcFace(scale=scale)


@pytest.mark.parametrize("dtype", ["float16", "mixed_bfloat16"])
def test_half_precision_of_the_loss_itself_is_refused(dtype):
    with pytest.raises(ValueError, match="Leave it None under a mixed-precision policy"):
        ArcFace(dtype=dtype)


@pytest.mark.parametrize(
    ("y", "cosine", "message"),
    [
        (np.eye(6)[LABELS], COSINE, "Labels must be class numbers .* or shares of the classes"),
        (LABELS[:1], COSINE, "Every sample needs one label. Received: 1 labels for 6 predictions"),
        (LABELS, COSINE[0], "Predictions must have shape"),
    ],
)
def test_shapes_that_do_not_fit(y, cosine, message):
    with pytest.raises(ValueError, match=message):
        ArcFace()(y, cosine)


def test_serialization_round_trip():
    loss = ArcFace(margin=0.3, scale=12.0, reduction="sum", name="angular", dtype="float64")
    config = keras.losses.serialize(loss)
    assert config["registered_name"] == "keras_abra>ArcFace"
    again = keras.losses.deserialize(config)
    assert type(again) is ArcFace and again.get_config() == loss.get_config()
    assert (again.margin, again.scale, again.reduction, again.name, again.dtype) == (
        0.3,
        12.0,
        "sum",
        "angular",
        "float64",
    )
