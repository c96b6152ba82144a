import numpy as np
from contenders.vrex import VREx

from tests.recipes.contenders.reference import EXPERIMENTS, IDS, LABELS, LOGITS, risks


def test_mean_risk_and_the_weighted_variance_of_risks():
    objective = VREx(EXPERIMENTS, weight=10.0, anneal_steps=1)
    values = np.array([*risks().values()])
    found = [float(objective(LOGITS, LOGITS, LABELS, IDS)) for _ in range(2)]
    np.testing.assert_allclose(found, [values.mean() + values.var(), values.mean() + 10 * values.var()], rtol=1e-4)
