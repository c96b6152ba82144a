"""The compiled step computes what theory says it must: these bounds are why the step is written as it is."""

import keras
import numpy as np
import pytest
from backbones import tiny_resnet
from step_counters import count_predict_flops, count_train_flops

from keras_abra import ABRAModel, multiply_adds, step_cost, suffix_share
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import DistributionAlignment

CLASSES, BATCH = 20, 8
PADDING_TAPS = keras.backend.backend() != "jax"  # XLA leaves products with padding out


def batch():
    random = np.random.default_rng(0)
    return random.normal(size=(BATCH, 32, 32, 3)).astype("float32"), np.arange(BATCH, dtype="int32")


def compiled(perturb_after, steps=1, layer=None, **kwargs):
    uncertainty = FeatureStatisticsUncertainty(steps=steps, seed=0, **(layer or {}))
    model = ABRAModel(tiny_resnet((32, 32, 3), width=32), CLASSES, perturb_after, 64, uncertainty, warmup=0, **kwargs)
    model.compile(optimizer=keras.optimizers.SGD(0.1), metrics=["accuracy"])
    return model


def erm_model(stages=()):
    """The same network under Keras's own training step; `stages`: with DSU."""
    base = ABRAModel(tiny_resnet((32, 32, 3), width=32), CLASSES, stages, embedding_dim=64)
    image = base.backbone.input
    x = base.backbone_parts[0](image)
    for part in base.backbone_parts[1:]:
        x = part(FeatureStatisticsUncertainty(radius=None, probability=0.5)(x))
    x = base.head(base.neck(keras.layers.GlobalAveragePooling2D()(x)))
    model = keras.Model(image, x * 30.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def erm():
    return count_train_flops(erm_model(), *batch())


def test_the_plain_step_is_counted_right(erm):
    model = compiled([])
    forward = 2 * BATCH * multiply_adds(model, PADDING_TAPS)
    # forward, weights and features, but no gradient to the image
    assert 2.6 * forward < erm < 3.1 * forward
    assert count_train_flops(model, *batch()) == pytest.approx(erm, rel=0.01)


@pytest.mark.parametrize("cut", ["stem", "stage1", "stage2"])
def test_one_stage_costs_one_and_its_share(erm, cut):
    model = compiled([cut])
    ratio = count_train_flops(model, *batch()) / erm
    assert step_cost(model, PADDING_TAPS) / 1.01 < ratio <= 1.02 * step_cost(model, PADDING_TAPS)


def test_a_second_stage_costs_nothing(erm):
    model = compiled(["stem", "stage1"], layer={"structure": "low_rank", "probability": 0.5})
    assert count_train_flops(model, *batch()) / erm <= 1.03 * step_cost(model, PADDING_TAPS)


def test_a_further_ascent_step_costs_two_thirds_of_the_share(erm):
    models = compiled(["stage1"]), compiled(["stage1"], steps=2)
    flops = [count_train_flops(model, *batch()) for model in models]
    bound = step_cost(models[1], PADDING_TAPS) - step_cost(models[0], PADDING_TAPS)
    assert (flops[1] - flops[0]) / erm <= 1.05 * bound
    # bound itself: a little more than 2f/3, by the gradient that does not go to the image
    assert bound == pytest.approx(2 / 3 * suffix_share(models[0], PADDING_TAPS), rel=0.1)


def test_two_sided_alignment_costs_a_third_of_the_share(erm):
    model = compiled(["stage1"], alignment=DistributionAlignment(two_sided=True))
    assert count_train_flops(model, *batch()) / erm <= 1.02 * step_cost(model, PADDING_TAPS)


def test_dsu_costs_next_to_nothing(erm):
    assert count_train_flops(erm_model(["stage1", "stage2"]), *batch()) <= 1.01 * erm


def test_inference_is_that_of_the_plain_network():
    model, plain = compiled(["stem", "stage1"]), erm_model()
    images, _ = batch()
    assert count_predict_flops(model, images) == count_predict_flops(plain, images)
