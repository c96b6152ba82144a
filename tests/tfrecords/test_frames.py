import hashlib

import pytest
import tensorflow as tf

from tfrecords.frames import FOOTER, HEADER, frame, read_frames

RECORDS = [b"first", b"", b"the third record", bytes(range(256))]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.tfrecord"
    with open(path, "wb") as file:
        for record in RECORDS:
            header, footer = frame(record)
            file.write(header + record + footer)
    return path


def test_frames_are_tensorflows(path, tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "tf.tfrecord")) as writer:
        for record in RECORDS:
            writer.write(record)
    assert path.read_bytes() == (tmp_path / "tf.tfrecord").read_bytes()
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == RECORDS


def test_records_come_back_and_the_whole_file_is_hashed(path):
    digest = hashlib.sha256()
    assert list(read_frames(path, digest)) == [(record, None) for record in RECORDS]
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()


def test_every_flipped_bit_is_noticed_and_no_other_record_lost_without_a_word(path):
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            digest = hashlib.sha256()
            found = list(read_frames(path, digest))
            faults = [number for number, (record, fault) in enumerate(found) if record is None]
            assert len(faults) == 1 and "damaged" in found[faults[0]][1]
            for number, (record, _) in enumerate(found):
                assert record in (RECORDS[number], None)
            assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()


def test_damage_that_leaves_the_length_lets_the_rest_be_read(path):
    data = bytearray(path.read_bytes())
    start = HEADER + len(RECORDS[0]) + FOOTER
    for place in (HEADER, start + 8):  # In the first record; in the checksum of the second one's length.
        data[place] ^= 1
    path.write_bytes(data)
    found = list(read_frames(path))
    assert [record for record, _ in found] == [None, None, *RECORDS[2:]]
    assert "the checksum of the record is wrong" in found[0][1]
    assert "the checksum of the length is wrong" in found[1][1]


def test_a_file_cut_anywhere_but_between_records_ends_in_a_fault(path):
    data = path.read_bytes()
    ends, end = [0], 0
    for record in RECORDS:
        ends.append(end := end + HEADER + len(record) + FOOTER)
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        found = list(read_frames(path))
        whole = sum(end <= cut for end in ends) - 1
        assert [record for record, _ in found if record is not None] == RECORDS[:whole]
        assert len(found) == whole + (cut not in ends)
