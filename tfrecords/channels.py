"""Which of a site's files are there."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from tfrecords.images import channel_files

# w1-w6: nuclei, endoplasmic reticulum, actin, nucleoli and cytoplasmic RNA, mitochondria, Golgi.
CHANNELS = (1, 2, 3, 4, 5, 6)
# Red, green and blue of WILDS's files.
WILDS_CHANNELS = (1, 2, 3)
_ASKED_AT_ONCE = 16


def find_missing(source, sites, channels=CHANNELS, names=None):
    """Says of each site which channel files it lacks. Lists each folder once instead of asking for each file.

    Args:
        source: folder of the tables.
        sites: table of `read_sites`.
        channels: numbers of the channels wanted.
        names: names of the channels wanted, for the reasons; None (default) for w1, w2 and so on.

    Returns:
        pandas.Series of str, indexed as `sites`: empty where all files are there, otherwise the reason to leave the
        site out, such as `"missing channels w5, w6"` or `"no files"`.
    """
    source = Path(source)
    names = [f"w{channel}" for channel in channels] if names is None else names
    listed = {}

    def is_there(file):
        folder, _, name = file.rpartition("/")
        if folder not in listed:
            listed[folder] = list_files(source / folder)
        return name in listed[folder]

    reasons = []
    for path in sites["path"]:
        files = [file for file, _ in channel_files(path, channels)]
        missing = [name for name, file in zip(names, files, strict=True) if not is_there(file)]
        if not missing:
            reasons.append("")
        elif len(missing) == len(files):
            reasons.append("no files")
        else:
            reasons.append("missing channels " + ", ".join(missing))
    return pd.Series(reasons, index=sites.index, dtype=object, name="reason")


def describe_missing(sites, reasons, show=5):
    """Sums up the sites that lack files: count, count of each reason, and the first few names.

    Returns:
        str of a few lines, or None if nothing is missing.
    """
    lacking = reasons != ""
    if not lacking.any():
        return None
    lines = [f"{int(lacking.sum()):,} of {len(sites):,} sites lack channel files:"]
    for reason, rows in sites[lacking].groupby(reasons[lacking]):
        names = sorted(rows["site_id"])
        more = f", and {len(names) - show:,} more" if len(names) > show else ""
        lines.append(f"  {reason}: {len(names):,} ({', '.join(names[:show])}{more})")
    return "\n".join(lines)


def find_newer(source, paths, channels, moment):
    """Finds the channel files that were changed after a moment.

    Args:
        source: folder of the tables.
        paths: of sites, see `images.channel_files`.
        channels: numbers of the channels.
        moment: seconds since the epoch, by the clock that the files' times are of.

    Returns:
        List of str: the files, below the source, in the order of `paths`. One that is gone, or cannot be asked, is not
        among them.
    """
    files = [*dict.fromkeys(file for path in paths for file, _ in channel_files(path, channels))]
    stamps = zip(files, _stamps(source, files), strict=True)
    return [file for file, stamp in stamps if stamp and max(stamp[1:]) > moment * 1e9]  # a copy may keep an older time


def stamp_files(source, paths, channels):
    """Size and times of the last change of content and state (ns) of each channel file, None for one that cannot be
    reached: a tuple for each site. (No inode: some network file systems give a file another one from time to time.)
    """
    sites = [[file for file, _ in channel_files(path, channels)] for path in paths]
    stamps = _stamps(source, [file for files in sites for file in files])
    for files in sites:
        yield tuple(itertools.islice(stamps, len(files)))


def _stamps(source, files):
    """Of each file in turn; a network file system answers many at a time."""

    def ask(block):
        return [_stamp(os.path.join(source, file)) for file in block]

    blocks = [files[i : i + 256] for i in range(0, len(files), 256)]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        for block in pool.map(ask, blocks):
            yield from block


def _stamp(path):
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def list_files(folder):
    """Names of what is in a folder; a link that leads nowhere (git-annex has such for what was not fetched) is not."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
