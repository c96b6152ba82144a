"""Which devices and processes a job runs on: `--distribution`.

| choice | backend | what it is |
|---|---|---|
| none | each | one device |
| mirrored | TensorFlow | `MirroredStrategy` on all GPUs of this machine |
| data_parallel | JAX | `keras.distribution.DataParallel` on all devices, of all processes |
| data_parallel | torch | a replica in each process that `torchrun` started |
| auto | each | the one of these for which there is more than one device or process |

Several processes of JAX are told of each other by KERAS_DISTRIBUTION_JOB_ADDRESSES (host:port of the first),
KERAS_DISTRIBUTION_NUM_PROCESSES and KERAS_DISTRIBUTION_PROCESS_ID, as `keras.distribution.initialize` takes them. They
and torchrun's processes run the same command, on one machine or several that share the folder of records and the output
folder. The first prints and writes; what the others would write goes to a temporary folder that is removed.
"""

import atexit
import contextlib
import datetime
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_abra import backend
from tfrecords.devices import leave_gpu_to_backend

CHOICES = ("auto", "none", "mirrored", "data_parallel")
LONGEST_WAIT = datetime.timedelta(days=7)  # for the first process, which builds the records
_turns = itertools.count()


class Distribution(NamedTuple):
    """Where a job runs.

    Attributes:
        kind: "none", "mirrored" or "data_parallel".
        devices: names of all devices.
        process: number of this process, from 0.
        processes: how many there are.
        strategy: TensorFlow's, or None.
    """

    kind: str
    devices: list
    process: int = 0
    processes: int = 1
    strategy: Any = None

    @property
    def replicas(self):
        """Parts that each batch is divided into."""
        return 1 if self.kind == "none" else len(self.devices)

    @property
    def worker(self):
        """`worker` of `read_records`: the part of each batch that this process reads."""
        return self.process, self.processes

    def scope(self):
        """Context in which the model is built and compiled."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def accuracy(self):
        """Accuracy as an argument of `compile`: where batches are filled up to divide, filling has weight 0."""
        return {"metrics" if self.replicas == 1 else "weighted_metrics": ["accuracy"]}

    def evaluation(self, options):
        """Options of `read_records` for what is evaluated and predicted, from those of training."""
        return options | {"pad": True} if self.replicas > 1 else options

    def say(self, batch_size):
        """Prints devices, replicas and batch.

        Raises:
            ValueError: if the batch does not divide among the replicas.
        """
        if batch_size % self.replicas:
            lower = batch_size // self.replicas * self.replicas
            raise ValueError(
                f"--batch-size {batch_size} is over all devices and does not divide among {self.replicas} replicas. "
                f"Choose a multiple of {self.replicas}, such as {lower or lower + self.replicas}."
            )
        parts = [f"{self.kind if self.replicas > 1 else 'one device'}: {', '.join(self.devices)}"]
        if self.processes > 1:
            parts.append(f"{self.processes} processes")
        if self.replicas > 1:
            parts.append(f"{self.replicas} replicas, {batch_size // self.replicas} samples of each batch to one")
        print("; ".join([*parts, f"batch {batch_size}"]), flush=True)

    def output(self, make):
        """The output folder that `make()` gives in the first process, a temporary one in the others."""
        if self.process == 0:
            return self.first(make)
        self.first(make)
        folder = Path(tempfile.mkdtemp(prefix="process-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def first(self, function):
        """What `function()` gives in the first process, told to all (text, numbers, None and lists of them; a path
        comes as text). The others wait for it; if it fails there, all end."""
        if self.processes == 1:
            return function()
        if self.process == 0:
            try:
                result = function()
            except BaseException:
                self._tell({"failed": True})
                raise
            self._tell({"result": result})
            return result
        told = self._tell(None)
        if "failed" in told:
            raise SystemExit(1)  # the first process says why
        return told["result"]

    def wait(self):
        """Returns when all processes have come here."""
        backend.wait_for_processes()

    def _tell(self, message):
        text = json.dumps(message, default=str)
        if keras.backend.backend() == "torch":
            from torch.distributed import broadcast_object_list

            from keras_abra.backend.torch import host_group

            box = [text]
            broadcast_object_list(box, src=0, group=host_group())
            return json.loads(box[0])
        # Not by a collective operation of the devices: those give up long before the records are built.
        from jax._src.distributed import global_state

        key = f"recipe/{next(_turns)}"
        if self.process == 0:
            global_state.client.key_value_set(key, text)
            return message
        return json.loads(global_state.client.blocking_key_value_get(key, int(LONGEST_WAIT.total_seconds() * 1000)))


def add_option(parser):
    parser.add_argument(
        "--distribution", choices=CHOICES, default="auto", help="devices to train on, see recipes/distribution.py"
    )


def distribute(choice):
    """Sets up what `--distribution` asks for, before anything is computed; a `Distribution`.

    Raises:
        ValueError: if this backend does not have the choice, or processes were started that it does not use.
    """
    name = keras.backend.backend()
    has = {"tensorflow": "mirrored", "jax": "data_parallel", "torch": "data_parallel"}[name]
    if choice not in ("auto", "none", has):
        raise ValueError(f"--distribution {choice}: {name} has {has}. Choose that, auto or none.")
    leave_gpu_to_backend()
    processes = started(name)
    if processes > 1 and (choice == "none" or name == "tensorflow"):
        raise ValueError(
            f"--distribution {choice}: {processes} processes were started, and each would do the whole job. Start one, "
            "or take --distribution data_parallel on JAX (KERAS_DISTRIBUTION_*) or torch (torchrun)."
        )
    if choice == "none":
        return Distribution("none", [_device()])
    found = {"tensorflow": _mirrored, "jax": _jax, "torch": _torch}[name](choice, processes)
    if choice != "auto" and found.replicas == 1:
        print(f"--distribution {choice}: there is one device only, and nothing to distribute.")
    if found.process:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return found


def started(name):
    """How many processes were started for this job, by torchrun or for JAX."""
    variable = {"jax": "KERAS_DISTRIBUTION_NUM_PROCESSES"}.get(name, "WORLD_SIZE")
    return int(os.environ.get(variable, 1))


def _device():
    match keras.backend.backend():
        case "tensorflow":
            return (tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU"))[0].name
        case "jax":
            return keras.distribution.list_devices()[0]
    return str(keras.ops.zeros(()).device)


def _mirrored(choice, started):
    devices = tf.config.list_logical_devices("GPU")
    if not devices and choice == "mirrored":
        devices = tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        return Distribution("none", [_device()])
    names = [device.name for device in devices]
    return Distribution("mirrored", names, strategy=tf.distribute.MirroredStrategy(names))


def _jax(choice, started):
    import jax

    if started > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX has set one that does not end the process
    devices = keras.distribution.list_devices()
    if len(devices) < 2:
        return Distribution("none", devices)
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
    return Distribution("data_parallel", devices, jax.process_index(), jax.process_count())


def _torch(choice, started):
    if started == 1:
        return Distribution("none", [_device()])
    import torch
    import torch.distributed as dist

    from keras_abra.backend.torch import host_group

    asked = os.environ.get("KERAS_TORCH_DEVICE", "cuda")
    if torch.cuda.is_available() and asked.startswith("cuda"):
        torch.cuda.set_device(_own_gpu(asked, torch.cuda.device_count()))
        dist.init_process_group("nccl")  # its own timeout: a process that fails must not be waited for
    else:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
        atexit.register(dist.destroy_process_group)
    devices = [None] * started
    dist.all_gather_object(devices, f"{_device()} of process {dist.get_rank()}", group=host_group())
    return Distribution("data_parallel", devices, dist.get_rank(), started)


def _own_gpu(asked, count):
    """The number of this process's GPU, out of `count` that it sees; `asked`: the device that Keras is to take."""
    if asked != "cuda":
        raise ValueError(
            f"KERAS_TORCH_DEVICE={asked}: each of several processes takes a GPU of its own. Set cuda, or nothing."
        )
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("WORLD_SIZE is set and LOCAL_RANK is not, which says the GPU of a process. Start by torchrun.")
    place = int(os.environ["LOCAL_RANK"])
    if place >= count:
        raise ValueError(
            f"torchrun started process {place} on a machine of {count} GPUs: one process for each, which sees them all."
        )
    return place


def leave():
    """Ends what `distribute` set up, when a job has ended well: after an error NCCL would wait here for processes that
    wait for this one."""
    if keras.backend.backend() == "torch" and started("torch") > 1:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.destroy_process_group()


class ProcessModel(backend.Replicated, keras.Model):
    """A plain Functional model that several processes train and use together."""


def functional(inputs, outputs):
    """A Functional model that trains on whatever `distribute` has set up."""
    together = backend.replicas() > 1  # torch's processes
    if keras.backend.backend() == "jax":
        import jax

        together = jax.process_count() > 1
    return (ProcessModel if together else keras.Model)(inputs, outputs)


def as_saved(model):
    """The model in the class that is saved: what a process needs to train is not for those who load it."""
    if not isinstance(model, ProcessModel):
        return model
    plain = keras.Model(model.inputs, model.outputs)
    plain.compile(optimizer=model.optimizer, loss=model.loss, metrics=["accuracy"])
    return plain
