"""The contenders of `rxrx1.py`: one backbone and neck, five ways to train them."""

import functools
import inspect

import keras
import tensorflow as tf
from backbones import tiny_resnet
from distribution import functional
from weights import check_weights, with_weights

from keras_abra import ABRAModel, cut_backbone, embedding_neck, valid_cuts
from keras_abra.layers import FeatureStatisticsUncertainty
from keras_abra.losses import ArcFace, DistributionAlignment
from keras_abra.perturbed_norms import layers_within
from tfrecords import cutmix, mix_batches

# Where ABRA perturbs (early: perturbing next to the head cost accuracy in prototypes), and where DSU does (all stages).
PERTURB = {"tiny_resnet": ["stem", "stage1"], "ResNet50": ["conv2_block3_out", "conv3_block4_out"]}
DSU = {
    "tiny_resnet": ["stem", "stage1", "stage2", "stage3"],
    "ResNet50": [
        "conv1_relu",
        "pool1_pool",
        "conv2_block3_out",
        "conv3_block4_out",
        "conv4_block6_out",
        "conv5_block3_out",
    ],
}


SOFTMAX = ("erm", "cutmix")  # trained by Keras's own step
_PROBE = (96, 96, 6)  # larger than the least that any of Keras's takes


def check_backbone(name, method, perturb_after):
    """Refuses a backbone or cut before anything is built."""
    if name != "tiny_resnet" and not callable(getattr(keras.applications, name, None)):
        raise ValueError(f"--backbone {name} is neither tiny_resnet nor a model of keras.applications")
    backbone = make_backbone(name, _PROBE) if perturb_after or name not in PERTURB else None
    if perturb_after:
        cut_backbone(backbone, perturb_after)
    elif perturb_after is None and method in ("abra", "dsu") and name not in PERTURB:
        raise ValueError(f"--perturb-after is needed for {name}. Valid: {', '.join(valid_cuts(backbone))}")
    rescaling = keras.layers.Rescaling | keras.layers.Normalization
    if backbone is not None and any(isinstance(layer, rescaling) for layer in layers_within(backbone)):
        raise ValueError(
            f"--backbone {name} rescales grey levels inside, and would make standardized images nearly constant. Take "
            "one that does not, such as EfficientNetV2B0 in place of EfficientNetB0."
        )


def build_model(method, settings, shape, names):
    backbone = make_backbone(settings["backbone"], shape, settings.get("weights"))
    stages = settings["stages"]
    if stages is None:
        stages = {"abra": PERTURB, "dsu": DSU}.get(method, {}).get(settings["backbone"], [])
    if method in SOFTMAX:
        x = keras.layers.GlobalAveragePooling2D()(backbone.output)
        x = embedding_neck(x.shape[-1], settings["embedding_dim"])(x)
        return functional(backbone.input, keras.layers.Dense(len(names), dtype="float32")(x))
    if method == "dsu":
        backbone = with_dsu(backbone, stages)
    return ABRAModel(
        backbone,
        len(names),
        perturb_after=stages if method == "abra" else (),
        embedding_dim=settings["embedding_dim"],
        uncertainty=make_uncertainty(settings),
        loss=ArcFace(settings["margin"], settings["scale"]),
        alignment=make_alignment(settings["alignment"], settings["alignment_weight"]),
        warmup=settings["warmup"],
        class_names=names,
    )


def make_uncertainty(settings):
    return FeatureStatisticsUncertainty(
        settings["structure"],
        radius=settings["radius"],
        steps=settings["steps"],
        step_size=settings["step_size"],
    )


def make_alignment(kind, weight, two_sided=True):
    if kind == "none":
        return DistributionAlignment(weight=0.0)
    return DistributionAlignment(kind, weight=weight, two_sided=two_sided)


def make_backbone(name, shape, weights=None):
    """The named backbone for images of a shape, with the weights of `weights.with_weights`."""
    return with_weights(functools.partial(_make, name), shape, weights)


def _make(name, shape, weights):
    if name == "tiny_resnet":
        if weights is not None:
            raise ValueError("tiny_resnet has weights of earlier jobs alone")
        return tiny_resnet(shape)
    make = getattr(keras.applications, name)
    plain = {"include_preprocessing": False} if "include_preprocessing" in inspect.signature(make).parameters else {}
    return make(include_top=False, weights=weights, input_shape=shape, **plain)  # images come standardized


def check_backbone_weights(name, weights, channels=None):
    """Refuses weights that are not of the backbone, see `weights.check_weights`."""
    check_weights(functools.partial(_make, name), weights, name, channels)


def with_dsu(backbone, stages):
    """DSU (Li et al., ICLR 2022): random, after every stage, each with probability one half."""
    return with_layers(backbone, stages, lambda: FeatureStatisticsUncertainty(radius=None, probability=0.5))


def with_layers(backbone, stages, make):
    """The backbone with a layer that `make` gives behind each of the stages."""
    first, *rest = cut_backbone(backbone, stages)
    x = first(backbone.input)
    for part in rest:
        x = part(make()(x))
    return keras.Model(backbone.input, x)


def mixes(job):
    """Whether a job is trained on images mixed by CutMix.

    Args:
        job: dict with `method` and perhaps `cutmix`.
    """
    return job["method"] == "cutmix" or job.get("cutmix", False)


def softmax_loss(method):
    """The loss as an argument of `compile`, where it is no part of the model."""
    losses = {"erm": keras.losses.SparseCategoricalCrossentropy, "cutmix": keras.losses.CategoricalCrossentropy}
    return {"loss": losses[method](from_logits=True)} if method in losses else {}


def mix_training(data, job, classes, seed, alpha):
    """The batches that a job is trained on: with CutMix anew in each step, and with shares of the classes as labels."""
    return mix_batches(data, cutmix, classes, seed, alpha=alpha) if mixes(job) else data


def label_alike(data, job, classes):
    """Batches to be scored beside the training of a job, with labels of the same kind."""
    if not mixes(job):
        return data
    return data.map(lambda image, label, *weight: (image, tf.one_hot(label, classes), *weight))


def make_schedule(settings, steps):
    """Linear warm-up, then a cosine down to 0 at the last of `epochs` times `steps` steps. A run that is far shorter
    than the published one has a tenth of its steps for the warm-up."""
    total, warmup = steps * settings["epochs"], settings["warmup_steps"]
    warmup = int(warmup * total) if isinstance(warmup, float) else warmup if total >= 8 * warmup else total // 10
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(total - warmup, 1), warmup_target=settings["learning_rate"], warmup_steps=warmup
    )


def make_optimizer(settings, steps):
    return keras.optimizers.AdamW(make_schedule(settings, steps), weight_decay=settings["weight_decay"])
