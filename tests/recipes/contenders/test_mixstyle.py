import numpy as np
from contenders.mixstyle import MixStyle
from keras import ops

from tests.gradients import gradient

X = np.random.default_rng(0).normal(2, 3, (4, 5, 6, 3)).astype("float32")


def statistics(x):
    return x.mean((1, 2)), np.sqrt(x.var((1, 2)) + 1e-6)


def test_statistics_become_a_mixture_with_the_partner():
    share, partner = np.array([[1.0], [0.0], [0.3], [0.5]], "float32"), np.array([3, 2, 0, 1])
    mixed = ops.convert_to_numpy(MixStyle().mix(*map(ops.convert_to_tensor, (X, share, partner))))
    mu, sigma = statistics(X)
    for i in range(4):
        new_mu = share[i] * mu[i] + (1 - share[i]) * mu[partner[i]]
        new_sigma = share[i] * sigma[i] + (1 - share[i]) * sigma[partner[i]]
        np.testing.assert_allclose(mixed[i], (X[i] - mu[i]) / sigma[i] * new_sigma + new_mu, rtol=1e-4, atol=1e-4)


def test_half_of_the_mini_batches_are_mixed_and_none_outside_training():
    layer = MixStyle(alpha=1.0, seed=0)
    changed = [np.abs(ops.convert_to_numpy(layer(X, training=True)) - X).max() > 1e-3 for _ in range(40)]
    assert 10 <= sum(changed) <= 30
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(X, training=False)), X)


def test_every_sample_has_a_share_and_a_partner_of_its_own():
    mixed = ops.convert_to_numpy(MixStyle(probability=1.0, alpha=1.0, seed=1)(X, training=True))
    (mu, _), (new_mu, _) = statistics(X), statistics(mixed)
    # Each new mean lies on the line from the sample's own to another's: one share explains all three channels.
    shares = set()
    for i in range(4):
        fits = []
        for j in range(4):
            d = mu[j] - mu[i]
            s = (new_mu[i] - mu[i]) @ d / max(d @ d, 1e-9)
            if np.abs(new_mu[i] - mu[i] - s * d).max() < 1e-3:
                fits.append(round(float(s), 3))
        assert fits
        shares.add(fits[0])
    assert len(shares) > 1


def test_statistics_are_constants_to_the_gradient():
    share, partner = np.full((4, 1), 0.4, "float32"), np.array([1, 0, 3, 2])
    target = np.random.default_rng(1).normal(size=X.shape).astype("float32")
    slope = gradient(
        lambda x: ops.convert_to_tensor(target) * MixStyle().mix(x, ops.convert_to_tensor(share), partner), X
    )
    mu, sigma = statistics(X)
    factor = share * sigma + (1 - share) * sigma[partner]
    np.testing.assert_allclose(slope, target * (factor / sigma)[:, None, None], rtol=1e-3, atol=1e-4)


def test_shares_are_of_the_beta_distribution():
    layer, shares = MixStyle(probability=1.0, alpha=0.1, seed=2), []
    layer.mix = lambda inputs, share, partner: shares.append(ops.convert_to_numpy(share).ravel()) or inputs
    for _ in range(200):
        layer(X, training=True)
    shares = np.concatenate(shares)
    # Beta(a, a) has variance 1 / (4 (2 a + 1)).
    assert abs(shares.mean() - 0.5) < 0.06 and abs(shares.var() - 1 / 4.8) < 0.02
