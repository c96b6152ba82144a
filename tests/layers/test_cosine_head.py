import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.layers.cosine_head import CosineHead
from tests.gradients import finite_difference, gradient

RANDOM = np.random.default_rng(0)
EMBEDDINGS = RANDOM.normal(size=(6, 8)).astype("float32")


def cosines(embeddings, kernel):
    out = np.zeros((len(embeddings), kernel.shape[1]))
    for i, f in enumerate(embeddings):
        for k, w in enumerate(kernel.T):
            out[i, k] = f @ w / np.sqrt((f @ f) * (w @ w))
    return out


def built(**kwargs):
    head = CosineHead(5, **kwargs)
    head.build((None, 8))
    return head


def test_is_the_cosine_of_each_pair():
    head = built()
    expected = cosines(EMBEDDINGS.astype("float64"), ops.convert_to_numpy(head.kernel).astype("float64"))
    np.testing.assert_allclose(ops.convert_to_numpy(head(EMBEDDINGS)), expected, atol=1e-6)


def test_lengths_do_not_count():
    head = built()
    before = ops.convert_to_numpy(head(EMBEDDINGS))
    np.testing.assert_allclose(ops.convert_to_numpy(head(EMBEDDINGS * 1e3)), before, atol=1e-6)
    head.kernel.assign(head.kernel * 1e-3)
    np.testing.assert_allclose(ops.convert_to_numpy(head(EMBEDDINGS)), before, atol=1e-6)


def test_zero_embedding_has_cosine_zero_and_finite_gradient():
    head = built()
    zero = np.zeros((2, 8), "float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(head(zero)), 0.0)
    assert np.isfinite(gradient(head, zero)).all()


def test_gradient_is_that_of_the_cosine():
    head = built()
    kernel = ops.convert_to_numpy(head.kernel).astype("float64")
    mix = RANDOM.normal(size=5)
    slope = gradient(lambda x: ops.matmul(head(x), ops.convert_to_tensor(mix.astype("float32"))), EMBEDDINGS)
    expected = finite_difference(lambda x: cosines(x, kernel) @ mix, EMBEDDINGS)
    np.testing.assert_allclose(slope, expected, atol=1e-5)
    np.testing.assert_allclose(np.sum(slope * EMBEDDINGS, axis=-1), 0.0, atol=1e-5)  # no pull along the embedding


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_is_float32_inside_under_mixed_precision(policy):
    half = policy.removeprefix("mixed_")
    head, reference = built(dtype=policy), built()
    reference.kernel.assign(head.kernel)
    inputs = ops.cast(EMBEDDINGS, half)
    out = head(inputs)
    assert keras.backend.standardize_dtype(head.kernel.dtype) == "float32"
    assert keras.backend.standardize_dtype(out.dtype) == "float32"
    expected = reference(ops.cast(inputs, "float32"))
    np.testing.assert_allclose(ops.convert_to_numpy(out), ops.convert_to_numpy(expected), atol=1e-6)


def test_large_float16_features_do_not_overflow():
    head = built(dtype="mixed_float16")
    out = ops.convert_to_numpy(head(ops.cast(np.full((1, 8), 6e4, "float32"), "float16")))
    expected = cosines(np.ones((1, 8)), ops.convert_to_numpy(head.kernel))
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_keeps_its_precision_inside_a_functional_model(policy):
    inputs = keras.Input((8,))
    features = keras.layers.Dense(8, dtype=policy)(inputs)
    outputs = CosineHead(5, dtype=policy)(features)
    assert outputs.shape == (None, 5)
    assert outputs.dtype == "float32"
    model = keras.Model(inputs, outputs)
    assert keras.backend.standardize_dtype(model(EMBEDDINGS).dtype) == "float32"
    assert np.abs(model.predict(EMBEDDINGS, verbose=0)).max() <= 1.0 + 1e-6


def test_loads_without_custom_objects(tmp_path):
    model = keras.Sequential([keras.Input((8,)), CosineHead(5, kernel_initializer="he_normal", name="cosine")])
    model.save(tmp_path / "head.keras")
    loaded = keras.models.load_model(tmp_path / "head.keras")
    np.testing.assert_array_equal(loaded.predict(EMBEDDINGS, verbose=0), model.predict(EMBEDDINGS, verbose=0))
    assert isinstance(loaded.layers[-1].kernel_initializer, keras.initializers.HeNormal)
    assert loaded.layers[-1].get_config() == model.layers[-1].get_config()


@pytest.mark.parametrize("num_classes", [1, 0, -3, 2.0, "5", None, True])
def test_number_of_classes_is_an_integer_of_at_least_two(num_classes):
    with pytest.raises(ValueError, match="`num_classes` must be an integer of at least 2"):
        CosineHead(num_classes)


def test_a_feature_map_is_refused():
    with pytest.raises(ValueError, match="Pool a feature map first"):
        CosineHead(5)(np.zeros((2, 8, 8, 3), "float32"))
    with pytest.raises(ValueError, match="Pool a feature map first"):
        CosineHead(5).compute_output_shape((None, 4, 4, 3))


def test_takes_a_numpy_integer():
    assert CosineHead(np.int64(5)).get_config()["num_classes"] == 5
