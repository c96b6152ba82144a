"""Models whose layers were changed after they were made: frozen, adapted (LoRA), quantized, of another type."""

import keras
import numpy as np
import pytest

from keras_abra import ABRAModel
from tests.tiny import tiny_batch, tiny_model


def logits_of(model, images):
    """From what `embed` gives now."""
    kernel = keras.ops.convert_to_numpy(model.head.kernel)
    return model.loss_function.scale * model.embed(images, verbose=0) @ (kernel / np.linalg.norm(kernel, axis=0))


def saved(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def test_embeddings_are_those_of_the_model_as_it_is_now():
    """What was compiled for `embed` has the weights by their places among those that were trainable then: here two
    layers of one shape change places."""
    image, images = keras.Input((8, 8, 2)), tiny_batch()[0]["image"]
    x = keras.layers.Conv2D(3, 3, activation="relu")(image)
    norms = [keras.layers.BatchNormalization(name=name) for name in "ab"]
    backbone = keras.Model(image, keras.layers.Activation("relu")(norms[1](norms[0](x))))
    model = ABRAModel(backbone, 5, embedding_dim=4)
    norms[0].beta.assign([2.0, -1.0, 0.5])
    for trained in norms:
        for layer in model._flatten_layers(include_self=False):
            layer.trainable = layer is trained or bool(list(layer._flatten_layers(include_self=False)))
        model.compile("sgd")
        np.testing.assert_allclose(logits_of(model, images), model.predict(images, verbose=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [["conv"], []])
def test_layers_whose_scales_come_as_gradients_are_refused_where_these_are_summed(stages):
    image = keras.Input((8, 8, 2))
    conv = keras.layers.Conv2D(3, 3, activation="relu", name="conv")(image)
    model = ABRAModel(keras.Model(image, keras.layers.Dense(4)(conv)), 5, stages, embedding_dim=4)
    model.quantize("float8")
    model.compile("sgd", run_eagerly=True)
    x, y = tiny_batch()
    if stages:
        with pytest.raises(ValueError, match="float8 layers cannot be trained with perturbed stages"):
            model.train_on_batch(x["image"], y)
    else:
        assert np.isfinite(model.train_on_batch(x["image"], y)[0])


def test_embeddings_are_made_as_the_model_runs():
    model, images = tiny_model(), tiny_batch()[0]["image"]
    model.compile("sgd", run_eagerly=True)
    model.embed(images, verbose=0)
    assert model._embedder.value.run_eagerly and not model._embedder.value.jit_compile


def test_an_adapted_neck_is_embedded_saved_and_trained_on(tmp_path):
    model, images = tiny_model(), tiny_batch()[0]["image"]
    model.embed(images, verbose=0)
    dense = model.neck.get_layer("neck_dense")
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(keras.random.normal(dense.lora_kernel_b.shape, seed=1))
    model.compile("sgd")
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(logits_of(model, images), expected, rtol=1e-4, atol=1e-4)
    again = saved(model, tmp_path)
    np.testing.assert_allclose(again.predict(images, verbose=0), expected, rtol=1e-4, atol=1e-4)
    names = [[v.name for v in m.trainable_variables] for m in (model, again)]
    assert names[0] == names[1] and "lora_kernel_a" in names[1]
    assert again.get_config()["changed"] == model.get_config()["changed"]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras compiles its integer products there for minutes")
@pytest.mark.parametrize("dtype, config", [("float32", None), ("mixed_bfloat16", None), ("float32", "weights alone")])
def test_a_quantized_model_is_embedded_and_saved(tmp_path, dtype, config):
    if config and not hasattr(keras.quantizers, "Int8QuantizationConfig"):
        pytest.skip("this release of Keras quantizes by a mode alone")
    model, images = tiny_model(), tiny_batch()[0]["image"]
    model.embed(images, verbose=0)
    model.neck.get_layer("neck_dense").dtype_policy = dtype
    how = {"config": keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)} if config else {"mode": "int8"}
    model.quantize(**how)
    expected = model.predict(images, verbose=0)
    np.testing.assert_allclose(logits_of(model, images), expected, rtol=1e-3, atol=1e-3)
    again = saved(model, tmp_path)
    assert again.neck.get_layer("neck_dense").quantization_mode == "int8"
    np.testing.assert_allclose(again.predict(images, verbose=0), expected, rtol=1e-5, atol=1e-5)


def test_a_type_of_ones_own_is_saved(tmp_path):
    model, images = tiny_model(), tiny_batch()[0]["image"]
    model.neck.get_layer("neck_dense").dtype_policy = "mixed_bfloat16"
    again = saved(model, tmp_path)
    assert again.neck.get_layer("neck_dense").dtype_policy.name == "mixed_bfloat16"
    np.testing.assert_array_equal(again.predict(images, verbose=0), model.predict(images, verbose=0))
    whole = tiny_model(dtype="mixed_bfloat16")
    assert whole.get_config()["changed"] == tiny_model().get_config()["changed"] == {}


def test_a_file_from_before_these_were_saved_is_read():
    config = tiny_model().get_config()
    del config["changed"]
    assert isinstance(ABRAModel.from_config(config), ABRAModel)
