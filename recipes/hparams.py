"""The settings of the jobs, and a file of some of them."""

import json
import math

from methods import make_alignment, make_uncertainty
from normalization import NORMALIZATIONS

from keras_abra.losses import ArcFace

# ABRA's own, the package's defaults.
ABRA = {
    "stages": None,  # those of methods.PERTURB
    "warmup": 0.1,
    "steps": 0,
    "structure": None,  # low_rank with an adversary, else diagonal
    "step_size": 0.5,
    "alignment": "symmetric_kl",
    "alignment_weight": 1.0,
    "cutmix_alpha": 1.0,  # of the Beta distribution of the boxes' area, as published
    "normalize": "image",
    "weights": None,  # that the backbone begins with, see weights.py
    "patience": None,  # epochs without a better accuracy on val after which training ends
}
# The embedded screen: learning rate, decay, epochs and batch are those chosen for ERM before ABRA was run on it
# (recipes/results/screen_acceptance.md); margin, scale and radius were chosen on its validation experiments, images
# standardized by themselves. That plates serve better was found on other drawn screens, on validation experiments too
# (recipes/results/ladder_contenders).
EMBEDDED = ABRA | {
    "normalize": "plate",
    "backbone": "tiny_resnet",
    "image_size": None,
    "epochs": 45,
    "batch_size": 32,
    "learning_rate": 1e-2,
    "weight_decay": 0.5,
    "warmup_steps": 2 / 45,
    "embedding_dim": 128,
    "margin": 0.2,
    "scale": 12.0,
    "radius": 0.15,
}
# The real screen: RxRx1-WILDS's published training (Koh et al. 2021; p-lambda/wilds, examples/configs/datasets.py):
# ResNet-50, 256 px, batch 72, Adam 1e-3, weight decay 1e-5 (coupled there, decoupled here), 5,415 steps of warm-up,
# cosine, 90 epochs; all six channels. Neck 1,024, margin 0.5 and scale 30: first place of the Kaggle competition. The
# radius is the package's default, chosen on drawn screens (recipes/results/ladder_plate/radius.md).
REAL = ABRA | {
    "backbone": "ResNet50",
    "image_size": 256,
    "epochs": 90,
    "batch_size": 72,
    "learning_rate": 1e-3,
    "weight_decay": 1e-5,
    "warmup_steps": 5415,
    "embedding_dim": 1024,
    "margin": 0.5,
    "scale": 30.0,
    "radius": 0.15,
}


COUNTED = ("epochs", "image_size", "batch_size", "embedding_dim", "patience")  # from 1 on


def read_hparams(file, settings):
    """Settings of a JSON file; the arguments of the command line come before them."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())["settings"]
        names = found.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'--hparams {file} is no file of settings ({type(error).__name__}: {error}). Expected JSON {{"settings": '
            '{"margin": 0.2, ...}}, as recipes/tune_margin.py writes it.'
        ) from None
    if unknown := sorted(names - settings.keys()):
        raise ValueError(f"--hparams {file}: unknown settings {', '.join(unknown)}. Expected some of {[*settings]}.")
    for name, value in found.items():
        kinds = {type(table[name]) for table in (EMBEDDED, REAL)} | ({int} if name == "patience" else set())
        expected = "a number" if float in kinds else "a whole number" if int in kinds else "a text"
        good = isinstance(value, int | float if float in kinds else int if int in kinds else str)
        good = good and not isinstance(value, bool) and not (name in COUNTED and value < 1)
        if name == "stages":
            good = isinstance(value, list) and all(isinstance(layer, str) for layer in value)
            expected = "a list of names of layers"
        if not good and not (value is None and type(None) in kinds):
            raise ValueError(f"--hparams {file}: {name} must be {expected}; found {value!r}.")
    try:
        check_settings(settings | found)
    except ValueError as error:
        raise ValueError(f"--hparams {file}: {error}") from error
    return found


def check_settings(settings):
    """Refuses values that cannot be, before records are built."""
    ArcFace(settings["margin"], settings["scale"])
    make_alignment(settings["alignment"], settings["alignment_weight"])
    make_uncertainty(settings)
    for name, good, expected in (
        ("normalize", settings["normalize"] in NORMALIZATIONS, f"one of {', '.join(NORMALIZATIONS)}"),
        ("learning_rate", 0 < settings["learning_rate"] < math.inf, "above 0"),
        ("weight_decay", 0 <= settings["weight_decay"] < math.inf, "at least 0"),
        ("cutmix_alpha", 0 < settings["cutmix_alpha"] < math.inf, "above 0"),
        *(
            (name, is_steps(settings[name]), "a whole number of steps, or a share of all in [0, 1)")
            for name in ("warmup", "warmup_steps")
        ),
    ):
        if not good:
            raise ValueError(f"{name} must be {expected}; found {settings[name]!r}.")


def is_steps(value):
    return value >= 0 and (isinstance(value, int) or value < 1)
