"""The fused step gives the gradients and the state of the naive scheme with the same rules."""

import keras
import numpy as np
import pytest

from keras_abra.losses import DistributionAlignment
from tests.naive_step import naive_step
from tests.recording import RecordingOptimizer
from tests.tiny import mixed, tiny_backbone, tiny_batch, tiny_model

STAGES = {"one": ("stem",), "two": ("stem", "stage1")}


def train_once(model, x, y, sample_weight=None, run_eagerly=True):
    """One real `train_on_batch`: `(gradients the optimizer was given, new state, logs)`."""
    optimizer = RecordingOptimizer()
    model.compile(optimizer=optimizer, run_eagerly=run_eagerly)
    model.reset_metrics()
    logs = model.train_on_batch(x, y, sample_weight=sample_weight, return_dict=True)
    state = [keras.ops.convert_to_numpy(v) for v in model.non_trainable_variables]
    return optimizer.recorded(), state, logs


def mismatches(model, fused, naive):
    """Names of the variables whose gradient or new value differs, by the bound of 1e-4 (float32)."""
    (gradients, state, logs), (expected, new_state, losses) = fused, naive
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in expected))
    wrong = []
    for v, g, e in zip(model.trainable_variables, gradients, expected, strict=True):
        difference = np.linalg.norm(g - e) / max(np.linalg.norm(e), 1e-3 * whole)
        if not difference <= 1e-4:
            wrong.append(f"{v.path}: {difference:.1e}")
    for v, s, e in zip(model.non_trainable_variables, state, new_state, strict=True):
        if not np.allclose(s, e, rtol=1e-4, atol=1e-6):
            wrong.append(v.path)
    return wrong + [name for name, value in losses.items() if not np.isclose(logs[name], value, rtol=1e-4, atol=1e-4)]


def compare(model, mutant=None, sample_weight=None, warm=False, run_eagerly=True, labels=None):
    x, y = tiny_batch()
    y = y if labels is None else labels(y)
    if warm:  # running means, moving statistics and seeds that are not the initial ones
        train_once(model, *tiny_batch(seed=1))
    naive = naive_step(model, x, y, sample_weight, mutant)
    return mismatches(model, train_once(model, x, y, sample_weight, run_eagerly), naive)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "domain"])
def test_gradients_and_state_equal_the_naive_scheme(structure, steps, stages):
    model = tiny_model(structure, steps, STAGES[stages])
    assert compare(model, warm=structure == "domain") == []


def test_the_branches_share_the_masks_of_dropout_without_a_seed():
    """For which Keras on torch takes a global generator: two passes with one state would have different masks."""
    model = tiny_model("low_rank", 2, backbone=tiny_backbone(dropout=0.5, seeded=False))
    assert compare(model) == []
    again = keras.models.clone_model(model.backbone)  # what was made anew has no seed either
    assert all(layer.get_config()["seed"] is None for layer in again.layers if isinstance(layer, keras.layers.Dropout))


def test_the_compiled_step_is_the_same():
    assert compare(tiny_model("low_rank", 3, STAGES["two"]), run_eagerly=False) == []


def test_two_sided_alignment_flows_into_both_branches():
    assert compare(tiny_model(alignment=DistributionAlignment(weight=3.0, two_sided=True))) == []


def test_sample_weights_count_in_every_term():
    weight = np.linspace(0, 2, 8, dtype="float32")
    assert compare(tiny_model(), sample_weight=weight) == []


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_labels_may_be_shares_of_classes(run_eagerly):
    model = tiny_model("diagonal", 2, STAGES["two"], alignment=DistributionAlignment(weight=3.0, two_sided=True))
    assert compare(model, run_eagerly=run_eagerly, labels=mixed) == []
    assert compare(tiny_model(), labels=mixed, mutant="main class") != []


def test_a_stage_may_sit_a_step_out():
    model = tiny_model("diagonal", 3, STAGES["two"], layer={"probability": 0.5})
    assert compare(model) == []


OPTIONS = {
    "zero start": {"start": "zero"},
    "zero start, long steps": {"start": "zero", "step_size": 3.0},
    "shared": {"shared_by": "experiment"},
    "part": {"perturbed_share": 0.5},
    "shared part": {"shared_by": "experiment", "perturbed_share": 0.5, "probability": 0.7},
    "softmax": {"search_loss": "softmax"},
}


@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_search(option, structure):
    assert compare(tiny_model(structure, 2, STAGES["two"], layer=OPTIONS[option])) == []


@pytest.mark.parametrize("layer", [{"adversary_every": 3}, {"adversary_every": 2}, {"ramp_radius": True}])
@pytest.mark.parametrize("steps", [2, 4, 6])
def test_options_that_go_by_the_number_of_the_step(layer, steps):
    model = tiny_model(layer=layer)
    model.ramp.start(4)
    model.ramp.advance(steps)
    assert compare(model) == []


def test_a_search_without_margin_and_two_sided_alignment_go_together():
    model = tiny_model(layer={"search_loss": "softmax"}, alignment=DistributionAlignment(weight=3.0, two_sided=True))
    assert compare(model) == []


def test_on_the_ramp_the_margin_is_a_share_and_the_adversary_waits():
    model = tiny_model()
    model.ramp.start(4)
    model.ramp.advance(1)
    assert compare(model) == []


def with_norms(kind, steps, **layer):
    model = tiny_model("diagonal", steps, STAGES["two"], perturbed_norms=kind, layer=layer)
    random = np.random.default_rng(0)
    for norm in model.auxiliary_norms:
        norm.set_weights([w + 0.3 * random.random(w.shape).astype("float32") for w in norm.get_weights()])
    return model


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("kind", ["clean", "moving", "auxiliary"])
def test_other_normalizations_of_the_perturbed_branch(kind, steps):
    assert compare(with_norms(kind, steps), warm=True) == []


@pytest.mark.parametrize("kind", ["clean", "moving", "auxiliary"])
def test_other_normalizations_go_with_what_takes_more_passes(kind):
    model = with_norms(kind, 1, search_loss="softmax", start="zero")
    model.alignment = DistributionAlignment(weight=3.0, two_sided=True)
    assert compare(model, run_eagerly=False) == []


@pytest.mark.parametrize("kind", ["clean", "moving", "auxiliary"])
def test_a_normalization_that_is_frozen_stays_as_it_is_in_both_branches(kind):
    model = with_norms(kind, 2)
    frozen = [layer for layer in model.backbone.layers if isinstance(layer, keras.layers.BatchNormalization)][-1]
    x, y = tiny_batch(seed=1)
    train_once(model, x, y)  # moving statistics of its own
    frozen.trainable = False
    model.compile("sgd")
    assert sum(not norm.trainable for norm in model.auxiliary_norms) == (kind == "auxiliary")
    assert compare(model) == []
    assert not {w.path for w in frozen.weights} & {w.path for w in model.trainable_variables}


@pytest.mark.parametrize("kind", ["clean", "moving", "auxiliary"])
def test_the_comparison_sees_the_normalizations(kind):
    assert compare(with_norms(kind, 1), mutant="own norms") != []


def with_scales(structure, **kwargs):
    model = tiny_model(structure, 0, STAGES["two"], **kwargs)
    for stage in model.stages:
        stage.log_scale.assign(np.random.default_rng(0).normal(size=stage.log_scale.shape))
    return model


LEARNED = {
    "alone": {},
    "shared part": {"shared_by": "experiment", "perturbed_share": 0.75},
}


def scale_gradients(model):
    """Of the last step."""
    ids = {id(stage.log_scale) for stage in model.stages}
    pairs = zip(model.trainable_variables, model.optimizer.recorded(), strict=True)
    return [gradient for variable, gradient in pairs if id(variable) in ids]


@pytest.mark.parametrize("structure", ["diagonal", "domain"])
@pytest.mark.parametrize("option", LEARNED)
def test_a_learned_scale_climbs_what_all_else_descends(option, structure):
    layer = {"learned_scale": True, **LEARNED[option]}
    model = with_scales(structure, layer=layer)
    assert compare(model, warm=structure == "domain") == []
    assert all(np.abs(g).max() > 1e-4 for g in scale_gradients(model))


def test_a_learned_scale_goes_with_two_sided_alignment_and_other_normalizations():
    alignment = DistributionAlignment(weight=3.0, two_sided=True)
    model = with_scales("diagonal", layer={"learned_scale": True}, alignment=alignment, perturbed_norms="clean")
    assert compare(model, run_eagerly=False) == []


@pytest.mark.parametrize("steps", [0, 2])  # at 0 the radius is 0 too
def test_a_learned_scale_waits_for_the_end_of_the_ramp(steps):
    model = with_scales("diagonal", layer={"learned_scale": True, "ramp_radius": True})
    model.ramp.start(4)
    model.ramp.advance(steps)
    assert compare(model) == []
    assert not any(np.abs(g).max() for g in scale_gradients(model))


def test_the_comparison_sees_which_way_a_scale_goes():
    assert compare(with_scales("diagonal", layer={"learned_scale": True}), mutant="scale descends") != []


def test_no_penalty_is_lost_to_a_recycled_id():
    class EveryId(set):
        def __contains__(self, _):
            return True

    model = tiny_model("diagonal", 1, STAGES["two"])
    x, y = tiny_batch()
    expected = naive_step(model, x, y)
    for layer in model.backbone.layers:
        vars(layer)["_loss_ids"] = EveryId()  # past the tracking of `__setattr__`, which would copy it
    assert mismatches(model, train_once(model, x, y), expected) == []


def test_the_comparison_sees_slopes_that_are_not_shared():
    assert compare(tiny_model(layer={"shared_by": "experiment"}), mutant="slopes apart") != []


@pytest.mark.parametrize("mutant", ["shared part", "batch norm twice", "regularization twice", "ascent sign"])
def test_the_comparison_sees(mutant):
    model = tiny_model("diagonal", 1, STAGES["two"])
    assert compare(model, mutant=mutant) != []


def test_a_table_behind_the_cut_has_its_gradient():
    """As position embeddings and relative position biases are: on TensorFlow theirs come as IndexedSlices."""
    image = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 3, padding="same", name="stem")(image)
    x = Positions()(keras.layers.Dense(6, activation="tanh")(keras.layers.Reshape((64, 4))(x)))
    backbone = keras.Model(image, keras.layers.Reshape((8, 8, 6))(x))
    assert compare(tiny_model(steps=1, backbone=backbone)) == []


class Positions(keras.layers.Layer):
    def build(self, shape):
        self.table = keras.layers.Embedding(*shape[1:])

    def call(self, x):
        return x + self.table(keras.ops.arange(x.shape[1]))
