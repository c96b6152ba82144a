"""What needs a GPU; skipped where there is none."""

import keras
import numpy as np
import pytest

from tests.test_fused_step import STAGES, compare, mismatches, train_once
from tests.tiny import tiny_backbone, tiny_batch, tiny_model

STRUCTURES = ["diagonal", "low_rank", "domain"]
BACKEND = keras.backend.backend()


def has_gpu():
    match BACKEND:
        case "tensorflow":
            import tensorflow as tf

            return bool(tf.config.list_physical_devices("GPU"))
        case "jax":
            import jax

            return jax.default_backend() == "gpu"
        case _:
            import torch

            return torch.cuda.is_available()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="there is no GPU")]


@pytest.fixture
def whole_float32():
    """Products of float32 numbers are computed with all their bits, not as TensorFloat-32."""
    match BACKEND:
        case "tensorflow":
            import tensorflow as tf

            before = tf.config.experimental.tensor_float_32_execution_enabled()
            tf.config.experimental.enable_tensor_float_32_execution(False)
            yield
            tf.config.experimental.enable_tensor_float_32_execution(before)
        case "jax":
            import jax

            with jax.default_matmul_precision("highest"):
                yield
        case _:
            import torch

            before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def device_of(variable):
    match BACKEND:
        case "tensorflow":
            return variable.value.device
        case "jax":
            return str(next(iter(variable.value.devices())).platform)
        case _:
            return str(variable.value.device)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_trains_and_predicts(structure, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = tiny_model(structure, 2, STAGES["two"])
        model.compile("adam", metrics=["accuracy"])
        x, y = tiny_batch(64)
        history = model.fit(x, y, batch_size=16, epochs=3, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        assert np.isfinite(model.predict(x, verbose=0)).all()
        assert all("gpu" in device_of(v).lower() or "cuda" in device_of(v) for v in model.variables)
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_its_gradients_equal_the_naive_scheme(structure, steps, whole_float32):
    assert compare(tiny_model(structure, steps, STAGES["two"]), warm=structure == "domain") == []


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_step_is_that_of_the_cpu(structure, steps, whole_float32):
    def model():  # no drawn number, as torch draws others on each device
        return tiny_model(structure, steps, STAGES["two"], tiny_backbone(dropout=0), layer={"start": "zero"})

    x, y = tiny_batch()
    here = model()
    values = here.get_weights()
    results = train_once(here, x, y)
    with keras.device("cpu"):  # torch: not cpu:0, whose variables would be no parameters
        there = model()
        there.set_weights(values)
        expected = train_once(there, x, y)
        assert all("cpu" in device_of(v).lower() for v in there.variables)
    assert mismatches(here, results, expected) == []
