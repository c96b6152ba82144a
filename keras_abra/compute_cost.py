"""What a forward pass and an ABRA training step cost, counted from the model's layers."""

import math
from typing import NamedTuple

import keras

from keras_abra.backbone_cut import ordered_tensors, tensor_node
from keras_abra.layers import CosineHead

_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


class Cost(NamedTuple):
    """Multiply-adds of one sample: of the forward pass, of the gradients to weights, and to layers' inputs."""

    forward: int = 0
    weights: int = 0
    inputs: int = 0

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def multiply_adds(model, padding_taps=True):
    """Multiply-adds of one forward pass of one sample, of convolutions and matrix products alone.

    Args:
        model: built Functional or Sequential `keras.Model`, with a known input shape, or an `ABRAModel` of one.
        padding_taps: whether products with padding count. True is the usual count, and PyTorch's and TensorFlow's
            counters'; False is that of XLA's cost analysis.

    Returns:
        int.

    Raises:
        ValueError: if a shape is not known, or for a layer with matrices that is none of Keras's convolutions, Dense,
            EinsumDense, attention or models of these.
    """
    if hasattr(model, "backbone_parts"):
        return sum((part.forward for part in _model_parts(model, padding_taps)), 0)
    return _graph(model, padding_taps)[0].forward


def suffix_share(model, padding_taps=True):
    """f: the share of the forward pass's multiply-adds that lies behind the first perturbed stage.

    Args:
        model: an `ABRAModel` whose backbone knows its image size.
        padding_taps: see `multiply_adds`.

    Returns:
        float in [0, 1]; 0 without a perturbed stage.

    Raises:
        ValueError: see `multiply_adds`.

    Example:

    >>> backbone = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(64, 64, 3))
    >>> model = keras_abra.ABRAModel(backbone, 1108, ["conv2_block3_out"])
    >>> round(keras_abra.suffix_share(model), 2)
    0.8
    """
    prefix, suffix = _model_parts(model, padding_taps)
    return suffix.forward / (prefix.forward + suffix.forward) if model.stages else 0.0


def step_cost(model, padding_taps=True):
    """What a training step of an `ABRAModel` costs, in steps of plain training (ERM) of the same network.

    With f from `suffix_share`, and plain training as forward 1, gradient to the features 1 and to the weights 1:

    - the perturbed branch, K = 0 or 1 (K = 1 has its direction from the clean pass): 1 + f, the lower bound for
      training on two branches;
    - every further ascent step: 2f/3 (suffix forward, and back to the statistics), and the first one too, where the
      `perturbed_norms` are not "own";
    - `two_sided` alignment, or a `search_loss` without margin, or both: f/3, where the first direction comes from the
      clean pass (its suffix goes back once more);
    - more stages, their probability, structure, radius, margins: nothing more, the first stage decides.

    The figure returned is exact where these are round: no gradient goes to the image or to frozen weights, which makes
    plain training a little cheaper than 3 forward passes, and the ratio a little larger than 1 + f.

    Args:
        model: an `ABRAModel` whose backbone knows its image size.
        padding_taps: see `multiply_adds`.

    Returns:
        float of at least 1; 1 without a perturbed stage.

    Raises:
        ValueError: see `multiply_adds`.
    """
    if not model.stages:
        return 1.0
    prefix, plain_suffix = _model_parts(model, padding_taps)
    _, suffix = _model_parts(model, padding_taps, perturbed=True)
    from_clean = model.perturbed_norms == "own" and model.uncertainty.steps > 0
    further = model.uncertainty.steps - from_clean
    cost = sum(prefix) + sum(suffix) + sum(plain_suffix) + further * (suffix.forward + suffix.inputs)
    once_more = from_clean and (model.alignment.two_sided or model.uncertainty.search_loss == "softmax")
    cost += suffix.inputs if once_more else 0
    return cost / (sum(prefix) + sum(plain_suffix))


def _model_parts(model, padding_taps, perturbed=False):
    """Costs of what lies before and behind the first perturbed stage; `perturbed`: a gradient goes to its input."""
    first, *rest = model.backbone_parts
    prefix, needed = _graph(first, padding_taps) if isinstance(first, keras.Model) else (Cost(), False)
    if not model.stages:
        return Cost(), prefix + _tail(model, padding_taps, needed)
    suffix, needed = Cost(), needed or perturbed
    for part in rest:
        if isinstance(part, keras.Model):
            cost, needed = _graph(part, padding_taps, needed)
            suffix += cost
    return prefix, suffix + _tail(model, padding_taps, needed)


def _tail(model, padding_taps, needed):
    cost = Cost()
    if model.neck is not None:
        cost, needed = _graph(model.neck, padding_taps, needed)
    size = math.prod(model.head.kernel.shape)
    return cost + Cost(size, size * model.head.trainable, size * needed)


def _graph(model, padding_taps, needed=False):
    """Cost of a model, and whether a gradient goes to its output; `needed`: whether one goes to its input."""
    if not getattr(model, "outputs", None):
        raise ValueError(
            "Multiply-adds are counted in built Functional and Sequential models. "
            f"Received: {type(model).__name__} `{model.name}`"
        )
    total, counted = Cost(), set()
    order, parents = ordered_tensors(model)
    depends = {id(tensor): needed for tensor in model.inputs}
    padded = {}  # outputs of ZeroPadding2D: its amounts, which XLA counts as the padding of the convolution behind
    for tensor in order:
        inputs, node = parents[id(tensor)], tensor_node(tensor)
        if not inputs or id(node) in counted:
            continue
        counted.add(id(node))
        layer, flows = node.operation, any(depends[id(source)] for source in inputs)
        if isinstance(layer, keras.Model):
            cost, flows_on = _graph(layer, padding_taps, flows)
        else:
            size = _multiply_adds(layer, inputs, node.output_tensors, padding_taps, padded.get(id(inputs[0])))
            trains = bool(getattr(layer, "trainable_weights", ()))
            cost, flows_on = Cost(size, size * trains, size * flows), flows or trains
        total += cost
        depends.update((id(output), flows_on) for output in node.output_tensors)
        if isinstance(layer, keras.layers.ZeroPadding2D) and layer.data_format == "channels_last":
            padded[id(tensor)] = layer.padding
    return total, any(depends[id(tensor)] for tensor in model.outputs)


def _multiply_adds(layer, inputs, outputs, padding_taps, padding):
    """Multiply-adds of one call of one layer, for one sample."""
    if isinstance(layer, CosineHead):
        return math.prod(layer.kernel.shape)
    if isinstance(layer, keras.layers.Dense):
        return _size(layer, inputs[0].shape) * layer.units
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum(layer, inputs[0].shape)
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return _attention(layer, inputs)
    if isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE)):
        return _convolution(layer, inputs[0].shape, outputs[0].shape, padding_taps, padding)
    if any(len(w.shape) > 1 for w in getattr(layer, "weights", ())):
        raise ValueError(
            f"The multiply-adds of layer `{layer.name}` ({type(layer).__name__}) are not known. Expected convolutions, "
            "Dense, EinsumDense, attention, models of these and layers without matrices."
        )
    return 0


def _size(layer, shape):
    if None in shape[1:]:
        raise ValueError(
            f"The multiply-adds of layer `{layer.name}` depend on the image size: give the backbone an input shape "
            f"with height and width. Received: shape {tuple(shape)}"
        )
    return math.prod(shape[1:])


def _convolution(layer, source, target, padding_taps, padding):
    last = layer.data_format == "channels_last"

    def split(shape):
        _size(layer, shape)
        return (shape[1:-1], shape[-1]) if last else (shape[2:], shape[1])

    (source, channels), (target, filters) = split(source), split(target)
    if isinstance(layer, _TRANSPOSED):
        return math.prod(source) * math.prod(layer.kernel_size) * channels * filters
    taps = 1
    for axis, (size, places) in enumerate(zip(source, target, strict=True)):
        kernel, stride, dilation = layer.kernel_size[axis], layer.strides[axis], layer.dilation_rate[axis]
        before, after = padding[axis] if padding else (0, 0)
        reach = (kernel - 1) * dilation + 1
        first = 0  # place of the first tap
        if layer.padding == "same":
            first = -(max((places - 1) * stride + reach - size, 0) // 2)
        elif layer.padding == "causal":
            first = 1 - reach
        starts = (first + place * stride for place in range(places))
        inside = range(before, size - after) if not padding_taps else range(-reach, size + reach)
        taps *= sum(start + k * dilation in inside for start in starts for k in range(kernel))
    if isinstance(layer, _DEPTHWISE):
        return taps * channels * layer.depth_multiplier
    if isinstance(layer, _SEPARABLE):
        between = channels * layer.depth_multiplier
        return taps * between + math.prod(target) * between * filters
    return taps * channels // layer.groups * filters


def _einsum(layer, shape):
    source, kernel = layer.equation.replace(" ", "").split("->")[0].split(",")
    _size(layer, shape)
    kept = [size for index, size in zip(source.replace("...", "")[::-1], shape[::-1], strict=False) if index in kernel]
    return math.prod(shape[1:]) // math.prod(kept) * math.prod(layer.kernel.shape)


def _attention(layer, inputs):
    """Projections, queries times keys, and weights times values."""
    query, value = inputs[0].shape, inputs[min(1, len(inputs) - 1)].shape
    key = inputs[2].shape if len(inputs) > 2 else value
    places = []
    for shape in (query, key, value, query):
        _size(layer, shape)
        places.append(math.prod(shape[1:-1]))
    kernels = [math.prod(w.shape) for w in layer.weights if w.name == "kernel"]
    projections = sum(size * count for size, count in zip(kernels, places, strict=True))
    return projections + places[0] * places[1] * layer.num_heads * (layer.key_dim + layer.value_dim)
