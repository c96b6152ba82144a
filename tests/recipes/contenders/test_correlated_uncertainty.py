import numpy as np
from contenders.correlated_uncertainty import CorrelatedStyleUncertainty, covariance_root
from keras import ops

from tests.gradients import gradient

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(12, 4, 4, 3)) * RANDOM.uniform(1, 3, (12, 1, 1, 3)) + RANDOM.normal(0, 2, (12, 1, 1, 3))
X = X.astype("float32")


def root(rows):
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, ddof=0))
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


def test_the_root_is_that_of_the_covariance_over_the_mini_batch():
    rows = X.mean((1, 2))
    found = covariance_root(ops.convert_to_tensor(rows))
    np.testing.assert_allclose(ops.convert_to_numpy(found), root(rows), atol=1e-4)


def test_statistics_move_by_noise_with_that_covariance():
    strength = RANDOM.uniform(0, 1, (12, 1)).astype("float32")
    z1, z2 = RANDOM.normal(size=(2, 12, 3)).astype("float32")
    found = CorrelatedStyleUncertainty().perturb(*map(ops.convert_to_tensor, (X, strength, z1, z2)))
    mu, sigma = X.mean((1, 2)), np.sqrt(X.var((1, 2)) + 1e-6)
    new_mu, new_sigma = mu + strength * (z1 @ root(mu)), sigma + strength * (z2 @ root(sigma))
    wanted = (X - mu[:, None, None]) / sigma[:, None, None] * new_sigma[:, None, None] + new_mu[:, None, None]
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, rtol=1e-3, atol=1e-3)


def test_half_of_the_mini_batches_are_perturbed_and_none_outside_training():
    layer = CorrelatedStyleUncertainty(seed=0)
    changed = [np.abs(ops.convert_to_numpy(layer(X, training=True)) - X).max() > 1e-3 for _ in range(40)]
    assert 10 <= sum(changed) <= 30
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(X, training=False)), X)


def test_strengths_are_of_the_beta_distribution():
    layer, strengths = CorrelatedStyleUncertainty(probability=1.0, seed=2), []
    layer.perturb = lambda inputs, strength, *noise: strengths.append(ops.convert_to_numpy(strength).ravel()) or inputs
    for _ in range(100):
        layer(X, training=True)
    strengths = np.concatenate(strengths)
    # Beta(a, a) has variance 1 / (4 (2 a + 1)).
    assert len(strengths) == 1200 and len(set(strengths.round(6))) > 600  # each sample its own
    assert abs(strengths.mean() - 0.5) < 0.05 and abs(strengths.var() - 1 / 6.4) < 0.02


def test_the_vectors_of_the_decomposition_are_constants_to_the_gradient():
    rows, target = X.mean((1, 2)), RANDOM.normal(size=(3, 3))
    _, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, ddof=0))

    def value(rows):
        covariance = np.cov(rows, rowvar=False, ddof=0)
        return (target * (vectors * np.sqrt((vectors * (covariance @ vectors)).sum(0)) @ vectors.T)).sum()

    slope = gradient(lambda x: ops.convert_to_tensor(target.astype("float32")) * covariance_root(x), rows)
    for place in np.ndindex(*rows.shape):
        step = np.zeros(rows.shape)
        step[place] = 1e-4
        numeric = (value(np.float64(rows) + step) - value(np.float64(rows) - step)) / 2e-4
        np.testing.assert_allclose(slope[place], numeric, rtol=1e-2, atol=1e-3)


def test_what_is_not_finite_stays_so_and_is_no_error_of_the_decomposition():
    rows = RANDOM.normal(size=(12, 3)).astype("float32")
    rows[0, 0] = np.inf
    assert not np.isfinite(ops.convert_to_numpy(covariance_root(ops.convert_to_tensor(rows)))).all()
