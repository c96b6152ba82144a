"""One random byte flipped in each of 200 shards: none goes unseen, in verifying or in training.

Verified are all; read are 20, since each read is a pass over the data. `FLIPS=200 pytest tests/tfrecords/test_flips.py`
reads all.
"""

import os
import random
import time

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from tfrecords.build import build_records
from tfrecords.listing import list_sites
from tfrecords.manifest import read_manifest
from tfrecords.read import read_records
from tfrecords.repair import repair_records
from tfrecords.verify import verify_records

SHARDS = 200
READ = int(os.environ.get("FLIPS", 20))
BOTH = ("treatment", "control")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """50 experiments of one treatment well and one control, two sites each, one channel: 200 shards with a record."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(1, SHARDS // 4 + 1):
        experiment = f"HUVEC-{number:02d}"
        place = folder / "images" / experiment / "Plate1"
        place.mkdir(parents=True)
        for well, kind, sirna in (("B02", "negative_control", 2), ("B03", "treatment", number % 2)):
            for site in (1, 2):
                name = f"{experiment}_1_{well}"
                row = (f"{name}_{site}", name, "HUVEC", "train", experiment, 1, well, site, kind, f"s{sirna}", sirna)
                rows.append(row)
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(place / f"{well}_s{site}_w1.png")
    columns = "site_id well_id cell_type dataset experiment plate well site well_type sirna sirna_id"
    pd.DataFrame(rows, columns=columns.split()).to_csv(folder / "metadata.csv", index=False)
    return folder


def read_all(data, limit=60):
    """Gives images, labels and the error that ended a pass, which may not take longer than `limit` seconds."""
    start, images, labels, error = time.monotonic(), [], [], None
    try:
        for batch in data:
            images.append(batch[0].numpy())
            labels.append(batch[1].numpy())
    except tf.errors.InvalidArgumentError as caught:
        error = str(caught)
    assert time.monotonic() - start < limit
    return np.concatenate([np.zeros((0, 8, 8, 1), np.float32), *images]), np.concatenate([[], *labels]), error


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_of_200_flipped_bytes_each_is_found_each_stops_the_training_and_each_is_repaired(source, tmp_path, encoding):
    dest = tmp_path / "records"
    build_records(source, dest, encoding=encoding, channels=(1,))
    shards = [dest / shard["name"] for shard in read_manifest(dest)["shards"]]
    assert len(shards) == SHARDS
    whole = {path: path.read_bytes() for path in shards}
    draw = random.Random(encoding)
    flipped = {}
    for path, data in whole.items():
        place = draw.randrange(len(data))
        flipped[path] = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    read = {}
    for split in ("train", "id_test"):
        data = read_records(dest, split, batch_size=10, kinds=BOTH, normalize=lambda images: tf.cast(images, "float32"))
        images, labels, error = read_all(data)
        assert error is None and len(images) == SHARDS // 2
        assert labels.tolist() == list_sites(dest, split, BOTH)["label"].tolist()
        read[split] = data, images, labels

    for path in shards[:: SHARDS // READ]:
        path.write_bytes(flipped[path])
        data, wanted, labels = read[path.parent.name]
        found, found_labels, error = read_all(data)
        name = path.relative_to(dest)
        assert error is not None and f"{name}, record 0" in error and f"tfrecords.verify {dest} --repair" in error
        np.testing.assert_array_equal(found, wanted[: len(found)])
        np.testing.assert_array_equal(found_labels, labels[: len(found)])
        path.write_bytes(whole[path])

    for path in shards:
        path.write_bytes(flipped[path])
    faults = verify_records(dest)
    assert {dest / fault.file for fault in faults if fault.record == 0} == set(shards)
    mended, stay = repair_records(dest, faults=faults)
    assert len(mended) == SHARDS and stay == []
    assert {path: path.read_bytes() for path in shards} == whole
