"""Given the same weights, batch and starting perturbation, this backend takes the step that TensorFlow takes."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_abra.layers import FeatureStatisticsUncertainty
from tests import agreement


def test_losses_gradients_and_state_agree_with_tensorflow(tmp_path, monkeypatch):
    if keras.backend.backend() == "tensorflow":
        pytest.skip("the other backends are compared with TensorFlow")
    file = tmp_path / "tensorflow.npz"
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-m", "tests.agreement", str(file)]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True, capture_output=True)
    monkeypatch.setattr(FeatureStatisticsUncertainty, "draw", FeatureStatisticsUncertainty.draw)  # put back afterwards
    ours, theirs = agreement.results(), np.load(file)
    assert sorted(ours) == sorted(theirs.files)
    for case in {name.split()[0] for name in ours}:
        whole = np.sqrt(sum(np.sum(theirs[n] ** 2) for n in ours if n.startswith(f"{case} gradient")))
        for name in (n for n in ours if n.startswith(f"{case} ")):
            floor = 1e-3 * whole if " gradient " in name else 1e-2
            difference = np.linalg.norm(ours[name] - theirs[name])
            assert difference <= 1e-4 * max(np.linalg.norm(theirs[name]), floor), name
