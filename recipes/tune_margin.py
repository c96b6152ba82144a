"""Find the angular margin, and what goes with it, that generalizes to experiments the model has not seen.

    python recipes/tune_margin.py                                     # embedded screen, about ten minutes on two cores
    python recipes/tune_margin.py --data RXRX1 --records RECORDS      # the real screen
    python recipes/tune_margin.py --resume    # and otherwise the same line again: after a kill, or for more --trials

Searches with KerasTuner; the objective is the best accuracy of a training on the validation experiments (whole
experiments; the test experiments are never read). Ends with a table of trials, a plot of margin against accuracy, the
best setting as JSON and as a command line of recipes/rxrx1.py. `--confirm` then trains that setting and the default
one with three seeds each and scores the test experiments once.

KerasTuner's chief and workers: set KERASTUNER_TUNER_ID, KERASTUNER_ORACLE_IP and KERASTUNER_ORACLE_PORT, build the
records first, and give every process the same --records and --output.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# `--confirm` trains in processes of their own, which need memory of the GPU beside what the trials took.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import keras
import keras_tuner
from distribution import distribute, started
from hparams import EMBEDDED, REAL
from job import as_command, hash_shards, kinds_to_name
from methods import PERTURB, build_model, check_backbone, make_optimizer
from normalization import NORMALIZATIONS, normalization
from options import check_numbers
from rxrx1 import DATA_HELP, check_data, is_embedded, prepare_records
from tuning_report import show_trials, trials_table

from keras_abra.tuning import ABRAHyperModel, DurableSearch, repair_project
from keras_abra.tuning.hyper_model import SPACES
from tfrecords import class_names, list_sites, read_manifest, read_records
from tfrecords.locks import lock_file
from tfrecords.whole import write_whole

TUNERS = {
    "random": keras_tuner.RandomSearch,
    "bayesian": keras_tuner.BayesianOptimization,
    "hyperband": keras_tuner.Hyperband,
    "grid": keras_tuner.GridSearch,
}
# What is searched: on the embedded screen around its own defaults, of 44 classes; on the real one the package's spaces.
EMBEDDED_SPACES = {
    "margin": (0.0, 0.5),
    "scale": [8.0, 12.0, 16.0, 24.0],
    "radius": (0.05, 0.5),
    "learning_rate": (1e-3, 5e-2),
    "weight_decay": (0.05, 2.0),
}
NOT_BEGUN = {"search.json", "records.sha256", "records", "screen", "lock"}  # in the folder of a search
LONGEST_WAIT = 3600  # seconds that a worker waits for the chief
REPLACES = 60  # seconds that it waits for the chief to replace what an earlier search left
PATIENCE = 0.35  # of the epochs without a better accuracy: a trial ends
FAILURES = 5  # one after another: the search ends
MOST_CACHED = 4 * 2**30


class ScreenHyperModel(ABRAHyperModel):
    """The model and the data of recipes/rxrx1.py: a trial is one of its runs.

    Sites are read once and stay in memory for all trials, if all of them take no more than `MOST_CACHED` bytes; the
    operating system keeps what it can of larger records.
    """

    def __init__(self, records, settings, validation, **kwargs):
        self.records, self.settings_of_job, self.validation = records, settings, validation
        manifest = read_manifest(records)
        self.kinds = kinds_to_name(records)
        self.shape, self.names = tuple(manifest["image_shape"]), class_names(records, self.kinds)
        self.normalize = functools.cache(lambda split: normalization(records, split, settings["normalize"], self.kinds))
        stages = settings["stages"]
        images = sum(len(list_sites(records, split, self.kinds)) for split in ("train", validation))
        self.cache = "memory" if images * math.prod(self.shape) <= MOST_CACHED else None
        self.held = [self.read("train"), self.read(validation)]  # what is in memory lasts as long as a reader has it
        super().__init__(None, len(self.names), [stages[:1], stages, []] if len(stages) > 1 else [stages, []], **kwargs)

    def read(self, split, **kwargs):
        size = self.settings_of_job["batch_size"]
        options = {"batch_size": size, "kinds": self.kinds, "cache": self.cache, "normalize": self.normalize(split)}
        return read_records(self.records, split, labelled_only=True, **options, **kwargs)

    def job(self, values):
        """All settings of the job that this trial is."""
        return {**self.settings_of_job, **values, "stages": self.stages[values["stages"]]}

    def make(self, values):
        job = self.job(values)
        method = "abra" if job["stages"] else "arcface"
        return build_model(method, job, self.shape, self.names)

    def make_optimizer(self, hp, values):
        epochs = hp.values.get("tuner/epochs", self.settings_of_job["epochs"])
        return make_optimizer(
            {**self.job(values), "epochs": epochs}, int(self.read("train", training=True).cardinality())
        )

    def fit(self, hp, model, **kwargs):
        first = kwargs.get("initial_epoch", 0)
        train = self.read("train", training=True, seed=self.execution_seed(hp), first_epoch=first)
        model.optimizer.iterations.assign(first * int(train.cardinality()))  # Hyperband goes on with weights alone
        validation = self.read(self.validation)
        return super().fit(hp, model, train, validation_data=validation, shuffle=False, **kwargs)


def main(argv=None):
    args = parse(argv)
    check_data(args)
    role = os.environ.get("KERASTUNER_TUNER_ID", "")
    if (processes := started(keras.backend.backend())) > 1:
        raise ValueError(
            f"{processes} processes were started, and each would do the whole search. Start one, or KerasTuner's chief "
            "and workers (KERASTUNER_TUNER_ID)."
        )
    settings = dict(EMBEDDED if is_embedded(args) else REAL)
    settings.update({k: v for k, v in vars(args).items() if k in settings and v is not None})
    settings["patience"] = max(3, round(PATIENCE * settings["epochs"]))
    settings["stages"] = args.perturb_after or PERTURB.get(settings["backbone"])
    check_backbone(settings["backbone"], "abra", settings["stages"])
    spaces = {name: EMBEDDED_SPACES.get(name) if is_embedded(args) else None for name in args.search}
    plan = {
        "tuner": args.tuner,
        "seed": args.seed,
        "search": {name: list(space) if space else None for name, space in spaces.items()},
        "validation_split": args.validation_split,
        "data": None if args.data is None else str(args.data.resolve()),
        "settings": settings,
        "executions": args.executions,
        "backend": keras.backend.backend(),
    }
    if role not in ("", "chief"):
        wait_for_chief(args.output, plan)
        return search(args, settings, spaces, role)
    with alone(args.output):
        if claim_output(args.output, plan, args.resume):
            again = repair_project(args.output / "trials")
            print(f"Going on with the search in {args.output}" + (f"; anew: trial {', '.join(again)}" if again else ""))
        return search(args, settings, spaces, role)


def search(args, settings, spaces, role):
    """The search itself, in its output folder, and the report."""
    records = prepare_records(args, settings, args.output)
    check_same_records(args.output, records)
    fixed = {name: settings[name] for name in SPACES if name not in spaces and name != "stages"}
    if "stages" not in spaces:
        fixed["stages"] = "+".join(settings["stages"])
    hypermodel = ScreenHyperModel(records, settings, args.validation_split, search=spaces, fixed=fixed, seed=args.seed)
    tuner = make_tuner(args, hypermodel, settings["epochs"])
    stop = keras.callbacks.EarlyStopping("val_accuracy", patience=settings["patience"], mode="max")
    try:
        tuner.search(epochs=settings["epochs"], callbacks=[stop], verbose=1 if sys.stdout.isatty() else 2)
    except RuntimeError as error:  # of KerasTuner: too many failures in a row
        if not role:
            trials_table(tuner.oracle.trials.values()).to_csv(args.output / "trials.csv", index=False)
        first = str(error).splitlines()[0]  # behind it: the traceback of the last trial, which stands in the table
        raise ValueError(f"The search ended: {first} The reasons of all trials stand in trials.csv.") from error
    if role and role != "chief":
        return None
    return report(args, tuner, hypermodel, records)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuner", choices=TUNERS, default="random")
    parser.add_argument("--trials", type=int, default=10, help="default: 10; Hyperband decides by itself")
    parser.add_argument(
        "--search", nargs="+", choices=SPACES, default=["margin", "scale"], help="default: margin scale"
    )
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--records", type=Path, help="folder of TFRecords to keep or reuse")
    parser.add_argument("--output", type=Path, default=Path("runs/tune"), help="default: runs/tune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the search in the output folder")
    parser.add_argument("--confirm", action="store_true", help="train best and default with three seeds, score test")
    parser.add_argument("--epochs", type=int, help="of a trial (default: as recipes/rxrx1.py)")
    parser.add_argument("--backbone", help="tiny_resnet or a model of keras.applications, as recipes/rxrx1.py")
    parser.add_argument("--normalize", choices=NORMALIZATIONS, help="as recipes/rxrx1.py")
    parser.add_argument("--perturb-after", nargs="+", metavar="LAYER", help="stages, for backbones other than these")
    parser.add_argument("--image-size", type=int, help="pixels")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--executions", type=int, default=1, help="trainings of a trial, with seeds of their own")
    parser.add_argument("--validation-split", default="val", help="val (default) or id_test; never a test split")
    args = parser.parse_args(argv)
    args.label = None
    if args.validation_split not in ("val", "id_test"):
        parser.error(
            f"--validation-split {args.validation_split}: margins are chosen on val (or id_test); the test experiments "
            "are scored once, at the end (--confirm)"
        )
    if "step_size" in args.search and "steps" not in args.search:
        parser.error("--search step_size needs steps beside it: by default there are no ascent steps")
    check_numbers(parser, args, ("trials", "executions", "epochs", "batch_size", "image_size"))
    return args


def claim_output(output, plan, resume):
    """Takes the output folder for this search, or refuses it, naming what differs. Whether it had begun there."""
    file = output / "search.json"
    plan = json.loads(json.dumps(plan))
    if not output.exists() or {path.name for path in output.iterdir()} <= NOT_BEGUN:
        output.mkdir(parents=True, exist_ok=True)
        (output / "records.sha256").unlink(missing_ok=True)
        write_whole(file, (json.dumps(plan, indent=2) + "\n").encode())
        return False
    check_is_search(output)
    check_same_plan(output, plan)
    if not resume:
        raise ValueError(f"--output {output} holds this search already: add --resume to go on, or name a new folder.")
    return True


def check_is_search(output):
    """Refuses a folder that holds something else."""
    used = output.exists() and not {path.name for path in output.iterdir()} <= NOT_BEGUN
    if used and not (output / "search.json").is_file():
        raise ValueError(f"--output {output} is in use, and not by a search. Name a new or empty folder.")


def check_same_plan(output, plan, ignored=()):
    """Refuses another search than the one in the output folder, naming what differs but for what is `ignored`."""
    before, plan = json.loads((output / "search.json").read_text()), json.loads(json.dumps(plan))
    before, plan = ({key: value for key, value in one.items() if key not in ignored} for one in (before, plan))
    differing = [
        f"{key} {before.get(key)!r}, now {plan.get(key)!r}"
        for key in sorted({*before, *plan})
        if before.get(key) != plan.get(key)
    ]
    if differing:
        raise ValueError(
            f"--output {output} holds another search: {'; '.join(differing)}. Repeat its options, or name a new folder."
        )


@contextlib.contextmanager
def alone(output):
    """Within it, no other process goes on with the search in this folder."""
    check_is_search(output)
    output.mkdir(parents=True, exist_ok=True)
    lock = lock_file(output / "lock", wait=False)
    if lock is None:
        raise ValueError(f"--output {output} is in use: another process is at work on this search. Wait for its end.")
    with lock:
        yield


def wait_for_chief(output, plan):
    """Returns when the chief has taken the output folder. Refuses to run trials of another search than its own."""
    start = time.monotonic()
    while True:
        try:
            return check_same_plan(output, plan, ignored=("data",))  # which another machine may have elsewhere
        except FileNotFoundError as error:
            if time.monotonic() - start > LONGEST_WAIT:
                message = f"No chief has begun a search in {output}. Start it with the same --output."
                raise ValueError(message) from error
        except ValueError:  # of an earlier search, which the chief may yet replace
            if time.monotonic() - start > REPLACES:
                raise
        time.sleep(1)


def check_same_records(output, records):
    """Refuses to compare trials on some records with trials on others."""
    file, found = output / "records.sha256", hash_shards(records) + "\n"
    if not file.is_file():
        write_whole(file, found.encode())
    elif file.read_text() != found:
        raise ValueError(f"--output {output} holds a search on other records than {records}. Name a new folder.")


def make_tuner(args, hypermodel, epochs):
    kind = type("Search", (DurableSearch, TUNERS[args.tuner]), {})
    limit = {"max_epochs": epochs, "factor": 3} if args.tuner == "hyperband" else {"max_trials": args.trials}
    several = distribute("auto").strategy if keras.backend.backend() == "tensorflow" else None
    return kind(
        hypermodel,
        keras_tuner.Objective("val_accuracy", "max"),
        directory=args.output,
        project_name="trials",
        seed=args.seed + 1,  # KerasTuner takes 0 for none
        executions_per_trial=args.executions,
        max_consecutive_failed_trials=FAILURES,
        distribution_strategy=several,
        **limit,
    )


def report(args, tuner, hypermodel, records):
    trials = trials_table(tuner.oracle.trials.values())
    show_trials(trials, args.output, default=hypermodel.settings_of_job["margin"])
    best = tuner.oracle.get_best_trials()[0]
    if best.status != "COMPLETED":
        raise ValueError(f"No trial of the search in {args.output} ended well; the reasons stand in trials.csv.")
    job = hypermodel.job(hypermodel.settings(best.hyperparameters))
    found = {"settings": dict(job), "seed": args.seed, "val_accuracy": best.score}
    if not job["stages"]:
        del found["settings"]["stages"]
    hparams = args.output / "best.json"
    hparams.write_text(json.dumps(found, indent=2) + "\n")
    command = ["python", "recipes/rxrx1.py", "--records", str(records), "--hparams", str(hparams)]
    command += ["--seed", str(args.seed)] + ([] if job["stages"] else ["--method", "arcface"])
    print(f"\nBest: {args.validation_split} accuracy {best.score:.3f}, trial {best.trial_id}; {hparams}")
    print(f"Train it: {shlex.join(command)}")
    if args.validation_split != "val":
        print("(It chooses its epoch on val, as rxrx1.py does, and will so come to another accuracy than its trial.)")
    found["command"] = shlex.join(command)
    if args.confirm:
        found["confirmed"] = confirm(args, command, hypermodel.settings_of_job)
        hparams.with_name("confirmed.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def confirm(args, command, settings):
    """Accuracy on the test experiments of the best and of the default setting, three seeds each that no trial had."""
    scores = {}
    default = args.output / "default.json"
    default.write_text(json.dumps({"settings": settings}, indent=2) + "\n")
    for name, hparams in (("best", args.output / "best.json"), ("default", default)):
        scores[name] = []
        setting = hashlib.sha256(json.dumps(json.loads(hparams.read_text())["settings"]).encode()).hexdigest()[:8]
        for seed in range(args.seed + args.executions, args.seed + args.executions + 3):
            output = args.output / "confirm" / f"{name}-{setting}-{seed}"
            if not (output / "metrics.json").is_file():
                run = [sys.executable, str(Path(__file__).with_name("rxrx1.py")), *command[2:]]
                run[run.index("--hparams") + 1] = str(hparams)
                run[run.index("--seed") + 1] = str(seed)
                if name == "default" and "--method" in run:
                    del run[run.index("--method") :]
                print(f"Confirming: {name}, seed {seed}", flush=True)
                run += ["--output", str(output), "--resume"]  # where a kill left it
                if subprocess.run(run, stdout=subprocess.DEVNULL).returncode:
                    raise ValueError(f"A training to confirm failed, see above: {shlex.join(run)}")
            splits = json.loads((output / "metrics.json").read_text())["splits"]
            scores[name].append({split: splits[split]["accuracy"] for split in splits})
        for split in scores[name][0]:
            values = [100 * score[split] for score in scores[name]]
            print(f"{name:>8} {split:>8}: {statistics.mean(values):.1f} +- {statistics.stdev(values):.1f} %")
    return scores


if __name__ == "__main__":
    as_command("tune_margin.py", main)
