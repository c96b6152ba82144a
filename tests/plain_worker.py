"""Where `fit` of a plain Keras model fails under `MultiWorkerMirroredStrategy`, as small as it gets. Start together

    RANK=0 KERAS_BACKEND=tensorflow python -m tests.plain_worker PORT PORT
    RANK=1 KERAS_BACKEND=tensorflow python -m tests.plain_worker PORT PORT

Prints two lines: what stops Keras (3.15) when it builds the model by a batch, which it reduces over the workers as one
tuple; and, that step left out, what stops it when it reduces the logs over axis 0, which scalars do not have.
"""

import sys

import keras
import numpy as np

from tests.replicas import pipeline
from tests.worker import make_strategy


def attempt(model, data):
    try:
        print("trained:", model.fit(data, verbose=0).history)
    except Exception as error:
        print(type(error).__name__, str(error).replace("\n", " "))


if __name__ == "__main__":
    strategy = make_strategy(sys.argv[1:])
    with strategy.scope():
        image = keras.Input((4,))
        model = keras.Model(image, keras.layers.Dense(2)(image))
        model.compile("sgd", "mse")
    data = pipeline(np.zeros((8, 4), "float32"), np.zeros((8, 2), "float32"), 4)
    attempt(model, data)
    model._maybe_symbolic_build = lambda *args, **kwargs: None
    attempt(model, data)
