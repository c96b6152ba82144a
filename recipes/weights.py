"""Weights that a backbone begins with: ImageNet's, those of a file of Keras's, or of an earlier job's model."""

import contextlib
import os
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np

from keras_abra import backend
from keras_abra.layers import FeatureStatisticsUncertainty
from tfrecords.locks import lock_file

WEIGHTS_HELP = (
    "what the backbone begins with: imagenet (downloaded by Keras), a file of its weights, model.keras of an earlier "
    "job with the same backbone, or none"
)


def is_model(weights):
    """Whether these weights are a whole saved model, as jobs write it."""
    return weights is not None and str(weights).endswith(".keras")


def with_weights(make, shape, weights):
    """A backbone with weights.

    Weights of three channels serve any number: the first convolution takes the mean of its three kernels for each
    channel, times 3 / channels, so that what it gives keeps its size (as timm's `adapt_input_conv`).

    Args:
        make: function of (shape, weights) that makes it, as those of keras.applications; weights may be None.
        shape: `(height, width, channels)` of the images.
        weights: `"imagenet"`, a path, or None for random ones.

    Raises:
        ValueError: if they are not of this backbone.
    """
    if weights is None or (shape[-1] == 3 and not is_model(weights)):
        return make(shape, weights)
    backbone = make(shape, None)
    if is_model(weights):
        return _copy(_with_weights(_load_backbone(weights)), backbone, f"{weights} is no model with the same backbone")
    try:
        return make(shape, weights)
    except ValueError:  # they may be of three channels
        source = make((*shape[:2], 3), weights)
    return _copy(_with_weights(source), backbone, f"{weights} is not of this backbone")


def check_weights(make, weights, name, channels):
    """Refuses weights that cannot be loaded before records are built, which may take hours.

    Args:
        make, weights: as for `with_weights`.
        name: of the backbone.
        channels: of the images; None if that is not known yet.
    """
    if weights is None:
        return
    try:
        with backend.alone(), _downloading_alone(weights):  # or one would wait for variables of those that wait for it
            channels = channels or (_load_backbone(weights).input_shape[-1] if is_model(weights) else 6)
            with_weights(make, (96, 96, channels), weights)
    except Exception as error:  # Keras raises a bare one where nothing can be downloaded
        raise ValueError(
            f"--weights {weights} cannot be loaded into {name} ({error}). Expected imagenet, which Keras downloads for "
            "a --backbone of its applications, a file of its weights, model.keras of an earlier job, or none."
        ) from error


@contextlib.contextmanager
def _downloading_alone(weights):
    """Keras downloads into the file itself: of several processes with one cache one does, and the others find it."""
    with contextlib.ExitStack() as stack:
        if weights == "imagenet":
            home = os.path.expanduser("~")
            home = home if os.access(home, os.W_OK) else tempfile.gettempdir()  # as Keras chooses it
            cache = Path(os.environ.get("KERAS_HOME") or Path(home) / ".keras")
            with contextlib.suppress(OSError):  # a cache that may only be read
                cache.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_file(cache / "weights.lock"))
        yield


def load_model(file):
    """A job's model, or a ValueError that names the file."""
    if not Path(file).is_file():
        raise ValueError(f"{file} is no file. Expected the model.keras of a job that ended.")
    try:
        return keras.models.load_model(file, compile=False)
    except (ValueError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is no model that can be loaded: {error}") from error


def _load_backbone(file):
    """That of a job's model, or all of it where that does not stand by itself."""
    model = load_model(file)
    return getattr(model, "backbone", model)


def _with_weights(model):
    """The layers that have weights, in the order of the network; those inside of sub-models in these' place."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += _with_weights(layer)
        elif layer.weights and not isinstance(layer, FeatureStatisticsUncertainty):
            found.append(layer)
    return found


def _copy(sources, backbone, complaint):
    layers = _with_weights(backbone)
    if len(sources) < len(layers):
        raise ValueError(f"{complaint}: it has {len(sources)} layers with weights, and this one {len(layers)}.")
    for source, layer in zip(sources, layers, strict=False):  # behind a plain model's backbone come neck and head
        values = [_fit(found, weight) for found, weight in zip(source.get_weights(), layer.weights, strict=False)]
        if [v.shape for v in values] != [tuple(w.shape) for w in layer.weights]:
            found = [v.shape for v in source.get_weights()]
            raise ValueError(
                f"{complaint}: its {source.name!r} has weights of shapes {found}, and {layer.name!r} "
                f"{[tuple(w.shape) for w in layer.weights]}."
            )
        layer.set_weights(values)
    return backbone


def _fit(kernel, weight):
    channels = weight.shape[-2] if len(weight.shape) == 4 else None
    if kernel.ndim != 4 or channels is None or kernel.shape[2] != 3 or channels == 3:
        return kernel
    return np.repeat(kernel.mean(axis=2, keepdims=True), channels, axis=2) * np.float32(3 / channels)
