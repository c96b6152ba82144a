"""Measure how fast sites reach the model, beside other ways; how fast records are built; what memory it takes.

    python recipes/benchmark.py input                          # synthetic sites, WILDS's and RxRx1's shape
    RXRX1_SAMPLE=data python recipes/benchmark.py input        # the pixels of real sites

Every way delivers the same: shuffled, augmented, standardized float32 batches of the same pixels, from a warm page
cache, on the same cores. Ways take turns; figures are medians over repetitions, in sites a second of wall time and of
processor time, and the ratio to our raw records within a repetition. The bound is NumPy: it reads the same records,
checks the same checksums and standardizes, and neither shuffles nor augments. Each pass starts its pipeline anew (ours:
about 0.25 s of processor time), which weighs more here than in a real epoch of 40,612 sites.
The last line of the output is JSON. results/input_speed.md has figures.
"""

import functools
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from tfrecords import (
    augment,
    build_records,
    keep_freed_memory,
    keep_tensorflow_off_gpu,
    read_manifest,
    read_records,
    standardize,
)
from tfrecords.frames import read_frames
from tfrecords.listing import KINDS
from tfrecords.screen_layout import layout
from tfrecords.synthetic import draw_site

SHAPES = {"wilds": (256, 3), "rxrx1": (512, 6)}
DISTINCT = 12  # sites that are drawn; the others repeat their pixels in files of their own
TREATMENTS = 1108
MEMORY_BATCH = 16
EXPERIMENTS = {"train": {"HUVEC": 2, "RPE": 1, "HEPG2": 1}}


def add_arguments(parser):
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument(
        "--sites", type=int, default=2048, help="of WILDS's shape; a quarter of RxRx1's (default: 2048)"
    )
    parser.add_argument("--batch-size", type=int, default=72)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one, removed at the end)")
    parser.add_argument(
        "--keep-memory", action="store_true", help="tfrecords.keep_freed_memory, for all ways of reading and building"
    )
    parser.add_argument("--parts", nargs="+", choices=("read", "build", "memory"), default=["read", "build", "memory"])


def main(args):
    keep_tensorflow_off_gpu()
    if args.keep_memory and not keep_freed_memory():
        raise ValueError("--keep-memory: there is no glibc here.")
    cores = len(os.sched_getaffinity(0))
    table = {
        "cores": cores,
        "keep_memory": args.keep_memory,
        "pixels": "RXRX1_SAMPLE" if "RXRX1_SAMPLE" in os.environ else "synthetic",
        "shapes": {},
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        pool = draw_pool()
        for shape in args.shapes:
            sites = args.sites if shape == "wilds" else args.sites // 4
            case = Case(Path(folder) / shape, pool, *SHAPES[shape], sites, args.batch_size, cores)
            row = table["shapes"][shape] = {"sites": sites}
            if "build" in args.parts:
                row["build"] = measure_build(case, args.repetitions)
                show(f"{shape}: build, {sites} sites", row["build"])
            if "read" in args.parts:
                row["read"] = measure_read(case, args.repetitions)
                show(f"{shape}: read, {sites} sites", row["read"])
            shutil.rmtree(case.folder)
        if "memory" in args.parts:
            table["memory"] = measure_memory(Path(folder), pool, max(args.sites // 16, MEMORY_BATCH))
            show("memory, MB at the peak", table["memory"])
    print(json.dumps(table))


def draw_pool():
    """Pixels of a few sites, uint8 `(6, 512, 512)`: real ones if there are, else synthetic."""
    if "RXRX1_SAMPLE" in os.environ:
        folder = Path(os.environ["RXRX1_SAMPLE"], "rxrx1-images")
        first = sorted(folder.rglob("*_s1_w1.png"))
        if not first:
            raise ValueError(f"RXRX1_SAMPLE: expected images named *_s1_w1.png below {folder}; found none.")
        return [
            np.stack([np.asarray(Image.open(str(path)[: -len("1.png")] + f"{w}.png")) for w in range(1, 7)])
            for path in first[:DISTINCT]
        ]
    ids = layout(0, TREATMENTS, EXPERIMENTS).groupby("experiment").head(DISTINCT // 4)["site_id"]
    draw = functools.partial(draw_site, image_size=512, treatments=TREATMENTS, experiments=EXPERIMENTS)
    return [draw(site_id) for site_id in tqdm(ids, desc="drawing sites")]


class Case:
    """One shape: a source tree of PNG files, and records of it."""

    def __init__(self, folder, pool, size, channels, sites, batch_size, cores):
        self.folder, self.size, self.channels, self.cores = folder, size, channels, cores
        self.batch_size = min(batch_size, sites)
        self.source = folder / "source"
        self.table = write_tree(self.source, pool, size, channels, sites)
        self.labels = self.table["sirna_id"].tolist()
        self.paths = [site_files(self.source, row, channels) for row in self.table.itertuples()]

    def build(self, encoding, workers=1, name=None):
        dest = self.folder / (name or encoding)
        build_records(self.source, dest, splits="table", encoding=encoding, workers=workers)
        return dest


def write_tree(folder, pool, size, channels, sites):
    """A release (a grey file a channel) or, with three channels, RxRx1-WILDS's tree (an RGB file a site)."""
    table = layout(0, TREATMENTS, EXPERIMENTS).groupby("experiment").head(-(-sites // 4)).head(sites)
    low = (512 - size) // 2
    files = []
    for image in pool:
        image = image[:channels, low : low + size, low : low + size]
        planes = [image.transpose(1, 2, 0)] if channels == 3 else image
        files.append([encode_png(plane) for plane in planes])
    for number, row in enumerate(table.itertuples()):
        for path, data in zip(site_files(folder, row, channels), files[number % len(files)], strict=True):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(data)
    table.to_csv(folder / "metadata.csv", index=False)
    return table


def site_files(folder, row, channels):
    stem = f"{folder}/images/{row.experiment}/Plate{row.plate}/{row.well}_s{row.site}"
    return [f"{stem}.png"] if channels == 3 else [f"{stem}_w{channel}.png" for channel in range(1, channels + 1)]


def encode_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def measure_read(case, repetitions):
    raw, png = case.build("raw"), case.build("png")
    ways = {
        "ours, raw": ours(case, raw),
        "ours, raw, cached": ours(case, raw, "memory"),
        "ours, png": ours(case, png),
        "ours, png, cached": ours(case, png, "memory"),
        "a file a picture, tf.data": files_by_tensorflow(case),
        "bound: NumPy": functools.partial(bound, case, raw),
        "png, decoded only": files_by_tensorflow(case, finish=False),
    }
    try:
        from wilds_loader import make_loader
    except ImportError:
        print("torch is not installed: WILDS's loader is left out", file=sys.stderr)
    else:
        loader = make_loader(case.paths, case.labels, case.batch_size, workers=2)
        ways["WILDS's loader, torch"] = lambda: sum(len(images) for images, _ in loader)
    rows = take_turns(ways, repetitions)
    decoding, all_of_it = rows["png, decoded only"], rows["a file a picture, tf.data"]
    rows["png, decoded only"]["share"] = all_of_it["sites_per_cpu_s"] / decoding["sites_per_cpu_s"]
    return rows


def ours(case, dest, cache=None):
    data = read_records(dest, "train", batch_size=case.batch_size, kinds=KINDS, training=True, cache=cache)
    return lambda: sum(len(labels) for _, labels in data)


def files_by_tensorflow(case, finish=True):
    """The usual pipeline: a PNG file for each picture, decoded in parallel; without `finish`, decoded and no more."""

    def load(paths, label):
        planes = [
            tf.io.decode_png(tf.io.read_file(paths[i]), case.channels // len(case.paths[0]))
            for i in range(len(case.paths[0]))
        ]
        return tf.ensure_shape(tf.concat(planes, axis=-1), (case.size, case.size, case.channels)), label

    data = tf.data.Dataset.from_tensor_slices((case.paths, case.labels)).shuffle(len(case.paths))
    data = data.map(load, tf.data.AUTOTUNE, deterministic=False)
    if finish:
        data = (
            data.batch(case.batch_size, drop_remainder=True)
            .enumerate()
            .map(lambda step, batch: (standardize(augment(batch[0], tf.stack([0, step]))), batch[1]), tf.data.AUTOTUNE)
        )
    else:
        data = data.map(lambda image, label: (image[:1, :1], label)).batch(case.batch_size, drop_remainder=True)
    data = data.prefetch(tf.data.AUTOTUNE)
    return lambda: sum(len(labels) for _, labels in data)


def bound(case, dest):
    """Reads every frame, checks its checksum, and standardizes into batches; one thread a core, a shard at a time."""
    pixels = case.size**2

    def channel_sums(row):
        return row.reshape(case.size, case.channels).sum(axis=0)

    def read(name):
        batch, count = np.empty((case.batch_size, case.size, case.size, case.channels), np.float32), 0
        for record, _ in read_frames(dest / name):
            image = tf.train.Example.FromString(record).features.feature["image"].bytes_list.value[0]
            rows = batch[count % case.batch_size].reshape(case.size, -1)  # Long vectors, one image in the cache.
            rows[:] = np.frombuffer(image, np.uint8).reshape(rows.shape)
            rows -= np.tile(channel_sums(rows.sum(axis=0)) / pixels, case.size)
            variance = channel_sums(np.einsum("ij,ij->j", rows, rows)) / (pixels - 1)
            rows *= np.tile(1 / np.sqrt(np.where(variance == 0, 1, variance)), case.size)
            count += 1
        return count

    with ThreadPoolExecutor(case.cores) as threads:
        return sum(threads.map(read, [shard["name"] for shard in read_manifest(dest)["shards"]]))


def take_turns(ways, repetitions):
    """Runs each way once to warm up, then all in turn; medians, and the ratio of the first way to each."""
    for run in ways.values():
        run()
    rates = {name: [] for name in ways}
    for repetition in tqdm(range(repetitions), desc="repetitions"):
        for i in range(len(ways)):
            name = [*ways][(i + repetition) % len(ways)]
            wall, cpu = time.perf_counter(), processor_seconds()
            count = ways[name]()
            rates[name].append((count / (time.perf_counter() - wall), count / max(processor_seconds() - cpu, 0.01)))
    first = rates[next(iter(ways))]
    return {
        name: {
            "sites_per_s": statistics.median(wall for wall, _ in values),
            "sites_per_cpu_s": statistics.median(cpu for _, cpu in values),
            "first_to_this": statistics.median(a[0] / b[0] for a, b in zip(first, values, strict=True)),
            "first_to_this_cpu": statistics.median(a[1] / b[1] for a, b in zip(first, values, strict=True)),
        }
        for name, values in rates.items()
    }


def processor_seconds():
    """Of this process and of its living and ended children."""
    ticks = 0
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat") as file:
            ticks += sum(map(int, file.read().rsplit(")", 1)[1].split()[11:13]))
    times = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(times[:4])


def measure_build(case, repetitions):
    """Beside building: decoding the same files on one core with Pillow, and copying them with `cp` and a sync."""
    files = [path for site in case.paths for path in site]

    def decode():
        for path in files:
            with Image.open(path) as image:
                np.asarray(image)
        return len(case.paths)

    def copy():
        subprocess.run(["cp", "-r", str(case.source), str(case.folder / "copy")], check=True)
        subprocess.run(["sync", "-f", str(case.folder / "copy")], check=True)
        shutil.rmtree(case.folder / "copy")
        return len(case.paths)

    def build(encoding):
        case.build(encoding, executor, "built")
        shutil.rmtree(case.folder / "built")
        return len(case.paths)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(case.cores, context, keep_tensorflow_off_gpu) as executor:
        ways = {
            "decoding on one core": decode,
            "build, raw": functools.partial(build, "raw"),
            "build, png passed through": functools.partial(build, "png"),
            "cp and sync": copy,
        }
        return take_turns(ways, repetitions)


def measure_memory(folder, pool, sites):
    """Peak resident memory of processes that build and read 1, 4 and 16 times as many sites of WILDS's shape."""
    rows = {}
    for times in (1, 4, 16):
        case = folder / f"memory{times}"
        write_tree(case / "source", pool, *SHAPES["wilds"], sites * times)
        for job in ("build", "read", "train"):
            command = [sys.executable, __file__, job, str(case)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.setdefault(job, {})[f"{sites * times} sites"] = round(int(result.stdout.split()[-1]) / 1024, 1)
        shutil.rmtree(case)
    return rows


def one_job(job, folder):
    keep_tensorflow_off_gpu()
    if job == "build":
        build_records(folder / "source", folder / "raw", splits="table", workers=1)
    else:
        data = read_records(folder / "raw", "train", batch_size=MEMORY_BATCH, kinds=KINDS, training=job == "train")
        for _ in data:
            pass
    with open("/proc/self/status") as file:
        print(next(line.split()[1] for line in file if line.startswith("VmHWM")))


def show(title, rows):
    print(f"\n{title}")
    for name, row in rows.items():
        print(f"  {name:28}" + "".join(f"{key} {value:10,.2f}   " for key, value in row.items()), flush=True)


if __name__ == "__main__":
    one_job(sys.argv[1], Path(sys.argv[2]))
