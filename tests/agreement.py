"""One step from fixed weights, batch and starting perturbation: `python -m tests.agreement OUT.npz` on any backend."""

import sys

import keras
import numpy as np
from keras import ops

from keras_abra.layers import FeatureStatisticsUncertainty
from tests.recording import RecordingOptimizer
from tests.tiny import tiny_backbone, tiny_batch, tiny_model

CASES = [("diagonal", 1), ("low_rank", 3), ("domain", 1)]


def start(self, uncertain, batch):
    """In place of the random draw: the backends' random numbers differ."""
    columns = uncertain.coordinates
    random = np.random.default_rng(columns)
    return ops.convert_to_tensor(0.3 * random.normal(size=(batch, columns)).astype("float32"))


def results():
    """`{name: array}` of gradients, new state and losses."""
    FeatureStatisticsUncertainty.draw = start
    found = {}
    for structure, steps in CASES:
        model = tiny_model(structure, steps, ("stem", "stage1"), backbone=tiny_backbone(dropout=0.0))
        random = np.random.default_rng(0)
        for v in model.trainable_variables:
            start_at = 1.0 if v.path.endswith("gamma") else 0.0  # the initializers' random numbers differ as well
            v.assign(start_at + 0.4 * random.normal(size=v.shape).astype("float32"))
        optimizer = RecordingOptimizer()
        model.compile(optimizer=optimizer, run_eagerly=True)
        x, y = tiny_batch()
        model.train_on_batch(x, y)  # the second step has running means of experiments
        logs = model.train_on_batch(x, y, return_dict=True)
        case = f"{structure}-{steps}"
        for i, g in enumerate(optimizer.recorded()):
            found[f"{case} gradient {i}"] = g
        for i, v in enumerate(v for v in model.non_trainable_variables if "seed" not in v.path):
            found[f"{case} state {i}"] = keras.ops.convert_to_numpy(v)
        found.update({f"{case} {name}": np.float32(value) for name, value in logs.items()})
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
