import keras
import numpy as np
import pytest
from contenders.adv_bn import AdvBN, scale_batch_statistics
from keras import ops

from tests.gradients import gradient

RANDOM = np.random.default_rng(0)
LABELS = (np.arange(16) % 4).astype("int32")
IMAGES = (RANDOM.normal(size=(16, 8, 8, 2)) + LABELS[:, None, None, None]).astype("float32")


def model(**kwargs):
    keras.utils.set_random_seed(1)
    image = keras.Input((8, 8, 2))
    prefix = keras.Model(image, keras.layers.Conv2D(3, 3, activation="relu")(image))
    z = keras.Input(prefix.output_shape[1:])
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="shared")(z)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    return AdvBN(prefix, keras.Model(z, keras.layers.Dense(4, name="head")(x)), **kwargs)


def test_the_batch_statistics_are_scaled_and_rectified():
    z = np.abs(RANDOM.normal(size=(4, 5, 5, 3))).astype("float32")
    u, s = np.array([0.5, 1, 2], "float32"), np.array([2, 1, -0.1], "float32")
    mean = z.reshape(-1, 3).mean(0)
    wanted = np.maximum((z - mean) * s + mean * u, 0)
    found = scale_batch_statistics(*map(ops.convert_to_tensor, (z, u, s)))
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_0_at_the_start_has_a_slope():
    """That is half of a rectified map; `torch.clamp`, with which AdvBN rectifies, has slope 1 there."""
    z = np.zeros((2, 1, 1, 1), "float32")
    z[1] = 4.0

    def first(factor):
        return scale_batch_statistics(ops.convert_to_tensor(z), factor, ops.ones((1,)))[0]

    np.testing.assert_allclose(gradient(first, np.ones(1, "float32")), [2.0])  # the mean


def test_the_search_takes_sign_steps_uphill_within_its_box():
    one = model(steps=1)
    # Without zeros: at 1 they lie on the ReLU's corner.
    z = ops.convert_to_tensor(np.abs(RANDOM.normal(1, 1, (16, 6, 6, 3))).astype("float32") + 0.1)
    factors = [ops.convert_to_numpy(f) for f in one.search(z, LABELS)]

    def loss(u, s):
        worst = scale_batch_statistics(z, ops.convert_to_tensor(u), ops.convert_to_tensor(s))
        logits = ops.convert_to_numpy(one.adversarial(worst, training=False)).astype("float64")
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(16), LABELS]).mean()

    checked = 0
    for i, c in np.ndindex(2, 3):
        change = np.zeros((2, 3), "float32")
        change[i, c] = 2e-3
        slope = (loss(*(1 + change)) - loss(*(1 - change))) / 4e-3
        assert abs(factors[i][c] - 1) in (pytest.approx(0.2), pytest.approx(0.0))
        if abs(slope) > 1e-3:  # of flatter ones the difference is rounding
            np.testing.assert_allclose(factors[i][c], 1 + 0.2 * np.sign(slope), atol=1e-6)
            checked += 1
    assert checked >= 3
    far = [ops.convert_to_numpy(f) for f in model(steps=10).search(z, LABELS)]
    assert np.abs(np.array(far) - 1).max() <= 1.1 + 1e-6
    np.testing.assert_allclose(np.abs(np.array(far) - 1).max(), 1.1, rtol=1e-5)


def test_branches_share_all_but_batch_normalization():
    trained = model()
    assert trained.adversarial.get_layer("shared") is trained.suffix.get_layer("shared")
    assert trained.adversarial.get_layer("norm_twin") is not trained.suffix.get_layer("norm")
    trained.compile(keras.optimizers.Adam(0.02), metrics=["accuracy"])
    history = trained.fit(IMAGES, LABELS, batch_size=16, epochs=8, shuffle=False, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    moved = [ops.convert_to_numpy(part.get_layer(name).moving_mean) for part, name in
             ((trained.suffix, "norm"), (trained.adversarial, "norm_twin"))]  # fmt: skip
    assert np.abs(moved[0]).max() > 0 and np.abs(moved[1]).max() > 0 and np.abs(moved[0] - moved[1]).max() > 1e-4
    clean = trained.suffix.predict(trained.prefix.predict(IMAGES, verbose=0), verbose=0)
    np.testing.assert_allclose(trained.predict(IMAGES, verbose=0), clean, atol=1e-5)


def test_the_search_moves_no_state():
    one = model()
    before = [ops.convert_to_numpy(v) for v in one.variables]
    one.search(one.prefix(ops.convert_to_tensor(IMAGES)), LABELS)
    for old, new in zip(before, one.variables, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


def test_the_loss_is_that_of_both_branches_each_whole():
    one = model()
    z, labels = one.prefix(ops.convert_to_tensor(IMAGES)), ops.convert_to_tensor(LABELS)
    worst = scale_batch_statistics(z, *one.search(z, labels))

    def cross_entropy(network, x):
        logits = ops.convert_to_numpy(network(x, training=True)).astype("float64")
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(16), LABELS]).mean()

    wanted = cross_entropy(one.suffix, z) + cross_entropy(one.adversarial, worst)
    again = model()
    found = again.compute_loss(y=labels, y_pred=again(ops.convert_to_tensor(IMAGES), training=True))
    assert float(found) == pytest.approx(wanted, rel=1e-4)
