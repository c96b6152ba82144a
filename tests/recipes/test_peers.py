"""What our step is timed beside computes the same."""

import keras
import numpy as np
import pytest

from keras_abra import ABRAModel
from tests.test_fused_step import train_once
from tests.tiny import tiny_backbone, tiny_batch, tiny_model

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="the peers are written in torch")


def step_of(kind, monkeypatch, structure="diagonal", perturb_after=("stem", "stage1")):
    monkeypatch.setattr("tests.tiny.ABRAModel", kind)
    model = tiny_model(structure, 1, perturb_after, tiny_backbone(dropout=0, regularizer=0))
    return train_once(model, *tiny_batch())


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
def test_the_naive_step_has_our_gradients(structure, everything, monkeypatch):
    from peers import NaiveABRA

    monkeypatch.setattr(NaiveABRA, "everything", everything)
    ours, _, our_logs = step_of(ABRAModel, monkeypatch, structure)
    theirs, _, their_logs = step_of(NaiveABRA, monkeypatch, structure)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
    assert our_logs["gain"] > 0.01
    for name in ("loss", "clean_loss", "perturbed_loss", "alignment", "gain"):
        np.testing.assert_allclose(our_logs[name], their_logs[name], rtol=1e-4, atol=1e-5)


def test_advbn_climbs(monkeypatch):
    from peers import AdvBN

    _, _, logs = step_of(AdvBN, monkeypatch, perturb_after=("stem",))
    assert logs["gain"] > 0.1
