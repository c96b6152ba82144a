"""The smallest model and data that have everything the training step must get right."""

import keras
import numpy as np

from keras_abra import ABRAModel
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace

CLASSES, EXPERIMENTS, BATCH = 5, 3, 8


def tiny_backbone(dropout=0.2, regularizer=1e-2, shape=(8, 8, 2), synchronized=False, seeded=True):
    """8x8x2 images; cuts `stem` and `stage1`; dropout (with seeds of its own or without), weight and activity
    regularization on both sides of the cuts."""
    l2 = keras.regularizers.L2(regularizer) if regularizer else None
    activity = keras.regularizers.L2(regularizer / 10) if regularizer else None
    layers = keras.layers

    def block(x, filters, name, seed):
        options = {"padding": "same", "kernel_regularizer": l2, "use_bias": False}
        y = layers.Conv2D(filters, 3, kernel_initializer=keras.initializers.HeNormal(seed), **options)(x)
        y = layers.BatchNormalization(synchronized=synchronized)(y)
        y = layers.Dropout(dropout, seed=seed if seeded else None)(y)
        return layers.Activation("tanh", name=name, activity_regularizer=activity)(y)

    image = keras.Input(shape)
    x = block(image, 3, "stem", 1)
    x = layers.Add(name="stage1")([block(x, 3, "inner", 2), x])
    x = block(layers.AveragePooling2D(2)(x), 4, "last", 3)
    return keras.Model(image, x, name="tiny")


def smooth_backbone():
    """As `tiny_backbone`, without batch normalization and dropout, which are the replicas' own affair; cut `stem`."""
    image = keras.Input((8, 8, 2))
    conv = {"padding": "same", "activation": "tanh", "kernel_regularizer": keras.regularizers.L2(0.01)}
    x = keras.layers.Conv2D(3, 3, name="stem", kernel_initializer=keras.initializers.HeNormal(1), **conv)(image)
    return keras.Model(image, keras.layers.Conv2D(4, 3, kernel_initializer=keras.initializers.HeNormal(2), **conv)(x))


def tiny_model(
    structure="diagonal", steps=1, perturb_after=("stem",), backbone=None, layer=None, classes=CLASSES, **kwargs
):
    """An `ABRAModel` that starts at full margin and adversary."""
    extra = {"num_experiments": EXPERIMENTS} if structure == "domain" else {}
    uncertainty = FeatureStatisticsUncertainty(
        structure, steps=steps, seed=7, **{"radius": 0.2, **extra, **(layer or {})}
    )
    defaults = {"loss": ArcFace(0.3, 4.0), "embedding_dim": 6, "perturbed_weight": 0.7, "warmup": 0}
    keras.utils.set_random_seed(3)
    return ABRAModel(
        backbone or tiny_backbone(), classes, perturb_after, uncertainty=uncertainty, **{**defaults, **kwargs}
    )


def tiny_batch(batch=BATCH, seed=0):
    """`({"image", "experiment"}, labels)` as NumPy arrays; experiments differ in their channel statistics."""
    random = np.random.default_rng(seed)
    experiment = (np.arange(batch) % EXPERIMENTS).astype("int32")
    image = (
        random.normal(size=(batch, 8, 8, 2)) * (1 + 0.4 * experiment)[:, None, None, None]
        + experiment[:, None, None, None]
    )
    return {"image": image.astype("float32"), "experiment": experiment}, random.integers(0, CLASSES, batch).astype(
        "int32"
    )


def mixed(y):
    """Shares of the classes in samples that are mixed with each other, as by CutMix, NumPy."""
    rows = np.eye(CLASSES, dtype="float32")[y]
    return 0.7 * rows + 0.3 * rows[::-1]
