"""AdaBN against the formula, on a plain network and on an `ABRAModel`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_abra import ABRAModel, ada_bn, backend, embedding_neck
from tests.tiny import tiny_batch, tiny_model

IMAGES = np.random.default_rng(0).gamma(2.0, size=(12, 4, 4, 2)).astype("float32")


def network():
    keras.utils.set_random_seed(0)
    image = keras.Input((4, 4, 2))
    norm = keras.layers.BatchNormalization(name="norm")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.5)(norm(image)))
    model = keras.Model(image, embedding_neck(2, 3)(x))  # a sub-model, with two more
    norm.set_weights([np.array(w, "float32") for w in ([2, 0.5], [1, -1], [7, 7], [9, 9])])
    return model


def normalized(x, norm):
    gamma, beta, _, _ = norm.get_weights()
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + norm.epsilon) * gamma + beta


def test_of_one_batch_every_layer_has_that_batchs_statistics():
    model = network()
    first, dense, second = model.layers[-1].layers
    x = normalized(IMAGES, model.get_layer("norm")).mean((1, 2))
    x = normalized(normalized(x, first) @ dense.get_weights()[0], second)
    apart, before = model.predict(IMAGES, verbose=0), model.get_weights()
    with ada_bn(model, IMAGES) as adapted:
        np.testing.assert_allclose(adapted.predict(IMAGES, verbose=0), x, rtol=1e-3, atol=1e-3)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(model.predict(IMAGES, verbose=0), apart)
    assert np.abs(apart - x).max() > 0.1


def test_of_several_uneven_batches_the_statistics_are_those_of_all_images():
    model = network()
    with ada_bn(model, IMAGES, batch_size=5):
        norm = model.get_layer("norm")
        np.testing.assert_allclose(norm.moving_mean, IMAGES.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(norm.moving_variance, IMAGES.var((0, 1, 2)), rtol=1e-4)


def test_the_model_has_its_own_statistics_again_after_an_error():
    model = network()
    with pytest.raises(KeyError), ada_bn(model, IMAGES):
        assert np.abs(np.array(model.get_layer("norm").moving_mean) - 7).min() > 1
        raise KeyError
    np.testing.assert_array_equal(model.get_layer("norm").moving_mean, [7, 7])


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_an_abra_model_adapts_backbone_and_neck_and_trains_on(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = tiny_model(perturbed_norms="auxiliary")
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("sgd")
    x, y = tiny_batch()
    images = 3 * x["image"] + 5
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    inference = [n for n in norms if not n.name.endswith("_twin")]
    old = [np.array(norm.moving_variance) for norm in inference]
    with ada_bn(model, images):
        moved = [np.abs(np.array(n.moving_variance) - o).max() for n, o in zip(inference, old, strict=True)]
        assert len(moved) == 5 and min(moved) > 1e-3
        logits = model.predict(images, verbose=0)
    assert np.isfinite(logits).all() and np.abs(logits - model.predict(images, verbose=0)).max() > 1e-3
    assert np.isfinite(model.fit(x["image"], y, verbose=0).history["loss"][0])


def test_a_layer_called_twice_has_the_statistics_of_both_calls():
    image, norm = keras.Input((4, 4, 2)), keras.layers.BatchNormalization()
    model = keras.Model(image, norm(keras.layers.Rescaling(2.0, 1.0)(image)) + norm(image))
    both = np.concatenate([IMAGES, 2 * IMAGES + 1])
    with ada_bn(model, IMAGES, batch_size=6):
        np.testing.assert_allclose(norm.moving_mean, both.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(norm.moving_variance, both.var((0, 1, 2)), rtol=1e-4)


def test_without_batch_normalization_it_is_refused():
    image = keras.Input((4, 4, 2))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(image))
    with pytest.raises(ValueError, match="with batch normalization, of which this one has none"):
        with ada_bn(model, IMAGES):
            pass
    with pytest.raises(ValueError, match="a model of Functional and Sequential models. Received"):
        with ada_bn(Subclassed(), IMAGES):
            pass


class Block(keras.layers.Layer):
    """With a batch normalization of its own, as blocks of other packages have."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization(name="inner")

    def call(self, x, training=None):
        return self.norm(x, training=training)


def test_normalizations_inside_of_layers_are_named():
    image = keras.Input((4, 4, 2))
    x = keras.layers.BatchNormalization()(Block(name="block")(image))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
    with pytest.raises(ValueError, match="batch normalizations inside of other layers: .*inner"):
        with ada_bn(model, IMAGES):
            pass
    backbone = keras.Model(image, Block()(keras.layers.Conv2D(3, 3, name="stem")(image)))
    for kind in ("clean", "moving", "auxiliary"):
        with pytest.raises(ValueError, match="batch normalizations inside of other layers: .*inner"):
            ABRAModel(backbone, 5, ["stem"], perturbed_norms=kind)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_in_the_scope_of_a_strategy_it_is_refused_and_outside_it_is_that_of_one_device():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = network()
        with pytest.raises(ValueError, match="among 2. Call it outside the strategy's scope"):
            with ada_bn(model, IMAGES):
                pass
    plain = network()
    with ada_bn(model, IMAGES), ada_bn(plain, IMAGES):
        found, expected = (np.array(m.get_layer("norm").moving_mean) for m in (model, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_it_is_refused_where_batches_are_divided(monkeypatch):
    monkeypatch.setattr(backend, "replicas", lambda: 2)
    with pytest.raises(ValueError, match="on one device, and here batches are divided among 2"):
        with ada_bn(network(), IMAGES):
            pass


@pytest.mark.parametrize("images", [IMAGES[:0], tf.data.Dataset.from_tensor_slices(IMAGES).batch(4).take(0)])
def test_no_images_are_refused(images):
    with pytest.raises(ValueError, match="No images were given"):
        with ada_bn(network(), images):
            pass


def test_what_cannot_be_measured_is_named():
    with pytest.raises(ValueError, match="statistics of the images are not finite"):
        with ada_bn(network(), np.where(IMAGES > 1, np.nan, IMAGES)):
            pass
    with pytest.raises(ValueError, match="`batch_size` must be an integer of 1 or more. Received: batch_size=0"):
        with ada_bn(network(), IMAGES, batch_size=0):
            pass
    for batch in (IMAGES[:1], tf.data.Dataset.from_tensor_slices(IMAGES).batch(1)):
        with pytest.raises(ValueError, match="mini-batches of 2 images or more"):
            with ada_bn(network(), batch):
                pass
    with pytest.raises(ValueError, match="a model that is not built"):
        with ada_bn(keras.Sequential([keras.layers.BatchNormalization()]), IMAGES):
            pass


def test_tensors_are_divided_as_arrays_are():
    found = []
    for images in (IMAGES, keras.ops.convert_to_tensor(IMAGES)):
        model = network()
        with ada_bn(model, images, batch_size=5):
            found.append(model.get_weights())
    for array, tensor in zip(*found, strict=True):
        np.testing.assert_allclose(array, tensor, rtol=1e-5)
    with ada_bn(model, IMAGES):
        assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(model.get_weights(), found[0], strict=True))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()

    def call(self, inputs):
        return self.norm(inputs)


def test_a_dict_is_divided_as_arrays_are():
    model = tiny_model()
    x, _ = tiny_batch(6)

    def mean(images, batch_size):
        with ada_bn(model, images, batch_size=batch_size):
            return np.array(model.neck.layers[0].moving_mean)

    np.testing.assert_array_equal(mean(x, 2), mean(x["image"], 2))
    assert np.abs(mean(x, 2) - mean(x, 6)).max() > 1e-6
    with pytest.raises(ValueError, match="No images were given"):
        mean({"image": x["image"][:0]}, 2)
