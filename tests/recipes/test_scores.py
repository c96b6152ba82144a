import numpy as np
import pandas as pd
import pytest
from scores import classes_table, embedding_quality, predictions_table, print_scores, score, wells_table

SITES = pd.DataFrame(
    {
        "site_id": ["HUVEC-17_1_B03_1", "HUVEC-17_1_B03_2", "RPE-08_1_B03_1"],
        "well_id": ["HUVEC-17_1_B03", "HUVEC-17_1_B03", "RPE-08_1_B03"],
        "experiment": ["HUVEC-17", "HUVEC-17", "RPE-08"],
        "cell_type": ["HUVEC", "HUVEC", "RPE"],
        "plate": [1, 1, 1],
        "well": ["B03"] * 3,
        "site": [1, 2, 1],
        "plate_name": ["BR7", "BR7", "BR7"],
        "site_name": ["1", "2", "1"],
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


def test_embeddings_of_equal_singular_values_have_full_rank_and_those_on_a_line_have_one():
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    assert embedding_quality(3.0 * axes, np.arange(8))["effective_rank"] == pytest.approx(4)
    line = np.outer([1.0, -1.0, 1.0, -1.0], [0.6, 0.8, 0.0])
    assert embedding_quality(line, [0, 1, 0, 1]) == {
        "effective_rank": pytest.approx(1),
        "separation": pytest.approx(1),
    }
    assert embedding_quality(line, [0, 0, 1, 1])["separation"] == pytest.approx(0)
    assert np.isnan(list(embedding_quality(np.ones((3, 2)), [0, 1, 2]).values())).all()


def test_predictions_name_site_sirna_and_probability():
    table = predictions_table(SITES, "val", LOGITS, ["s1", "s2"])
    first = table.iloc[1]
    assert (first["site_id"], first["split"], first["sirna"]) == ("HUVEC-17_1_B03_2", "val", "s1")
    assert (first["plate"], first["site"]) == ("BR7", "2")  # as the table has them
    assert (first["predicted_1"], first["predicted_2"]) == ("s2", "s1")
    assert first["probability_1"] == pytest.approx(0.6) and first["probability_2"] == pytest.approx(0.4)
    other = SITES.assign(label=pd.array([1, None, 0], "Int64"))
    labels = predictions_table(other, "val", LOGITS, ["control", "treated"])["label"]
    assert labels.fillna("").tolist() == ["treated", "", "control"]


def test_wells_have_the_mean_of_their_sites_and_classes_what_is_told_right():
    wells = wells_table(SITES, "val", LOGITS, ["s1", "s2"])
    assert wells[["well_id", "plate", "well", "sites", "label"]].values.tolist() == [
        ["HUVEC-17_1_B03", "BR7", "B03", 2, "s1"],
        ["RPE-08_1_B03", "BR7", "B03", 1, "s2"],
    ]
    assert wells["predicted_1"].tolist() == ["s1", "s1"] and "site" not in wells
    assert wells["probability_1"].tolist() == pytest.approx([0.65, 0.7])
    sites = predictions_table(SITES, "val", LOGITS, ["s1", "s2"])
    assert classes_table(sites, wells).values.tolist() == [["val", "s1", 2, 0.5, 1, 1.0], ["val", "s2", 1, 0.0, 1, 0.0]]
    half = SITES.assign(label=pd.array([None, 0, 1], "Int64"), sirna=[None, "s1", "s2"])
    table = wells_table(half, "val", LOGITS, ["s1", "s2"])
    assert table[["label", "sirna"]].values.tolist() == [["s1", "s1"], ["s2", "s2"]]
    unknown = SITES.assign(label=pd.array([0, 0, None], "Int64"))
    tables = [make(unknown, "val", LOGITS, ["s1", "s2"]) for make in (predictions_table, wells_table)]
    assert classes_table(*tables)["label"].tolist() == ["s1"] and len(tables[1]) == 2


def test_names_of_cell_types_stand_apart_and_the_title_names_what_is_there(capsys):
    scores = {"accuracy": 0.5, "well_accuracy": 0.5, "count": 2}
    scores["cell_type"] = {name: {"accuracy": 0.5, "count": 1} for name in ("HUVEC", "primary endothelial")}
    print_scores({"method": "erm", "seed": 3, "splits": {"val": scores}})
    title, head, row = capsys.readouterr().out.strip().split("\n")
    assert title == "Accuracy (%) of erm, seed 3; val: experiments never seen, on which the epoch was chosen"
    assert head.split() == "split sites accuracy by well HUVEC primary endothelial".split() and len(head) == len(row)
    print_scores({"method": "erm", "seed": 3, "splits": {"id_test": scores, "val": scores, "test": scores}})
    assert "test: experiments never seen, scored once" in capsys.readouterr().out
    print_scores({"method": "erm", "seed": 3, "splits": {"val": scores, "test": scores}}, mixed=True)
    assert "test: other sites, also of experiments trained on, scored once" in capsys.readouterr().out
