"""What cells look like: the traits of a cell type, and what siRNAs and growth do to them."""

import numpy as np

CELL_TYPES = ("HUVEC", "RPE", "HEPG2", "U2OS")

# Median of each trait in untreated cells. Lengths in field units: a field is 48 units wide and high, whatever the image
# size. In the order of CELL_TYPES, chosen by eye beside RxRx1 (U2OS: beside the literature).
TRAITS = {
    "density": (24.3, 18.6, 48.6, 22.9),  # cells in a field
    "cell_size": (6.2, 7.4, 4.6, 6.6),  # radius of the cell body
    "cell_elongation": (1.35, 1.25, 1.10, 1.20),  # square root of the ratio of the axes
    "ruffle": (0.98, 1.23, 0.74, 1.07),  # irregularity of the outline
    "nucleus_size": (2.5, 2.7, 2.1, 2.6),  # radius
    "nucleus_elongation": (1.17, 1.15, 1.08, 1.12),
    "nucleus_texture": (0.22, 0.25, 0.22, 0.30),  # relative contrast of the chromatin
    "er_reach": (0.30, 0.38, 0.50, 0.36),  # decay length from the nucleus, in cell radii
    "er_texture": (0.25, 0.25, 0.20, 0.25),
    "actin_cortex": (0.7, 0.8, 1.0, 0.6),  # brightness at the borders, against the cell body
    "actin_fibres": (1.0, 1.0, 0.25, 0.9),  # contrast of the stress fibres
    "fibre_period": (3.6, 4.1, 3.4, 3.7),  # distance between fibres
    "nucleoli_number": (2.4, 2.2, 1.8, 2.6),
    "nucleoli_size": (0.50, 0.54, 0.50, 0.59),  # radius
    "nucleoli_brightness": (0.9, 1.1, 0.6, 1.2),
    "rna_nucleus": (0.5, 0.5, 0.6, 0.5),  # RNA in the nucleus, against the cytoplasm
    "mito_reach": (0.30, 0.40, 0.50, 0.36),
    "mito_texture": (0.8, 0.7, 0.6, 0.8),
    "mito_grain": (0.9, 1.0, 0.8, 1.0),  # size of the mitochondria
    "mito_polarity": (0.5, 0.5, 0.3, 0.4),  # how much they gather on one side of the nucleus
    "golgi_distance": (2.8, 3.0, 2.1, 2.8),  # from the centre of the nucleus
    "golgi_spread": (0.94, 1.02, 0.85, 1.02),  # radius of the apparatus
    "golgi_brightness": (1.3, 1.2, 0.8, 1.2),  # against the membranes
    "rounded": (0.04, 0.03, 0.05, 0.04),  # share of rounded, bright cells
    "stain_1": (1.0, 1.0, 1.0, 1.0),  # stain bound by a cell, per channel
    "stain_2": (1.0, 1.0, 1.0, 1.0),
    "stain_3": (1.0, 1.0, 1.0, 1.0),
    "stain_4": (1.0, 1.0, 1.0, 1.0),
    "stain_5": (1.0, 1.0, 1.0, 1.0),
    "stain_6": (1.0, 1.0, 1.0, 1.0),
}
# How far a trait goes (in natural logarithms) for one standard deviation of an siRNA's, experiment's or well's effect.
REACH = np.array(
    [
        *(0.22, 0.11, 0.10, 0.14),  # density and cell shape
        *(0.13, 0.07, 0.36),  # nucleus
        *(0.34, 0.54),  # endoplasmic reticulum
        *(0.48, 0.54, 0.12),  # actin
        *(0.36, 0.24, 0.48, 0.42),  # nucleoli and RNA
        *(0.34, 0.48, 0.30, 0.48),  # mitochondria
        *(0.22, 0.34, 0.48),  # Golgi
        0.45,  # rounded cells
        *(0.10,) * 6,  # stain
    ]
)
PATHWAYS = 10
LIMIT = 4.0  # where a trait's change saturates, in units of REACH
STRENGTH = 3.75  # root mean square of a treatment's effect over the traits, in units of REACH


def sirna_effects(seed, treatments, positive_controls):
    """The effect of every siRNA on every trait, in units of `REACH`: `(sirna_id, cell type, trait)`.

    An siRNA acts through about three of ten pathways, each of which moves a third of the traits, and by itself (the
    off-target effects of its seed), so that siRNAs overlap. Each cell type answers a pathway with its own strength.
    Positive controls are strong; the negative control, the last id, does nothing.

    Args:
        seed: int, the screen's.
        treatments: number of treatments, ids from 0.
        positive_controls: number of positive controls, the ids that follow.

    Returns:
        float64 array `(treatments + positive_controls + 1, 4, len(TRAITS))`.
    """
    rng = np.random.default_rng([seed, 1])
    traits, total = len(TRAITS), treatments + positive_controls
    pathways = rng.standard_normal((PATHWAYS, traits)) * (rng.random((PATHWAYS, traits)) < 0.35)
    use = rng.standard_normal((total, PATHWAYS)) * (rng.random((total, PATHWAYS)) < 0.3)
    response = np.exp(0.25 * rng.standard_normal((len(CELL_TYPES), PATHWAYS)))
    own = 0.6 * rng.standard_normal((total, 1, traits))
    effects = np.einsum("sp,cp,pt->sct", use, response, pathways) + own
    size = np.sqrt(np.mean(effects**2, axis=(1, 2), keepdims=True))
    strength = STRENGTH * np.exp(0.2 * rng.standard_normal((total, 1, 1)))
    strength[treatments:] = 1.3 * STRENGTH
    effects *= strength / size
    return np.concatenate([effects, np.zeros((1, len(CELL_TYPES), traits))])


def traits_of(cell_type, effect):
    """The traits of a cell population: the medians of `cell_type`, moved by `effect` (units of `REACH`).

    Effects add up, but cells stay cells: beyond `LIMIT` they saturate.
    """
    column = CELL_TYPES.index(cell_type)
    medians = np.array([values[column] for values in TRAITS.values()])
    return dict(zip(TRAITS, medians * np.exp(REACH * LIMIT * np.tanh(effect / LIMIT)), strict=True))
