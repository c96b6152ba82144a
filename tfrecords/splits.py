"""Which site is trained on, validated on, tested on."""

import numpy as np

SPLITS = ("train", "id_test", "val", "test")
# The validation experiments of RxRx1-WILDS, one of each cell type; on Kaggle they were the public leaderboard.
VAL_EXPERIMENTS = ("HEPG2-08", "HUVEC-17", "RPE-08", "U2OS-04")


def assign_splits(sites):
    """Splits sites as RxRx1-WILDS does (Koh et al. 2021, appendix E.3, scheme "official").

    `train` is site 1 and `id_test` site 2 of the training experiments; `val` and `test` are both sites of experiments
    that were never trained on. A table that names `val` itself is taken at its word; one that knows only train and
    test (RxRx1's release, Kaggle) has `VAL_EXPERIMENTS` taken out of its test part.

    Args:
        sites: table of `read_sites`.

    Returns:
        pandas.Series of str named "split", indexed as `sites`.

    Raises:
        ValueError: if an experiment lies in two of train, val and test.
    """
    dataset = sites["dataset"]
    of_experiment = sites.groupby("experiment")["dataset"].unique()
    torn = of_experiment[of_experiment.map(len) > 1]
    if len(torn):
        raise ValueError(
            f"The experiment {torn.index[0]!r} lies in {' and '.join(sorted(torn.iloc[0]))} "
            f"({len(torn)} experiments do). Expected each in one of train, val and test: otherwise its appearance is "
            "learned before it is tested. Give all rows of an experiment the same value of `dataset`."
        )
    if not (dataset == "val").any():
        dataset = dataset.mask((dataset == "test") & sites["experiment"].isin(VAL_EXPERIMENTS), "val")
    second = (dataset == "train") & (sites["site"] == 2)
    return dataset.where(~second, "id_test").astype(object).rename("split")


def check_split(split, counts):
    """Raises a ValueError if `split` is no split's name, or is empty.

    Args:
        split: name asked for.
        counts: dict of split -> number of sites.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Expected one of {', '.join(SPLITS)}.")
    if not counts.get(split):
        full = ", ".join(f"{name} ({counts[name]})" for name in SPLITS if counts.get(name))
        raise ValueError(
            f"The split {split!r} is empty: no site of it was built. Splits with sites: {full or 'none'}. Ask for "
            "one of these, or look in excluded.csv for sites that lacked files."
        )


def count_splits(split):
    """Counts the sites of each split: dict of name -> int, in the order of `SPLITS`, empty ones too."""
    names, counts = np.unique(np.asarray(split, dtype=str), return_counts=True)
    found = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return {name: found.get(name, 0) for name in SPLITS}
