"""What the images of a job are standardized by."""

import functools

from tfrecords import channel_statistics, list_sites, read_manifest, standardize
from tfrecords.manifest import MANIFEST
from tfrecords.mirror import local_folder
from tfrecords.normalize import normalizer

BY_GROUP = {"experiment": {"group": "experiment"}, "plate": {"group": "plate", "well_types": ("negative_control",)}}
NORMALIZATIONS = ("image", *BY_GROUP)


def normalization(records, split, kind, kinds=("treatment",)):
    """`normalize` of `read_records` for a split of the records.

    Args:
        records: folder of records, or URL of one.
        split: whose images are read: an experiment never seen is standardized by its own images, without labels.
        kind: `"image"`: each by itself; `"experiment"`: by all images of its experiment; `"plate"`: by the negative
            controls of its plate; in whatever split they are (train has the first sites of its wells, id_test the
            second).
        kinds: which wells are read.

    Raises:
        ValueError: if the kind is unknown, or a plate of these wells has no negative controls.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"Unknown normalization {kind!r}. Expected one of {', '.join(NORMALIZATIONS)}.")
    if kind == "image":
        return standardize
    try:
        manifest = (local_folder(records) / MANIFEST).read_bytes()
        statistics = _statistics(records, manifest, _of_same_experiments(records, split), kind)
        normalizer(statistics, list_sites(records, split, kinds))  # now, and not after hours of training
    except ValueError as error:
        raise ValueError(
            f"The split {split!r} cannot be standardized by {kind}: {error} `--normalize experiment` and `image` need "
            "no controls."
        ) from error
    return statistics


@functools.lru_cache(maxsize=4)  # splits of the same experiments have the same; records built anew another manifest
def _statistics(records, manifest, splits, kind):
    return channel_statistics(records, splits, **BY_GROUP[kind])


def _of_same_experiments(records, split):
    """The split, and others that have some of its experiments."""
    experiments = read_manifest(local_folder(records))["experiments"]
    return tuple(name for name, found in experiments.items() if {*found} & {*experiments[split]})
