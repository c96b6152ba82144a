"""What a backbone begins with."""

import functools
import threading
import time

import keras
import numpy as np
import pytest
import rxrx1
from hparams import EMBEDDED
from methods import build_model, check_backbone_weights, make_backbone
from weights import check_weights

from tfrecords.locks import HAS_LOCKS, lock_file

pytestmark = [pytest.mark.any_backend, pytest.mark.usefixtures("eager")]


@pytest.mark.parametrize("method", ["abra", "erm", "dsu"])
def test_a_job_begins_with_the_backbone_of_an_earlier_one(tmp_path, method):
    keras.utils.set_random_seed(1)
    earlier = build_model(method, EMBEDDED | {"embedding_dim": 6}, (24, 24, 6), ["a", "b", "c"])
    earlier.save(tmp_path / "model.keras")
    image = np.random.default_rng(0).normal(size=(2, 24, 24, 6)).astype("float32")
    last = earlier if method == "erm" else earlier.backbone
    last = keras.Model(last.input, last.get_layer("stage3").output) if method == "erm" else last
    settings = EMBEDDED | {"weights": str(tmp_path / "model.keras"), "embedding_dim": 8}
    model = build_model("abra", settings, (24, 24, 6), ["x", "y"])
    np.testing.assert_allclose(model.backbone.predict(image, verbose=0), last.predict(image, verbose=0), atol=1e-6)


def test_weights_of_three_channels_serve_six(tmp_path):
    grey = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")
    name, file = "MobileNetV2", tmp_path / "rgb.weights.h5"
    rgb = make_backbone(name, (32, 32, 3))
    rgb.save_weights(file)
    six = make_backbone(name, (32, 32, 6), str(file))
    expected = rgb.predict(np.repeat(grey, 3, axis=3), verbose=0)
    np.testing.assert_allclose(six.predict(np.repeat(grey, 6, axis=3), verbose=0), expected, atol=1e-5)
    np.testing.assert_array_equal(make_backbone(name, (32, 32, 3), str(file)).get_weights()[0], rgb.get_weights()[0])
    six.save_weights(tmp_path / "six.weights.h5")  # of as many channels as the images: as they are
    for weights in (file, tmp_path / "six.weights.h5"):
        check_backbone_weights(name, str(weights))
    again = make_backbone(name, (32, 32, 6), str(tmp_path / "six.weights.h5"))
    for found, weight in zip(again.get_weights(), six.get_weights(), strict=True):
        np.testing.assert_array_equal(found, weight)


@pytest.mark.skipif(not HAS_LOCKS, reason="no locks on this system")
def test_of_several_processes_one_downloads_at_a_time(tmp_path, monkeypatch):
    """Keras writes a download into the file itself; a lock of another process is waited for."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    made, other = [], lock_file(tmp_path / "cache" / "weights.lock")
    check = threading.Thread(target=check_weights, args=(lambda *_: made.append(1), "imagenet", "any", 3))
    check.start()
    time.sleep(0.5)
    assert check.is_alive() and made == []
    other.close()
    check.join(60)
    assert made == [1]
    lock = functools.partial(lock_file, tmp_path / "cache" / "weights.lock", wait=False)
    check_weights(lambda *_: made.append(lock()), "imagenet", "any", 3)
    assert made[1] is None  # it is held while the backbone is made
    lock().close()


def test_weights_of_another_backbone_are_named(tmp_path):
    build_model("erm", EMBEDDED, (24, 24, 6), ["a", "b"]).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="is no model with the same backbone: it has .* layers with weights"):
        make_backbone("MobileNetV2", (32, 32, 6), str(tmp_path / "model.keras"))
    with pytest.raises(ValueError, match=r"its 'stem_conv' has weights of shapes .*5, 6, 16.*, and .* .*5, 4"):
        make_backbone("tiny_resnet", (24, 24, 4), str(tmp_path / "model.keras"))
    check_backbone_weights("tiny_resnet", str(tmp_path / "model.keras"))
    with pytest.raises(ValueError, match="cannot be loaded into MobileNetV2 .*is no model with the same backbone"):
        check_backbone_weights("MobileNetV2", str(tmp_path / "model.keras"))
    (tmp_path / "other.keras").write_text("no model")
    for file, message in (("none.keras", "none.keras is no file"), ("other.keras", "no model that can be loaded")):
        with pytest.raises(ValueError, match=f"--weights .*{file} cannot be loaded into tiny_resnet .*{message}"):
            check_backbone_weights("tiny_resnet", str(tmp_path / file))
    output = ("--output", str(tmp_path / "out"), "--distribution", "none")
    with pytest.raises(ValueError, match="--weights imagenet cannot be loaded into tiny_resnet"):
        rxrx1.main(["--weights", "imagenet", *output])
    assert not (tmp_path / "out").exists()
