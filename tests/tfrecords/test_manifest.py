import json

import pytest

from tfrecords.manifest import class_names, read_manifest


def test_a_manifest_says_what_is_there(records_tree, release_tree):
    manifest = read_manifest(records_tree)
    assert manifest["image_shape"] == [8, 8, 6]
    assert manifest["experiments"] == {
        "train": ["HUVEC-01", "RPE-01"],
        "id_test": ["HUVEC-01", "RPE-01"],
        "val": ["HUVEC-17"],
        "test": ["HUVEC-18"],
    }
    assert manifest["cell_types"] == ["HUVEC", "RPE"]
    assert manifest["options"]["layout"] == "rxrx1" and manifest["excluded"]["count"] == 0
    assert sum(shard["count"] for shard in manifest["shards"]) == manifest["index"]["count"] == 32
    assert {"tensorflow", "numpy", "pandas", "pillow", "python"} <= set(manifest["versions"])


def test_class_names_go_by_label_and_treatments_have_the_lowest(records_tree):
    assert class_names(records_tree) == ["s20", "s21"]
    assert class_names(records_tree, ("treatment", "control")) == ["s20", "s21", "s22", "EMPTY"]


def test_a_folder_that_is_not_whole_is_not_read(records, tmp_path):
    with pytest.raises(ValueError, match="holds no finished records: there is no such folder"):
        read_manifest(tmp_path / "nowhere")
    (records / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has lost its manifest.json, .* Copy it back, or build"):
        read_manifest(records)
    with pytest.raises(ValueError, match="holds no finished records: there is no manifest.json"):
        read_manifest(tmp_path)
    (records / "unfinished.json").write_text("{}")
    with pytest.raises(ValueError, match="the build was broken off .* run that command"):
        read_manifest(records)


def test_a_damaged_or_newer_manifest_is_refused(records):
    path = records / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(ValueError, match="has schema 99; expected 2"):
        read_manifest(records)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        read_manifest(records)
