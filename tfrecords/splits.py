"""Which site is trained on, validated on, tested on."""

import re

import numpy as np

SPLITS = ("train", "id_test", "val", "test")
SCHEMES = ("wilds", "mixed-to-test", "rxrx1", "kaggle", "table", "kfold-K-I", "column:NAME")
# The validation experiments of RxRx1-WILDS, one of each cell type; on Kaggle they were the public leaderboard.
VAL_EXPERIMENTS = ("HEPG2-08", "HUVEC-17", "RPE-08", "U2OS-04")
LEFT_OUT = ""


def assign_splits(sites, scheme="wilds"):
    """Gives each site its split.

    Experiments are the unit: the column `dataset` says which may be trained on, and all but `mixed-to-test` keep the
    others whole and apart. A table that names `val` itself is taken at its word; one that knows only train and test
    (RxRx1's release, Kaggle) has `VAL_EXPERIMENTS` for it.

    Args:
        sites: table of `read_sites`.
        scheme: one of
            `wilds` (default), as RxRx1-WILDS (Koh et al. 2021, appendix E.3, "official"): `train` is site 1 and
            `id_test` site 2 of the training experiments, `val` and `test` are both sites of the others (where wells
            have more sites `train` has all but 2);
            `mixed-to-test`, WILDS's measure of what an unseen experiment costs: site 1 of the test experiments is
            trained on in place of as many training experiments of the same cell type, those of the lowest numbers,
            and site 2 of the test experiments is `test`; site 2 of the training experiments is left out;
            `rxrx1`, the release's own: both sites of the 33 training and the 18 test experiments, no `val`;
            `kaggle`: the same, with the public leaderboard's four experiments as `val`;
            `table`: `dataset` as it stands, with both sites;
            `kfold-K-I`: `val` is fold I, from 1, of K folds of whole training experiments, see `assign_folds`; `test`
            is every experiment not trained on;
            `column:NAME`: the split that the table itself names in that column (read by `read_sites`).

    Returns:
        pandas.Series of str named "split", indexed as `sites`; empty where the scheme leaves a site out.

    Raises:
        ValueError: on an unknown scheme, or if an experiment lies in two of train, val and test.
    """
    if scheme.startswith("column:"):
        return sites["own_split"].astype(object).rename("split")
    _check_datasets(sites)
    dataset = sites["dataset"].astype(object)
    first, second = sites["site"] == 1, sites["site"] == 2
    has_val = (dataset == "val").any()
    with_val = dataset if has_val else dataset.mask((dataset == "test") & _in(sites, VAL_EXPERIMENTS), "val")
    two = dataset.mask(dataset == "val", "test")
    if scheme == "wilds":
        split = with_val.mask((dataset == "train") & second, "id_test")
    elif scheme == "mixed-to-test":
        split = with_val.mask((with_val == "train") & ~first | _in(sites, _replaced(sites, with_val)), LEFT_OUT)
        split = split.mask((split == "test") & first, "train")
    elif scheme == "rxrx1":
        split = two
    elif scheme in ("kaggle", "table"):
        split = with_val if scheme == "kaggle" else dataset
    else:
        folds, fold = _parse_folds(scheme)
        of = assign_folds(sites[dataset == "train"], folds)
        split = two.mask(_in(sites, [name for name, number in of.items() if number == fold]), "val")
    return split.rename("split")


def assign_folds(sites, folds):
    """Divides experiments among folds for cross-validation, each cell type as evenly as can be.

    The experiments are dealt like cards, cell type after cell type, each in the order of their numbers: folds differ
    by at most one experiment in all, and by at most one of each cell type. Neither seed nor row order has a part in it.

    Args:
        sites: table with `experiment` and `cell_type`, of the training experiments.
        folds: number of folds, 2 or more.

    Returns:
        dict of experiment -> number of its fold, from 1.

    Raises:
        ValueError: if there are more folds than experiments.
    """
    # An experiment of several cell types counts once, with the first of them.
    pairs = sites[["cell_type", "experiment"]].drop_duplicates().sort_values("cell_type")
    experiments = pairs.drop_duplicates("experiment").values.tolist()
    if len(experiments) < folds:
        fewer = f"Ask for fewer folds, such as kfold-{len(experiments)}-1." if len(experiments) > 1 else "Add some."
        raise ValueError(f"{folds} folds need as many training experiments; found {len(experiments)}. {fewer}")
    order = sorted(experiments, key=lambda pair: (pair[0], natural(pair[1])))
    return {experiment: 1 + i % folds for i, (_, experiment) in enumerate(order)}


def natural(name):
    """A sorting key by which HUVEC-2 comes before HUVEC-10."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]


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


def _check_datasets(sites):
    pairs = sites[["experiment", "dataset", "site_id"]].drop_duplicates(["experiment", "dataset"])
    torn = pairs[pairs["experiment"].duplicated(keep=False)].sort_values(["experiment", "dataset"], kind="stable")
    if len(torn):
        first = torn[torn["experiment"] == torn["experiment"].iloc[0]]
        places = " and ".join(f"{row.dataset or 'no part'} (site {row.site_id})" for row in first.itertuples())
        raise ValueError(
            f"The experiment {first['experiment'].iloc[0]!r} lies in {places}; {torn['experiment'].nunique()} "
            f"experiments do such. Expected each in one of train, val and test: otherwise its appearance is "
            "learned before it is tested. Give all rows of an experiment the same value of `dataset`."
        )


def _in(sites, experiments):
    return sites["experiment"].isin(list(experiments))


def _replaced(sites, dataset):
    found = sites.assign(dataset=dataset)[["cell_type", "experiment", "dataset"]].drop_duplicates()
    for _, rows in found.groupby("cell_type"):
        names = sorted(rows.loc[rows["dataset"] == "train", "experiment"], key=natural)
        yield from names[: (rows["dataset"] == "test").sum()]


def _parse_folds(scheme):
    match = re.fullmatch(r"kfold-(\d+)-(\d+)", scheme)
    if not match:
        raise ValueError(f"Unknown scheme of splits {scheme!r}. Expected one of {', '.join(SCHEMES)}.")
    folds, fold = int(match[1]), int(match[2])
    if folds < 2 or not 1 <= fold <= folds:
        raise ValueError(f"{scheme!r} is no fold: expected 2 or more folds, counted from 1, such as kfold-5-1.")
    return folds, fold
