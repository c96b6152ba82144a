"""What the soak makes of its jobs; itself it runs for hours, by hand."""

import io
import signal
import zipfile
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import soak

pytestmark = pytest.mark.any_backend


def test_where_the_system_tells_no_memory_there_is_no_slope():
    assert soak.slope([]) is None
    assert soak.slope([(60.0 * i, 100 + i) for i in range(30)]) == pytest.approx(60)


def test_a_folder_in_use_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is there already. Name a new folder"):
        soak.main(["--output", str(tmp_path)])


def test_a_job_that_was_never_killed_has_survived_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "run", lambda *args, **kwargs: (0, [], None, 0.0))  # ends before it is to be killed
    assert soak.main(["--output", str(tmp_path / "soak"), "--epochs", "4"]) == 1
    assert "ended before its first kill" in capsys.readouterr().out


def test_every_difference_between_two_jobs_is_found(tmp_path):
    def write(folder, history="1\n", weight=1.0):
        folder.mkdir()
        for name, text in {"metrics.json": "{}", "predictions.csv": "a\n", "history.csv": history}.items():
            (folder / name).write_text(text)
        weights = io.BytesIO()
        with h5py.File(weights, "w") as file:
            file["layers/head/0"] = np.float32([weight, 2.0])
        with zipfile.ZipFile(folder / "model.keras", "w") as archive:
            archive.writestr("model.weights.h5", weights.getvalue())
        return folder

    whole = write(tmp_path / "whole")
    assert soak.differences(whole, write(tmp_path / "same")) == []
    assert soak.differences(whole, write(tmp_path / "text", history="2\n")) == ["history.csv"]
    nearest = float(np.nextafter(np.float32(1), np.float32(2)))
    assert soak.differences(whole, write(tmp_path / "bit", weight=nearest)) == ["layers/head/0"]


def test_a_job_that_dies_by_itself_is_a_failure_and_not_a_kill(tmp_path, monkeypatch):
    ends = iter([(-signal.SIGKILL, [], 0.1, 0.0), (-signal.SIGKILL, [], None, 0.0)])  # the second of no kill of ours
    monkeypatch.setattr(soak, "run", lambda *args, **kwargs: next(ends))
    args = SimpleNamespace(seed=0, hours=1.0, kill_minutes=(1, 2), output=tmp_path)
    kills, code, _ = soak.kill_and_resume(args, 4)
    assert len(kills) == 1 and code == -signal.SIGKILL
