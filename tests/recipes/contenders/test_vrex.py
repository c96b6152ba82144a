import numpy as np
from contenders.vrex import VREx

from tests.gradients import finite_difference, gradient
from tests.recipes.contenders.reference import EXPERIMENTS, IDS, LABELS, LOGITS, risks


def test_mean_risk_and_the_weighted_variance_of_risks():
    objective = VREx(EXPERIMENTS, weight=10.0, anneal_steps=1)
    values = np.array([*risks().values()])
    found = [float(objective(LOGITS, LOGITS, LABELS, IDS)) for _ in range(2)]
    np.testing.assert_allclose(found, [values.mean() + values.var(), values.mean() + 10 * values.var()], rtol=1e-4)


def test_the_gradient_is_that_of_the_whole_formula():
    def formula(logits):
        values = np.array([*risks(logits).values()])
        return values.mean() + 10 * values.var()

    objective = VREx(EXPERIMENTS, weight=10.0, anneal_steps=0)
    found = gradient(lambda logits: objective(logits, logits, LABELS, IDS), LOGITS)
    np.testing.assert_allclose(found, finite_difference(formula, LOGITS), rtol=1e-3, atol=1e-5)
