"""What the soak makes of its jobs; itself it runs for hours, by hand."""

import signal
from types import SimpleNamespace

import pytest
import soak

pytestmark = pytest.mark.any_backend


def test_where_the_system_tells_no_memory_there_is_no_slope():
    assert soak.slope([]) is None
    assert soak.slope([(60.0 * i, 100 + i) for i in range(30)]) == pytest.approx(60)


def test_a_folder_in_use_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is there already. Name a new folder"):
        soak.main(["--output", str(tmp_path)])


def test_a_job_that_dies_by_itself_is_a_failure_and_not_a_kill(tmp_path, monkeypatch):
    ends = iter([(-signal.SIGKILL, [], 0.1, 0.0), (-signal.SIGKILL, [], None, 0.0)])  # the second of no kill of ours
    monkeypatch.setattr(soak, "run", lambda *args, **kwargs: next(ends))
    args = SimpleNamespace(seed=0, hours=1.0, kill_minutes=(1, 2), output=tmp_path)
    kills, code, _ = soak.kill_and_resume(args, 4)
    assert len(kills) == 1 and code == -signal.SIGKILL
