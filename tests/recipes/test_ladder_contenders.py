"""What the settings of the ladder's methods become."""

import keras
import numpy as np
import pytest
from hparams import EMBEDDED, REAL
from ladder_contenders import build_contender
from ladder_methods import METHODS, method_settings

from keras_abra.layers import FeatureStatisticsUncertainty
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


def margin_of(contender):
    loss = contender.model.loss_function
    return {"margin": loss.margin, "scale": loss.scale}


def layer_of(kind, **names):
    """Reads, of the first such layer, a setting by the name of the attribute that is to hold it."""

    def read(contender):
        layer = next(layer for layer in layers_of(contender.network) if type(layer).__name__ == kind)
        return {name: getattr(layer, attribute) for name, attribute in names.items()}

    return read


def adversary_of(contender):
    (_, stage), alignment = contender.model.stages, contender.model.alignment
    return {
        **{name: getattr(stage, name) for name in ("structure", "radius", "steps", "step_size", "start", "shared_by")},
        **{name: getattr(stage, name) for name in ("perturbed_share", "search_loss", "adversary_every", "ramp_radius")},
        **{"alignment": alignment.kind, "alignment_weight": alignment.weight, "two_sided": alignment.two_sided},
        **{name: getattr(contender.model, name) for name in ("perturbed_weight", "perturbed_norms")},
        "stages": "+".join(contender.model.perturb_after),
        **margin_of(contender),
    }


ADVERSARY = {
    **{"structure": "low_rank", "radius": 0.4, "steps": 2, "step_size": 0.7, "start": "zero"},
    **{"perturbed_share": 0.5, "search_loss": "softmax", "adversary_every": 3, "ramp_radius": True},
    **{"alignment": "mmd", "alignment_weight": 0.3, "two_sided": True, "perturbed_weight": 0.4},
    **{"perturbed_norms": "moving", "stages": "stem+stage2", "margin": 0.35, "scale": 7.0},
}
MADE = {
    "coral": ({"penalty": 3.0}, lambda made: {"penalty": made.model.objective.weight}),
    "irm": ({"penalty": 3.0}, lambda made: {"penalty": made.model.objective.penalty_weight.weight}),
    "vrex": ({"penalty": 3.0}, lambda made: {"penalty": made.model.objective.penalty_weight.weight}),
    "group_dro": ({"penalty": 0.3}, lambda made: {"penalty": made.model.objective.step_size}),
    "dann": ({"penalty": 3.0}, lambda made: {"penalty": made.model.objective.weight}),
    "winner_loss": (
        {"margin": 0.35, "scale": 7.0},
        lambda made: {name: getattr(made.model.objective.margin_loss, name) for name in ("margin", "scale")},
    ),
    "arcface": ({"margin": 0.35, "scale": 7.0}, margin_of),
    "cosface": ({"margin": 0.35, "scale": 7.0}, margin_of),
    "dsu": ({"probability": 0.3}, layer_of("FeatureStatisticsUncertainty", probability="probability")),
    "dsu_softmax": ({"probability": 0.3}, layer_of("FeatureStatisticsUncertainty", probability="probability")),
    "mixstyle": ({"probability": 0.3, "alpha": 0.7}, layer_of("MixStyle", probability="probability", alpha="alpha")),
    "csu": (
        {"probability": 0.3, "alpha": 0.7},
        layer_of("CorrelatedStyleUncertainty", probability="probability", alpha="alpha"),
    ),
    "adv_style": (
        {"penalty": 3.0, "adversary_rate": 0.02},
        lambda made: (
            layer_of("AdvStyle", penalty="weight")(made) | {"adversary_rate": made.model.optimizer.adversary_rate}
        ),
    ),
    "adv_bn": (
        {"box": 1.4, "step_size": 0.4},
        lambda made: {"box": made.model.radius, "step_size": made.model.step_size},
    ),
    "abra": (ADVERSARY, adversary_of),
}


@pytest.mark.parametrize("method", MADE)
def test_what_is_built_has_the_settings(method):
    settings, read = MADE[method]
    made = build_contender(
        method_settings(method, learning_rate=0.03, weight_decay=0.2, **settings), (24, 24, 6), 4, ["RPE", "RPE"], 2
    )
    assert {name: value for name, value in read(made).items() if name in settings} == settings
    assert float(made.model.optimizer.learning_rate) == pytest.approx(0.03)
    assert made.model.optimizer.weight_decay == 0.2


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


def test_the_defaults_are_those_of_the_ladder():
    layer, chosen = FeatureStatisticsUncertainty(), method_settings("abra_random")
    assert layer.structure == chosen["structure"]
    for settings in (EMBEDDED, REAL):
        assert settings["structure"] is None  # the layer's own
        for name in ("radius", "steps", "step_size"):
            assert getattr(layer, name) == chosen[name] == settings[name]
        assert (settings["alignment"], settings["alignment_weight"]) == (
            chosen["alignment"],
            chosen["alignment_weight"],
        )
    assert (EMBEDDED["margin"], EMBEDDED["scale"]) == (chosen["margin"], chosen["scale"])


def test_abra_takes_the_margin_of_cosface():
    contender = build_contender(method_settings("abra_random:loss=cosface"), (24, 24, 6), 4, ["RPE"], 2)
    loss = contender.model.loss_function
    assert (type(loss), loss.margin, loss.scale) == (CosFace, 0.1, 12.0)
