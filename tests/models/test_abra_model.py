import collections
import json

import keras
import numpy as np
import pandas as pd
import pytest

from keras_abra import ABRAModel, NonFiniteLossError, fit_arguments
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace, CosFace, DistributionAlignment
from tests.tiny import CLASSES, mixed, tiny_backbone, tiny_batch, tiny_model

TRAINING_LOGS = ["accuracy", "alignment", "clean_loss", "gain", "loss", "perturbed_loss"]


def compiled(*args, optimizer="adam", compile_arguments=None, **kwargs):
    """Runs eagerly unless told otherwise: most of these tests would spend their time compiling."""
    model = tiny_model(*args, **kwargs)
    model.compile(optimizer=optimizer, metrics=["accuracy"], **(compile_arguments or {"run_eagerly": True}))
    return model


def values(model):
    return [keras.ops.convert_to_numpy(v) for v in model.variables]


def fit(model, samples=16, **kwargs):
    x, y = tiny_batch(samples)
    return model.fit(x, y, **{"batch_size": 8, "verbose": 0, "shuffle": False, **kwargs}).history


# The surface.


def test_fit_logs_both_branches_and_validates_on_the_plain_network():
    history = fit(compiled(), validation_data=tiny_batch(12), epochs=2)
    assert sorted(history) == sorted([*TRAINING_LOGS, "val_accuracy", "val_loss"])
    assert all(np.isfinite(v).all() and len(v) == 2 for v in history.values())


def test_without_stages_it_is_one_branch_with_a_margin():
    history = fit(compiled(perturb_after=()))
    assert sorted(history) == ["accuracy", "clean_loss", "loss"]


def test_predict_is_scale_times_cosine_and_embed_has_length_one():
    model, (x, _) = tiny_model(), tiny_batch()
    logits, embeddings = model.predict(x, verbose=0), model.embed(x["image"], verbose=0)
    assert logits.shape == (8, CLASSES) and logits.dtype == "float32"
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    kernel = keras.ops.convert_to_numpy(model.head.kernel)
    np.testing.assert_allclose(logits, 4 * embeddings @ (kernel / np.linalg.norm(kernel, axis=0)), rtol=1e-4, atol=1e-5)


def test_evaluate_is_the_cross_entropy_without_margin():
    model, (x, y) = compiled(), tiny_batch(12)
    logits = model.predict(x["image"], verbose=0).astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss, accuracy = model.evaluate(x["image"], y, batch_size=5, verbose=0)
    assert loss == pytest.approx(-log_p[np.arange(12), y].mean(), rel=1e-4)
    assert accuracy == pytest.approx((logits.argmax(1) == y).mean())


def test_images_alone_and_the_dict_mean_the_same_to_inference():
    model, (x, _) = tiny_model("domain"), tiny_batch()
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.predict(x["image"], verbose=0))


def test_the_head_learns():
    history = fit(compiled(optimizer=keras.optimizers.Adam(0.02), compile_arguments={"jit_compile": "auto"}), epochs=45)
    assert history["clean_loss"][-1] < 0.6 * history["clean_loss"][0]


def test_a_vector_backbone_needs_no_pooling_and_no_neck():
    backbone = tiny_backbone()
    flat = keras.Model(backbone.inputs, keras.layers.GlobalMaxPooling2D()(backbone.outputs[0]))
    model = compiled(backbone=flat, embedding_dim=None)
    assert sorted(fit(model)) == TRAINING_LOGS
    assert model.embed(tiny_batch()[0], verbose=0).shape == (8, 4)


@pytest.mark.parametrize("kind", ["jensen_shannon", "coral", "mmd"])
def test_every_alignment_trains(kind):
    history = fit(compiled(alignment=DistributionAlignment(kind, two_sided=True), loss=CosFace(0.2, 8.0)))
    assert history["alignment"][0] > 0


def test_two_calls_of_fit_with_one_seed_are_equal():
    first, second = compiled("low_rank"), compiled("low_rank")
    fit(first), fit(second)
    for a, b in zip(values(first), values(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# What every Keras model can.


@pytest.mark.parametrize("structure", ["diagonal", "domain"])
def test_save_load_predict_is_equal_and_training_goes_on(tmp_path, structure):
    model = compiled(structure, class_names=list("abcde"), warmup=3)
    fit(model)
    model.save(tmp_path / "abra.keras")
    again = keras.models.load_model(tmp_path / "abra.keras")
    x, _ = tiny_batch()
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    np.testing.assert_array_equal(again.embed(x, verbose=0), model.embed(x, verbose=0))
    ours, theirs = ({k: v for k, v in m.get_config().items() if k != "backbone"} for m in (model, again))
    assert ours == theirs and again.class_names == list("abcde")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(again.ramp.progress), [2, 3])
    assert int(again.optimizer.iterations) == 2
    assert np.isfinite(fit(again)["loss"]).all()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(again.ramp.progress), [4, 3])


def test_auxiliary_normalizations_are_trained_saved_and_no_part_of_inference(tmp_path):
    model = compiled(perturbed_norms="auxiliary")
    fit(model)
    scales = [keras.ops.convert_to_numpy(norm.gamma) for norm in model.auxiliary_norms]
    assert len(scales) == 4 and all(np.abs(scale - 1).max() > 0 for scale in scales)  # inner, last, two of the neck
    model.save(tmp_path / "abra.keras")
    again = keras.models.load_model(tmp_path / "abra.keras")
    for norm, scale in zip(again.auxiliary_norms, scales, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(norm.gamma), scale)
        norm.gamma.assign(norm.gamma + 1)
    x, _ = tiny_batch()
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def test_weights_go_from_one_model_to_another(tmp_path):
    model, other = tiny_model(), tiny_model()
    other.head.kernel.assign(other.head.kernel + 1)
    model.save_weights(tmp_path / "abra.weights.h5")
    other.load_weights(tmp_path / "abra.weights.h5")
    x, _ = tiny_batch()
    np.testing.assert_array_equal(model.predict(x, verbose=0), other.predict(x, verbose=0))


def test_class_weights_are_sample_weights():
    weight = {c: 0.5 + c for c in range(CLASSES)}
    by_class, by_sample = compiled(), compiled()
    x, y = tiny_batch(16)
    fit(by_class, class_weight=weight)
    fit(by_sample, sample_weight=np.array([weight[c] for c in y], "float32"))
    for a, b in zip(values(by_class), values(by_sample), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_without_weight_teaches_nothing():
    model = compiled(optimizer=keras.optimizers.SGD(0.1), backbone=tiny_backbone(regularizer=0))
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    fit(model, sample_weight=np.zeros(16, "float32"))
    for b, v in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(v), b)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.01, clipnorm=0.1),
        lambda: keras.optimizers.SGD(0.01, global_clipnorm=0.1),
        lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_overwrite_frequency=2),
        lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10), momentum=0.9, nesterov=True),
    ],
)
def test_optimizers_with_clipping_averages_and_schedules(optimizer):
    assert np.isfinite(fit(compiled(optimizer=optimizer()))["loss"][0])


def test_accumulated_gradients_count_as_one_step_of_the_ramp():
    model = compiled(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), warmup=5)
    fit(model, samples=32)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [2, 5])


def test_frozen_layers_stay():
    backbone = tiny_backbone()
    for layer in cut_before_stem(backbone):
        layer.trainable = False
    model = compiled(backbone=backbone)
    before = [
        keras.ops.convert_to_numpy(w)
        for layer in cut_before_stem(backbone)
        for w in layer.weights
        if "seed" not in w.path
    ]
    fit(model)
    after = [
        keras.ops.convert_to_numpy(w)
        for layer in cut_before_stem(backbone)
        for w in layer.weights
        if "seed" not in w.path
    ]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def cut_before_stem(backbone):
    names = [layer.name for layer in backbone.layers]
    return backbone.layers[: names.index("stem") + 1]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled("low_rank", 2, ("stem", "stage1"))
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scaled == (policy == "mixed_float16")
        history = fit(model, epochs=3)
        assert np.isfinite(history["loss"]).all()
        assert model.predict(tiny_batch()[0], verbose=0).dtype == "float32"
        taken = keras.ops.convert_to_numpy(model.ramp.progress)[0]
        assert 0 < taken <= 6 and taken == int(model.optimizer.iterations)
        model.save(tmp_path / "mixed.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    again = keras.models.load_model(tmp_path / "mixed.keras")
    assert again.neck.layers[1].dtype_policy.name == policy
    x, _ = tiny_batch()
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile builds C++ on the machine")
def test_compiled_by_xla_it_gives_the_same():
    # XLA draws other random numbers than TensorFlow, so what is compared does not depend on them.
    models = [
        compiled(compile_arguments=arguments, backbone=tiny_backbone(dropout=0.0))
        for arguments in ({"jit_compile": True}, None)
    ]
    histories = [fit(model, samples=8) for model in models]
    np.testing.assert_allclose(*(h["clean_loss"] for h in histories), rtol=1e-4)
    assert all(np.isfinite(h["loss"]).all() for h in histories)


def test_data_sets_generators_and_py_datasets():
    import tensorflow as tf

    x, y = tiny_batch(16)
    expected = fit(compiled("domain"))["loss"]
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {k: v[8 * i : 8 * i + 8] for k, v in x.items()}, y[8 * i : 8 * i + 8]

    for data in (dataset, Batches(), (Batches()[i] for i in range(2))):
        model = compiled("domain")
        history = model.fit(data, steps_per_epoch=2, verbose=0, shuffle=False)
        np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-5)


# The ramp.


def test_a_share_of_the_steps_is_the_length_of_the_ramp_and_is_kept():
    model = compiled(warmup=0.25, perturb_after=())
    fit(model, epochs=4)  # 8 steps
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [8, 2])
    fit(model, epochs=6)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [20, 2])


def test_a_fit_that_took_no_step_leaves_no_ramp():
    def broken():
        raise OSError("no such file")
        yield

    model = compiled(warmup=0.25, perturb_after=())
    with pytest.raises(Exception, match="no such file"):
        model.fit(broken(), steps_per_epoch=4, epochs=1, verbose=0)
    fit(model, epochs=4)  # 8 steps
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [8, 2])


def test_a_share_is_of_the_epochs_that_are_run():
    model = compiled(warmup=0.5)
    x, y = tiny_batch(16)
    model.fit(x, y, batch_size=8, initial_epoch=3, epochs=5, verbose=0)
    assert keras.ops.convert_to_numpy(model.ramp.progress)[1] == 2  # of 4 steps


def test_the_first_step_of_the_ramp_has_no_margin():
    steep, flat = compiled(warmup=10, loss=ArcFace(1.2, 4.0)), compiled(warmup=0, loss=ArcFace(0.0, 4.0))
    x, y = tiny_batch()
    a, b = (m.train_on_batch(x, y, return_dict=True)["clean_loss"] for m in (steep, flat))
    assert float(a) == pytest.approx(float(b), rel=1e-5)


def test_the_adversary_raises_the_loss_more_than_chance():
    def gain(steps):
        model = compiled(steps=steps, layer={"radius": 0.5}, backbone=tiny_backbone(dropout=0.0))
        x, y = tiny_batch(32)
        return np.mean([float(model.train_on_batch(x, y, return_dict=True)["gain"]) for _ in range(3)])

    assert gain(3) > gain(1) > gain(0)


def test_data_without_length_needs_a_number_of_steps():
    x, y = tiny_batch()
    with pytest.raises(ValueError, match="this data does not tell its length"):
        compiled(warmup=0.1).fit((x, y) for _ in range(2))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch")
def test_a_loader_of_a_stream_has_no_length():
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            x, y = tiny_batch()
            yield from zip(x["image"], y, strict=True)

    with pytest.raises(ValueError, match="this data does not tell its length"):
        compiled(warmup=0.1).fit(DataLoader(Stream(), batch_size=4), verbose=0)
    history = compiled(warmup=0.0).fit(DataLoader(Stream(), batch_size=4), verbose=0).history
    assert np.isfinite(history["loss"]).all()


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perturb_after": ["stm"]}, "no such layer.*Valid here"),
        ({"perturb_after": "stem"}, "must be a list"),
        ({"perturb_after": [["stem"]]}, "must be a list of layer names"),
        ({"embedding_dim": 0}, "`embedding_dim` must be a positive integer"),
        ({"perturbed_weight": -1}, "`perturbed_weight` must be"),
        ({"perturbed_norms": "batch"}, "`perturbed_norms` must be one of"),
        ({"warmup": 1.5}, "`warmup` must be"),
        ({"warmup": -3}, "`warmup` must be"),
        ({"class_names": ["a"]}, "must name each of the 5 classes"),
        ({"loss": "arcface"}, "`loss` must be"),
        ({"alignment": 1.0}, "`alignment` must be"),
        ({"loss": ArcFace(reduction="sum")}, "takes the mean over samples. Received: `loss` with reduction='sum'"),
        ({"alignment": DistributionAlignment(reduction="none")}, "mean over samples. Received: `alignment`"),
        ({"uncertainty": FeatureStatisticsUncertainty(radius=None)}, "needs a radius"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ABRAModel(**{"backbone": tiny_backbone(), "num_classes": CLASSES, **arguments})


def test_a_loss_in_compile_is_sent_to_the_model():
    with pytest.raises(ValueError, match="The loss belongs to the model"):
        tiny_model().compile("adam", loss="sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="weights of the losses are arguments of the model.*0.5"):
        tiny_model().compile("adam", loss_weights=[0.5])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 8, 8), "float32"), r"must have the backbone's shape .*\(None, 8, 8, 2\). Received: \(4, 8, 8\)"),
        (np.zeros((4, 8, 8, 3), "float32"), r"Received: \(4, 8, 8, 3\)"),
        (np.zeros((4, 9, 8, 2), "float32"), r"Received: \(4, 9, 8, 2\)"),
        (np.zeros((4, 8, 8, 2), "int32"), "must be float .* or uint8. Received: dtype int32"),
        ({"picture": np.zeros((4, 8, 8, 2), "float32")}, "needs the key 'image'"),
        ([np.zeros((4, 8, 8, 2), "float32")], "Expected images, .* Received: <class 'list'>"),
    ],
)
def test_bad_images_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(image)


def test_labels_out_of_range_are_named_before_the_first_step():
    x, y = tiny_batch(16)
    y[3] = CLASSES
    with pytest.raises(ValueError, match=r"Every label must be an integer in \[0, 5\). Received: 5 for sample 3"):
        compiled().fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"Every label must be an integer in \[0, 5\). Received: 5 for sample 3"):
        compiled().evaluate(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"shape \(16, 6\)"):
        compiled().fit(x, np.eye(6)[y % 5], verbose=0)


def test_labels_out_of_range_in_a_pipeline_stop_it_with_a_plain_error():
    import tensorflow as tf

    x, y = tiny_batch(16)
    y[11] = -1
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    with pytest.raises(ValueError, match=r"Every label must be an integer in \[0, 5\). Received: -1"):
        compiled().fit(dataset, verbose=0)


def test_experiment_ids_out_of_range_are_named():
    x, y = tiny_batch(16)
    x["experiment"][2] = 3
    with pytest.raises(
        ValueError, match=r"Every experiment id must be an integer in \[0, 3\). Received: 3 for sample 2"
    ):
        compiled("domain").fit(x, y, verbose=0)


def test_batches_of_one_sample_are_refused():
    with pytest.raises(ValueError, match="A training batch of one sample.*17 samples in batches of 8"):
        fit(compiled(), samples=17)


def test_batches_of_one_sample_in_a_pipeline_are_refused():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(tiny_batch(9)).batch(8)
    with pytest.raises(ValueError, match="A training batch of one sample"):
        compiled().fit(dataset, verbose=0)


def test_domain_structure_needs_experiment_ids():
    x, y = tiny_batch(16)
    with pytest.raises(ValueError, match="needs experiment ids in training"):
        compiled("domain").fit(x["image"], y, verbose=0)


def test_a_loss_that_is_not_finite_stops_at_its_epoch_and_step():
    x, y = tiny_batch(24)
    x["image"][17] = np.nan
    with pytest.raises(NonFiniteLossError, match="became nan in epoch 0, step 2") as caught:
        compiled().fit(x, y, batch_size=8, verbose=0, shuffle=False)
    assert (caught.value.epoch, caught.value.step) == (0, 2)


def test_a_batch_of_one_sample_is_refused_wherever_it_comes_from():
    x, y = tiny_batch(9)
    with pytest.raises(ValueError, match="A training batch of one sample"):
        compiled().train_on_batch(x["image"][:1], y[:1])
    batches = [(x["image"][:8], y[:8]), (x["image"][8:], y[8:])]
    with pytest.raises(ValueError, match="A training batch of one sample"):
        compiled(warmup=0).fit((batch for batch in batches), steps_per_epoch=2, verbose=0)


def test_samples_are_counted_as_keras_splits_them():
    from keras.src.trainers.data_adapters.array_slicing import train_validation_split

    for samples in (10, 25, 90, 1000):
        for split in (0.07, 0.3, 0.33, 0.8):
            y = np.zeros(samples)
            (kept,), _ = train_validation_split((y,), validation_split=split)
            assert fit_arguments._samples({"y": y, "validation_split": split}) == len(kept)


def test_a_last_batch_of_one_that_is_not_reached_does_not_count():
    assert np.isfinite(fit(compiled(), samples=9, steps_per_epoch=1)["loss"]).all()


def test_labels_may_be_shares_of_classes():
    """CutMix and mixup give them; rows with a single 1 are what class numbers are."""
    import tensorflow as tf

    x, y = tiny_batch(16)
    found = []
    for labels in (y, np.eye(CLASSES)[y], mixed(y)):
        model = compiled()
        history = model.fit(x, labels, batch_size=8, shuffle=False, validation_data=(x, labels), verbose=0).history
        data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(8)
        again = compiled()
        streamed = again.fit(data, shuffle=False, validation_data=data, verbose=0).history
        found.append({name: history[name][0] for name in history})
        assert {name: streamed[name][0] for name in streamed} == pytest.approx(found[-1], rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[2]["clean_loss"] != pytest.approx(found[0]["clean_loss"], rel=1e-3)
    np.testing.assert_allclose(
        found[2]["val_loss"],
        keras.losses.CategoricalCrossentropy(from_logits=True)(labels, model.predict(x["image"], verbose=0)),
        rtol=1e-4,
    )


def test_labels_may_be_a_pandas_table():
    x, y = tiny_batch(16)
    rows = pd.get_dummies(pd.Categorical(y, range(CLASSES)))
    model = compiled(warmup=0.5)
    found = model.fit(x["image"], rows, batch_size=4, epochs=2, verbose=0, validation_data=(x["image"], rows)).history
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [8, 4])
    assert np.isfinite(found["val_loss"]).all()
    with pytest.raises(ValueError, match="Received: the least 0, the sum 2 for sample 0 and 15 more"):
        compiled().fit(x["image"], 2 * rows, verbose=0)


def test_labels_of_a_pipeline_without_a_shape_are_named():
    import tensorflow as tf

    x, y = tiny_batch(16)
    data = tf.data.Dataset.from_tensor_slices((x["image"], y)).batch(8)
    shapeless = data.map(lambda image, label: (image, tf.py_function(lambda v: v, [label], tf.int32)))
    with pytest.raises(ValueError, match="The labels of the pipeline have no known shape.*set_shape"):
        compiled().fit(shapeless, verbose=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: 100 * row, r"Received: the least 0\S*, the sum 100(\.0+|\.? for sample 6)"),
        (lambda row: np.roll(row, 1) * 1.5 - 0.5 * row, r"Received: the least -0\.50*, the sum 1(\.0+| for sample 6)"),
    ],
)
def test_shares_that_are_none_are_named(change, message):
    import tensorflow as tf

    x, y = tiny_batch(16)
    shares = np.eye(CLASSES, dtype="float32")[y]
    shares[6] = change(shares[6])
    with pytest.raises(ValueError, match=message):
        compiled().fit(x, shares, verbose=0)
    with pytest.raises(ValueError, match=message):
        compiled().train_on_batch(x, shares)
    with pytest.raises(ValueError, match=message):
        compiled().fit(tf.data.Dataset.from_tensor_slices((x, shares)).batch(8), verbose=0)


def test_labels_that_are_none_or_of_other_classes_are_named():
    import tensorflow as tf

    x, y = tiny_batch(16)
    others = np.eye(CLASSES + 1, dtype="float32")[y]
    message = r"Every sample needs one integer label.*the share of each class.*shape \(\w+, 6\)"
    with pytest.raises(ValueError, match=message):
        compiled().train_on_batch(x["image"][:8], others[:8])
    with pytest.raises(ValueError, match=message):
        compiled().train_on_batch(x["image"][:8], keras.ops.convert_to_tensor(others[:8]))
    with pytest.raises(ValueError, match=message):
        compiled().fit(tf.data.Dataset.from_tensor_slices((x, others)).batch(8), verbose=0)
    for data in (x["image"], tf.data.Dataset.from_tensor_slices(x["image"]).batch(8)):
        with pytest.raises(ValueError, match="Every sample needs one integer label.*no labels"):
            compiled().fit(data, verbose=0)
    with pytest.raises(ValueError, match="Every label must be an integer"):
        compiled().fit(x["image"], np.array(["s1"] * 16), verbose=0)


def test_fit_before_compile_says_so():
    with pytest.raises(ValueError, match="compile"):
        tiny_model().fit(*tiny_batch(), verbose=0)


def test_a_frozen_model_trains_nothing_and_does_not_fail():
    model = tiny_model()
    model.trainable = False
    model.compile("adam", run_eagerly=True)
    before = keras.ops.convert_to_numpy(model.head.kernel)
    assert np.isfinite(fit(model)["loss"]).all()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.head.kernel), before)


@pytest.mark.parametrize("frozen", ["neck", "head", "dense", "stage"])
def test_what_is_frozen_beside_the_backbone_stays_so_when_it_is_saved(frozen, tmp_path):
    model = tiny_model(steps=0, layer={"learned_scale": True})
    layers = {"neck": model.neck, "head": model.head, "dense": model.neck.layers[1], "stage": model.stages[0]}
    every = len(model.trainable_variables)
    layers[frozen].trainable = False
    model.compile("adam", run_eagerly=True)
    fit(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    names = [[v.path for v in m.trainable_variables] for m in (model, again)]
    assert names[0] == names[1] and len(names[0]) < every
    assert int(again.optimizer.iterations) == int(model.optimizer.iterations) > 0


def test_numbers_may_be_those_of_numpy():
    model = ABRAModel(
        tiny_backbone(),
        np.int64(CLASSES),
        ["stem"],
        embedding_dim=np.int64(6),
        uncertainty=FeatureStatisticsUncertainty(
            "domain", radius=np.float32(0.5), num_experiments=np.int32(3), seed=np.int64(2)
        ),
        perturbed_weight=np.float32(0.5),
        warmup=np.int64(3),
    )
    assert json.loads(json.dumps(model.uncertainty.get_config()))["radius"] == 0.5
    again = ABRAModel.from_config(json.loads(json.dumps(model.get_config())))
    assert (again.num_classes, again.embedding_dim, again.warmup) == (CLASSES, 6, 3)
    for wrong in (True, np.bool_(True), np.float64(1.0)):
        with pytest.raises(ValueError, match="`steps` must be an integer of at least 0"):
            FeatureStatisticsUncertainty(steps=wrong)


@pytest.mark.parametrize(
    "metric",
    [
        "SparseCategoricalCrossentropy",
        "ce",
        keras.losses.categorical_crossentropy,
        keras.metrics.SparseCategoricalCrossentropy(),
        keras.metrics.CategoricalCrossentropy(),
        keras.losses.SparseCategoricalCrossentropy(),
        keras.metrics.KLDivergence(),
        keras.metrics.SparseCategoricalCrossentropy,
        "bce",
        keras.metrics.AUC(name="auce"),
        "AUC",
        "auc",
        keras.metrics.AUC,
    ],
)
def test_metrics_of_probabilities_are_refused(metric):
    with pytest.raises(
        ValueError, match="(?i)(rossentropy|ce|auc)' takes probabilities, and ABRAModel predicts logits"
    ):
        tiny_model().compile("sgd", metrics=[metric])

    def crossentropy(y_true, y_pred):
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    own = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
    tiny_model().compile("sgd", metrics=["accuracy", own, crossentropy, keras.metrics.AUC(from_logits=True)])


def test_a_loss_that_fit_would_not_take_is_pointed_out():
    class Own(ABRAModel):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + 1.0

    model = Own(tiny_model().backbone, 5, embedding_dim=4)
    with pytest.warns(UserWarning, match="Own has a `compute_loss` of its own: `evaluate` takes it and `fit` does not"):
        model.compile("sgd")


def test_labels_and_ids_that_are_fractions_are_named():
    import tensorflow as tf

    x, y = tiny_batch(16)
    model = compiled("domain")
    for name, inputs, labels in (
        ("label", x, y + 0.5),
        ("label", x, np.where(y > 3, np.nan, y)),
        ("experiment id", {**x, "experiment": 0.5 * x["experiment"]}, y),
    ):
        message = rf"Every {name} must be an integer in \[0, \d\). Received: (\d\.5|nan)"
        with pytest.raises(ValueError, match=message):
            model.fit(inputs, labels, verbose=0)
        with pytest.raises(ValueError, match=message):
            model.fit(tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8), verbose=0)


def test_tokens_are_pooled_and_other_shapes_refused():
    image = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 2, strides=2, name="patches")(image)
    tokens = keras.Model(image, keras.layers.Reshape((16, 4))(x))
    model = compiled(backbone=tokens, perturb_after=["patches"])
    assert np.isfinite(fit(model)["loss"]).all()
    with pytest.raises(ValueError, match="must have rank 2, 3 or 4"):
        ABRAModel(keras.Model(image, keras.layers.Reshape((4, 4, 4, 1))(x)), CLASSES)


def test_export_is_the_plain_network(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("a SavedModel is read back by TensorFlow")
    import tensorflow as tf

    model, (x, _) = compiled(), tiny_batch()
    fit(model)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(x["image"]), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)

    pooled = keras.layers.GlobalAveragePooling2D()(model.backbone.output)
    plain = keras.Model(model.backbone.input, model.head(model.neck(pooled)) * model.loss_function.scale)
    plain.export(tmp_path / "plain", verbose=False)
    assert sum(operations(tmp_path / "plain").values()) > 20
    assert operations(tmp_path / "exported") == operations(tmp_path / "plain")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is read back by TensorFlow")
@pytest.mark.parametrize("policy, dtype", [("mixed_float16", "float32"), ("float32", "uint8")])
def test_export_takes_images_of_the_backbones_type(tmp_path, policy, dtype):
    import tensorflow as tf

    keras.config.set_dtype_policy(policy)
    try:
        image = keras.Input((8, 8, 2), dtype=dtype)
        x = keras.layers.Conv2D(4, 3, name="stem")(keras.layers.Rescaling(1 / 255)(image))
        model = ABRAModel(keras.Model(image, x), CLASSES, embedding_dim=6)
        model.export(tmp_path / "exported", verbose=False)
        x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 2)).astype(dtype)
        served = tf.saved_model.load(tmp_path / "exported")
        np.testing.assert_allclose(served.serve(x), model.predict(x, verbose=0), rtol=2e-2, atol=2e-2)
    finally:
        keras.config.set_dtype_policy("float32")


def test_all_parts_have_the_models_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = ABRAModel(tiny_backbone(), CLASSES, embedding_dim=6, dtype="float32")
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.dtype_policy.name for layer in (model.head, model.pooling, *model.neck.layers)} == {"float32"}


class Quiet(FeatureStatisticsUncertainty):
    """An uncertainty of one's own, that moves nothing."""

    def draw(self, uncertain, batch):
        return 0.0 * super().draw(uncertain, batch)


def test_an_uncertainty_of_ones_own_is_the_one_of_the_stages():
    model = ABRAModel(tiny_backbone(dropout=0.0), CLASSES, ["stem"], 6, Quiet(), warmup=0)
    model.compile("sgd", run_eagerly=True)
    logs = fit(model, epochs=1)
    assert logs["gain"] == pytest.approx([0.0], abs=1e-6) and logs["clean_loss"][0] > 0


def operations(folder):
    """How often each kind of operation that computes stands in an exported model's functions."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    functions = saved.meta_graphs[0].graph_def.library.function
    kinds = collections.Counter(node.op for function in functions for node in function.node_def)
    # of variables that are saved with the model
    stored = {"Identity", "DisableCopyOnRead", "Const", "NoOp", "AssignVariableOp", "ReadVariableOp"}
    return {kind: count for kind, count in kinds.items() if kind not in stored}


def test_what_is_thawed_before_compile_thaws_in_the_perturbed_branch_too():
    backbone = tiny_backbone()
    backbone.trainable = False
    model = tiny_model(backbone=backbone, perturbed_norms="auxiliary")
    assert [norm.trainable for norm in model.auxiliary_norms] == [False, False, True, True]
    model.backbone.trainable = True
    model.compile("adam")
    assert all(norm.trainable for norm in model.auxiliary_norms)
    fit(model)
    assert all(np.abs(keras.ops.convert_to_numpy(norm.gamma) - 1).max() > 0 for norm in model.auxiliary_norms)


def test_without_stages_there_are_no_normalizations_to_keep_apart():
    assert compiled(perturb_after=(), perturbed_norms="auxiliary").auxiliary_norms == []


@keras.saving.register_keras_serializable("test_abra_model")
class OwnNorm(keras.layers.BatchNormalization):
    def __init__(self, note="", **kwargs):
        super().__init__(**kwargs)
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}


def test_a_normalization_of_ones_own_has_a_twin_of_its_kind():
    image = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 3, padding="same", name="stem")(image)
    x = OwnNorm(note="mine")(keras.layers.Conv2D(4, 3)(x))
    model = compiled(backbone=keras.Model(image, x), perturbed_norms="auxiliary", embedding_dim=None)
    (norm,) = model.auxiliary_norms
    assert type(norm) is OwnNorm and norm.note == "mine"
    assert np.isfinite(fit(model)["loss"]).all()


def test_the_noise_of_stages_and_steps_is_independent():
    stages = tiny_model(perturb_after=("stem", "stage1")).stages
    draws = [
        [keras.ops.convert_to_numpy(keras.random.normal((4,), seed=generator)).tolist() for _ in range(5)]
        for stage in stages
        for generator in (stage.seed_generator, stage.noise_generator)
    ]
    assert len({tuple(draw) for stream in draws for draw in stream}) == 20


def test_a_ramp_that_is_known_needs_no_length():
    model = compiled(warmup=0.5)
    fit(model)
    x, y = tiny_batch()
    model.fit(((x, y) for _ in range(2)), verbose=0)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [4, 1])


def test_the_single_sample_that_a_later_epoch_meets_is_refused():
    with pytest.raises(ValueError, match="9 samples in batches of 8, which leaves one alone"):
        fit(compiled(), samples=9, steps_per_epoch=1, epochs=2)


def test_of_several_processes_each_may_have_one_sample(monkeypatch):
    model, (x, y) = compiled(), tiny_batch(9)
    arguments = fit_arguments.bind(keras.Model.fit, (model, x, y), {"batch_size": 8})
    with pytest.raises(ValueError, match="leaves one alone"):
        fit_arguments.check(model, dict(arguments))
    monkeypatch.setattr(fit_arguments.backend, "replicas", lambda: 2)
    fit_arguments.check(model, dict(arguments))


@pytest.mark.parametrize("metrics", [["accuracy", keras.metrics.Mean(name="gain")], ["alignment"]])
def test_a_metric_with_the_name_of_a_log_is_refused(metrics):
    with pytest.raises(ValueError, match="A metric may not be called '(gain|alignment)'"):
        tiny_model().compile("adam", metrics=metrics)


def test_evaluation_of_a_dict_without_labels_says_so():
    x, _ = tiny_batch()
    with pytest.raises(ValueError, match="Every sample needs one integer label.*no labels"):
        compiled().evaluate(x, verbose=0)


def test_fractions_for_a_backbone_of_integers_are_refused():
    image = keras.Input((8, 8, 2), dtype="uint8")
    x = keras.layers.Conv2D(4, 3, name="stem")(keras.layers.Rescaling(1 / 255)(image))
    model = tiny_model(backbone=keras.Model(image, keras.layers.Conv2D(4, 3)(x)))
    assert model(np.full((2, 8, 8, 2), 200, "uint8")).shape == (2, CLASSES)
    with pytest.raises(ValueError, match="takes grey levels as integers, and would cut off fractions"):
        model(np.full((2, 8, 8, 2), 0.5, "float32"))


def test_steps_taken_by_hand_are_no_part_of_the_ramp():
    model = compiled(warmup=0.5)
    for _ in range(2):
        model.train_on_batch(*tiny_batch())
    fit(model, epochs=2)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.ramp.progress), [4, 2])


def test_no_samples_are_named():
    import tensorflow as tf

    model, (x, y) = compiled(), tiny_batch(12)
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match="There are no samples. Received: 0"):
            call(x["image"][:0], y[:0])
        with pytest.raises(ValueError, match="There are no samples: the data pipeline is empty"):
            call(tf.data.Dataset.from_tensor_slices((x["image"], y)).batch(4).take(0))
    with pytest.raises(ValueError, match="no samples. Received: 1, of which validation_split=0.5 leaves none"):
        model.fit(x["image"][:1], y[:1], validation_split=0.5)


def test_what_a_pipeline_cannot_be_trained_on_is_named():
    import tensorflow as tf

    model, (x, y) = compiled(), tiny_batch(8)
    words = tf.data.Dataset.from_tensor_slices((x["image"], y.astype(str))).batch(4)
    with pytest.raises(ValueError, match="Every label must be an integer in .* Received: values of type string"):
        model.fit(words, verbose=0)
    shapeless = tf.TensorSpec(None, "float32")
    for image in (lambda image: image, lambda image: {"image": image}):
        signature = (image(shapeless), tf.TensorSpec([None], "int32"))
        data = tf.data.Dataset.from_generator(
            lambda image=image: iter([(image(x["image"]), y)]), output_signature=signature
        ).apply(tf.data.experimental.assert_cardinality(1))
        if keras.backend.backend() == "tensorflow":
            with pytest.raises(ValueError, match="images of the pipeline have no known shape.*images.set_shape"):
                model.fit(data, verbose=0)
        else:
            assert np.isfinite(model.fit(data, verbose=0).history["loss"]).all()


def test_one_batch_to_test_on_is_looked_at_too():
    model, (x, y) = compiled(), tiny_batch()
    with pytest.raises(ValueError, match="Every label must be an integer in"):
        model.test_on_batch(x["image"], y + CLASSES)
    assert np.isfinite(model.test_on_batch(x["image"], y)).all()


def test_a_metric_may_not_be_called_as_what_is_hidden():
    with pytest.raises(ValueError, match="A metric may not be called 'skipped'"):
        tiny_model().compile("sgd", metrics=[keras.metrics.SparseCategoricalAccuracy(name="skipped")])
