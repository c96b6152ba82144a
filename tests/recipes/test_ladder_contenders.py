"""What the settings of the ladder's methods become."""

import keras
import numpy as np
import pytest
from ladder_contenders import build_contender
from ladder_methods import METHODS, method_settings

from keras_abra.losses import CosFace

pytestmark = pytest.mark.usefixtures("tiny_ladder")


SEARCHES = ["shared", "part", "zero_start", "adversary_every=4", "search_loss=softmax", "ramp_radius", "learned_scale"]
SEARCHES += [
    "shared+domain_cell_type+radius=1",
    "domain_cell_type+radius=1+zero_start",
    "norms=auxiliary",
    "norms=moving",
    "ben",
]
SEARCHES += ["norms=clean+shared+domain_cell_type+radius=1"]


@pytest.mark.parametrize("method", [*METHODS, "abra:structure=domain_cell_type", *(f"abra:{s}" for s in SEARCHES)])
def test_every_contender_is_built_and_answers(method):
    contender = build_contender(method_settings(method), (24, 24, 6), 4, ["HUVEC", "HUVEC", "RPE"], 2)
    logits, embedding = contender.network(np.zeros((2, 24, 24, 6), "float32"))
    assert tuple(logits.shape) == (2, 4) and tuple(embedding.shape) == (2, 6)
    assert (contender.cost is None) == (method in ("csu", "adv_bn"))
    assert (contender.cost or 1) == pytest.approx(1) or method.startswith("abra")
    trained = {id(v) for v in contender.model.trainable_variables}
    assert {id(v) for v in contender.network.trainable_variables} <= trained  # what is scored is what is trained


@pytest.mark.parametrize(
    "method, kind, after",
    [
        ("dsu", "FeatureStatisticsUncertainty", ["stem", "stage1", "stage2", "stage3"]),
        ("dsu_softmax", "FeatureStatisticsUncertainty", ["stem", "stage1", "stage2", "stage3"]),
        ("mixstyle", "MixStyle", ["stem", "stage1", "stage2"]),
        ("csu", "CorrelatedStyleUncertainty", ["stem", "stage1", "stage2", "stage3"]),
        ("adv_style", "AdvStyle", ["stem", "stage1", "stage2", "stage3"]),
    ],
)
def test_layers_stand_behind_the_stages_they_are_meant_for(method, kind, after):
    network = build_contender(method_settings(method), (24, 24, 6), 4, ["RPE"], 2).network
    flat = [*layers_of(network)]
    found = [before.name for before, layer in zip(flat, flat[1:], strict=False) if type(layer).__name__ == kind]
    assert found == after
    plain = build_contender(method_settings("erm"), (24, 24, 6), 4, ["RPE"], 2).network
    assert not any(type(layer).__name__ == kind for layer in layers_of(plain))


def layers_of(model):
    """In the order in which they are called, those of sub-models in the place of these; without inputs."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


def test_the_adversary_of_adv_style_and_the_discriminator_do_not_decay():
    for method, name in (("adv_style", "spread_change"), ("dann", "discriminator")):
        model = build_contender(method_settings(method), (24, 24, 6), 4, ["RPE", "RPE"], 2).model
        decays = [v.path for v in model.trainable_variables if model.optimizer._use_weight_decay(v)]
        assert any(name in v.path for v in model.trainable_variables) and decays
        assert not [path for path in decays if name in path]


def test_abra_takes_the_margin_of_cosface():
    contender = build_contender(method_settings("abra_random:loss=cosface"), (24, 24, 6), 4, ["RPE"], 2)
    loss = contender.model.loss_function
    assert (type(loss), loss.margin, loss.scale) == (CosFace, 0.1, 12.0)
