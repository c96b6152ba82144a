"""A fake RxRx1 on disk: 4 experiments, 1 plate, 4 wells, 2 sites and 6 channels of 8 x 8 pixels, in both layouts."""

import logging
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

EXPERIMENTS = {"HUVEC-01": "train", "RPE-01": "train", "HUVEC-17": "val", "HUVEC-18": "test"}
WELLS = {
    "B02": ("negative_control", "EMPTY", 3),
    "B03": ("treatment", "s20", 0),
    "B04": ("treatment", "s21", 1),
    "C03": ("positive_control", "s22", 2),
}
SIZE = 8


def fake_pixels(site_id, channel):
    rng = np.random.default_rng(zlib.crc32(f"{site_id}{channel}".encode()))
    return rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def fake_table():
    rows = []
    for experiment, dataset in EXPERIMENTS.items():
        for well, (kind, sirna, number) in WELLS.items():
            for site in (1, 2):
                name = f"{experiment}_1_{well}"
                cell_type = experiment.split("-")[0]
                rows.append(
                    (f"{name}_{site}", name, cell_type, dataset, experiment, 1, well, site, kind, sirna, number)
                )
    columns = "site_id well_id cell_type dataset experiment plate well site well_type sirna sirna_id"
    return pd.DataFrame(rows, columns=columns.split())


def write_images(folder, table, kaggle):
    for row in table.itertuples():
        top = ("train" if row.dataset == "train" else "test") if kaggle else "images"
        place = folder / top / row.experiment / f"Plate{row.plate}"
        place.mkdir(parents=True, exist_ok=True)
        for channel in range(1, 7):
            path = place / f"{row.well}_s{row.site}_w{channel}.png"
            Image.fromarray(fake_pixels(row.site_id, channel)).save(path)


def write_kaggle_tables(folder, name_of):
    table = fake_table().drop_duplicates("well_id")
    table = table.assign(id_code=table["well_id"], sirna=[name_of(row) for row in table.itertuples()])
    columns = ["id_code", "experiment", "plate", "well"]
    for name, is_train in (("train", True), ("test", False)):
        part = table[(table["dataset"] == "train") == is_train]
        treated = part["well_type"] == "treatment"
        part[treated][columns + ["sirna"] * is_train].to_csv(folder / f"{name}.csv", index=False)
        part[~treated][[*columns, "sirna", "well_type"]].to_csv(folder / f"{name}_controls.csv", index=False)


@pytest.fixture(scope="session")
def release_tree(tmp_path_factory):
    """The RxRx1 release layout; shared, not to be changed."""
    folder = tmp_path_factory.mktemp("release")
    table = fake_table()
    table.to_csv(folder / "metadata.csv", index=False)
    write_images(folder, table, kaggle=False)
    return folder


@pytest.fixture(scope="session")
def kaggle_tree(tmp_path_factory):
    """The Kaggle layout of 2019; shared, not to be changed."""
    folder = tmp_path_factory.mktemp("kaggle")
    write_kaggle_tables(folder, lambda row: row.sirna_id)
    write_images(folder, fake_table(), kaggle=True)
    return folder


@pytest.fixture
def release(release_tree, tmp_path):
    """A copy of the release tree, to be spoiled."""
    return Path(shutil.copytree(release_tree, tmp_path / "release"))


@pytest.fixture(scope="session")
def records_tree(release_tree, tmp_path_factory):
    """Finished records of the release tree; shared, not to be changed."""
    from tfrecords.build import build_records

    dest = tmp_path_factory.mktemp("records") / "records"
    build_records(release_tree, dest)
    return dest


@pytest.fixture
def records(records_tree, tmp_path):
    """A copy of the finished records, to be spoiled."""
    return Path(shutil.copytree(records_tree, tmp_path / "records"))


@pytest.fixture
def edit_table():
    """`edit_table(folder, change, name="metadata.csv")`: rewrites a table through a function of it."""

    def edit(folder, change, name="metadata.csv"):
        table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        changed = change(table)
        (table if changed is None else changed).to_csv(folder / name, index=False)

    return edit


@pytest.fixture(scope="session")
def pixels_of():
    """`pixels_of(site_id)`: the uint8 (8, 8, 6) image that was written for a site."""
    return lambda site_id: np.stack([fake_pixels(site_id, channel) for channel in range(1, 7)], axis=-1)


@pytest.fixture
def kaggle_tables():
    """`kaggle_tables(folder, name_of)`: writes the four tables, with siRNAs named by a function of the row."""
    return write_kaggle_tables


@pytest.fixture
def bucket(records_tree, monkeypatch):
    """URL of the finished records on an S3 server in this process; the environment variables lead to it."""
    for name in ("boto3", "flask", "flask_cors"):
        pytest.importorskip(name, reason="needs moto's server: pip install 'moto[s3]' flask flask-cors")
    moto = pytest.importorskip("moto.server", reason="needs moto's server")
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in (
        ("ACCESS_KEY_ID", "testing"),
        ("SECRET_ACCESS_KEY", "testing"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("S3_ENDPOINT", endpoint)  # tensorflow-io's name for it.
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="screens")
    for path in records_tree.rglob("*.*"):
        key = f"hcs/records/{path.relative_to(records_tree).as_posix()}"
        client.upload_file(str(path), "screens", key, ExtraArgs={"ACL": "public-read"})  # For http:// as well.
    yield "s3://screens/hcs/records"
    server.stop()
