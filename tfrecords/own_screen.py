"""The description of a screen of one's own: what its table's columns are, where its images lie, what is a control."""

import tomllib
from pathlib import Path

from tfrecords.images import CHANNEL
from tfrecords.labels import WELL_TYPES
from tfrecords.splits import SPLITS

SCREEN_FILE = "screen.toml"
# Ours, on the left of `[columns]`; those that a table must have come first.
COLUMN_NAMES = ("experiment", "well", "plate", "site", "sirna", "well_type", "cell_type", "dataset")
_REQUIRED = COLUMN_NAMES[:2]
_TEXT, _TEXTS = "a text", "a list of texts"
_TABLE, _TABLE_OF_LISTS = "a table of texts", "a table of lists of texts"
_KEYS = {
    "table": _TEXT,
    "images": "a text, or a table of a text for each channel",
    "prefix": _TEXT,
    "channels": _TEXTS,
    "columns": _TABLE,
    "sites": _TEXTS,
    "cell_type": _TEXT,
    "controls": _TABLE_OF_LISTS,
    "well_types": _TABLE_OF_LISTS,
    "splits": _TABLE_OF_LISTS,
    "intensity": _TEXT,
}
# A key, and the column that says the same.
_EITHER = (("splits", "dataset"), ("controls", "well_type"), ("sites", "site"), ("cell_type", "cell_type"))
_EXAMPLE = """Such a file is

    table = "wells.csv"                                # CSV or Parquet, a row a site or a well
    images = "{plate}/{well}_f{site}_ch{channel}.tif"  # below the source folder
    channels = ["1", "2"]
    [columns]                                          # ours = "the table's"
    experiment = "Batch"
    plate = "Plate"
    well = "Well"
    site = "Field"
    sirna = "Compound"
    [controls]
    negative = ["DMSO"]
    [splits]
    train = ["Batch1", "Batch2"]
    test = ["Batch3"]"""


def read_screen(source, screen=None):
    """Reads and checks the description of a screen.

    Args:
        source: folder of the images.
        screen: a TOML file; what is in one, as a dict; or None for `screen.toml` in the source. Keys:
            `table`: CSV or Parquet (the extra `parquet`) file, below the source or with its full path, with a row for
            each site, or for each well where `sites` or one site a well is meant;
            `images`: where the files are below the source, with `{NAME}` for a column, ours or the table's,
            `{NAME:03}` for a whole number padded with zeros (or that of a well, A1), and `{channel}`; without
            `{channel}` one file holds all channels, as an RGB PNG or the pages of a TIFF; or a table of such a text for
            each channel;
            `prefix`: what full paths in the table begin with that is not below the source, as those of another machine,
            or of a bucket (`"s3://cellpainting-gallery/"`) that was copied into it;
            `channels`: names of the channels, as they stand in file names, or in the order of planes;
            `columns`: what the table calls our columns `experiment` and `well`, and as far as it has them `plate`
            (else 1), `site`, `sirna` (the label, of any kind; empty where unknown), `well_type`, `cell_type` and
            `dataset` (train, val or test); each may be put together of several: `"{Row}{Column:02}"`, which pads the
            column's number with a zero, or, as a label, `"{Compound} {Dose}"` (none where the first is empty);
            `sites`: the sites of each well, where a row is a well;
            `cell_type`: that of all rows, where there is no column;
            `controls`: the `negative` and `positive` ones, by their value in the column `sirna`, or `[""]` for those
            where it is empty;
            `well_types`: which values of the column `well_type` mean `treatment`, `positive_control` and
            `negative_control`, where they are not these words (`""`: the empty cells); all others are treatments if
            none are named as such, so that the column may be any that tells controls;
            `splits`: experiments for `train`, `val` and `test`, instead of a column `dataset`; others are left out;
            `intensity`: which grey levels become 0 and 255, see `intensity.parse_intensity`.

    Returns:
        dict of the keys that were given, `images` as a dict of channel -> template if it was a table.

    Raises:
        ValueError: naming the key that is missing, unknown or of another form.
    """
    place = "The screen's description"
    if not isinstance(screen, dict):
        path = Path(source) / SCREEN_FILE if screen is None else Path(screen)
        place, screen = str(path), _load(path)
    screen = {key: _as_texts(value) for key, value in screen.items() if value is not None}
    for key, value in screen.items():
        if key not in _KEYS:
            raise ValueError(f"{place} has the unknown key {key!r}. Expected some of {', '.join(_KEYS)}. {_EXAMPLE}")
        if not _fits(value, key):
            raise ValueError(f"{place}: expected {_KEYS[key]} for the key {key!r}; found {value!r}. {_EXAMPLE}")
    for key in ("table", "images", "columns"):
        if key not in screen:
            raise ValueError(f"{place} lacks the key {key!r}. {_EXAMPLE}")
    if isinstance(screen["images"], dict):
        screen.setdefault("channels", list(screen["images"]))
    _check_names(place, "columns", screen["columns"], COLUMN_NAMES)
    _check_names(place, "controls", screen.get("controls", {}), ("negative", "positive"))
    _check_names(place, "well_types", screen.get("well_types", {}), WELL_TYPES)
    _check_names(place, "splits", screen.get("splits", {}), [name for name in SPLITS if name != "id_test"])
    for name in _REQUIRED:
        if name not in screen["columns"]:
            raise ValueError(f"{place} does not say which column is the {name}. Add `{name} = ...` to its columns.")
    if "well_types" in screen and "well_type" not in screen["columns"]:
        raise ValueError(
            f"{place} has 'well_types', and no column to read them in. Add `well_type = ...` to its columns."
        )
    for name, column in screen["columns"].items():
        if CHANNEL in column:
            raise ValueError(
                f"{place} has {CHANNEL} in the column {name!r}, {column!r}: names in braces are the table's columns, "
                f"and {CHANNEL} is of `images`. Rename a column of that name in the table."
            )
    _check_channels(place, screen)
    for one, other in _EITHER:
        if one in screen and other in screen["columns"]:
            raise ValueError(f"{place} has both {one!r} and the column {other!r}, which may differ. Keep one of them.")
    for key in ("controls", "splits", "well_types"):
        values = [value for part in screen.get(key, {}).values() for value in part]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"{place} names {twice!r} twice under {key!r}. Expected each once.")
    return screen


def told_otherwise(screen):
    """Our columns that a description needs none for, as it says the same in another way."""
    return {column for one, column in _EITHER if one in screen}


def add_screen(parser):
    """Adds the options that describe a screen of one's own to a command line."""
    group = parser.add_argument_group(
        "a screen of your own", f"in {SCREEN_FILE} beside the images, in another file, or here (over what a file says)"
    )
    group.add_argument("--screen", help=f"TOML file that describes it (default: {SCREEN_FILE} in the source)")
    group.add_argument("--table", help="CSV or Parquet file, below the source or with its full path")
    group.add_argument("--images", help="where files are: '{plate}/{well}_f{site}_ch{channel}.tif'")
    columns = "what the table calls ours: experiment=Batch,plate=Plate,well=Well (or {Row}{Column:02}),..."
    group.add_argument("--columns", help=columns)
    group.add_argument("--controls", action="append", help="negative=DMSO or positive=NAME; may be repeated")
    group.add_argument("--intensity", help="grey levels that become 0 and 255: percentile:0.1,99.9 or fixed:0,4095")


def take_screen(arguments):
    """Takes the options of `add_screen` out of parsed arguments and gives the description: file, dict, or None.

    What the command line says is taken over what the file says, name by name. Where no file names channels, or it
    names others and the rest is on the command line, the option `channels` names them.

    Args:
        arguments: dict of the parsed command line; changed.

    Raises:
        ValueError: if the file is none, or a pair is not NAME=VALUE.
    """
    path = arguments["screen"]
    given = {key: arguments.pop(key) for key in ("table", "images", "columns", "controls", "intensity")}
    given = {key: value for key, value in given.items() if value is not None}
    if not given:
        return path
    if "columns" in given:
        given["columns"] = dict(map(_pair, given["columns"].split(",")))
    if "controls" in given:
        pairs = list(map(_pair, given["controls"]))
        given["controls"] = {kind: [value for name, value in pairs if name == kind] for kind, _ in pairs}
    file = Path(arguments["source"]) / SCREEN_FILE if path is None else Path(path)
    alone = {"table", "images", "columns"} <= set(given)
    screen = _as_texts(_load(file)) if file.exists() or path is not None or not alone else {}
    for one, column in _EITHER:
        if column in given.get("columns", {}):
            screen.pop(one, None)
        elif one in given and isinstance(screen.get("columns"), dict):
            screen["columns"].pop(column, None)
            if column == "well_type":
                screen.pop("well_types", None)
    for key in ("columns", "controls"):
        if key in given and isinstance(screen.get(key), dict):
            given[key] = screen[key] | given[key]
    screen |= given
    if arguments.get("channels") and not isinstance(screen.get("images"), dict):
        names = screen.get("channels")
        if names is None or (alone and not set(arguments["channels"]) <= {*names, *map(str, range(1, len(names) + 1))}):
            screen["channels"], arguments["channels"] = list(arguments["channels"]), None
    return screen


def _pair(text):
    name, is_pair, value = text.partition("=")
    if not is_pair:
        raise ValueError(f"Expected pairs NAME=VALUE, such as experiment=Batch,well=Well; found {text!r}.")
    return name.strip(), value.strip()


def _load(path):
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. {_EXAMPLE}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}. {_EXAMPLE}") from None


def _as_texts(value):
    # Batches, plates and channels may be numbers, in TOML as in the table.
    if isinstance(value, dict):
        return {str(key): _as_texts(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_texts(part) for part in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _fits(value, key):
    def is_text(value):
        return isinstance(value, str) and value != ""

    def are_texts(value, of=is_text):
        return isinstance(value, list) and len(value) > 0 and all(map(of, value))

    kind = _KEYS[key]
    if isinstance(value, dict):
        of_lists = {
            "controls": lambda value: are_texts(value) or value == [""],
            "well_types": lambda value: are_texts(value, lambda text: isinstance(text, str)),
        }
        part = {_TABLE: is_text, _KEYS["images"]: is_text, _TABLE_OF_LISTS: of_lists.get(key, are_texts)}.get(kind)
        return part is not None and len(value) > 0 and all(map(part, value.values()))
    return are_texts(value) if kind == _TEXTS else kind not in (_TABLE, _TABLE_OF_LISTS) and is_text(value)


def _check_names(place, key, found, expected):
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise ValueError(
            f"{place} has the unknown name {unknown[0]!r} in {key!r}. Expected some of {', '.join(expected)}."
        )


def _check_channels(place, screen):
    channels = screen.get("channels")
    if channels is None:
        raise ValueError(f'{place} does not name its channels. Add `channels = ["1", "2"]`, as in the names of files.')
    if len(set(channels)) < len(channels):
        raise ValueError(f"{place} names a channel twice: {', '.join(channels)}. Expected each once.")
    if isinstance(screen["images"], dict) and set(screen["images"]) != set(channels):
        raise ValueError(
            f"{place} has the channels {', '.join(channels)}, but images for {', '.join(screen['images'])}. "
            "Expected the same names."
        )
    files = list(screen["images"].values()) if isinstance(screen["images"], dict) else []
    numbered = next((file for file in files if CHANNEL in file), None)
    if numbered is not None:
        raise ValueError(
            f"{place} has the images {numbered!r} of one channel with {CHANNEL} in them. Expected there what the "
            f"channel's files are called; a pattern for all channels is a single text: images = {numbered!r}."
        )
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        same = " and ".join(name for name, file in screen["images"].items() if file == twice)
        raise ValueError(
            f"{place} has the images {twice!r} for the channels {same}. Expected files of its own for each; one file "
            "of all channels is a single text without {channel}."
        )
