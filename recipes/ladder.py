"""ABRA against everything a user would pick instead, on experiments never seen.

    python recipes/ladder.py                                    # quick: five methods, three seeds, two CPU cores
    python recipes/ladder.py --preset full --output runs/full   # all methods, tuned alike: hours
    python recipes/ladder.py --preset ablation                  # ABRA's variants, each beside its random control
    python recipes/ladder.py --normalize plate                  # images standardized by their plate's negative controls
    python recipes/ladder.py --screen painted --data DIR        # real fields or digits, see real_screens.py
    python recipes/ladder.py --screen painted --data DIR --rates 0.002 0.005    # each method at its better rate

Draws synthetic screens, trains every method on each with the same network, data order and rule of convergence
(`converge.Converge`), and scores id_test and val, and test once, at the end. With `--trials` each method's settings are
chosen first, by accuracy on the validation experiments of a screen that is used for nothing else; the same number of
trials for each. The output folder gets `ladder.md`, `ladder.csv`, `test_time.csv`, `cells.csv` and `ladder.png`.

A run that was killed goes on with the same command: a finished training (method, settings, screen, seed) is never
repeated, and more seeds or methods are added to the folder in the same way.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from ladder_methods import (
    ABLATION,
    METHODS,
    lacks,
    method_settings,
    read_tuned,
    split_rate,
    trial_settings,
    was_offered,
)
from ladder_rates import at_rates, choose_rates, rates_section
from ladder_report import describe_commit, write_report
from ladder_screens import CELL_TYPES
from normalization import NORMALIZATIONS
from worker_processes import processes

from tfrecords.locks import lock_file
from tfrecords.screen_appearance import SHIFTS
from tfrecords.whole import write_whole

# Screens by what they are for. Seed i of a preset has the i-th screen from its first one on.
DEVELOPMENT = 1000
# At least 47 epochs: the embedded screen's ERM was accepted with 45.
RULE = {"warmup": 2, "patience": 8, "smooth": 5, "least": 30, "most": 80, "decay": 0.5}
SCREEN = {"batch_effect": 1.0, "image_size": 48, "treatments": 44, "train": 14, "val": 4, "test": 12}
LEAST = {"seeds": 1, "trials": 0, "first_screen": 0, "train_experiments": 1, "treatments": 4, "workers": 1}
COUNTS = {"train_experiments": "train", "treatments": "treatments"}  # arguments that change numbers of SCREEN
# Screens of real images. On painted fields ArcFace collapses at the rate of the drawn screens: a lower one for all
# methods, with which ArcFace learns (seed 1000, validation plates). Mirrored and turned digits are others.
REAL = {
    "painted": {
        "screen": {"kind": "painted", "image_size": 48, "treatments": 8, "sites": 16, "test_sites": 32},
        "common": {"learning_rate": 2e-3},
    },
    "mnist-usps": {"screen": {"kind": "mnist-usps", "image_size": 28}, "common": {"augment": "none"}},
    "usps-mnist": {"screen": {"kind": "usps-mnist", "image_size": 28}, "common": {"augment": "none"}},
}
PRESETS = {
    "quick": {
        "methods": ["erm", "arcface", "dsu", "abra_random", "abra"],
        "first_screen": 2000,
        "seeds": 3,
        "repeats": 1,
        "trials": 0,
        "screen": SCREEN,
        "rule": RULE,
    },
    "full": {
        "methods": [*METHODS],
        "first_screen": 4000,
        "seeds": 5,
        "repeats": 2,
        "trials": 8,
        "screen": SCREEN,
        "rule": RULE,
    },
    "ablation": {
        "methods": ["erm", "arcface", "dsu", "abra_random", "abra", *ABLATION],
        "first_screen": 3000,
        "seeds": 3,
        "repeats": 1,
        "trials": 0,
        "screen": SCREEN,
        "rule": RULE,
    },
}
METHODS_HELP = f"of {', '.join(METHODS)}; of the ablation's; or one at a rate of its own, erm:learning_rate=0.005"


def main(argv=None):
    args = parse(argv)
    plan = make_plan(args)
    settings = {method: method_settings(method, **plan.get("common", {})) for method in plan["methods"]}
    args.output.mkdir(parents=True, exist_ok=True)
    lock = lock_file(args.output / "lock", wait=False)
    if lock is None:
        raise ValueError(f"{args.output} is in use by another ladder. Wait for its end, or name another folder.")
    with lock:
        check_same_data(args.output, args.data)
        return climb(plan, settings, args, argv)


def check_same_data(output, data):
    """Refuses to go on with real images from another folder than before."""
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data} is no folder.")
    file, found = output / "data.json", data and str(data.resolve())
    if found and not file.is_file():
        write_json(file, found)
    elif found and (before := json.loads(file.read_text())) != found:
        raise ValueError(f"{output} has screens of the images in {before}: name another --output.")


def climb(plan, settings, args, argv):
    """Trains what is missing, and writes the report."""
    if plan["trials"]:
        settings = tune(plan, args)
    cells = final_cells(plan, settings)
    run_cells(cells, args)
    results = [(cell, json.loads(cell_file(args.output, cell).read_text())["result"]) for cell in cells]
    more = []
    if args.rates:
        results, rates = choose_rates(results)
        more = rates_section(rates)
    return write_report(results, args.output, "python recipes/ladder.py " + " ".join(argv or sys.argv[1:]), more)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=METHODS_HELP)
    parser.add_argument("--seeds", type=int, help="screens, each with seeds of its own (quick 3, full 5, ablation 3)")
    parser.add_argument(
        "--first-screen", type=int, metavar="SEED", help="take screens from this one on, such as 5000: new ones"
    )
    parser.add_argument("--trials", type=int, help="settings tried for each method; 0: its defaults (full 8, others 0)")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="tuned.json: its methods need no more trials")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="learning rates; each method's best on a screen's val is reported"
    )
    parser.add_argument(
        "--normalize",
        choices=NORMALIZATIONS,
        help="what every method's images are standardized by (default image): themselves, or all images of their "
        "experiment, or the negative controls of their plate",
    )
    parser.add_argument("--batch-effect", type=float, help="strength of everything in which experiments differ (1)")
    parser.add_argument("--shift", choices=SHIFTS, help="the one thing in which experiments differ (default: all)")
    parser.add_argument("--train-experiments", type=int, help="training experiments (14)")
    parser.add_argument("--treatments", type=int, help="siRNAs to tell apart, a multiple of 4 (44)")
    parser.add_argument("--screen", choices=("synthetic", *REAL), default="synthetic", help="what the images are")
    parser.add_argument("--data", type=Path, help="folder of the real images, of RxRx1's or of the digits")
    parser.add_argument("--output", type=Path, help="folder to begin or go on in (default: runs/ladder-PRESET...)")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes, of one core each (default: one a core); 1: this process with all its threads, whose sums "
        "round otherwise, so that trainings come out a little different",
    )
    args = parser.parse_args(argv)
    for name, least in LEAST.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}; received {getattr(args, name)}")
    if args.treatments and args.treatments % 4:
        parser.error(f"--treatments must be a multiple of 4; received {args.treatments}")
    trials = PRESETS[args.preset]["trials"] if args.trials is None else args.trials
    first = PRESETS[args.preset]["first_screen"] if args.first_screen is None else args.first_screen
    if trials and first <= DEVELOPMENT < first + (args.seeds or PRESETS[args.preset]["seeds"]):
        parser.error(f"Trials are made on screen {DEVELOPMENT}: it cannot be one of those that are reported, too.")
    if args.tuned and (args.rates or not trials or not args.tuned.is_file()):
        parser.error(f"--tuned takes a file, trials and no --rates; received {args.tuned}, {trials}, {args.rates}")
    if args.rates and (args.trials or len({*args.rates}) < len(args.rates) or min(args.rates) <= 0):
        parser.error(f"--rates takes positive rates, each once, and no --trials; received {args.rates}, {args.trials}")
    real = args.screen != "synthetic"
    changed = [name for name in ("batch_effect", "shift", "tuned", *COUNTS) if getattr(args, name) is not None]
    if real and (changed or args.trials):
        parser.error(f"--screen {args.screen} takes no --{(changed or ['trials'])[0].replace('_', '-')}")
    if real != (args.data is not None):
        parser.error(f"--screen {args.screen} " + ("needs --data" if real else "is drawn: it takes no --data"))
    parts = ["ladder", args.preset, *([args.screen] if real else []), *([args.normalize] if args.normalize else [])]
    parts += [] if args.first_screen is None else [f"from{first}"]
    args.output = args.output or Path("runs") / "-".join(parts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.workers = args.workers or cores
    return args


def make_plan(args):
    """The preset, with what the command line changes."""
    plan = dict(PRESETS[args.preset])
    for name in ("methods", "seeds", "trials", "first_screen"):
        if getattr(args, name) is not None:
            plan[name] = getattr(args, name)
    plan["methods"] = [*dict.fromkeys(plan["methods"])]
    plan["screen"] = dict(plan["screen"])
    for argument, name in {"batch_effect": "batch_effect", **COUNTS}.items():
        if getattr(args, argument) is not None:
            plan["screen"][name] = getattr(args, argument)
    if args.screen in REAL:
        plan |= REAL[args.screen] | {"trials": 0}  # the validation plates of one screen are test plates of another
    if args.normalize:
        plan["common"] = plan.get("common", {}) | {"normalize": args.normalize}
    for name in {"normalize", "augment"} & {*plan.get("common", {})}:  # without it a method would be another one
        own = [method for method in plan["methods"] if name in METHODS.get(split_rate(method)[0], {})]
        if own and args.methods:
            what = "--normalize" if name == "normalize" else f"The augmentation of --screen {args.screen}"
            raise ValueError(f"{what} is for all methods, and {', '.join(own)} have their own. Leave one out.")
        plan["methods"] = [method for method in plan["methods"] if method not in own]
    plan["methods"] = possible_methods(plan, named=bool(args.methods))
    if args.rates:
        plan |= {"trials": 0, "methods": at_rates(plan["methods"], args.rates, **plan.get("common", {}))}
    if args.shift:
        plan["screen"]["batch_effect"] = {args.shift: plan["screen"]["batch_effect"]}
    return plan


def possible_methods(plan, named):
    """The methods without those that cannot be trained on such a screen; these raise if they were named."""
    screen = plan["screen"]
    digits = screen.get("kind", "painted") != "painted"
    train = 1 if digits else screen.get("train", math.inf)  # painted ones have as many as the images have plates
    found = {
        method: lacks(method_settings(method, **plan.get("common", {})), train, len(CELL_TYPES), controls=not digits)
        for method in plan["methods"]
    }
    lacking = {method: why for method, why in found.items() if why}
    if lacking and (named or len(lacking) == len(found)):
        method, why = next(iter(lacking.items()))
        raise ValueError(f"{method} needs {why} on these screens. Leave out {', '.join(lacking)}.")
    for method, why in lacking.items():
        print(f"Without {method}: it needs {why} on these screens.")
    return [method for method in plan["methods"] if method not in lacking]


def final_cells(plan, settings):
    """Every method on every screen with every seed. The only cells that score test."""
    screens = [plan["screen"] | {"seed": plan["first_screen"] + i} for i in range(plan["seeds"])]
    return [
        make_cell(method, settings[method], screen, plan["repeats"] * i + repeat, plan, ["id_test", "val", "test"])
        for i, screen in enumerate(screens)
        for repeat in range(plan["repeats"])
        for method in plan["methods"]
    ]


def tune(plan, args):
    """Settings of each method: the trial that is best on the validation experiments of the development screen."""
    screen = plan["screen"] | {"seed": DEVELOPMENT}
    chosen_alike = {"trials": plan["trials"], "screen": screen, "rule": plan["rule"]}
    best = read_tuned(args.tuned, plan["methods"], chosen_alike, **plan.get("common", {})) if args.tuned else {}
    trials = {
        method: [
            make_cell(method, trial_settings(method, i, **plan.get("common", {})), screen, 0, plan, ["id_test", "val"])
            for i in range(plan["trials"])
        ]
        for method in plan["methods"]
        if method not in best
    }
    run_cells([cell for cells in trials.values() for cell in cells], args)
    for method, cells in trials.items():
        found = [json.loads(cell_file(args.output, cell).read_text())["result"] for cell in cells]
        scores = [-1.0 if r["diverged"] else r["splits"]["val"]["accuracy"] for r in found]
        best[method] = cells[scores.index(max(scores))]["settings"]
    file = args.output / "tuned.json"
    before = read_before(file, chosen_alike, **plan.get("common", {}))
    write_json(file, chosen_alike | {"backend": keras.backend.backend(), "settings": before | best})
    return best


def read_before(file, chosen_alike, **changes):
    """Settings that a run before chose in the same way in this folder, for other methods maybe."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    same = all(found.get(name) == value for name, value in chosen_alike.items())
    if not same or found.get("backend") != keras.backend.backend():
        return {}
    kept = found["settings"].items()
    return {m: settings for m, settings in kept if was_offered(m, settings, chosen_alike["trials"], **changes)}


def make_cell(method, settings, screen, seed, plan, splits):
    grouped = settings.get("normalize", "image") != "image"  # once, of each split's own images alone: other cells
    return {
        **({"statistics": "of all splits"} if grouped else {}),
        "method": method,
        "settings": settings,
        "screen": screen,
        "seed": seed,
        "rule": plan["rule"],
        "splits": splits,
        "backend": keras.backend.backend(),
    }


def cell_file(output, cell):
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]
    method = re.sub(r"[^a-z0-9_.]+", "-", cell["method"])
    return output / "cells" / f"{method}-screen{cell['screen']['seed']}-seed{cell['seed']}-{digest}.json"


def run_cells(cells, args):
    """Runs what is not there yet, the screens first; every result is written whole or not at all."""
    files = {cell_file(args.output, cell): cell for cell in cells}  # the same trial twice is one
    missing = [cell for file, cell in files.items() if not file.exists()]
    print(f"{len(files)} trainings, {len(files) - len(missing)} of them done before", flush=True)
    screens = {json.dumps(cell["screen"], sort_keys=True): cell["screen"] for cell in missing}
    start, maker = time.monotonic(), {"commit": describe_commit(), "machine": describe_machine()}
    with processes(min(args.workers, len(missing))) as run:
        for _ in run(prepare_screen, [(args.output, screen, args.data) for screen in screens.values()]):
            pass
        for done, line in enumerate(run(finish_cell, [(args.output, cell, maker) for cell in missing]), 1):
            left = (time.monotonic() - start) / done * (len(missing) - done)
            print(f"[{done}/{len(missing)}, {left / 60:.0f} min left] {line}", flush=True)


def prepare_screen(task):
    from ladder_screens import screen_records

    output, screen, data = task
    return screen_records(output / "screens", screen, data)


def finish_cell(task):
    """Runs one cell and writes its file; gives a line to print."""
    from ladder_cell import run_cell

    output, cell, maker = task
    file = cell_file(output, cell)
    try:
        result = run_cell(cell, output / "screens") | maker
    except ValueError as error:
        raise ValueError(f"{file.stem}: {error}") from error
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"cell": cell, "result": result})
    accuracies = ", ".join(f"{split} {100 * found['accuracy']:.1f}" for split, found in result["splits"].items())
    return f"{file.stem}: {accuracies} % after {result['epochs']} epochs"


def describe_machine():
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {keras.backend.backend()}, Keras {keras.__version__}"


def write_json(file, content):
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"ladder.py: error: {error}")
