"""How an experiment looks: RxRx1's measured batch effect on stain, and the rest of a microscope and a culture.

`LOG_MEDIAN` and `LOG_SPREAD` are fitted to the mean and the standard deviation (grey levels, 0-255) of each of the six
channels in each of RxRx1's 51 experiments (rxrx.ai, 2020; 24 HUVEC, 11 RPE, 11 HEPG2, 5 U2OS), by `fit_stain`, which
repeats the fit from such a table. Nothing else of RxRx1 is in here. Twelve numbers describe an experiment: logarithms
of the six means, then of the six standard deviations. The fit is a normal distribution around the mean of the cell
type, with one covariance for all cell types (51 - 4 degrees of freedom), kept as its Cholesky factor.

A gain and an offset vanish when each image is standardized, so this fitted part then acts only through noise, rounding
to grey levels and clipping. What stays after standardization, `DRIFT`, is assumed, not measured: focus, haze,
bleed-through, tone (the non-linearity of stain and camera), saturation, illumination, noise, growth. Its size was set
so that plain ERM, AdaBN and mixed-to-test training stand to each other as the acceptance asks
(recipes/screen_acceptance.py); no other method was run on the screen before it was frozen.
"""

from dataclasses import dataclass

import numpy as np

from tfrecords.screen_phenotype import TRAITS, traits_of
from tfrecords.screen_render import noise, render, smoothing

LOG_MEDIAN = {
    "HUVEC": (1.431, 2.729, 1.950, 2.099, 0.988, 1.815, 1.620, 2.551, 1.291, 1.903, 1.051, 1.137),
    "RPE": (0.978, 2.523, 2.518, 1.951, 1.408, 2.156, 1.247, 2.446, 2.043, 1.788, 1.404, 1.574),
    "HEPG2": (1.965, 2.691, 2.365, 2.405, 1.968, 2.236, 2.239, 2.465, 1.868, 2.120, 1.755, 1.741),
    "U2OS": (2.105, 2.752, 2.480, 2.350, 1.625, 2.630, 2.340, 2.409, 1.716, 1.925, 1.599, 1.980),
}
# fmt: off
LOG_SPREAD = (
    (0.475,),
    (0.155, 0.312),
    (0.248, 0.094, 0.209),
    (0.334, 0.238, 0.091, 0.132),
    (0.372, 0.221, 0.065, -0.196, 0.361),
    (0.284, 0.060, 0.299, 0.023, -0.046, 0.147),
    (0.315, -0.007, 0.132, 0.115, -0.050, 0.028, 0.117),
    (0.064, 0.247, -0.011, -0.002, -0.010, 0.021, 0.019, 0.052),
    (0.187, 0.062, 0.201, 0.032, -0.016, -0.020, 0.008, 0.026, 0.063),
    (0.243, 0.190, 0.075, 0.149, -0.015, 0.009, 0.025, 0.049, 0.012, 0.014),
    (0.300, 0.158, 0.014, -0.177, 0.312, -0.022, 0.003, 0.021, 0.058, -0.004, 0.071),
    (0.232, 0.023, 0.302, 0.059, -0.072, 0.178, 0.008, 0.031, 0.061, 0.006, -0.005, 0.034),
)
# fmt: on
# Standard deviation over experiments of what standardization leaves (natural logarithms unless said).
DRIFT = {
    "focus": 0.60,  # blur
    "haze": 0.95,  # share of the light from out of focus
    "bleed": 1.0,  # share of a channel's light seen in its neighbour
    "tone": 0.33,  # exponent of the response
    "saturation": 0.65,  # level at which the response bends
    "noise": 0.5,
    "growth": 1.25,  # of the traits, in units of REACH
}
# What a screen can have one at a time: which of the draws, and of the traits of growth, each shift is.
SHIFTS = ("exposure", "stain", "focus", "background", "illumination", "density", "growth")
BLUR = (0.55, 0.6, 0.5, 0.6, 0.55, 0.6)  # median blur of a channel, standard deviation in field units
HAZE, HAZE_WIDTH = 0.15, 5.0  # share; field units
BLEED = 0.05
SATURATION = 2.2  # times the 99th percentile of an untreated field
READ_NOISE, SHOT_NOISE = 0.2, 0.05  # grey levels; variance per grey level
ILLUMINATION = 0.12  # relative change over half a field
PLATE = 0.3  # how far plates differ within an experiment, as a share of DRIFT and of the spread of stain
WELL = 0.45  # effect of a well on the traits, in units of REACH
EDGE_DENSITY, EDGE_FOCUS = -0.15, 0.15  # in the outermost wells, in logarithms


def fit_stain(table):
    """Fit `LOG_MEDIAN` and `LOG_SPREAD` to a table of experiments.

    Args:
        table: `pandas.DataFrame` indexed by experiment, with the columns `mean_w1..mean_w6, std_w1..std_w6` in grey
            levels.

    Returns:
        A dict of cell type to 12 means of logarithms, and the `(12, 12)` lower Cholesky factor of the pooled
        covariance.
    """
    logs = np.log(table[[f"{kind}_w{channel}" for kind in ("mean", "std") for channel in range(1, 7)]])
    cell_types = logs.index.str.split("-").str[0]
    medians = logs.groupby(cell_types).mean()
    residuals = logs.to_numpy() - medians.loc[cell_types].to_numpy()
    covariance = residuals.T @ residuals / (len(logs) - len(medians))
    return {name: row.to_numpy() for name, row in medians.iterrows()}, np.linalg.cholesky(covariance)


@dataclass
class Appearance:
    """What one plate of an experiment does to every picture taken of it (arrays: one value per channel)."""

    cell_type: str
    mean: np.ndarray  # grey levels, of an untreated field
    std: np.ndarray
    blur: np.ndarray  # field units
    haze: np.ndarray
    bleed: np.ndarray  # (6, 6), what each channel sees of each stain, 1 on the diagonal
    tone: np.ndarray
    saturation: np.ndarray
    noise: float
    illumination: np.ndarray  # (6, 2), slopes
    growth: np.ndarray  # one value per trait, units of REACH
    reference: tuple = None  # bright level, mean and standard deviation per channel of an untreated field


def appearance_of(seed, cell_type, index, plate, batch_effect=1.0):
    """Draw the appearance of plate `plate` of experiment number `index` of `cell_type`; all from `seed`.

    `batch_effect`: one strength for all, or `{shift: strength}` of `SHIFTS`, the others then being 0: `"exposure"`
    (tone and saturation), `"stain"` (mean, spread, bleed-through), `"focus"`, `"background"` (haze, noise),
    `"illumination"`, `"density"` (of cells), `"growth"` (the other traits). One's draw does not depend on another's.
    """
    code = list(LOG_MEDIAN).index(cell_type)
    shared = np.random.default_rng([seed, 2, code, index, 0])
    own = np.random.default_rng([seed, 2, code, index, plate])

    some = isinstance(batch_effect, dict)
    strength = {shift: batch_effect.get(shift, 0.0) if some else batch_effect for shift in SHIFTS}

    def draw(shift, *shape):
        drawn = shared.standard_normal(shape) + PLATE * own.standard_normal(shape)
        return drawn if shift is None else strength[shift] * drawn

    spread = np.zeros((12, 12))
    for row, values in enumerate(LOG_SPREAD):
        spread[row, : len(values)] = values
    stain = np.exp(np.array(LOG_MEDIAN[cell_type]) + spread @ draw("stain", 12))
    bleed = BLEED * np.exp(DRIFT["bleed"] * draw("stain", 6, 6))
    # Light leaks mostly between neighbours in colour, here: in channel number.
    bleed *= np.exp(-0.7 * np.abs(np.subtract.outer(np.arange(6), np.arange(6))))
    np.fill_diagonal(bleed, 1.0)
    common = draw(None, 1)  # the focal plane is one for all channels, but for their own colour error
    traits = np.array([strength["density" if trait == "density" else "growth"] for trait in TRAITS])
    return Appearance(
        cell_type=cell_type,
        mean=stain[:6],
        std=stain[6:],
        blur=np.array(BLUR) * np.exp(DRIFT["focus"] * (0.8 * (strength["focus"] * common) + 0.6 * draw("focus", 6))),
        haze=np.minimum(
            HAZE * np.exp(DRIFT["haze"] * (0.7 * (strength["background"] * common) + 0.7 * draw("background", 6))), 0.6
        ),
        bleed=bleed,
        tone=np.exp(DRIFT["tone"] * draw("exposure", 6)),
        saturation=SATURATION * np.exp(DRIFT["saturation"] * draw("exposure", 6)),
        noise=float(np.exp(DRIFT["noise"] * draw("background", 1)[0])),
        illumination=ILLUMINATION * draw("illumination", 6, 2),
        growth=DRIFT["growth"] * (traits * draw(None, len(TRAITS))),
    )


def expose(appearance, size, fields=4):
    """Set the exposure as an operator does, on untreated fields: afterwards they have the drawn mean and spread."""
    rng = np.random.default_rng([0, 4])
    traits = traits_of(appearance.cell_type, appearance.growth)
    seen = np.stack([_optics(appearance, render(traits, rng, size), 1.0) for _ in range(fields)], 1)
    bright = np.quantile(seen, 0.99, axis=(1, 2, 3))
    response = _response(appearance, seen / bright[:, None, None, None])
    appearance.reference = bright, response.mean((1, 2, 3)), response.std((1, 2, 3))
    return appearance


def photograph(appearance, effect, edge, well_rng, site_rng, size):
    """One site: uint8 `(6, size, size)`.

    Args:
        appearance: an exposed `Appearance`.
        effect: the siRNA's effect on the traits in this cell type, in units of REACH.
        edge: whether the well lies at the border of the used plate (evaporation: fewer cells, another focus).
        well_rng: generator of the well, which its two sites share: they hold cells of the same culture.
        site_rng: generator of the site.
        size: pixels.
    """
    growth = appearance.growth + WELL * well_rng.standard_normal(len(TRAITS))
    traits = traits_of(appearance.cell_type, effect + growth)
    traits["density"] *= np.exp(EDGE_DENSITY * edge)
    focus = np.exp(EDGE_FOCUS * edge + 0.1 * well_rng.standard_normal() + 0.05 * site_rng.standard_normal())
    light = _optics(appearance, render(traits, site_rng, size), focus)
    bright, mean, std = (value[:, None, None] for value in appearance.reference)
    # Where the drawn mean is too low for the drawn spread, the mean wins: a background is never negative.
    gain = np.minimum(appearance.std[:, None, None] / std, np.maximum(appearance.mean[:, None, None] - 0.3, 0.1) / mean)
    background = appearance.mean[:, None, None] - gain * mean
    grey = background + gain * _response(appearance, light / bright)
    spread = np.sqrt(READ_NOISE**2 + SHOT_NOISE * grey)
    grey += appearance.noise * spread * noise(site_rng, 6, size, 0.4)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _optics(appearance, stain, focus):
    size = stain.shape[-1]
    light = np.tensordot(appearance.bleed, stain, 1)
    place = (np.arange(size) + 0.5) / size * 2 - 1
    slopes = appearance.illumination[:, :, None]
    light *= np.exp(slopes[:, 0, :, None] * place[:, None] + slopes[:, 1, None, :] * place)
    far = smoothing(size, HAZE_WIDTH * size / 48)
    for channel in range(6):
        near = smoothing(size, appearance.blur[channel] * focus * size / 48)
        haze = appearance.haze[channel]
        light[channel] = (1 - haze) * near @ light[channel] @ near.T + haze * far @ light[channel] @ far.T
    return light


def _response(appearance, light):
    shape = (6,) + (1,) * (light.ndim - 1)
    level = appearance.saturation.reshape(shape)
    return (level * -np.expm1(-light / level)) ** appearance.tone.reshape(shape)
