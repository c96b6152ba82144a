import numpy as np
from contenders.group_dro import GroupDRO
from keras import ops

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
