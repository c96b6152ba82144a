import json

import pytest
import tensorflow as tf

from tfrecords.build import build_records
from tfrecords.manifest import read_manifest, seal, to_json
from tfrecords.verify import main, verify_records
from tfrecords.write import scan_shard

NAME = "train/RPE-01_treatment_00000-of-00001.tfrecord"


def rewrite(records, change, name=NAME):
    """Writes a shard anew through a function of its list of examples, and makes the manifest agree with it."""
    path = records / name
    examples = [tf.train.Example.FromString(data) for data in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]
    examples = change(examples) or examples
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example.SerializeToString(deterministic=True))
    manifest = read_manifest(records)
    for shard in manifest["shards"]:
        if shard["name"] == name:
            shard["sha256"] = scan_shard(path, name).sha256
    (records / "manifest.json").write_bytes(seal(manifest))


def test_whole_records_pass(records_tree, capsys):
    assert verify_records(records_tree) == []
    assert main([str(records_tree)]) == 0
    assert "no faults in 12 files with 32 records" in capsys.readouterr().out


def test_sites_without_a_label_are_no_fault(kaggle_tree, tmp_path):
    for label in ("sirna_id", "cell_type"):
        build_records(kaggle_tree, tmp_path / label, label=label)
        assert verify_records(tmp_path / label) == []


def test_a_manifest_that_lacks_something_is_damaged(records):
    manifest = read_manifest(records)
    for change in (lambda m: m.pop("shards"), lambda m: m["experiments"].pop("val")):
        broken = json.loads(to_json(manifest))
        change(broken)
        (records / "manifest.json").write_bytes(seal(broken))
        with pytest.raises(ValueError, match="manifest.json is damaged .*it lacks"):
            read_manifest(records)


def test_a_flipped_byte_is_found_with_file_and_record_and_the_search_goes_on(records, capsys):
    path = records / NAME
    data = bytearray(path.read_bytes())
    for place in (len(data) // 4, len(data) * 3 // 4):  # One in each of its two records.
        data[place] ^= 1
    path.write_bytes(data)
    other = records / "val/HUVEC-17_control_00000-of-00001.tfrecord"
    other.write_bytes(other.read_bytes()[:-3])
    assert main([str(records)]) == 1
    out = capsys.readouterr().out
    assert f"{NAME}: the checksum of the file" in out
    for number in range(2):
        assert f"{NAME}, record {number}: the frame is damaged" in out
    assert "val/HUVEC-17_control_00000-of-00001.tfrecord: the checksum of the file" in out
    assert "val/HUVEC-17_control_00000-of-00001.tfrecord, record 3: the frame is damaged" in out


def test_every_byte_counts(records):
    path = records / NAME
    data = path.read_bytes()
    for place in range(0, len(data), 311):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
        assert any(fault.file == NAME for fault in verify_records(records)), place


def set_value(key, value, kind="bytes_list"):
    def change(examples):
        getattr(examples[1].features.feature[key], kind).value[0] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (set_value("image", b"12"), "the image has 2 bytes, expected 8 x 8 x 6"),
        (set_value("experiment", b"HUVEC-01"), "experiment is 'HUVEC-01', expected 'RPE-01'"),
        (set_value("sirna", 77, "int64_list"), "sirna is 77, expected [01]"),
        (set_value("site_id", b"x"), "site_id is 'x', expected 'RPE-01"),
        (lambda examples: examples[1].features.feature.pop("plate") and None, "has the keys .*, expected .*'plate'"),
        (lambda examples: examples[1].features.feature["plate"].int64_list.value.append(2), "plate holds 2 values"),
    ],
)
def test_a_wrong_record_is_named_by_key_and_number(records, change, message):
    rewrite(records, change)
    faults = verify_records(records)
    assert {(fault.file, fault.record) for fault in faults} == {(NAME, 1)}
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(faults[0]))


def test_a_record_too_few_or_too_many_is_counted(records):
    rewrite(records, lambda examples: examples[:1])
    assert "1 records could be read; the manifest counts 2" in str(verify_records(records)[0])
    rewrite(records, lambda examples: examples * 3)
    assert "a record too many" in " ".join(map(str, verify_records(records)))


def test_missing_and_stray_files_are_named(records):
    (records / NAME).unlink()
    (records / "train/.RPE-01.tmp").touch()
    messages = [str(fault) for fault in verify_records(records)]
    assert messages == [
        f"{NAME}: the file is missing",
        "train/.RPE-01.tmp: a stray file, which the manifest does not know",
    ]


def test_a_wrong_place_and_a_wrong_class_map_are_named(records):
    manifest = read_manifest(records)
    manifest["classes"].reverse()
    manifest["experiments"]["val"] = ["HUVEC-01"]
    for shard in manifest["shards"]:
        shard["kind"] = "treatment"
    (records / "manifest.json").write_bytes(seal(manifest))
    text = "\n".join(map(str, verify_records(records)))
    assert "the experiment HUVEC-01 is in train and val" in text
    assert "the label 0 has the number 0 in the index, but not in the class map" in text
    assert "kind is 'control', but the file is one of 'treatment'" in text
    assert "the experiment 'HUVEC-17' is not one of the split 'val'" in text


def test_a_folder_that_is_not_whole_is_an_error_not_a_pass(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "holds no finished records" in capsys.readouterr().err
