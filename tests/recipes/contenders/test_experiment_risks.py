import numpy as np
from contenders.experiment_risks import mean_over_present, risks_of
from keras import ops

from tests.recipes.contenders.reference import EXPERIMENTS, IDS, LABELS, LOGITS, risks


def test_each_experiment_s_mean_and_none_for_one_that_is_not_there():
    found, present = (ops.convert_to_numpy(v) for v in risks_of(LOGITS, LABELS, IDS, EXPERIMENTS))
    np.testing.assert_allclose(found, [risks().get(e, 0) for e in range(EXPERIMENTS)], rtol=1e-5)
    assert present.tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(float(mean_over_present(found, present)), np.mean([*risks().values()]), rtol=1e-5)
