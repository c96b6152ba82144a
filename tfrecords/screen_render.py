"""Cells to six channels: the stain in a field, as a perfect microscope would see it."""

import numpy as np

FIELD = 48.0  # width and height of a field in units; traits that are lengths count in them
MARGIN = 5.0  # cells outside the field reach into it from this far
NUCLEOLI = 4  # at most, per nucleus


def render(traits, rng, size):
    """The stain of one field of cells.

    A pixel belongs to the cell that is nearest in the cell's own elliptic metric; outlines, fibres, organelles and
    texture are smooth functions of the place in that cell, so that a change of one rounding error changes no pixel by
    a grey level.

    Args:
        traits: dict of `screen_phenotype.traits_of`.
        rng: `numpy.random.Generator`; the cells' places and their individuality are drawn from it.
        size: pixels of the square image.

    Returns:
        float64 array `(6, size, size)` >= 0: nuclei, endoplasmic reticulum, actin, nucleoli and RNA, mitochondria,
        Golgi; about 1 where a channel's structure is.
    """
    unit = FIELD / size
    y, x = np.mgrid[:size, :size] * unit + unit / 2
    coarse, fine, grain = _textures(rng, size, unit, traits["mito_grain"])
    cells = _cells(traits, rng)

    dx = x + traits["ruffle"] * coarse[0] - cells["x"][:, None, None]
    dy = y + traits["ruffle"] * coarse[1] - cells["y"][:, None, None]
    # Squared distance from each cell's centre in its own metric: a quadratic form, 1 on the outline.
    cos, sin = np.cos(cells["angle"])[:, None, None], np.sin(cells["angle"])[:, None, None]
    long = np.square(1 / (cells["size"] * cells["elongation"]))[:, None, None]
    short = np.square(cells["elongation"] / cells["size"])[:, None, None]
    square = dx * ((cos**2 * long + sin**2 * short) * dx + 2 * cos * sin * (long - short) * dy)
    square += (sin**2 * long + cos**2 * short) * dy * dy
    owner = square.argmin(0)
    own_radius = np.sqrt(square.min(0))
    np.put_along_axis(square, owner[None], np.inf, 0)
    border = np.exp(-(((np.sqrt(square.min(0)) - own_radius) / 0.16) ** 2))

    cell = {name: value[owner] for name, value in cells.items()}
    dx, dy = x - cell["x"], y - cell["y"]
    along, across = _turn(dx, dy, cell["angle"])
    nucleus_radius = np.hypot(
        (along - 0.25 * coarse[2]) / (cell["nucleus"] * traits["nucleus_elongation"]),
        (across - 0.25 * coarse[3]) / (cell["nucleus"] / traits["nucleus_elongation"]),
    )
    body = _inside(own_radius, 8.0)
    nucleus = _inside(nucleus_radius, 5.0 * cell["nucleus"] / 3)
    cytoplasm = body * (1 - 0.75 * nucleus)
    outside = np.maximum(nucleus_radius - 1, 0) * cell["nucleus"] / cell["size"]  # from the nucleus, in cell radii
    towards, aside = _turn(dx, dy, cell["pole"])
    cosine = towards / np.hypot(np.hypot(towards, aside), 0.5)
    nucleoli = _nucleoli(traits, cell, along, across)
    thick = 1 + 2.0 * cell["rounded"]  # rounded cells are thick and bright

    channels = np.empty((6, size, size))
    channels[0] = nucleus * cell["dna"] * thick * np.exp(traits["nucleus_texture"] * fine[0])
    reticulum = np.exp(-outside / traits["er_reach"]) * (1 + traits["er_texture"] * fine[1])
    channels[1] = 1.2 * cytoplasm * cell["protein"] * thick * reticulum + 0.10 * body
    phase = across + 0.8 * coarse[4] + cell["phase"]
    fibres = np.exp(2.0 * np.cos(2 * np.pi * phase / traits["fibre_period"]) - 2.0)
    fibres *= np.exp(0.5 * coarse[3]) * (1 - 0.5 * nucleus)
    actin = 0.35 + traits["actin_cortex"] * border + 0.8 * traits["actin_fibres"] * fibres + 0.12 * fine[2]
    channels[2] = body * actin * cell["protein"] ** 0.7 * thick
    channels[3] = (
        0.8 * cytoplasm * cell["protein"] * thick * np.exp(-outside / (1.2 * traits["er_reach"]))
        + nucleus * (traits["rna_nucleus"] + traits["nucleoli_brightness"] * nucleoli)
        + 0.05 * body
    )
    filaments = np.logaddexp(0, 3.0 * traits["mito_texture"] * grain) / (0.7 + 3.0 * traits["mito_texture"] * 0.4)
    gathered = np.exp(-outside / traits["mito_reach"] + traits["mito_polarity"] * (cosine - 0.5))
    channels[4] = 1.1 * cytoplasm * cell["mitochondria"] * thick * gathered * filaments + 0.03 * body
    distance = np.hypot(towards - traits["golgi_distance"], 0.7 * aside)
    apparatus = np.exp(-0.5 * (distance / traits["golgi_spread"]) ** 2) * (1 + 0.5 * fine[3])
    membranes = 0.35 + 0.25 * border + 0.3 * nucleus + 0.15 * fibres
    channels[5] = body * thick * (membranes + traits["golgi_brightness"] * cell["protein"] * apparatus)
    stain = np.array([traits[f"stain_{channel}"] for channel in range(1, 7)])
    return np.maximum(channels, 0) * stain[:, None, None]


def smoothing(size, width):
    """`(size, size)` matrix that smooths a line of pixels by a Gaussian of standard deviation `width` pixels."""
    place = np.arange(size)
    weights = np.exp(-0.5 * ((place[:, None] - place[None]) / max(width, 1e-3)) ** 2)
    return weights / weights.sum(1, keepdims=True)


def noise(rng, count, size, width):
    """`(count, size, size)` smooth random fields of mean about 0, standard deviation 1 and grain `width` pixels."""
    matrix = smoothing(size, width)
    fields = matrix @ rng.standard_normal((count, size, size)) @ matrix.T
    return fields / np.sqrt(np.mean(np.square(matrix).sum(1)) ** 2)


def _textures(rng, size, unit, mito_grain):
    coarse = noise(rng, 5, size, 3.0 / unit)
    fine = noise(rng, 4, size, 0.6 / unit)
    grain = noise(rng, 1, size, 0.75 * mito_grain / unit)[0]
    return coarse, fine, grain


def _cells(traits, rng):
    # The chance draws do not depend on the traits, so that siRNAs can be compared on the same cells.
    count = max(3, round(traits["density"] * ((FIELD + 2 * MARGIN) / FIELD) ** 2))
    x, y = _places(rng, count)
    normal = rng.standard_normal((7, count))
    uniform = rng.random((4 + 3 * NUCLEOLI, count))
    rounded = _inside(uniform[0] / traits["rounded"], 30.0)
    size = traits["cell_size"] * np.exp(0.12 * normal[0]) * (1 - 0.4 * rounded)
    direction = rng.random() * np.pi
    return {
        "x": x,
        "y": y,
        "size": size,
        "elongation": 1 + (traits["cell_elongation"] * np.exp(0.08 * np.abs(normal[1])) - 1) * (1 - rounded),
        "angle": direction + 0.5 * normal[2],
        "nucleus": traits["nucleus_size"] * np.exp(0.09 * normal[3]) * (1 - 0.25 * rounded),
        "dna": np.exp(0.15 * normal[4]),
        "protein": np.exp(0.30 * normal[5]),
        "mitochondria": np.exp(0.30 * normal[6]),
        "rounded": rounded,
        "pole": 2 * np.pi * uniform[1],
        "phase": 3 * uniform[2],
        "nucleoli": traits["nucleoli_number"] + 2 * uniform[3] - 1,
        "spots": uniform[4:].reshape(NUCLEOLI, 3, count).transpose(2, 0, 1),
    }


def _places(rng, count):
    # Each cell takes the roomiest of five random places: crowded as in a culture dish, not as on a lattice.
    draws = rng.random((count, 5, 2)) * (FIELD + 2 * MARGIN) - MARGIN
    places = draws[:, 0].copy()
    for index in range(1, count):
        gaps = np.square(draws[index, :, None] - places[None, :index]).sum(-1).min(1)
        places[index] = draws[index, gaps.argmax()]
    return places.T


def _nucleoli(traits, cell, along, across):
    total = np.zeros(along.shape)
    for spot in range(NUCLEOLI):
        distance, angle, size = np.moveaxis(cell["spots"][:, :, spot], -1, 0)
        reach = 0.65 * cell["nucleus"] * np.sqrt(distance)
        d = np.hypot(along - reach * np.cos(2 * np.pi * angle), across - reach * np.sin(2 * np.pi * angle))
        there = np.clip(cell["nucleoli"] - spot, 0, 1)
        total += there * np.exp(-0.5 * (d / (traits["nucleoli_size"] * (0.8 + 0.4 * size))) ** 2)
    return total


def _turn(dx, dy, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _inside(radius, steepness):
    return 1 / (1 + np.exp(np.clip(steepness * (radius - 1), -40, 40)))
