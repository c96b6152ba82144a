import gc
import os
import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]  # replicas to test MirroredStrategy with
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)


def pytest_collection_modifyitems(items):
    for item in items:
        if keras.backend.backend() != "tensorflow" and item.get_closest_marker("any_backend"):
            item.add_marker(pytest.mark.skip(reason="the same on every backend: run on TensorFlow"))


@pytest.fixture(autouse=True, scope="module")
def leave_out_what_stays():
    """Keras and KerasTuner collect garbage at each model, and what imports and other modules keep takes long
    to look through: from here on it is not looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def eager():
    """TensorFlow runs steps as they are written: to trace one takes longer than to run ten, and here are few."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="session")
def rxrx1_sample():
    """Folder of real RxRx1 files, which may not be in this repository."""
    folder = os.environ.get("RXRX1_SAMPLE")
    if not folder:
        pytest.skip("RXRX1_SAMPLE does not name a folder of real RxRx1 files")
    return Path(folder)
