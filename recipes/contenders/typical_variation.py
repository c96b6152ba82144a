"""Typical variation normalization (TVN) of embeddings, and the classifier that needs no trained head."""

import numpy as np


def typical_variation(embeddings, controls, experiments, ridge=0.5):
    """Whitens embeddings by the variation of negative controls, and aligns the controls' covariance of experiments.

    1. Principal axes of all controls, each scaled to variance 1: what varies among untreated wells counts less.
    2. Within each experiment, centring on its controls, then `x (C_e + ridge I)^(-1/2) (C + ridge I)^(1/2)`, with `C_e`
       the covariance of the experiment's controls and `C` that of all (CORAL).

    Ando, McLean & Berndl, "Improving Phenotypic Measurements in High-Content Imaging Screens", bioRxiv 161422 (2017).
    Ridge as in Recursion's EFAAR benchmarking, which scales before it finds the axes, does not centre again within an
    experiment and does not multiply by `(C + ridge I)^(1/2)`. It needs many controls: of few, as the drawn screens'
    eight in an experiment, small axes are noise that is made large. Uses no labels, but each experiment's
    controls together.

    Args:
        embeddings: `(samples, dim)`, treatments and controls.
        controls: bool `(samples,)`, the negative controls; at least two in each experiment.
        experiments: `(samples,)`.
        ridge: added to each variance, in units of the controls'. Default: EFAAR's, 0.5.

    Returns:
        float64 `(samples, dim)`.

    Raises:
        ValueError: if an experiment has fewer than two controls.
    """
    embeddings, controls, experiments = np.asarray(embeddings, "float64"), np.asarray(controls), np.asarray(experiments)
    values, axes = np.linalg.eigh(np.cov(embeddings[controls], rowvar=False))
    whitened = (embeddings - embeddings[controls].mean(0)) @ axes / np.sqrt(np.maximum(values, 1e-6 * values.max()))
    identity = ridge * np.eye(embeddings.shape[1])
    centred = whitened.copy()
    for experiment in np.unique(experiments):
        here = experiments == experiment
        if (here & controls).sum() < 2:
            raise ValueError(
                f"Experiment {str(experiment)!r} has {(here & controls).sum()} negative controls; TVN needs at least "
                "two in each experiment."
            )
        centred[here] -= whitened[here & controls].mean(0)
    target = _power(np.cov(centred[controls], rowvar=False) + identity, 0.5)
    aligned = np.empty_like(centred)
    for experiment in np.unique(experiments):
        here = experiments == experiment
        own = np.cov(centred[here & controls], rowvar=False) + identity
        aligned[here] = centred[here] @ _power(own, -0.5) @ target
    return aligned


def nearest_class(train, labels, embeddings, classes):
    """Cosine of each embedding with the mean of each class's normalized training embeddings, `(samples, classes)`."""
    unit = _unit(train)
    centres = np.stack([unit[labels == k].mean(0) for k in range(classes)])
    return _unit(embeddings) @ _unit(centres).T


def _power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, 1e-12) ** exponent @ vectors.T


def _unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
