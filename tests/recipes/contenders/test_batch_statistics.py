import keras
import numpy as np
from contenders.batch_statistics import predict_by_group, with_batch_statistics

from keras_abra import embedding_neck

RANDOM = np.random.default_rng(0)
GROUPS = np.array([0, 1, 0, 1, 1, 0, 1])
IMAGES = (RANDOM.normal(size=(7, 4, 4, 2)) * (1 + GROUPS)[:, None, None, None] + GROUPS[:, None, None, None]).astype(
    "float32"
)


def normalized(x, weights):
    gamma, beta, _, _ = weights
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3) * gamma + beta


def test_every_group_is_normalized_by_its_own_statistics_in_sub_models_too():
    keras.utils.set_random_seed(0)
    image = keras.Input((4, 4, 2))
    norm = keras.layers.BatchNormalization(name="norm")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.5)(norm(image)))
    neck = embedding_neck(2, 3)
    network = keras.Model(image, neck(x))
    norm.set_weights([np.array(w, "float32") for w in ([2, 0.5], [1, -1], [7, 7], [9, 9])])
    adaptive = with_batch_statistics(network)
    neck.layers[1].set_weights([2 * neck.layers[1].get_weights()[0]])  # weights are shared, also when they change
    before = [np.array(w) for w in network.get_weights()]
    found = predict_by_group(adaptive, IMAGES, GROUPS)
    for group in (0, 1):
        x = normalized(IMAGES[GROUPS == group], norm.get_weights()).mean((1, 2))
        first, dense, second = neck.layers
        x = normalized(normalized(x, first.get_weights()) @ dense.get_weights()[0], second.get_weights())
        np.testing.assert_allclose(found[GROUPS == group], x, rtol=1e-3, atol=1e-3)
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
