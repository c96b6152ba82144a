"""The model that a method's settings make."""

import functools
from typing import NamedTuple

import keras
import numpy as np
from backbones import tiny_resnet
from contenders.adv_bn import AdvBN
from contenders.adv_style import AdversaryBySGD, AdvStyle
from contenders.coral import CORAL
from contenders.correlated_uncertainty import CorrelatedStyleUncertainty
from contenders.dann import DANN
from contenders.group_dro import GroupDRO
from contenders.irm import IRM
from contenders.mixstyle import MixStyle
from contenders.objective_model import ObjectiveModel
from contenders.vrex import VREx
from contenders.winner_loss import WinnerLoss
from ladder_methods import ADVERSARY, COMMON
from methods import DSU, make_alignment, with_layers

from keras_abra import ABRAModel, cut_backbone, embedding_neck, step_cost
from keras_abra.layers import CosineHead, FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace, CosFace

SEARCH_OPTIONS = (
    *("radius", "steps", "step_size", "start", "shared_by"),
    *("perturbed_share", "search_loss", "adversary_every", "ramp_radius", "learned_scale"),
)


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
            radius=settings["box"],
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
    make = keras.optimizers.AdamW
    if "adversary_rate" in settings:
        make = functools.partial(AdversaryBySGD, adversary_rate=settings["adversary_rate"])
    optimizer = make(settings["learning_rate"], weight_decay=settings["weight_decay"])
    rival = getattr(getattr(model, "objective", None), "discriminator", None)  # DANN's
    optimizer.exclude_from_weight_decay(
        var_list=rival and rival.trainable_variables, var_names=["log_scale", AdversaryBySGD.ADVERSARY]
    )
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
    # MixStyle early, as its paper found best: behind the first three stages; the others, as theirs have it, behind all.
    stages = DSU["tiny_resnet"][: 3 if settings["layers"] == "mixstyle" else None]
    if "behind" in settings:
        stages = settings["behind"].split("+")
    return with_layers(backbone, stages, make)


def _softmax_network(backbone, settings, classes):
    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    embedding = embedding_neck(x.shape[-1], settings["embedding_dim"])(x)
    return keras.Model(backbone.input, [keras.layers.Dense(classes)(embedding), embedding])


def _margin_model(backbone, settings, classes, cell_types, warmup):
    kind = CosFace if "cosface" in (settings["head"], settings.get("loss")) else ArcFace
    options = {}
    if settings["head"] == "abra":
        options = {
            "perturb_after": settings["stages"].split("+"),
            "uncertainty": _uncertainty(settings, cell_types),
            "alignment": make_alignment(settings["alignment"], settings["alignment_weight"], settings["two_sided"]),
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
