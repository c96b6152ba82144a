import contextlib
import functools
from pathlib import Path

import keras_tuner

from keras_abra.tuning.project import backup_project, backup_trial


class DurableSearch:
    """Mix-in for a tuner of KerasTuner: a search that may be killed at any time, and whose folder stays small.

    - Whole copies of the tuner's state are kept, from which `repair_project` mends a folder in which a killed process
      left half a file.
    - KerasTuner keeps the weights of every trial. Here, at the end of each trial, those remain that are among the
      `keep_checkpoints` best, that run, or that Hyperband may still continue: at most `keep_checkpoints` + the number
      of running trials + the trials of Hyperband's open brackets. `trial.json`, the record of a trial, stays. (A worker
      of a distributed Hyperband removes nothing: it does not know the brackets.)

    >>> import keras_tuner
    >>> class RandomSearch(DurableSearch, keras_tuner.RandomSearch):
    ...     keep_checkpoints = 3
    """

    keep_checkpoints = 1

    def reload(self):
        """As KerasTuner's, and a grid search knows again which combinations come next, which it does not store."""
        super().reload()
        oracle = self.oracle
        if not isinstance(oracle, keras_tuner.oracles.GridSearchOracle):
            return
        values = {trial_id: oracle.trials[trial_id].hyperparameters.values for trial_id in oracle.start_order}
        compare = functools.cmp_to_key(lambda one, other: oracle._compare(values[one], values[other]))
        oracle._ordered_ids = type(oracle._ordered_ids)()
        for trial_id in sorted(values, key=compare):
            oracle._ordered_ids.insert(trial_id)
        oracle._populate_next = [*oracle.end_order]

    def on_trial_begin(self, trial):
        super().on_trial_begin(trial)
        backup_trial(Path(self.project_dir) / f"trial_{trial.trial_id}")
        backup_project(self.project_dir)

    def on_trial_end(self, trial):
        super().on_trial_end(trial)
        backup_project(self.project_dir)
        self._ended = [*getattr(self, "_ended", []), trial.trial_id]  # a worker cannot ask its chief for all of them
        ended = {*getattr(self.oracle, "end_order", self._ended)}
        best = {t.trial_id for t in self.oracle.get_best_trials(self.keep_checkpoints) if t.status == "COMPLETED"}
        if "tuner/bracket" in trial.hyperparameters.values:  # Hyperband
            brackets = getattr(self.oracle, "_brackets", None)
            if brackets is None:
                return
            best |= {run["id"] for bracket in brackets for turn in bracket["rounds"] for run in turn}
        best |= {t.trial_id for t in getattr(self.oracle, "ongoing_trials", {}).values()}
        for trial_id in ended - best:
            with contextlib.suppress(FileNotFoundError):
                Path(self._get_checkpoint_fname(trial_id)).unlink()
