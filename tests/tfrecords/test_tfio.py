"""tensorflow-io does real work on the TensorFlow it was built for, in processes of its own, since it may abort them."""

import os
import signal
import subprocess
import sys

import pytest

from tfrecords import tfio
from tfrecords.remote import find_transport

on_its_tensorflow = pytest.mark.skipif(
    not tfio.is_made_for_this_tensorflow(), reason='needs tensorflow 2.16 and tensorflow-io: pip install ".[io]"'
)


@pytest.mark.parametrize("release, tensorflow", [("0.37.1", "2.21.0"), ("0.37.0", "2.16.1"), ("0.37.1", None)])
def test_a_mismatch_says_which_pair_works(release, tensorflow, monkeypatch):
    monkeypatch.setattr(tfio, "installed", lambda: (release, tensorflow))
    pair = (
        rf"tensorflow-io {release} is installed.* TensorFlow {tensorflow}: .* tensorflow-io 0.37.1 with tensorflow 2.16"
    )
    with pytest.raises(ImportError, match=rf'{pair}, pip install "keras-abra\[io\]"'):
        tfio.load()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=f"s3:// needs fsspec.*{pair}"):
        find_transport("s3://bucket/records")
    assert "tensorflow_io" not in sys.modules


def test_without_it_the_install_line_is_given(monkeypatch):
    monkeypatch.setattr(tfio, "installed", lambda: (None, "2.16.2"))
    assert tfio.describe_mismatch() == ""
    with pytest.raises(ImportError, match=r'tensorflow-io is not installed: pip install "keras-abra\[io\]"'):
        tfio.load()


def run(script, **environment):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


ABORTS = """
import tensorflow as tf, tensorflow_io
print(tf.io.gfile.listdir("s3://screens/hcs/records/val"))
"""


@on_its_tensorflow
def test_the_smallest_script_after_which_a_process_aborts(bucket):
    """tensorflow/io #2039. If this fails, a release has mended it, and `_end_before_its_destructors` can go."""
    result = run(ABORTS)
    assert "HUVEC-17_treatment" in result.stdout, result.stderr[-2000:]
    assert result.returncode == -signal.SIGABRT and "pure virtual method called" in result.stderr


READS = """
import sys
from tfrecords import read_records, tfio, verify_records
assert verify_records("s3://screens/hcs/records") == []
assert "tensorflow_io" in sys.modules and "fsspec" not in sys.modules
import tensorflow as tf
data = read_records("s3://screens/hcs/records", "val", batch_size=1, metadata=True)
print(*[meta["site_id"].numpy()[0].decode() for *_, meta in data])
sys.exit(7)
"""


@on_its_tensorflow
def test_records_are_read_from_s3_and_the_process_ends_with_its_own_status(bucket, tmp_path):
    result = run(READS, TFRECORDS_CACHE=str(tmp_path))
    assert result.returncode == 7, result.stderr[-3000:]
    sites = {f"HUVEC-17_1_{well}_{site}" for well in ("B03", "B04") for site in (1, 2)}
    assert set(result.stdout.split()) >= sites


STREAMS = """
from tfrecords import tfio
tfio.load()
import tensorflow as tf
for url in ("s3://screens/hcs/records", SERVER + "/screens/hcs/records"):
    path = f"{url}/val/HUVEC-17_treatment_00000-of-00001.tfrecord"
    records = [tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(path)]
    print(len(records), records[0].features.feature["experiment"].bytes_list.value[0].decode())
"""


@on_its_tensorflow
def test_tensorflow_itself_streams_s3_and_http(bucket):
    """The web server must know byte ranges; Python's own does not, and tensorflow-io's error does not say so."""
    result = run(STREAMS.replace("SERVER", repr(os.environ["S3_ENDPOINT"])))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["4", "HUVEC-17"] * 2


@on_its_tensorflow
def test_an_endpoint_without_http_in_front_is_not_found_and_takes_its_time(bucket):
    """It speaks TLS to it, whatever S3_USE_HTTPS says, and reports after 50 s that there is no such file."""
    script = """
import tensorflow as tf, tensorflow_io
print("ready", flush=True)
tf.io.gfile.listdir("s3://screens/hcs")
"""
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        endpoint = os.environ["S3_ENDPOINT"].removeprefix("http://")
        environment = os.environ | {"S3_ENDPOINT": endpoint, "S3_USE_HTTPS": "0", "S3_VERIFY_SSL": "0"}
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=40)
    assert b"ready" in caught.value.stdout
