"""Options of the command line that jobs have in common."""

import argparse
from pathlib import Path

from methods import SOFTMAX
from weights import WEIGHTS_HELP

from tfrecords.remote import is_remote


def folder_or_url(text):
    return text if is_remote(text) else Path(text)


def at_least_0(text):
    """An argument of the command line."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0; received {number}")
    return number


def add_adversary(parser):
    """Adds the options of how ABRA perturbs."""
    parser.add_argument(
        "--steps", type=at_least_0, help="of abra: K, ascent steps of the adversary (default: 0, random)"
    )
    parser.add_argument(
        "--structure",
        choices=("diagonal", "low_rank"),
        help="of abra: each statistic by its own spread, or along their covariance (default: low_rank with --steps 1 "
        "and more, else diagonal)",
    )


def add_mixed_precision(parser):
    parser.add_argument(
        "--mixed-precision",
        nargs="?",
        const="float16",
        choices=("float16", "bfloat16"),
        help="compute in this type where it is safe (given without one: float16), variables stay float32",
    )


def add_training(parser, default_weights):
    """Adds what every job is asked about its training; `check_numbers` looks at it."""
    parser.add_argument(
        "--resume", action="store_true", help="go on with the job that was stopped in --output, if there is one"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, order and noise; the embedded screen stays the same"
    )
    parser.add_argument(
        "--on-nan",
        choices=("stop", "skip"),
        default="stop",
        help="at a loss or gradient that is not finite: stop (default), or leave it out, at most 10 in a row",
    )
    parser.add_argument("--weights", help=f"{WEIGHTS_HELP} (default: {default_weights})")
    parser.add_argument(
        "--perturb-after", nargs="+", metavar="LAYER", help="of abra and dsu: needed for other backbones"
    )


def check_numbers(parser, args, counts):
    """Refuses a seed that is none, and `counts`, names of arguments, below 1."""
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must lie in [0, 2**31); received {args.seed}")
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; received {getattr(args, name)}")


def check_of_method(args):
    """Refuses options that the method does not have."""
    if args.steps and args.method != "abra":
        raise ValueError(f"--steps {args.steps} is of --method abra: {args.method} has no adversary.")
    if args.structure and args.method != "abra":
        raise ValueError(f"--structure {args.structure} is of --method abra; received --method {args.method}.")
    if getattr(args, "cutmix", False) and args.method in SOFTMAX:
        raise ValueError("--cutmix is for abra, dsu and arcface: plain training on mixed images is --method cutmix.")
    if args.perturb_after and args.method not in ("abra", "dsu"):
        raise ValueError(f"--perturb-after is of --method abra and dsu: {args.method} perturbs nothing.")


def check_on_nan(on_nan, method):
    if on_nan == "skip" and method in SOFTMAX:
        raise ValueError(
            f"--on-nan skip is for the methods of ABRAModel; {method} trains by Keras's own step, and can stop."
        )
