"""Checks every record of a finished folder: `python -m tfrecords.verify DEST`."""

import argparse
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from tfrecords.devices import keep_tensorflow_off_gpu, leave_gpu_to_backend
from tfrecords.listing import read_index
from tfrecords.manifest import EXCLUDED, INDEX, MANIFEST, hash_bytes, read_manifest
from tfrecords.write import FOOTER, HEADER, scan_shard

_TEXTS = {"image", "well", "well_type", "experiment", "cell_type", "site_id"}
_NUMBERS = {"plate", "site"}


class Fault(NamedTuple):
    """Something wrong: `record` is its number in the file, or None where the file as a whole is meant."""

    file: str
    record: int | None
    message: str

    def __str__(self):
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{place}: {self.message}"


def verify_records(dest):
    """Checks files, checksums, frames, keys, images, labels, places and counts, and goes on after a fault.

    Args:
        dest: folder of records.

    Returns:
        List of `Fault`; empty if all is well.

    Raises:
        ValueError: if the folder is not whole, so that there is nothing to compare with.
    """
    leave_gpu_to_backend()
    dest = Path(dest)
    manifest = read_manifest(dest)
    faults = list(_check_files(dest, manifest))
    try:
        index = read_index(dest, manifest)
    except ValueError as error:
        return [*faults, Fault(INDEX, None, str(error))]
    expected = {name: rows.to_dict("records") for name, rows in index.groupby("shard")}
    home = {}
    for split in ("train", "val", "test"):
        for experiment in manifest["experiments"][split]:
            if home.setdefault(experiment, split) != split:
                faults.append(
                    Fault(MANIFEST, None, f"the experiment {experiment} is in {home[experiment]} and {split}")
                )
    with tqdm(total=len(index), unit="site", desc="verify") as progress:
        for shard in manifest["shards"]:
            if (dest / shard["name"]).is_file():
                faults += _check_shard(dest, shard, expected.get(shard["name"], []), manifest)
            progress.update(shard["count"])
    if len(index) != sum(shard["count"] for shard in manifest["shards"]):
        faults.append(Fault(INDEX, None, f"lists {len(index)} sites, not the number of records in {MANIFEST}"))
    for row in index[index["site_id"].duplicated()].itertuples():
        faults.append(Fault(row.shard, row.record, f"the site {row.site_id} is in another record as well"))
    return faults


def _check_files(dest, manifest):
    known = {shard["name"] for shard in manifest["shards"]} | {MANIFEST, INDEX, EXCLUDED}
    found = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    for name in sorted(known - found):
        yield Fault(name, None, "the file is missing")
    for name in sorted(found - known):
        yield Fault(name, None, "a stray file, which the manifest does not know")
    if EXCLUDED in found and hash_bytes((dest / EXCLUDED).read_bytes()) != manifest["excluded"]["sha256"]:
        yield Fault(EXCLUDED, None, "was changed after the build")


def _check_shard(dest, shard, rows, manifest):
    path = dest / shard["name"]
    faults = []
    scanned = scan_shard(path, shard["name"])
    if scanned is None:
        faults.append(Fault(shard["name"], None, "the frames of the records do not end where the file ends"))
    elif scanned.sha256 != shard["sha256"]:
        faults.append(Fault(shard["name"], None, "the checksum of the file is not the manifest's"))
    seen = 0
    for number, record in _records(path):
        seen = number + 1
        if isinstance(record, str):
            faults.append(Fault(shard["name"], number, record))
        elif number >= len(rows):
            faults.append(Fault(shard["name"], number, "a record too many"))
        else:
            faults += [
                Fault(shard["name"], number, text) for text in _check_record(record, rows[number], shard, manifest)
            ]
    if seen != shard["count"] or shard["count"] != len(rows):
        text = f"{seen} records could be read; the manifest counts {shard['count']}, the index {len(rows)}"
        faults.append(Fault(shard["name"], None, text))
    return faults


def _records(path):
    """Gives (number, record), or (number, what is wrong) for a damaged frame, and goes on behind it if it can."""
    number, position, total = 0, 0, os.path.getsize(path)
    with tempfile.TemporaryDirectory() as folder:
        reading = path
        while position < total:
            try:
                for record in tf.data.TFRecordDataset(str(reading), buffer_size=2**20).as_numpy_iterator():
                    yield number, record
                    number, position = number + 1, position + HEADER + len(record) + FOOTER
            except tf.errors.OpError as error:
                yield number, f"the frame is damaged ({error.message.split(' [Op')[0].splitlines()[0][:200]})"
            else:
                return
            with open(path, "rb") as file:
                file.seek(position)
                header = file.read(HEADER)
                length = struct.unpack_from("<Q", header)[0] if len(header) == HEADER else total
                number, position = number + 1, position + HEADER + length + FOOTER
                if position > total:
                    return
                # TensorFlow's reader starts at a file's beginning only, so it is given the rest as a file.
                file.seek(position)
                reading = Path(folder) / "rest.tfrecord"
                reading.write_bytes(file.read())


def _check_record(record, row, shard, manifest):
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
        if len(values[key]) != 1 or not isinstance(values[key][0], bytes if key in _TEXTS else int):
            yield f"{key} holds {len(values[key])} values or another type, expected one of {_type_of(key)}"
        elif key == "image":
            height, width, channels = manifest["image_shape"]
            if len(values[key][0]) != height * width * channels:
                yield f"the image has {len(values[key][0])} bytes, expected {height} x {width} x {channels}"
        else:
            found = values[key][0].decode(errors="replace") if key in _TEXTS else values[key][0]
            expected = row["sirna_id" if key == "sirna" else key]
            if found != expected:
                yield f"{key} is {found!r}, expected {expected!r}"
    kind = "treatment" if row["well_type"] == "treatment" else "control"
    for key, found in (("split", row["split"]), ("experiment", row["experiment"]), ("kind", kind)):
        if found != shard[key]:
            yield f"{key} is {found!r}, but the file is one of {shard[key]!r}"
    label, number = row[manifest["options"]["label"]], row["label"]
    known = [entry["value"] for entry in manifest["classes"]]
    if not pd.isna(label) and (pd.isna(number) or not number < len(known) or known[number] != label):
        yield f"the label {label!r} has the number {number} in the index, but not in the class map"
    if row["experiment"] not in manifest["experiments"][row["split"]]:
        yield f"the experiment {row['experiment']!r} is not one of the split {row['split']!r}"


def _type_of(key):
    return "bytes" if key in _TEXTS else "int64"


def main(argv=None):
    """The command line; returns the exit status: 0 if all is well, 1 after a fault."""
    parser = argparse.ArgumentParser(prog="python -m tfrecords.verify", description=__doc__)
    parser.add_argument("dest", help="folder of records")
    dest = parser.parse_args(argv).dest
    keep_tensorflow_off_gpu()
    try:
        faults = verify_records(dest)
        manifest = read_manifest(dest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(fault)
    shards = manifest["shards"]
    print(
        f"{dest}: {len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'} in {len(shards):,} files with "
        f"{sum(shard['count'] for shard in shards):,} records, {sum(shard['bytes'] for shard in shards) / 1e6:,.1f} MB."
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
