import numpy as np
from contenders.mixup import mixup

IMAGES = np.arange(6, dtype="float32")[:, None, None, None] * np.ones((1, 2, 2, 1), "float32")
LABELS = np.arange(6)


def test_images_and_labels_are_mixed_alike_and_by_one_share():
    images, labels = (np.asarray(v) for v in mixup(IMAGES, LABELS, (3, 1), 6, alpha=1.0))
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(images[:, 0, 0, 0], labels @ np.arange(6), rtol=1e-5)  # pixel i is class i
    shares = labels[np.arange(6), np.arange(6)]
    mixed = shares < 0.9999
    assert mixed.sum() >= 2 and np.ptp(shares[mixed]) < 1e-6


def test_the_share_is_beta_distributed():
    def share(seed):
        _, labels = mixup(IMAGES, LABELS, (seed, 0), 6, alpha=0.2)
        own = np.asarray(labels)[np.arange(6), np.arange(6)]
        return own.min()

    shares = np.array([share(seed) for seed in range(300)])
    # Beta(0.2, 0.2): mean 1/2, variance 1 / (4 * 1.4); all six partners are never the samples themselves together.
    assert abs(shares.mean() - 0.5) < 0.1 and abs(shares.var() - 1 / 5.6) < 0.04
