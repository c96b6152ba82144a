"""Which records there are: the index of a finished folder, as a table."""

from pathlib import Path

import pandas as pd

from tfrecords.manifest import INDEX, hash_bytes, read_manifest
from tfrecords.mirror import local_folder
from tfrecords.remote import is_remote
from tfrecords.splits import check_split

KINDS = ("treatment", "control")
# An experiment or a well of one's own may look like a number.
_TYPES = dict.fromkeys("site_id well_id cell_type dataset experiment well well_type sirna split shard".split(), str)
_TYPES |= {"sirna_id": "Int64", "label": "Int64"}


def list_sites(dest, split, kinds=("treatment",), experiments=None, check=True):
    """Lists the sites of a split in the order in which `read_records` gives them when it is not training.

    Args:
        dest: folder of records, or URL of one, see `mirror.local_folder`; no shard is fetched.
        split: train, id_test, val or test.
        kinds: which wells: `("treatment",)`, `("control",)` or both.
        experiments: names of some of the split's experiments. Default: all.
        check: whether the shards must be there (default), in a folder of this machine.

    Returns:
        pandas.DataFrame: RxRx1's 11 columns, `split`, `label` (Int64, missing where unknown), and where the record
        is: `shard`, `record`, its number in there, and `offset`, the byte at which it begins; and `plate_name` and
        `site_name` as the table of a screen of one's own has them, where `plate` and `site` are numbers given to them.

    Raises:
        ValueError: if the folder is not whole, a kind, split or experiment is unknown, or no such site was built.
    """
    folder = local_folder(dest)
    manifest = read_manifest(folder)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"Unknown kinds {kinds!r}. Expected {KINDS}, or one of them.")
    counts = {}
    for shard in manifest["shards"]:
        counts[shard["split"]] = counts.get(shard["split"], 0) + shard["count"]
    check_split(split, counts)
    shards = [row for row in manifest["shards"] if row["split"] == split and row["kind"] in kinds]
    if not shards:
        raise ValueError(
            f"The split {split!r} has {counts[split]} sites, but none of kind {' or '.join(kinds)}. "
            f"Pass kinds={tuple(kind for kind in KINDS if kind not in kinds)!r} to read the others."
        )
    if check and not is_remote(dest):
        _check_shards(folder, shards)
    index = read_index(folder, manifest)
    sites = index[index["shard"].isin([row["name"] for row in shards])]
    if experiments is not None:
        wanted, known = {experiments} if isinstance(experiments, str | int) else {*experiments}, {*sites["experiment"]}
        if not wanted or wanted - known:
            raise ValueError(
                f"Expected as experiments some of {', '.join(sorted(known))}, which the split {split!r} has with sites "
                f"of this kind; received {', '.join(sorted(map(repr, wanted - known))) or 'none'}."
            )
        sites = sites[sites["experiment"].isin(wanted)]
    sites = sites.reset_index(drop=True)
    for kind in ("plate", "site"):
        names = {number: name for name, number in manifest.get("names", {}).get(f"{kind}s", {}).items()}
        sites[f"{kind}_name"] = sites[kind].map(names) if names else sites[kind].astype(str)
    return sites


def fetch_shards(dest, manifest, names):
    """Gives a folder on this machine in which these shards are, whole by their sizes.

    Args:
        dest: folder of records, or URL of one.
        manifest: of it.
        names: of shards.

    Raises:
        ValueError: naming a file that is not there, or has another size.
    """
    folder = local_folder(dest, shards=names)
    _check_shards(folder, [row for row in manifest["shards"] if row["name"] in names])
    return folder


def _check_shards(folder, shards):
    for shard in shards:
        path = Path(folder) / shard["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != shard["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, expected {shard['bytes']}"
            raise ValueError(
                f"{path} {state}. Run `python -m tfrecords.verify {folder}` for all that is wrong, "
                "with --repair to mend it."
            )


def read_index(dest, manifest):
    """Reads the index of all records, sorted by shard and record number.

    Raises:
        ValueError: if it is missing or not the one that the manifest names.
    """
    path = Path(dest) / INDEX
    if not path.is_file() or hash_bytes(path.read_bytes()) != manifest["index"]["sha256"]:
        raise ValueError(
            f"{path} is missing or was changed after the build. Run `python -m tfrecords.verify {dest} --repair`."
        )
    index = pd.read_csv(path, dtype=_TYPES, keep_default_na=False,
                        na_values={"sirna": [""], "sirna_id": [""], "label": [""]})  # fmt: skip
    return index.sort_values(["shard", "record"], ignore_index=True)


def keep_labelled(sites, split):
    """The sites that have a label.

    Args:
        sites: table of `list_sites`.
        split: its name.

    Raises:
        ValueError: if none has.
    """
    known = sites[sites["label"].notna()].reset_index(drop=True)
    if known.empty:
        raise ValueError(f"None of the {len(sites)} sites of the split {split!r} has a label.")
    return known
