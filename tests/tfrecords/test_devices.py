import os
import subprocess
import sys
import types

import pytest
import tensorflow as tf

from tfrecords import devices


def test_the_gpu_is_left_to_another_backend_only(monkeypatch):
    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda found, kind: hidden.append((found, kind)))
    for backend, expected in (("tensorflow", []), ("jax", [([], "GPU")]), ("torch", [([], "GPU")] * 2)):
        config = types.SimpleNamespace(backend=lambda backend=backend: backend)
        monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(config=config))
        devices.leave_gpu_to_backend()
        assert hidden == expected


def test_before_keras_is_loaded_its_environment_variable_says_the_backend(monkeypatch):
    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda found, kind: hidden.append((found, kind)))
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    devices.leave_gpu_to_backend()
    assert hidden == []
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    devices.leave_gpu_to_backend()
    assert hidden == [([], "GPU")]


def test_too_late_is_said_and_not_raised(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["gpu"])
    assert devices.keep_tensorflow_off_gpu() is False
    config = types.SimpleNamespace(backend=lambda: "jax")
    monkeypatch.setitem(sys.modules, "keras", types.SimpleNamespace(config=config))
    with pytest.warns(UserWarning, match="TensorFlow, .* had begun to use the GPU before, and jax may lack"):
        devices.leave_gpu_to_backend()


@pytest.mark.parametrize("use", ["read_records", "channel_statistics"])
def test_whatever_reads_images_leaves_the_gpu_before_tensorflow_begins(records_tree, use):
    """In a process of its own: where TensorFlow has made its first tensor it keeps the GPU."""
    call = {"read_records": "'train', batch_size=2", "channel_statistics": "'train', group='plate'"}[use]
    code = f"""
import sys, tensorflow as tf
from tensorflow.python.eager import context
from tfrecords import devices
told = devices.keep_tensorflow_off_gpu
def keep():
    print("begun" if context.context()._initialized else "in time")
    return told()
devices.keep_tensorflow_off_gpu = keep
import tfrecords
tfrecords.{use}({str(records_tree)!r}, {call})
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == "in time"
