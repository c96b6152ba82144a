"""Trainings of a few steps, the same on one device and on many: `python -m tests.parallel_steps OUT CASE...`.

On torch each process is a replica. On JAX each process feeds its part of a global array, whose rows lie on all devices;
`OUT:DEVICES` keeps to one process, and to the first of its devices.
"""

import contextlib
import importlib
import re
import sys
from pathlib import Path
from unittest import mock

import keras
import numpy as np
from keras import layers, ops

from keras_abra import backend, cut_backbone, uncertainty
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import DistributionAlignment
from tests.recording import RecordingOptimizer
from tests.tiny import CLASSES, mixed, tiny_backbone, tiny_batch, tiny_model

BATCH, TWO = 8, ("stem", "stage1")
CLIP = 0.05  # far below the norm of these gradients
JAX = keras.backend.backend() == "jax"

CASES = {
    "diagonal": lambda **kw: tiny_model("diagonal", 1, TWO, **kw),
    "low_rank": lambda **kw: tiny_model("low_rank", 2, TWO, **kw),
    "domain": lambda **kw: tiny_model("domain", 1, **kw),
    "shared": lambda **kw: tiny_model("diagonal", 2, layer={"shared_by": "experiment"}, **kw),
    "learned": lambda **kw: tiny_model("diagonal", 0, TWO, layer={"learned_scale": True}, **kw),
    "coral": lambda **kw: tiny_model("diagonal", 1, TWO, alignment=two_sided("coral", 30.0 if JAX else 1e4), **kw),
    "mmd": lambda **kw: tiny_model("low_rank", 2, TWO, alignment=two_sided("mmd", 30.0), **kw),
    "dsu": lambda backbone, **kw: tiny_model(perturb_after=(), backbone=with_dsu(backbone), **kw),
    "erm": lambda backbone, **kw: erm(backbone),
    "clipped": lambda **kw: tiny_model(**kw),
    "uneven": lambda **kw: tiny_model(perturb_after=(), **kw),
    "norm": lambda **kw: tiny_model("low_rank", 2, TWO, tiny_backbone(dropout=0.0)),
    "own": lambda **kw: tiny_model(
        "low_rank", 2, TWO, tiny_backbone(dropout=0.0), alignment=own_rows(), layer={"synchronized": False}
    ),
    "noise": lambda **kw: tiny_model(backbone=smooth(dropout=0.5), embedding_dim=None),
}
# Two whole batches; "uneven" ends with one that no two replicas can share evenly; "norm" and "own" are about one step.
SAMPLES = {"uneven": 13, "norm": BATCH, "own": BATCH}
MIXED = ("mmd",)  # labels are shares of the classes there


def smooth(dropout=0.0):
    """As `tiny_backbone`, without batch normalization, which each replica of torch does by itself."""
    l2, activity = keras.regularizers.L2(1e-2), keras.regularizers.L2(1e-3)
    keras.utils.set_random_seed(5)  # dropout without a seed of its own, as users have it

    def block(x, filters, name, seed):
        start = keras.initializers.HeNormal(seed)
        y = layers.Conv2D(filters, 3, padding="same", kernel_initializer=start, kernel_regularizer=l2)(x)
        y = layers.Dropout(dropout)(y)
        return layers.Activation("tanh", name=name, activity_regularizer=activity)(y)

    image = keras.Input((8, 8, 2))
    x = block(image, 3, "stem", 1)
    x = layers.Add(name="stage1")([block(x, 3, "inner", 2), x])
    return keras.Model(image, block(layers.AveragePooling2D(2)(x), 4, "last", 3))


def two_sided(kind, weight):
    return DistributionAlignment(kind, weight=weight, two_sided=True)


def own_rows():
    return DistributionAlignment("mmd", weight=30.0, two_sided=True, synchronized=False)


def with_dsu(backbone):
    first, last = cut_backbone(backbone, ["stem"])
    return keras.Model(backbone.input, last(FeatureStatisticsUncertainty(radius=None, seed=5)(first(backbone.input))))


class PlainModel(backend.Replicated, keras.Model):
    pass


def erm(backbone):
    keras.utils.set_random_seed(3)
    x = layers.GlobalAveragePooling2D()(backbone.output)
    return PlainModel(backbone.input, layers.Dense(CLASSES, kernel_regularizer=keras.regularizers.L2(1e-2))(x))


def part(values, number, processes):
    """The rows of one process: its share of every global batch."""
    batches = [values[i : i + BATCH] for i in range(0, len(values), BATCH)]
    return np.concatenate([np.array_split(batch, processes)[number] for batch in batches])


def injected(number):
    """In place of the replicas' own draws: some that depend on the row of the global batch alone."""

    def draw(self, uncertain, batch):
        columns = uncertain.coordinates
        rows = np.random.default_rng(columns).normal(size=(BATCH, columns)).astype("float32")
        return ops.convert_to_tensor(0.3 * rows[number * batch : (number + 1) * batch])

    return mock.patch.object(FeatureStatisticsUncertainty, "draw", draw)


def run(case, number=0, processes=1):
    """`{name: array}` of gradients, weights, state, logs and predictions after a short training."""
    # On JAX with batch normalization and dropout, which see the global batch there.
    start = {"backbone": tiny_backbone()} if JAX else {"backbone": smooth(), "embedding_dim": None}
    model = CASES[case](**start)
    optimizer = RecordingOptimizer(0.05, global_clipnorm=CLIP if case == "clipped" else None)
    loss = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)} if case == "erm" else {}
    model.compile(optimizer=optimizer, weighted_metrics=["accuracy"], **loss)
    if number and backend.replicas() > 1:  # the weights that count are those of the first process
        model.trainable_variables[0].assign(model.trainable_variables[0] + 1.0)
    samples = SAMPLES.get(case, 2 * BATCH)
    (x, y), weight = tiny_batch(samples), np.linspace(0.2, 1.8, samples, dtype="float32")
    x, y = x if case in ("domain", "shared") else x["image"], mixed(y) if case in MIXED else y
    x, y, weight = (keras.tree.map_structure(lambda a: part(a, number, processes), a) for a in (x, y, weight))
    size = BATCH // processes
    history = model.fit(x, y, sample_weight=weight, batch_size=size, shuffle=False, verbose=0).history
    found = {f"gradient {i}": g for i, g in enumerate(optimizer.recorded())}
    found |= {f"weight {i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(model.trainable_variables)}
    state = [v for v in model.non_trainable_variables if "seed" not in v.path or JAX]
    found |= {f"state {i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(state)}
    found |= {f"log {name}": np.array(values) for name, values in history.items()}
    if case in ("coral", "erm", "uneven"):
        scores = model.evaluate(x, y, sample_weight=weight, batch_size=size, verbose=0, return_dict=True)
        found |= {f"score {name}": np.array(value) for name, value in scores.items()}
        found["predicted"] = model.predict(x, batch_size=size, verbose=0)
    if case == "uneven":
        found["embedded"] = model.embed(x, batch_size=size, verbose=0)
    return {f"{case} {name}": value for name, value in found.items()}


# Mistakes to make, as replacements of a function by what is made of it.


def mistakes():
    step = importlib.import_module("keras_abra.fused_step")
    whole = 2.0 if JAX else 1.0  # instead of the replica's share of it
    mutants = {
        "no mistake": (backend, "replicas", lambda f: f),
        "a penalty counts on each": (step, "_stateless", lambda f: lambda *args: f(*args[:-1], whole)),
    }
    if JAX:  # one array for all: what replicas would do by themselves is done to its first half

        def twice(f):
            return lambda self, u, batch: ops.tile(f(self, u, batch // 2), (2, 1))

        def halves(f):
            return lambda *args: 0.5 * (f(*(a[: BATCH // 2] for a in args)) + f(*(a[BATCH // 2 :] for a in args)))

        def centred_by_half(f):
            return lambda m, _: f(m - ops.repeat(ops.mean(ops.reshape(m, (2, BATCH // 2, -1)), 1), BATCH // 2, 0))

        def means_of_half(f):
            return lambda self, m, experiment: f(self, m[: BATCH // 2], experiment[: BATCH // 2])

        alignment = importlib.import_module("keras_abra.losses.distribution_alignment")._ON_EMBEDDINGS
        return mutants | {
            "a spread is the replica's": (uncertainty, "diagonal", lambda f: lambda m, _: f(m[: BATCH // 2])),
            "noise is shared": (FeatureStatisticsUncertainty, "draw", twice),
            "a covariance is the replica's": (uncertainty, "low_rank", centred_by_half),
            "an alignment is the replica's": (alignment, "coral", halves),
            "running means are the replica's": (FeatureStatisticsUncertainty, "update_means", means_of_half),
        }
    torch = importlib.import_module("keras_abra.backend.torch")

    def clip(values):
        norm = sum(float((v**2).sum()) for v in values if v is not None) ** 0.5
        return [None if v is None else v * min(1.0, CLIP / norm) if norm else v for v in values]

    return mutants | {
        "a mean is the replica's": (step, "_weighted_mean", lambda f: lambda batch, count, w: f(batch, 1.0 * batch, w)),
        "a spread is the replica's": (uncertainty, "diagonal", lambda f: lambda m, _: f(m, False)),
        "a covariance is the replica's": (uncertainty, "low_rank", lambda f: lambda m, _: f(m, False)),
        "an alignment is the replica's": (backend, "global_rows", lambda f: lambda rows: rows),
        "an experiment is the replica's": (backend, "global_rows", lambda f: lambda rows: rows),
        "gradients are the replica's": (torch, "_sum_all", lambda f: lambda values: list(values)),
        "clipping comes first": (torch, "_sum_all", lambda f: lambda values: f(clip(values))),
        "noise is shared": (backend, "fold_in_replica", lambda f: lambda seed: seed),
    }


# The mistake, and a case that must show it.
MUTANTS = {
    "a penalty counts on each": "dsu",
    "a spread is the replica's": "dsu",
    "noise is shared": "dsu" if JAX else "noise",
}
if JAX:
    MUTANTS |= {
        "a covariance is the replica's": "mmd",
        "an alignment is the replica's": "coral",
        "running means are the replica's": "domain",
    }
else:
    MUTANTS |= {
        "a mean is the replica's": "diagonal",
        "a covariance is the replica's": "low_rank",
        "an alignment is the replica's": "coral",
        "an experiment is the replica's": "shared",
        "gradients are the replica's": "erm",
        "clipping comes first": "clipped",
    }


@contextlib.contextmanager
def made(mistake):
    where, name, change = mistakes()[mistake]
    if isinstance(where, dict):
        patch = mock.patch.dict(where, {name: change(where[name])})
    else:
        patch = mock.patch.object(where, name, change(getattr(where, name)))
    with patch:
        yield


def bytes_of_a_step(case):
    """Bytes that a replica of torch hands to `all_reduce` in one training step, and the tensors' sizes."""
    import torch.distributed as dist

    sizes, reduce = [], dist.all_reduce
    model = CASES[case](backbone=smooth(), embedding_dim=None)
    model.compile("sgd", metrics=["accuracy"])
    x, y = tiny_batch(BATCH // 2)
    model.train_on_batch(x["image"], y)
    with mock.patch.object(dist, "all_reduce", lambda t: sizes.append(t.numel() * t.element_size()) or reduce(t)):
        model.train_on_batch(x["image"], y)
    return {f"bytes {case}": np.array(sizes)}


def floats_of_a_step(case):
    """Numbers in each collective operation of one training step on the devices of `DataParallel`, compiled by XLA."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    sys.path.append(str(Path(__file__).parents[1] / "recipes"))
    step_counters = importlib.import_module("step_counters")
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    divided = NamedSharding(mesh, PartitionSpec("batch"))
    model = CASES[case](backbone=smooth(), embedding_dim=None)
    model.compile("sgd", metrics=["accuracy"])
    x, y = tiny_batch(BATCH)
    with mock.patch.object(step_counters, "_to_tensors", lambda values: jax.device_put(values, divided)):
        text = step_counters.compile_jax_step(model, x["image"], y).as_text()
    operations = re.findall(r"= (.*) (?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    shapes = [re.findall(r"\w+\[([\d,]*)\]", found) for found in operations]
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for found in shapes for shape in found]
    return {f"floats {case}": np.array(sizes, int)}


def on_torch(file, cases):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    number, processes, found = dist.get_rank(), dist.get_world_size(), {}
    layer = FeatureStatisticsUncertainty(seed=1)
    uncertain = layer.uncertainty(ops.convert_to_tensor(np.random.default_rng(0).normal(size=(4, 6)).astype("float32")))
    found["draw"] = keras.ops.convert_to_numpy(layer.draw(uncertain, 4))
    for case in cases:
        name, _, mistake = case.partition("/")
        with contextlib.nullcontext() if name == "noise" else injected(number), made(mistake or "no mistake"):
            found |= {f"{case} {k.partition(' ')[2]}": v for k, v in run(name, number, processes).items()}
    for case in ("diagonal", "uneven"):
        found |= bytes_of_a_step(case)
    np.savez(file, **found)


def on_jax(file, cases):
    import jax

    number, processes = 0, 1
    file, _, devices = file.partition(":")
    if not devices:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize()
        number, processes = jax.process_index(), jax.process_count()
    names = keras.distribution.list_devices()[: int(devices) if devices else None]
    together = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    keras.distribution.set_distribution(together)
    found = {}
    for case in cases:
        name, _, mistake = case.partition("/")
        with made(mistake or "no mistake"):
            found |= {f"{case} {k.partition(' ')[2]}": v for k, v in run(name, number, processes).items()}
    if devices.startswith("2"):
        found |= refusals()
        for case in ("diagonal", "uneven"):
            found |= floats_of_a_step(case)
    np.savez(file, **found)


def refusals():
    """What is said of batches that do not divide among two devices."""
    import tensorflow as tf

    model, (x, y) = tiny_model(), tiny_batch(15)
    model.compile("sgd", metrics=["accuracy"])
    x, said = x["image"], {}
    uneven = tf.data.Dataset.from_tensor_slices((x[:5], y[:5])).batch(4)
    attempts = {
        "fit": lambda: model.fit(x, y, batch_size=8, verbose=0),
        "validation": lambda: model.fit(x[:8], y[:8], validation_data=(x[:3], y[:3]), verbose=0),
        "evaluate": lambda: model.evaluate(x, y, batch_size=4, verbose=0),
        "predict": lambda: model.predict(x, batch_size=4, verbose=0),
        "embed": lambda: model.embed(x, batch_size=5),
        "fixed": lambda: model.evaluate(uneven.unbatch().batch(5, drop_remainder=True), verbose=0),
        "pipeline": lambda: model.evaluate(uneven, verbose=0),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            said[f"refused {name}"] = str(error)
    return said


def main(*arguments):
    """Results in a file, several times over: `OUT CASE... -- OUT CASE...`."""
    while arguments:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        (on_jax if JAX else on_torch)(arguments[0], arguments[1:end])
        arguments = arguments[end + 1 :]


if __name__ == "__main__":
    main(*sys.argv[1:])
