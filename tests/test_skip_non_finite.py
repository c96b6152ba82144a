"""A step that is not finite stops training, or is left out as if it had not been."""

import pickle

import keras
import numpy as np
import pytest

from keras_abra import NonFiniteLossError, SkipNonFinite, run_state
from tests.tiny import tiny_batch, tiny_model

BAD = 1  # of the mini-batches of `batches`


def batches(bad=(BAD,), count=3, value=np.nan):
    found = [tiny_batch(8, seed) for seed in range(count)]
    for i in bad:
        found[i][0]["image"][3, 2, 2, 1] = value
    return found


class Batches(keras.utils.PyDataset):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __len__(self):
        return len(self.found)

    def __getitem__(self, index):
        return self.found[index]


def compiled(optimizer=None, **kwargs):
    model = tiny_model("domain", **kwargs)
    model.compile(optimizer or keras.optimizers.AdamW(1e-2), metrics=["accuracy"])
    return model


def fit(found, *callbacks, model=None, **kwargs):
    model = model or compiled(**kwargs)
    history = model.fit(Batches(found), verbose=0, shuffle=False, callbacks=list(callbacks)).history
    return history, run_state.read_values(model, ("model", "optimizer"))


def infinite_gradient(model):
    """Makes the gradient of a weight infinite and leaves the loss: the slope of a square root at 0."""
    weight = model.head.weights[0]
    weight.regularizer = lambda w: keras.ops.sqrt(keras.ops.sum(keras.ops.square(w - w)))
    return model


def test_a_step_that_is_left_out_is_as_if_it_had_not_been():
    found = batches()
    with pytest.warns(UserWarning, match=r"in epoch 0, step 1 \(both from 0\): the step was left out. Sites of 0, 1"):
        history, values = fit(found, SkipNonFinite(explain=lambda epoch, step: f"Sites of {epoch}, {step}"))
    expected_history, expected = fit([found[0], found[2]], SkipNonFinite())
    assert history.pop("skipped") == [1.0] and expected_history.pop("skipped") == [0.0]
    assert history == expected_history and np.isfinite(history["loss"]).all()
    for name, value in expected.items():
        assert values[name].tobytes() == value.tobytes(), name


def test_nothing_is_left_out_without_need():
    def model():  # not Adam, which makes steps of what rounding leaves of a gradient of 0
        return compiled(keras.optimizers.SGD(1e-2, momentum=0.9))

    found = batches(bad=())
    history, values = fit(found, SkipNonFinite(), model=model())
    expected_history, expected = fit(found, model=model())
    assert history.pop("skipped") == [0.0] and "skipped" not in expected_history
    assert history.keys() == expected_history.keys()
    for name, value in history.items():
        assert value == pytest.approx(expected_history[name], rel=1e-4, abs=1e-5), name
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_steps_left_out_are_counted_beside_a_validation():
    with pytest.warns(UserWarning, match="step 1"):
        history = (
            compiled()
            .fit(
                Batches(batches(bad=(1,))),
                validation_data=Batches(batches(bad=(), count=1)),
                **{"verbose": 0, "shuffle": False, "epochs": 2, "callbacks": [SkipNonFinite()]},
            )
            .history
        )
    assert history["skipped"] == [1.0, 1.0]


def test_more_in_a_row_than_allowed_stop():
    with pytest.warns(UserWarning, match="step 2"):
        fit(batches(bad=(0, 2, 3), count=5), SkipNonFinite(most=2))
    with pytest.warns(UserWarning, match="step 2"):
        with pytest.raises(NonFiniteLossError, match="finite 3 steps in a row, the last in epoch 0, step 3") as caught:
            fit(batches(bad=(1, 2, 3), count=5), SkipNonFinite(most=2))
    assert (caught.value.epoch, caught.value.step) == (0, 3)


def test_a_gradient_that_is_not_finite_stops_too():
    with pytest.raises(NonFiniteLossError, match="A gradient became NaN or infinite in epoch 0, step 0"):
        fit(batches(bad=()), model=infinite_gradient(compiled()))


@pytest.mark.usefixtures("eager")
def test_a_loss_scale_does_not_hide_a_gradient_that_is_never_finite():
    """It is halved at every overflow, from 4.0 to below 1 in three steps; one that overflows a few times goes on."""

    def model(make=lambda m: m):
        return make(compiled(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=4.0)))

    with pytest.raises(NonFiniteLossError, match="A gradient became NaN or infinite in epoch 0, step 3"):
        fit(batches(bad=(), count=6), model=model(infinite_gradient))
    skipping = model(infinite_gradient)
    with pytest.warns(UserWarning, match="step 5"):
        history, _ = fit(batches(bad=(), count=6), SkipNonFinite(), model=skipping)
    assert history["skipped"] == [3.0]
    fit(batches(bad=(), count=6), model=model())


def test_the_error_goes_from_process_to_process():
    error = NonFiniteLossError(3, 7, "The training loss became nan")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is NonFiniteLossError and str(again) == str(error) and (again.epoch, again.step) == (3, 7)


@pytest.mark.usefixtures("eager")
def test_in_a_list_of_keras_it_stops_before_what_would_save():
    saved = []
    late = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: saved.append(batch))
    model = compiled()
    history = keras.callbacks.History()
    callbacks = keras.callbacks.CallbackList([history, late], model=model, epochs=1, steps=3)
    with pytest.raises(NonFiniteLossError, match="epoch 0, step 1"):
        model.fit(Batches(batches()), verbose=0, shuffle=False, callbacks=callbacks)
    assert saved == [0]
    model = compiled()
    history = keras.callbacks.History()
    callbacks = keras.callbacks.CallbackList([history], model=model, epochs=1, steps=3)
    assert model.fit(Batches(batches(bad=())), verbose=0, callbacks=callbacks) is history
    assert np.isfinite(history.history["loss"]).all()
    with pytest.raises(NonFiniteLossError, match="epoch 0, step 1"):  # no other callback looks at a step
        model.fit(Batches(batches()), verbose=0, shuffle=False, callbacks=callbacks)


def test_a_gradient_that_is_not_finite_is_left_out_too():
    model = infinite_gradient(compiled())
    before = run_state.read_values(model, ("model",))
    with pytest.warns(UserWarning, match="not finite in epoch 0, step 2"):
        history, values = fit(batches(bad=()), SkipNonFinite(), model=model)
    assert history["skipped"] == [3.0]
    for name, value in before.items():
        assert values[name].tobytes() == value.tobytes(), name


def test_other_models_cannot_leave_steps_out():
    image = keras.Input((4,))
    model = keras.Model(image, keras.layers.Dense(2)(image))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="SkipNonFinite needs an ABRAModel"):
        model.fit(np.zeros((4, 4)), np.zeros((4, 2)), verbose=0, callbacks=[SkipNonFinite()])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_replicas_leave_a_step_out_together():
    import tensorflow as tf

    from tests.replicas import two_replicas

    def data(found):
        x, y = tf.nest.map_structure(lambda *values: np.concatenate(values), *found)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(8).with_options(options)

    def end(found):
        with two_replicas().scope():
            model = compiled()
        history = model.fit(data(found), verbose=0, shuffle=False, callbacks=[SkipNonFinite()]).history
        return history, run_state.read_values(model, ("model", "optimizer"))

    found = batches()  # what is not finite is a sample of the first replica
    with pytest.warns(UserWarning, match="step 1"):
        history, values = end(found)
    expected_history, expected = end([found[0], found[2]])
    assert history.pop("skipped") == [1.0] and expected_history.pop("skipped") == [0.0]
    assert history == expected_history
    assert values.keys() == expected.keys() and any(name.endswith("-1") for name in values)  # replicas of their own
    for name, value in expected.items():
        assert values[name].tobytes() == value.tobytes(), name


def test_a_step_by_itself_leaves_nothing_out_unseen():
    model = compiled()
    fit(batches(bad=()), SkipNonFinite(), model=model)
    logs = model.train_on_batch(*batches(value=np.nan)[BAD], return_dict=True)
    assert np.isnan(float(logs["loss"])) and "skipped" not in logs
