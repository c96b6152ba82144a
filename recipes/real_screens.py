"""Screens of images that nobody drew for us, as RxRx1 lies on disk: for the ladder.

- `painted`: fields of real cells, with phenotypes painted on them by known image operations. The experiments of the
  screen are the plates of real experiments: of each, one plate is left out for test and one for validation.
- `mnist-usps`, `usps-mnist`: digits of two domains, trained on the first, tested on the second. There is one training
  experiment, and validation is on other digits of the *first* domain.

The images are not ours to give: RxRx1's are CC BY-NC-SA 4.0 (rxrx.ai), MNIST's and USPS's are found with them.
"""

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from tfrecords.screen_layout import COLUMNS, WELLS
from tfrecords.whole import write_whole

CHANNELS = 6
CUT = 96  # pixels of a field that an image shows: two or three cells across
DIGIT = 28


def write_painted(folder, images, seed=0, image_size=48, treatments=8, sites=16, test_sites=32):
    """Writes a screen of painted phenotypes.

    Treatment k does one of the eight operations of `OPERATIONS` to one channel of the field. Which two of the four
    plates of an experiment are left out turns with the seed; operations and channels do not depend on it.

    Args:
        folder: new or empty.
        images: folder of RxRx1's pictures: `SPLIT/EXPERIMENT/PlateN/WELL_sS_wC.png`, 4 plates an experiment. Sites
            without all six channels are not used.
        seed: int >= 0.
        image_size: edge in pixels; each image is `CUT` pixels of a field, at a random place.
        treatments: number of classes, up to 48.
        sites: images of each treatment on each plate of training (as many again for id_test) and of validation.
        test_sites: the same for test.

    Returns:
        The metadata, `pandas.DataFrame`.

    Raises:
        ValueError: if the folder is in use, there are no such pictures, or too many treatments for a plate.
    """
    if not 2 <= treatments <= len(OPERATIONS) * CHANNELS:
        raise ValueError(f"treatments must be 2 to {len(OPERATIONS) * CHANNELS}; received {treatments}.")
    wells = max(sites, test_sites) * treatments + sites
    if wells > len(WELLS):
        raise ValueError(
            f"A plate has {len(WELLS)} wells; {treatments} treatments would need {wells}: take fewer sites."
        )
    fields, rows, pictures = read_fields(images), [], {}
    left_out = {1 + seed % 4: "test", 1 + (seed + 1) % 4: "val"}
    for (experiment, plate), field in fields.items():
        split, cell_type = left_out.get(plate, "train"), experiment.split("-")[0]
        rng = np.random.default_rng([seed, len(rows)])
        each = test_sites if split == "test" else sites
        kinds = [k for k in range(treatments) for _ in range(each)] + [treatments] * sites
        for well, kind in zip(rng.permutation(WELLS).tolist(), kinds, strict=False):
            for site in (1, 2):
                view = _cut(field, rng)
                if kind < treatments:
                    view = paint(view, kind, rng)
                # The plates are the experiments: what differs between them is what a model has to bear.
                row = _row(split, cell_type, f"{cell_type}-{plate:02d}", 1, well, site, kind, treatments)
                rows.append(row)
                pictures[row[0]] = _shrink(view, image_size)
    return _write(folder, rows, pictures)


def write_digits(folder, data, source, seed=0, image_size=DIGIT, train=1800, held_out=500, test=2000):
    """Writes a screen of digits: training, id_test and validation from one domain, test from the other.

    Args:
        folder: new or empty.
        data: folder with `t10k-images-idx3-ubyte.gz`, `t10k-labels-idx1-ubyte.gz` (MNIST) and `usps.h5` (groups
            `train` and `test` of `data` and `target`). USPS's 16 x 16 pixels are enlarged to MNIST's 28 x 28, as is
            usual.
        source: "mnist" or "usps".
        seed: which digits are drawn.
        image_size: edge in pixels; 28 alone.
        train, held_out, test: numbers of images; `held_out` each for id_test and validation.

    Returns:
        The metadata, `pandas.DataFrame`.

    Raises:
        ValueError: if the folder is in use, or there are not so many digits.
    """
    if image_size != DIGIT:
        raise ValueError(f"Digits have {DIGIT} pixels; received image_size={image_size}.")
    domains = {"mnist": read_mnist, "usps": read_usps}
    (target,) = set(domains) - {source}
    rng = np.random.default_rng(seed)
    parts = [("train", 1, source, train), ("train", 2, source, held_out), ("val", 1, source, held_out)]
    parts.append(("test", 1, target, test))
    read = {name: domains[name](data) for name in domains}
    order = {name: iter(rng.permutation(len(read[name][1]))) for name in domains}
    for name in domains:
        asked, found = sum(part[3] for part in parts if part[2] == name), len(read[name][1])
        if asked > found:
            raise ValueError(f"{name.upper()} has {found} digits, and {asked} were asked for.")
    rows, pictures = [], {}
    for split, site, domain, count in parts:
        images, labels = read[domain]
        experiment = f"{domain.upper()}-{'02' if split == 'val' else '01'}"
        for i in range(count):
            k = next(order[domain])
            place = i + (train if site == 2 else 0)  # each digit has a well of its own
            plate, well = 1 + place // len(WELLS), WELLS[place % len(WELLS)]
            row = _row(split, domain.upper(), experiment, plate, well, site, int(labels[k]), 10)
            rows.append(row)
            pictures[row[0]] = images[k][None]
    return _write(folder, rows, pictures)


# Sources.


def read_fields(images):
    """`{(experiment, plate): (6, height, width) uint8}`: of each plate one field that has all its channels.

    Raises:
        ValueError: naming the folder in which there is none, or two experiments of one cell type.
    """
    fields = {}
    for first in sorted(Path(images).glob("*/*/Plate*/*_w1.png")):
        experiment, plate = first.parts[-3], int(first.parent.name.removeprefix("Plate"))
        files = [first.with_name(first.name.replace("_w1", f"_w{c}")) for c in range(1, CHANNELS + 1)]
        if (experiment, plate) not in fields and all(file.is_file() for file in files):
            fields[experiment, plate] = np.stack([np.asarray(Image.open(file)) for file in files])
    types = [experiment.split("-")[0] for experiment in {experiment for experiment, _ in fields}]
    if twice := next((name for name in types if types.count(name) > 1), None):
        raise ValueError(f"{images}: expected one experiment of a cell type; found {types.count(twice)} of {twice}.")
    if not fields:
        raise ValueError(
            f"{images}: expected RxRx1's pictures SPLIT/EXPERIMENT/PlateN/WELL_sS_wC.png with channels 1 to {CHANNELS} "
            "of a site; found none."
        )
    return fields


def read_mnist(data):
    """MNIST's test set: `(images uint8 (n, 28, 28), labels)`."""
    parts = []
    for name, header in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8)):
        with gzip.open(Path(data) / name) as file:
            parts.append(np.frombuffer(file.read(), np.uint8, offset=header))
    return parts[0].reshape(-1, DIGIT, DIGIT), parts[1]


def read_usps(data):
    """USPS, both parts: `(images uint8 (n, 28, 28), labels)`."""
    images, labels = [], []
    with h5py.File(Path(data) / "usps.h5") as file:
        for part in ("train", "test"):
            images.append(np.asarray(file[part]["data"]).reshape(-1, 16, 16))
            labels.append(np.asarray(file[part]["target"]))
    pixels = np.round(255 * np.clip(np.concatenate(images), 0, 1)).astype(np.uint8)
    return np.stack([_resize(image, DIGIT, Image.BILINEAR) for image in pixels]), np.concatenate(labels)


# Painting.


def paint(image, treatment, rng):
    """The phenotype of a treatment, painted on an image; its strength varies by half from image to image.

    Args:
        image: uint8 `(6, height, width)`.
        treatment: int; `OPERATIONS[treatment % 8]` on channel `(treatment % 8 + treatment // 8) % 6`.
        rng: NumPy generator.
    """
    operation, channel = OPERATIONS[treatment % len(OPERATIONS)], sum(divmod(treatment, len(OPERATIONS))) % CHANNELS
    painted = image.copy()
    painted[channel] = operation(image[channel], rng.uniform(0.5, 1.5), rng)
    return painted


def _mix(old, new, strength):
    """As much of the new picture as the strength says; beyond 1 more of it than there is."""
    return np.clip(old + strength * (new.astype(float) - old), 0, 255).astype(np.uint8)


def _filtered(picture_filter):
    def apply(pixels, strength, rng):
        return _mix(pixels, np.asarray(Image.fromarray(pixels).filter(picture_filter)), 0.5 * strength)

    return apply


def _streaks(pixels, strength, rng):
    smeared = np.mean([np.roll(pixels, shift, axis=1) for shift in range(-4, 5)], axis=0)
    return _mix(pixels, smeared, 0.5 * strength)


def _spots(pixels, strength, rng, sign):
    """Round spots of two pixels, where there is signal."""
    bright = np.argwhere(pixels >= np.quantile(pixels, 0.7))
    marks = np.zeros(pixels.shape, np.uint8)
    marks[tuple(bright[rng.integers(len(bright), size=round(40 * strength))].T)] = 255
    marks = np.asarray(Image.fromarray(marks).filter(ImageFilter.GaussianBlur(2)), float)
    return np.clip(pixels + sign * 1.5 * pixels.std() * marks / max(marks.max(), 1), 0, 255).astype(np.uint8)


def _contrast(pixels, strength, rng):
    """Darkens what is darker than its surroundings, brightens what is brighter."""
    around = np.asarray(Image.fromarray(pixels).filter(ImageFilter.BoxBlur(12)), float)
    return np.clip(pixels + 0.6 * strength * (pixels - around), 0, 255).astype(np.uint8)


OPERATIONS = (
    _filtered(ImageFilter.GaussianBlur(3)),
    _filtered(ImageFilter.UnsharpMask(3, 200, 0)),
    _filtered(ImageFilter.MaxFilter(7)),
    _filtered(ImageFilter.MinFilter(7)),
    lambda pixels, strength, rng: _spots(pixels, strength, rng, 1),
    lambda pixels, strength, rng: _spots(pixels, strength, rng, -1),
    _streaks,
    _contrast,
)


# Writing.


def _cut(field, rng):
    y, x = (rng.integers(length - CUT + 1) for length in field.shape[1:])
    return field[:, y : y + CUT, x : x + CUT]


def _resize(pixels, size, how):
    return np.asarray(Image.fromarray(pixels).resize((size, size), how))


def _shrink(image, size):
    return np.stack([_resize(pixels, size, Image.BOX) for pixels in image])


def _row(split, cell_type, experiment, plate, well, site, kind, treatments):
    well_id = f"{experiment}_{plate}_{well}"
    well_type = "treatment" if kind < treatments else "negative_control"
    sirna = f"s{kind}" if kind < treatments else "EMPTY"
    return (f"{well_id}_{site}", well_id, cell_type, split, experiment, plate, well, site, well_type, sirna, kind)


def _write(folder, rows, pictures):
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is in use: expected a new or empty folder.")
    for _, _, _, _, experiment, plate, well, site, *_ in rows:
        place = folder / "images" / experiment / f"Plate{plate}"
        place.mkdir(parents=True, exist_ok=True)
        for channel, pixels in enumerate(pictures[f"{experiment}_{plate}_{well}_{site}"], 1):
            Image.fromarray(pixels).save(place / f"{well}_s{site}_w{channel}.png", compress_level=1)
    metadata = pd.DataFrame(rows, columns=COLUMNS)
    write_whole(folder / "metadata.csv", metadata.to_csv(index=False).encode())
    return metadata
