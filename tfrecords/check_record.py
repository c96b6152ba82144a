"""Checks one record against the row of the index that describes it."""

import pandas as pd
import tensorflow as tf

_TEXTS = {"image", "well", "well_type", "experiment", "cell_type", "site_id"}
_NUMBERS = {"plate", "site"}


def expectations(manifest):
    """What `check_record` needs of a manifest: a small dict, cheap to send to another process."""
    label = manifest["options"]["label"]
    return {
        "image_shape": manifest["image_shape"],
        "planes": manifest["planes"],
        "experiments": manifest["experiments"],
        "label": label,
        "classes": {entry["value"]: number for number, entry in enumerate(manifest["classes"])},
    }


def check_record(record, row, shard, expected):
    """Checks keys, types, pixels, values, place and label of a record.

    Args:
        record: bytes of a serialized `tf.train.Example`.
        row: dict, its row of the index.
        shard: dict, the manifest's entry of its file.
        expected: of `expectations`.

    Yields:
        str: what is wrong.
    """
    try:
        example = tf.train.Example.FromString(record)
    except Exception as error:  # protobuf's DecodeError, which TensorFlow does not name.
        yield f"is no tf.train.Example ({error})"
        return
    values = {}
    for key, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values[key] = list(getattr(feature, kind).value) if kind else []
    wanted = _TEXTS | _NUMBERS | ({"sirna"} if not pd.isna(row["sirna_id"]) else set())
    if set(values) != wanted:
        yield f"has the keys {sorted(values)}, expected {sorted(wanted)}"
    for key in sorted(wanted & set(values)):
        kind = bytes if key in _TEXTS else int
        count = len(expected["planes"] or [None]) if key == "image" else 1
        if len(values[key]) != count or not all(isinstance(value, kind) for value in values[key]):
            name = "bytes" if key in _TEXTS else "int64"
            yield f"{key} holds {len(values[key])} values or another type, expected {count} of {name}"
        elif key == "image":
            yield from _check_image(values[key], expected)
        else:
            found = values[key][0].decode(errors="replace") if key in _TEXTS else values[key][0]
            if found != row["sirna_id" if key == "sirna" else key]:
                yield f"{key} is {found!r}, expected {row['sirna_id' if key == 'sirna' else key]!r}"
    kind = "treatment" if row["well_type"] == "treatment" else "control"
    for key, found in (("split", row["split"]), ("experiment", row["experiment"]), ("kind", kind)):
        if found != shard[key]:
            yield f"{key} is {found!r}, but the file is one of {shard[key]!r}"
    label, number = row[expected["label"]], row["label"]
    if not pd.isna(label) and (pd.isna(number) or expected["classes"].get(label) != number):
        yield f"the label {label!r} has the number {number} in the index, but not in the class map"
    if row["experiment"] not in expected["experiments"][row["split"]]:
        yield f"the experiment {row['experiment']!r} is not one of the split {row['split']!r}"


def _check_image(values, expected):
    height, width, channels = expected["image_shape"]
    if expected["planes"] is None:
        if len(values[0]) != height * width * channels:
            yield f"the image has {len(values[0])} bytes, expected {height} x {width} x {channels}"
        return
    for number, (data, count) in enumerate(zip(values, expected["planes"], strict=True)):
        try:
            # The reader's own decoder.
            shape = tf.io.decode_png(data).shape.as_list()
        except tf.errors.InvalidArgumentError as error:
            yield f"the PNG file {number} cannot be decoded ({error.message.splitlines()[0][:200]})"
            continue
        if shape != [height, width, count]:
            found = " x ".join(map(str, shape))
            yield f"the PNG file {number} has {found} pixels and channels, expected {height} x {width} x {count}"
