import numpy as np
from contenders.irm import IRM, irm_penalty
from keras import ops

from tests.gradients import finite_difference, gradient
from tests.recipes.contenders.reference import EXPERIMENTS, IDS, LABELS, LOGITS, losses, risks


def slope(logits, rows, step=1e-4):
    """d/dw of the mean loss of these rows at w = 1, by differences."""
    up, down = (losses(logits.astype("float64") * w)[rows].mean() for w in (1 + step, 1 - step))
    return (up - down) / (2 * step)


def penalties(logits=LOGITS):
    rows = {e: np.flatnonzero(IDS == e) for e in range(EXPERIMENTS)}
    return {e: slope(logits, r[::2]) * slope(logits, r[1::2]) for e, r in rows.items() if len(r) > 1}


def test_the_closed_form_is_the_derivative_by_a_scalar_on_the_logits():
    found = ops.convert_to_numpy(irm_penalty(LOGITS, LABELS, IDS, EXPERIMENTS))
    np.testing.assert_allclose(found, [penalties().get(e, 0) for e in range(EXPERIMENTS)], rtol=1e-3, atol=1e-6)


def test_the_penalty_has_weight_one_and_then_its_own():
    objective = IRM(EXPERIMENTS, weight=7.0, anneal_steps=2)
    found = [float(objective(LOGITS, LOGITS, LABELS, IDS)) for _ in range(3)]
    risk, penalty = np.mean([*risks().values()]), np.mean([*penalties().values()])
    np.testing.assert_allclose(found, [risk + penalty, risk + penalty, risk + 7 * penalty], rtol=1e-3)


def test_an_experiment_of_one_sample_has_no_penalty():
    assert float(irm_penalty(LOGITS[:1], LABELS[:1], IDS[:1], EXPERIMENTS)[0]) == 0


def test_the_gradient_is_that_of_the_whole_formula():
    def formula(logits):
        return np.mean([*risks(logits).values()]) + 7 * np.mean([*penalties(logits).values()])

    objective = IRM(EXPERIMENTS, weight=7.0, anneal_steps=0)
    found = gradient(lambda logits: objective(logits, logits, LABELS, IDS), LOGITS)
    np.testing.assert_allclose(found, finite_difference(formula, LOGITS, step=1e-4), rtol=1e-3, atol=1e-4)
