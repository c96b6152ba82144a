import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tfrecords.build import build_records
from tfrecords.composition import batches_across, batches_with_controls, batches_within
from tfrecords.listing import list_sites
from tfrecords.manifest import read_manifest
from tfrecords.order import site_ids_of_step
from tfrecords.preprocess import standardize
from tfrecords.read import read_records

BOTH = ("treatment", "control")


def names(metadata):
    return [site_id.decode() for site_id in metadata["site_id"].numpy()]


def test_what_was_written_is_read_back_equal(records_tree, pixels_of):
    for split in ("train", "id_test", "val", "test"):
        sites = list_sites(records_tree, split, BOTH).set_index("site_id")
        read = []
        for images, labels, metadata in read_records(records_tree, split, batch_size=3, kinds=BOTH, metadata=True):
            expected = standardize(np.stack([pixels_of(name) for name in names(metadata)]))
            np.testing.assert_allclose(images, expected, atol=1e-5)
            rows = sites.loc[names(metadata)]
            np.testing.assert_array_equal(labels, rows["label"])
            for key in ("well_id", "well", "well_type", "experiment", "cell_type"):
                assert [value.decode() for value in metadata[key].numpy()] == rows[key].tolist()
            for key in ("plate", "site"):
                assert metadata[key].numpy().tolist() == rows[key].tolist()
            read += names(metadata)
        assert read == sites.index.tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_normalization_the_images_are_the_grey_levels(records_tree, pixels_of, batch_size, dtype):
    options = dict(batch_size=batch_size, kinds=BOTH, metadata=True, normalize=None, dtype=dtype)
    for images, _, metadata in read_records(records_tree, "train", **options):
        expected = np.stack([pixels_of(name) for name in names(metadata)])
        assert images.dtype == dtype and expected.max() > 1
        np.testing.assert_array_equal(tf.cast(images, tf.float32), expected)


def test_shapes_and_length_are_known_beforehand(records_tree):
    even = read_records(records_tree, "train", batch_size=2)
    assert even.element_spec[0].shape == (2, 8, 8, 6) and even.element_spec[0].dtype == tf.float32
    assert even.element_spec[1].shape == (2,) and even.element_spec[1].dtype == tf.int32
    assert even.cardinality() == 2
    uneven = read_records(records_tree, "train", batch_size=3)
    assert uneven.element_spec[0].shape == (None, 8, 8, 6) and uneven.cardinality() == 2
    assert [len(labels) for _, labels in uneven] == [3, 1]
    dropped = read_records(records_tree, "train", batch_size=3, training=True)
    assert dropped.element_spec[0].shape == (3, 8, 8, 6) and dropped.cardinality() == 1


def test_experiments_are_numbered_over_the_training_experiments(records_tree):
    train = read_manifest(records_tree)["experiments"]["train"]
    data = read_records(records_tree, "train", batch_size=4, kinds=BOTH, experiment_ids=True, metadata=True)
    for inputs, _, metadata in data:
        assert inputs["image"].shape == (4, 8, 8, 6) and inputs["experiment"].dtype == tf.int32
        assert [train[i] for i in inputs["experiment"].numpy()] == [x.decode() for x in metadata["experiment"].numpy()]
    with pytest.raises(ValueError, match="experiment 'HUVEC-17' of the split 'val' is not among the training"):
        read_records(records_tree, "val", batch_size=4, experiment_ids=True)


def read_epoch(data):
    return [names(metadata) for *_, metadata in data]


def test_each_pass_has_the_order_of_its_seed_and_epoch_and_can_be_named(records_tree):
    options = dict(batch_size=3, kinds=BOTH, seed=5)
    data = read_records(records_tree, "train", training=True, metadata=True, **options)
    epochs = [read_epoch(data) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    for epoch, batches in enumerate(epochs):
        for step, batch in enumerate(batches):
            assert batch == site_ids_of_step(records_tree, "train", epoch=epoch, step=step, **options)
    resumed = read_records(records_tree, "train", training=True, metadata=True, first_epoch=2, **options)
    assert read_epoch(resumed) == epochs[2]


@pytest.mark.parametrize("worker", [(0, 1), (1, 2)])
def test_a_run_continues_inside_an_epoch_as_if_it_had_not_been_broken_off(records, worker):
    options = dict(batch_size=2, kinds=BOTH, training=True, seed=5, metadata=True, worker=worker)
    whole = list(read_records(records, "train", first_epoch=1, **options))
    rest = read_records(records, "train", first_epoch=1, first_step=1, **options)
    assert len(whole) == 4 and rest.cardinality() == 3
    early = set(names(whole[0][-1])) - {name for *_, metadata in whole[1:] for name in names(metadata)}
    sites = list_sites(records, "train", BOTH).set_index("site_id")
    for name in early:  # They are not read.
        with open(records / sites["shard"][name], "r+b") as file:
            file.seek(sites["offset"][name])
            file.write(bytes(20))
    for _ in range(2):  # A look beforehand, which may use up a short rest, and the pass itself.
        for (images, labels, metadata), (images_before, labels_before, before) in zip(rest, whole[1:], strict=True):
            np.testing.assert_array_equal(images, images_before)
            np.testing.assert_array_equal(labels, labels_before)
            assert names(metadata) == names(before)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"rest of epoch 1.*read_records\(first_epoch=2\)"):
        list(rest)


def test_fit_continues_inside_an_epoch(records_tree, recwarn):
    import keras

    class Seen(keras.callbacks.Callback):
        batches = ()

        def on_train_batch_end(self, batch, logs=None):
            self.batches += (batch,)

    options = dict(batch_size=2, kinds=BOTH, training=True, seed=5)
    inputs = keras.Input((8, 8, 6))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    initial = model.get_weights()
    model.fit(read_records(records_tree, "train", **options), epochs=3, verbose=0, shuffle=False)
    unbroken = model.get_weights()
    model.set_weights(initial)
    data = read_records(records_tree, "train", **options)
    model.fit(data, epochs=1, verbose=0, shuffle=False)
    for _, (images, labels) in zip(range(3), data, strict=False):
        model.train_on_batch(images.numpy(), labels.numpy())
    seen = Seen()
    rest = read_records(records_tree, "train", first_epoch=1, first_step=3, **options)
    model.fit(rest, initial_epoch=1, epochs=2, verbose=0, shuffle=False, callbacks=[seen])
    later = read_records(records_tree, "train", first_epoch=2, **options)
    model.fit(later, initial_epoch=2, epochs=3, verbose=0, shuffle=False, callbacks=[seen])
    assert seen.batches == (0, 0, 1, 2, 3)
    for found, expected in zip(model.get_weights(), unbroken, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not [str(warning.message) for warning in recwarn if "ran out of data" in str(warning.message)]


def test_the_order_does_not_hang_on_tensorflows_global_seed(records_tree):
    epochs = []
    for seed in (1, 2):
        tf.random.set_seed(seed)
        data = read_records(records_tree, "train", batch_size=2, training=True)
        epochs.append(np.concatenate([images for images, _ in data]))
    np.testing.assert_allclose(*epochs, atol=1e-5)


def test_a_pass_that_is_broken_off_is_not_counted(records_tree):
    data = read_records(records_tree, "train", batch_size=2, kinds=BOTH, training=True, metadata=True)
    for _ in range(3):
        assert names(next(iter(data))[-1]) == site_ids_of_step(
            records_tree, "train", batch_size=2, kinds=BOTH, epoch=0, step=0
        )


def test_augmentation_differs_between_epochs_and_can_be_left_out(records_tree, pixels_of):
    def image_of(data, site_id):
        found = {
            name: image
            for images, _, metadata in data
            for name, image in zip(names(metadata), images.numpy(), strict=True)
        }
        return found[site_id]

    site_id = list_sites(records_tree, "train")["site_id"][0]
    options = dict(batch_size=4, training=True, metadata=True)
    data = read_records(records_tree, "train", **options)
    views = [image_of(data, site_id) for _ in range(12)]
    assert 3 <= len({view.round(3).tobytes() for view in views}) <= 8
    plain = read_records(records_tree, "train", augment=None, **options)
    np.testing.assert_allclose(image_of(plain, site_id), standardize(pixels_of(site_id)[None])[0], atol=1e-5)


def test_sites_without_a_label_can_be_predicted_but_not_scored(kaggle_tree, tmp_path):
    dest = tmp_path / "records"
    build_records(kaggle_tree, dest)
    with pytest.raises(ValueError, match=r"4 of the 4 sites of the split 'val' have no label \(first: 'HUVEC-17_1_B0"):
        read_records(dest, "val", batch_size=2)
    for _, labels, metadata in read_records(dest, "val", batch_size=2, metadata=True):
        assert labels.numpy().tolist() == [-1, -1] and len(names(metadata)) == 2
    assert {
        int(label) for _, labels in read_records(dest, "val", batch_size=2, kinds="control") for label in labels
    } == {2, 3}


def test_padding_fills_the_last_batch_and_has_weight_0(records_tree):
    data = read_records(records_tree, "train", batch_size=3, kinds=BOTH, pad=True, metadata=True)
    assert data.element_spec[0].shape == (3, 8, 8, 6) and data.cardinality() == 3
    scored = []
    for images, labels, weights, metadata in data:
        assert np.isfinite(images).all() and (labels.numpy() >= 0).all() and weights.dtype == tf.float32
        scored += [name for name, weight in zip(names(metadata), weights.numpy(), strict=True) if weight]
    assert scored == list_sites(records_tree, "train", BOTH)["site_id"].tolist()
    assert weights.numpy().tolist() == [1.125, 1.125, 0]  # 9 places, 8 sites: Keras divides by places.


def test_some_experiments_are_read_alone(records_tree):
    sites = list_sites(records_tree, "train")
    name = sites["experiment"].iloc[-1]
    options = {"batch_size": 1, "experiments": [name], "kinds": "treatment"}
    read = [
        n for *_, metadata in read_records(records_tree, "train", metadata=True, **options) for n in names(metadata)
    ]
    assert read == sites[sites["experiment"] == name]["site_id"].tolist() and len(read) < len(sites)
    trained = read_records(records_tree, "train", metadata=True, training=True, **options)
    order = [n for *_, metadata in trained for n in names(metadata)]
    assert sorted(order) == sorted(read)
    steps = [site_ids_of_step(records_tree, "train", epoch=0, step=i, **options) for i in range(len(read))]
    assert order == [n for step in steps for n in step]


def test_workers_see_together_what_one_would_have_seen(records_tree):
    options = dict(batch_size=4, kinds=BOTH, training=True, seed=2, metadata=True)
    parts = [read_records(records_tree, "train", worker=(i, 2), **options) for i in range(2)]
    for epoch in range(2):
        steps = list(zip(*map(read_epoch, parts), strict=True))
        assert [first + second for first, second in steps] == [
            site_ids_of_step(records_tree, "train", batch_size=4, kinds=BOTH, seed=2, epoch=epoch, step=step)
            for step in range(2)
        ]
    padded = [
        read_records(records_tree, "train", batch_size=6, kinds=BOTH, pad=True, metadata=True, worker=(i, 3))
        for i in range(3)
    ]
    assert [data.cardinality() for data in padded] == [2, 2, 2]
    assert sum(float(tf.reduce_sum(weights)) for data in padded for *_, weights, _ in data) == 12
    assert sum(int(tf.math.count_nonzero(weights)) for data in padded for *_, weights, _ in data) == 8


def test_batches_may_come_out_of_order_but_not_mixed(records_tree):
    options = dict(batch_size=2, kinds=BOTH, training=True, metadata=True)
    strict, loose = (read_records(records_tree, "train", deterministic=flag, **options) for flag in (True, False))
    assert not loose.options().deterministic
    assert sorted(read_epoch(loose)) == sorted(read_epoch(strict))
    assert sorted(read_epoch(loose)) == sorted(read_epoch(strict))  # The second epoch.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_of_half_the_bytes(records_tree, dtype):
    whole, half = (next(iter(read_records(records_tree, "train", batch_size=4, dtype=d))) for d in ("float32", dtype))
    assert half[0].dtype == dtype
    np.testing.assert_array_equal(half[0], tf.cast(whole[0], dtype))


def test_the_order_of_steps_can_be_named_for_each_composition(records_tree):
    for batches, size in (
        (batches_within("experiment"), 3),
        (batches_within("plate"), 2),
        (batches_across(2, 2), 4),
        (batches_with_controls(1), 2),
    ):
        options = dict(batch_size=size, kinds=BOTH, seed=7, batches=batches)
        data = read_records(records_tree, "train", training=True, metadata=True, **options)
        for epoch in range(2):
            for step, batch in enumerate(read_epoch(data)):
                assert batch == site_ids_of_step(records_tree, "train", epoch=epoch, step=step, **options)


def test_controls_that_are_shown_need_no_label(release, edit_table, tmp_path):
    def without(table):
        treated = table["well_type"] != "negative_control"
        return table.assign(sirna=table["sirna"].where(treated, ""), sirna_id=table["sirna_id"].where(treated))

    edit_table(release, without)
    build_records(release, tmp_path / "records")
    options = dict(batch_size=2, kinds=BOTH, batches=batches_with_controls(1))
    assert list_sites(tmp_path / "records", "train", BOTH)["label"].isna().any()
    for _, labels, weights in read_records(tmp_path / "records", "train", training=True, **options):
        assert (labels.numpy() >= 0).all() and (weights.numpy() == 0).sum() == 1


def test_evaluate_over_padded_batches_is_exact(records_tree):
    import keras

    inputs = keras.Input((8, 8, 6))
    keras.utils.set_random_seed(0)
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model.compile("sgd", loss, weighted_metrics=[accuracy])
    options = dict(kinds=BOTH, normalize=lambda images: tf.cast(images, tf.float32) / 255)
    one = read_records(records_tree, "train", batch_size=8, **options)
    images, labels = next(iter(one))
    logits = np.asarray(model.predict(images.numpy(), verbose=0), np.float64)
    right = (logits.argmax(axis=1) == labels.numpy()).mean()
    chosen = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(8), labels.numpy()]
    found = model.evaluate(read_records(records_tree, "train", batch_size=3, pad=True, **options), return_dict=True)
    assert found["accuracy"] == pytest.approx(right, abs=1e-6)
    assert found["loss"] == pytest.approx(chosen.mean(), rel=1e-5)


def test_labels_of_another_column(release_tree, tmp_path):
    build_records(release_tree, tmp_path / "records", label="cell_type")
    for _, labels, metadata in read_records(tmp_path / "records", "train", batch_size=4, metadata=True):
        assert [["HUVEC", "RPE"][i] for i in labels.numpy()] == [x.decode() for x in metadata["cell_type"].numpy()]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "batch_size must be an integer of 1 or more; received 0"),
        (dict(batch_size=2, seed=-1), "seed must be an integer of 0 or more; received -1"),
        (dict(batch_size=2, first_epoch=0.5), "first_epoch must be an integer of 0 or more; received 0.5"),
        (dict(batch_size=2, first_step=-1), "first_step must be an integer of 0 or more; received -1"),
        (dict(batch_size=2, first_epoch=3, first_step=2), "no step 2: an epoch has 2 steps.*pass first_epoch=4"),
        (dict(batch_size=2, worker=(2, 2)), r"worker must be .* received worker=\(2, 2\) and batch_size=2"),
        (dict(batch_size=3, worker=(0, 2)), "batch_size a multiple of the latter"),
        (dict(batch_size=2, worker=1), "worker must be .number from 0, number of workers.*received worker=1 and"),
        (dict(batch_size=3, worker=(0, 3)), "workers would get unequal parts. Pass pad=True"),
        (dict(batch_size=2, dtype="uint8"), "dtype must be one of float32, bfloat16, float16; received 'uint8'"),
        (dict(batch_size=2, normalize="plate"), "normalize must be a function of images, a table"),
        (dict(batch_size=5, training=True), "has 4 sites, fewer than a batch of 5.* Lower batch_size to 4"),
    ],
)
def test_options_that_cannot_be_are_refused(records_tree, options, message):
    with pytest.raises(ValueError, match=message):
        read_records(records_tree, "train", **options)


def test_a_half_written_folder_is_not_read(records):
    (records / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has lost its manifest.json"):
        read_records(records, "train", batch_size=2)


def test_two_replicas_share_each_batch_and_keras_counts_the_epochs(release, edit_table, tmp_path):
    # All four experiments to train on: 8 steps, more than a strategy fetches ahead.
    edit_table(release, lambda table: table.assign(dataset="train"))
    build_records(release, tmp_path / "records")
    script = f"""
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from tfrecords import read_records, site_ids_of_step
dest, options = {str(tmp_path / "records")!r}, dict(batch_size=2, kinds=("treatment", "control"), seed=3)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    data = read_records(dest, "train", training=True, metadata=True, **options)
    for epoch in range(2):
        for step, batch in enumerate(strategy.experimental_distribute_dataset(data)):
            parts = strategy.experimental_local_results(batch[-1]["site_id"])
            named = [site.decode() for part in parts for site in part.numpy()]
            assert len(parts) == 2
            assert named == site_ids_of_step(dest, "train", epoch=epoch, step=step, **options), (epoch, step, named)
        assert step == 7
    model = keras.Sequential([keras.Input((8, 8, 6)), keras.layers.Flatten(), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data = read_records(dest, "train", training=True, **options)
    val = read_records(dest, "id_test", **options)
    model.fit(data, epochs=3, verbose=2, shuffle=False, validation_data=val)
    again = read_records(dest, "train", training=True, first_epoch=3, **options)
    tf.debugging.assert_near(next(iter(data))[0], next(iter(again))[0])
left_open = [iter(data), iter(val)]  # The process must end all the same.
next(left_open[0]), next(left_open[1])
print("well done")
"""
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600
    )
    assert "well done" in result.stdout and result.returncode == 0, result.stderr[-3000:]
    for word in ("autoshard", "auto_shard", "auto sharding", "ran out of data"):
        assert word not in result.stderr.lower(), result.stderr[-3000:]


def test_fit_on_this_backend_sees_each_epoch_in_its_order(records_tree, recwarn):
    import keras

    class Keep(keras.layers.Layer):
        def call(self, images):
            return images[:, 0, 0, :]

    options = dict(batch_size=2, kinds=BOTH, seed=1)
    data = read_records(records_tree, "train", training=True, **options)
    inputs = keras.Input((8, 8, 6))
    model = keras.Model(inputs, keras.layers.Dense(4)(Keep()(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    val = read_records(records_tree, "val", **options)
    history = model.fit(data, epochs=2, validation_data=val, verbose=0, shuffle=False)
    assert len(history.history["val_loss"]) == 2 and np.isfinite(history.history["loss"]).all()
    assert not [str(warning.message) for warning in recwarn if "ran out of data" in str(warning.message)]
    # Keras looked at a batch beforehand; the next pass is epoch 2 all the same.
    again = read_records(records_tree, "train", training=True, first_epoch=2, **options)
    np.testing.assert_allclose(next(iter(data))[0], next(iter(again))[0], atol=1e-5)
    kept = keras.Model(inputs, Keep()(inputs)).predict(val, verbose=0)
    np.testing.assert_allclose(kept, np.concatenate([images[:, 0, 0] for images, _ in val]), atol=1e-5)
