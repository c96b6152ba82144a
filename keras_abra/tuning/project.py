import json
import os
import secrets
import shutil
from pathlib import Path

WHOLE = ".whole"


def repair_project(folder):
    """Makes the folder of a search that was killed fit to be resumed. Call it before the tuner is made.

    KerasTuner writes its state in place: a process that is killed in that moment leaves half a file. Files that are not
    whole are taken back to their last whole copies, which a `DurableSearch` keeps beside them. A trial that the state
    does not know, because the process ended before it was noted, is removed and will be chosen anew.

    Args:
        folder: the tuner's `directory` / `project_name`.

    Returns:
        Ids of the trials that were running and will be run anew, sorted.

    Raises:
        ValueError: if there are trials that ended, and no state that knows them.
    """
    folder = Path(folder)
    state = _restore(folder / "oracle.json")
    if state is None:
        ended = [trial.parent.name for trial in folder.glob("trial_*/trial.json") if _has_ended(trial)]
        if ended:
            raise ValueError(
                f"{folder / 'oracle.json'} is not whole, and has no whole copy beside it. Expected the state of the "
                f"search, which knows {', '.join(sorted(ended))}. Nothing was removed: name another folder to search "
                "anew."
            )
        (folder / "oracle.json").unlink(missing_ok=True)
    if state is not None:
        _end_what_ended(folder, state)
    known = set(state["start_order"]) if state else set()
    for trial in folder.glob("trial_*"):
        if trial.name.removeprefix("trial_") not in known or _restore(trial / "trial.json") is None:
            shutil.rmtree(trial)
    return sorted(state["ongoing_trials"].values()) if state else []


def _end_what_ended(folder, state):
    """Takes trials that ended from those that run: KerasTuner notes an end a moment after it, or, with workers, with
    the next trial's."""
    running = state["ongoing_trials"]
    trials = {name: _read(folder / f"trial_{trial_id}" / "trial.json") or {} for name, trial_id in running.items()}
    ended = [
        name
        for name, trial in trials.items()
        if running[name] in state["end_order"] or trial.get("status") in ("COMPLETED", "FAILED")
    ]
    for name in ended:
        trial_id = running.pop(name)
        state["end_order"] += [] if trial_id in state["end_order"] else [trial_id]
    if ended:
        _write_whole(folder / "oracle.json", json.dumps(state))


def backup_project(folder):
    """Keeps a whole copy of the state of a search: see `repair_project`."""
    _backup(Path(folder) / "oracle.json")


def backup_trial(folder):
    """Keeps a whole copy of the record of a trial: see `repair_project`."""
    _backup(Path(folder) / "trial.json")


def _has_ended(path):
    trial = _read(path) or _read(_copy_of(path))
    return trial is not None and trial.get("status") not in ("RUNNING", "IDLE")


def _copy_of(path):
    return path.with_name(path.name + WHOLE)


def _read(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _restore(path):
    """The content of a file, taken from its copy where it is not whole; None where there is neither."""
    content = _read(path)
    if content is None and (content := _read(_copy_of(path))) is not None:
        os.replace(_copy_of(path), path)
    return content


def _backup(path):
    """Workers of one search do this at the same time, while the chief writes."""
    try:
        text = path.read_text()
        json.loads(text)
    except (OSError, ValueError):
        return
    _write_whole(_copy_of(path), text)


def _write_whole(path, text):
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
