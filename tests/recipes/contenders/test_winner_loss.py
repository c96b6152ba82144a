import numpy as np
from contenders.winner_loss import WinnerLoss

from tests.recipes.contenders.reference import LABELS, LOGITS, losses

COSINE = np.random.default_rng(4).uniform(-0.6, 0.9, (11, 5)).astype("float32")


def test_four_fifths_softmax_and_one_fifth_margin():
    z = 30 * COSINE.astype("float64")
    rows = np.arange(11)
    z[rows, LABELS] = 30 * np.cos(np.arccos(COSINE[rows, LABELS].astype("float64")) + 0.5)
    margin = np.log(np.exp(z).sum(1)) - z[rows, LABELS]
    found = float(WinnerLoss()(LOGITS, COSINE, LABELS, None))
    np.testing.assert_allclose(found, 0.8 * losses().mean() + 0.2 * margin.mean(), rtol=1e-4)
