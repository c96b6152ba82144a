"""Ladders of the same screens, one beside the other."""

import ladder_compare
import pandas as pd
import pytest


def cells(tmp_path, name, **methods):
    """A file with the accuracies of each method on two screens of two experiments."""
    rows = [
        (method.replace("__", ":"), screen, 0, "test", f"HUVEC-0{i}", accuracy[screen][i], 10)
        for method, accuracy in methods.items()
        for screen in (0, 1)
        for i in (0, 1)
    ]
    columns = ["method", "screen", "seed", "split", "experiment", "accuracy", "sites"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / name, index=False)
    return str(tmp_path / name)


@pytest.mark.any_backend
def test_methods_of_two_ladders_are_paired(tmp_path, capsys):
    erm, control = ((0.2, 0.4), (0.3, 0.5)), ((0.3, 0.4), (0.3, 0.6))
    one = cells(tmp_path, "a.csv", erm=erm, abra_random__two_sided=control)
    other = cells(tmp_path, "b.csv", erm=erm, abra__two_sided=((0.5, 0.5), (0.4, 0.6)))
    (row,) = ladder_compare.main([one, other])
    assert row[0] == "abra:two_sided" and row[1] == pytest.approx(50)
    assert row[2][0] == pytest.approx(10) and row[2][1] <= 10 <= row[2][2]
    assert "| abra:two_sided | 50.0 | +10.0 [" in capsys.readouterr().out
    rows = {method: interval[0] for method, _, interval in ladder_compare.main([one, other, "--to", "erm"])}
    assert rows == pytest.approx({"abra_random:two_sided": 5, "abra:two_sided": 15})


@pytest.mark.any_backend
def test_the_other_method_may_be_scored_otherwise(tmp_path, capsys):
    table = pd.read_csv(cells(tmp_path, "a.csv", erm=((0.2, 0.4), (0.3, 0.5)), dsu=((0.6, 0.3), (0.4, 0.4))))
    better = table.assign(split="adabn", accuracy=table["accuracy"] + 0.1)
    pd.concat([table, better]).to_csv(tmp_path / "b.csv", index=False)
    (row,) = ladder_compare.main([str(tmp_path / "b.csv"), "--to", "erm", "--to-split", "adabn"])
    assert row[:2] == ("dsu", pytest.approx(42.5)) and row[2][0] == pytest.approx(42.5 - 45)
    assert "| method | test | difference to erm (adabn) |" in capsys.readouterr().out


@pytest.mark.any_backend
def test_the_worst_experiments_may_be_other_ones(tmp_path, capsys):
    file = cells(tmp_path, "a.csv", erm=((0.2, 0.4), (0.5, 0.3)), dsu=((0.6, 0.3), (0.4, 0.4)))
    (row,) = ladder_compare.main([file, "--to", "erm", "--worst"])
    assert row[:2] == ("dsu", pytest.approx(35)) and row[2][0] == pytest.approx(10)  # 30 and 40, to 20 and 30
    assert "| method | test, worst | difference to erm |" in capsys.readouterr().out


@pytest.mark.any_backend
def test_what_has_nothing_to_be_compared_to_is_said(tmp_path, capsys):
    one = cells(tmp_path, "a.csv", erm=((0.2, 0.4), (0.3, 0.5)), abra__two_sided=((0.5, 0.5), (0.4, 0.6)))
    assert ladder_compare.main([one]) == []
    assert "Left out: abra:two_sided, as abra_random:two_sided was not trained on" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--to dsu is no method of these files. Expected one of erm, abra:two_sided"):
        ladder_compare.main([one, "--to", "dsu"])


@pytest.mark.any_backend
def test_what_was_not_trained_alike_is_refused(tmp_path):
    one = cells(tmp_path, "a.csv", erm=((0.2, 0.4), (0.3, 0.5)))
    other = cells(tmp_path, "b.csv", erm=((0.2, 0.4), (0.3, 0.6)))
    with pytest.raises(ValueError, match="erm on screen 1 with seed 0 has other numbers in two of the files"):
        ladder_compare.main([one, other])
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="c.csv is no cells.csv of a ladder: it lacks accuracy, experiment, method"):
        ladder_compare.main([one, str(tmp_path / "c.csv")])
    with pytest.raises(ValueError, match="nowhere.csv is no table of cells"):
        ladder_compare.main([str(tmp_path / "nowhere.csv")])


@pytest.mark.any_backend
def test_a_method_without_such_a_score_is_said_to_lack_it(tmp_path, capsys):
    erm = cells(tmp_path, "a.csv", erm=((0.2, 0.4), (0.3, 0.5)))
    table = pd.read_csv(erm)
    adapted = table.assign(split="adabn")
    both = pd.concat([table, adapted, table.assign(method="dsu"), adapted[adapted["screen"] == 0].assign(method="dsu")])
    both.to_csv(tmp_path / "b.csv", index=False)
    assert ladder_compare.main([str(tmp_path / "b.csv"), "--split", "adabn", "--to", "erm"]) == []
    assert "Left out: dsu, as dsu has no adabn of 1 of its trainings" in capsys.readouterr().out
    assert [row[0] for row in ladder_compare.main([str(tmp_path / "b.csv"), "--split", "adabn", "--to", "dsu"])] == []
    assert "Left out: erm, as dsu has no adabn of 1 of its trainings" in capsys.readouterr().out


@pytest.mark.any_backend
def test_penalties_between_experiments_are_compared_to_their_batches(tmp_path):
    one = cells(tmp_path, "a.csv", coral=((0.2, 0.4), (0.3, 0.5)), erm_of_experiments=((0.1, 0.4), (0.3, 0.4)))
    (row,) = ladder_compare.main([one])
    assert row[0] == "coral" and row[2][0] == pytest.approx(5)
