import pandas as pd
import pytest

from tfrecords import prepare
from tfrecords.build import build_records
from tfrecords.leaks import check_splits, describe_repeats, find_repeats, place_of_well, repeating_sites
from tfrecords.screen_layout import layout
from tfrecords.sources import read_sites
from tfrecords.splits import assign_splits


def table(plates, controls=0):
    """Sites of plates `{(experiment, plate, split): [sirna_id of each well]}`, the last `controls` wells controls."""
    rows = []
    for (experiment, plate, split), labels in plates.items():
        for i, label in enumerate(labels):
            kind = "treatment" if i < len(labels) - controls else "positive_control"
            rows.append((experiment, plate, f"W{i:02d}", kind, label, split))
    sites = pd.DataFrame(rows, columns=["experiment", "plate", "well", "well_type", "sirna_id", "split"])
    sites["sirna_id"] = sites["sirna_id"].astype("Int64")
    sites["site_id"] = sites["experiment"] + "_" + sites["plate"].astype(str) + "_" + sites["well"]
    return sites.assign(path=sites["site_id"])


def pairs(sites):
    columns = ["experiment", "plate", "of_experiment", "of_plate", "evidence", "alike", "wells"]
    return find_repeats(sites)[columns].values.tolist()


STRAIGHT, TURNED = list(range(10)), list(range(9, -1, -1))
UNKNOWN = [None] * 10


def test_a_site_in_two_splits_is_refused(release_tree):
    sites = read_sites(release_tree)
    sites["split"] = assign_splits(sites)
    check_splits(sites)
    again = sites.iloc[[0]].assign(split="test")
    with pytest.raises(ValueError, match="The site 'HUVEC-01_1_B02_1' is in the splits train and test"):
        check_splits(pd.concat([sites, again]), mixed=True)
    with pytest.raises(ValueError, match="The file 'images/HUVEC-01/Plate1/B02_s1_w{channel}.png' is in the splits"):
        check_splits(pd.concat([sites, again.assign(site_id="another name")]), mixed=True)


def test_an_experiment_in_two_splits_is_refused_unless_that_is_what_is_measured():
    sites = table({("A", 1, "train"): STRAIGHT, ("A", 2, "val"): TURNED})
    with pytest.raises(ValueError, match="The experiment 'A' is in train and val. .* mixed-to-test"):
        check_splits(sites)
    check_splits(sites, mixed=True)
    check_splits(table({("A", 1, "train"): STRAIGHT, ("A", 2, "id_test"): TURNED}))


def test_an_own_column_is_guarded(release, edit_table, tmp_path):
    edit_table(release, lambda table: table.assign(fold=["train", "test"] * 16))
    with pytest.raises(ValueError, match="The experiment 'HUVEC-01' is in train and test"):
        build_records(release, tmp_path / "records", splits="column:fold")


def test_plates_of_one_layout_in_two_splits_are_found_by_their_treatments():
    sites = table(
        {
            ("A", 1, "train"): STRAIGHT,
            ("A", 2, "train"): TURNED,
            ("B", 1, "train"): STRAIGHT,
            ("C", 7, "test"): [*STRAIGHT[:8], 20, 21],
            ("D", 1, "val"): TURNED[5:] + TURNED[:5],
        }
    )
    assert pairs(sites) == [["A", 1, "C", 7, "treatment", 8, 10], ["B", 1, "C", 7, "treatment", 8, 10]]


def test_wells_are_places_however_they_are_written():
    """One batch exported as A01, another as a1."""
    sites = table({("A", 1, "train"): STRAIGHT, ("B", 1, "test"): STRAIGHT})
    sites["well"] = sites["well"].str.replace("W", "B")
    train = sites["split"] == "train"
    sites.loc[train, "well"] = sites.loc[train, "well"].map(lambda well: f"b{int(well[1:])}")
    assert pairs(sites) == [["A", 1, "B", 1, "treatment", 10, 10]]
    assert [place_of_well(name) for name in ("B02", "b2", "AF48", "BR001A1", "12", "B0")] == [
        *("B02", "B02", "AF48", "BR001A1", "12", "B00")
    ]


def test_less_than_half_or_five_alike_is_chance():
    sites = table({("A", 1, "train"): STRAIGHT, ("B", 1, "test"): [*range(4), *range(20, 26)]})
    assert pairs(sites) == []
    assert pairs(table({("A", 1, "train"): [1, 2, 3], ("B", 1, "test"): [1, 2, 3]})) == []


def test_controls_tell_where_treatments_are_unknown_and_not_where_they_are_known():
    plates = {
        ("A", 1, "train"): STRAIGHT + STRAIGHT,
        ("B", 1, "train"): TURNED + TURNED,
        ("C", 1, "test"): UNKNOWN + STRAIGHT,
        ("D", 1, "test"): UNKNOWN + list(range(20, 30)),
    }
    hidden = table(plates, controls=10)
    assert pairs(hidden) == [["A", 1, "C", 1, "positive_control", 10, 10]]
    known = table({("A", 1, "train"): STRAIGHT + STRAIGHT, ("C", 1, "test"): TURNED + STRAIGHT}, controls=10)
    assert pairs(known) == []


def test_controls_that_stand_in_the_same_wells_on_most_plates_tell_nothing():
    plates = {(name, 1, "train" if name < "D" else "test"): UNKNOWN + STRAIGHT for name in "ABCDEF"}
    assert pairs(table(plates, controls=10)) == []


def test_the_report_names_experiments_plates_and_evidence():
    sites = table({("A", 1, "train"): STRAIGHT, ("A", 2, "train"): TURNED, ("B", 2, "test"): STRAIGHT, ("B", 3, "test"):
                   TURNED})  # fmt: skip
    report = describe_repeats(find_repeats(sites))
    assert "A (train) = B (test), plates 1 = 2, 2 = 3: by 10 or more of 10 treatments in the same wells" in report
    assert describe_repeats(find_repeats(sites[sites["experiment"] == "A"])) is None


def test_a_repeat_seen_by_controls_alone_names_no_plate():
    sites = table({("A", 1, "val"): STRAIGHT, ("B", 1, "test"): STRAIGHT}, controls=10)
    sites = pd.concat([sites, table({("C", i, "train"): TURNED for i in range(3)}, controls=10)], ignore_index=True)
    reasons = repeating_sites(sites, find_repeats(sites))
    assert set(reasons) == {"", "repeats the layout of B in test"} and set(sites["split"][reasons != ""]) == {"val"}


def test_the_training_side_goes_and_takes_its_id_test_along():
    sites = table({("A", 1, "train"): STRAIGHT, ("A", 2, "train"): TURNED, ("B", 1, "test"): STRAIGHT})
    sites = pd.concat([sites, sites[sites["experiment"] == "A"].assign(split="id_test")], ignore_index=True)
    reasons = repeating_sites(sites, find_repeats(sites))
    gone = sites[reasons != ""]
    assert set(gone["split"]) == {"train", "id_test"} and len(gone) == 20
    assert set(gone["plate"]) == {1} and set(gone["experiment"]) == {"A"}
    assert set(reasons) == {"", "repeats the layout of B plate 1 in test"}


def test_no_plate_of_the_embedded_screen_repeats_another():
    sites = layout(0)
    sites["split"] = assign_splits(sites)
    assert find_repeats(sites).empty


@pytest.fixture
def repeating(release, edit_table):
    """A release in which the test experiment has the layout of a training experiment, in five wells."""
    from PIL import Image

    sites = pd.read_csv(release / "metadata.csv", dtype=str)
    rows = []
    for experiment, dataset in (("HUVEC-01", "train"), ("RPE-01", "train"), ("HUVEC-18", "test")):
        for i in range(5):
            well = f"C{i + (5 if experiment == 'RPE-01' else 4):02d}"
            place = release / "images" / experiment / "Plate1"
            for channel in range(1, 7):
                Image.new("L", (8, 8), i).save(place / f"{well}_s1_w{channel}.png")
            name, cell_type = f"{experiment}_1_{well}", experiment.split("-")[0]
            rows.append([f"{name}_1", name, cell_type, dataset, experiment, 1, well, 1, "treatment", f"s{i}", 10 + i])
    old = sites[sites["well_type"] != "treatment"]
    edit_table(release, lambda _: pd.concat([old, pd.DataFrame(rows, columns=sites.columns)]))
    return release


def test_controls_that_stand_alike_are_counted_over_all_plates_of_the_table(capsys):
    plates = {("A", 1, "train"): STRAIGHT, ("B", 1, "test"): STRAIGHT}
    plates |= {(f"C{i}", 1, "train"): [100 * i + j for j in range(10)] for i in range(1, 6)}
    sites = table(plates, controls=10)
    few = sites[sites["experiment"].isin(["A", "B"])]
    assert find_repeats(few).empty  # of these two alone nobody can say
    found = prepare._find_repeats(sites, few, exclude=False)
    assert found[["experiment", "of_experiment"]].values.tolist() == [["A", "B"]]
    assert "A (train) = B (test)" in capsys.readouterr().out
    assert prepare._find_repeats(sites, sites[sites["experiment"] != "B"], exclude=False).empty


def test_a_build_warns_and_leaves_them_out_if_asked(repeating, tmp_path, capsys):
    kept = build_records(repeating, tmp_path / "kept")
    out = capsys.readouterr().out
    assert "WARNING: plates in different splits" in out and "HUVEC-01 (train) = HUVEC-18 (test), plates 1 = 1" in out
    assert "--exclude-leaks" in out and "RPE-01" not in out
    assert kept["repeated_layouts"] == [
        {"experiment": "HUVEC-01", "plate": 1, "split": "train", "of_experiment": "HUVEC-18", "of_plate": 1,
         "of_split": "test", "evidence": "treatment", "alike": 5, "wells": 5}
    ]  # fmt: skip
    assert kept["excluded"]["count"] == 0
    manifest = build_records(repeating, tmp_path / "records", exclude_leaks=True)
    assert manifest["experiments"]["train"] == ["RPE-01"] and manifest["experiments"]["test"] == ["HUVEC-18"]
    excluded = pd.read_csv(tmp_path / "records/excluded.csv")
    assert set(excluded["reason"]) == {"repeats the layout of HUVEC-18 plate 1 in test"}
    assert excluded["site_id"].str.startswith("HUVEC-01_1_").all()
