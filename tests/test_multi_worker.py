"""Processes of a `MultiWorkerMirroredStrategy` take the step of one device."""

import keras
import numpy as np
import pytest

from tests import replicas as on
from tests import worker
from tests.processes import free_port, run_together

if keras.backend.backend() != "tensorflow":
    pytest.skip("MultiWorkerMirroredStrategy is TensorFlow's", allow_module_level=True)


@pytest.mark.parametrize("number", [1, 2])
def test_processes_take_the_step_of_one_device(number, tmp_path):
    ports = [free_port() for _ in range(number)]
    files = [tmp_path / f"{rank}.npz" for rank in range(number)]
    codes, texts = run_together([["-m", "tests.worker", file, *ports] for file in files])
    assert codes == [0] * number, "\n".join(text[-2000:] for text in texts)
    for text in texts:
        assert ("refused: A ResumableRun does not work with the several processes" in text) == (number == 2)
    expected = worker.results(worker.make_strategy([]))
    names = [name for name in expected if name.startswith("gradient")]
    for found in map(np.load, files):
        assert sorted(found.files) == sorted(expected)
        assert on.distance([found[name] for name in names], [expected[name] for name in names]) <= 1e-4
        for name in set(expected) - set(names):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_keras_own_fit_cannot_and_here_is_why():
    """When this fails, Keras can: the README's section on several machines says it cannot."""
    ports = [free_port() for _ in range(2)]
    codes, texts = run_together([["-m", "tests.plain_worker", *ports]] * 2)
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    for text in texts:
        assert "Attempt to convert a value (PerReplica" in text and "Invalid reduction dimension 0" in text
        assert "trained:" not in text
