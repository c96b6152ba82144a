"""Guards what is tested on against what was trained on: sites, experiments, and plate layouts that come twice."""

import re

import numpy as np
import pandas as pd

# Of RxRx1's 28-30 positive controls a plate, 29-30 stand alike on plates of one layout and at most 7 on any two others;
# of its 277 treatments 100 % and at most 2.2 %. Half is far from both.
_ALIKE = 0.5
# Fewer wells alike may be chance, or a screen too small to tell.
_FEWEST = 5
_SIDES = {"train": 0, "id_test": 0, "val": 1, "test": 2}
_NAMES = ("train", "val", "test")


def check_splits(sites, mixed=False):
    """Raises a ValueError if something trained on is tested on as well.

    Args:
        sites: table with `site_id`, `experiment`, `path` and `split`, rows without a split left aside.
        mixed: whether an experiment may be in several splits, as in `mixed-to-test`.

    Raises:
        ValueError: if a site, or its file under another name, is in two splits; or, unless `mixed`, if an experiment
            is in two of train (with id_test), val and test.
    """
    sites = sites[sites["split"] != ""]
    for column, name in (("site_id", "site"), ("path", "file")):
        torn = _first_torn(sites[column], sites["split"])
        if torn:
            raise ValueError(
                f"The {name} {torn[0]!r} is in the splits {' and '.join(torn[1])}: what is tested would have been "
                "trained on. Give each site one split, and list it once."
            )
    torn = None if mixed else _first_torn(sites["experiment"], sites["split"].replace("id_test", "train"))
    if torn:
        raise ValueError(
            f"The experiment {torn[0]!r} is in {' and '.join(torn[1])}. Expected each in one of train, val and test: "
            "otherwise its appearance is learned before it is tested. Give its rows one split, or take the scheme "
            "mixed-to-test, which measures just that."
        )


def share_wells(sites):
    """Whether wells of different plates have names in common, so that layouts can be compared.

    Args:
        sites: table with `experiment`, `plate` and `well`.
    """
    wells = sites.drop_duplicates(["experiment", "plate", "well"])["well"]
    return wells.map(place_of_well).duplicated().any()


def place_of_well(name):
    """One text for all ways to write a place on a plate: `b2`, `B2` and `B02` are one. Other names are themselves."""
    found = re.fullmatch(r"([A-Za-z]{1,2})0*(\d{1,3})", name, re.ASCII)
    return f"{found[1].upper()}{int(found[2]):02d}" if found else name


def find_repeats(sites):
    """Finds plates of one layout in different splits: a model that learns what a well's place looks like knows there
    what was put into it.

    Two plates repeat each other if at least half of their treatments, and five, stand in the same wells; where those
    of one are unknown (Kaggle's test plates), at least half of their positive controls do. Positive controls that stand
    in one well on more than half of all plates tell nothing and do not count.

    Args:
        sites: table with `experiment`, `plate`, `well`, `well_type`, `sirna_id` and `split`.

    Returns:
        pandas.DataFrame with a row for each pair of plates: `experiment`, `plate`, `split` of the one nearer to
        training (train or id_test before val before test; `split` is train for both), the same with `of_` before it
        for the other; `evidence` (treatment or positive_control), `alike` and `wells`, the numbers of wells that agree
        and that were compared. Sorted.
    """
    sites = sites[sites["split"] != ""]
    if not share_wells(sites):
        sites = sites[:0]
    side = sites["split"].map(_SIDES)
    # In mixed-to-test a plate is on two sides; the site that was trained on decides.
    plates = side.groupby([sites["experiment"], sites["plate"]]).min()
    side = plates.to_numpy()
    treated, treatments = _layouts(sites, plates.index, "treatment")
    known = (treated >= 0).sum(axis=1)
    controls, _ = _layouts(sites, plates.index, "positive_control", widespread=False)
    rows = []
    for i in np.flatnonzero(side < 2) if treatments or controls.size else ():
        others = np.flatnonzero(side > side[i])
        for layouts, evidence in ((treated, "treatment"), (controls, "positive_control")):
            by_treatment = (known[others] >= _FEWEST) & (known[i] >= _FEWEST)
            chosen = others[by_treatment == (evidence == "treatment")]
            alike = ((layouts[chosen] == layouts[i]) & (layouts[i] >= 0)).sum(axis=1)
            wells = np.minimum((layouts[chosen] >= 0).sum(axis=1), (layouts[i] >= 0).sum())
            for j in np.flatnonzero((alike >= _FEWEST) & (alike >= _ALIKE * wells)):
                other = chosen[j]
                pair = (*plates.index[i], _NAMES[side[i]], *plates.index[other], _NAMES[side[other]])
                rows.append((*pair, evidence, int(alike[j]), int(wells[j])))
    one = ("experiment", "plate", "split")
    columns = [*one, *(f"of_{name}" for name in one), "evidence", "alike", "wells"]
    return pd.DataFrame(sorted(rows), columns=columns)


def describe_repeats(repeats, show=8):
    """Names the experiments and plates of `find_repeats`: str of a line for each pair of experiments, or None.

    By positive controls, plates cannot be told apart that have these in the same wells, as RxRx1's plates of one
    experiment do: then each is named as a repeat of each.
    """
    if repeats.empty:
        return None
    groups = list(repeats.groupby(["experiment", "split", "of_experiment", "of_split", "evidence"], sort=True))
    lines = [
        "WARNING: plates in different splits have one layout, so that a well's place in the first gives away the label "
        "in the second:"
    ]
    for (experiment, split, of_experiment, of_split, evidence), rows in groups[:show]:
        of_plates = rows.groupby("plate")["of_plate"].agg(lambda plates: "/".join(map(str, plates)))
        plates = ", ".join(f"{plate} = {others}" for plate, others in of_plates.items())
        lines.append(
            f"  {experiment} ({split}) = {of_experiment} ({of_split}), plates {plates}: by {rows['alike'].min()} or "
            f"more of {rows['wells'].max()} {evidence.replace('_', ' ')}s in the same wells"
        )
    if len(groups) > show:
        lines.append(f"  and {len(groups) - show:,} more pairs of experiments")
    return "\n".join(lines)


def repeating_sites(sites, repeats):
    """Says of each site whether `--exclude-leaks` leaves it out, and why.

    It is the side nearer to training that goes (with its id_test, which without training is not what its name says):
    so a test set stays the published one and its score comparable, at the price of fewer images to train on.

    Returns:
        pandas.Series of str, indexed as `sites`: empty, or the reason.
    """
    reasons, sides = {}, {}
    for row in repeats.itertuples():
        # By controls it cannot be told which plate of the other experiment it is, see `describe_repeats`.
        plate = f" plate {row.of_plate}" if row.evidence == "treatment" else ""
        text = f"repeats the layout of {row.of_experiment}{plate} in {row.of_split}"
        reasons.setdefault((row.experiment, row.plate), text)
        sides[row.experiment, row.plate] = row.split
    keys = zip(sites["experiment"], sites["plate"], sites["split"].replace("id_test", "train"), strict=True)
    found = [reasons[key[:2]] if sides.get(key[:2]) == key[2] else "" for key in keys]
    return pd.Series(found, index=sites.index, dtype=object)


def _first_torn(values, splits):
    pairs = pd.DataFrame({"value": values, "split": splits}).drop_duplicates()
    twice = pairs[pairs["value"].duplicated(keep=False)]
    if twice.empty:
        return None
    value = twice["value"].iloc[0]
    return value, sorted(set(twice.loc[twice["value"] == value, "split"]), key=lambda name: (_SIDES[name], name))


def _layouts(sites, plates, kind, widespread=True):
    rows = sites[(sites["well_type"] == kind) & sites["sirna_id"].notna()]
    rows = rows.assign(well=rows["well"].map(place_of_well)).drop_duplicates(["experiment", "plate", "well"])
    codes, wells = pd.factorize(rows["well"])
    layouts = np.full((len(plates), len(wells)), -1, np.int64)
    layouts[plates.get_indexer(pd.MultiIndex.from_frame(rows[["experiment", "plate"]])), codes] = rows["sirna_id"]
    if not widespread:
        for column in layouts.T:
            labels, counts = np.unique(column[column >= 0], return_counts=True)
            column[np.isin(column, labels[counts > len(plates) / 2])] = -1
    return layouts, len(wells)
