"""Objectives that see experiments, in plain `fit` on every backend."""

import keras
import numpy as np
import pytest
from contenders.coral import CORAL
from contenders.dann import DANN
from contenders.group_dro import GroupDRO
from contenders.irm import IRM
from contenders.objective_model import ObjectiveModel
from contenders.vrex import VREx
from keras import ops

RANDOM = np.random.default_rng(0)
IDS = np.arange(24, dtype="int32") % 3
LABELS = (np.arange(24, dtype="int32") // 3) % 4
IMAGES = (RANDOM.normal(size=(24, 8, 8, 2)) + LABELS[:, None, None, None]).astype("float32")
DATA = {"image": IMAGES, "experiment": IDS}


def network():
    keras.utils.set_random_seed(1)
    image = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 3, activation="relu")(image)
    x = keras.layers.BatchNormalization()(x)
    embedding = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, [keras.layers.Dense(4)(embedding), embedding])


OBJECTIVES = {
    "coral": lambda: CORAL(3),
    "irm": lambda: IRM(3, weight=2.0, anneal_steps=2),
    "vrex": lambda: VREx(3, anneal_steps=2),
    "group_dro": lambda: GroupDRO(3, step_size=0.5),
    "dann": lambda: DANN(3, 4, width=4),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fit_descends_and_moves_the_state(name):
    model = ObjectiveModel(network(), OBJECTIVES[name]())
    model.compile(keras.optimizers.Adam(0.02), metrics=["accuracy"])
    history = model.fit(DATA, LABELS, batch_size=12, epochs=15, shuffle=False, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["accuracy"][-1] > 0.4
    if name == "group_dro":
        assert np.ptp(ops.convert_to_numpy(model.objective.shares)) > 1e-4
    if name in ("irm", "vrex"):
        assert float(model.objective.penalty_weight.steps) == 30
    logits = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(logits, model.network.predict(IMAGES, verbose=0)[0], atol=1e-5)
    right = (logits.argmax(1) == LABELS).mean()
    assert model.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)["accuracy"] == pytest.approx(right)


def test_the_objective_is_what_is_minimized():
    """One step of SGD is the one on the plain loss where the objective is the plain loss, and another where not."""

    class Plain(keras.layers.Layer):
        def call(self, logits, embedding, labels, experiments):
            return CORAL(3, weight=0.0)(logits, embedding, labels, experiments)

    steps = {}
    for name, objective in (("plain", Plain()), ("coral", CORAL(3, weight=50.0))):
        model = ObjectiveModel(network(), objective)
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(DATA, LABELS, batch_size=24, shuffle=False, verbose=0)
        steps[name] = model.network.get_weights()[0]
    reference = network()
    plain = keras.Model(reference.input, reference.outputs[0])
    plain.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    plain.fit(IMAGES, LABELS, batch_size=24, shuffle=False, verbose=0)
    np.testing.assert_allclose(steps["plain"], plain.get_weights()[0], rtol=1e-4, atol=1e-6)
    assert np.abs(steps["coral"] - steps["plain"]).max() > 1e-4
