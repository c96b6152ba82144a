"""What needs a GPU; skipped where there is none."""

import keras
import numpy as np
import pytest

from tests.tiny import tiny_batch, tiny_model


def has_gpu():
    match keras.backend.backend():
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


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "domain"])
def test_it_trains_and_predicts(structure, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = tiny_model(structure, 2, ("stem", "stage1"))
        model.compile("adam", metrics=["accuracy"])
        x, y = tiny_batch(64)
        history = model.fit(x, y, batch_size=16, epochs=3, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        assert np.isfinite(model.predict(x, verbose=0)).all()
    finally:
        keras.config.set_dtype_policy(before)
