"""The table of the embedded screen: which siRNA stands in which well of which experiment."""

import numpy as np
import pandas as pd

COLUMNS = (
    "site_id",
    "well_id",
    "cell_type",
    "dataset",
    "experiment",
    "plate",
    "well",
    "site",
    "well_type",
    "sirna",
    "sirna_id",
)
EXPERIMENTS = {
    "train": {"HUVEC": 5, "RPE": 3, "HEPG2": 3, "U2OS": 3},
    "val": {"HUVEC": 1, "RPE": 1, "HEPG2": 1, "U2OS": 1},
    "test": {"HUVEC": 3, "RPE": 2, "HEPG2": 2, "U2OS": 1},
}
TREATMENTS = 44
PLATES = 4
SITES = 2
POSITIVE_CONTROLS = 2
WELLS = tuple(f"{row}{column:02d}" for row in "BCDEFGHIJKLMNO" for column in range(2, 24))
NEGATIVE_WELL = "B02"


def layout(seed, treatments=TREATMENTS, experiments=None):
    """The metadata table of a screen, one row per site, as RxRx1 has it.

    The treatments form four plate groups that always travel together on one plate; an experiment puts the groups on
    its plates in one of four rotations and draws the wells anew. Every plate holds each treatment of its group once,
    every positive control once, and the negative control in well B02. A plate has 308 wells, of which only those that
    are needed are used. Experiments are numbered per cell type through train, val and test, as RxRx1-WILDS does.

    Args:
        seed: int. The same seed gives the same table.
        treatments: number of treatment siRNAs, a multiple of 4. Default 44.
        experiments: `{"train"|"val"|"test": {cell type: number of experiments}}`; by default `EXPERIMENTS`.

    Returns:
        `pandas.DataFrame` with the columns `COLUMNS`, in the order of splits, experiments, plates, wells and sites.

    Raises:
        ValueError: if the treatments do not fill four equal plate groups, or a split or cell type is unknown.
    """
    experiments = EXPERIMENTS if experiments is None else experiments
    _check(treatments, experiments)
    rng = np.random.default_rng([seed, 0])
    numbers = np.sort(rng.choice(np.arange(10000, 60000), treatments + POSITIVE_CONTROLS, replace=False))
    names = [f"s{number}" for number in rng.permutation(numbers)]
    groups = rng.permutation(treatments).reshape(PLATES, -1)
    rows, last = [], dict.fromkeys(EXPERIMENTS["train"], 0)
    for split in EXPERIMENTS:
        for cell_type, count in experiments.get(split, {}).items():
            for _ in range(count):
                last[cell_type] += 1
                experiment = f"{cell_type}-{last[cell_type]:02d}"
                rotation = int(rng.integers(PLATES))
                for plate in range(1, PLATES + 1):
                    group = groups[(plate - 1 + rotation) % PLATES]
                    for well, sirna_id in sorted(_fill_plate(rng, group, treatments).items()):
                        rows += _site_rows(split, cell_type, experiment, plate, well, sirna_id, treatments, names)
    return pd.DataFrame(rows, columns=COLUMNS)


def _fill_plate(rng, group, treatments):
    sirna_ids = [*group, *range(treatments, treatments + POSITIVE_CONTROLS)]
    free = [well for well in WELLS if well != NEGATIVE_WELL]
    places = rng.choice(len(free), len(sirna_ids), replace=False)
    plate = {free[place]: int(sirna_id) for place, sirna_id in zip(places, sirna_ids, strict=True)}
    return plate | {NEGATIVE_WELL: treatments + POSITIVE_CONTROLS}


def _site_rows(split, cell_type, experiment, plate, well, sirna_id, treatments, names):
    if sirna_id < treatments:
        well_type, sirna = "treatment", names[sirna_id]
    elif sirna_id < treatments + POSITIVE_CONTROLS:
        well_type, sirna = "positive_control", names[sirna_id]
    else:
        well_type, sirna = "negative_control", "EMPTY"
    well_id = f"{experiment}_{plate}_{well}"
    return [
        (f"{well_id}_{site}", well_id, cell_type, split, experiment, plate, well, site, well_type, sirna, sirna_id)
        for site in range(1, SITES + 1)
    ]


def _check(treatments, experiments):
    room = PLATES * (len(WELLS) - 1 - POSITIVE_CONTROLS)
    if treatments % PLATES or not PLATES <= treatments <= room:
        raise ValueError(
            f"The treatments fill {PLATES} equal plate groups: expected a multiple of {PLATES} from {PLATES} to "
            f"{room}; received treatments={treatments}."
        )
    for split, counts in experiments.items():
        if split not in EXPERIMENTS or not set(counts) <= set(EXPERIMENTS["train"]):
            raise ValueError(
                f"experiments maps the splits {', '.join(EXPERIMENTS)} to numbers of experiments of the cell types "
                f"{', '.join(EXPERIMENTS['train'])}; received {split!r}: {counts!r}."
            )
