"""What the ladder found: tables, and a picture."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
from ladder_methods import control_of
from paired_bootstrap import paired_bootstrap

BASELINES = ("erm", "arcface", "dsu")
TEST_TIME = ("adabn", "nearest_class", "tvn")
TOGETHER = "\u2020"  # a dagger


def write_report(results, output, command, more=()):
    """Writes `ladder.md`, `ladder.csv`, `test_time.csv`, `cells.csv` and, with matplotlib, `ladder.png`.

    Args:
        results: list of (cell, result), see `ladder_cell.run_cell`; every method on the same screens and seeds.
        output: folder.
        command: that made them.
        more: lines for the page, behind the main table.

    Returns:
        The main table, `pandas.DataFrame`.
    """
    table, at_test_time = main_table(results), adaptive_table(results)
    table.to_csv(output / "ladder.csv", index=False)
    at_test_time.to_csv(output / "test_time.csv", index=False)
    cells_table(results).to_csv(output / "cells.csv", index=False)
    page = markdown(results, table, at_test_time, command, more)
    (output / "ladder.md").write_text(page)
    print(page)
    try:
        plot(table, output / "ladder.png")
    except ImportError:
        print('No picture: matplotlib is missing. pip install "keras-abra[tune]"')
    return table


def cells_table(results):
    """One row for each training, split and experiment."""
    return pd.DataFrame(
        {
            "method": cell["method"],
            "screen": cell["screen"]["seed"],
            "seed": cell["seed"],
            "split": split,
            "experiment": experiment,
            "accuracy": found["accuracy"],
            "sites": found["count"],
        }
        for cell, result in results
        for split, scores in (result["splits"] | result.get("test_time", {})).items()
        for experiment, found in scores["experiment"].items()
    )


def main_table(results):
    """One row a method, accuracies in percent, differences in points, costs in those of ERM."""
    cells, rows = cells_table(results), []
    for method in dict.fromkeys(cell["method"] for cell, _ in results):
        own = [(cell, result) for cell, result in results if cell["method"] == method]
        scores = {split: [r["splits"][split] for _, r in own] for split in ("id_test", "val", "test")}
        row = {"method": method, "trainings": len(own)}
        row |= {split: 100 * np.mean([s["accuracy"] for s in found]) for split, found in scores.items()}
        row["test_sd"] = 100 * np.std([s["accuracy"] for s in scores["test"]], ddof=1) if len(own) > 1 else np.nan
        row["test_wells"] = 100 * np.mean([s["well_accuracy"] for s in scores["test"]])
        row["worst"] = 100 * np.mean([min(e["accuracy"] for e in s["experiment"].values()) for s in scores["test"]])
        for name in sorted({name for s in scores["test"] for name in s["cell_type"]}):
            row[name] = 100 * np.mean([s["cell_type"][name]["accuracy"] for s in scores["test"]])
        for name, baseline in {**{b: b for b in BASELINES}, "random": control_of(method)}.items():
            row |= _difference(cells, "test", method, baseline, name)
        row |= _difference(cells, "test", method, "erm", "erm_worst", worst=True)
        for name in ("effective_rank", "separation"):
            row[name] = np.mean([r.get("embedding", {}).get(name, np.nan) for _, r in own])
        row["epochs"] = np.mean([r["epochs"] for _, r in own])
        row |= _costs(results, own)
        row["together"] = _takes_together(own[0][0]["settings"])
        row["at_most"] = sum(r["at_most"] for _, r in own)
        row["diverged"] = sum(r["diverged"] for _, r in own)
        rows.append(row)
    return pd.DataFrame(rows)


def adaptive_table(results):
    """One row a method: `test` with what takes an experiment's images or controls together; AdaBN beside ERM's, and
    beside the same models without it."""
    cells, rows = cells_table(results), []
    for method, found in cells.groupby("method", sort=False):
        row = {"method": method}
        for split in ("test", *TEST_TIME):
            part = found[found["split"] == split]
            whole = len(part) == sum(found["split"] == "test")  # a training that diverged has no other scores
            row[split] = 100 * np.average(part["accuracy"], weights=part["sites"]) if whole else np.nan
        row |= _difference(cells, "adabn", method, "erm", "erm")
        rows.append(row | _interval(differences(cells, "adabn", method, method, "test"), "plain"))
    return pd.DataFrame(rows)


def differences(cells, split, method, baseline, its_split=None, worst=False):
    """For each screen, an array `(seeds, experiments)` of accuracy minus the baseline's (on `its_split`, else the
    same); None if not both are there. With `worst`, `(seeds, 1)`: of a training's worst experiment minus the worst of
    the baseline's, which may be another."""
    tables = []
    for name, where in ((method, split), (baseline, its_split or split)):
        part = cells[(cells["method"] == name) & (cells["split"] == where)]
        tables.append(part.set_index(["screen", "seed", "experiment"])["accuracy"])
    paired = (tables[0] - tables[1]).dropna()
    if paired.empty or len(paired) != sum((cells["method"] == method) & (cells["split"] == "test")):
        return None
    if worst:
        own, other = (table[table.index.isin(paired.index)].groupby(["screen", "seed"]).min() for table in tables)
        return [part.to_numpy()[:, None] for _, part in (own - other).groupby("screen")]
    return [part.unstack("experiment").to_numpy() for _, part in paired.groupby("screen")]


def _difference(cells, split, method, baseline, name, worst=False):
    return _interval(None if method == baseline else differences(cells, split, method, baseline, worst=worst), name)


def _interval(found, name):
    values = [np.nan] * 3 if found is None else [100 * value for value in paired_bootstrap(found)]
    return dict(zip((f"vs_{name}", f"vs_{name}_low", f"vs_{name}_high"), values, strict=True))


def _costs(results, own):
    """Training cost, counted (`keras_abra.step_cost`) and timed, in that of ERM on the same screen with the same
    seed, of trainings that came to an end."""
    erm = {(c["screen"]["seed"], c["seed"]): r for c, r in results if c["method"] == "erm" and not r["diverged"]}
    counted, timed = [], []
    for cell, result in own:
        base = erm.get((cell["screen"]["seed"], cell["seed"]))
        if base is not None and not result["diverged"]:
            steps = result["steps"] / base["steps"]
            counted.append(np.nan if result["step_cost"] is None else steps * result["step_cost"])
            timed.append(steps * result["step_seconds"] / max(base["step_seconds"], 1e-12))
    return {name: np.mean(v) if v else np.nan for name, v in (("cost_counted", counted), ("cost_timed", timed))}


def _takes_together(settings):
    """Whether the method needs images of an experiment, or controls of a plate, together at test time."""
    return bool(settings.get("batch_statistics")) or settings.get("normalize", "image") != "image"


def markdown(results, table, at_test_time, command, more=()):
    """The page."""
    cell = results[0][0]
    screens = sorted({cell["screen"]["seed"] for cell, _ in results})
    seeds = sorted({cell["seed"] for cell, _ in results})
    screen = {name: value for name, value in cell["screen"].items() if name != "seed"}
    types = sorted({name for _, result in results for name in result["splits"]["test"]["cell_type"]})
    commits, machines = (
        sorted({result.get(name, "unknown") for _, result in results}) for name in ("commit", "machine")
    )
    lines = [
        "# Ladder",
        "",
        f"`{command}`; commit {', '.join(commits)}; machine {' or '.join(machines)}. Written by the script.",
        "",
        f"Screens {screens}, seeds {seeds}; {screen}; rule of convergence {cell['rule']}. Accuracy in percent of "
        "sites, mean over trainings; worst: mean over trainings of the worst test experiment. Differences in points "
        "with the paired bootstrap 95 % interval over screens, seeds and experiments (recipes/paired_bootstrap.py says "
        "how often it holds with few screens; each experiment counts alike); screens of the same real images are not "
        "independent, and there the interval is of these images alone. Cost: of a whole training, in ERM's, counted "
        "and in processor time, without those that diverged.",
        "",
        "| method | id_test | val | **test** | sd | wells | worst | "
        + " | ".join(types)
        + " | epochs | cost | timed |",
        "|" + "---|" * (10 + len(types)),
    ]
    for row in table.to_dict("records"):
        numbers = [row[k] for k in ("id_test", "val", "test", "test_sd", "test_wells", "worst", *types)]
        numbers = [_number(v) for v in numbers]
        numbers[2] = f"**{numbers[2]}**"
        costs = [_number(row["epochs"], 0), _number(row["cost_counted"], 2), _number(row["cost_timed"], 2)]
        lines.append(f"| {_name(row)} | " + " | ".join(numbers + costs) + " |")
    if table["together"].any():
        lines += ["", f"{TOGETHER} takes images of a test experiment, or controls of its plates, together, no labels."]
    lines += [
        *more,
        "",
        "| test, difference to | ERM | ArcFace | ArcFace + DSU (`dsu`) | its control | worst, to ERM's worst |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['method']} | {_intervals(row, (*BASELINES, 'random', 'erm_worst'))} |"
            for row in table.to_dict("records")
        ),
        "",
        "Embeddings of test: effective rank, and share of their variance between classes.",
        "",
        "| method | effective rank | separation |",
        "|---|---|---|",
        *(
            f"| {row['method']} | {_number(row['effective_rank'])} | {_number(row['separation'], 2)} |"
            for row in table.to_dict("records")
        ),
        "",
        "With an experiment's test images (AdaBN) or its negative controls (typical variation normalization, TVN) "
        "taken together: adaptive, not to be compared with the above. TVN and its own baseline answer by the nearest "
        "class mean of embeddings.",
        "",
        "| method | test | AdaBN | nearest class | TVN | AdaBN - AdaBN of ERM | AdaBN - without |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in at_test_time.to_dict("records"):
        numbers = " | ".join(_number(row[name]) for name in ("test", *TEST_TIME))
        lines.append(f"| {row['method']} | {numbers} | {_intervals(row, ('erm', 'plain'))} |")
    return "\n".join([*lines, "", "![accuracy on test experiments](ladder.png)", ""])


def plot(table, file):
    """Accuracy on test experiments, and the difference to ERM with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.5 + 0.25 * len(table)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, height), layout="constrained", sharey=True)
    places = np.arange(len(table))[::-1]
    left.errorbar(table["test"], places, xerr=table["test_sd"].fillna(0), fmt="o", color="black", capsize=2)
    left.set_yticks(places, table["method"])
    left.set_xlabel("accuracy on test experiments, % (sd of trainings)")
    mean, low, high = (table[f"vs_erm{end}"] for end in ("", "_low", "_high"))
    right.errorbar(
        mean, places, xerr=[(mean - low).clip(lower=0), (high - mean).clip(lower=0)], fmt="o", color="black", capsize=2
    )
    right.axvline(0, color="grey", linestyle=":")
    right.set_xlabel("difference to ERM, points (95 % interval)")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _name(row):
    notes = [
        f"{row[k]} {text}" for k, text in (("at_most", "at the epochs' limit"), ("diverged", "diverged")) if row[k]
    ]
    return row["method"] + TOGETHER * row["together"] + (f" ({', '.join(notes)})" if notes else "")


def _intervals(row, names):
    return " | ".join(
        ""
        if np.isnan(row[f"vs_{n}"])
        else f"{row[f'vs_{n}']:+.1f} [{row[f'vs_{n}_low']:+.1f}, {row[f'vs_{n}_high']:+.1f}]"
        for n in names
    )


def _number(value, digits=1):
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def describe_commit():
    """Of this code; "unknown" where git cannot tell."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
