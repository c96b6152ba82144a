"""Which class a site belongs to: the class map."""

LABELS = ("sirna_id", "cell_type", "experiment", "well_type")
_OWN = " (of a screen of your own: in the column that its description calls `sirna`)"
WELL_TYPES = ("treatment", "positive_control", "negative_control")  # in the order of their classes


def class_map(sites, label="sirna_id", trained=True):
    """Numbers the classes of a label column from 0, without gaps.

    siRNAs are ordered as treatments, positive controls, negative controls, and by `sirna_id` inside each: in RxRx1
    this is `sirna_id` itself (treatments 0-1107, positive controls 1108-1137, negative control 1138). Other columns
    are ordered by name. All rows of the table count, whether they have files or not, so that a part of the images
    gives the same numbers as the whole.

    Args:
        sites: table of `read_sites`.
        label: one of `LABELS`.
        trained: whether there are sites to train on among them. A screen that is only to be predicted needs no labels.

    Returns:
        List of dicts in class order: `name`; `value`, what a record holds in the label's key; `treatment`, whether a
        treatment well belongs to it. Empty without any label.

    Raises:
        ValueError: on an unknown label column, a siRNA with two ids or an id with two siRNAs, or if there are sites to
            train on and none at all has a label.
    """
    if label not in LABELS:
        raise ValueError(
            f"Unknown label column {label!r}. Expected one of {', '.join(LABELS)}; a column of your own is what the "
            "description of your screen calls `sirna`."
        )
    known = sites[sites[label].notna()]
    if trained and not len(known):
        raise ValueError(
            f"No site has a label in the column {label!r}{_OWN if label == 'sirna_id' else ''}. Expected at least one: "
            "fill the column, or take another."
        )
    if label == "sirna_id":
        known = known.assign(sirna=known["sirna"].where(known["sirna"].notna(), known["sirna_id"].astype(str)))
    pairs = known[[label, "well_type"]].assign(name=known["sirna"] if label == "sirna_id" else known[label])
    pairs = pairs.drop_duplicates()
    if label == "sirna_id":
        _check_one_to_one(pairs[["sirna_id", "name"]].drop_duplicates(), known)
    classes = {}
    for row in pairs.itertuples(index=False):
        value = int(row[0]) if label == "sirna_id" else str(row[0])
        kind = WELL_TYPES.index(row[1])
        name, before = classes.get(value, (str(row[2]), kind))
        classes[value] = (name, min(kind, before))
    rank = (lambda value: (classes[value][1], value)) if label == "sirna_id" else None
    return [
        {"name": classes[value][0], "value": value, "treatment": classes[value][1] == 0}
        for value in sorted(classes, key=rank)
    ]


def _check_one_to_one(pairs, known):
    for key, other in (("sirna_id", "name"), ("name", "sirna_id")):
        twice = pairs[pairs[key].duplicated(keep=False)]
        if len(twice):
            culprit = twice.iloc[0][key]
            rows = twice[twice[key] == culprit]
            found = sorted(str(value) for value in rows[other])
            same = known["sirna_id"].eq(rows["sirna_id"].iloc[1]) & known["sirna"].eq(rows["name"].iloc[1])
            site_id = known.loc[same, "site_id"].iloc[0]
            key, other = (word.replace("name", "sirna") for word in (key, other))
            raise ValueError(
                f"The {key} {culprit} goes with {len(found)} values of {other}: {', '.join(found[:5])}. Expected one "
                f"id for each siRNA and one siRNA for each id; the second is at the site {site_id}. Correct the table."
            )
