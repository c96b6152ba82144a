"""Differences between methods of several ladders: of the same screens with the same seeds, or of more screens.

    python recipes/ladder_compare.py runs/a/cells.csv runs/b/cells.csv                    # each to its control
    python recipes/ladder_compare.py runs/a/cells.csv runs/b/cells.csv --to erm           # each to this method
    python recipes/ladder_compare.py runs/a/cells.csv runs/b/cells.csv --split adabn --to erm
    python recipes/ladder_compare.py runs/a/cells.csv --to erm --to-split adabn    # each as it is to ERM with AdaBN
    python recipes/ladder_compare.py runs/a/cells.csv --worst --to erm             # of each training's worst experiment

Prints a row for each method: accuracy on test or, with `--split`, by what takes an experiment together (of sites, in
percent, each experiment alike), and the difference with its paired bootstrap interval (`paired_bootstrap`). A training
that is in several files must have the same numbers in each: that is what makes them comparable. A method is compared
on all screens that it has, and left out where the other one lacks some. Settings are not looked at.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from ladder_methods import control_of
from ladder_report import TEST_TIME, differences
from paired_bootstrap import paired_bootstrap

KEYS = ["method", "screen", "seed", "split", "experiment"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", type=Path, help="cells.csv of ladders")
    parser.add_argument("--split", choices=("test", *TEST_TIME), default="test", help="default: test")
    parser.add_argument(
        "--to", help="method that all are compared to (default: its control, see `ladder_methods.control_of`)"
    )
    parser.add_argument(
        "--to-split", choices=("test", *TEST_TIME), metavar="SPLIT", help="of the other method, if it is another split"
    )
    parser.add_argument(
        "--worst", action="store_true", help="of the worst experiment of each training, to the worst of the other's"
    )
    args = parser.parse_args(argv)
    cells = join(args.cells)
    if args.to is not None and args.to not in set(cells["method"]):
        raise ValueError(
            f"--to {args.to} is no method of these files. Expected one of {', '.join(cells['method'].unique())}."
        )
    rows = compare(cells, args.split, args.to, args.to_split, args.worst)
    what = args.split + ", worst" * args.worst
    other = (args.to or "its control") + (f" ({args.to_split})" if args.to_split else "")
    print(f"| method | {what} | difference to {other} |\n|---|---|---|")
    for method, accuracy, (mean, low, high) in rows:
        print(f"| {method} | {accuracy:.1f} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |")
    return rows


def join(files):
    """The cells of several files as one table.

    Raises:
        ValueError: if a file is no `cells.csv`, or the same training has other numbers in two of them.
    """
    tables = []
    for file in files:
        try:
            table = pd.read_csv(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no table of cells: {error}") from error
        if lacking := sorted({*KEYS, "accuracy"} - {*table.columns}):
            raise ValueError(f"{file} is no cells.csv of a ladder: it lacks {', '.join(lacking)}.")
        tables.append(table)
    cells = pd.concat(tables, ignore_index=True).drop_duplicates([*KEYS, "accuracy"])
    torn = cells[cells.duplicated(KEYS, keep=False)]
    if len(torn):
        first = torn.iloc[0]
        raise ValueError(
            f"{first['method']} on screen {first['screen']} with seed {first['seed']} has other numbers in two of the "
            "files: they were not trained alike. Compare what one ladder trained."
        )
    return cells


def compare(cells, split, baseline=None, its_split=None, worst=False):
    """List of (method, accuracy in percent, (mean, low, high) in points), of methods that have what to compare to."""
    rows = []
    for method in cells["method"].unique():
        other = baseline or control_of(method)
        if other in (None, method):
            continue
        found = differences(cells, split, method, other, its_split, worst)
        if found is None:
            lacking = [(name, count) for name in (method, other) if (count := _lacking(cells, split, name))]
            why = f"{other} was not trained on all of its screens"
            if lacking:
                name, count = lacking[0]
                why = f"{name} has no {split} of {count} of its trainings, as those that diverged have none"
            print(f"Left out: {method}, as {why}")
        else:
            part = cells[(cells["method"] == method) & (cells["split"] == split)]
            accuracies = part.groupby(["screen", "seed"])["accuracy"].min() if worst else part["accuracy"]
            interval = tuple(100 * value for value in paired_bootstrap(found))
            rows.append((method, 100 * accuracies.mean(), interval))
    return rows


def _lacking(cells, split, method):
    """Of how many trainings of a method there is no score of this kind."""
    own = cells[cells["method"] == method].groupby(["screen", "seed"])["split"].agg(set)
    return sum(split not in found for found in own)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"ladder_compare.py: error: {error}")
