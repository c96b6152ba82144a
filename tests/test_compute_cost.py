import keras
import numpy as np
import pytest

from keras_abra import ABRAModel, multiply_adds, step_cost, suffix_share
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import DistributionAlignment
from tests.tiny import tiny_model

layers = keras.layers
# conv1, stage 1, 2 and 3 of ResNet-50 at 64 px: of all multiply-adds, and of those that XLA counts
RESNET50 = {
    "conv1_relu": (0.969, 0.965),
    "conv2_block3_out": (0.796, 0.774),
    "conv3_block4_out": (0.550, 0.512),
    "conv4_block6_out": (0.190, 0.162),
}


@pytest.fixture(scope="module")
def resnet50():
    return keras.applications.ResNet50(include_top=False, weights=None, input_shape=(64, 64, 3))


@pytest.mark.parametrize("cut", RESNET50)
def test_shares_of_resnet50(resnet50, cut):
    model = ABRAModel(resnet50, 1108, [cut])
    assert (suffix_share(model), suffix_share(model, padding_taps=False)) == pytest.approx(RESNET50[cut], abs=0.01)


def test_resnet50_has_its_known_multiply_adds():
    backbone = keras.applications.ResNet50(weights=None)
    assert multiply_adds(backbone) == pytest.approx(3.86e9, rel=0.01)  # He et al. 2016, table 1, strides as in Keras


def count_taps(source, kernel, stride, dilation, padding):
    """Products per channel pair of a 2-D convolution, all and those inside the image, one by one."""
    total, inside = [], []
    for size, k, s, d in zip(source, kernel, stride, dilation, strict=True):
        reach = (k - 1) * d + 1
        places = -(-size // s) if padding == "same" else (size - reach) // s + 1
        first = -(max((places - 1) * s + reach - size, 0) // 2) if padding == "same" else 0
        positions = [first + p * s + t * d for p in range(places) for t in range(k)]
        total.append(len(positions))
        inside.append(sum(0 <= position < size for position in positions))
    return int(np.prod(total)), int(np.prod(inside))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("stride,dilation", [((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1, 1), (2, 1))])
def test_convolutions(padding, stride, dilation):
    image = keras.Input((9, 8, 6))
    options = {"strides": stride, "dilation_rate": dilation, "padding": padding}
    every, inside = count_taps((9, 8), (5, 3), stride, dilation, padding)
    plain = keras.Model(image, layers.Conv2D(4, (5, 3), **options)(image))
    grouped = keras.Model(image, layers.Conv2D(4, (5, 3), groups=2, **options)(image))
    assert (multiply_adds(plain), multiply_adds(plain, padding_taps=False)) == (every * 24, inside * 24)
    assert (multiply_adds(grouped), multiply_adds(grouped, padding_taps=False)) == (every * 12, inside * 12)
    if stride == (1, 1):
        depthwise = keras.Model(image, layers.DepthwiseConv2D((5, 3), depth_multiplier=2, **options)(image))
        assert multiply_adds(depthwise, padding_taps=False) == inside * 12


def test_padding_by_a_layer_of_its_own_is_padding():
    image = keras.Input((8, 8, 2))
    same = keras.Model(image, layers.Conv2D(3, 3, padding="same")(image))
    padded = keras.Model(image, layers.Conv2D(3, 3)(layers.ZeroPadding2D(1)(image)))
    assert multiply_adds(same) == multiply_adds(padded)
    assert multiply_adds(same, padding_taps=False) == multiply_adds(padded, padding_taps=False)


def test_other_layers():
    tokens = keras.Input((7, 6))
    cases = {
        layers.Dense(5): 7 * 6 * 5,
        layers.EinsumDense("...d,de->...e", output_shape=5): 7 * 6 * 5,
        layers.EinsumDense("btd,dhe->bthe", output_shape=(None, 2, 3)): 7 * 6 * 2 * 3,
        layers.LayerNormalization(): 0,
    }
    for layer, expected in cases.items():
        assert multiply_adds(keras.Model(tokens, layer(tokens))) == expected, layer
    attention = keras.Model(tokens, layers.MultiHeadAttention(2, 3, value_dim=4)(tokens, tokens))
    projections = 7 * (6 * 6 + 6 * 6 + 6 * 8 + 8 * 6)
    assert multiply_adds(attention) == projections + 7 * 7 * 2 * (3 + 4)
    image = keras.Input((4, 4, 3))
    transposed = keras.Model(image, layers.Conv2DTranspose(2, 3, strides=2, padding="same")(image))
    assert multiply_adds(transposed) == 16 * 9 * 3 * 2
    separable = keras.Model(image, layers.SeparableConv2D(5, 3, padding="same")(image))
    assert multiply_adds(separable) == 16 * 9 * 3 + 16 * 3 * 5


def test_nested_models_and_layers_used_twice():
    image = keras.Input((4, 4, 3))
    convolution = layers.Conv2D(3, 1)
    inner = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(3, 1)])
    model = keras.Model(image, inner(convolution(convolution(image))))
    assert multiply_adds(model) == 3 * 16 * 9


def test_a_layer_that_cannot_be_counted_is_named():
    image = keras.Input((8, 8, 2))
    sequence = layers.Reshape((64, 2))(image)
    with pytest.raises(ValueError, match="layer `recurrent` .LSTM. are not known. Expected convolutions"):
        multiply_adds(keras.Model(image, layers.LSTM(3, name="recurrent")(sequence)))
    with pytest.raises(ValueError, match="layer `conv` depend on the image size.*Received: shape .None, None, None, 2"):
        free = keras.Input((None, None, 2))
        multiply_adds(keras.Model(free, layers.Conv2D(3, 3, name="conv")(free)))


def test_the_step_costs_one_and_the_share_and_two_thirds_of_it_for_each_further_ascent(resnet50):
    def cost(steps=1, search_loss="margin", **kwargs):
        uncertainty = FeatureStatisticsUncertainty(steps=steps, search_loss=search_loss)
        return step_cost(ABRAModel(resnet50, 1108, ["conv2_block3_out"], uncertainty=uncertainty, **kwargs))

    f = suffix_share(ABRAModel(resnet50, 1108, ["conv2_block3_out"]))
    assert cost() == cost(steps=0) == pytest.approx(1 + f, rel=0.01)
    assert cost(steps=3) - cost() == pytest.approx(2 * (2 / 3 * f), rel=0.02)
    two_sided = cost(alignment=DistributionAlignment(two_sided=True))
    assert two_sided - cost() == pytest.approx(f / 3, rel=0.02)
    assert cost(search_loss="softmax") == two_sided
    assert cost(perturbed_norms="clean") - cost() == pytest.approx(2 / 3 * f, rel=0.02)
    assert cost(perturbed_norms="clean", search_loss="softmax") == cost(perturbed_norms="clean")
    assert cost(perturbed_norms="clean", steps=0) == cost()
    assert cost(steps=0, search_loss="softmax") == cost()
    assert cost(steps=0, alignment=DistributionAlignment(two_sided=True)) == cost()


def test_without_a_stage_the_step_is_a_plain_one():
    model = tiny_model(perturb_after=())
    assert (suffix_share(model), step_cost(model)) == (0.0, 1.0)


def test_frozen_weights_have_no_gradient():
    model = tiny_model()
    everything = step_cost(model)
    for layer in model.backbone_parts[0].layers:
        layer.trainable = False
    # no gradient reaches the prefix: it goes forward only, and the perturbed branch is a larger share of the step
    assert step_cost(model) > everything
