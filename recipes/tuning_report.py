"""What a search found: a table and a picture of its trials."""

import pandas as pd


def trials_table(trials):
    """One row a trial: number, status, accuracy, hyperparameters and, where it failed, the reason."""
    rows = []
    for trial in trials:
        values = {k: v for k, v in trial.hyperparameters.values.items() if not k.startswith("tuner/")}
        if "tuner/epochs" in trial.hyperparameters.values:
            values["epochs"] = trial.hyperparameters.values["tuner/epochs"]
        reason = (trial.message or "").strip().splitlines()[-1:]
        accuracy = trial.score if trial.status == "COMPLETED" else None
        rows.append({"trial": trial.trial_id, "status": trial.status, "val_accuracy": accuracy, **values})
        rows[-1]["reason"] = reason[0] if reason else ""
    return pd.DataFrame(rows).sort_values("trial", ignore_index=True)


def show_trials(table, output, default):
    """Prints the table, best first, and writes `trials.csv` and `margin.png`.

    Args:
        table: see `trials_table`.
        output: folder.
        default: the default margin, marked in the picture.
    """
    table.to_csv(output / "trials.csv", index=False)
    ranked = table.sort_values("val_accuracy", ascending=False)
    print("\n" + ranked.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    if "margin" in table:
        plot_margins(table, output / "margin.png", default)


def plot_margins(table, file, default):
    """Margin against accuracy on the validation experiments; every trial stands in it, failed ones on the axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    ended = table[table["val_accuracy"].notna()]
    failed = table[table["val_accuracy"].isna()]
    colour = ended["scale"] if "scale" in ended else None
    points = axes.scatter(ended["margin"], 100 * ended["val_accuracy"], c=colour, cmap="viridis", zorder=3)
    if colour is not None:
        figure.colorbar(points, label="scale")
    axes.set_ylim(bottom=0)
    if len(failed):
        axes.plot(failed["margin"], [0.0] * len(failed), "rx", label=f"failed ({len(failed)})", clip_on=False)
    axes.axvline(default, color="grey", linestyle=":", label="default")
    axes.set_xlabel("angular margin (radians)")
    axes.set_ylabel("accuracy on validation experiments (%)")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
