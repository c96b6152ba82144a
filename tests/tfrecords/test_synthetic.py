"""The embedded screen: laid out as RxRx1, fixed by its seed, and frozen since it was accepted.

The screen was accepted by `recipes/screen_acceptance.py` before the adversarial method ever ran on it. To change the
generator is to accept it anew: run that script, read its table, and only then renew the hashes and pixels below. One
change needed no new acceptance: since `batch_effect` may name shifts, every seventh site of seeds 0 (strength 1) and 5
(0.6) was drawn with the code before and after, and each byte was the same.
"""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tfrecords import screen_appearance, screen_layout, screen_phenotype, synthetic
from tfrecords.screen_layout import COLUMNS, EXPERIMENTS, TREATMENTS, WELLS, layout
from tfrecords.screen_phenotype import CELL_TYPES, sirna_effects
from tfrecords.synthetic import write_screen

TINY = {
    "image_size": 16,
    "treatments": 4,
    "experiments": {"train": {"HUVEC": 1, "RPE": 1}, "val": {"HUVEC": 1}, "test": {"RPE": 1}},
}
SOURCES = {
    "screen_appearance.py": "6cbb8edb163c7f5830d25060c7230fc74e042b242ee78644194cbd4f1dcdda3b",
    "screen_layout.py": "bb585face456650ca7e9e94df167d65d44fc183fc0da4c65af1a92f1e6f08456",
    "screen_phenotype.py": "679d68e7a046bba7115f07ba6caec2f7d51ea7f3d0fa9129012a22aa14675254",
    "screen_render.py": "8f7a9ae41d55aa399823c673ac34f04470aa19e254b8fdada78221a7e1c3e3d6",
    "synthetic.py": "48de8e5862dbd85bc8103dada16f440daa99723a56f44797398b2d9127d8f768",
}
# Row 24, every eighth column, of each channel of two sites of the default screen, seed 0.
GOLDEN = {
    "HUVEC-01_1_B02_1": [
        [2, 0, 2, 1, 6, 1],
        [29, 2, 11, 4, 28, 2],
        [8, 3, 9, 5, 7, 1],
        [10, 2, 5, 1, 10, 0],
        [2, 1, 2, 1, 3, 2],
        [4, 2, 3, 1, 4, 2],
    ],
    "HEPG2-06_3_B02_2": [
        [7, 26, 6, 4, 22, 9],
        [9, 16, 11, 6, 24, 19],
        [15, 12, 15, 15, 21, 21],
        [9, 21, 8, 5, 24, 16],
        [45, 27, 12, 10, 31, 14],
        [15, 16, 12, 10, 19, 21],
    ],
}


@pytest.fixture(scope="module")
def table():
    return layout(seed=0)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screens") / "screen"
    write_screen(folder, seed=3, **TINY)
    return folder


def pixels(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_the_frozen_generator_has_not_changed():
    folder = pathlib.Path(synthetic.__file__).parent
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SOURCES}
    assert found == SOURCES, "The generator is frozen; to change it, accept it anew (see this file's first lines)."
    assert set(SOURCES) == {"synthetic.py", *(path.name for path in folder.glob("screen_*.py"))}


@pytest.mark.parametrize("site_id", GOLDEN)
def test_golden_pixels_of_the_default_screen(site_id):
    found = synthetic.draw_site(site_id)[:, 24, ::8]
    np.testing.assert_allclose(found.astype(int), GOLDEN[site_id], atol=1)


def test_table_has_rxrx1s_columns_and_unique_sites(table):
    assert tuple(table.columns) == COLUMNS
    assert table.site_id.is_unique
    expected = table.experiment + "_" + table.plate.astype(str) + "_" + table.well
    assert (table.well_id == expected).all()
    assert (table.site_id == expected + "_" + table.site.astype(str)).all()
    assert (table.cell_type == table.experiment.str[:-3]).all()
    assert table.well.isin(WELLS).all()


def test_every_well_has_both_sites_with_one_label(table):
    wells = table.groupby("well_id")
    assert (wells.site.apply(list).map(tuple) == (1, 2)).all()
    assert (wells.sirna_id.nunique() == 1).all()


def test_experiments_belong_to_one_split_and_one_cell_type(table):
    assert (table.groupby("experiment").dataset.nunique() == 1).all()
    assert (table.groupby("experiment").cell_type.nunique() == 1).all()
    counts = table.groupby(["dataset", "cell_type"]).experiment.nunique()
    assert all(counts[split, name] == count for split in EXPERIMENTS for name, count in EXPERIMENTS[split].items())
    assert (
        set(table[table.dataset == "val"].cell_type) == set(table[table.dataset == "test"].cell_type) == set(CELL_TYPES)
    )


def test_mixed_to_test_can_be_built(table):
    assert all(EXPERIMENTS["train"][name] > EXPERIMENTS["test"][name] for name in CELL_TYPES)
    assert len(table[(table.dataset == "test") & (table.well_type == "treatment")]) >= 400


def test_treatments_stand_once_in_an_experiment_and_travel_in_four_groups(table):
    treatments = table[(table.well_type == "treatment") & (table.site == 1)]
    assert not treatments.duplicated(["experiment", "sirna_id"]).any()
    assert set(treatments.sirna_id) == set(range(TREATMENTS))
    groups = set(treatments.groupby(["experiment", "plate"]).sirna_id.apply(frozenset))
    assert len(groups) == 4
    assert treatments.groupby("sirna_id").plate.nunique().min() > 1
    assert treatments.groupby("sirna_id").well.nunique().min() > 5


def test_controls_stand_on_every_plate(table):
    plates = table[table.site == 1].groupby(["experiment", "plate"])
    positives = plates.apply(lambda rows: tuple(sorted(rows[rows.well_type == "positive_control"].sirna_id)))
    assert set(positives) == {(TREATMENTS, TREATMENTS + 1)}
    negatives = table[table.well_type == "negative_control"]
    assert set(negatives.sirna) == {"EMPTY"} and set(negatives.sirna_id) == {TREATMENTS + 2}
    assert set(negatives.well) == {"B02"} == set(table[table.well == "B02"].well)
    assert negatives.groupby(["experiment", "plate"]).ngroups == plates.ngroups


def test_names_and_ids_are_one_to_one(table):
    pairs = table[["sirna", "sirna_id"]].drop_duplicates()
    assert pairs.sirna.is_unique and pairs.sirna_id.is_unique
    assert pairs[pairs.sirna != "EMPTY"].sirna.str.fullmatch(r"s\d{5}").all()


def test_written_screen_is_the_table_and_six_grey_pictures_a_site(screen):
    table = pd.read_csv(screen / "metadata.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(table, layout(3, TINY["treatments"], TINY["experiments"]))
    expected = {
        f"images/{row.experiment}/Plate{row.plate}/{row.well}_s{row.site}_w{channel}.png"
        for row in table.itertuples()
        for channel in range(1, 7)
    }
    found = pixels(screen)
    assert set(found) == expected
    assert all(image.shape == (16, 16) and image.dtype == np.uint8 for image in found.values())
    assert {path.name for path in screen.iterdir()} == {"images", "metadata.csv"}


def test_seed_fixes_every_pixel(screen, tmp_path):
    write_screen(tmp_path / "same", seed=3, **TINY)
    write_screen(tmp_path / "other", seed=4, **TINY)
    first, same, other = pixels(screen), pixels(tmp_path / "same"), pixels(tmp_path / "other")
    assert all((first[name] == same[name]).all() for name in first)
    assert (tmp_path / "same" / "metadata.csv").read_bytes() == (screen / "metadata.csv").read_bytes()
    shared = set(first) & set(other)
    assert shared and not any((first[name] == other[name]).all() for name in shared)


def test_a_site_does_not_depend_on_what_is_drawn_beside_it(screen):
    site_id = "RPE-02_3_B02_2"
    drawn = synthetic.draw_site(site_id, seed=3, **TINY)
    written = [Image.open(screen / f"images/RPE-02/Plate3/B02_s2_w{channel}.png") for channel in range(1, 7)]
    assert (drawn == np.stack([np.asarray(image) for image in written])).all()


def test_the_two_sites_of_a_well_differ(screen):
    found = pixels(screen)
    first = [name for name in found if "_s1_w2" in name]
    assert first and not any((found[name] == found[name.replace("_s1_", "_s2_")]).all() for name in first)


def test_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds something"):
        write_screen(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_half_written_screen_has_no_metadata(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "photograph", fail)
    with pytest.raises(OSError, match="disk full"):
        write_screen(tmp_path / "screen", **TINY)
    assert not (tmp_path / "screen" / "metadata.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treatments": 6}, "multiple of 4"),
        ({"treatments": 0}, "multiple of 4"),
        ({"experiments": {"holdout": {"RPE": 1}}}, "holdout"),
        ({"experiments": {"train": {"HELA": 1}}}, "HELA"),
        ({"image_size": 8}, "at least 16"),
        ({"batch_effect": -1.0}, "batch_effect"),
        ({"batch_effect": {"focus": -1.0}}, "batch_effect"),
        ({"batch_effect": {"fokus": 1.0}}, "knows the shifts exposure, .*; received fokus"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_screen(tmp_path / "screen", **(TINY | change))
    assert not (tmp_path / "screen").exists()


def test_negative_control_does_nothing_and_effects_overlap():
    effects = sirna_effects(seed=0, treatments=TREATMENTS, positive_controls=2)
    assert (effects[-1] == 0).all()
    treatments = effects[:TREATMENTS].reshape(TREATMENTS, -1)
    likeness = np.corrcoef(treatments)[np.triu_indices(TREATMENTS, 1)]
    assert likeness.max() > 0.5 and likeness.max() < 0.99


MOVED = {  # what of an experiment's appearance a shift moves
    "exposure": {"tone", "saturation"},
    "stain": {"mean", "std", "bleed"},
    "focus": {"blur"},
    "background": {"haze", "noise"},
    "illumination": {"illumination"},
    "density": {"growth"},
    "growth": {"growth"},
}


@pytest.mark.parametrize("shift", screen_appearance.SHIFTS)
def test_a_shift_by_itself_moves_what_it_moves_among_others(shift):
    def draw(batch_effect):
        return vars(screen_appearance.appearance_of(3, "HEPG2", 2, 1, batch_effect))

    none, every, one = draw(0.0), draw(1.5), draw({shift: 1.5})
    changed = {name for name, value in one.items() if not np.array_equal(value, none[name])}
    assert changed == MOVED[shift]
    for name in changed - {"growth"}:
        np.testing.assert_array_equal(one[name], every[name])
    density = np.array(list(screen_phenotype.TRAITS)) == "density"
    moved = {"density": density, "growth": ~density}.get(shift, np.zeros(len(density), bool))
    np.testing.assert_array_equal(one["growth"], np.where(moved, every["growth"], 0.0))


def test_all_shifts_together_are_the_whole_batch_effect():
    one, other = (
        vars(screen_appearance.appearance_of(3, "RPE", 1, 4, effect))
        for effect in (0.7, dict.fromkeys(screen_appearance.SHIFTS, 0.7))
    )
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)


def test_without_batch_effect_experiments_of_a_cell_type_look_alike():
    first, second = (screen_appearance.appearance_of(0, "RPE", index, 1, batch_effect=0.0) for index in (1, 2))
    assert (first.blur == second.blur).all() and (first.mean == second.mean).all() and (first.growth == 0).all()


def test_command_line_shows_its_arguments():
    command = [sys.executable, "-m", "tfrecords.synthetic", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "DEST" in shown and "--seed" in shown


def test_stain_parameters_are_the_fit_to_rxrx1():
    root = os.environ.get("RXRX1_SAMPLE")
    path = pathlib.Path(root or "") / "rxrx1-stats" / "experiment_pixel_stats.csv"
    if not root or not path.is_file():
        pytest.skip("RXRX1_SAMPLE names no folder with rxrx1-stats/experiment_pixel_stats.csv")
    medians, spread = screen_appearance.fit_stain(pd.read_csv(path, index_col="experiment"))
    for cell_type, values in screen_appearance.LOG_MEDIAN.items():
        np.testing.assert_allclose(values, medians[cell_type], atol=6e-4)
    for row, values in enumerate(screen_appearance.LOG_SPREAD):
        np.testing.assert_allclose(values, spread[row, : row + 1], atol=6e-4)


def test_default_plates_have_room(table):
    assert table.groupby(["experiment", "plate"]).well.nunique().max() <= len(screen_layout.WELLS)
