"""The rungs of the ladder: each method as settings. `ladder_contenders` makes its model."""

import json
import re
import zlib
from itertools import product

import numpy as np

# What a method is made of, unless it says otherwise. Network, batch, rate, decay: those of the embedded screen, chosen
# for ERM (recipes/results/screen_acceptance.md); margin, scale: chosen on its validation experiments; radius: see
# recipes/results/ladder_plate/radius.md.
COMMON = {
    "head": "softmax",
    "width": 16,
    "embedding_dim": 128,
    "batch_size": 32,
    "learning_rate": 1e-2,
    "weight_decay": 0.5,
    "batches": "random",
    "normalize": "image",
    "augment": "wilds",
}
MARGIN = {"margin": 0.2, "scale": 12.0}
ADVERSARY = MARGIN | {
    "head": "abra",
    "structure": "diagonal",
    "stages": "stem+stage1",
    "radius": 0.15,
    "steps": 1,
    "step_size": 0.5,
    "perturbed_weight": 1.0,
    "alignment": "symmetric_kl",
    "alignment_weight": 1.0,
    "two_sided": False,
}
PAIRS = {"batches": "experiments"}  # penalties between experiments need several samples of each in a mini-batch
TOGETHER = 4  # experiments in such a mini-batch
BEN = {"batches": "experiment", "batch_statistics": True}
EVERYWHERE = "stem+stage1+stage2+stage3"
ARCFACE = MARGIN | {"head": "arcface"}
# Feature statistics are perturbed under softmax, as published; DSU under ArcFace as well, as ABRA's nearest relative.
# (DSU's deviations stay within 0.1 and 10 times their own, as ABRA's do; in its own code they may change sign.)
METHODS = {
    "erm": {},
    "arcface": ARCFACE,
    "cosface": {"head": "cosface", "margin": 0.1, "scale": 12.0},
    "winner_loss": MARGIN | {"head": "winner"},
    "dsu": ARCFACE | {"layers": "dsu", "probability": 0.5},
    "dsu_softmax": {"layers": "dsu", "probability": 0.5},
    "mixstyle": {"layers": "mixstyle", "probability": 0.5, "alpha": 0.1},
    "csu": {"layers": "csu", "behind": EVERYWHERE, "probability": 0.5, "alpha": 0.3},
    "adv_style": {"layers": "adv_style", "behind": EVERYWHERE, "penalty": 10.0, "adversary_rate": 1e-3},
    "adv_bn": {"head": "adv_bn", "box": 1.1, "step_size": 0.2},
    "erm_of_experiments": PAIRS,  # the mini-batches of the next three, without a penalty
    "coral": PAIRS | {"objective": "coral", "penalty": 1.0},
    "irm": PAIRS | {"objective": "irm", "penalty": 1.0},
    "vrex": PAIRS | {"objective": "vrex", "penalty": 10.0},
    "group_dro": {"objective": "group_dro", "penalty": 0.01},
    "dann": {"objective": "dann", "penalty": 1.0},
    "ben": BEN,
    "ben_plate": BEN | {"batches": "plate"},  # whole plates, of fewer sites than `batch_size`
    "mixup": {"mix": "mixup", "alpha": 0.2},
    "cutmix": {"mix": "cutmix", "alpha": 1.0},
    "gain_and_bias": {"augment": "gain_and_bias"},
    "normalize_experiment": {"normalize": "experiment"},
    "normalize_plate": {"normalize": "plate"},
    "erm_more": {"compute": "abra"},
    "arcface_more": ARCFACE | {"compute": "abra"},
    "dsu_more": ARCFACE | {"layers": "dsu", "probability": 0.5, "compute": "abra"},
    "abra_random": ADVERSARY | {"steps": 0},
    "abra": ADVERSARY,
}
# ABRA's variants, each beside its random control of the same budget.
VARIANTS = {
    **{f"structure={s}": {"structure": s} for s in ("low_rank", "domain", "domain_cell_type")},
    **{f"stages={s}": {"stages": s} for s in ("stem", "stage1", "stage2", "stage3", "stem+stage1+stage2+stage3")},
    **{f"radius={r}": {"radius": r} for r in (0.05, 0.5, 1.0, 3.0)},
    **{f"alignment={a}": {"alignment": a} for a in ("none", "jensen_shannon", "coral", "mmd")},
    "alignment=none+radius=3.0": {"alignment": "none", "radius": 3.0},  # does alignment hold what it breaks?
    "two_sided": {"two_sided": True},
    **{f"margin={m}": {"margin": m} for m in (0.0, 0.1, 0.3, 0.5)},
    "loss=cosface": {"loss": "cosface", "margin": 0.1},  # that of the method `cosface`
    **{f"norms={n}": {"perturbed_norms": n} for n in ("clean", "moving", "auxiliary")},
    "shared": {"shared_by": "experiment"},
    "part": {"perturbed_share": 0.5},
    "ramp_radius": {"ramp_radius": True},
    "perturbed_weight=0.3": {"perturbed_weight": 0.3},
    "ben": BEN,
}
ONLY_ADVERSARIES = {
    "steps=3": {"steps": 3},
    "step_size=2": {"step_size": 2.0},
    "step_size=100": {"step_size": 100.0},  # the start no longer counts: the first step alone decides
    "zero_start": {"start": "zero"},
    "adversary_every=4": {"adversary_every": 4},
    "search_loss=softmax": {"search_loss": "softmax"},
    "learned_scale": {"learned_scale": True, "steps": 0},  # the adversary is the scale
}
# Where the worst case may beat the random one: along the directions in which experiments of a cell type differ, as far
# as they do (radius 1), for each sample or one for an experiment; from noise or from zero.
DOMAIN = {"structure": "domain_cell_type", "radius": 1.0}
DESIGNS = {
    "domain_cell_type+radius=1": DOMAIN,
    "shared+domain_cell_type+radius=1": DOMAIN | {"shared_by": "experiment"},
    **{
        f"norms={n}+shared+domain_cell_type+radius=1": DOMAIN | {"shared_by": "experiment", "perturbed_norms": n}
        for n in ("clean", "auxiliary")
    },
}
ABLATION = {
    **{f"abra_random:{name}": ADVERSARY | {"steps": 0} | change for name, change in (VARIANTS | DESIGNS).items()},
    **{f"abra:{name}": ADVERSARY | change for name, change in (VARIANTS | DESIGNS | ONLY_ADVERSARIES).items()},
    **{
        f"abra:{name}+{search}": ADVERSARY | change | ONLY_ADVERSARIES[search]
        for name, change in DESIGNS.items()
        for search in ("zero_start", "learned_scale")
    },
}


RATE = "learning_rate="


def random_control(method):
    """The same method with a random perturbation; None for what is not ABRA with an adversary."""
    method, rate = split_rate(method)
    name, _, variant = method.partition(":")
    if name != "abra":
        return None
    shared = [part for part in variant.split("+") if part and part not in ONLY_ADVERSARIES]
    own_rate = [f"{RATE}{rate}"] if rate else []
    return ":".join(["abra_random", *(["+".join(shared)] if shared else []), *own_rate])


def split_rate(method):
    """The name without a rate of its own, and that rate as it is written, or None."""
    found = re.fullmatch(rf"(.+):{RATE}(\d*\.?\d+(?:e-?\d+)?)", method)
    return (found[1], found[2]) if found else (method, None)


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


def method_settings(method, **changes):
    """All settings of a method, or of one at a rate of its own, such as `erm:learning_rate=0.005`.

    Args:
        method: a name in `METHODS` or `ABLATION`, or `METHOD:learning_rate=RATE`.
        changes: settings that all methods of a ladder share. A rate in the name is taken before them.

    Raises:
        ValueError: for a name that is no method's.
    """
    known = METHODS | ABLATION
    base, rate = split_rate(method)
    if rate:
        changes = changes | {"learning_rate": float(rate)}
    if base not in known:
        raise ValueError(
            f"Unknown method {method!r}. Expected some of {', '.join(known)}; or one of them with a rate of its own, "
            "such as erm:learning_rate=0.005."
        )
    return COMMON | known[base] | changes


def lacks(settings, train, cell_types, controls):
    """What a screen lacks for a method, as a few words; empty if nothing.

    Args:
        settings: of the method.
        train: number of training experiments of the screen.
        cell_types: how many cell types they are dealt to in turn.
        controls: whether its plates have negative controls.
    """
    least = {"experiments": TOGETHER}.get(settings["batches"], 1)
    if settings.get("structure", "").startswith("domain"):  # what differs between experiments, or those of a cell type
        least = 1 + (cell_types if settings["structure"] == "domain_cell_type" else 1)
    if train < least:
        return f"at least {least} training experiments, and there are {train}"
    if settings["normalize"] == "plate" and not controls:
        return "negative controls on each plate, and there are none"
    return ""


def trial_settings(method, trial, **changes):
    """Settings of one trial of the search: trial 0 has the method's own, later ones are drawn, each another.

    The draw depends on the method's name and the number alone, so that a search can be widened later. An adversary is
    offered the very settings of its random control: what the two then differ in is not the luck of the draw. What the
    name says (`abra:margin=0.0`, or a rate of its own) is not searched. `changes` are settings that all methods of a
    ladder share.
    """
    settings = method_settings(method, **changes)
    base, rate = split_rate(method)
    named = {name for name in ABLATION.get(base, {}) if ABLATION[base][name] != ADVERSARY.get(name)}
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
        chosen_alike: dict of `trials`, their number for each method, `screen`, the one they were made on, and `rule`,
            of convergence (the first ladders' files have none; it was the same for all of them).
        changes: settings that all methods of this ladder share.

    Raises:
        ValueError: for another kind of file, for other trials, and for a method that is made of something else here.
    """
    try:
        found = json.loads(file.read_text())
        trials = {name: found[name] for name in ("trials", "screen")}
        trials["rule"] = found.get("rule", chosen_alike["rule"])
        tuned = {method: {**settings} for method, settings in found["settings"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no tuned.json of a ladder: expected trials, screen and settings.") from error
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
