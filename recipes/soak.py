"""Does a job survive? Trains on the embedded screen, is killed every few minutes, and ends where an unbroken one ends.

    python recipes/soak.py --hours 2                          # by hand
    python recipes/soak.py --hours 0.5 --backend jax --kill-minutes 1 4

Starts `rxrx1.py --resume` over and over. Each time it is ended after a random time: by signal 9, every third time by
SIGTERM, until the hours are over; then it is left to its end. The same job without a kill, trained beside it, must give
the same metrics, predictions, history and weights, byte for byte. Resident memory is read from the system every 5
seconds (Linux); the slope of the unbroken job is that of a line through all but its first tenth, in MB an hour.

The number of epochs is chosen such that the unbroken job takes `--hours` of training on this machine, from the seconds
of its first epochs. Each of the two jobs has one core; where there is only one (`taskset -c 0`), they share it.
Results: `soak.json` in the output folder.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np

RECIPE = Path(__file__).with_name("rxrx1.py")
EVERY = 5  # seconds


def main(argv=None):
    args = parse(argv)
    if args.output.exists():
        sys.exit(f"soak.py: error: --output {args.output} is there already. Name a new folder.")
    args.output.mkdir(parents=True)
    epochs = choose_epochs(args)
    print(f"{epochs} epochs on {args.backend}", flush=True)
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(run, args, epochs, args.output / "whole", core=-1)
        kills, code, killed_hours = kill_and_resume(args, epochs)
        if code:
            print(f"the job failed after {len(kills)} kills: exit code {code}, see {args.output}/killed.txt")
            return 1
        code, memory, _, whole_hours = whole.result()
    if code:
        print(f"the unbroken job failed: exit code {code}, see {args.output}/whole.txt")
        return 1
    if not kills:
        print(f"the job ended before its first kill: nothing was tried. Give it more than {epochs} --epochs.")
        return 1
    result = {
        "backend": args.backend,
        "epochs": epochs,
        "unbroken_hours": whole_hours,
        "killed_hours": killed_hours,
        "kills": kills,
        "seconds_from_sigterm_to_exit": max(
            (k["left_after"] for k in kills if k["signal"] == signal.SIGTERM), default=None
        ),
        "differences": differences(args.output / "whole", args.output / "killed"),
        "rss_mb_per_hour": slope(memory),
        "rss_mb": {f"{tenths}/10": memory[(len(memory) - 1) * tenths // 10][1] for tenths in (1, 4, 7, 10) if memory},
    }
    (args.output / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({**result, "kills": len(kills)}, indent=2))
    return 1 if result["differences"] else 0


def kill_and_resume(args, epochs):
    """The job killed until the hours are over: `[{...}, ...]` of the kills, its last exit code, and hours taken."""
    draw, kills, began = random.Random(args.seed), [], time.monotonic()
    while True:
        left = args.hours * 3600 - (time.monotonic() - began)
        wait = draw.uniform(*args.kill_minutes) * 60
        number = signal.SIGTERM if len(kills) % 3 == 2 else signal.SIGKILL
        code, _, leaving, _ = run(args, epochs, args.output / "killed", (wait, number) if left > 0 else None)
        if leaving is None or code not in (-signal.SIGKILL, -signal.SIGTERM, 75):  # ended by itself
            return kills, code, (time.monotonic() - began) / 3600
        kills.append({"after": round(wait), "signal": int(number), "code": code, "left_after": leaving})
        print(f"kill {len(kills)} after {wait:.0f} s by signal {int(number)}, exit code {code}", flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="of training with kills (default: 2)")
    parser.add_argument("--kill-minutes", type=float, nargs=2, default=(3.0, 10.0), metavar=("LEAST", "MOST"))
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--method", choices=("abra", "dsu", "arcface", "erm"), default="abra")
    parser.add_argument("--epochs", type=int, help="default: as many as the hours hold")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--output", type=Path, default=Path("soak"), help="a new folder (default: ./soak)")
    return parser.parse_args(argv)


def run(args, epochs, output, kill=None, core=0):
    """Runs the job on one core, ended after some seconds by a signal: its exit code, `[(seconds, MB), ...]`, the
    seconds from the signal to the end (None where it ended by itself), and the hours that it took."""
    environment = {**os.environ, "KERAS_BACKEND": args.backend, "TF_CPP_MIN_LOG_LEVEL": "2", "OMP_NUM_THREADS": "1"}
    records = args.output / "records"
    command = [
        sys.executable,
        str(RECIPE),
        "--data",
        "embedded",
        "--records",
        str(records),
        "--output",
        str(output),
        "--resume",
    ]
    command += ["--method", args.method, "--epochs", str(epochs)]
    cores = {sorted(os.sched_getaffinity(0))[core]} if hasattr(os, "sched_getaffinity") else None
    with open(args.output / f"{output.name}.txt", "a") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
    began, memory, leaving = time.monotonic(), [], None
    while process.poll() is None:
        seconds = time.monotonic() - began
        if kill and seconds >= kill[0]:
            process.send_signal(kill[1])
            process.wait()
            leaving = time.monotonic() - began - seconds
            break
        memory.append((seconds, resident(process.pid)))
        time.sleep(EVERY if not kill else max(0.0, min(EVERY, kill[0] - seconds)))
    hours = (time.monotonic() - began) / 3600
    return process.returncode, [(s, mb) for s, mb in memory if mb], leaving, hours


def resident(pid):
    """Resident memory of a process in MB; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def slope(memory):
    """MB an hour, of a line through all but the first tenth."""
    if len(memory) <= 10:
        return None
    seconds, megabytes = np.array(memory[len(memory) // 10 :]).T
    return float(np.polyfit(seconds, megabytes, 1)[0] * 3600)


def differences(folder, other):
    """Names of results that are not the same, byte for byte."""
    files = ("metrics.json", "predictions.csv", "history.csv")
    found = [name for name in files if (folder / name).read_bytes() != (other / name).read_bytes()]
    a, b = weights(folder / "model.keras"), weights(other / "model.keras")
    return found + sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def weights(path):
    """`{name: bytes}` of all variables of a saved model, the optimizer's among them."""
    values = {}
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as opened, h5py.File(opened) as file:
        file.visititems(
            lambda name, item: values.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return values


def choose_epochs(args):
    """As many epochs as take the hours: from two short jobs, whose difference leaves the start out."""
    seconds = []
    for trial, epochs in enumerate((1,) if args.epochs else (1, 1, 4)):  # the first builds the records
        began = time.monotonic()
        code, *_ = run(args, epochs, args.output / f"trial-{trial}")
        if code:
            sys.exit(f"the trial of {epochs} epochs failed: exit code {code}, see {args.output}/trial-{trial}.txt")
        seconds.append(time.monotonic() - began)
    if args.epochs:
        return args.epochs
    share = 0.5 if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1 else 1.0
    return max(int(share * args.hours * 3600 / max((seconds[2] - seconds[1]) / 3, 0.1)), 4)


if __name__ == "__main__":
    sys.exit(main())
