"""A template and a table's columns -> the paths of a screen's files, none of which leaves the source folder."""

import os
import re
import string
from pathlib import Path

import pandas as pd

from tfrecords.images import CHANNEL
from tfrecords.table import check_cells

_FIELD = re.compile(r"\{([^{}:]+)(?::(0\d+))?\}")


def fields_of(template):
    """Names in the braces of a template, `channel` left aside, in order.

    Raises:
        ValueError: on a brace that belongs to no name.
    """
    if re.search(r"[{}]", _FIELD.sub("", template)):
        raise ValueError(
            f"The template {template!r} has a brace that encloses no name, or a width that is not such as 02. "
            "Expected such as '{plate}/{well}_f{site:02}_ch{channel}.tif'."
        )
    if re.search(r"\{channel:", template):
        raise ValueError(
            f"The template {template!r} gives a width to {CHANNEL}, whose names stand as they are. Write {CHANNEL}, "
            'and the names as in the files: channels = ["01", "02"].'
        )
    return [match[1] for match in _FIELD.finditer(template) if match[0] != CHANNEL]


def fill_template(template, columns, table, source, prefix=""):
    """Puts each row's values into a template.

    Args:
        template: see `own_screen.read_screen`.
        columns: dict of name -> (pandas.Series of str, name of the column in the table, for messages).
        table: as `table.read_table` gives it, for messages.
        source: folder of the images.
        prefix: what paths may begin with that is not below the source, as of another machine.

    Returns:
        pandas.Series of str: paths with `/` below the source, `{channel}` still in place. (CellProfiler's tables have
        full paths, and folders that end in a `/`.)

    Raises:
        ValueError: naming the row whose path would lie outside the source folder, or whose value cannot stand in it.
    """
    paths, end = "", 0
    for match in _FIELD.finditer(template):
        paths = paths + template[end : match.start()]
        end = match.end()
        if match[0] == CHANNEL:
            paths = paths + CHANNEL
            continue
        values, name = columns[match[1]]
        check_cells(table.assign(**{name: values}), name, ~values.str.contains(r"[{}\x00-\x1f]"), "no brace in a path")
        values = _pad(match, table.assign(**{name: values}), name, wells=True)
        paths = paths + (values.str.removesuffix("/") if template[end:].startswith("/") else values)
    paths = pd.Series(paths + template[end:], index=table.index, dtype=object)
    if prefix:
        paths = paths.str.replace(f"^{re.escape(prefix.removesuffix('/'))}/", "", regex=True)
    for root in dict.fromkeys([os.path.abspath(source), os.path.realpath(source)]):
        paths = paths.str.removeprefix(f"{Path(root).as_posix()}/")
    good = paths.map({path: _stays_inside(path) for path in paths.unique()}).to_numpy(bool)
    filled = f"images = {template!r}"
    check_cells(
        table.assign(**{filled: paths}),
        filled,
        good,
        f"a path below the source folder (relative, or full and inside {str(source)!r}), with / between folders "
        "(no \\), without '.' or '..'; `prefix = ...` names what full paths of another place begin with",
    )
    return paths


def combine(template, table, is_label=False):
    """Texts of several columns: `"{Row}{Column:02}"`, `"{Compound} {Dose}"`.

    Args:
        template: names of the table's columns in braces, whole numbers padded by `:02`.
        table: as `table.read_table` gives it.
        is_label: whether columns may be empty: without the first there is no label, without others it ends sooner.

    Returns:
        pandas.Series of str, without blanks around it.

    Raises:
        ValueError: naming the row whose value is missing or cannot be padded.
    """
    texts, end, empty = "", 0, None
    for match in _FIELD.finditer(template):
        absent = table[match[1]].str.strip() == ""
        if not is_label:
            check_cells(table, match[1], ~absent, f"a value, for {template!r}")
        empty = absent if empty is None else empty
        texts = texts + template[end : match.start()] + _pad(match, table, match[1])
        end = match.end()
    return (texts + template[end:]).str.strip().where(~empty, "").astype(object)


def _pad(match, table, name, wells=False):
    """The values of a column for a field of a template: as they are, or padded with zeros; `wells`: A1, too, as A01."""
    if not match[2]:
        return table[name]
    expected = f"a whole number, which {match[0]} pads (1, and not 1.0)" + (", or a well such as A1" if wells else "")
    pattern = re.compile(r"[A-Za-z]{1,2}\d{1,3}|\d{1,18}" if wells else r"\d{1,18}")
    check_cells(table, name, table[name].str.fullmatch(pattern), expected)

    def padded(value):
        number = value.lstrip(string.ascii_letters)
        return value.removesuffix(number) + format(int(number), match[2])

    return table[name].map(padded)


def check_links(source, files, rows):
    """Raises a ValueError if a file, or a folder on the way to it, is a link that leads out of the source folder.

    Args:
        source: the folder.
        files: for each site, a list of paths below it that exist, as texts.
        rows: for each site, a text that names its file and row.
    """
    root, inside = os.path.realpath(source), {}
    for file, row in ((file, row) for of_site, row in zip(files, rows, strict=True) for file in of_site):
        folder, _, name = file.rpartition("/")
        if folder not in inside:
            real = os.path.realpath(os.path.join(root, folder))
            with os.scandir(real) as entries:
                inside[folder] = real, {entry.name for entry in entries if entry.is_symlink()}
        real, links = inside[folder]
        real = os.path.realpath(os.path.join(real, name)) if name in links else real
        if not Path(real).is_relative_to(root):
            raise ValueError(
                f"{row}: {file!r} is, or lies behind, a link that leads out of the source folder {str(source)!r}, to "
                f"{real!r}. Expected files inside it: name the folder that holds them as the source, with the "
                "tables copied or linked into it."
            )


def _stays_inside(path):
    # A backslash or a drive's letter would lead out on Windows.
    parts = path.split("/")
    return "\\" not in path and not re.match(r"[A-Za-z]:", path) and not {"", ".", ".."} & set(parts)
