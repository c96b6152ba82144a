"""ABRA against everything a user would pick instead, on experiments never seen.

    python recipes/ladder.py                                    # quick: five methods, three seeds, two CPU cores
    python recipes/ladder.py --preset full --output runs/full   # all methods, tuned alike: hours
    python recipes/ladder.py --preset ablation                  # ABRA's variants, each beside its random control
    python recipes/ladder.py --normalize plate                  # images standardized by their plate's negative controls
    python recipes/ladder.py --screen painted --data DIR        # real fields or digits, see real_screens.py
    python recipes/ladder.py --screen painted --data DIR --rates 0.002 0.005    # each method at its better rate

Draws synthetic screens, trains every method on each with the same network, data order (but of methods that compose
their batches) and rule of convergence (`converge.Converge`), and scores id_test and val, and test once, at the end.
With `--trials` each method's settings are chosen first, by accuracy on the validation experiments of a screen that is
used for nothing else (`--trial-screens 3`: by the mean of three such); the same number of trials for each. The output
folder gets `ladder.md`, `ladder.csv`, `test_time.csv`, `cells.csv` and `ladder.png`.

A run that was killed goes on with the same command: a finished training (method, settings, screen, seed) is never
repeated, and more seeds or methods are added to the folder in the same way.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from ladder_methods import ABLATION, METHODS, lacks, method_settings, split_rate
from ladder_rates import at_rates, choose_rates, rates_section
from ladder_report import write_report
from ladder_runs import make_cell, read_result, run_cells, write_json
from ladder_screens import CELL_TYPES
from ladder_trials import DEVELOPMENT, tune
from normalization import NORMALIZATIONS

from tfrecords.locks import lock_file
from tfrecords.screen_appearance import SHIFTS

# At least 47 epochs: the embedded screen's ERM was accepted with 45.
RULE = {"warmup": 2, "patience": 8, "smooth": 5, "least": 30, "most": 80, "decay": 0.5}
SCREEN = {"batch_effect": 1.0, "image_size": 48, "treatments": 44, "train": 14, "val": 4, "test": 12}
LEAST = {
    "seeds": 1,
    "trials": 0,
    "trial_screens": 1,
    "first_screen": 0,
    "train_experiments": 1,
    "treatments": 4,
    "longer": 1,
    "workers": 1,
}
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
# Each preset has screens of its own, trials yet another (`DEVELOPMENT`): seed i the i-th screen from the first one on.
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
METHODS_HELP = (
    f"of {', '.join(METHODS)} (dsu: under ArcFace; dsu_softmax: as published); of the ablation's, "
    f"{', '.join(ABLATION)}; or one at a rate of its own, erm:learning_rate=0.005"
)


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
    results = [(cell, read_result(args.output, cell)) for cell in cells]
    more = []
    if args.rates:
        results, rates = choose_rates(results)
        more = rates_section(rates)
    return write_report(results, args.output, "python recipes/ladder.py " + " ".join(argv or sys.argv[1:]), more)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick (default): half an hour on two cores; the others: hours",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=METHODS_HELP)
    parser.add_argument("--seeds", type=int, help="screens, each with seeds of its own (quick 3, full 5, ablation 3)")
    parser.add_argument(
        "--first-screen", type=int, metavar="SEED", help="take screens from this one on, such as 5000: new ones"
    )
    parser.add_argument("--trials", type=int, help="settings tried for each method; 0: its defaults (full 8, others 0)")
    parser.add_argument("--trial-screens", type=int, default=1, help="screens that each of them is trained on (1)")
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
    parser.add_argument(
        "--longer",
        type=int,
        metavar="N",
        help="patience and numbers of epochs of the rule of convergence times this (1)",
    )
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
    trials = 0 if args.rates or args.screen in REAL else PRESETS[args.preset]["trials"]
    trials = trials if args.trials is None else args.trials
    first = PRESETS[args.preset]["first_screen"] if args.first_screen is None else args.first_screen
    tried = range(DEVELOPMENT, DEVELOPMENT + args.trial_screens)
    if trials and {*tried} & {*range(first, first + (args.seeds or PRESETS[args.preset]["seeds"]))}:
        several = f"the {len(tried)} screens from {DEVELOPMENT} on" if len(tried) > 1 else f"screen {DEVELOPMENT}"
        parser.error(f"Trials are made on {several}: none can be one of those that are reported, too.")
    if args.trial_screens > 1 and not trials:
        parser.error(f"--trial-screens {args.trial_screens} is of trials, and there are none.")
    if args.tuned and args.screen == "synthetic":
        if not args.tuned.is_file():
            parser.error(f"--tuned {args.tuned} is no file.")
        if args.rates or not trials:
            parser.error(
                f"--tuned needs --trials N, as many as it was made with, and no --rates; received N = {trials}"
            )
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
    if args.longer:
        plan["rule"] = plan["rule"] | {name: args.longer * plan["rule"][name] for name in ("patience", "least", "most")}
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


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"ladder.py: error: {error}")
