"""All that a build decides, before anything is written: a source and options -> which site goes where, and how."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tfrecords.channels import CHANNELS, WILDS_CHANNELS, find_missing, stamp_files
from tfrecords.faults import MOST, Faults, describe_fault
from tfrecords.images import Size, channel_files, load_channel
from tfrecords.intensity import DEFAULT, parse_intensity
from tfrecords.labels import class_map
from tfrecords.leaks import check_splits, describe_repeats, find_repeats, repeating_sites, share_wells
from tfrecords.manifest import SCHEMA, hash_bytes
from tfrecords.own_paths import check_links
from tfrecords.own_screen import read_screen
from tfrecords.plan import SITES_PER_SHARD, hash_plan, plan_shards
from tfrecords.png import png_planes
from tfrecords.reports import report_controls, report_emptied, report_left_out, report_missing, report_numbers
from tfrecords.sources import COLUMNS, find_layout, read_sites
from tfrecords.splits import LEFT_OUT, assign_splits


class Prepared(NamedTuple):
    """What to build.

    `options`, JSON values, say all that decides the records; `sites` is the table of those to write, with `split`;
    `excluded` has `site_id`, `split` and `reason`; `size` is that of the files; `planes` says how PNG files are
    stored, see `png.png_planes`, and is None for raw pixels; `repeats` are the layouts that come twice, see
    `leaks.find_repeats`.
    """

    options: dict
    sites: pd.DataFrame
    excluded: pd.DataFrame
    classes: list
    shards: list
    size: Size
    planes: tuple | None
    repeats: pd.DataFrame

    @property
    def image_shape(self):
        """(height, width, channels) of an image in a record."""
        edge = self.options["image_size"] or self.options["crop"]
        return (*((edge, edge) if edge else self.size[:2]), len(self.options["channels"]))

    def digests(self, source):
        """dict of a shard's name -> a short text that changes with all that decides its bytes.

        Of the image files these are size and times: a file that was put in the place of another counts as changed (its
        state has), and so do those of a source that was copied.
        """
        table = self.sites[[*COLUMNS, "path"]].sort_values("site_id")
        stamps = stamp_files(source, table["path"], self.options["channels"])
        rows = {
            row[0]: hash_bytes(repr((row, stamp)).encode())
            for row, stamp in zip(table.itertuples(index=False, name=None), stamps, strict=True)
        }
        intensity = self.options["intensity"]
        measured = intensity is not None and parse_intensity(intensity)[0] != "fixed"
        same = {  # Grey levels are measured on some sites of a plate, whichever shard they are in.
            experiment: hash_bytes("".join(map(rows.get, ids)).encode()) if measured else ""
            for experiment, ids in table.groupby("experiment")["site_id"]
        }
        given = repr((self.size[:2], self.image_shape, self.planes, intensity))
        return {
            shard.name: hash_bytes("".join([given, same[shard.experiment], *map(rows.get, shard.site_ids)]).encode())[
                :16
            ]
            for shard in self.shards
        }


# The options that the user gives, under these names in the manifest as well.
OPTIONS = ("layout", "splits", "label", "channels", "crop", "image_size", "encoding", "seed", "exclude_leaks", "screen")
ENCODINGS = ("raw", "png")


def prepare_build(
    source,
    *,
    layout="auto",
    splits=None,
    label="sirna_id",
    channels=None,
    crop=None,
    image_size=None,
    encoding="raw",
    seed=0,
    exclude_leaks=False,
    screen=None,
    strict=False,
    excluded=None,
):
    """Decides all of a build: reads the tables, looks which files are there, splits, and plans the shards.

    `prepare_build(source, **{name: manifest["options"][name] for name in OPTIONS})` decides again what a manifest
    says was decided; its `options` are equal as long as the source is.

    Args:
        source, layout, splits, label, channels, crop, image_size, encoding, seed, exclude_leaks, screen,
            strict: see `build_records`.
        excluded: the table of sites that a build left out, to leave them out again although their files may have
            come; None (default) for a new build.

    Returns:
        `Prepared`.

    Raises:
        ValueError: if a table, an option or the first image is not as it must be, or sites lack files and `strict`.
    """
    source = Path(source)
    layout, screen, splits = _choose(source, layout, screen, splits)
    own = splits.removeprefix("column:") if splits.startswith("column:") else None
    sites = read_sites(source, layout, own, screen)
    names = screen and dict(enumerate(screen["channels"], 1))
    channels = _check_channels(channels, names or (WILDS_CHANNELS if layout == "wilds" else CHANNELS), names)
    if layout == "screen":
        _check_site_numbers(sites["site"], splits)
    sites["split"] = assign_splits(sites, splits)
    if layout == "screen":
        report_numbers(sites)
        report_left_out(sites)
    classes = class_map(sites, label, trained="train" in set(sites["split"]))
    if not classes:
        print(f"No site has a label in the column {label!r}: these records can be predicted, and not scored.")
    check_splits(sites, mixed=splits == "mixed-to-test")
    reasons = pd.Series(f"left out by the splits {splits}", index=sites.index, dtype=object)
    used = sites["split"] != LEFT_OUT
    reasons[used] = find_missing(source, sites[used], channels, names and [names[i] for i in channels])
    report_missing(source, sites[used], reasons[used], channels, strict, own=layout == "screen")
    if excluded is not None:
        lacking = excluded[excluded["reason"].str.match("no files|missing channels")].set_index("site_id")["reason"]
        reasons = reasons.mask((reasons == "") & sites["site_id"].isin(lacking.index), sites["site_id"].map(lacking))
    repeats = _find_repeats(sites, sites[reasons == ""], exclude_leaks)
    if exclude_leaks:
        reasons = reasons.mask(reasons == "", repeating_sites(sites, repeats))
    complete = sites[reasons == ""]
    files = [[file for file, _ in channel_files(path, channels)] for path in complete["path"]]
    check_links(source, files, complete["row" if screen else "site_id"])
    if complete.empty:
        raise ValueError(
            f"The splits {splits!r}{' without repeated layouts' if exclude_leaks else ''} leave out every site "
            "that has files. Take another scheme."
        )
    if set(complete["split"]) == {"train"}:
        print("WARNING: all sites are in train; there is nothing to validate or test on.")
    report_emptied(sites, complete)
    if layout == "screen":
        described = "well_type" in screen["columns"] or "controls" in screen
        report_controls(complete, described, (sites["well_type"][used] == "negative_control").sum())
    if exclude_leaks and "train" in set(sites["split"]) and "train" not in set(complete["split"]):
        raise ValueError(
            "Every training plate repeats the layout of a plate in another split, as replicates do: without repeated "
            "layouts nothing is left to train on. Build without exclude_leaks, and read the warning above when you "
            "judge the scores."
        )
    excluded = sites.loc[reasons != "", ["site_id", "split"]].assign(reason=reasons[reasons != ""])
    path, name, first = _load_first(source, sorted(complete["path"]), channels)
    size = Size(*first.shape, name, _planes_of(screen, path))
    load_channel(source / name, size, channel_files(path, channels)[0][1])
    intensity = screen and screen.get("intensity", DEFAULT if first.dtype != "uint8" else None)
    if intensity is not None:
        parse_intensity(intensity)
    _check_edges(first.shape, crop, image_size)
    shards = plan_shards(complete, seed)
    if encoding not in ENCODINGS:
        raise ValueError(f"Unknown encoding {encoding!r}. Expected one of {', '.join(ENCODINGS)}.")
    whole = crop is None and image_size is None and intensity is None
    planes = png_planes(source, path, channels, whole) if encoding == "png" else None
    given = (layout, splits, label, list(channels), crop, image_size, encoding, seed, exclude_leaks, screen)
    options = {
        **dict(zip(OPTIONS, given, strict=True)),
        "schema": SCHEMA,
        "intensity": intensity,
        "sites_per_shard": SITES_PER_SHARD,
        "plan": hash_plan(shards),
        "table": hash_bytes(
            complete[[*COLUMNS, *_own_columns(complete, screen)]].sort_values("site_id").to_csv(index=False).encode()
        )[:16],
    }
    return Prepared(options, complete, excluded.sort_values("site_id"), classes, shards, size, planes, repeats)


def _own_columns(sites, screen):
    """What records say of a screen of one's own beside RxRx1's columns: where files are, names that are numbered."""
    if not screen:
        return []
    return ["path", *(f"{kind}_name" for kind in ("plate", "site") if not _are_numbers(sites, kind))]


def _are_numbers(sites, kind):
    return (sites[f"{kind}_name"] == sites[kind].astype(str)).all()


def _load_first(source, paths, channels):
    """The first image that can be read; those before it are named by the build, with all that cannot."""
    faults = []
    for path in paths[:MOST]:
        name, plane = channel_files(path, channels)[0]
        try:
            return path, name, load_channel(source / name, plane=plane)
        except (ValueError, OSError) as error:
            faults.append(describe_fault(error))
    raise Faults(faults)


def _planes_of(screen, path):
    """How many channels a file must have that holds all of them; None where a file holds one, or the layout decides."""
    return len(screen["channels"]) if screen and channel_files(path, (1,))[0][1] is not None else None


def _find_repeats(sites, complete, exclude):
    # The whole table knows the layouts, and which controls stand in one place everywhere; only pairs of plates of which
    # something is built matter.
    plates = pd.MultiIndex.from_frame(complete[["experiment", "plate"]].drop_duplicates())
    if len(plates) > 1 and not share_wells(sites):
        print(
            f"WARNING: no two plates have a well of one name (found such as {sites['well'].iloc[0]!r}), so that "
            "layouts that come again cannot be found. Let the column `well` be the place on the plate, such as A01."
        )
    repeats = find_repeats(sites)
    for columns in (["experiment", "plate"], ["of_experiment", "of_plate"]):
        repeats = repeats[pd.MultiIndex.from_frame(repeats[columns]).isin(plates)]
    repeats = repeats.reset_index(drop=True)
    named = repeats
    if "plate_name" in sites:
        names = dict(zip(sites["plate"], sites["plate_name"], strict=True))
        named = repeats.assign(plate=repeats["plate"].map(names), of_plate=repeats["of_plate"].map(names))
    report = describe_repeats(named)
    if report:
        trained = complete["split"] == "train"
        left = trained & (repeating_sites(complete, repeats) == "")
        advice = "Build with --exclude-leaks to leave the first out."
        if trained.any() and not left.any():
            advice = "That is every training plate, as where plates are replicates: judge the scores by it."
        print(f"{report}\n{'The first are left out.' if exclude else advice}")
    return repeats


def _check_site_numbers(numbers, splits):
    """Says where schemes go by RxRx1's two sites of a well, 1 and 2, and a screen of one's own has other ones."""
    needed = {"wilds": 2, "mixed-to-test": 1}.get(splits)
    if needed is None or numbers.nunique() == 1 or (numbers == needed).any():
        return
    text = (
        f"The splits {splits!r} go by the number of the site, {needed} among them; found "
        f"{', '.join(map(str, sorted(numbers.unique())[:5]))}. Take another scheme, or number the sites of a well from "
        "1 in the table."
    )
    if splits == "mixed-to-test":  # nothing would be left to train on
        raise ValueError(text)
    print(f"WARNING: {text}")


def _choose(source, layout, screen, splits):
    if layout == "auto":
        layout = "screen" if screen is not None else find_layout(source)
    if screen is not None and layout != "screen":
        raise ValueError(f"The layout is {layout!r}, but a screen of one's own is described. Leave one of them out.")
    if layout != "screen":
        return layout, None, splits or "wilds"
    screen = read_screen(source, screen)
    if splits is None:
        splits = "table"
        if "splits" not in screen and "dataset" not in screen["columns"]:
            raise ValueError(
                "Nothing says which experiments are trained on and which are tested on. List them under `splits` in "
                "the screen's description, name a column for `dataset`, or ask for folds, such as --splits kfold-5-1."
            )
    return layout, screen, splits


def _check_channels(channels, there, names):
    numbers = {name: number for number, name in (names or {}).items()}
    # A text is a name, or a number where no channel's name is one; a number is a place, as manifests have it.
    places = not any(name.isdecimal() for name in numbers)
    channels = there if channels is None else [c if isinstance(c, int) else numbers.get(c, c) for c in channels]
    channels = tuple(int(c) if isinstance(c, str) and c.isdecimal() and places else c for c in channels)
    if not channels or len(set(channels)) < len(channels) or not set(channels) <= set(there):
        raise ValueError(
            f"The channels {', '.join(map(str, channels)) or 'none'} cannot be taken. Expected some of "
            f"{', '.join(map(str, numbers or there))}, each once, in the order wanted."
        )
    return channels


def _check_edges(size, crop, image_size):
    if crop is not None and not 1 <= crop <= min(size):
        raise ValueError(f"The crop {crop} is not between 1 and the {min(size)} pixels on disk.")
    if image_size is not None and not 1 <= image_size <= (crop or min(size)):
        place = f"the {min(size)} pixels on disk" if crop is None else f"the {crop} pixels of the crop"
        raise ValueError(f"The image size {image_size} is not between 1 and {place}.")
    if image_size is not None and crop is None and size[0] != size[1]:
        print(
            f"WARNING: fields of {size[0]} x {size[1]} pixels (height x width) are squeezed into squares, in "
            f"height {size[0] / size[1]:.2f} times as much as in width. A crop of {min(size)} keeps their proportions."
        )
