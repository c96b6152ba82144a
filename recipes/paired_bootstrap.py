"""How sure a difference between two methods is: a paired bootstrap over screens, seeds and experiments."""

import numpy as np

TRUTH = 1.5  # mean of the simulated differences


def paired_bootstrap(differences, draws=4000, level=0.95, seed=0):
    """Mean difference of two methods and its bootstrap interval.

    Both methods were trained on the same screens with the same seeds and scored on the same experiments, so that what
    is drawn anew is differences. Each draw takes screens with replacement, and in each of them seeds and experiments
    with replacement (an experiment for all seeds of its screen: it is hard or easy for each). The interval holds the
    middle `level` of the means, its distance from the mean widened by `sqrt(n / (n - 1))` for n screens: n drawn from n
    vary that much too little. With one screen it says nothing about other screens. `python recipes/paired_bootstrap.py`
    simulates how often it holds the truth: 92 to 99 times of 100 with five screens of two seeds, 85 to 98 times with
    three of one, and 80 to 97 times with two, least where screens differ most.

    Args:
        differences: a list with, for each screen, an array `(seeds, experiments)` of one method's accuracy minus the
            other's.
        draws: number of bootstrap draws.
        level: share of the draws in the interval.
        seed: integer; the same gives the same interval.

    Returns:
        `(mean, low, high)`.

    Raises:
        ValueError: if there is no screen, or an array is not of two axes.
    """
    differences = [np.asarray(d, "float64") for d in differences]
    if not differences or any(d.ndim != 2 or not d.size for d in differences):
        raise ValueError(
            "paired_bootstrap needs an array (seeds, experiments) for each of at least one screen. Received: shapes "
            f"{[d.shape for d in differences]}"
        )
    rng, count = np.random.default_rng(seed), len(differences)
    mean = float(np.mean([d.mean() for d in differences]))
    totals = np.zeros(draws)
    for _ in range(count):
        chosen = rng.integers(count, size=draws)
        for screen, values in enumerate(differences):
            here = np.flatnonzero(chosen == screen)
            seeds, experiments = (rng.multinomial(n, np.full(n, 1 / n), len(here)) / n for n in values.shape)
            totals[here] += np.einsum("ds,se,de->d", seeds, values, experiments) / count
    wider = np.sqrt(count / (count - 1)) if count > 1 else 1.0
    low, high = mean + wider * (np.quantile(totals, [(1 - level) / 2, (1 + level) / 2]) - mean)
    return mean, float(low), float(high)


def simulate(rng, screens, seeds, experiments, spreads):
    """Differences with known standard deviations between screens, seeds and experiments, and of what is left."""
    a, b, c, d = spreads
    shape = (seeds, experiments)
    return [
        TRUTH
        + a * rng.normal()
        + b * rng.normal(size=(seeds, 1))
        + c * rng.normal(size=shape[1])
        + d * rng.normal(size=shape)
        for _ in range(screens)
    ]


def coverage(screens, seeds, spreads, experiments=12, runs=1000, draws=300, seed=5):
    """Share of simulated ladders whose interval holds the truth."""
    rng, hits = np.random.default_rng(seed), 0
    for run in range(runs):
        _, low, high = paired_bootstrap(simulate(rng, screens, seeds, experiments, spreads), draws, seed=run)
        hits += low <= TRUTH <= high
    return hits / runs


if __name__ == "__main__":
    print("screens, seeds, standard deviations between screens, seeds, experiments, and of the rest: coverage")
    for design in ((2, 1), (3, 1), (5, 2)):
        for spreads in ((2, 1, 2, 3), (1, 2, 3, 4), (0.5, 1, 3, 4), (3, 2, 2, 3)):
            print(*design, spreads, coverage(*design, spreads), flush=True)
