"""One process of a `MultiWorkerMirroredStrategy`: `python -m tests.worker OUT.npz PORT PORT ...`, with RANK set in the
environment; or, with no port, one device. Writes gradients, state, history, scores and predictions."""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_abra import ResumableRun, backend
from tests import replicas as on


def make_strategy(ports):
    if not ports:
        return tf.distribute.get_strategy()
    task = {"type": "worker", "index": int(os.environ["RANK"])}
    workers = [f"localhost:{port}" for port in ports]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    return tf.distribute.MultiWorkerMirroredStrategy()


def build():
    from tests.tiny import tiny_backbone, tiny_model

    return tiny_model("low_rank", backbone=tiny_backbone(dropout=0.0, synchronized=True))


def results(strategy):
    """`{name: array}` of a step on eight samples; scores and logits of eleven."""
    from tests.tiny import tiny_batch

    with pytest.MonkeyPatch.context() as monkeypatch:
        on.draw_by_sample(monkeypatch)
        step = on.train(strategy, build, *tiny_batch(), eagerly=False)
    found = {f"gradient {i}": gradient for i, gradient in enumerate(step.gradients)}
    found.update({f"state {i}": values[0] for i, values in enumerate(step.state)})
    found.update({f"log {name}": values for name, values in step.history.items()})
    if backend.process_count(step.model) > 1:
        run = ResumableRun("unused")
        run.set_model(step.model)
        try:
            run.on_train_begin()
        except ValueError as error:
            print("refused:", error)
    x, y = tiny_batch(11, seed=1)
    scores = step.model.evaluate(on.pipeline(x, y, 8), verbose=0, return_dict=True)
    found.update({f"score {name}": value for name, value in scores.items()})
    found["logits"] = step.model.predict(on.pipeline(x, y, 8), verbose=0)
    return found


if __name__ == "__main__":
    strategy = make_strategy(sys.argv[2:])  # before any operation of TensorFlow
    np.savez(sys.argv[1], **results(strategy))
