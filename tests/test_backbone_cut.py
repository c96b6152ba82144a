import keras
import numpy as np
import pytest

from keras_abra import cut_backbone, valid_cuts
from tests.tiny import tiny_backbone

CUTS = ["stem", "stage1", "last"]


def image():
    return np.random.default_rng(0).normal(size=(2, 8, 8, 2)).astype("float32")


def through(parts, x, training=False):
    for part in parts:
        x = part(x, training=training)
    return keras.ops.convert_to_numpy(x)


@pytest.mark.parametrize("after", [[], ["stem"], ["stage1", "stem"], ["last"], ["stem", "stage1", "last"]])
def test_the_parts_one_after_another_are_the_backbone(after):
    backbone = tiny_backbone()
    parts = cut_backbone(backbone, after)
    assert len(parts) == len(after) + 1
    np.testing.assert_array_equal(through(parts, image()), keras.ops.convert_to_numpy(backbone(image())))


def test_weights_are_shared_and_nothing_is_copied():
    backbone = tiny_backbone()
    parts = cut_backbone(backbone, ["stem"])
    ids = [id(w) for part in parts for w in part.weights]
    assert sorted(ids) == sorted(id(w) for w in backbone.weights)


def test_cutting_leaves_the_backbone_as_it_was():
    backbone = tiny_backbone()
    before = backbone.to_json()
    cut_backbone(backbone, ["stem", "stage1"])
    assert backbone.to_json() == before
    cut_backbone(keras.models.clone_model(backbone), ["stage1"])


def test_a_layer_that_paths_lead_around_is_no_cut():
    backbone = tiny_backbone()
    cuts = valid_cuts(backbone)
    assert [name for name in cuts if name in (*CUTS, "inner")] == CUTS
    with pytest.raises(ValueError, match="after 'inner': paths lead around it.*Valid here: .*stem.*stage1"):
        cut_backbone(backbone, ["inner"])


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="after 'stge1': the backbone has no such layer.*Valid here: .*stem"):
        cut_backbone(tiny_backbone(), ["stge1"])


def test_each_cut_is_named_once():
    with pytest.raises(ValueError, match="named once"):
        cut_backbone(tiny_backbone(), ["stem", "stem"])


def test_a_layer_used_twice_is_no_cut():
    x = inputs = keras.Input((8, 8, 2))
    shared = keras.layers.Conv2D(2, 1, name="shared")
    x = keras.layers.ReLU(name="end")(shared(shared(x)))
    assert valid_cuts(keras.Model(inputs, x)) == ["end"]


LARGE = ["DenseNet121", "EfficientNetB0"] if keras.backend.backend() == "tensorflow" else []  # cuts know no backend


@pytest.mark.parametrize("name", ["ResNet50", "MobileNetV3Small", *LARGE])
def test_backbones_of_keras_applications_can_be_cut(name):
    backbone = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(32, 32, 6))
    cuts = valid_cuts(backbone)
    middle = cuts[len(cuts) // 2]
    first, rest = cut_backbone(backbone, [middle])
    x = np.zeros((1, 32, 32, 6), "float32")
    np.testing.assert_allclose(through([first, rest], x), keras.ops.convert_to_numpy(backbone(x)), rtol=1e-5, atol=1e-6)


def test_resnet50_is_cut_after_its_stages():
    backbone = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 6))
    assert {"conv1_relu", "conv2_block3_out", "conv3_block4_out", "conv4_block6_out"} <= set(valid_cuts(backbone))


def test_a_map_of_grey_levels_as_integers_is_no_cut():
    image = keras.Input((8, 8, 2), dtype="uint8")
    x = keras.layers.ZeroPadding2D(name="pad", dtype="uint8")(image)
    backbone = keras.Model(image, keras.layers.Conv2D(2, 1, name="conv")(keras.layers.Rescaling(1 / 255, name="r")(x)))
    assert valid_cuts(backbone) == ["r", "conv"]


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda: Subclassed(), "must be a Functional keras.Model.*Received: Subclassed"),
        (lambda: keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Conv2D(2, 1)]), "For a built Sequential: "),
        (lambda: keras.layers.Dense(3), "Received: Dense"),
        (lambda: keras.Model(i := keras.Input((4,)), keras.layers.Dense(3)(i)), r"Received: input shape \(None, 4\)"),
        (lambda: keras.Model(i := keras.Input((8, 8, 2)), [keras.layers.Conv2D(2, 1)(i)] * 2), "2 outputs"),
        (lambda: keras.Model(i := keras.Input((8, 8, 2)), {"map": keras.layers.ReLU()(i)}), "not in a dict.*'map'"),
    ],
)
def test_what_is_no_backbone_is_named(backbone, message):
    with pytest.raises(ValueError, match=message):
        cut_backbone(backbone(), ["stem"])


def test_a_layer_inside_an_inner_model_is_said_to_be_there():
    image = keras.Input((16, 16, 3))
    inner = keras.Model(image, keras.layers.Conv2D(4, 3, name="stem")(image), name="inner")
    outer = keras.Input((16, 16, 3))
    with pytest.raises(ValueError, match="after 'stem': it is inside the model 'inner'.*Valid here: inner"):
        cut_backbone(keras.Model(outer, inner(outer)), ["stem"])
