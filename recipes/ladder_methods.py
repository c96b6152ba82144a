"""The rungs of the ladder: each method as settings, and the model that these settings make."""

import re
import zlib
from itertools import product
from typing import NamedTuple

import keras
import numpy as np
from backbones import tiny_resnet
from contenders.adv_bn import AdvBN
from contenders.adv_style import AdvStyle
from contenders.coral import CORAL
from contenders.correlated_uncertainty import CorrelatedStyleUncertainty
from contenders.dann import DANN
from contenders.group_dro import GroupDRO
from contenders.irm import IRM
from contenders.mixstyle import MixStyle
from contenders.objective_model import ObjectiveModel
from contenders.vrex import VREx
from contenders.winner_loss import WinnerLoss
from methods import DSU

from keras_abra import ABRAModel, cut_backbone, embedding_neck, step_cost
from keras_abra.layers import CosineHead, FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace, CosFace, DistributionAlignment

# What a method is made of, unless it says otherwise. Network, batch, rate, decay: those of the embedded screen, chosen
# for ERM (recipes/results/screen_acceptance.md); margin, scale, radius: chosen on its validation experiments.
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
PAIRS = {"batches": "across"}  # penalties between experiments need several samples of each in a mini-batch
ARCFACE = MARGIN | {"head": "arcface"}
METHODS = {
    "erm": {},
    "arcface": ARCFACE,
    "cosface": {"head": "cosface", "margin": 0.1, "scale": 12.0},
    "winner_loss": MARGIN | {"head": "winner"},
    "dsu": ARCFACE | {"layers": "dsu", "probability": 0.5},
    "mixstyle": ARCFACE | {"layers": "mixstyle", "probability": 0.5, "alpha": 0.1},
    "csu": ARCFACE | {"layers": "csu", "probability": 0.5, "alpha": 0.3},
    "adv_style": ARCFACE | {"layers": "adv_style", "penalty": 10.0},
    "adv_bn": {"head": "adv_bn", "radius": 1.1, "step_size": 0.2},
    "coral": PAIRS | {"objective": "coral", "penalty": 1.0},
    "irm": PAIRS | {"objective": "irm", "penalty": 1.0},
    "group_dro": PAIRS | {"objective": "group_dro", "penalty": 0.01},
    "vrex": PAIRS | {"objective": "vrex", "penalty": 10.0},
    "dann": PAIRS | {"objective": "dann", "penalty": 1.0},
    "ben": {"batches": "experiment", "batch_statistics": True},
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
    "two_sided": {"two_sided": True},
    **{f"margin={m}": {"margin": m} for m in (0.0, 0.1, 0.3, 0.5)},
    **{f"norms={n}": {"perturbed_norms": n} for n in ("clean", "moving", "auxiliary")},
    "shared": {"shared_by": "experiment"},
    "part": {"perturbed_share": 0.5},
    "ramp_radius": {"ramp_radius": True},
    "perturbed_weight=0.3": {"perturbed_weight": 0.3},
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
    "probability": (0.1, 0.25, 0.5, 1.0),
    "alpha": (0.1, 0.3, 1.0),
    "penalty": (0.01, 0.1, 1.0, 10.0, 100.0),
}
SEARCH_OPTIONS = (
    *("radius", "steps", "step_size", "start", "shared_by"),
    *("perturbed_share", "search_loss", "adversary_every", "ramp_radius", "learned_scale"),
)
OWN = ("radius", "probability", "alpha", "penalty", "margin", "scale")


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


def trial_settings(method, trial):
    """Settings of one trial of the search: trial 0 has the method's own, later ones are drawn, each another.

    The draw depends on the method's name and the number alone, so that a search can be widened later.
    """
    settings = method_settings(method)
    names = ["learning_rate", "weight_decay", *[name for name in OWN if name in settings][:2]]
    grid = [dict(zip(names, values, strict=True)) for values in product(*(SPACES[name] for name in names))]
    grid = [values for values in grid if values != {name: settings[name] for name in names}]
    order = np.random.default_rng(zlib.crc32(method.encode())).permutation(len(grid))
    return settings if trial == 0 else settings | grid[order[(trial - 1) % len(grid)]]


class Contender(NamedTuple):
    """A compiled `model` to fit; the plain `network` that it trains, images to `[logits, embedding]`; the `cost` of a
    step in steps of ERM, None where it cannot be counted."""

    model: keras.Model
    network: keras.Model
    cost: float | None


def build_contender(settings, shape, classes, cell_types, warmup):
    """The model that the settings make.

    Args:
        settings: of `method_settings`.
        shape: of the images.
        classes: number of classes.
        cell_types: of each training experiment, in the order of their numbers.
        warmup: length of the margin's ramp and of the penalties' first phase, in steps.

    Returns:
        A `Contender`.
    """
    backbone = _with_layers(tiny_resnet(shape, settings["width"]), settings)
    head, cost = settings["head"], 1.0
    if head in ("arcface", "cosface", "abra"):
        model = _margin_model(backbone, settings, classes, cell_types, warmup)
        network, cost = _network_of(model), step_cost(model)
    elif head == "adv_bn":
        prefix, rest = cut_backbone(backbone, ["stage1"])
        suffix = _softmax_network(rest, settings, classes)
        model = AdvBN(
            prefix,
            keras.Model(suffix.input, suffix.outputs[0]),
            radius=settings["radius"],
            step_size=settings["step_size"],
        )
        network, cost = keras.Model(prefix.input, suffix(prefix.output)), None
    else:
        network = _softmax_network(backbone, settings, classes)
        model = keras.Model(network.input, network.outputs[0])
        if head == "winner":
            cosine = CosineHead(classes)(network.outputs[1])
            both = keras.Model(network.input, [network.outputs[0], cosine])
            model = ObjectiveModel(both, WinnerLoss(settings["margin"], settings["scale"]))
        elif "objective" in settings:
            model = ObjectiveModel(network, _objective(settings, len(cell_types), warmup))
    optimizer = keras.optimizers.AdamW(settings["learning_rate"], weight_decay=settings["weight_decay"])
    optimizer.exclude_from_weight_decay(var_names=["log_scale"])
    if head == "softmax" and "objective" not in settings:
        kind = keras.losses.CategoricalCrossentropy if "mix" in settings else keras.losses.SparseCategoricalCrossentropy
        model.compile(optimizer, kind(from_logits=True))
    else:
        model.compile(optimizer)
    return Contender(model, network, None if settings.get("layers") == "csu" else cost)


def takes_experiments(settings):
    """Whether the model is trained with experiment ids."""
    return "objective" in settings or "shared_by" in settings or settings.get("structure", "").startswith("domain")


def more_compute(settings, shape, classes, warmup):
    """How many times its own steps a method is given: 1, or with `compute="abra"` what ABRA costs."""
    if settings.get("compute") != "abra":
        return 1.0
    abra = COMMON | ADVERSARY | {"width": settings["width"], "embedding_dim": settings["embedding_dim"]}
    return step_cost(_margin_model(tiny_resnet(shape, abra["width"]), abra, classes, None, warmup))


def _with_layers(backbone, settings):
    if "layers" not in settings:
        return backbone
    probability = settings.get("probability")
    make = {
        "dsu": lambda: FeatureStatisticsUncertainty(radius=None, probability=probability),
        "mixstyle": lambda: MixStyle(probability, settings["alpha"]),
        "csu": lambda: CorrelatedStyleUncertainty(probability, settings["alpha"]),
        "adv_style": lambda: AdvStyle(settings["penalty"]),
    }[settings["layers"]]
    # DSU after every stage; the others early, as their papers found best: behind the first three.
    stages = DSU["tiny_resnet"] if settings["layers"] == "dsu" else DSU["tiny_resnet"][:3]
    first, *rest = cut_backbone(backbone, stages)
    x = first(backbone.input)
    for part in rest:
        x = part(make()(x))
    return keras.Model(backbone.input, x)


def _softmax_network(backbone, settings, classes):
    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    embedding = embedding_neck(x.shape[-1], settings["embedding_dim"])(x)
    return keras.Model(backbone.input, [keras.layers.Dense(classes)(embedding), embedding])


def _margin_model(backbone, settings, classes, cell_types, warmup):
    kind = CosFace if settings["head"] == "cosface" else ArcFace
    options = {}
    if settings["head"] == "abra":
        options = {
            "perturb_after": settings["stages"].split("+"),
            "uncertainty": _uncertainty(settings, cell_types),
            "alignment": _alignment(settings),
            "perturbed_weight": settings["perturbed_weight"],
            "perturbed_norms": settings.get("perturbed_norms", "own"),
        }
    return ABRAModel(
        backbone,
        classes,
        embedding_dim=settings["embedding_dim"],
        loss=kind(settings["margin"], settings["scale"]),
        warmup=warmup,
        **options,
    )


def _uncertainty(settings, cell_types):
    structure, options = settings["structure"], {}
    if structure.startswith("domain"):
        options["num_experiments"] = len(cell_types)
        if structure == "domain_cell_type":
            options["experiment_groups"] = np.unique(cell_types, return_inverse=True)[1].tolist()
        structure = "domain"
    options |= {name: settings[name] for name in SEARCH_OPTIONS if name in settings}
    return FeatureStatisticsUncertainty(structure, **options)


def _alignment(settings):
    if settings["alignment"] == "none":
        return DistributionAlignment(weight=0.0)
    return DistributionAlignment(
        settings["alignment"], weight=settings["alignment_weight"], two_sided=settings["two_sided"]
    )


def _objective(settings, experiments, warmup):
    weight = settings["penalty"]
    return {
        "coral": lambda: CORAL(experiments, weight),
        "irm": lambda: IRM(experiments, weight, warmup),
        "vrex": lambda: VREx(experiments, weight, warmup),
        "group_dro": lambda: GroupDRO(experiments, weight),
        "dann": lambda: DANN(experiments, settings["embedding_dim"], weight),
    }[settings["objective"]]()


def _network_of(model):
    """Images to `[logits, embedding]`, of an `ABRAModel`, sharing its layers."""
    x = model.backbone.output
    for part in (model.pooling, model.neck):
        x = x if part is None else part(x)
    return keras.Model(model.backbone.input, [model.head(x) * model.loss_function.scale, x])
