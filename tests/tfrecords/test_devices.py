import sys
import types

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
