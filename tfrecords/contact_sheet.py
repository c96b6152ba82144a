"""A few sites of each cell type in one picture."""

import io
import math
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw, ImageFont

from tfrecords.image_batches import complaint_in, image_batches
from tfrecords.listing import fetch_shards, read_index
from tfrecords.manifest import read_manifest
from tfrecords.mirror import local_folder
from tfrecords.record_images import record_images
from tfrecords.whole import write_whole

# Colour of each channel of RxRx1, and the grey level at which it is reached (rxrx1-utils, rxrx/io.py, RGB_MAP).
COLOURS = (
    ((19, 0, 249), 51),
    ((42, 255, 31), 107),
    ((255, 0, 25), 64),
    ((45, 255, 252), 191),
    ((250, 0, 253), 89),
    ((254, 255, 40), 191),
)
_MARGIN, _TEXT = 4, 14


def write_contact_sheet(dest, file, columns=6, edge=160):
    """Writes a PNG picture with a row of sites for each cell type.

    The sites are of as many experiments as there is room for, one of the middle each. Damaged records stop it.

    Args:
        dest: folder of records, or URL of one; the shards of the sites shown are fetched first.
        file: picture to write, outside `dest`, where it would be a stray file.
        columns: sites in a row.
        edge: largest height and width of a site in pixels; larger images are made smaller by averaging areas.

    Raises:
        ValueError: if the picture would lie in the folder of records, and for a damaged record, which is named.
    """
    folder, file = local_folder(dest), Path(file)
    if folder.resolve() in file.resolve().parents:
        raise ValueError(f"The picture {str(file)!r} would lie in the folder of records. Name a file elsewhere.")
    manifest = read_manifest(folder)
    sites = _choose(read_index(folder, manifest), columns)
    source = record_images(fetch_shards(dest, manifest, {*sites["shard"]}), sites, manifest)
    batches = image_batches(source, tf.range(len(sites), dtype=tf.int64), len(sites))
    try:
        _, images = next(batches.as_numpy_iterator())
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(complaint_in(error) or str(error)) from error
    options = manifest["options"]
    stains = None if options["layout"] == "screen" else options["channels"]
    pictures = [_shrink(to_rgb(image, stains), edge) for image in images]
    names = [site_id.encode("ascii", "replace").decode() for site_id in sites["site_id"]]
    longest = max(math.ceil(ImageFont.load_default().getlength(name)) for name in names)
    width = max(pictures[0].width, min(longest, edge)) + _MARGIN
    height = pictures[0].height + _TEXT + _MARGIN
    rows = {cell_type: row for row, cell_type in enumerate(dict.fromkeys(sites["cell_type"]))}
    across = max(sites["cell_type"].value_counts())
    sheet = Image.new("RGB", (across * width + _MARGIN, len(rows) * height + _MARGIN))
    used = dict.fromkeys(rows, 0)
    for site, picture, text in zip(sites.itertuples(), pictures, names, strict=True):
        x, y = _MARGIN + used[site.cell_type] * width, _MARGIN + rows[site.cell_type] * height
        used[site.cell_type] += 1
        sheet.paste(picture, (x, y + _TEXT))
        name = Image.new("RGB", (width - _MARGIN, _TEXT))  # Of its own, so that a long name is cut off.
        ImageDraw.Draw(name).text((0, 0), text, fill="white")
        sheet.paste(name, (x, y))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_whole(file, data.getvalue())


def to_rgb(image, stains=None):
    """An image in colours: six channels in those of RxRx1, three as red, green, blue, others as the grey of their mean.

    Args:
        image: uint8 `(height, width, channels)`.
        stains: number of each channel in RxRx1, 1 to 6, for its colours at its grey levels. Default: of another screen,
            whose channels have them in their order, and in full at 255.

    Returns:
        numpy.ndarray, uint8, `(height, width, 3)`.
    """
    channels = image.shape[-1]
    if channels == 3:
        return image
    if channels != len(COLOURS):
        return np.repeat(image.mean(axis=-1, keepdims=True).round().astype(np.uint8), 3, axis=-1)
    chosen = [COLOURS[stain - 1] for stain in stains or range(1, channels + 1)]
    colours = np.array([colour for colour, _ in chosen], np.float32)
    full = np.array([level for _, level in chosen], np.float32) if stains else 255
    return np.clip(np.minimum(image / full, 1) @ colours, 0, 255).astype(np.uint8)


def _choose(index, columns):
    chosen = []
    for _, of_type in index.groupby("cell_type", sort=True):
        treated = of_type[of_type["well_type"] == "treatment"]
        experiments = (treated if len(treated) else of_type).groupby("experiment", sort=True)
        names = sorted(experiments.groups)
        count = min(columns, len(names))
        for number in range(count):
            rows = experiments.get_group(names[number * len(names) // count]).sort_values("site_id")
            chosen.append(rows.index[len(rows) // 2])
    return index.loc[chosen].reset_index(drop=True)


def _shrink(pixels, edge):
    picture = Image.fromarray(pixels)
    scale = edge / max(picture.size)
    if scale >= 1:
        return picture
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.BOX)
