from itertools import combinations

import numpy as np
from contenders.coral import CORAL, coral_penalty

from tests.recipes.contenders.reference import EMBEDDING, EXPERIMENTS, IDS, LABELS, LOGITS, losses


def pairs():
    for e, f in combinations(np.unique(IDS), 2):
        x, y = EMBEDDING[IDS == e].astype("float64"), EMBEDDING[IDS == f].astype("float64")
        covariances = np.cov(x, rowvar=False) - np.cov(y, rowvar=False)
        yield ((x.mean(0) - y.mean(0)) ** 2).mean() + (covariances**2).mean()


def test_the_mean_over_pairs_of_experiments():
    wanted = np.mean([*pairs()])
    np.testing.assert_allclose(float(coral_penalty(EMBEDDING, IDS, EXPERIMENTS)), wanted, rtol=1e-4)
    found = float(CORAL(EXPERIMENTS, weight=0.5)(LOGITS, EMBEDDING, LABELS, IDS))
    np.testing.assert_allclose(found, losses().mean() + 0.5 * wanted, rtol=1e-4)


def test_experiments_of_one_sample_are_left_out():
    ids = np.where(np.arange(11) == 3, 2, IDS).astype("int32")  # one sample of experiment 2
    kept = IDS[np.arange(11) != 3]
    wanted = float(coral_penalty(EMBEDDING[np.arange(11) != 3], kept, EXPERIMENTS))
    np.testing.assert_allclose(float(coral_penalty(EMBEDDING, ids, EXPERIMENTS)), wanted, rtol=1e-5)
    assert float(coral_penalty(EMBEDDING[:1], IDS[:1], EXPERIMENTS)) == 0
