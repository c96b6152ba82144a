import contextlib
from types import SimpleNamespace

import keras
import numpy as np
from keras import ops

from keras_abra import backend
from keras_abra.kinds import is_integer
from keras_abra.models import ABRAModel
from keras_abra.models.embedder import run_alike
from keras_abra.perturbed_norms import MeasuredNorm, batch_moments, replace_norms

_ONE_DEVICE = "AdaBN is measured on one device, and here batches are divided among "


@contextlib.contextmanager
def ada_bn(model, images, batch_size=32):
    """Within it, the model normalizes by the statistics of these images: those of one new experiment, without labels.

    AdaBN (Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", ICLR Workshop 2017): the moving
    mean and variance of every batch normalization are measured anew, and nothing else changes. Behind it they are what
    they were, also after an error.

        with keras_abra.ada_bn(model, images_of_the_experiment):
            logits = model.predict(images_of_the_experiment)

    The images are passed over once. A layer's statistics are pooled over all of them (of a batch that is alone, exactly
    its own); what comes before it is normalized by each mini-batch's, so batches should be large and of mixed classes.
    A prediction then hangs on the other images of its experiment: report it apart from what needs none.

    Args:
        model: an `ABRAModel`, or a Functional or Sequential `keras.Model`, with batch normalization.
        images: what `predict` takes: array or tensor `(samples, height, width, channels)`, a dict with such an
            `"image"`, or `tf.data.Dataset` of batches of images.
        batch_size: of arrays, also of a dict.

    Raises:
        ValueError: if the model has no batch normalization or cannot be rebuilt, there are no images or one alone in
            every mini-batch, their statistics are not finite, or several devices or processes would divide them.
    """
    replicas = backend.replicas() * backend.devices()
    if replicas > 1:
        raise ValueError(f"{_ONE_DEVICE}{replicas}.")
    if not (is_integer(batch_size) and batch_size >= 1):
        raise ValueError(f"`batch_size` must be an integer of 1 or more. Received: batch_size={batch_size!r}")
    first = images.get("image") if isinstance(images, dict) else images
    array = hasattr(first, "shape")
    if (len(first) if array else int(images.cardinality()) if hasattr(images, "cardinality") else None) == 0:
        raise ValueError("No images were given. Expected those of one experiment.")
    measured = run_alike(_Measured(model), model)
    strategy = getattr(measured, "distribute_strategy", None)  # TensorFlow's, if this is its scope
    if strategy is not None and strategy.num_replicas_in_sync > 1:
        raise ValueError(f"{_ONE_DEVICE}{strategy.num_replicas_in_sync}. Call it outside the strategy's scope.")
    *moments, counts = measured.predict(images, batch_size=batch_size if array else None, verbose=0)
    if max(counts) < 2:  # of one image the embedding would be that of every other
        raise ValueError("AdaBN needs mini-batches of 2 images or more. Received: one image in each.")
    if not all(np.isfinite(values).all() for values in moments):
        raise ValueError("The statistics of the images are not finite: images or weights have values that are not.")
    calls = {}  # of each: several moments where a layer is called again
    for i, norm in enumerate(measured.noted.norms):
        calls.setdefault(norm, []).append(moments[2 * i : 2 * i + 2])
    own = {norm: (np.array(norm.moving_mean), np.array(norm.moving_variance)) for norm in calls}
    try:
        _assign({norm: _pooled(found, counts) for norm, found in calls.items()})
        yield model
    finally:
        _assign(own)


def _assign(statistics):
    for norm, (mean, variance) in statistics.items():
        norm.moving_mean.assign(mean)
        norm.moving_variance.assign(variance)


def _pooled(calls, counts):
    """Mean and variance of all from those of each mini-batch, `(batches, channels)`, in one or several calls."""
    weights = np.tile(counts, len(calls)).astype("float64")
    means, variances = (np.concatenate([call[i] for call in calls]).astype("float64") for i in (0, 1))
    mean = np.average(means, axis=0, weights=weights)
    return mean, np.average(variances + (means - mean) ** 2, axis=0, weights=weights)


class _Measured(backend.Replicated, keras.Model):
    """Images to the batch statistics of every batch normalization, `(1, channels)` each, and the number of images."""

    def __init__(self, model):
        super().__init__(name="measured", autocast=False)
        abra = isinstance(model, ABRAModel)
        parts = [model.backbone, model.pooling, model.neck] if abra else [model]
        self.unpack = (lambda x: model.unpack_inputs(x)[0]) if abra else (lambda x: x)
        self.noted = SimpleNamespace(norms=[])  # not a layer's own: no attribute of its own
        try:
            if not model.built:
                raise ValueError("a model that is not built")
            self.parts = [replace_norms(p, self._make) if isinstance(p, keras.Model) else p for p in parts if p]
        except ValueError as error:
            raise ValueError(f"AdaBN needs a model of Functional and Sequential models. Received: {error}") from error
        if not self.noted.norms:
            raise ValueError("AdaBN is for models with batch normalization, of which this one has none.")

    def _make(self, norm):
        self.noted.norms.append(norm)
        return MeasuredNorm(norm)

    def call(self, inputs):
        x = self.unpack(inputs)
        count = ops.ones((1,)) * ops.cast(ops.shape(x)[0], "float32")
        with batch_moments() as found:
            for part in self.parts:
                x = part(x, training=False) if isinstance(part, keras.Model) else part(x)
        self.noted.norms = [norm for norm, *_ in found]  # in the order of the calls
        return [ops.expand_dims(value, 0) for _, *moments in found for value in moments] + [count]
