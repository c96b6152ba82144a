"""Cuts a Functional backbone after named layers, with all weights shared."""

import keras

from keras_abra.perturbed_norms import layers_within


def cut_backbone(backbone, after):
    """Splits a backbone into consecutive parts whose composition is the backbone.

    Use it to put a layer inside somebody else's backbone:

    >>> image = keras.Input((16, 16, 6))
    >>> x = keras.layers.Conv2D(8, 3, activation="relu", name="stem")(image)
    >>> backbone = keras.Model(image, keras.layers.Conv2D(8, 3, activation="relu", name="last")(x))
    >>> first, rest = cut_backbone(backbone, ["stem"])
    >>> dsu = keras_abra.layers.FeatureStatisticsUncertainty(radius=None, probability=0.5)
    >>> perturbed = keras.Model(image, rest(dsu(first(image))))

    Args:
        backbone: Functional `keras.Model` from one image `(batch, height, width, channels)` to one output.
        after: names of layers to cut after, in any order.

    Returns:
        List of `len(after) + 1` Functional models in the order of the graph. They share the backbone's layers.

    Raises:
        ValueError: if the backbone is not Functional with one input and one output, or if a name is not one of
            `valid_cuts(backbone)`.
    """
    cuts = _cuts(backbone)
    after = list(after)
    for name in after:
        if name in cuts:
            continue
        known = name in [layer.name for layer in backbone.layers]
        why = "the backbone has no such layer"
        if known:
            why = "paths lead around it, or its output is not one feature map"
        elif inner := [m.name for m in backbone.layers if isinstance(m, keras.Model) and name in _within(m)]:
            why = (
                f"it is inside the model {inner[0]!r}, which is one layer here. Give that model itself as the backbone"
            )
        raise ValueError(
            f"Cannot cut `{backbone.name}` after {name!r}: {why}. Expected names of layers that every path from image "
            f"to output goes through, with one float output of rank 4. Valid here: {', '.join(cuts) or 'none'}."
        )
    if len(set(after)) != len(after):
        raise ValueError(f"Each cut may be named once. Received: {after}")
    tensors = [tensor for name, tensor in cuts.items() if name in after]
    starts, ends = [backbone.inputs[0], *tensors], [*tensors, backbone.outputs[0]]
    return [
        _part(start, end, f"{backbone.name}_part{i}") for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _within(model):
    return [layer.name for layer in layers_within(model)]


def valid_cuts(backbone):
    """Names of the layers a backbone can be cut after, in the order of the graph.

    Args:
        backbone: as for `cut_backbone`.

    Raises:
        ValueError: as for `cut_backbone`.
    """
    return list(_cuts(backbone))


def _part(start, end, name):
    return keras.layers.Identity(name=name) if start is end else keras.Model(start, end, name=name)


def _check(backbone):
    sequential = isinstance(backbone, keras.Sequential)
    if sequential or not isinstance(backbone, keras.Model) or not getattr(backbone, "outputs", None):
        hint = " For a built Sequential: keras.Model(model.inputs, model.outputs)." if sequential else ""
        raise ValueError(
            "`backbone` must be a Functional keras.Model (keras.Model(inputs, outputs), keras.applications, KerasHub), "
            f"because it is cut at named layers.{hint} Received: {type(backbone).__name__}"
        )
    if len(backbone.inputs) != 1 or len(backbone.outputs) != 1:
        raise ValueError(
            "`backbone` must have one input and one output. "
            f"Received: {len(backbone.inputs)} inputs and {len(backbone.outputs)} outputs in `{backbone.name}`"
        )
    if isinstance(getattr(backbone, "_outputs_struct", None), dict):
        raise ValueError(
            "`backbone` must give its feature map itself, and not in a dict. "
            f"Received: outputs {sorted(backbone._outputs_struct)} in `{backbone.name}`"
        )
    if len(backbone.inputs[0].shape) != 4:
        raise ValueError(
            "`backbone` must take images (batch, height, width, channels). "
            f"Received: input shape {tuple(backbone.inputs[0].shape)} in `{backbone.name}`"
        )


def ordered_tensors(model):
    """Symbolic tensors of a Functional or built Sequential model, each after those it is computed from, and a dict from
    the id of each to these."""
    sources = {id(tensor) for tensor in model.inputs}
    order, parents = [], {}
    stack = [(target, False) for target in model.outputs]
    while stack:
        tensor, done = stack.pop()
        if done:
            order.append(tensor)
        elif id(tensor) not in parents:
            parents[id(tensor)] = [] if id(tensor) in sources else list(tensor_node(tensor).input_tensors)
            stack.append((tensor, True))
            stack.extend((parent, False) for parent in parents[id(tensor)])
    return order, parents


def tensor_node(tensor):
    """The call that a symbolic tensor comes from."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def _cuts(backbone):
    """Names and tensors that every path goes through: paths to it times paths from it are all the paths there are."""
    _check(backbone)
    source, target = backbone.inputs[0], backbone.outputs[0]
    order, parents = ordered_tensors(backbone)
    paths_to, paths_from = {id(source): 1}, {id(target): 1}
    for tensor in order:
        if tensor is not source:
            paths_to[id(tensor)] = sum(paths_to[id(parent)] for parent in parents[id(tensor)])
    for tensor in reversed(order):
        for parent in parents[id(tensor)]:
            paths_from[id(parent)] = paths_from.get(id(parent), 0) + paths_from[id(tensor)]
    cuts = {}
    for tensor in order:
        operation = tensor._keras_history.operation
        passed = paths_to[id(tensor)] * paths_from[id(tensor)] == paths_to[id(target)]
        single = len(tensor_node(tensor).output_tensors) == 1
        uses = sum(other._keras_history.operation is operation for other in order)
        feature_map = len(tensor.shape) == 4 and keras.backend.is_float_dtype(tensor.dtype)
        if passed and single and uses == 1 and tensor is not source and feature_map:
            cuts[operation.name] = tensor
    return cuts
