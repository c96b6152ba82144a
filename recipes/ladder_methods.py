"""The rungs of the ladder: each method as settings. `ladder_contenders` makes its model."""

import difflib
import re

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
PENALTIES, WITHOUT_PENALTY = ("coral", "irm", "vrex"), "erm_of_experiments"
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
    # does alignment hold what it breaks?
    **{f"alignment=none+radius={r}": {"alignment": "none", "radius": r} for r in (1.0, 3.0)},
    "two_sided": {"two_sided": True},
    **{f"margin={m}": {"margin": m} for m in (0.0, 0.1, 0.3, 0.5)},
    "loss=cosface": {"loss": "cosface", "margin": 0.1},  # that of the method `cosface`
    **{f"norms={n}": {"perturbed_norms": n} for n in ("clean", "moving", "auxiliary")},
    "shared": {"shared_by": "experiment"},
    "part": {"perturbed_share": 0.5},
    "ramp_radius": {"ramp_radius": True},
    "perturbed_weight=0.3": {"perturbed_weight": 0.3},
    "ben": BEN,
    "cutmix": {"mix": "cutmix", "alpha": 1.0},  # those of the method `cutmix`
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


def control_of(method):
    """What a method is to be compared to, to tell what is its own: the random control of an adversary, the mini-batches
    of a penalty between experiments without it; None for others."""
    base, rate = split_rate(method)
    if base in PENALTIES:
        return f"{WITHOUT_PENALTY}:{RATE}{rate}" if rate else WITHOUT_PENALTY
    return random_control(method)


def built_on(method):
    """The method whose settings another one is offered in its trials, at the same rate of its own; None for others.

    That whose batches a variant of ABRA has, as `abra:cutmix` has those of `cutmix`, and the same at its own compute:
    `erm` for `erm_more`.
    """
    base, rate = split_rate(method)
    name, _, variant = base.partition(":")
    if base.endswith("_more"):
        under = base.removesuffix("_more")
    elif name in ("abra", "abra_random") and variant in METHODS:
        under = variant
    else:
        return None
    return f"{under}:{RATE}{rate}" if rate else under


def split_rate(method):
    """The name without a rate of its own, and that rate as it is written, or None."""
    found = re.fullmatch(rf"(.+):{RATE}(\d*\.?\d+(?:e-?\d+)?)", method)
    return (found[1], found[2]) if found else (method, None)


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
        near = ", ".join(difflib.get_close_matches(base, known) or METHODS)
        raise ValueError(
            f"Unknown method {method!r}. Did you mean one of {near}? `ladder.py --help` has all; each may have a rate "
            "of its own, such as erm:learning_rate=0.005."
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
