"""A screen of one's own: from its description and its table to records."""

import functools
import http.server
import json
import os
import threading
from concurrent.futures import Executor, Future

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from tfrecords import measure
from tfrecords.build import build_records, main
from tfrecords.describe import describe_records
from tfrecords.images import scale_to_bytes
from tfrecords.listing import list_sites
from tfrecords.manifest import channel_names, class_names, read_manifest
from tfrecords.normalize import channel_statistics
from tfrecords.order import site_ids_of_step
from tfrecords.own_screen import read_screen, take_screen
from tfrecords.read import read_records
from tfrecords.repair import repair_records
from tfrecords.table import _as_text
from tfrecords.verify import verify_records

WELLS = {"A1": "DMSO", "A02": "aspirin", "B-7": "β-estradiol", "Z99": ""}
SCREEN = {
    "table": "wells.csv",
    "images": "{Plate}/{well}_f{site:02}_ch{channel}.tif",
    "channels": ["DNA", "ER"],
    "columns": {"experiment": "Batch", "plate": "Plate", "well": "Well", "site": "Field", "sirna": "Compound"},
    "controls": {"negative": ["DMSO"]},
    "splits": {"train": ["day 1"], "val": ["day 2"], "test": ["2024/03"]},
}
TOML = """
table = "wells.csv"
images = "{Plate}/{well}_f{site:02}_ch{channel}.tif"
channels = ["DNA", "ER"]
[columns]
experiment = "Batch"
plate = "Plate"
well = "Well"
site = "Field"
sirna = "Compound"
[controls]
negative = ["DMSO"]
[splits]
train = ["day 1"]
val = ["day 2"]
test = ["2024/03"]
"""


def own_table():
    rows = [
        (batch, plate, well, field, compound)
        for batch, plate in (("day 1", "BR001"), ("day 2", "BR002"), ("2024/03", "Ünïcode"))
        for well, compound in WELLS.items()
        for field in (1, 9)
    ]
    return pd.DataFrame(rows, columns=["Batch", "Plate", "Well", "Field", "Compound"])


def deep_pixels(row, channel):
    seed = [sum(map(ord, f"{row.Batch}{row.Plate}{row.Well}")), row.Field, ord(channel[0])]
    return np.random.default_rng(seed).integers(200, 3000, (8, 10), dtype=np.uint16)


@pytest.fixture
def own(tmp_path):
    """A folder with wells.csv and 16-bit TIFF files; 3 batches of one plate, 4 wells, 2 fields, 2 channels."""
    folder = tmp_path / "own"
    for row in own_table().itertuples():
        (folder / row.Plate).mkdir(parents=True, exist_ok=True)
        for channel in SCREEN["channels"]:
            path = folder / row.Plate / f"{row.Well}_f{row.Field:02}_ch{channel}.tif"
            Image.fromarray(deep_pixels(row, channel)).save(path)
    own_table().to_csv(folder / "wells.csv", index=False)
    return folder


class Breaks(Executor):
    """Cannot write the shards whose names begin so."""

    def __init__(self, name):
        self.name = name

    def submit(self, function, task):
        future = Future()
        if getattr(task, "name", "").startswith(self.name):
            future.set_exception(OSError("broken off"))
        else:
            future.set_result(function(task))
        return future


def images(dest):
    shape = read_manifest(dest)["image_shape"]
    found = {}
    for path in dest.rglob("*.tfrecord"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            pixels = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8).reshape(shape)
            found[feature["site_id"].bytes_list.value[0].decode()] = pixels
    return found


def test_a_table_with_16_bit_files_is_built_verified_and_read_back_equal_to_the_mapped_pixels(own, tmp_path):
    dest = tmp_path / "records"
    manifest = build_records(own, dest, screen=SCREEN)
    assert verify_records(dest) == []
    assert manifest["image_shape"] == [8, 10, 2] and manifest["options"]["intensity"] == "percentile:0.1,99.9"
    assert "8 x 10 pixels, channels DNA, ER" in describe_records(dest)
    ranges = {(row["plate"], row["channel"]): (row["low"], row["high"]) for row in manifest["intensity"]}
    plates = manifest["names"]["plates"]
    assert plates == {"BR001": 1, "BR002": 2, "Ünïcode": 3} and len(ranges) == 6
    found = images(dest)
    assert len(found) == 24
    for row in own_table().itertuples():
        image = found[f"{row.Batch}_{plates[row.Plate]}_{row.Well}_{row.Field}"]
        for i, channel in enumerate(SCREEN["channels"]):
            low, high = ranges[plates[row.Plate], 1 + i]
            pixels = deep_pixels(row, channel).astype(np.float64)
            mapped = np.clip(np.round((pixels - low) / (high - low) * 255), 0, 255)
            assert np.abs(image[..., i] - mapped).max() <= 1 and (image[..., i] == mapped).mean() > 0.99
            np.testing.assert_array_equal(image[..., i], scale_to_bytes(deep_pixels(row, channel), low, high))


def test_labels_of_any_text_have_numbers_and_names_and_unknown_ones_are_left_open(own, tmp_path):
    dest = tmp_path / "records"
    manifest = build_records(own, dest, screen=SCREEN)
    assert [(row["name"], row["value"], row["treatment"]) for row in manifest["classes"]] == [
        ("aspirin", 0, True),
        ("β-estradiol", 1, True),
        ("DMSO", 2, False),
    ]
    assert class_names(dest) == ["aspirin", "β-estradiol"]
    _, labels, metadata = next(
        iter(read_records(dest, "test", batch_size=8, kinds=("treatment", "control"), metadata=True))
    )
    names = dict(zip(WELLS, [2, 0, 1, -1], strict=True))
    for label, well in zip(labels.numpy(), metadata["well"].numpy(), strict=True):
        assert label == names[well.decode()]
    with pytest.raises(ValueError, match="2 of the 6 sites of the split 'train' have no label .*labelled_only=True"):
        read_records(dest, "train", batch_size=2)
    options = {"batch_size": 2, "labelled_only": True, "seed": 3}
    data = read_records(dest, "train", training=True, augment=None, metadata=True, **options)
    for step, (_, labels, metadata) in enumerate(data):
        assert (labels.numpy() >= 0).all()
        named = site_ids_of_step(dest, "train", epoch=0, step=step, **options)
        assert named == [site_id.decode() for site_id in metadata["site_id"].numpy()]
    assert step == 1


def test_a_description_in_a_file_and_one_on_the_command_line_build_the_same(own, tmp_path, capsys):
    build_records(own, tmp_path / "dict", screen=SCREEN)
    (own / "screen.toml").write_text(TOML, encoding="utf-8")
    build_records(own, tmp_path / "found")
    given = [
        "--table",
        "wells.csv",
        "--images",
        SCREEN["images"],
        "--channels",
        "DNA,ER",
        "--controls",
        "negative=DMSO",
    ]
    given += ["--columns", "experiment=Batch,plate=Plate,well=Well,site=Field,sirna=Compound"]
    (own / "screen.toml").rename(tmp_path / "other.toml")
    assert main([str(own), str(tmp_path / "file"), "--screen", str(tmp_path / "other.toml")]) == 0
    for name in ("found", "file"):
        assert read_manifest(tmp_path / name)["options"] == read_manifest(tmp_path / "dict")["options"]
        assert read_manifest(tmp_path / name)["shards"] == read_manifest(tmp_path / "dict")["shards"]
    assert main([str(own), str(tmp_path / "line"), *given]) == 1
    assert "Nothing says which experiments are trained on" in capsys.readouterr().err
    assert main([str(own), str(tmp_path / "line"), *given, "--splits", "kfold-3-1", "--intensity", "fixed:0,4095"]) == 0
    manifest = read_manifest(tmp_path / "line")
    assert manifest["experiments"]["val"] == ["2024/03"] and manifest["experiments"]["train"] == ["day 1", "day 2"]
    assert {(row["low"], row["high"]) for row in manifest["intensity"]} == {(0, 4095)}
    assert manifest["classes"] == read_manifest(tmp_path / "dict")["classes"]


def test_a_file_beside_the_images_holds_for_what_the_command_line_leaves_open(own, tmp_path, capsys):
    (own / "screen.toml").write_text(TOML, encoding="utf-8")
    given = ["--table", "wells.csv", "--images", "{Plate}/{well}_f{site:02}_ch{channel}.tif"]
    given += ["--columns", "experiment=Batch,plate=Plate,well=Well,site=Field,sirna=Compound"]
    assert main([str(own), str(tmp_path / "records"), *given, "--intensity", "fixed:0,4095", "--channels", "ER"]) == 0
    manifest = read_manifest(tmp_path / "records")
    assert manifest["experiments"]["test"] == ["2024/03"] and manifest["options"]["channels"] == [2]
    assert [row["treatment"] for row in manifest["classes"] if row["name"] == "DMSO"] == [False]
    named = ["--table", "wells.csv", "--images", "{Plate}/{well}_f{site:02}_ch{channel}.tif", "--channels", "DNA,ER"]
    (own / "screen.toml").write_text(TOML.replace('["DNA", "ER"]', '["a", "b"]') + 'train2 = ["x"]\n', encoding="utf-8")
    columns = ["--columns", "experiment=Batch,plate=Plate,well=Well,site=Field,sirna=Compound,dataset=Set"]
    table = own_table()
    table.assign(Set=table["Batch"].map({"day 1": "train", "day 2": "test"}).fillna("val")).to_csv(
        own / "wells.csv", index=False
    )
    more = ["--controls", "positive=aspirin"]
    assert main([str(own), str(tmp_path / "over"), *named, *columns, *more]) == 0  # over [splits] and beside [controls]
    manifest = read_manifest(tmp_path / "over")
    assert manifest["experiments"]["test"] == ["day 2"] and manifest["options"]["screen"]["channels"] == ["DNA", "ER"]
    assert {row["name"]: row["treatment"] for row in manifest["classes"]} == {
        "β-estradiol": True,
        "aspirin": False,
        "DMSO": False,
    }
    (own / "screen.toml").unlink()
    given += ["--channels", "DNA,ER", "--splits", "wilds"]
    assert main([str(own), str(tmp_path / "train"), *given]) == 0
    out = capsys.readouterr().out
    assert "WARNING: all sites are in train" in out
    assert "WARNING: The splits 'wilds' go by the number of the site, 2 among them; found 1, 9" in out
    with pytest.raises(ValueError, match="'mixed-to-test' go by the number of the site, 1 among them; found 3, 9"):
        own_table().replace({"Field": {1: 3}}).to_csv(own / "wells.csv", index=False)
        build_records(own, tmp_path / "mixed", screen=SCREEN, splits="mixed-to-test")


@pytest.mark.parametrize(
    ("named", "planes", "refused"),
    [
        (["a"], lambda x: [x, x, x], False),
        (["a"], lambda x: [0 * x, 0 * x, x], True),
        (["a", "b"], lambda x: [x, x, x // 2], True),
        (["a", "b", "c"], lambda x: [x, x // 2, x // 3], False),
    ],
)
def test_a_png_with_more_in_it_than_is_named_is_refused(own, tmp_path, named, planes, refused):
    table = own_table()
    for i in range(len(table)):
        pixels = np.random.default_rng(i).integers(1, 255, (24, 24), "uint8")
        Image.fromarray(np.stack(planes(pixels), axis=-1)).save(own / f"{i}.png")
    table.assign(File=[str(i) for i in range(len(table))]).to_csv(own / "wells.csv", index=False)
    screen = SCREEN | {"images": "{File}.png", "channels": named}
    if refused:
        with pytest.raises(ValueError, match=rf"0.png: expected {len(named)} channels.*; found 3"):
            build_records(own, tmp_path / "records", screen=screen)
    else:
        build_records(own, tmp_path / "records", screen=screen)
        assert next(iter(images(tmp_path / "records").values())).any()


def test_a_name_that_was_corrected_in_the_table_is_not_taken_for_finished(own, tmp_path):
    build_records(own, tmp_path / "records", screen=SCREEN)
    own_table().replace({"Plate": {"BR001": "BR000"}}).to_csv(own / "wells.csv", index=False)
    (own / "BR001").rename(own / "BR000")
    with pytest.raises(ValueError, match="table"):
        build_records(own, tmp_path / "records", screen=SCREEN)


def test_classes_without_a_site_to_learn_from_are_named(own, tmp_path, capsys):
    table = own_table()
    table["Compound"] = table["Compound"].where(table["Batch"] != "2024/03", "brefeldin")
    table.to_csv(own / "wells.csv", index=False)
    screen = {key: value for key, value in SCREEN.items() if key != "controls"}
    build_records(own, tmp_path / "records", screen=screen)
    found = (table["Batch"] == "2024/03").sum()
    said = f"WARNING: 1 of 4 classes have no site in train (brefeldin): {found} sites of other splits are of them"
    assert said in capsys.readouterr().out


def test_columns_with_our_names_that_are_not_used_are_named(own, tmp_path, capsys):
    own_table().assign(well_type="negative_control", cell_type="A549").to_csv(own / "wells.csv", index=False)
    build_records(own, tmp_path / "records", screen=SCREEN)
    assert "columns that are called cell_type, which the description does not name" in capsys.readouterr().out
    alone = {key: value for key, value in SCREEN.items() if key != "controls"}
    build_records(own, tmp_path / "other", screen=alone)
    assert "columns that are called cell_type, well_type, which the" in capsys.readouterr().out


def test_wells_without_a_compound_may_be_the_controls(own, tmp_path):
    own_table().replace({"Compound": {"DMSO": ""}}).to_csv(own / "wells.csv", index=False)
    screen = SCREEN | {"controls": SCREEN["controls"] | {"negative": [""]}}
    build_records(own, tmp_path / "records", screen=screen)
    sites = list_sites(tmp_path / "records", "test", ("treatment", "control"))
    empty = sites["well_type"] == "negative_control"
    assert empty.any() and sites.loc[empty, "label"].isna().all() and sites.loc[~empty, "label"].notna().all()
    table = own_table().replace({"Compound": {"DMSO": ""}})
    table.loc[(table["Well"] == "A02") & (table["Field"] == 9), "Compound"] = ""  # said of the well's first site alone
    table.to_csv(own / "wells.csv", index=False)
    with pytest.raises(ValueError, match="has 'no label' .negative_control., and in .* it has 'aspirin' .treatment."):
        build_records(own, tmp_path / "torn", screen=screen)


def test_pages_of_a_tiff_and_planes_of_a_png_are_channels(own, tmp_path):
    table = own_table()
    for i, row in enumerate(table.itertuples()):
        pages = [Image.fromarray(deep_pixels(row, channel)) for channel in SCREEN["channels"]]
        pages[0].save(own / f"{i}.tif", save_all=True, append_images=pages[1:])
        planes = [np.asarray(scale_to_bytes(deep_pixels(row, channel), 0, 4095)) for channel in SCREEN["channels"]]
        Image.fromarray(np.stack([*planes, 0 * planes[0]], axis=-1)).save(own / f"{i}.png")
    table.assign(File=[str(i) for i in range(len(table))]).to_csv(own / "wells.csv", index=False)
    fixed = {**SCREEN, "intensity": "fixed:0,4095"}
    build_records(own, tmp_path / "files", screen=fixed)
    build_records(own, tmp_path / "pages", screen=fixed | {"images": "{File}.tif"})
    build_records(own, tmp_path / "planes", screen=SCREEN | {"images": "{File}.png"})
    wanted = images(tmp_path / "files")
    for name in ("pages", "planes"):
        found = images(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert all((found[site_id] == wanted[site_id]).all() for site_id in wanted)
    assert read_manifest(tmp_path / "planes")["options"]["intensity"] is None
    subset = build_records(own, tmp_path / "subset", screen=fixed | {"images": "{File}.tif"}, channels=("ER",))
    assert subset["options"]["channels"] == [2]
    assert all((pixels == wanted[site_id][..., 1:]).all() for site_id, pixels in images(tmp_path / "subset").items())


def test_a_row_may_be_a_well_and_a_file_name_may_stand_in_a_column(own, tmp_path):
    wells = own_table().query("Field == 1").drop(columns="Field").assign(Name=lambda table: table["Well"] + "_f")
    wells.to_csv(own / "wells.csv", index=False)
    columns = {name: theirs for name, theirs in SCREEN["columns"].items() if name != "site"}
    templates = {name: "{Plate}/{Name}{site:02}_ch" + name + ".tif" for name in SCREEN["channels"]}
    described = {**SCREEN, "columns": columns, "sites": [1, 9], "images": templates}
    build_records(own, tmp_path / "records", screen=described)
    own_table().to_csv(own / "wells.csv", index=False)
    build_records(own, tmp_path / "sites", screen=SCREEN)
    assert read_manifest(tmp_path / "records")["shards"] == read_manifest(tmp_path / "sites")["shards"]


def test_a_parquet_table_gives_what_its_csv_gives(own, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, of the extra `parquet`")
    build_records(own, tmp_path / "csv", screen=SCREEN)
    own_table().astype({"Field": float}).replace({"Compound": {"": None}}).to_parquet(own / "wells.parquet")
    build_records(own, tmp_path / "parquet", screen=SCREEN | {"table": "wells.parquet"})
    assert read_manifest(tmp_path / "parquet")["shards"] == read_manifest(tmp_path / "csv")["shards"]


def test_missing_files_are_reported_by_channel_and_a_rebuild_continues(own, tmp_path, capsys):
    (own / "BR001/A1_f09_chER.tif").unlink()
    manifest = build_records(own, tmp_path / "records", screen=SCREEN)
    assert "missing channels ER: 1 (day 1_1_A1_9)" in capsys.readouterr().out
    assert manifest["excluded"]["count"] == 1
    assert build_records(own, tmp_path / "records", screen=json.loads(json.dumps(SCREEN))) == manifest
    with pytest.raises(ValueError, match="other options: screen.cell_type None, now 'U2OS'. Repeat"):
        build_records(own, tmp_path / "records", screen=SCREEN | {"cell_type": "U2OS"})


def test_a_label_that_is_one_for_all_sites_is_pointed_out(own, tmp_path, capsys):
    build_records(own, tmp_path / "records", screen=SCREEN, label="cell_type")
    assert "WARNING: all sites are of one class, 'unknown' in the column 'cell_type'" in capsys.readouterr().out
    tested = SCREEN | {"splits": {"test": sorted(set(own_table()["Batch"]))}}
    build_records(own, tmp_path / "to_predict", screen=tested, label="cell_type")
    assert "of one class" not in capsys.readouterr().out


def test_a_site_removed_in_between_changes_the_grey_levels_of_its_plate_and_no_others(own, tmp_path):
    dest, path = tmp_path / "records", own / "BR001/A1_f09_chDNA.tif"

    with pytest.raises(OSError, match="broken off"):
        build_records(own, dest, screen=SCREEN, workers=Breaks("val/"))
    times = {path.relative_to(dest): path.stat().st_mtime_ns for path in dest.glob("*/*.tfrecord")}
    assert {path.parent.name for path in times} == {"train", "test"}
    path.unlink()
    build_records(own, dest, screen=SCREEN)
    kept = {name.parent.name for name, before in times.items() if (dest / name).stat().st_mtime_ns == before}
    assert kept == {"test"}
    build_records(own, tmp_path / "unbroken", screen=SCREEN)
    assert images(dest).keys() == images(tmp_path / "unbroken").keys()
    assert read_manifest(dest) == read_manifest(tmp_path / "unbroken")


def test_what_the_levels_were_measured_on_may_change_before_the_build_goes_on(own, tmp_path):
    """Another picture in the place of one of a shard that was not written yet: same size, older date."""
    dest = tmp_path / "records"
    with pytest.raises(OSError, match="broken off"):
        build_records(own, dest, screen=SCREEN, workers=Breaks("train/day%201_treatment"))
    path = own / "BR001/A02_f01_chDNA.tif"
    stat = path.stat()
    Image.fromarray(np.full((8, 10), 60000, np.uint16)).save(path)
    os.utime(path, ns=(stat.st_atime_ns - 10**9,) * 2)
    build_records(own, dest, screen=SCREEN)
    build_records(own, tmp_path / "unbroken", screen=SCREEN)
    assert read_manifest(dest) == read_manifest(tmp_path / "unbroken") and verify_records(dest) == []


def test_files_of_two_depths_on_a_plate_are_refused(own, tmp_path):
    path = own / "BR001/B-7_f01_chDNA.tif"
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(path)
    with pytest.raises(
        ValueError, match="BR001/B-7_f01_chDNA.tif: expected 16 bits a pixel as in other files of its plate; found 8"
    ):
        build_records(own, tmp_path / "records", screen=SCREEN)


def test_the_first_file_may_be_the_one_that_is_wrong(own, tmp_path):
    path = own / "BR001/A02_f01_chDNA.tif"
    whole = path.read_bytes()
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(path)
    with pytest.raises(ValueError, match="expected 8 bits a pixel as in BR001/A02_f01_chDNA.tif; found 16"):
        build_records(own, tmp_path / "records", screen=SCREEN)
    path.write_bytes(whole)
    build_records(own, tmp_path / "records", screen=SCREEN)
    assert verify_records(tmp_path / "records") == []


def test_the_sites_of_a_well_may_share_a_file_which_is_pointed_out(own, tmp_path, capsys):
    images = {"DNA": "{Plate}/{well}_f{site:02}_chDNA.tif", "ER": "{Plate}/{well}_f01_chER.tif"}
    screen = {key: value for key, value in SCREEN.items() if key != "channels"} | {"images": images}
    assert build_records(own, tmp_path / "records", screen=screen)["index"]["count"] == 24
    said = "WARNING: 24 sites have the channel 'ER' in common with other sites of their well, such as wells.csv, row 2"
    assert said in capsys.readouterr().out


def test_a_file_that_serves_all_sites_is_refused(own, tmp_path):
    images = {"DNA": "{Plate}/{well}_f{site:02}_chDNA.tif", "ER": "BR001/A1_f01_chER.tif"}
    screen = {key: value for key, value in SCREEN.items() if key != "channels"} | {"images": images}
    with pytest.raises(ValueError, match="row 4: the file 'BR001/A1_f01_chER.tif' is a duplicate of wells.csv, row 2"):
        build_records(own, tmp_path / "records", screen=screen)


def test_texts_that_a_person_takes_for_one_are_pointed_out(own, tmp_path, capsys):
    table = own_table()
    names = {"DMSO": "dmso ", "aspirin": "0e1", "β-estradiol": "00e1"}
    table["Compound"] = table["Compound"].where(table["Batch"] != "day 2", table["Compound"].replace(names))
    table["Field"] = table["Field"].astype(str).where(table["Batch"] != "day 2", "0" + table["Field"].astype(str))
    table.to_csv(own / "wells.csv", index=False)
    build_records(own, tmp_path / "records", screen=SCREEN)
    out = capsys.readouterr().out
    assert "WARNING: the column 'Compound' has 'DMSO', 'dmso ', which are taken for" in out
    assert "WARNING: the column 'Field' has '1', '01'; '9', '09', which" in out and "'0e1'" not in out
    assert _as_text(b"\xff") != _as_text(b"\xfe")  # of a Parquet table


def test_a_screen_without_labels_or_with_a_name_too_long_says_where_they_come_from(own, tmp_path):
    columns = {key: value for key, value in SCREEN["columns"].items() if key != "sirna"}
    screen = {key: value for key, value in SCREEN.items() if key != "controls"} | {"columns": columns}
    with pytest.raises(ValueError, match="in the column that its description calls `sirna`"):
        build_records(own, tmp_path / "records", screen=screen)
    own_table().replace({"Batch": {"day 1": "ü" * 80}}).to_csv(own / "wells.csv", index=False)
    with pytest.raises(ValueError, match="row 2, column 'Batch': expected a name that a file's can hold"):
        build_records(own, tmp_path / "records", screen=SCREEN)


def test_all_damaged_files_are_named_also_those_that_are_not_measured(own, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_MOST_SITES", 1)
    for path in (own / "BR001").glob("*_f01_*.tif"):
        path.write_bytes(b"II*\x00")
    for path in (own / "BR002").glob("*.tif"):
        path.write_bytes(b"II*\x00")  # one of which is measured
    with pytest.raises(ValueError, match="24 files are not as expected:"):
        build_records(own, tmp_path / "records", screen=SCREEN)


def test_damaged_files_are_all_named_where_grey_levels_are_measured(own, tmp_path):
    for name in ("BR001/A1_f01_chER.tif", "BR002/A1_f09_chDNA.tif", "BR002/A1_f09_chER.tif"):
        (own / name).write_bytes(b"II*\x00")
    with pytest.raises(ValueError, match="3 files are not as expected:") as caught:
        build_records(own, tmp_path / "records", screen=SCREEN)
    assert str(caught.value).count("the TIFF is damaged, or of a kind that cannot be read") == 3


def test_a_damaged_shard_is_repaired_with_the_grey_levels_of_the_build(own, tmp_path):
    dest = tmp_path / "records"
    manifest = build_records(own, dest, screen=SCREEN)
    whole = {shard["name"]: (dest / shard["name"]).read_bytes() for shard in manifest["shards"]}
    name = next(iter(whole))
    (dest / name).write_bytes(whole[name][:-9])
    assert repair_records(dest) == ([name], [])
    assert (dest / name).read_bytes() == whole[name] and verify_records(dest) == []


def test_processes_measure_and_write_the_same(own, tmp_path):
    build_records(own, tmp_path / "one", screen=SCREEN)
    build_records(own, tmp_path / "two", screen=SCREEN, workers=2)
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert one["intensity"] == two["intensity"] and one["shards"] == two["shards"]


def test_replicates_are_named_and_cannot_all_be_excluded(own, tmp_path, capsys):
    wells = [
        (batch, plate, f"A{i}", 1, f"c{i}") for batch, plate in (("day 1", "BR001"), ("2024/03", "Ü")) for i in range(6)
    ]
    table = pd.DataFrame(wells, columns=own_table().columns)
    for row in table.itertuples():
        (own / row.Plate).mkdir(exist_ok=True)
        for channel in SCREEN["channels"]:
            Image.new("L", (8, 8)).save(own / row.Plate / f"{row.Well}_f01_ch{channel}.tif")
    table.to_csv(own / "wells.csv", index=False)
    screen = {**SCREEN, "splits": {"train": ["day 1"], "test": ["2024/03"]}}
    del screen["controls"]
    build_records(own, tmp_path / "records", screen=screen)
    out = capsys.readouterr().out
    assert "day 1 (train) = 2024/03 (test), plates BR001 = Ü: by 6 or more of 6 treatments" in out
    assert "That is every training plate, as where plates are replicates" in out and "--exclude-leaks" not in out
    with pytest.raises(ValueError, match="Every training plate repeats .* as replicates do"):
        build_records(own, tmp_path / "none", screen=screen, exclude_leaks=True)


def test_png_files_of_ones_own_can_be_passed_through_and_deep_ones_are_scaled(own, tmp_path):
    build_records(own, tmp_path / "raw", screen=SCREEN)
    manifest = build_records(own, tmp_path / "png", screen=SCREEN, encoding="png")
    assert verify_records(tmp_path / "png") == [] and manifest["planes"] == [1, 1]


def test_experiments_and_wells_that_look_like_numbers_stay_texts(own, tmp_path):
    table = own_table().assign(Batch=lambda table: table["Batch"].map({"day 1": "01", "day 2": "NA", "2024/03": "1e3"}))
    table.to_csv(own / "wells.csv", index=False)
    dest = tmp_path / "records"
    build_records(own, dest, screen=SCREEN | {"splits": {"train": ["01"], "val": ["NA"], "test": ["1e3"]}})
    assert verify_records(dest) == []
    assert set(list_sites(dest, "val", ("treatment", "control"))["experiment"]) == {"NA"}
    assert set(list_sites(dest, "train")["experiment"]) == {"01"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tabel": "wells.csv"}, "unknown key 'tabel'. Expected some of table, images, prefix, channels"),
        ({"table": None}, "lacks the key 'table'"),
        ({"channels": "DNA"}, "expected a list of texts for the key 'channels'; found 'DNA'"),
        ({"channels": ["DNA", "DNA"]}, "names a channel twice"),
        ({"channels": None}, "does not name its channels"),
        ({"images": {"DNA": "a"}}, "has the channels DNA, ER, but images for DNA"),
        ({"columns": {"experiment": "Batch"}}, "does not say which column is the well"),
        ({"columns": {"experiment": "Batch", "well": "Well", "gene": "Gene"}}, "unknown name 'gene' in 'columns'"),
        ({"controls": {"negativ": ["DMSO"]}}, "unknown name 'negativ' in 'controls'"),
        ({"controls": {"negative": ["DMSO"], "positive": ["DMSO"]}}, "names 'DMSO' twice under 'controls'"),
        ({"sites": [1]}, "has both 'sites' and the column 'site'"),
    ],
)
def test_a_description_that_cannot_be_is_refused_with_an_example(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_screen(tmp_path, SCREEN | change)


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"screen.toml does not exist[\s\S]*\[columns\]"):
        read_screen(tmp_path)
    (tmp_path / "screen.toml").write_text("table = wells.csv")
    with pytest.raises(ValueError, match="screen.toml is no TOML file"):
        read_screen(tmp_path)


def test_numbers_may_be_written_as_numbers(tmp_path):
    described = read_screen(tmp_path, SCREEN | {"channels": [1, 2], "splits": {"train": [20240301]}})
    assert described["channels"] == ["1", "2"] and described["splits"] == {"train": ["20240301"]}


def test_the_example_of_the_messages_is_a_description(tmp_path):
    with pytest.raises(ValueError) as caught:
        read_screen(tmp_path)
    example = str(caught.value).split("Such a file is\n\n")[1]
    (tmp_path / "screen.toml").write_text(example, encoding="utf-8")
    assert read_screen(tmp_path)["channels"] == ["1", "2"]


def test_channels_that_are_called_by_other_numbers_are_repaired(own, tmp_path):
    for path in own.glob("*/*_ch*.tif"):
        path.rename(path.with_name(path.name.replace("chDNA", "ch2").replace("chER", "ch1")))
    dest = tmp_path / "records"
    build_records(own, dest, screen=SCREEN | {"channels": ["2", "1"]})
    shard = dest / read_manifest(dest)["shards"][0]["name"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    repair_records(dest)
    assert shard.read_bytes() == whole


def test_a_byte_order_mark_is_read_over(own):
    (own / "screen.toml").write_text(TOML, encoding="utf-8-sig")
    assert read_screen(own)["channels"] == ["DNA", "ER"]


def test_shards_whose_names_hold_a_percent_sign_come_from_a_web_server(own, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    pytest.importorskip("fsspec", reason="needs the extra remote")
    monkeypatch.setenv("TFRECORDS_CACHE", str(tmp_path / "cache"))
    build_records(own, tmp_path / "records", screen=SCREEN)
    assert any("%20" in shard["name"] for shard in read_manifest(tmp_path / "records")["shards"])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/records"
        here, there = (
            read_records(place, "train", batch_size=9, metadata=True) for place in (tmp_path / "records", url)
        )
        for (image, *_), (copy, *_) in zip(here, there, strict=True):
            np.testing.assert_array_equal(image, copy)
        server.shutdown()


def test_names_of_plates_and_sites_stand_beside_their_numbers(own, tmp_path, capsys):
    build_records(own, tmp_path / "records", screen=SCREEN)
    assert "The plates are numbered in the order of their names" in capsys.readouterr().out
    sites = list_sites(tmp_path / "records", "test")
    assert set(sites["plate"]) == {3} and set(sites["plate_name"]) == {"Ünïcode"}
    assert sites["site_name"].tolist() == sites["site"].astype(str).tolist()


def test_a_file_of_more_pages_than_the_channels_named_is_refused(own, tmp_path):
    table = own_table()
    for i, row in enumerate(table.itertuples()):
        pages = [Image.fromarray(deep_pixels(row, channel)) for channel in ("DNA", "ER", "Z")]
        pages[0].save(own / f"{i}.tif", save_all=True, append_images=pages[1 : 2 + (i != 5)])
    table.assign(File=[str(i) for i in range(len(table))]).to_csv(own / "wells.csv", index=False)
    stack = SCREEN | {"images": "{File}.tif", "intensity": "fixed:0,4095"}
    with pytest.raises(ValueError, match="tif: expected 2 channels, as the screen's description names; found 3"):
        build_records(own, tmp_path / "two", screen=stack)
    stack |= {"channels": ["DNA", "ER", "z2"]}
    with pytest.raises(ValueError, match="/5.tif: expected 3 channels, as the screen's description names; found 2"):
        build_records(own, tmp_path / "three", screen=stack)
    Image.fromarray(np.zeros((8, 10), np.uint16)).save(
        own / "5.tif", save_all=True, append_images=[Image.fromarray(np.zeros((8, 10), np.uint16))] * 2
    )
    manifest = build_records(own, tmp_path / "some", screen=stack, channels=("DNA", "ER"))
    assert manifest["image_shape"] == [8, 10, 2]


def test_experiments_that_no_list_has_are_named(own, tmp_path, capsys):
    build_records(own, tmp_path / "records", screen=SCREEN | {"splits": {"train": ["day 1"], "val": ["day 2"]}})
    out = capsys.readouterr().out
    assert "8 sites of 1 experiments are in no split: 2024/03. They are left out, and listed in excluded.csv." in out


def test_a_word_for_nothing_is_pointed_out(own, tmp_path, capsys):
    own_table().replace({"Compound": {"": "NA"}}).to_csv(own / "wells.csv", index=False)
    build_records(own, tmp_path / "records", screen=SCREEN)
    assert "WARNING: the column 'Compound' says 'NA' in the rows of 6 sites" in capsys.readouterr().out
    assert "NA" in class_names(tmp_path / "records")


def test_wells_that_hold_the_plates_name_are_pointed_out(own, tmp_path, capsys):
    build_records(own, tmp_path / "place", screen=SCREEN)
    assert "layouts" not in capsys.readouterr().out
    own_table().assign(ID=lambda table: table["Plate"] + table["Well"]).to_csv(own / "wells.csv", index=False)
    columns, images = SCREEN["columns"] | {"well": "ID"}, SCREEN["images"].replace("{well}", "{Well}")
    build_records(own, tmp_path / "whole", screen=SCREEN | {"columns": columns, "images": images})
    assert "WARNING: no two plates have a well of one name (found such as 'BR001A1')" in capsys.readouterr().out


def test_one_template_for_two_channels_is_refused(own):
    images = dict.fromkeys(SCREEN["channels"], "{Plate}/{well}_f{site:02}_chDNA.tif")
    with pytest.raises(ValueError, match="has the images .* for the channels DNA and ER. Expected files of its own"):
        read_screen(own, SCREEN | {"images": images})


def test_a_pattern_for_all_channels_is_not_that_of_one(own):
    images = {"DNA": "{Plate}/{well}_f{site:02}_chDNA.tif", "ER": "{Plate}/{well}_f{site:02}_ch{channel}.tif"}
    with pytest.raises(ValueError, match="images .* of one channel with {channel} in them. Expected there what"):
        read_screen(own, SCREEN | {"images": images})


def test_a_number_is_the_name_of_a_channel_before_it_is_its_place(own, tmp_path):
    images = {"1": SCREEN["images"].replace("{channel}", "DNA"), "4": SCREEN["images"].replace("{channel}", "ER")}
    numbered = SCREEN | {"images": images, "channels": ["1", "4"]}
    assert build_records(own, tmp_path / "four", screen=numbered, channels=["4"])["options"]["channels"] == [2]
    with pytest.raises(ValueError, match="The channels 2 cannot be taken. Expected some of 1, 4"):
        build_records(own, tmp_path / "two", screen=numbered, channels=["2"])
    assert build_records(own, tmp_path / "place", screen=SCREEN, channels=["2"])["options"]["channels"] == [2]


def test_fields_that_are_squeezed_into_squares_are_pointed_out(own, tmp_path, capsys):
    build_records(own, tmp_path / "squeezed", screen=SCREEN, image_size=4)
    assert "WARNING: fields of 8 x 10 pixels (height x width) are squeezed into squares" in capsys.readouterr().out
    build_records(own, tmp_path / "cropped", screen=SCREEN, crop=8, image_size=4)
    assert "WARNING: fields" not in capsys.readouterr().out


def test_a_width_for_the_channel_is_refused_by_its_name(own):
    with pytest.raises(ValueError, match="gives a width to {channel}, whose names stand as they are"):
        build_records(own, own / "records", screen=SCREEN | {"images": "{well}_{channel:02}.tif"})


def test_an_integer_is_the_name_of_a_channel_too(own, tmp_path):
    for n, name in enumerate(SCREEN["channels"]):
        for path in own.glob(f"*/*_ch{name}.tif"):
            path.rename(path.with_name(path.name.replace(f"_ch{name}", f"_ch{2 - n}")))
    screen = SCREEN | {"channels": [2, 1]}
    build_records(own, tmp_path / "texts", screen=screen, channels=("1",))
    manifest = build_records(own, tmp_path / "integers", screen=screen, channels=(1,))
    assert channel_names(manifest) == ["1"] == channel_names(read_manifest(tmp_path / "texts"))
    np.testing.assert_equal(images(tmp_path / "texts"), images(tmp_path / "integers"))


def test_controls_on_the_command_line_stand_for_the_files_column_and_its_words(own):
    text = TOML.replace("[columns]", '[columns]\nwell_type = "Kind"').replace(
        '[controls]\nnegative = ["DMSO"]', '[well_types]\ntreatment = ["t"]'
    )
    (own / "screen.toml").write_text(text)
    arguments = {"source": own, "screen": None, "controls": ["negative=DMSO"], "channels": None}
    arguments |= {"table": None, "images": None, "columns": None, "intensity": None}
    screen = read_screen(own, take_screen(arguments))
    assert screen["controls"] == {"negative": ["DMSO"]} and "well_types" not in screen


@pytest.mark.parametrize("field, written", [("1.0", "A1_f1.0_chDNA.tif"), ("1", "A1_f1_chDNA.tif")])
def test_where_no_file_is_found_one_with_nearly_its_name_is_shown(own, tmp_path, field, written):
    there = "A1_f01_chDNA.tif"
    table = own_table()[lambda table: table["Field"] == 1].assign(Field=field)
    table.to_csv(own / "wells.csv", index=False)
    with pytest.raises(ValueError, match=f"such as BR001/{written} below .*. There is '{there}': correct the table"):
        build_records(own, tmp_path / "records", screen=SCREEN | {"images": "{Plate}/{well}_f{site}_ch{channel}.tif"})


def test_what_is_there_in_place_of_files_is_shown(own, tmp_path, capsys):
    build = functools.partial(build_records, own)
    with pytest.raises(
        ValueError, match="chBlue.tif below .* 'BR001' has 16 other files, such as 'A02_f01_chDNA.tif'. Put"
    ):
        build(tmp_path / "a", screen=SCREEN | {"channels": ["Blue", "Red"]})
    (own / ".DS_Store").touch()
    (own / "LICENSE").touch()
    with pytest.raises(ValueError, match=r"There are 3 other folders, such as 'BR001'. Put the expected"):
        build(tmp_path / "b", screen=SCREEN | {"images": "x{Plate}/{well}_f{site:02}_ch{channel}.tif"})
    with pytest.raises(ValueError, match=r"below '\S+own'. Put the expected ones there, or correct the table"):
        build(tmp_path / "c", screen=SCREEN | {"images": "{Plate}_{well}_f{site:02}_ch{channel}.png"})
    capsys.readouterr()
    table = own_table().assign(Field=lambda table: table["Field"].map({1: "1", 9: "09"}))
    table.to_csv(own / "wells.csv", index=False)
    screen = SCREEN | {"images": "{Plate}/{well}_f{site}_ch{channel}.tif"}
    build(tmp_path / "some", screen=screen)
    out = capsys.readouterr().out
    assert "12 of 24 sites lack channel files" in out and "There is 'A1_f01_chDNA.tif': correct the table" in out
    with pytest.raises(ValueError, match="There is 'A1_f01_chDNA.tif': .* Expected all of every site"):
        build(tmp_path / "strict", screen=screen, strict=True)
    own_table().replace({"Field": {1: 109}}).to_csv(own / "wells.csv", index=False)
    build(tmp_path / "other", screen=screen | {"images": SCREEN["images"]})  # f109 is no f09
    assert "There is" not in capsys.readouterr().out


def test_plates_whose_controls_are_written_otherwise_and_a_screen_without_any_are_pointed_out(own, tmp_path, capsys):
    build = functools.partial(build_records, own)
    build(tmp_path / "all", screen=SCREEN)
    assert "negative control" not in capsys.readouterr().out
    table = own_table()
    table.loc[(table["Batch"] == "day 1") & (table["Compound"] == "DMSO"), "Compound"] = "dmso"
    table.to_csv(own / "wells.csv", index=False)
    build(tmp_path / "dmso", screen=SCREEN)
    warning = "WARNING: 1 of 3 plates have no negative control, such as BR001 of day 1, which --normalize plate needs"
    assert warning in capsys.readouterr().out
    without = {name: value for name, value in SCREEN.items() if name != "controls"}
    build(tmp_path / "none", screen=without)
    assert "No controls are described: every label is taken for a treatment" in capsys.readouterr().out
    columns = {name: column for name, column in SCREEN["columns"].items() if name != "sirna"}
    build(tmp_path / "unlabelled", screen=without | {"columns": columns, "splits": {"test": ["day 1", "2024/03"]}})
    assert "No controls are described" not in capsys.readouterr().out
    own_table().to_csv(own / "wells.csv", index=False)
    for path in own.glob(f"*/{[*WELLS][[*WELLS.values()].index('DMSO')]}_*"):
        path.unlink()
    build(tmp_path / "gone", screen=SCREEN)
    assert "WARNING: none of the 6 sites of negative controls is left" in capsys.readouterr().out


def test_numbers_with_zeros_before_them_are_not_said_to_be_none(own, tmp_path, capsys):
    columns = SCREEN["columns"] | {"site": "F"}
    own_table().assign(F=lambda table: table["Field"].map("{:02}".format)).to_csv(own / "wells.csv", index=False)
    screen = SCREEN | {"columns": columns, "images": "{Plate}/{well}_f{site}_ch{channel}.tif"}
    build_records(own, tmp_path / "records", screen=screen)
    out = capsys.readouterr().out
    assert "The plates are numbered" in out and "The sites are numbered" not in out
    assert {*list_sites(tmp_path / "records", "train")["site_name"]} == {"01", "09"}


def test_statistics_are_of_the_channels_and_plates_that_they_were_made_of(own, tmp_path):
    train = ["day 1", "day 2", "2024/03"]
    build = functools.partial(build_records, own, screen=SCREEN | {"splits": {"train": train}})
    build(tmp_path / "records")
    table = channel_statistics(tmp_path / "records", "train", group="plate")
    table.to_pickle(tmp_path / "table")
    table = pd.read_pickle(tmp_path / "table")
    read_records(tmp_path / "records", "train", batch_size=2, normalize=table, labelled_only=True)
    build(tmp_path / "turned", channels=("ER", "DNA"))
    with pytest.raises(ValueError, match="statistics are of the channels DNA, ER; the records have ER, DNA. Compute"):
        read_records(tmp_path / "turned", "train", batch_size=2, normalize=table, labelled_only=True)
    own_table().query("Plate != 'BR001'").to_csv(own / "wells.csv", index=False)
    screen = SCREEN | {"splits": {"train": train[1:]}}
    build_records(own, tmp_path / "less", screen=screen)
    with pytest.raises(ValueError, match="records in which plate 2 is 'BR002'; in these it is 'Ünïcode'. Compute"):
        read_records(tmp_path / "less", "train", batch_size=2, normalize=table, labelled_only=True)
