"""Measure what ABRA's training step costs here, beside plain training of the same network, and (`input`) reading.

    python recipes/benchmark.py input                       # see benchmark_input.py
    python recipes/benchmark.py step                        # ResNet-50, 64 px, batch 16, on the current backend
    KERAS_BACKEND=jax python recipes/benchmark.py step --image-size 256 --batch-size 72 --dtype-policy mixed_bfloat16

For each place of the first perturbation: f (share of the compute behind it), the bound 1 + f, and the ratio ABRA / ERM
of floating-point operations of the compiled step, of time, and of peak memory; for torch also naive ways to write the
step. Time is taken in one process, models in turn, as the median of paired blocks: of `fit` with some steps less `fit`
with one, so that what a call of `fit` costs by itself counts nowhere; processor time, or, where there is a GPU, wall
time, on JAX and torch with the images on it. The last line of the output is JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory is measured by a second process
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import benchmark_input
import keras
import numpy as np
from backbones import tiny_resnet
from peak_memory import accelerator, peak_memory
from step_counters import compile_jax_step, count_predict_flops, count_train_flops

from keras_abra import ABRAModel, suffix_share
from keras_abra.layers import FeatureStatisticsUncertainty

CLASSES = 1108
CUTS = {
    "ResNet50": ["conv1_relu", "conv2_block3_out", "conv3_block4_out", "conv4_block6_out"],
    "tiny_resnet": ["stem", "stage1", "stage2"],
}


class Shift(keras.layers.Layer):
    """A weight in front of the suffix: its training step has a gradient at the input, as in the whole network."""

    def build(self, shape):
        self.shift = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, inputs):
        return inputs + self.shift


class Bench:
    """Models of one backbone, and batches for them."""

    def __init__(self, args):
        self.args = args
        self.shape = (args.image_size, args.image_size, args.channels)

    def backbone(self):
        if self.args.backbone == "tiny_resnet":
            return tiny_resnet(self.shape)
        build = getattr(keras.applications, self.args.backbone)
        return build(include_top=False, weights=None, input_shape=self.shape)

    def abra(self, perturb_after, steps=1, kind=ABRAModel, optimizer=None):
        keras.utils.set_random_seed(0)
        uncertainty = FeatureStatisticsUncertainty("diagonal", steps=steps, seed=0)
        model = kind(self.backbone(), CLASSES, perturb_after, uncertainty=uncertainty, warmup=0)
        model.compile(optimizer=optimizer or keras.optimizers.SGD(0.01), metrics=["accuracy"])
        return model

    def plain(self, perturb_after=(), start=0, optimizer=None):
        """The same network under Keras's own step; with DSU after stages, or only the part from `start` on."""
        keras.utils.set_random_seed(0)
        base = ABRAModel(self.backbone(), CLASSES, perturb_after)
        parts = base.backbone_parts[start:]
        shape = base.backbone.get_layer(perturb_after[start - 1]).output.shape[1:] if start else self.shape
        image = keras.Input(shape)
        x = parts[0](Shift()(image) if start else image)
        for part in parts[1:]:
            x = part(x if start else FeatureStatisticsUncertainty(radius=None, probability=0.5)(x))
        x = base.head(base.neck(keras.layers.GlobalAveragePooling2D()(x)))
        model = keras.Model(image, x * base.loss_function.scale)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer or keras.optimizers.SGD(0.01), loss=loss, metrics=["accuracy"])
        return model

    def data(self, model, count):
        random = np.random.default_rng(0)
        shape = getattr(model, "backbone", model).inputs[0].shape[1:]
        images = random.standard_normal((count, *shape), "float32")
        return images, random.integers(0, CLASSES, count).astype("int32")


def main(argv=None):
    args = parse(argv)
    if args.what == "input":
        return benchmark_input.main(args)
    keras.config.set_dtype_policy(args.dtype_policy)
    bench = Bench(args)
    backend = keras.backend.backend()
    padding_taps = backend != "jax"
    cuts = args.perturb_after or CUTS[args.backbone]
    plans = [{"perturb_after": [cut], "steps": 1} for cut in cuts]
    if len(cuts) > 1:
        plans += [{"perturb_after": cuts[:2], "steps": 1}, {"perturb_after": cuts[1:2], "steps": 2}]
    plans.append({"perturb_after": cuts[1:2] or cuts, "steps": 0})  # the package's default

    erm, dsu = bench.plain(), bench.plain(cuts[:2])
    one = bench.data(erm, args.batch_size)
    erm_flops, compile_time = count(erm, one), compile_seconds(erm, one)
    models = [bench.abra(**plan) for plan in plans]
    rows = []
    for plan, model in zip(plans, models, strict=True):
        f = suffix_share(model, padding_taps)
        row = {**plan, "f": f, "f_time": None, "bound": 1 + f * (1 + 2 / 3 * max(plan["steps"] - 1, 0))}
        row["flops_ratio"] = count(model, one) / erm_flops
        if compile_time:
            row["compile_ratio"] = compile_seconds(model, one) / compile_time
        rows.append(row)
        print(f"counted {plan}: {row['flops_ratio']:.3f}", file=sys.stderr, flush=True)
    others = {"method": "dsu", "perturb_after": cuts[:2], "flops_ratio": count(dsu, one) / erm_flops}
    predicted = [count(model, one[:1], count_predict_flops) for model in (models[0], erm)]
    inference = {"flops_ratio": predicted[0] / predicted[1]}

    peers = peer_models(bench, cuts) if backend == "torch" and len(cuts) > 1 else {}
    suffixes = {cut: bench.plain([cut], start=1) for cut in cuts}
    timed = {"erm": erm, "dsu": dsu}
    timed |= {f"abra {i}": model for i, model in enumerate(models)}
    timed |= {f"suffix {cut}": model for cut, model in suffixes.items()} | peers
    times, erm_seconds = time_fit(bench, timed, args)
    for i, row in enumerate(rows):
        row["f_time"] = times[f"suffix {row['perturb_after'][0]}"][0]
        row["time_ratio"], row["time_spread"] = times[f"abra {i}"]
    others["time_ratio"], others["time_spread"] = times["dsu"]
    inference["time_ratio"], inference["time_spread"] = time_predict(bench, erm, models[0], args)

    if args.memory_batch_size:
        plain = memory(args, {"kind": "plain"})
        for row, plan in zip(rows, plans, strict=True):
            row["memory_ratio"] = memory(args, {"kind": "abra", **plan}) / plain
    table = {
        "backend": backend,
        "device": accelerator() or "cpu",
        "setting": vars(args),
        "erm_flops": erm_flops,
        "erm_seconds": erm_seconds,
        "rows": rows,
        "others": [others],
        "inference": inference,
        "peers": peer_rows(peers, times, times["abra 1"][0] if peers else 1, rows),
    }
    show(table)
    print(json.dumps(json.loads(json.dumps(table), parse_constant=lambda nan: None)))


def parse(argv):
    whole = parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = parser.add_subparsers(dest="what", required=True)
    benchmark_input.add_arguments(whats.add_parser("input", help="reading and building records"))
    parser = whats.add_parser("step", help="the training step")
    parser.add_argument("--backbone", default="ResNet50", help="a model of keras.applications, or tiny_resnet")
    parser.add_argument("--perturb-after", nargs="+", metavar="LAYER", help="places, one row each")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype-policy", default="float32", help="float32, mixed_bfloat16 or mixed_float16")
    parser.add_argument("--blocks", type=int, default=11, help="paired blocks that medians are taken over")
    parser.add_argument("--steps", type=int, help="training steps a block (default: 4; with a GPU 10)")
    parser.add_argument("--memory-batch-size", type=int, default=64, help="0: memory is not measured")
    args = whole.parse_args(argv)
    if args.what == "step" and args.steps is None:
        args.steps = 10 if accelerator() else 4
    if args.what == "step" and args.backbone not in CUTS and not args.perturb_after:
        parser.error(f"--perturb-after is needed for {args.backbone}")
    return args


def count(model, data, counted=count_train_flops):
    """Operations; NaN where XLA hands its convolutions to a GPU's library, as its count then lacks them."""
    if keras.backend.backend() == "jax" and accelerator():
        return float("nan")
    return counted(model, *data)


def compile_seconds(model, data):
    """Processor time that JAX needs to trace and compile a training step; None on the others, and with a GPU, where
    most of it is trial runs of the kernels."""
    if keras.backend.backend() != "jax" or accelerator():
        return None
    import jax

    seconds = []
    for _ in range(3):
        jax.clear_caches()
        start = time.process_time()
        compile_jax_step(model, *data)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def peer_models(bench, cuts):
    from peers import AdvBN, NaiveABRA

    class SearchWithFullBackward(NaiveABRA):
        everything = True

    kinds = {"naive, search with full backward": SearchWithFullBackward}
    kinds |= {"naive, search to the perturbation": NaiveABRA, "AdvBN, 6 sign steps": AdvBN}
    return {name: bench.abra(cuts[1:2], kind=kind) for name, kind in kinds.items()}


def peer_rows(peers, times, ours, rows):
    f = rows[1]["f"] if peers else None
    bounds = {"naive, search to the perturbation": lambda: (1 + f) / (2 + (1 + f) / 3)}
    return [
        {
            "name": name,
            "perturb_after": rows[1]["perturb_after"],
            "time_ratio": times[name][0],
            "time_spread": times[name][1],
            "ours_to_theirs": ours / times[name][0],
            "theory": bounds[name]() if name in bounds else None,
        }
        for name in peers
    ]


def clock():
    return time.perf_counter() if accelerator() else time.process_time()


class BatchesOnDevice(keras.utils.PyDataset):
    """Batches that Keras takes as they are: arrays on a GPU it would bring to the host first, on JAX."""

    def __init__(self, data, batch_size):
        super().__init__()
        slices = [slice(i, i + batch_size) for i in range(0, len(data[0]), batch_size)]
        self.batches = [tuple(keras.ops.convert_to_tensor(array[part]) for array in data) for part in slices]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def inputs(data, batch_size):
    """What `fit` and `predict` are given: of JAX and torch with a GPU batches that are there, so that what is timed is
    the step and not the way to it."""
    if accelerator() and keras.backend.backend() != "tensorflow":
        return {"x": BatchesOnDevice(data, batch_size)}
    return dict(zip("xy", data, strict=False)) | {"batch_size": batch_size}


def short_and_long(bench, model, args, parts=None):
    """One batch for `fit`, and `steps` more; of `parts` the images alone, for `predict`."""
    data = bench.data(model, args.batch_size * (args.steps + 1))[:parts]
    return [inputs([array[:count] for array in data], args.batch_size) for count in (args.batch_size, None)]


def difference(function, batches):
    """Seconds that the long data take more than the short."""
    seconds = []
    for one in batches:
        start = clock()
        function(one)
        seconds.append(clock() - start)
    return seconds[1] - seconds[0]


def time_fit(bench, models, args):
    """Median and quartiles, over blocks, of each model's time in units of ERM's in the same block; and ERM's seconds a
    step."""
    data = {name: short_and_long(bench, model, args) for name, model in models.items()}

    def run(name):
        return difference(lambda batches: models[name].fit(**batches, shuffle=False, verbose=0), data[name])

    for name in models:  # traces and compiles
        run(name), run(name)
    ratios, every = {name: [] for name in models}, []
    names = [name for name in models if name != "erm"]
    for block in range(args.blocks):
        plain = [run("erm")]
        seconds = {}
        for i, name in enumerate(np.roll(names, block)):
            seconds[str(name)] = run(str(name))
            if i % 4 == 3:
                plain.append(run("erm"))
        plain.append(run("erm"))
        for name, value in seconds.items():
            ratios[name].append(value / statistics.median(plain))
        every += plain
        print(f"block {block + 1} of {args.blocks}", file=sys.stderr, flush=True)
    return {name: summary(values) for name, values in ratios.items() if values}, statistics.median(every) / args.steps


def time_predict(bench, erm, model, args):
    images = short_and_long(bench, erm, args, parts=1)

    def run(one):
        return difference(lambda batches: one.predict(**batches, verbose=0), images)

    for one in (erm, model, erm, model):
        run(one)
    return summary([run(model) / statistics.mean([run(erm), run(erm)]) for _ in range(2 * args.blocks)])


def summary(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, [low, high]


def memory(args, plan):
    """Peak memory of the training step, bytes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure_memory, (args, plan))


def measure_memory(args, plan):
    keras.config.set_dtype_policy(args.dtype_policy)

    def build():
        bench, adam = Bench(args), keras.optimizers.Adam(1e-3)
        plain = plan["kind"] == "plain"
        model = (
            bench.plain(optimizer=adam) if plain else bench.abra(plan["perturb_after"], plan["steps"], optimizer=adam)
        )
        return model, bench.data(model, args.memory_batch_size)

    return peak_memory(build)


def show(table):
    print(f"{table['backend']} on {table['device']}: ratios to ERM, the same network under Keras's own step")
    print(f"ERM: {table['erm_seconds']:.3f} s a step, {table['erm_flops']:.3g} operations")
    print(f"{'perturbed after':<36} K     f  f_time  bound  FLOPs   time  [quartiles]    memory")
    for row in table["rows"]:
        low, high = row["time_spread"]
        counted = f"{row['f']:.3f}  {row['f_time']:.3f}   {row['bound']:.3f}  {row['flops_ratio']:.3f}"
        timed = f"{row['time_ratio']:.3f}  [{low:.3f}-{high:.3f}]  {row.get('memory_ratio', float('nan')):.3f}"
        print(f"{' + '.join(row['perturb_after']):<36} {row['steps']} {counted}  {timed}")
    for row in table["others"]:
        print(f"dsu: FLOPs {row['flops_ratio']:.3f}, time {row['time_ratio']:.3f}")
    print(f"predict: FLOPs {table['inference']['flops_ratio']:.3f}, time {table['inference']['time_ratio']:.3f}")
    for row in table["peers"]:
        print(f"{row['name']}: time {row['time_ratio']:.3f}; ours / theirs {row['ours_to_theirs']:.3f}")


if __name__ == "__main__":
    main()
