"""Tables as they come: each case is built right, or refused with an error that names what was planted.

Hypothesis draws the tables. The environment variable TABLE_CASES raises the number of cases for a long run.
"""

import contextlib
import csv
import io
import os
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tfrecords.build import build_records
from tfrecords.frames import read_frames
from tfrecords.labels import class_map
from tfrecords.leaks import place_of_well
from tfrecords.plan import plan_shards
from tfrecords.sources import COLUMNS, read_sites
from tfrecords.splits import assign_splits

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis, of the extra `test`, is not installed")
st = hypothesis.strategies

CASES = int(os.environ.get("TABLE_CASES", 500))
# Of the cases that are right, one in so many is written, read back and compared pixel by pixel; all are planned.
WRITTEN = 20
PARTS = {"HUVEC-01": "train", "RPE-01": "train", "HUVEC-17": "val", "U2OS-05": "test"}
KINDS = {"B02": "negative_control", "B03": "treatment", "C04": "treatment", "O23": "positive_control"}
# No control characters, which are refused, nor halves of surrogate pairs, which no UTF-8 file holds.
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)
QUICK = hypothesis.settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def pixels_of(number):
    return np.full((2, 2), number % 256, np.uint8)


def save(path, header, rows, draw, ending="\n"):
    """Writes the table with as much freedom as CSV leaves."""
    text = io.StringIO()
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    csv.writer(text, quoting=quoting, lineterminator=ending).writerows([header, *rows])
    path.write_bytes((b"\xef\xbb\xbf" if draw(st.booleans()) else b"") + text.getvalue().encode())


def spoil(draw, path, header, rows, bad_cells, repeated):
    """Plants one fault, or none; gives its kind, and what the error must name (None: the case must be built).

    `bad_cells` are (column, value) that must be refused; `repeated` a row that must not come again.
    """
    kind = draw(st.sampled_from(["none", "none", "shuffled", "column more", "columns moved", "Windows", "one row",
                                 "no column", "column twice", "row twice", "short row", "long row", "bad cell",
                                 "empty", "no rows", "no text"]))  # fmt: skip
    rows, header, names, ending = [list(row) for row in rows], list(header), None, "\n"
    place = draw(st.integers(0, len(rows) - 1))
    if kind == "shuffled":
        rows = draw(st.permutations(rows))
    elif kind == "column more":
        header, rows = [*header, "more"], [[*row, draw(TEXT)] for row in rows]
    elif kind == "columns moved":
        order = draw(st.permutations(range(len(header))))
        header, rows = [header[i] for i in order], [[row[i] for i in order] for row in rows]
    elif kind == "Windows":
        ending = "\r\n"
    elif kind == "one row":
        rows = [rows[place]]
    elif kind in ("no column", "column twice"):
        i = draw(st.integers(0, len(header) - 1))
        names = [repr(header[i])]
        if kind == "no column":
            header, rows = header[:i] + header[i + 1 :], [row[:i] + row[i + 1 :] for row in rows]
        else:
            header, rows = [*header, header[i]], [[*row, row[i]] for row in rows]
    elif kind == "row twice":
        rows.append(rows[repeated(place)])
        names = [f"row {len(rows) + 1}", f"row {repeated(place) + 2}"]
    elif kind == "short row":
        rows[place] = rows[place][: draw(st.integers(1, len(header) - 1))]
        names = [f"row {place + 2}: expected {len(header)} values"]
    elif kind == "long row":
        rows[place] += [draw(TEXT)]
        names = [f"row {place + 2}: expected {len(header)} values"]
    elif kind == "bad cell":
        column, value = draw(st.sampled_from(bad_cells))
        rows[place][header.index(column)] = value
        names = [f"row {place + 2}"]
    save(path, header, rows, draw, ending)
    if kind == "empty":
        path.write_bytes(b"")
        names = ["is empty"]
    elif kind == "no rows":
        save(path, header, [], draw)
        names = ["no rows"]
    elif kind == "no text":
        path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
        names = ["cannot be read as a CSV table"]
    if names is not None:
        names.append(path.name)
    return kind, names, [dict(zip(header, row, strict=False)) for row in rows]


def check_build(source, dest, wanted, **options):
    """Builds, and compares each record: `wanted` maps a site id to its texts, its label and its pixels' number."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        manifest = build_records(source, dest, **options)
    value = {row["name"]: row["value"] for row in manifest["classes"]}
    found = {}
    for shard in manifest["shards"]:
        for record, fault in read_frames(dest / shard["name"]):
            assert fault is None
            feature = tf.train.Example.FromString(record).features.feature
            texts = [feature[key].bytes_list.value[0].decode() for key in ("experiment", "well", "well_type")]
            label = feature["sirna"].int64_list.value[0] if "sirna" in feature else None
            image = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
            assert len(set(image)) == 1
            found[feature["site_id"].bytes_list.value[0].decode()] = (*texts, label, int(image[0]))
    assert found == {
        site_id: (*texts, None if label is None else value[label], number % 256)
        for site_id, (texts, label, number) in wanted.items()
    }


def run(strategy, case):
    """Runs `case(draw, tally)` and asserts how many cases there were, and how many of them were built."""
    tally = Counter()

    @QUICK
    @hypothesis.given(strategy)
    def one(data):
        built = case(data.draw, tally)
        tally["cases"] += 1
        tally["built"] += built

    one()
    assert tally["cases"] >= CASES
    assert tally["built"] >= 0.3 * tally["cases"], tally
    assert tally["written"] >= tally["built"] // WRITTEN
    return tally


@pytest.fixture(scope="module")
def release_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any_release")
    for i, experiment in enumerate(PARTS):
        for plate in (1, 2):
            place = folder / "images" / experiment / f"Plate{plate}"
            place.mkdir(parents=True)
            for j, well in enumerate(KINDS):
                for site in (1, 2):
                    for channel in range(1, 7):
                        path = place / f"{well}_s{site}_w{channel}.png"
                        Image.fromarray(pixels_of(number(i, plate, j, site))).save(path)
    return folder


def number(experiment, plate, well, site):
    return 100 + experiment * 16 + plate * 8 - 8 + well * 2 + site


RELEASE_FAULTS = [
    *[("experiment", value) for value in ("", "HUVEC", "../HUVEC-01", "HUVEC-01 ", "HÜVEC-01")],
    *[("plate", value) for value in ("", "0", "-1", "1.5", "one", "1e0", "١٢٣٤٥")],
    *[("well", value) for value in ("", "B2", "Q02", "b02", "B25")],
    *[("site", value) for value in ("", "0", "3", "1.0", "s1")],
    *[("well_type", value) for value in ("", "control", "Treatment")],
    *[("dataset", value) for value in ("", "id_test", "Train")],
    *[("cell_type", value) for value in ("", "huvec", "VERO")],
    *[("sirna_id", value) for value in ("x", "-1", "1.5", "nan", "1,0")],
    *[("site_id", value) for value in ("", "HUVEC-01")],
    ("well_id", "HUVEC-01_1"),
]


def test_any_release_table_is_built_right_or_refused(release_source, tmp_path_factory):
    path = release_source / "metadata.csv"

    def case(draw, tally):
        names = draw(st.lists(TEXT, min_size=4, max_size=4, unique=True))
        ids = draw(st.permutations([0, 7, 1107, 1138]))
        sites = draw(st.sets(st.tuples(*map(st.sampled_from, (list(PARTS), (1, 2), list(KINDS), (1, 2)))), min_size=1))
        hidden = draw(st.booleans())
        rows = []
        for experiment, plate, well, site in sorted(sites):
            i = list(KINDS).index(well)
            unknown = hidden and PARTS[experiment] == "test" and len(sites) > 1
            label = ("", "") if unknown else (names[i], str(ids[i]) + draw(st.sampled_from(["", ".0"])))
            well_id = f"{experiment}_{plate}_{well}"
            rows.append([f"{well_id}_{site}", well_id, experiment.split("-")[0], PARTS[experiment], experiment,
                         str(plate), well, str(site), KINDS[well], *label])  # fmt: skip
        hypothesis.assume(any(row[-1] for row in rows))
        kind, faults, table = spoil(draw, path, COLUMNS, rows, RELEASE_FAULTS, lambda place: place)
        if kind == "one row" and not table[0]["sirna_id"]:
            faults = ["No site has a label"]
        if faults is not None:
            with pytest.raises(ValueError) as caught:
                class_map(read_sites(release_source))
            assert all(fault in str(caught.value) for fault in faults), (kind, faults, str(caught.value))
            return False
        found = read_sites(release_source)
        classes = {row["value"]: row["name"] for row in class_map(found)}
        assert classes == {int(float(row["sirna_id"])): row["sirna"] for row in table if row["sirna_id"]}
        for row, read in zip(table, found.to_dict("records"), strict=True):
            assert [row[name] for name in COLUMNS[:9]] == [str(read[name]) for name in COLUMNS[:9]]
        found["split"] = assign_splits(found)
        assert sorted(i for shard in plan_shards(found) for i in shard.site_ids) == sorted(
            row["site_id"] for row in table
        )
        tally["right"] += 1
        if tally["right"] % WRITTEN == 0:
            wanted = {}
            for row in table:
                place = list(PARTS).index(row["experiment"]), int(row["plate"]), list(KINDS).index(row["well"])
                texts = row["experiment"], row["well"], row["well_type"]
                wanted[row["site_id"]] = texts, row["sirna"] or None, number(*place, int(row["site"]))
            check_build(release_source, tmp_path_factory.mktemp("records") / "records", wanted)
            tally["written"] += 1
        return True

    run(st.data(), case)


@pytest.fixture(scope="module")
def own_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any_own")
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(np.stack([pixels_of(i)] * 2)[0]).save(folder / "images" / f"{i}.png")
    return folder


OWN = {
    "table": "wells.csv",
    "images": "images/{File}",
    "channels": ["1"],
    "columns": {"experiment": "Batch", "plate": "Plate", "well": "Well", "site": "Field", "sirna": "Compound"},
    "controls": {"negative": ["DMSO"]},
}
OWN_FAULTS = [
    *[(name, "") for name in ("Batch", "Plate", "Well", "Field")],
    *[(name, "a\nb") for name in ("Batch", "Plate", "Well", "Field", "Compound")],
    *[("Well", value) for value in ("\x00", "\x7f", "a\tb")],
    *[("File", value) for value in ("", "../0", "/0", "..", "/etc/passwd", "a/../../0", "a//b", "./0", "a\\b", "{x}")],
]  # fmt: skip


def test_any_table_of_ones_own_is_built_right_or_refused(own_source, tmp_path_factory):
    path = own_source / "wells.csv"
    header = ["Batch", "Plate", "Well", "Field", "Compound", "File"]

    def case(draw, tally):
        site = st.tuples(TEXT, st.one_of(st.integers(0, 99).map(str), TEXT), TEXT, st.integers(0, 99).map(str))
        sites = draw(st.lists(site, min_size=1, max_size=12, unique=True))
        labels = draw(st.lists(st.one_of(TEXT, st.just("")), min_size=len(sites), max_size=len(sites)))
        labels[draw(st.integers(0, len(sites) - 1))] = "DMSO"
        treatments = {(*s[:2], place_of_well(s[2]), label) for s, label in zip(sites, labels, strict=True) if label}
        hypothesis.assume(len({treatment[:3] for treatment in treatments}) == len(treatments))  # one to a well
        rows = [[*parts, label, f"{i}.png"] for i, (parts, label) in enumerate(zip(sites, labels, strict=True))]
        kind, faults, table = spoil(draw, path, header, rows, OWN_FAULTS, lambda place: place)
        if kind == "one row" and table[0]["Compound"] != "DMSO":
            faults = ["The control 'DMSO' is in no row of wells.csv"]
        if faults is not None:
            with pytest.raises(ValueError) as caught:
                read_sites(own_source, screen=OWN, layout="screen")
            assert all(fault in str(caught.value) for fault in faults), (kind, faults, str(caught.value))
            return False
        found = read_sites(own_source, screen=OWN, layout="screen")
        kinds = {row["name"]: row["treatment"] for row in class_map(found)}
        assert kinds == {row["Compound"]: row["Compound"] != "DMSO" for row in table if row["Compound"]}
        for row, read in zip(table, found.to_dict("records"), strict=True):
            assert [row["Batch"], row["Plate"], row["Well"], row["Field"], row["Compound"]] == [
                read["experiment"], read["plate_name"], read["well"], read["site_name"], read["sirna"] or ""
            ]  # fmt: skip
            assert read["path"] == f"images/{row['File']}"
        plates = dict(zip(found["plate_name"], found["plate"], strict=True))
        assert len(set(plates.values())) == len(plates)
        found["split"] = assign_splits(found, "table")
        assert sum(len(shard.site_ids) for shard in plan_shards(found)) == len(table)
        tally["right"] += 1
        if tally["right"] % WRITTEN == 0:
            wanted = {}
            for row, site_id in zip(table, found["site_id"], strict=True):
                texts = row["Batch"], row["Well"], "negative_control" if row["Compound"] == "DMSO" else "treatment"
                wanted[site_id] = texts, row["Compound"] or None, int(row["File"].removesuffix(".png"))
            dest = tmp_path_factory.mktemp("records") / "records"
            everything = {"splits": {"train": sorted({row["Batch"] for row in table})}}
            check_build(own_source, dest, wanted, screen=OWN | everything)
            tally["written"] += 1
        return True

    run(st.data(), case)
