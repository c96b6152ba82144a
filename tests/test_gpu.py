"""What needs a GPU; skipped where there is none."""

import keras
import numpy as np
import pytest

from keras_abra.losses import DistributionAlignment
from tests import replicas
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
    """But for rounding: 1e-4 as above, or ten times what a last bit of the images changes on the CPU, at most 1e-3.
    (That of a bias before the last normalization is a small difference of large sums: 2e-5 for the one bit.)"""
    x, y = tiny_batch()
    up = np.indices(x["image"].shape).sum(0) % 2 == 0
    rounded = x | {"image": np.nextafter(x["image"], np.where(up, np.inf, -np.inf).astype("float32"))}

    def step(x, values=None):  # no drawn number, as torch draws others on each device
        model = tiny_model(structure, steps, STAGES["two"], tiny_backbone(dropout=0), layer={"start": "zero"})
        values = model.get_weights() if values is None else values
        model.set_weights(values)
        return model, values, train_once(model, x, y)

    model, values, (gradients, *more) = step(x)
    with keras.device("cpu"):  # torch: not cpu:0, whose variables would be no parameters
        there, _, (expected, *expected_more) = step(x, values)
        assert all("cpu" in device_of(v).lower() for v in there.variables)
        _, _, (moved, *_) = step(rounded, values)
    whole = np.sqrt(sum(np.sum(np.square(e)) for e in expected))
    for i, (g, e, m) in enumerate(zip(gradients, expected, moved, strict=True)):
        most = 1e-3 * max(np.linalg.norm(e), 1e-3 * whole)
        if np.linalg.norm(g - e) <= min(10 * np.linalg.norm(m - e), most):
            gradients[i] = e
    assert mismatches(model, (gradients, *more), (expected, *expected_more)) == []


@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
def test_two_gpus_take_the_step_of_one(structure, monkeypatch, whole_float32):
    """By TensorFlow's own choice of collectives, NCCL's."""
    if BACKEND != "tensorflow":
        pytest.skip("MirroredStrategy is TensorFlow's")
    import tensorflow as tf

    if len(tf.config.list_logical_devices("GPU")) < 2:
        pytest.skip("there is one GPU")
    replicas.draw_by_sample(monkeypatch)

    def build():
        backbone = tiny_backbone(dropout=0.0, synchronized=True)
        return tiny_model(structure, 1, STAGES["two"], backbone, alignment=DistributionAlignment("coral"))

    one = replicas.train(tf.distribute.get_strategy(), build, *tiny_batch(), eagerly=False)
    two = replicas.train(replicas.mirrored(2, collectives=True, kind="GPU"), build, *tiny_batch(), eagerly=False)
    assert replicas.distance(two.gradients, one.gradients) <= 1e-4
