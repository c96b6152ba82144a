"""A recipe as one of several processes: `in_process.py RECIPE FOLDER ARGUMENTS...`. What its job returns goes to a file
`PROCESS.json` in the folder. On TensorFlow: one process of two devices."""

import importlib
import json
import os
import sys
from pathlib import Path

import keras

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

if __name__ == "__main__":
    recipe, folder, *arguments = sys.argv[1:]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    metrics = importlib.import_module(recipe).main(arguments)
    number = os.environ.get("RANK", "0")
    (Path(folder) / f"{number}.json").write_text(json.dumps(metrics))
