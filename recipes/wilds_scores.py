"""What RxRx1-WILDS asks for: its prediction files and its metrics (p-lambda/wilds, rxrx1_dataset.py)."""

import pandas as pd

from tfrecords.manifest import EXCLUDED
from tfrecords.mirror import local_folder

_PLACE = ["experiment", "plate", "well", "site"]


def in_table_order(sites, table):
    """Positions of `sites` in the order of metadata.csv, which WILDS's files have.

    Args:
        sites: table of `list_sites`.
        table: path of metadata.csv.

    Raises:
        ValueError: if a site is not in the table.
    """
    rows = pd.read_csv(table, usecols=_PLACE, dtype=str).assign(order=lambda rows: range(len(rows)))
    order = sites[_PLACE].astype(str).merge(rows, on=_PLACE, how="left", validate="one_to_one")["order"]
    if order.isna().any():
        raise ValueError(
            f"{table} lacks {int(order.isna().sum())} sites of the records (first: "
            f"{sites.loc[order.isna().to_numpy(), 'site_id'].iloc[0]!r}). Expected the table they were built from."
        )
    return order.to_numpy().argsort(kind="stable")


def count_lacking(records, split):
    """Number of sites of a split that were left out of records, as they lack files or by exclude_leaks."""
    excluded = pd.read_csv(local_folder(records) / EXCLUDED)
    return int((excluded["split"] == split).sum())


def prediction_file(split, seed):
    """The name that WILDS's evaluation looks for."""
    return f"rxrx1_split:{split}_seed:{seed}_epoch:best_pred.csv"


def wilds_metrics(score):
    """WILDS's names for a split's `scores.score`: accuracy over sites, of each cell type, and of the worst one."""
    groups = score["cell_type"]
    metrics = {"acc_avg": score["accuracy"]}
    for name, group in groups.items():
        metrics |= {f"acc_cell_type:{name}": group["accuracy"], f"count_cell_type:{name}": group["count"]}
    return metrics | {"acc_wg": min(group["accuracy"] for group in groups.values())}
