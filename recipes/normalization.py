"""What the images of a job are standardized by."""

from tfrecords import channel_statistics, standardize

BY_GROUP = {"experiment": {"group": "experiment"}, "plate": {"group": "plate", "well_types": ("negative_control",)}}
NORMALIZATIONS = ("image", *BY_GROUP)


def normalization(records, split, kind):
    """`normalize` of `read_records` for a split of the records.

    Args:
        records: folder of records, or URL of one.
        split: whose images are read: an experiment never seen is standardized by its own images, without labels.
        kind: `"image"`: each by itself; `"experiment"`: by all images of its experiment; `"plate"`: by the negative
            controls of its plate.

    Raises:
        ValueError: if the kind is unknown, or there are no negative controls.
    """
    if kind == "image":
        return standardize
    if kind not in BY_GROUP:
        raise ValueError(f"Unknown normalization {kind!r}. Expected one of {', '.join(NORMALIZATIONS)}.")
    return channel_statistics(records, split, **BY_GROUP[kind])
