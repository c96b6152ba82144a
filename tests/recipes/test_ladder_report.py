"""Tables from made results: two screens, one or two seeds, two experiments."""

import numpy as np
import pytest
from ladder_report import adaptive_table, cells_table, differences, main_table, markdown, plot


def scores(first, second):
    experiments = {"HUVEC-03": {"accuracy": first, "count": 10}, "RPE-02": {"accuracy": second, "count": 10}}
    mean = (first + second) / 2
    types = {name.split("-")[0]: value for name, value in experiments.items()}
    return {"accuracy": mean, "well_accuracy": mean + 0.1, "count": 20, "cell_type": types, "experiment": experiments}


def result(first, second, steps=100, seconds=1.0, cost=1.0):
    splits = {"id_test": scores(0.8, 0.6), "val": scores(0.5, 0.5), "test": scores(first, second)}
    times = {name: scores(first + 0.1, second + 0.1) for name in ("adabn", "nearest_class", "tvn")}
    done = {
        "commit": "0a1b2c3",
        "machine": "an abacus",
        "epochs": 5,
        "steps": steps,
        "step_seconds": seconds,
        "step_cost": cost,
        "at_most": False,
        "diverged": False,
    }
    return done | {"splits": splits, "test_time": times, "embedding": {"effective_rank": steps / 10, "separation": 0.4}}


def cell(method, screen):
    return {"method": method, "screen": {"seed": screen}, "seed": screen, "rule": {}, "settings": {}}


RESULTS = [
    (cell("erm", 1), result(0.2, 0.4)),
    (cell("erm", 2), result(0.3, 0.5)),
    (cell("abra_random:radius=1.0", 1), result(0.3, 0.3, steps=150, seconds=2.0, cost=1.9)),
    (cell("abra_random:radius=1.0", 2), result(0.3, 0.5, steps=150, seconds=2.0, cost=1.9)),
    (cell("abra:radius=1.0", 1), result(0.5, 0.3, steps=200, seconds=2.0, cost=None)),
    (cell("abra:radius=1.0", 2), result(0.4, 0.6, steps=200, seconds=2.0, cost=None)),
]


def test_one_row_a_method():
    table = main_table(RESULTS).set_index("method")
    erm, random, abra = table.loc["erm"], table.loc["abra_random:radius=1.0"], table.loc["abra:radius=1.0"]
    assert erm["test"] == pytest.approx(35) and erm["id_test"] == pytest.approx(70)
    assert erm["worst"] == pytest.approx(25) and erm["test_wells"] == pytest.approx(45)
    assert abra["HUVEC"] == pytest.approx(45) and abra["RPE"] == pytest.approx(45)
    assert abra["worst"] == pytest.approx(35) and erm["test_sd"] == pytest.approx(100 * np.std([0.3, 0.4], ddof=1))
    assert np.isnan(erm["vs_erm"]) and np.isnan(erm["vs_arcface"])
    assert abra["vs_erm"] == pytest.approx(10) and abra["vs_erm_low"] < 10 < abra["vs_erm_high"]
    assert abra["vs_random"] == pytest.approx(10) and np.isnan(random["vs_random"])
    assert (random["cost_counted"], random["cost_timed"]) == pytest.approx((1.5 * 1.9, 3.0))
    assert np.isnan(abra["cost_counted"]) and abra["cost_timed"] == pytest.approx(4)


def test_differences_are_paired_by_screen_seed_and_experiment():
    found = differences(cells_table(RESULTS), "test", "abra:radius=1.0", "erm")
    np.testing.assert_allclose(np.concatenate(found), [[0.3, -0.1], [0.1, 0.1]])
    assert differences(cells_table(RESULTS[:-1]), "test", "erm", "abra:radius=1.0") is None  # a screen is missing


def test_what_adapts_stands_apart():
    table = adaptive_table(RESULTS).set_index("method")
    assert (table["vs_plain"] - 10).abs().max() < 1e-9  # adaptation adds 10 points to each training, however it does
    assert (table["vs_plain_high"] - table["vs_plain_low"]).abs().max() < 1e-9
    assert table.loc["erm", "adabn"] == pytest.approx(45)
    assert table.loc["abra:radius=1.0", "vs_erm"] == pytest.approx(10)


def test_page_and_picture(tmp_path):
    table = main_table(RESULTS)
    page = markdown(RESULTS, table, adaptive_table(RESULTS), "python recipes/ladder.py --seeds 2")
    row = next(line for line in page.splitlines() if line.startswith("| erm | 70.0 "))
    assert "commit 0a1b2c3; machine an abacus." in page and "| **35.0** |" in row
    assert "`python recipes/ladder.py --seeds 2`" in page
    assert "| abra:radius=1.0 | +10.0 [" in page and "| abra:radius=1.0 | 20.0 | 0.40 |" in page
    pytest.importorskip("matplotlib")
    plot(table, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 5000


def test_a_training_that_diverged_is_not_left_out_of_what_adapts():
    results = [(own, dict(found)) for own, found in RESULTS]
    del results[-1][1]["test_time"]
    table = adaptive_table(results).set_index("method")
    assert table.loc["abra:radius=1.0", ["adabn", "tvn", "vs_erm", "vs_plain"]].isna().all()
    assert table.loc["erm", "adabn"] == pytest.approx(45)


def test_methods_that_take_images_together_are_marked():
    marked = [(one | {"settings": {"normalize": "plate"} if one["method"] == "erm" else {}}, r) for one, r in RESULTS]
    page = markdown(marked, main_table(marked), adaptive_table(marked), "python")
    assert "| erm\u2020 |" in page and "| abra:radius=1.0 |" in page
    assert "\u2020 takes images of a test experiment, or controls of its plates, together, no labels." in page
    assert "\u2020" not in markdown(RESULTS, main_table(RESULTS), adaptive_table(RESULTS), "python")


def test_trainings_that_diverged_are_no_measure_of_cost():
    for method, seed in (("erm", 1), ("abra_random:radius=1.0", 1)):
        cut = {"diverged": True, "steps": 0 if method == "erm" else 10}  # 0: in its first epoch
        results = [(c, r | cut if (c["method"], c["seed"]) == (method, seed) else r) for c, r in RESULTS]
        table = main_table(results).set_index("method")
        assert table.loc["abra:radius=1.0", "cost_timed"] == pytest.approx(4)
        assert table.loc["abra_random:radius=1.0", "cost_timed"] == pytest.approx(3)
        assert table.loc["erm", "cost_timed"] == pytest.approx(1)
