"""A recipe as one of several processes: `in_process.py RECIPE FOLDER ARGUMENTS...`. What its job returns, and the sites
of its part of each batch of two epochs, go to `PROCESS.json` in the folder, with whether the third epoch follows in the
data that it trained on. On TensorFlow: one process, two devices."""

import importlib
import json
import os
import sys
from pathlib import Path

import keras

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))


def main(recipe, folder, *arguments):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    job = importlib.import_module(recipe)
    read, trained_on = job.read_records, []

    def noted(*args, **kwargs):
        trained_on.append((args, kwargs, read(*args, **kwargs)))
        return trained_on[-1][-1]

    job.read_records = noted
    metrics = job.main(arguments)
    args, kwargs, fed = trained_on[-1]
    third = read(*args, **{**kwargs, "first_epoch": 2})
    first = [[tensor.numpy() for tensor in keras.tree.flatten(next(iter(data)))] for data in (fed, third)]
    follows = all((one == other).all() for one, other in zip(*first, strict=True))
    data = read(*args, **kwargs, metadata=True, augment=None)
    sites = [[[name.decode() for name in batch[-1]["site_id"].numpy()] for batch in data] for _ in range(2)]
    number = os.environ.get("RANK", "0")
    found = {"metrics": metrics, "sites": sites, "follows": bool(follows)}
    (Path(folder) / f"{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
