import numpy as np
from contenders.group_dro import GroupDRO
from keras import ops

from tests.gradients import gradient
from tests.recipes.contenders.reference import EXPERIMENTS, IDS, LABELS, LOGITS, risks


def test_the_shares_of_bad_experiments_grow_and_weigh_the_risks():
    objective = GroupDRO(EXPERIMENTS, step_size=0.3)
    shares = np.full(EXPERIMENTS, 1 / EXPERIMENTS)
    for _ in range(3):
        found = float(objective(LOGITS, LOGITS, LABELS, IDS))
        for e, risk in risks().items():
            shares[e] *= np.exp(0.3 * risk)
        shares /= shares.sum()
        np.testing.assert_allclose(found, sum(shares[e] * risk for e, risk in risks().items()), rtol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(objective.shares), shares, rtol=1e-5)


def test_the_shares_are_constants_to_the_gradient():
    objective = GroupDRO(EXPERIMENTS, step_size=5.0)
    before = np.full(EXPERIMENTS, 1 / EXPERIMENTS)
    slope = gradient(lambda logits: objective(logits, logits, LABELS, IDS), LOGITS)
    shares = before.copy()
    for e, risk in risks().items():
        shares[e] *= np.exp(5.0 * risk)
    shares /= shares.sum()
    logits, ids = np.asarray(LOGITS, "float64"), np.asarray(IDS)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = (p - np.eye(logits.shape[1])[np.asarray(LABELS)]) * (shares[ids] / np.bincount(ids)[ids])[:, None]
    np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6)


def test_large_steps_are_finite():
    objective = GroupDRO(EXPERIMENTS, step_size=100.0)
    for _ in range(3):
        assert float(objective(LOGITS, LOGITS, LABELS, IDS)) <= max(risks().values()) * (1 + 1e-5)
    assert float(ops.max(objective.shares)) > 0.99
