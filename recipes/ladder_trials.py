"""The search for each method's settings, as many trials for each, on validation experiments."""

import json
import zlib
from itertools import product

import keras
import numpy as np
from ladder_methods import ABLATION, ADVERSARY, built_on, method_settings, random_control, split_rate
from ladder_runs import make_cell, read_result, run_cells, write_json

DEVELOPMENT = 1000  # the first of the screens that trials are made on, and nothing else
# What is searched on validation experiments: rate and decay for every method, and at most two of its own.
SPACES = {
    "learning_rate": (5e-3, 1e-2, 2e-2),
    "weight_decay": (0.1, 0.5, 1.0),
    "margin": (0.1, 0.2, 0.3, 0.5),
    "scale": (8.0, 12.0, 16.0, 24.0),
    "radius": (0.05, 0.15, 0.5, 1.0),
    "box": (0.2, 0.5, 0.8, 1.1),
    "probability": (0.1, 0.25, 0.5, 1.0),
    "alpha": (0.1, 0.3, 1.0),
    "penalty": (0.01, 0.1, 1.0, 10.0, 100.0),
}
OWN = ("radius", "box", "probability", "alpha", "penalty", "margin", "scale")


def tune(plan, args):
    """Settings of each method: the trial that is best on the validation experiments of the development screens."""
    screens = [plan["screen"] | {"seed": DEVELOPMENT + i} for i in range(args.trial_screens)]
    chosen_alike = {"trials": plan["trials"], "screen": screens[0], "rule": plan["rule"]}
    if len(screens) > 1:
        chosen_alike["trial_screens"] = len(screens)
    best = read_tuned(args.tuned, plan["methods"], chosen_alike, **plan.get("common", {})) if args.tuned else {}
    trials = {
        method: [
            [make_cell(method, settings, screen, seed, plan, ["id_test", "val"]) for seed, screen in enumerate(screens)]
            for settings in (trial_settings(method, i, **plan.get("common", {})) for i in range(plan["trials"]))
        ]
        for method in plan["methods"]
        if method not in best
    }
    run_cells([cell for of_method in trials.values() for of_trial in of_method for cell in of_trial], args)

    def score(cell):
        found = read_result(args.output, cell)
        return -1.0 if found["diverged"] else found["splits"]["val"]["accuracy"]

    for method, of_method in trials.items():
        scores = [np.mean([score(cell) for cell in of_trial]) for of_trial in of_method]
        best[method] = of_method[int(np.argmax(scores))][0]["settings"]
    file = args.output / "tuned.json"
    before = read_before(file, chosen_alike, **plan.get("common", {}))
    write_json(file, chosen_alike | {"backend": keras.backend.backend(), "settings": before | best})
    return best


def read_before(file, chosen_alike, **changes):
    """Settings that a run before chose in the same way in this folder, for other methods maybe."""
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    same = all(found.get(name) == value for name, value in chosen_alike.items())
    if not same or found.get("backend") != keras.backend.backend():
        return {}
    kept = found["settings"].items()
    return {m: settings for m, settings in kept if was_offered(m, settings, chosen_alike["trials"], **changes)}


def trial_settings(method, trial, **changes):
    """Settings of one trial of the search: trial 0 has the method's own, later ones are drawn, each another.

    The draw depends on the method's name and the number alone, so that a search can be widened later. An adversary is
    offered the very settings of its random control, ABRA on another method's batches (`abra:cutmix`) those of that
    method, the rest as by default, and a method at ABRA's compute (`erm_more`) those it has without: what the two then
    differ in is not the luck of the draw. What the name says (`abra:margin=0.0`, or a rate of its own) is not searched.
    `changes` are settings that all methods of a ladder share.
    """
    settings = method_settings(method, **changes)
    if (under := built_on(method)) is not None:
        offered = trial_settings(under, trial, **changes)
        return settings | {name: offered[name] for name in SPACES if name in offered}
    base, rate = split_rate(method)
    named = {name for name, value in ADVERSARY.items() if ABLATION.get(base, ADVERSARY)[name] != value}
    named |= {"learning_rate"} if rate else set()
    names = ["learning_rate", "weight_decay", *[name for name in OWN if name in settings][:2]]
    names = [name for name in names if name not in named]
    grid = [dict(zip(names, values, strict=True)) for values in product(*(SPACES[name] for name in names))]
    grid = [values for values in grid if values != {name: settings[name] for name in names}]
    order = np.random.default_rng(zlib.crc32((random_control(method) or method).encode())).permutation(len(grid))
    return settings if trial == 0 else settings | grid[order[(trial - 1) % len(grid)]]


def read_tuned(file, methods, chosen_alike, **changes):
    """Settings that the trials of an earlier ladder chose.

    Args:
        file: its `tuned.json`.
        methods: names; those that the file lacks are left out.
        chosen_alike: dict of `trials`, their number for each method, `screen`, the first one they were made on, `rule`,
            of convergence (the first ladders' files have none; it was the same for all of them), and `trial_screens`,
            where they were made on several.
        changes: settings that all methods of this ladder share.

    Raises:
        ValueError: for another kind of file, for other trials or another backend, and for a method that is made of
            something else here.
    """
    try:
        found = json.loads(file.read_text())
        trials = {name: found[name] for name in ("trials", "screen")}
        trials["rule"] = found.get("rule", chosen_alike["rule"])
        trials |= {name: found[name] for name in ("trial_screens",) if name in found}
        tuned = {method: {**settings} for method, settings in found["settings"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no tuned.json of a ladder: expected trials, screen and settings.") from error
    backend = found.get("backend", "tensorflow")  # that of the first ladders, whose files do not say
    if backend != keras.backend.backend():
        raise ValueError(f"{file} was chosen on {backend}, and this run is on {keras.backend.backend()}.")
    if trials != chosen_alike:
        raise ValueError(f"{file} was chosen by other trials than this run makes: {trials}, not {chosen_alike}.")
    best = {method: tuned[method] for method in methods if method in tuned}
    for method, settings in best.items():
        own = method_settings(method, **changes)
        fixed = {name for name in own if name not in SPACES and settings.get(name) != own[name]}
        if changed := sorted(fixed | (own.keys() ^ settings.keys())):
            raise ValueError(f"{file}: {method} is another method here: it differs in {', '.join(changed)}.")
        if not was_offered(method, settings, chosen_alike["trials"], **changes):
            raise ValueError(f"{file}: the settings of {method} are none of its trials here. Leave it out of the file.")
    return best


def was_offered(method, settings, trials, **changes):
    """Whether these settings are those of one of the method's trials."""
    return settings in [trial_settings(method, i, **changes) for i in range(trials)]
