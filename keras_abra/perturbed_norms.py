"""Batch normalizations of the perturbed branch, and networks with other batch normalizations."""

import contextlib
import contextvars
import functools
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_abra import backend

PERTURBED_NORMS = ("own", "clean", "moving", "auxiliary")


# Of the pass that runs: the statistics it notes, and those of another pass that it takes, or None. Each replica of a
# MirroredStrategy is traced by a thread of its own, in turns.
_moments = contextvars.ContextVar("moments")


@contextlib.contextmanager
def batch_moments(given=None):
    """Of the pass within: the batch statistics of each `SharedMomentsNorm` or `MeasuredNorm` come into the list that
    this gives; with those of another pass, the former takes these."""
    found = []
    token = _moments.set((found, None if given is None else iter(given)))
    try:
        yield found
    finally:
        _moments.reset(token)


class Branch(NamedTuple):
    """What one branch runs behind the first perturbed stage: the backbone's parts and the neck (or None)."""

    parts: list
    neck: Any


class Branches:
    """The clean and the perturbed branch, which share all weights but those of `auxiliary` normalizations.

    Args:
        kind: one of `PERTURBED_NORMS`, see `ABRAModel`.
        parts: the backbone's parts behind the first perturbed stage.
        neck: `keras.Sequential`, or None.

    Raises:
        ValueError: if a part cannot be rebuilt with other normalizations.
    """

    def __init__(self, kind, parts, neck):
        self._twins = []
        self.clean = self.perturbed = Branch(parts, neck)
        if kind == "own" or not parts:
            return
        make = {"clean": SharedMomentsNorm, "moving": MovingNorm, "auxiliary": self._twin}[kind]
        make = functools.cache(make)  # a layer that is called twice has one in its place
        self.perturbed = Branch([_replace(part, make) for part in parts], neck and _replace(neck, make))
        if kind == "clean":
            self.clean = self.perturbed

    @property
    def auxiliary(self):
        """The twins of `auxiliary` normalizations."""
        return [copy for _, copy in self._twins]

    def freeze_alike(self):
        """Makes each twin trainable or not, as its normalization now is; a frozen one is its equal."""
        for norm, copy in self._twins:
            copy.trainable = norm.trainable
            if not norm.trainable:
                copy.set_weights(norm.get_weights())

    def _twin(self, norm):
        self._twins.append((norm, twin(norm)))
        return self._twins[-1][1]


class MovingNorm(keras.layers.Layer):
    """A batch normalization's own weights, always with its moving statistics."""

    def __init__(self, norm):
        super().__init__(name=f"{norm.name}_moving", dtype=norm.dtype_policy)
        self.norm = norm

    def call(self, inputs, mask=None):
        return self.norm(inputs, training=False)

    def compute_output_shape(self, input_shape):
        return input_shape


class SharedMomentsNorm(keras.layers.Layer):
    """A batch normalization that notes the statistics of its mini-batch, or takes those that another pass noted.

    Those it takes are constants to the gradient, as moving statistics are.
    """

    def __init__(self, norm):
        if getattr(norm, "renorm", False):
            raise ValueError(f"batch renormalization, at {norm.name}, which 'clean' does not know")
        super().__init__(name=f"{norm.name}_shared", dtype=norm.dtype_policy)
        self.norm = norm

    def call(self, inputs, training=None, mask=None):
        if mask is not None:
            raise ValueError("`perturbed_norms='clean'` knows no masks. Received one at " + self.norm.name)
        if not training or not self.norm.trainable:
            return self.norm(inputs, training=False)
        x, axis = ops.cast(inputs, "float32"), self.norm.axis % len(inputs.shape)
        found, given = _moments.get()
        if given is None:
            found.append(self._batch_moments(x, axis))
            return self.norm(inputs, training=True)
        return ops.cast(_normalize(self.norm, x, next(given), axis), self.compute_dtype)

    def _batch_moments(self, x, axis):
        axes = [i for i in range(len(x.shape)) if i != axis]
        share = backend.replicas() if self.norm.synchronized else 1
        together = backend.global_sum if share > 1 else lambda value: value
        shape = [1] * len(x.shape)
        shape[axis] = -1
        x = ops.stop_gradient(x)
        mean = together(ops.mean(x, axes)) / share
        return mean, together(ops.mean(ops.square(x - ops.reshape(mean, shape)), axes)) / share

    def compute_output_shape(self, input_shape):
        return input_shape


class MeasuredNorm(keras.layers.Layer):
    """A batch normalization that normalizes every mini-batch by its own statistics, and notes itself and them."""

    def __init__(self, norm):
        super().__init__(name=f"{norm.name}_measured", dtype=norm.dtype_policy)
        self.norm = norm

    def call(self, inputs, mask=None):
        x, axis = ops.cast(inputs, "float32"), self.norm.axis % len(inputs.shape)
        moments = ops.moments(x, [i for i in range(len(x.shape)) if i != axis])
        found, _ = _moments.get(([], None))
        found.append((self.norm, *moments))
        return ops.cast(_normalize(self.norm, x, moments, axis), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


def _normalize(norm, x, moments, axis):
    offset, scale = (None if w is None else ops.cast(w, "float32") for w in (norm.beta, norm.gamma))
    return ops.batch_normalization(x, *moments, axis, offset, scale, norm.epsilon)


def replace_norms(model, make):
    """The same network with other batch normalizations; every other layer is shared, not copied.

    Args:
        model: Functional or Sequential `keras.Model`, its sub-models too.
        make: function of a `BatchNormalization` that gives the layer to stand in its place.

    Returns:
        A new `keras.Model`.

    Raises:
        ValueError: if the model is another one, or a layer of it has batch normalizations inside, where none can be
            put in their place.
    """
    replaced = []

    def clone(layer):
        if not isinstance(layer, keras.layers.BatchNormalization):
            return layer
        replaced.append(id(layer))
        return make(layer)

    other = keras.models.clone_model(model, clone_function=clone, recursive=True)
    norms = [layer for layer in layers_within(model) if isinstance(layer, keras.layers.BatchNormalization)]
    if inside := [norm.path for norm in norms if id(norm) not in replaced]:
        raise ValueError(f"batch normalizations inside of other layers: {', '.join(inside)}")
    return other


def layers_within(model):
    """All layers of a model, those inside of its layers and sub-models too."""
    return list(model._flatten_layers(include_self=False))


def twin(layer):
    """A batch normalization of its own, with the configuration and the weights that this one has now."""
    copy = type(layer).from_config({**layer.get_config(), "name": f"{layer.name}_twin"})
    shape = [None] * layer.input_spec.ndim
    shape[layer.axis] = layer.moving_mean.shape[0]
    copy.build(tuple(shape))
    copy.set_weights(layer.get_weights())
    return copy


def _replace(part, make):
    if not isinstance(part, keras.Model):
        return part
    try:
        return replace_norms(part, make)
    except ValueError as error:
        raise ValueError(
            "`perturbed_norms` other than 'own' needs a backbone of Functional and Sequential models all through. "
            f"Received: {error}"
        ) from error
