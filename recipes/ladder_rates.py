"""Each method at the learning rate that is best for it on the validation experiments (or plates) of the same screens.

For screens on which `--trials` has no screen of its own to search on. Test is scored at every rate, and reported at the
chosen one alone.
"""

import pandas as pd
from ladder_methods import RATE, method_settings, split_rate


def at_rates(methods, rates, **common):
    """Names of the methods at each of the rates; at the rate of its settings a method has its own name.

    Args:
        methods: names of methods or variants without a rate.
        rates: learning rates.
        common: settings that all methods of a ladder share.

    Raises:
        ValueError: for a name that is no method's, or has a rate.
    """
    names = []
    for method in methods:
        own = method_settings(method, **common)["learning_rate"]
        if split_rate(method)[1]:
            raise ValueError(f"With --rates name methods without a rate of their own, not {method!r}.")
        names += [method if rate == own else f"{method}:{RATE}{rate!r}" for rate in rates]
    return names


def choose_rates(results):
    """On each screen, of each method the trainings at its best rate there, under the method's name.

    Chosen by the screen's own val alone: the validation plates of one screen of real images are test plates of another.

    Args:
        results: list of (cell, result) of methods named by `at_rates`.

    Returns:
        The chosen part of `results`, and a `pandas.DataFrame`, one row a method, screen and rate: `method`, `screen`,
        `learning_rate`, `val` (mean accuracy over trainings, percent; a training that diverged counts as none right),
        `chosen` (of rates that are equal the one named first).
    """
    rows = [
        {
            "method": split_rate(cell["method"])[0],
            "screen": cell["screen"]["seed"],
            "learning_rate": cell["settings"]["learning_rate"],
            "val": 0.0 if result["diverged"] else 100 * result["splits"]["val"]["accuracy"],
        }
        for cell, result in results
    ]
    keys = ["method", "screen", "learning_rate"]
    table = pd.DataFrame(rows).groupby(keys, sort=False)["val"].mean().reset_index()
    table["chosen"] = table.index.isin(table.groupby(["method", "screen"])["val"].idxmax())
    chosen = set(table[table["chosen"]][keys].itertuples(index=False, name=None))
    kept = [
        (cell | {"method": row["method"]}, result)
        for (cell, result), row in zip(results, rows, strict=True)
        if tuple(row[key] for key in keys) in chosen
    ]
    return kept, table


def rates_section(table):
    """Lines of Markdown: the validation accuracy of each method at each rate, and how often the rate is the best."""
    screens = table["screen"].nunique()
    found = table.groupby(["method", "learning_rate"], sort=False).agg({"val": "mean", "chosen": "sum"})
    rates = sorted({*table["learning_rate"]})
    lines = [
        "",
        "On each screen a method has the learning rate at which its accuracy on that screen's val is best. Val "
        f"accuracy, mean over trainings, at each rate, and on how many of {screens} screens it is the best:",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|" + "---|" * (1 + len(rates)),
    ]
    for method in dict.fromkeys(table["method"]):
        cells = [found.loc[(method, rate)] for rate in rates]
        lines.append(f"| {method} | " + " | ".join(f"{c['val']:.1f} ({c['chosen']:.0f})" for c in cells) + " |")
    return lines
