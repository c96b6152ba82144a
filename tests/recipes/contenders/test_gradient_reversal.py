import keras
import numpy as np
from contenders.gradient_reversal import reverse_gradient
from keras import ops


class Reversed(keras.layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(3,), initializer="ones")

    def call(self, x):
        return x * reverse_gradient(ops.convert_to_tensor(self.w), 2.0)


def test_the_value_stays_and_the_gradient_turns():
    value = reverse_gradient(ops.convert_to_tensor([1.5, -2.0]), 3.0)
    np.testing.assert_allclose(ops.convert_to_numpy(value), [1.5, -2])
    inputs = keras.Input((3,))
    layer = Reversed()
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(np.ones((4, 3), "float32"), np.zeros((4, 3), "float32"))
    # mse = mean(w^2): gradient 2 w / 3, reversed and doubled.
    np.testing.assert_allclose(ops.convert_to_numpy(layer.w), 1 + 0.1 * 2 * 2 / 3, rtol=1e-5)
