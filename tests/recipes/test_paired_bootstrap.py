import numpy as np
import pytest
from paired_bootstrap import coverage, paired_bootstrap, simulate


@pytest.mark.parametrize("spreads", [(2, 1, 2, 3), (1, 2, 3, 4)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(spreads):
    assert 0.92 <= coverage(5, 2, spreads, experiments=8, runs=200, draws=400, seed=1) <= 0.995


@pytest.mark.parametrize("screens, least, most", [(2, 0.74, 0.88), (3, 0.78, 0.92)])
def test_of_few_screens_that_differ_much_it_promises_too_much(screens, least, most):
    assert least <= coverage(screens, 1, (3, 2, 2, 3), runs=300, seed=2) <= most


def test_known_cases():
    mean, low, high = paired_bootstrap([np.full((2, 3), 4.0), np.full((1, 2), 2.0)])
    assert mean == 3 and low == pytest.approx(3 - 2**0.5) and high == pytest.approx(3 + 2**0.5)
    assert paired_bootstrap([np.full((3, 4), 0.5)]) == pytest.approx((0.5, 0.5, 0.5))


def test_seeds_and_experiments_are_drawn_as_wholes():
    """One bad experiment is bad for all seeds: more seeds do not make the interval narrower."""
    experiments = np.array([-10.0, 0, 0, 0, 10, 0, 0, 0])
    widths = []
    for seeds in (1, 50):
        _, low, high = paired_bootstrap([np.tile(experiments, (seeds, 1))])
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.1) and widths[0] > 5


def test_the_same_seed_gives_the_same_interval():
    differences = simulate(np.random.default_rng(0), 3, 2, 4, (1, 1, 1, 1))
    assert paired_bootstrap(differences, draws=100) == paired_bootstrap(differences, draws=100)
    assert paired_bootstrap(differences, draws=100) != paired_bootstrap(differences, draws=100, seed=1)


def test_arrays_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"an array \(seeds, experiments\) for each"):
        paired_bootstrap([np.zeros(3)])
