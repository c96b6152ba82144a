"""Numbers as arguments, Python's and NumPy's alike."""

import numpy as np


def plain(value):
    """A NumPy scalar (or an array without dimensions) as Python's number, for a config; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)
