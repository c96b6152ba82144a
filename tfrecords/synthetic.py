"""A small synthetic screen in exactly the layout of RxRx1: `python -m tfrecords.synthetic DEST`."""

import argparse
import os
import pathlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from tfrecords.screen_appearance import appearance_of, expose, photograph
from tfrecords.screen_layout import POSITIVE_CONTROLS, layout
from tfrecords.screen_phenotype import CELL_TYPES, sirna_effects

EDGE_ROWS, EDGE_COLUMNS = "BO", ("02", "23")


def write_screen(folder, seed=0, image_size=48, treatments=48, experiments=None, batch_effect=1.0):
    """Write a synthetic siRNA screen to `folder`, as RxRx1 lies on disk.

    `folder/metadata.csv` has RxRx1's eleven columns, `folder/images/EXP/PlateN/WELL_sS_wC.png` one 8-bit grey picture
    per site and channel. The column `dataset` says train, val or test as in RxRx1-WILDS: val and test hold experiments
    that train does not; id_test is train's site 2. By default: 17 train, 4 val and 8 test experiments of four cell
    types, 48 treatments, 3,480 sites.

    Every site is drawn from its own random generator, keyed by the seed and the site's name, so that its pixels do not
    depend on the order in which sites are drawn.

    Args:
        folder: where to write; made if need be, else empty.
        seed: int; it fixes every pixel. Default 0.
        image_size: height and width in pixels of the fixed field of view. Default 48.
        treatments: number of treatment siRNAs, a multiple of 4. Default 48.
        experiments: `{"train"|"val"|"test": {cell type: number}}`; by default `screen_layout.EXPERIMENTS`.
        batch_effect: strength of everything in which experiments differ, 0 for none. Default 1.

    Returns:
        The metadata, a `pandas.DataFrame`.

    Raises:
        ValueError: if `folder` holds anything, or an argument is out of its range.

    Example:

    >>> metadata = write_screen("screen", treatments=8, experiments={"train": {"RPE": 1}})   # doctest: +SKIP
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"write_screen needs an empty or new folder, so that no older picture is taken for one of the screen; "
            f"{folder} already holds something. Name another folder or empty this one."
        )
    if image_size < 16:
        raise ValueError(f"image_size counts pixels, at least 16; received image_size={image_size}.")
    metadata = layout(seed, treatments, experiments)
    effects = sirna_effects(seed, treatments, POSITIVE_CONTROLS)
    with tqdm(total=len(metadata), unit="site", desc="Writing the screen") as progress:
        for (experiment, plate), rows in metadata.groupby(["experiment", "plate"], sort=False):
            cell_type, number = experiment.split("-")
            code, number = CELL_TYPES.index(cell_type), int(number)
            appearance = expose(appearance_of(seed, cell_type, number, plate, batch_effect), image_size)
            plate_folder = folder / "images" / experiment / f"Plate{plate}"
            plate_folder.mkdir(parents=True)
            for row in rows.itertuples():
                place = [ord(row.well[0]), int(row.well[1:])]
                edge = row.well[0] in EDGE_ROWS or row.well[1:] in EDGE_COLUMNS
                key = [seed, 3, code, number, plate, *place]
                image = photograph(
                    appearance,
                    effects[row.sirna_id, code],
                    edge,
                    np.random.default_rng([*key, 0]),
                    np.random.default_rng([*key, row.site]),
                    image_size,
                )
                for channel, pixels in enumerate(image, start=1):
                    name = f"{row.well}_s{row.site}_w{channel}.png"
                    Image.fromarray(pixels).save(plate_folder / name, compress_level=1)
                progress.update()
    # Last, and under its name only when whole: a screen without metadata.csv is half-written.
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "metadata.csv.tmp"
    metadata.to_csv(unfinished, index=False)
    os.replace(unfinished, folder / "metadata.csv")
    return metadata


def main():
    parser = argparse.ArgumentParser(prog="python -m tfrecords.synthetic", description=__doc__)
    parser.add_argument("destination", metavar="DEST", help="an empty or new folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_screen(arguments.destination, seed=arguments.seed)


if __name__ == "__main__":
    main()
