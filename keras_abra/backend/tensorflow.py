"""TensorFlow: gradient tapes, `tf.distribute` replicas, `train_step(data)`."""

import keras
import tensorflow as tf


def linearize(function, primals, keep=False):
    """Runs `function(*primals) -> (outputs, aux)` and remembers its derivative.

    Args:
        function: takes lists of tensors, returns a tuple of tensors and any structure that needs no gradient.
        primals: lists of tensors.
        keep: whether `pullback` will be called more than once.

    Returns:
        `(outputs, aux, pullback)`; `pullback(cotangents, wrt)` takes one cotangent (or None) per output and gives, for
        each position of `primals` in `wrt`, the list of gradients (None where an output does not depend on it).
    """
    with tf.GradientTape(persistent=keep, watch_accessed_variables=False) as tape:
        tape.watch(primals)
        outputs, aux = function(*primals)

    def pullback(cotangents, wrt):
        pairs = [(output, ct) for output, ct in zip(outputs, cotangents, strict=True) if ct is not None]
        targets, seeds = zip(*pairs, strict=True)
        return tape.gradient(list(targets), [primals[i] for i in wrt], output_gradients=list(seeds))

    return outputs, aux, pullback


def _context():
    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context


def replicas():
    """Number of replicas that share the step."""
    return _context().num_replicas_in_sync if _context() else 1


def global_sum(value):
    """Sum of a tensor over the replicas, the same on each.

    Differentiable as the training step needs it: the loss is the *sum* of what the replicas' own losses are, so the
    gradient of a sum over replicas is the sum over replicas of its gradients. Every replica calls it, in one order.
    """
    return _context().all_reduce(tf.distribute.ReduceOp.SUM, value) if _context() else value


def global_rows(value):
    """The rows of all replicas, one after another in the order of the replicas, the same on each.

    The replicas may have different numbers of rows, none as well. The gradient of a replica's rows is the sum over
    replicas of the gradients at these rows, for the reason that `global_sum` gives.
    """
    return _context().all_gather(value, axis=0) if _context() else value


def fold_in_replica(seed):
    """Makes a seed `(2,)` differ between replicas, which Keras's SeedGenerator gives the same one; the first replica
    keeps it. What is added does not depend on the seed, so that a counter in it goes on as it was."""
    context = _context()
    if context is None:
        return seed
    replica = tf.cast(context.replica_id_in_sync_group, seed.dtype)
    return seed + replica * tf.constant([1000003, 0], seed.dtype)


def replica_values(variable):
    """The NumPy values of a `keras.Variable`, one for each replica that this process holds."""
    value = variable.value
    return (
        [part.numpy() for part in value.values]
        if isinstance(value, tf.distribute.DistributedValues)
        else [value.numpy()]
    )


def set_replica_values(variable, values):
    """Sets what `replica_values` gave; a single value goes to every replica."""
    value = variable.value
    parts = value.values if isinstance(value, tf.distribute.DistributedValues) else [value]
    for part, new in zip(parts, values * len(parts) if len(values) == 1 else values, strict=True):
        part.assign(new)


def generator_state():
    """None: the state of TensorFlow's global generator cannot be read. Nothing of ours draws from it."""
    return None


def set_generator_state(state):
    """Nothing, see `generator_state`."""


def process_index():
    """Number of this process among those that train together; 0 is the one that writes."""
    return getattr(tf.distribute.get_strategy().cluster_resolver, "task_id", 0) or 0


def wait_for_processes():
    """Nothing: a strategy's processes go on together by themselves."""


class Replicated:
    """Nothing: Keras's own `fit`, `evaluate` and `predict` know `tf.distribute` strategies."""


class Trainer(Replicated):
    """The part of `ABRAModel` that TensorFlow's `fit` calls."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is not None and y.shape[0] is None and not self.jit_compile:
            fewest, message = (2, self.one_sample_message) if replicas() == 1 else (1, self.no_sample_message)
            tf.debugging.assert_greater_equal(tf.shape(y)[0], fewest, message=message)
        trainable = [tf.convert_to_tensor(v.value) for v in self.trainable_variables]
        state = [tf.convert_to_tensor(v.value) for v in self.non_trainable_variables]
        result = self.fused_step(
            linearize, trainable, state, x, y, sample_weight, self.optimizer.scale_loss(tf.constant(1.0))
        )
        for variable, old, new in zip(self.non_trainable_variables, state, result.state, strict=True):
            if new is not old:
                variable.assign(new)
        if self.trainable_variables:
            before = self.optimizer.iterations + 0
            self.optimizer.apply_gradients(zip(result.gradients, self.trainable_variables, strict=True))
            self.ramp.advance(self.optimizer.iterations - before)
        return self.update_logs(result, x, y, sample_weight)
