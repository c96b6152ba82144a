"""A bar on a terminal; in the log of a job, a line now and then."""

import os
import sys

from tqdm import tqdm

_SECONDS = 30  # between the lines of a log


def progress_bar(total, desc, unit="site", **options):
    """A `tqdm` bar on stderr, or where that is no terminal a state every half minute. Its environment variables hold:
    `TQDM_DISABLE=1` for none, `TQDM_MININTERVAL` for other intervals."""
    if not sys.stderr.isatty() and "TQDM_MININTERVAL" not in os.environ:
        options = {"mininterval": _SECONDS, "maxinterval": _SECONDS, **options}
    return tqdm(total=total, desc=desc, unit=unit, **options)
