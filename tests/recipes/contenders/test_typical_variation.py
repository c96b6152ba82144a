import numpy as np
import pytest
from contenders.typical_variation import nearest_class, typical_variation

RANDOM = np.random.default_rng(0)
EXPERIMENTS = np.repeat(["a", "b"], 40)
CONTROLS = np.tile(np.arange(40) < 20, 2)
ROWS = np.concatenate([RANDOM.normal(size=(40, 3)) @ RANDOM.normal(size=(3, 3)) + shift for shift in (0, 5)])


def root(matrix, inverse=False):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values ** (-0.5 if inverse else 0.5)) @ vectors.T


def test_the_published_steps_one_after_another():
    values, axes = np.linalg.eigh(np.cov(ROWS[CONTROLS].T))
    x = (ROWS - ROWS[CONTROLS].mean(0)) @ axes
    np.testing.assert_allclose(x[CONTROLS].var(0, ddof=1), values)
    x = x / x[CONTROLS].std(0, ddof=1)
    parts = {e: x[EXPERIMENTS == e] - x[(EXPERIMENTS == e) & CONTROLS].mean(0) for e in "ab"}
    own = {e: np.cov(parts[e][:20].T) + 0.5 * np.eye(3) for e in "ab"}
    target = np.cov(np.concatenate([parts["a"][:20], parts["b"][:20]]).T) + 0.5 * np.eye(3)
    wanted = np.concatenate([parts[e] @ root(own[e], inverse=True) @ root(target) for e in "ab"])
    np.testing.assert_allclose(typical_variation(ROWS, CONTROLS, EXPERIMENTS), wanted, atol=1e-8)


def test_without_ridge_the_controls_of_all_experiments_become_alike():
    found = typical_variation(ROWS, CONTROLS, EXPERIMENTS, ridge=1e-9)
    parts = [found[(EXPERIMENTS == e) & CONTROLS] for e in "ab"]
    np.testing.assert_allclose(parts[0].mean(0), parts[1].mean(0), atol=1e-9)
    np.testing.assert_allclose(np.cov(parts[0].T), np.cov(parts[1].T), rtol=1e-4, atol=1e-4)
    assert np.abs(np.cov(ROWS[:20].T) - np.cov(ROWS[40:60].T)).max() > 0.1


def test_an_experiment_without_controls_is_named():
    with pytest.raises(ValueError, match="Experiment 'b' has 0 negative controls"):
        typical_variation(ROWS, CONTROLS & (EXPERIMENTS == "a"), EXPERIMENTS)


def test_the_class_of_the_nearest_mean_direction():
    train, labels = np.array([[1.0, 0], [2, 0.1], [0, 3]]), np.array([0, 0, 1])
    cosines = nearest_class(train, labels, np.array([[5.0, 1], [0.1, 1]]), 2)
    assert cosines.argmax(1).tolist() == [0, 1]
    np.testing.assert_allclose(cosines[1, 1], 1 / np.hypot(0.1, 1))
