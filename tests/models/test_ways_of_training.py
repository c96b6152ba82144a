"""Twenty steps in every precision and way of compiling that Keras offers end near those of plain float32."""

import contextlib
import os

import keras
import numpy as np
import pytest

from keras_abra import ada_bn
from tests.recording import RecordingOptimizer
from tests.tiny import tiny_backbone, tiny_batch, tiny_model

TORCH = keras.backend.backend() == "torch"


@contextlib.contextmanager
def dtype_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def train(policy="float32", optimizer=None, structure="low_rank", **arguments):
    """Losses of 5 epochs of 4 steps, without dropout: XLA draws other masks than TensorFlow."""
    with dtype_policy(policy):
        model = tiny_model(structure, 2, ("stem", "stage1"), backbone=tiny_backbone(dropout=0.0))
        model.compile(optimizer=optimizer or keras.optimizers.SGD(0.004), metrics=["accuracy"], **arguments)
        x, y = tiny_batch(32)
        losses = model.fit(x, y, batch_size=8, epochs=5, shuffle=False, verbose=0).history
        assert int(model.optimizer.iterations) * (model.optimizer.gradient_accumulation_steps or 1) == 20
        assert all(np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in model.variables)
    return losses


@pytest.fixture(scope="module")
def plain():
    losses = train(run_eagerly=True)
    assert losses["loss"][-1] < 0.9 * losses["loss"][0]  # else being close to it would mean little
    return losses


def close(losses, plain, tolerance):
    for name in ("loss", "clean_loss", "perturbed_loss"):
        np.testing.assert_allclose(losses[name], plain[name], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("policy,tolerance", [("mixed_float16", 0.02), ("mixed_bfloat16", 0.05)])
def test_mixed_precision_stays_close(plain, policy, tolerance):
    # Keras begins with a scale of 2**15 and skips steps until it fits; this one fits
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.004), initial_scale=2.0**8)
    close(train(policy, scaled if policy == "mixed_float16" else None), plain, tolerance)


def test_the_compiled_step_stays_close(plain):
    close(train(), plain, 1e-3)


@pytest.mark.skipif(TORCH and not os.environ.get("TORCH_COMPILE"), reason="minutes of torch.compile: TORCH_COMPILE=1")
def test_jit_compile():
    # On TensorFlow, XLA draws other starts of the search.
    plain = train(structure="diagonal", jit_compile=False)
    losses = train(structure="diagonal", jit_compile=True)
    close(losses, plain, 0.1 if keras.backend.backend() == "tensorflow" else 1e-3)


@pytest.mark.skipif(TORCH, reason="on torch, Keras runs one step an execution")
def test_several_steps_an_execution(plain):
    close(train(steps_per_execution=4), plain, 1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.004, use_ema=True, ema_momentum=0.5),
        lambda: keras.optimizers.SGD(0.02, gradient_accumulation_steps=2),
        lambda: keras.optimizers.Lamb(0.02),  # layer-wise trust ratios, as in LARS
        lambda: keras.optimizers.Adafactor(0.02),
    ],
    ids=["averaged weights", "gradient accumulation", "Lamb", "Adafactor"],
)
def test_optimizers(plain, optimizer):
    losses = train(optimizer=optimizer())
    assert losses["loss"][-1] < 0.9 * losses["loss"][0]
    if optimizer().use_ema:  # the average changes nothing before the end
        close(losses, plain, 1e-3)


def gradients(policy, auto_scale_loss):
    with dtype_policy(policy):
        model = tiny_model("low_rank", 1, ("stem", "stage1"), backbone=tiny_backbone(dropout=0.0, regularizer=None))
        optimizer = RecordingOptimizer()
        model.compile(optimizer=optimizer, auto_scale_loss=auto_scale_loss, run_eagerly=True)
        x, y = tiny_batch()
        model.train_on_batch(x, y, sample_weight=np.full(8, 1e-6, "float32"))
    return optimizer.recorded()[0]  # of the convolution farthest from the loss


def test_gradients_that_underflow_survive_with_loss_scaling():
    exact = gradients("float32", False)
    scaled, unscaled = gradients("mixed_float16", True), gradients("mixed_float16", False)
    assert np.linalg.norm(exact) > 0

    def error(found):
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert error(unscaled) > 0.5
    assert error(scaled) < 0.1


@pytest.mark.skipif(TORCH, reason="torch runs eagerly: there is nothing to trace")
def test_nothing_is_traced_anew_after_the_first_epoch(monkeypatch):
    traced = []
    model = tiny_model("domain", 1, ("stem",), warmup=6)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 12)
    model.compile(optimizer=keras.optimizers.SGD(schedule), metrics=["accuracy"])
    step = model.fused_step
    monkeypatch.setattr(model, "fused_step", lambda *args: traced.append(1) or step(*args))
    x, y = tiny_batch(16)
    epochs = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(len(traced)))
    # margin and adversary change in the third epoch, the learning rate in every step
    model.fit(x, y, batch_size=8, epochs=6, callbacks=[count], validation_data=(x, y), verbose=0)
    assert epochs[0] > 0 and epochs[-1] == epochs[0]
    if keras.backend.backend() == "tensorflow":
        assert epochs[0] == 1  # two, where the first trace makes variables: Keras's own way
    model.fit({"image": x["image"], "experiment": x["experiment"]}, y, batch_size=8, epochs=2, verbose=0)
    assert len(traced) == epochs[0]


def test_a_new_learning_rate_acts_on_a_traced_step():
    model = tiny_model()
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    x, y = tiny_batch()
    model.train_on_batch(x, y)
    weights = model.get_weights()
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(x, y)
    for variable, before, after in zip(model.weights, weights, model.get_weights(), strict=True):
        if variable.trainable:
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("steps", [1, 2])
def test_training_takes_from_a_pipeline_only_what_it_trains_on(steps):
    tf = pytest.importorskip("tensorflow")
    x, y = tiny_batch(8)
    passes = []

    def batches():
        passes.append(0)
        for _ in range(steps):
            passes[-1] += 1
            yield x, y

    spec = keras.tree.map_structure(lambda v: tf.TensorSpec((None, *v.shape[1:]), v.dtype), (x, y))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    model = tiny_model("diagonal", 2, ("stem",), backbone=tiny_backbone(dropout=0.0))
    model.compile(optimizer=keras.optimizers.SGD(0.004), metrics=["accuracy"])
    model.fit(data.apply(tf.data.experimental.assert_cardinality(steps)), epochs=2, shuffle=False, verbose=0)
    assert [taken for taken in passes if taken] == [steps, steps]


def pipeline(bad):
    """Three mini-batches with a label outside its range in one of them."""
    import tensorflow as tf

    x, y = tiny_batch(12)
    y[4 * bad] = 99
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(4)


def broken_images(bad):
    x, _ = tiny_batch(4)
    for _ in range(bad):
        yield (x,)
    raise ValueError("label 99")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("way", ["fit", "evaluate", "predict", "embed", "ada_bn"])
def test_data_that_fail_leave_the_model_its_weights(way, bad):
    """On JAX the variables are empty during a loop."""
    model = tiny_model()
    model.compile("sgd", metrics=["accuracy"])
    x, y = tiny_batch(12)
    model.fit(x, y, batch_size=4, verbose=0)
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    data = pipeline(bad) if way in ("fit", "evaluate") else broken_images(bad + 1)
    with pytest.raises(Exception, match="99"):  # TensorFlow makes one of its own of a generator's
        if way == "ada_bn":
            with ada_bn(model, data):
                raise AssertionError("measured")
        getattr(model, way)(data, verbose=0)
    pairs = zip(model.trainable_variables, before, strict=True)
    assert any((keras.ops.convert_to_numpy(v) != w).any() for v, w in pairs) == (way == "fit" and bad == 1)
    assert np.isfinite(model.fit(x, y, batch_size=4, verbose=0).history["loss"]).all()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_images_come_to_the_backbone_as_they_are_given(policy):
    """A backbone that begins in full precision sees all digits of grey levels, in training and in inference."""
    with dtype_policy(policy):
        image = keras.Input((8, 8, 2))
        x = keras.layers.Normalization(mean=68000.0, variance=100.0, dtype="float32")(image)
        x = keras.layers.Conv2D(4, 3, name="stem", activation="relu")(x)
        backbone = keras.Model(image, keras.layers.Conv2D(4, 3)(x))
        model = tiny_model(backbone=backbone)
        pooled = keras.layers.GlobalAveragePooling2D()(backbone.output)
        plain = keras.Model(image, model.head(model.neck(pooled)) * model.loss_function.scale)
        x = np.random.default_rng(0).normal(68000, 10, (4, 8, 8, 2)).astype("float32")  # beyond float16
        expected = plain.predict(x, verbose=0)
        assert np.isfinite(expected).all() and expected.std(0).min() > 0
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
        embedder = keras.Model(image, model.neck(pooled))
        found, rows = model.embed(x, verbose=0), embedder.predict(x, verbose=0).astype("float32")
        with ada_bn(model, x):
            assert np.isfinite(model.predict(x, verbose=0)).all()
        np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=0.02, atol=2e-3)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="on JAX a step is given the memory of the weights")
def test_an_error_of_the_step_itself_is_the_one_that_is_raised(monkeypatch):
    model = tiny_model()
    model.compile("sgd")
    x, y = tiny_batch(8)
    model.fit(x, y, batch_size=4, verbose=0)
    step = model.train_function

    def fails(state, iterator):
        step(state, iterator)
        raise MemoryError("out of memory")

    monkeypatch.setattr(model, "make_train_function", lambda: setattr(model, "train_function", fails))
    with pytest.raises(MemoryError, match="out of memory"):
        model.fit(x, y, batch_size=4, verbose=0)
