import numpy as np
import pandas as pd
import pytest
from scores import predictions_table, score

SITES = pd.DataFrame(
    {
        "site_id": ["HUVEC-17_1_B03_1", "HUVEC-17_1_B03_2", "RPE-08_1_B03_1"],
        "well_id": ["HUVEC-17_1_B03", "HUVEC-17_1_B03", "RPE-08_1_B03"],
        "experiment": ["HUVEC-17", "HUVEC-17", "RPE-08"],
        "cell_type": ["HUVEC", "HUVEC", "RPE"],
        "plate": [1, 1, 1],
        "well": ["B03"] * 3,
        "site": [1, 2, 1],
        "sirna": ["s1", "s1", "s2"],
        "label": pd.array([0, 0, 1], dtype="Int64"),
    }
)
# Site 1 of the first well is right by far, site 2 wrong by little: the well is right.
LOGITS = np.log(np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]], "float32"))


def test_sites_and_wells_are_scored_apart():
    scores = score(SITES, LOGITS)
    assert (scores["accuracy"], scores["well_accuracy"], scores["count"]) == (1 / 3, 1 / 2, 3)
    assert scores["cell_type"] == {"HUVEC": {"accuracy": 0.5, "count": 2}, "RPE": {"accuracy": 0.0, "count": 1}}
    assert scores["experiment"].keys() == {"HUVEC-17", "RPE-08"}


def test_predictions_name_site_sirna_and_probability():
    table = predictions_table(SITES, "val", LOGITS, ["s1", "s2"])
    first = table.iloc[1]
    assert (first["site_id"], first["split"], first["sirna"]) == ("HUVEC-17_1_B03_2", "val", "s1")
    assert (first["predicted_1"], first["predicted_2"]) == ("s2", "s1")
    assert first["probability_1"] == pytest.approx(0.6) and first["probability_2"] == pytest.approx(0.4)
