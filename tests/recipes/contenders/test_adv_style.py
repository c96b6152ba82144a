import keras
import numpy as np
import pytest
from contenders.adv_style import AdversaryBySGD, AdvStyle
from keras import ops

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(1, 2, (6, 4, 4, 3)).astype("float32")
NOISE = RANDOM.normal(size=(2, 6, 3)).astype("float32")
TENSORS = ops.convert_to_tensor(X), ops.convert_to_tensor(NOISE)
MU, SIGMA = X.mean((1, 2)), np.sqrt(X.var((1, 2)) + 1e-6)
SPREAD = [np.sqrt(s.var(0, ddof=1) + 1e-6) for s in (MU, SIGMA)]


def built(**kwargs):
    layer = AdvStyle(seed=0, **kwargs)
    layer.build(X.shape)
    return layer


def restyled(scale):
    new_mu, new_sigma = MU + NOISE[0] * scale[0], SIGMA + NOISE[1] * scale[1]
    return (X - MU[:, None, None]) / SIGMA[:, None, None] * new_sigma[:, None, None] + new_mu[:, None, None]


@pytest.mark.parametrize(("chance", "wanted"), [(0.1, "same"), (0.5, "learned"), (0.9, "spread")])
def test_thirds_stay_are_perturbed_by_the_learned_scale_and_by_dsu(chance, wanted):
    layer = built()
    layer.change.assign(np.full((2, 3), 0.25))
    scale = {"same": (0, 0), "learned": [s + 0.25 for s in SPREAD], "spread": SPREAD}[wanted]
    found = ops.convert_to_numpy(layer.perturb(*TENSORS, chance))
    np.testing.assert_allclose(found, restyled(scale), rtol=1e-3, atol=1e-3)


def test_the_learned_scale_starts_at_the_first_mini_batch_s_spread_and_stays():
    layer = built()
    layer.perturb(*TENSORS, 0.1)
    other = ops.convert_to_numpy(layer.perturb(3 * TENSORS[0], TENSORS[1], 0.5))  # the scale is that of X, not of 3 X
    mu = MU * 3 + NOISE[0] * SPREAD[0]
    np.testing.assert_allclose(other.mean((1, 2)), mu, rtol=1e-3, atol=1e-3)


def test_the_scale_climbs_the_loss_that_weights_descend():
    inputs = keras.Input(X.shape[1:])
    layer = built(weight=2.0)
    layer.call = lambda x, training=None: layer.perturb(x, TENSORS[1], 0.5)
    model = keras.Model(inputs, keras.layers.Flatten()(layer(inputs)))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.train_on_batch(X, np.zeros((6, 48), "float32"))
    # d/da of mean(x'^2) = mean over samples and channels of mu'^2 + sigma'^2; reversed and doubled.
    slope = [2 * (z * (s + z * a)).sum(0) / 18 for z, s, a in zip(NOISE, (MU, SIGMA), SPREAD, strict=True)]
    np.testing.assert_allclose(ops.convert_to_numpy(layer.change), 0.01 * 2 * np.array(slope), rtol=1e-2)


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_steps_of_the_scale_go_by_gradient_and_weight_and_those_of_the_network_by_adam(weight):
    inputs = keras.Input(X.shape[1:])
    layer = built(weight=weight)
    layer.call = lambda x, training=None: layer.perturb(x, TENSORS[1], 0.5)
    dense = keras.layers.Dense(48, kernel_initializer="identity", use_bias=False)
    model = keras.Model(inputs, dense(keras.layers.Flatten()(layer(inputs))))
    model.compile(AdversaryBySGD(0.01, weight_decay=0.0, adversary_rate=0.001), "mse")
    model.train_on_batch(X, np.zeros((6, 48), "float32"))
    slope = [2 * (z * (s + z * a)).sum(0) / 18 for z, s, a in zip(NOISE, (MU, SIGMA), SPREAD, strict=True)]
    np.testing.assert_allclose(ops.convert_to_numpy(layer.change), 0.001 * weight * np.array(slope), rtol=1e-2)
    step = np.abs(ops.convert_to_numpy(dense.kernel) - np.eye(48))
    np.testing.assert_allclose(step.max(), 0.01, rtol=1e-3)  # Adam's first step


def test_thirds_are_equally_often():
    layer = built()
    layer.start.assign(np.zeros((2, 3)))
    layer.started.assign(1.0)  # the learned scale is 0: the same as unchanged
    moved = [np.abs(ops.convert_to_numpy(layer(X, training=True)) - X).max() > 1e-3 for _ in range(60)]
    assert 10 <= sum(moved) <= 30


def test_nothing_moves_outside_training():
    np.testing.assert_array_equal(ops.convert_to_numpy(built()(X, training=False)), X)
