"""Each method at the learning rate that is best for it on the validation experiments (or plates) of the same screens.

For screens on which `--trials` has no screen of its own to search on. Test is scored at every rate, and reported at the
chosen one alone.
"""

import numpy as np
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
        names += [method if rate == own else f"{method}:{RATE}{rate:g}" for rate in rates]
    return names


def choose_rates(results):
    """Of each method the trainings at its best rate, under the method's name.

    Args:
        results: list of (cell, result) of methods named by `at_rates`.

    Returns:
        The chosen part of `results`, and a `pandas.DataFrame`, one row a method and rate: `method`, `learning_rate`,
        `val` (mean accuracy over trainings, percent; a training that diverged counts as none right), `chosen`.
    """
    rows = [
        {
            "method": split_rate(cell["method"])[0],
            "learning_rate": cell["settings"]["learning_rate"],
            "val": 0.0 if result["diverged"] else 100 * result["splits"]["val"]["accuracy"],
        }
        for cell, result in results
    ]
    table = pd.DataFrame(rows).groupby(["method", "learning_rate"], sort=False)["val"].mean().reset_index()
    table["chosen"] = table.index.isin(table.groupby("method")["val"].idxmax())
    chosen = set(table[table["chosen"]][["method", "learning_rate"]].itertuples(index=False, name=None))
    kept = [
        (cell | {"method": row["method"]}, result)
        for (cell, result), row in zip(results, rows, strict=True)
        if (row["method"], row["learning_rate"]) in chosen
    ]
    return kept, table


def rates_section(table):
    """Lines of Markdown: the validation accuracy of each method at each rate."""
    wide = table.pivot(index="method", columns="learning_rate", values="val").reindex(dict.fromkeys(table["method"]))
    best = table[table["chosen"]].set_index("method")["learning_rate"]
    lines = [
        "",
        "Each method has the learning rate at which its accuracy on val, mean over trainings, is best (bold):",
        "",
        "| method | " + " | ".join(f"{rate:g}" for rate in wide.columns) + " |",
        "|" + "---|" * (1 + len(wide.columns)),
    ]
    for method, values in wide.iterrows():
        shown = [
            "" if np.isnan(v) else f"**{v:.1f}**" if rate == best[method] else f"{v:.1f}" for rate, v in values.items()
        ]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return [*lines, ""]
