"""A small synthetic screen in exactly the layout of RxRx1: `python -m tfrecords.synthetic DEST`."""

import argparse
import os
import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from tfrecords.screen_appearance import SHIFTS, appearance_of, expose, photograph
from tfrecords.screen_layout import POSITIVE_CONTROLS, TREATMENTS, layout
from tfrecords.screen_phenotype import CELL_TYPES, sirna_effects

EDGE_ROWS, EDGE_COLUMNS = "BO", ("02", "23")


def write_screen(folder, seed=0, image_size=48, treatments=TREATMENTS, experiments=None, batch_effect=1.0):
    """Write a synthetic siRNA screen to `folder`, as RxRx1 lies on disk.

    `folder/metadata.csv` has RxRx1's eleven columns, `folder/images/EXP/PlateN/WELL_sS_wC.png` one 8-bit grey picture
    per site and channel. The column `dataset` says train, val or test as in RxRx1-WILDS: val and test hold experiments
    that train does not; id_test is train's site 2. The defaults are the embedded screen that the recipe trains on: 14
    train, 4 val and 8 test experiments of four cell types, 44 treatments, 2,912 sites.

    Every site is drawn from its own random generators, keyed by the seed, its well and its number, so that its pixels
    do not depend on the order in which sites are drawn.

    Args:
        folder: where to write; made if need be, else empty.
        seed: int >= 0; it fixes every pixel. Default 0.
        image_size: height and width of the pictures in pixels; the field of view stays. Default 48: two CPU cores.
        treatments: number of treatment siRNAs, a multiple of 4. Default 44: a few hundred training sites.
        experiments: `{"train"|"val"|"test": {cell type: number}}`; by default `screen_layout.EXPERIMENTS`.
        batch_effect: strength of everything in which experiments and plates differ, 0 for none; or a dict from shift to
            strength, for a screen with these alone: `"exposure"` (response of the camera), `"stain"`, `"focus"`,
            `"background"` (haze and noise), `"illumination"`, `"density"` (of cells), `"growth"` (their other traits).
            Default 1.

    Returns:
        The metadata, a `pandas.DataFrame`.

    Raises:
        ValueError: if `folder` holds anything, or an argument is out of its range.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            "write_screen needs an empty or new folder, so that no older picture is taken for one of the screen; "
            f"{folder} already holds something. Name another folder or empty this one."
        )
    _check(image_size, batch_effect)
    metadata = layout(seed, treatments, experiments)
    effects = sirna_effects(seed, treatments, POSITIVE_CONTROLS)
    with tqdm(total=len(metadata), unit="site", desc="Writing the screen") as progress:
        for (experiment, plate), rows in metadata.groupby(["experiment", "plate"], sort=False):
            appearance = _appearance(experiment, plate, seed, image_size, batch_effect)
            plate_folder = folder / "images" / experiment / f"Plate{plate}"
            plate_folder.mkdir(parents=True)
            for row in rows.itertuples():
                image = _draw(row, appearance, effects, seed, image_size)
                for channel, pixels in enumerate(image, start=1):
                    name = f"{row.well}_s{row.site}_w{channel}.png"
                    Image.fromarray(pixels).save(plate_folder / name, compress_level=1)
                progress.update()
    # Last, and under its name only when whole: a screen without metadata.csv is half-written.
    unfinished = folder / "metadata.csv.tmp"
    metadata.to_csv(unfinished, index=False)
    os.replace(unfinished, folder / "metadata.csv")
    return metadata


def draw_site(site_id, seed=0, image_size=48, treatments=TREATMENTS, experiments=None, batch_effect=1.0):
    """One site of the screen that `write_screen` writes with the same arguments, without the others.

    Args:
        site_id: such as `"HUVEC-01_1_B02_1"`.
        seed, image_size, treatments, experiments, batch_effect: as for `write_screen`.

    Returns:
        uint8 array `(6, image_size, image_size)`.

    Raises:
        ValueError: if the screen has no such site.
    """
    _check(image_size, batch_effect)
    metadata = layout(seed, treatments, experiments)
    rows = metadata[metadata.site_id == site_id]
    if rows.empty:
        first, last = metadata.site_id.iloc[[0, -1]]
        raise ValueError(f"The screen has no site {site_id!r}; its {len(metadata)} sites go from {first} to {last}.")
    row = next(rows.itertuples())
    appearance = _appearance(row.experiment, row.plate, seed, image_size, batch_effect)
    return _draw(row, appearance, sirna_effects(seed, treatments, POSITIVE_CONTROLS), seed, image_size)


def _appearance(experiment, plate, seed, image_size, batch_effect):
    cell_type, number = experiment.split("-")
    return expose(appearance_of(seed, cell_type, int(number), plate, batch_effect), image_size)


def _draw(row, appearance, effects, seed, image_size):
    code = CELL_TYPES.index(row.cell_type)
    key = [seed, 3, code, int(row.experiment.split("-")[1]), row.plate, ord(row.well[0]), int(row.well[1:])]
    well_rng, site_rng = (np.random.default_rng([*key, site]) for site in (0, row.site))
    edge = row.well[0] in EDGE_ROWS or row.well[1:] in EDGE_COLUMNS
    return photograph(appearance, effects[row.sirna_id, code], edge, well_rng, site_rng, image_size)


def _check(image_size, batch_effect):
    if image_size < 16:
        raise ValueError(f"image_size counts pixels, at least 16; received image_size={image_size}.")
    strengths = batch_effect if isinstance(batch_effect, dict) else {SHIFTS[0]: batch_effect}
    if unknown := sorted(map(str, strengths.keys() - set(SHIFTS))):
        raise ValueError(f"batch_effect knows the shifts {', '.join(SHIFTS)}; received {', '.join(unknown)}.")
    if not all(strength >= 0 for strength in strengths.values()):
        raise ValueError(f"batch_effect is a strength >= 0, 0 for none; received batch_effect={batch_effect}.")


def main():
    parser = argparse.ArgumentParser(prog="python -m tfrecords.synthetic", description=__doc__)
    parser.add_argument("destination", metavar="DEST", help="an empty or new folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_screen(arguments.destination, seed=arguments.seed)


if __name__ == "__main__":
    main()
