"""What a model's logits say about each site, and how right they are."""

import numpy as np
import pandas as pd

TOP = 5


def predictions_table(sites, split, logits, names):
    """One row a site: what it is, and the five most probable classes.

    Args:
        sites: table of `list_sites`, in the order of the logits.
        split: name of the split.
        logits: `(sites, classes)`.
        names: name of each class.

    Returns:
        pandas.DataFrame with `site_id`, `split`, `experiment`, `cell_type`, `plate`, `well`, `site` (plate and site as
        the table of a screen of one's own has them), `sirna`, `label` (the name of the class, empty where none of the
        names is known to be it: the siRNA, or what else was asked for), `predicted_1` .. `predicted_5` and their
        `probability_1` .. `probability_5`.
    """
    probabilities = _softmax(logits)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    table = describe_sites(sites, split)
    names = np.asarray(names)
    table["label"] = [None if pd.isna(label) else names[int(label)] for label in sites["label"]]
    for rank in range(order.shape[1]):
        table[f"predicted_{rank + 1}"] = names[order[:, rank]]
        table[f"probability_{rank + 1}"] = np.take_along_axis(probabilities, order[:, rank : rank + 1], 1)[:, 0]
    return table


def wells_table(sites, split, logits, names):
    """One row a well, by the mean of all its sites' probabilities.

    Args:
        sites, split, logits, names: as for `predictions_table`.

    Returns:
        pandas.DataFrame with the columns of `predictions_table`, but `well_id` and `sites`, their number, in place of
        `site_id` and `site`.
    """
    wells = pd.DataFrame(_softmax(logits)).groupby(sites["well_id"].to_numpy(), sort=False)
    known = sites.groupby("well_id", sort=False)[["label", "sirna"]].first()  # that is not missing
    first = sites.drop_duplicates("well_id")
    first = first.assign(**{name: known[name].to_numpy() for name in known})
    table = predictions_table(first, split, np.log(np.maximum(wells.mean().to_numpy(), 1e-300)), names)
    table = table.drop(columns="site").rename(columns={"site_id": "well_id"})
    table["well_id"] = first["well_id"].to_numpy()
    table.insert(table.columns.get_loc("well") + 1, "sites", wells.size().to_numpy())
    return table


def classes_table(sites, wells):
    """How often each class is told right: `split`, `label`, `sites`, `accuracy`, `wells` and `well_accuracy`
    (fractions), of those with a label.

    Args:
        sites: of `predictions_table`, of any splits.
        wells: of `wells_table`, of the same.
    """
    parts = []
    for table, names in ((sites, ("sites", "accuracy")), (wells, ("wells", "well_accuracy"))):
        right = (table["predicted_1"] == table["label"]).groupby([table["split"], table["label"]], sort=False)
        parts.append(right.agg(["count", "mean"]).set_axis(names, axis=1))
    return pd.concat(parts, axis=1).reset_index()


def describe_sites(sites, split):
    """The columns of `predictions_table` that say which site it is, as a new table."""
    table = sites[["site_id", "experiment", "cell_type", "plate_name", "well", "site_name", "sirna"]]
    table = table.rename(columns={"plate_name": "plate", "site_name": "site"})
    table.insert(1, "split", split)
    return table


def score(sites, logits):
    """Accuracy of a split, as fractions.

    Args:
        sites: table of `list_sites` with labels, in the order of the logits.
        logits: `(sites, classes)`.

    Returns:
        dict: `accuracy` over sites, `well_accuracy` (probabilities averaged over the sites of a well), `count` of
        sites, and `accuracy` and `count` for each `cell_type` and each `experiment`.
    """
    label = sites["label"].to_numpy("int64")
    probabilities = _softmax(logits)
    right = pd.Series(probabilities.argmax(1) == label, index=sites.index)
    wells = pd.DataFrame(probabilities).groupby(sites["well_id"].to_numpy()).mean()
    truth = pd.Series(label).groupby(sites["well_id"].to_numpy()).first()
    result = {
        "accuracy": float(right.mean()),
        "well_accuracy": float((wells.to_numpy().argmax(1) == truth.to_numpy()).mean()),
        "count": int(len(right)),
    }
    for key in ("cell_type", "experiment"):
        groups = right.groupby(sites[key])
        result[key] = {
            name: {"accuracy": float(accuracy), "count": int(count)}
            for (name, accuracy), count in zip(groups.mean().items(), groups.count(), strict=True)
        }
    return result


def score_labelled(sites, logits):
    """`score` of the sites that have a label."""
    known = sites["label"].notna()
    return score(sites[known].reset_index(drop=True), logits[known.to_numpy()])


def embedding_quality(embeddings, labels):
    """Whether embeddings have collapsed.

    Args:
        embeddings: `(sites, dim)`; their length does not count.
        labels: class of each, `(sites,)`.

    Returns:
        dict: `effective_rank`, the exponential of the entropy of the shares of the singular values (Roy and Vetterli,
        EUSIPCO 2007), of centred unit embeddings: 1 to dim; `separation`, share of their variance that lies between
        classes: 0 to 1. NaN where all embeddings are alike.
    """
    unit = np.asarray(embeddings, "float64")
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    unit -= unit.mean(0)
    total = (unit**2).sum()
    if not total > 1e-20:
        return {"effective_rank": float("nan"), "separation": float("nan")}
    shares = np.linalg.svd(unit, compute_uv=False)
    shares = shares[shares > 1e-12 * shares[0]] / shares.sum()
    means = pd.DataFrame(unit).groupby(np.asarray(labels)).transform("mean").to_numpy()
    return {
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "separation": float((means**2).sum() / total),
    }


def print_scores(metrics, title=None, mixed=False):
    """Prints accuracy in percent, one row a split, one column a cell type; `mixed`: whether test has experiments that
    were trained on."""
    splits = metrics["splits"]
    if not splits:
        return
    cell_types = sorted({name for split in splits.values() for name in split["cell_type"]})
    if title is None:
        unseen = "other sites, also of experiments trained on" if mixed else "experiments never seen"
        notes = {
            "test": f"test: {unseen}, scored once",
            "val": "val: experiments never seen, on which the epoch was chosen",
        }
        note = next((note for name, note in notes.items() if name in splits), "no experiment that was not trained on")
        title = f"{metrics['method']}, seed {metrics['seed']}; {note}"
    print(f"\nAccuracy (%) of {title}")
    widths = [max(8, len(name) + 2) for name in cell_types]
    heads = "".join(f"{name:>{width}}" for name, width in zip(cell_types, widths, strict=True))
    print(f"{'split':8}{'sites':>8}{'accuracy':>10}{'by well':>9}{heads}")
    for name, split in splits.items():
        cells = [split["cell_type"].get(c, {"accuracy": float("nan")})["accuracy"] for c in cell_types]
        figures = "".join(f"{100 * value:{width}.1f}" for value, width in zip(cells, widths, strict=True))
        print(f"{name:8}{split['count']:8d}{100 * split['accuracy']:10.1f}{100 * split['well_accuracy']:9.1f}{figures}")


def _softmax(logits):
    shifted = np.asarray(logits, "float64")
    shifted = np.exp(shifted - shifted.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
