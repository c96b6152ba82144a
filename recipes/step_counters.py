"""Counts what a compiled training step computes and holds, in each backend's own way."""

import keras
from keras import tree


def count_train_flops(model, x, y):
    """Floating-point operations of one whole training step, the optimizer included, as the backend will run it.

    - JAX: XLA's cost analysis of the compiled step. Products with padding are left out, element-wise operations count.
    - TensorFlow: the registered counts of the nodes of the step's graph that an output or a variable depends on.
    - torch: the registered counts (convolutions and matrix products) of what one eager step dispatches.

    Args:
        model: compiled `keras.Model`.
        x: one batch of inputs, NumPy arrays.
        y: its labels.

    Returns:
        float.
    """
    match keras.backend.backend():
        case "jax":
            return _cost(compile_jax_step(model, x, y))
        case "tensorflow":
            return _graph_flops(model.train_step, (x, y))
        case "torch":
            return _dispatched_flops(lambda: model.train_step(_to_tensors((x, y))))


def count_predict_flops(model, x):
    """The same for `predict`."""
    match keras.backend.backend():
        case "jax":
            import jax

            variables = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
            call = jax.jit(lambda *values: model.stateless_call(*values, training=False)[0])
            return _cost(call.lower(*variables, _to_tensors(x)).compile())
        case "tensorflow":
            return _graph_flops(lambda batch: model(batch, training=False), x)
        case "torch":
            import torch

            with torch.no_grad():
                return _dispatched_flops(lambda: model(_to_tensors(x), training=False))


def compile_jax_step(model, x, y):
    """The training step, compiled by XLA: a `jax.stages.Compiled`."""
    import jax

    model.optimizer.build(model.trainable_variables)
    if not model.metrics_variables:  # Keras makes them when it first sees predictions
        model.compute_metrics(None, y, keras.ops.zeros((len(y), *model.output_shape[1:])))
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in variables)
    return jax.jit(model.train_step, donate_argnums=0).lower(state, _to_tensors((x, y))).compile()


def _cost(compiled):
    analysis = compiled.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def _to_tensors(structure):
    return tree.map_structure(keras.ops.convert_to_tensor, structure)


def _dispatched_flops(function):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):  # torch's FlopCounterMode fails where a gradient of a parameter is asked for
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function._overloadpacket in flop_registry:
                self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
            return result

    with Counter() as counter:
        function()
    return float(counter.total)


def _graph_flops(function, data):
    import tensorflow as tf
    from tensorflow.python.framework.ops import get_stats_for_node_def

    specs = tree.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), data)
    graph = tf.function(function).get_concrete_function(specs).graph
    operations = _reachable(graph)
    bodies = {f.signature.name: {node.op for node in f.node_def} for f in graph.as_graph_def().library.function}
    for operation in operations:
        for attribute in operation.node_def.attr.values():
            if hidden := bodies.get(attribute.func.name, set()) & {"Conv2D", "MatMul", "BatchMatMulV2"}:
                raise NotImplementedError(f"{', '.join(hidden)} in a function called by {operation.name}: not counted")
    return float(sum(get_stats_for_node_def(graph, op.node_def, "flops").value or 0 for op in operations))


def _reachable(graph):
    """Operations that a result or a change of state depends on."""
    stack = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    found = {}
    while stack:
        operation = stack.pop()
        if operation.name not in found:
            found[operation.name] = operation
            stack += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    return list(found.values())
