import pandas as pd
import pytest

from tfrecords.own_screen import read_screen
from tfrecords.own_sites import rank_labels, read_own_sites

SCREEN = {
    "table": "wells.csv",
    "images": "{plate}/{well}_{site}_{channel}.png",
    "channels": [1, 2],
    "columns": {"experiment": "E", "plate": "P", "well": "W", "site": "S", "sirna": "L"},
}


@pytest.fixture
def read(tmp_path):
    """`read(rows, **change)`: the sites of a table with the columns E, P, W, S and L."""

    def read(rows, split_column=None, **change):
        pd.DataFrame(rows, columns=list("EPWSL")).to_csv(tmp_path / "wells.csv", index=False)
        return read_own_sites(tmp_path, read_screen(tmp_path, SCREEN | change), split_column)

    return read


def test_numbers_stay_and_other_plates_and_sites_are_numbered_in_natural_order(read):
    sites = read([("a", "7", "A1", "3", "x"), ("a", "07", "A1", "10", "x")])
    assert sites["plate"].tolist() == [2, 1] and sites["site"].tolist() == [3, 10]
    sites = read([("a", "P10", "A1", "f2", "x"), ("a", "P9", "A1", "f11", "x")])
    assert sites["plate"].tolist() == [2, 1] and sites["site"].tolist() == [1, 2]
    assert sites["plate_name"].tolist() == ["P10", "P9"]
    assert sites["site_id"].tolist() == ["a_2_A1_1", "a_1_A1_2"]


def test_paths_come_from_the_table_and_not_from_our_numbers(read):
    sites = read([("a", "P10", "A1", "f2", "x")])
    assert sites["path"].tolist() == ["P10/A1_f2_{channel}.png"]
    assert read([("a", "P", "A1", "2", "x")], channels=["DNA", "ER"])["path"].tolist() == [
        ("P/A1_2_DNA.png", "P/A1_2_ER.png")
    ]


def test_a_name_that_is_not_ours_by_the_description_is_the_tables(read):
    columns = {"experiment": "E", "well": "W", "site": "S"}
    assert read([("a", "P", "A1", "2", "x")], columns=columns, images="{P}/{W}{S}")["path"].tolist() == ["P/A12"]
    with pytest.raises(ValueError, match="wells.csv lacks the column 'plate'"):
        read([("a", "P", "A1", "2", "x")], columns=columns, images="{plate}/{W}{S}")


def test_a_template_may_pad_numbers(read):
    assert read([("a", "1", "A", "2", "x")], images="{plate:03}/{E}_{W}_{site:02}.tif")["path"][0] == "001/a_A_02.tif"
    with pytest.raises(
        ValueError, match="wells.csv, row 2, column 'P': expected a whole number, which {plate:03} pads .* 'Plate 1'"
    ):
        read([("a", "Plate 1", "A", "2", "x")], images="{plate:03}/{W}_{site}.tif")
    with pytest.raises(
        ValueError, match=r"column 'W': expected a whole number, which {W:02} pads \(1, and not 1.0\); found"
    ):
        read([("a", "1", "A1", "2", "x")], columns=SCREEN["columns"] | {"well": "{P}{W:02}"})


def test_the_number_of_a_well_may_be_padded(read):
    """As in ImageXpress's files beside a table without zeros."""
    rows = [("a", "1", well, "1", "x") for well in ("A1", "A01", "AF48")]
    sites = read(rows[:1] + rows[2:], images="p/{well:02}_{site}.tif")
    assert sites["path"].tolist() == ["p/A01_1.tif", "p/AF48_1.tif"] and sites["well"].tolist() == ["A1", "AF48"]
    with pytest.raises(ValueError, match="row 3: the file 'A01.tif' is a duplicate of wells.csv, row 2"):
        read(rows[:2], images="{well:02}.tif")


def test_paths_may_begin_with_what_is_not_here(read):
    """As in JUMP's load_data.csv."""
    rows = [("a", "s3://bucket/x/", "A1", "1", "x")]
    screen = {"images": "{P}/A.tif", "columns": {"experiment": "E", "well": "W"}}
    for prefix in ("s3://bucket/", "s3://bucket"):
        assert read(rows, **screen, prefix=prefix)["path"].tolist() == ["x/A.tif"]
    with pytest.raises(ValueError, match="expected a path below"):
        read(rows, **screen, prefix="s3://buck")
    with pytest.raises(ValueError, match="images = '{P}/A.tif'.*: expected a path below .*`prefix = ...` .*'s3://buck"):
        read(rows, **screen)


def test_a_column_may_be_put_together_of_several(read):
    columns = {"experiment": "E", "well": "{W}{S:02}", "sirna": "{L} {P}"}
    rows = [
        ("a", "10", "A", "1", "x"),
        ("a", "3", "A", "2", "x"),
        ("b", "", "B", "3", "DMSO"),
        ("b", "0", "B", "4", ""),
    ]
    sites = read(rows, columns=columns, images="{well}_{S}.tif", controls={"negative": ["DMSO"]})
    assert sites["well"].tolist() == ["A01", "A02", "B03", "B04"] and sites["path"][1] == "A02_2.tif"
    assert sites["sirna"].tolist() == ["x 10", "x 3", "DMSO", None]
    assert sites["well_type"].tolist()[2] == "negative_control" and sites["sirna_id"].tolist()[:2] == [1, 0]
    with pytest.raises(ValueError, match="wells.csv lacks the column 'Q'. Expected E, W, Q"):
        read(rows, columns=columns | {"well": "{W}{Q}"}, images="{E}_{S}.tif")
    with pytest.raises(ValueError, match="row 2, column 'W': expected a whole number, which {W:02} pads .* found 'A'"):
        read(rows, columns=columns | {"well": "{W:02}{S}"}, images="{E}_{S}.tif")
    with pytest.raises(ValueError, match="row 4, column 'P': expected a value, for '{W}{P}'; found ''"):
        read(rows, columns=columns | {"well": "{W}{P}"}, images="{E}_{S}.tif")
    with pytest.raises(ValueError, match="has {channel} in the column 'sirna', '{L} {channel}': names in braces"):
        read(rows, columns=columns | {"sirna": "{L} {channel}"}, images="{E}_{S}.tif")
    with pytest.raises(ValueError, match="has a brace that encloses no name"):
        read(rows, columns=columns | {"well": "{W"}, images="{E}_{S}.tif")


def test_labels_are_ranked_treatments_first_in_natural_order():
    names = pd.Series(["c10", "c9", "", "DMSO", "p", "c9"])
    kinds = pd.Series(["treatment", "treatment", "treatment", "negative_control", "positive_control", "treatment"])
    assert rank_labels(names, kinds).tolist() == [1, 0, pd.NA, 3, 2, 0]


def test_a_label_of_blanks_is_none_and_signs_for_nothing_are_pointed_out(read, capsys):
    sites = read([("a", "1", "A1", "1", "  "), ("a", "1", "A2", "1", "-"), ("a", "1", "A3", "1", "x")])
    assert sites["sirna"].tolist() == [None, "-", "x"] and sites["sirna_id"].isna().tolist() == [True, False, False]
    assert "WARNING: the column 'L' says '-' in the rows of 1 sites" in capsys.readouterr().out
    read([("a", "1", "A1", "1", "x"), ("b", "1", "A01", "1", "y"), ("b", "1", "A0.5", "1", "1.05 uM")])
    out = capsys.readouterr().out
    assert "the column 'W' has 'A1', 'A01', which are taken for different ones" in out and "1.05" not in out


def test_controls_are_named_by_value_or_by_a_column(read):
    rows = [("a", 1, "A", 1, "x"), ("a", 1, "B", 1, "DMSO"), ("a", 1, "C", 1, "taxol")]
    sites = read(rows, controls={"negative": ["DMSO"], "positive": ["taxol"]})
    assert sites["well_type"].tolist() == ["treatment", "negative_control", "positive_control"]
    columns = {"experiment": "E", "well": "W", "well_type": "L"}
    kinds = {"treatment": ["x"], "negative_control": ["DMSO"], "positive_control": ["taxol"]}
    by_column = read(rows, columns=columns, well_types=kinds, images="{well}")
    assert by_column["well_type"].tolist() == sites["well_type"].tolist()
    with pytest.raises(
        ValueError, match="The control 'dmso' is in no row of wells.csv. .* the column 'L', such as 'DMSO'"
    ):
        read(rows, controls={"negative": ["dmso"]})
    with pytest.raises(ValueError, match="has 'well_types', and no column to read them in"):
        read(rows, well_types=kinds)
    with pytest.raises(ValueError, match="row 4, column 'L': expected one of x, DMSO; found 'taxol'"):
        read(rows, columns=columns, well_types={"treatment": ["x", "DMSO"]}, images="{well}")


def test_a_control_that_is_written_otherwise_is_shown(read):
    rows = [("b", "P", "A", "1", "x"), ("b", "P", "B", "1", "DMSO")]
    with pytest.raises(ValueError, match="The control 'DMSO ' is in no row .* such as 'DMSO'"):
        read(rows, controls={"negative": ["DMSO "]})


def test_a_word_for_an_empty_well_is_no_treatment_if_it_is_a_control(read, capsys):
    rows = [("a", 1, "A", 1, "x"), ("a", 1, "B", 1, "Empty")]
    read(rows, controls={"negative": ["x"]})
    assert "WARNING: the column 'L' says 'Empty' in the rows of 1 sites" in capsys.readouterr().out
    read(rows, controls={"negative": ["Empty"]})
    assert "WARNING" not in capsys.readouterr().out


def test_splits_come_from_a_list_a_column_or_nothing(read):
    rows = [("a", 1, "A", 1, "test"), ("b", 1, "A", 1, ""), ("c", 1, "A", 1, "train")]
    images = "{experiment}"
    assert set(read(rows, images=images)["dataset"]) == {"train"}
    assert read(rows, images=images, splits={"train": ["c"], "val": ["a"]})["dataset"].tolist() == ["val", "", "train"]
    columns = SCREEN["columns"] | {"dataset": "L"}
    assert read(rows, images=images, columns=columns)["dataset"].tolist() == ["test", "", "train"]
    assert read(rows, "L", images=images)["own_split"].tolist() == ["test", "", "train"]
    with pytest.raises(
        ValueError, match="csv, row 5, column 'L': the experiment 'a' is in val, and in wells.csv, row 2 in test"
    ):
        read([*rows, ("a", 1, "B", 1, "val")], images="{experiment}{well}", columns=columns)
    torn = read([*rows, ("a", 1, "B", 1, "val")], "L", images="{experiment}{well}", columns=columns)
    assert set(torn["own_split"]) == {"test", "train", "val", ""}  # which `column:L` then looks at
    with pytest.raises(
        ValueError, match="The experiment 'd' of the splits is in no row of wells.csv. Found 'a', 'b', 'c'"
    ):
        read(rows, images=images, splits={"train": ["d"]})
    with pytest.raises(ValueError, match="row 2, column 'W': expected one of train, val, test, or nothing; found 'A'"):
        read(rows, images=images, columns=columns | {"dataset": "W"})


@pytest.mark.parametrize(
    "row, message",
    [
        (("", 1, "A", 1, "x"), "column 'E': expected the experiment, a text without control characters; found ''"),
        (("a", 1, "", 1, "x"), "column 'W': expected the well"),
        (("a", 1, "A\n", 1, "x"), "column 'W': expected the well, a text without control characters; found"),
        (("a", "..", "A", 1, "x"), "images = .*: expected a path below the source folder"),
        (("a", "../..", "A", 1, "x"), "images = .*: expected a path below the source folder"),
        (
            ("a", "/etc", "A", 1, "x"),
            r"expected a path below the source folder .*full and inside .*without '.' or '..'; .*found '/etc/A",
        ),
        (("a", "C:", "A", 1, "x"), "expected a path below the source folder "),
        (("a", "b\\..", "A", 1, "x"), "expected a path below the source folder "),
        (("a", "b\\c", "A", 1, "x"), r"with / between folders \(no "),
        (("a", "{channel}", "A", 1, "x"), "column 'P': expected no brace in a path; found '{channel}'"),
    ],
)
def test_a_bad_cell_is_named_by_file_row_and_column(read, row, message):
    with pytest.raises(ValueError, match=f"wells.csv, row 3, {message}" if message.startswith("column") else message):
        read([("z", 1, "Z", 1, "x"), row])


def test_a_site_or_a_file_listed_twice_names_both_rows(read):
    rows = [("a", 1, "A", 1, "x"), ("a", 1, "B", 1, "x"), ("a", 1, "A", 1, "y")]
    with pytest.raises(ValueError, match="wells.csv, row 4: the site 'a_1_A_1' is a duplicate of wells.csv, row 2"):
        read(rows)
    with pytest.raises(ValueError, match="row 3: the file '1/1_{channel}.png' is a duplicate of wells.csv, row 2"):
        read(rows[:2], images="{plate}/{site}_{channel}.png")


def test_two_treatments_in_one_well_name_both_rows(read):
    rows = [("a", 1, "A", 1, "x"), ("a", 1, "A", 2, "y")]
    with pytest.raises(
        ValueError, match="wells.csv, row 3: the well 'a_1_A' has 'y' .* and in wells.csv, row 2 it has 'x'"
    ):
        read(rows)
    assert len(read([rows[0], ("a", 1, "A", 2, "")])) == 2  # unknown
    with pytest.raises(ValueError, match="row 3: the well 'a_1_A01' has 'y' .* row 2 it has 'x'"):
        read([("a", 1, "A1", 1, "x"), ("a", 1, "A01", 2, "y")])


def test_channels_of_a_site_have_files_of_their_own(read):
    rows = [("a", 1, "A", 1, "f"), ("a", 1, "B", 1, "g")]
    templates = {"1": "{W}_{L}.tif", "2": "{W}_{S}.tif"}
    assert len(read(rows, images=templates, channels=["1", "2"])) == 2
    with pytest.raises(ValueError, match="row 3: several channels of one site have the same file, among B_1.tif, B_1"):
        read([rows[0], ("a", 1, "B", 1, "1")], images=templates, channels=["1", "2"])


def test_signs_that_look_alike_are_pointed_out(read, capsys):
    read([("a", 1, "A", 1, "\u00e9tope"), ("a", 1, "B", 1, "e\u0301tope")])
    assert "which are taken for different ones" in capsys.readouterr().out


def test_doses_that_are_written_in_two_ways_are_pointed_out(read, capsys):
    read([("a", 1, "A", 1, "taxol 1.0"), ("a", 1, "B", 1, "taxol 1"), ("a", 1, "C", 1, "taxol 1.05")])
    out = capsys.readouterr().out
    assert "has 'taxol 1.0', 'taxol 1', which are taken for different ones" in out and "1.05" not in out


def test_numbers_of_many_digits_are_told_apart(read, capsys):
    read([("a", "20240315123456001", "A", 1, "x"), ("a", "20240315123456002", "A", 1, "x")])
    assert "taken for different" not in capsys.readouterr().out


def test_two_wells_cannot_run_together_to_one_name(read):
    message = "row 3: the well 'B' of 'a_1' and wells.csv, row 2: '1_B' of 'a' both get the name 'a_1_1_B'"
    with pytest.raises(ValueError, match=message):
        read([("a", 1, "1_B", 1, "x"), ("a_1", 1, "B", 2, "x")])


def test_a_column_or_a_brace_that_does_not_fit_is_named(read):
    with pytest.raises(
        ValueError,
        match="wells.csv lacks the column 'Batch'. Expected E, P, W, S, L, Batch; found E, P.* Correct .*'{Batch}/",
    ):
        read([("a", 1, "A", 1, "x")], images="{Batch}/{well}.tif")
    with pytest.raises(ValueError, match="has a brace that encloses no name"):
        read([("a", 1, "A", 1, "x")], images="{plate/{well}.tif")
    with pytest.raises(ValueError, match="or a width that is not such as 02"):
        read([("a", 1, "A", 1, "x")], images="{plate}/{site:2}.tif")


def test_a_well_with_a_label_in_some_rows_only_is_pointed_out(read, capsys):
    rows = [
        ("a", "1", "A1", "1", "x"),
        ("a", "1", "A01", "2", ""),
        ("a", "1", "B1", "1", ""),
        ("a", "1", "C1", "1", ""),
    ]
    read(rows)
    out = capsys.readouterr().out
    assert "1 wells have a label in some of their rows and none in others, such as wells.csv, row 3: sites" in out
    read([*rows[:1], *rows[2:]], controls={"negative": [""]})
    assert "in some of their rows" not in capsys.readouterr().out


def test_empty_cells_may_mean_a_kind_of_well(read):
    """As in JUMP's column control_type."""
    rows = [("a", "1", "A1", "1", ""), ("a", "1", "A2", "1", "negcon")]
    columns = SCREEN["columns"] | {"well_type": "L"}
    kinds = {"treatment": [""], "negative_control": ["negcon"]}
    assert [*read(rows, columns=columns, well_types=kinds)["well_type"]] == ["treatment", "negative_control"]
    with pytest.raises(
        ValueError, match=r"one of x, negcon; `treatment = \[\"\"\]` takes empty cells for such; found ''"
    ):
        read(rows, columns=columns, well_types=kinds | {"treatment": ["x"]})


def test_controls_may_be_told_by_any_column_beside_the_label(read, capsys):
    """As DMSO by the compound, where the label is a mechanism: an empty one is unknown, and no control."""
    rows = [("a", "DMSO", "A1", "1", ""), ("a", "c1", "A2", "1", "hdac"), ("a", "c2", "A3", "1", "")]
    screen = {"columns": {"experiment": "E", "well": "W", "well_type": "P", "sirna": "L"}, "images": "{W}"}
    kinds = read(rows, **screen, well_types={"negative_control": ["DMSO"]})["well_type"]
    assert kinds.tolist() == ["negative_control", "treatment", "treatment"]
    assert "'P' tells the controls: its other values ('c1', 'c2') are treatments" in capsys.readouterr().out
    with pytest.raises(ValueError, match="The control 'dmso' is in no row .* column 'P', such as 'DMSO', 'c1', 'c2'.$"):
        read(rows, **screen, well_types={"negative_control": ["dmso"]})
    with pytest.raises(ValueError, match="The control 'DMSO' .* 'L', such as 'hdac'. Where another column tells"):
        read(rows, columns=SCREEN["columns"], controls={"negative": ["DMSO"]})


def test_without_a_column_of_plates_one_is_asked_for(read, capsys):
    rows = [("a", plate, "A1", site, "x") for plate in ("P", "Q") for site in ("1", "2")]
    columns = {name: column for name, column in SCREEN["columns"].items() if name != "plate"}
    with pytest.raises(ValueError, match="site 'a_1_A1_1' is a duplicate .* No column is named as the plate: each exp"):
        read(rows, columns=columns, images="{P}/{well}_{site}_{channel}.png")
    read(rows[:2], columns=columns, images="{P}/{well}_{site}_{channel}.png")
    assert "No column is named as the plate: each experiment is taken for one. Add `plate" in capsys.readouterr().out


def test_a_field_without_a_column_is_asked_for_by_our_name(read):
    columns = {"experiment": "E", "well": "W"}
    with pytest.raises(ValueError, match="lacks the column 'site'.* our site, `site = ...`, or list the sites of each"):
        read([("a", "P", "A1", "1", "x")], columns=columns, images="{W}_{site}.png")
    with pytest.raises(ValueError, match="lacks the column 'Compound'.* Correct the names of columns"):
        read([("a", "P", "A1", "1", "x")], columns=columns | {"plate": "P", "sirna": "Compound"}, images="{W}_{plate}")
    with pytest.raises(ValueError, match="lacks the column 'dose'.* Correct the names of columns"):
        read([("a", "P", "A1", "1", "x")], columns=columns | {"site": "S"}, images="{W}_{site}_{dose}.png")
    with pytest.raises(ValueError, match="'DMSO' is in no row .* column 'sirna', which has none. Where"):
        read([("a", "P", "A1", "1", "x")], columns=columns, images="{W}.png", controls={"negative": ["DMSO"]})
