"""Normalization by the statistics of more than one image: of an experiment, a plate, its controls, or a whole split."""

from fractions import Fraction

import numpy as np
import pandas as pd
import tensorflow as tf

from tfrecords.composition import GROUPS
from tfrecords.image_batches import image_batches
from tfrecords.labels import WELL_TYPES
from tfrecords.listing import KINDS, fetch_shards, list_sites
from tfrecords.manifest import channel_names, read_manifest
from tfrecords.mirror import local_folder
from tfrecords.record_images import record_images


def channel_statistics(dest, split, *, group=None, well_types=WELL_TYPES):
    """Mean and standard deviation of each channel, over all pixels of the sites of a group.

    One pass over the sites that are needed, exact (sums of integers). Labels are not used. The statistics of a split
    serve that split, so that an experiment never seen in training is normalized by its own: this is no leak of labels,
    but it takes the experiment's images together, and a single image of a new experiment cannot be normalized so. With
    `group=None` and the split `train` the table serves every split. Splits that have experiments in common, as `train`
    and `id_test` have, are best given together: else one plate is normalized in two ways, and of few wells each.

    Args:
        dest: folder of records, or URL of one.
        split: `train`, `id_test`, `val` or `test`, or a list of some of them.
        group: `"experiment"`, `"plate"`, or None (default) for one group of all.
        well_types: wells to take; `("negative_control",)` with `group="plate"` is the usual way of plate screens.
            Default: all.

    Returns:
        pandas.DataFrame with a row for each group, indexed by `experiment` (and `plate`); `sites`, `mean_1`, `std_1`
        and so on (grey levels; the deviation is that of the population, as in the competition's `pixel_stats.csv`).
        For `read_records(normalize=...)`. To keep it: `to_pickle`; `attrs` say which channels and plates it is of,
        and `read_records` refuses others.

    Raises:
        ValueError: if the group is unknown, or there is no such well.
    """
    if group is not None and group not in GROUPS:
        raise ValueError(f"Unknown group {group!r}. Expected {', '.join(map(repr, GROUPS))}, or None for one of all.")
    folder = local_folder(dest)
    manifest = read_manifest(folder)
    splits = [split] if isinstance(split, str) else [*split]
    sites = pd.concat([list_sites(folder, name, KINDS, check=False) for name in splits])
    sites = sites[sites["well_type"].isin([well_types] if isinstance(well_types, str) else well_types)]
    if sites.empty:
        raise ValueError(
            f"The split {' and '.join(map(repr, splits))} has no wells of the types {well_types!r}. Expected some of "
            f"{WELL_TYPES}."
        )
    sites = sites.reset_index(drop=True)
    source = record_images(fetch_shards(dest, manifest, {*sites["shard"]}), sites, manifest)
    step = max(1, 2**24 // int(np.prod(manifest["image_shape"])))
    data = image_batches(source, tf.range(len(sites), dtype=tf.int64), step, _sums)
    data = data.map(lambda _, sums: sums)
    sums = np.concatenate(list(data.as_numpy_iterator()))
    pixels = manifest["image_shape"][0] * manifest["image_shape"][1]
    keys = [sites[key] for key in GROUPS[group]] if group else np.zeros(len(sites), int)
    table = {}
    for key, places in sites.groupby(keys).indices.items():
        count = pixels * len(places)
        row = {"sites": len(places)}
        for channel, (total, squares) in enumerate(sums[places].sum(axis=0).tolist(), 1):
            row[f"mean_{channel}"] = total / count
            row[f"std_{channel}"] = float(Fraction(squares * count - total**2, count**2)) ** 0.5
        table[key] = row
    names = list(GROUPS[group]) if group else [None]
    index = pd.MultiIndex.from_tuples(table, names=names) if len(names) > 1 else pd.Index(list(table), name=names[0])
    table = pd.DataFrame(list(table.values()), index=index)
    table.attrs = {"channels": [*map(str, channel_names(manifest))]}
    if group == "plate":
        table.attrs["plates"] = dict(zip(sites["plate"].tolist(), sites["plate_name"], strict=True))
    return table


def normalizer(normalize, sites, channels=None):
    """Gives a function of (images, row numbers of `sites`) from `normalize`, a function of images, a table, or None.

    Args:
        normalize: see `read_records`.
        sites: table of `list_sites`, or None if `normalize` is a function.
        channels: names of the images' channels, where they are known.

    Raises:
        ValueError: if the table lacks the group of a site, or is of other channels, or of other plates' numbers.
    """
    if normalize is None:
        return lambda images, rows: images
    if callable(normalize):
        return lambda images, rows: normalize(images)
    if not isinstance(normalize, pd.DataFrame):
        raise ValueError(
            "normalize must be a function of images, a table of channel_statistics or None; received "
            f"{type(normalize)}."
        )
    _check_attributes(normalize.attrs, sites, channels)
    names = [name for name in normalize.index.names if name is not None]
    if names and not normalize.index.is_unique:
        first = normalize.index[normalize.index.duplicated()].to_frame().iloc[0]
        raise ValueError(
            f"The statistics have several rows for {', '.join(f'{name} {first[name]}' for name in names)}. Compute "
            "those of several splits together: channel_statistics(dest, [split, ...])."
        )
    place = np.zeros(len(sites), np.int64)
    if names:
        keys = pd.MultiIndex.from_frame(sites[names]) if len(names) > 1 else pd.Index(sites[names[0]])
        place = normalize.index.get_indexer(keys)
    if (place < 0).any():
        site = sites.iloc[int(np.argmax(place < 0))]
        group = ", ".join(f"{name} {site.get(name + '_name', site[name])}" for name in names)
        raise ValueError(
            f"The statistics have no row for {group} (site "
            f"{site['site_id']!r}). Compute them with channel_statistics for the split that is read, "
            "of wells that each of its groups has."
        )
    count = sum(column.startswith("mean_") for column in normalize.columns)
    mean, deviation = (
        normalize[[f"{what}_{channel}" for channel in range(1, count + 1)]].to_numpy(np.float64)[place]
        for what in ("mean", "std")
    )
    gain = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    gain, offset = (tf.constant(values, tf.float32) for values in (gain, -mean * gain))
    return lambda images, rows: _move(images, tf.gather(gain, rows), tf.gather(offset, rows))


def _check_attributes(found, sites, channels):
    have = [*map(str, channels or ())]
    of = found.get("channels", have)
    if channels is not None and of != have:
        raise ValueError(
            f"The statistics are of the channels {', '.join(of)}; the records have {', '.join(have)}. "
            "Compute them with channel_statistics of these records."
        )
    plates = found.get("plates", {})
    names = dict(zip(sites["plate"].tolist(), sites["plate_name"], strict=True)) if plates else {}
    for number, name in names.items():
        if plates.get(number, name) != name:
            raise ValueError(
                f"The statistics are of records in which plate {number} is {plates[number]!r}; in these it is "
                f"{name!r}. Compute them with channel_statistics of these records."
            )


def _move(images, gain, offset):
    # Whole rows of pixels are long vectors, see `preprocess.standardize`.
    batch, height, width, channels = (tf.shape(images)[i] for i in range(4))
    rows = tf.cast(tf.reshape(images, (batch, height, width * channels)), tf.float32)
    rows = rows * tf.tile(gain, (1, width))[:, None] + tf.tile(offset, (1, width))[:, None]
    return tf.ensure_shape(tf.reshape(rows, tf.shape(images)), images.shape)


def _sums(image):
    """int64 `(channels, 2)`: the sum of the grey levels, and of their squares."""
    levels = tf.cast(image, tf.int32)
    columns = tf.stack([tf.reduce_sum(levels, axis=0), tf.reduce_sum(levels * levels, axis=0)], axis=-1)
    return tf.reduce_sum(tf.cast(columns, tf.int64), axis=0)
