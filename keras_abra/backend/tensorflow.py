"""TensorFlow: gradient tapes, `tf.distribute` replicas, `train_step(data)`."""

import contextlib
from functools import partial

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
        gradients = tape.gradient(list(targets), [primals[i] for i in wrt], output_gradients=list(seeds))
        return tf.nest.map_structure(_dense, gradients)

    return outputs, aux, pullback


def _dense(gradient):
    # That of a table's rows, as of position embeddings: sums of two such are not defined.
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _context():
    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context


def replicas():
    """Number of replicas that share the step."""
    return _context().num_replicas_in_sync if _context() else 1


def devices():
    """1: see `keras_abra.backend.jax.devices`."""
    return 1


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


def take_noise_from_state(layers):
    """Nothing: see `keras_abra.backend.torch.take_noise_from_state`."""


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


def process_count(model):
    """Number of processes that train the model together."""
    resolver = model.distribute_strategy.cluster_resolver
    workers = resolver.cluster_spec().as_dict() if resolver else {}
    return max(sum(len(workers.get(job, ())) for job in ("chief", "worker")), 1)


def wait_for_processes():
    """Nothing: a strategy's processes go on together by themselves."""


def alone():
    """What one process does without the others: nothing is to be changed for it here."""
    return contextlib.nullcontext()


def largest_of_processes(number):
    """The largest of the integers of the processes that train together; runs of several are refused here."""
    return number


class Replicated:
    """Nothing: Keras's own `fit`, `evaluate` and `predict` know `tf.distribute` strategies."""


def _agreed(optimizer, gradients, scale):
    """What this replica gives to Keras, which clips a replica's own gradients, and looks for overflow in the first
    replica's, before it sums them. With clipping: an equal part of the clipped sum, which is too short to be clipped
    again. With a loss scale: NaN where any replica's gradients overflowed, so that all of them skip the step."""
    number, inner = replicas(), getattr(optimizer, "inner_optimizer", optimizer)
    if number == 1:
        return gradients
    known = [g for g in gradients if g is not None]
    clips = bool(inner.clipnorm or inner.global_clipnorm or inner.clipvalue)
    if clips:
        known = global_sum(known)
    if inner is not optimizer:
        overflow = 1.0 - tf.cast(tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in known]), tf.float32)
        overflow = overflow if clips else global_sum(overflow)
        poison = tf.where(overflow > 0, float("nan"), 0.0)
        known = [g + tf.cast(poison, g.dtype) for g in known]
    if clips:
        known = [g / number for g in _clip(inner, known, scale)]
    known = iter(known)
    return [None if g is None else next(known) for g in gradients]


def _clip(optimizer, gradients, scale):
    """As Keras clips, gradients that are times the loss scale."""
    if optimizer.clipnorm:
        return [tf.clip_by_norm(g, scale * optimizer.clipnorm) for g in gradients]
    if optimizer.global_clipnorm:
        return tf.clip_by_global_norm(gradients, scale * optimizer.global_clipnorm)[0]
    bound = scale * optimizer.clipvalue
    return [tf.clip_by_value(g, -bound, bound) for g in gradients]


def _apply_if(finite, optimizer, pairs):
    """Applies gradients if `finite`, the same on every replica. A condition must stand outside of the replicas."""
    gradients, variables = zip(*((g, v) for g, v in pairs if g is not None), strict=True)

    def apply(gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return tf.constant(0)

    def in_all(strategy, gradients, finite):
        def apply_in_each():
            strategy.extended.call_for_each_replica(apply, args=(gradients,))
            return tf.constant(0)

        tf.cond(strategy.experimental_local_results(finite)[0], apply_in_each, lambda: tf.constant(0))

    if not optimizer.built:
        optimizer.build([v for _, v in pairs])
    if _context():
        _context().merge_call(in_all, args=(gradients, finite))
    else:
        tf.cond(finite, lambda: apply(gradients), lambda: tf.constant(0))


class Trainer(Replicated):
    """The part of `ABRAModel` that TensorFlow's `fit` calls."""

    def make_train_function(self, force=False):
        if self.built and not self.optimizer.built:  # variables that the first trace makes cost a second one
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        return super().make_train_function(force)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Under a strategy, builds metrics and optimizer from one replica's part of a batch. Keras takes the mean of
        the parts, which fails where they are not of one size, or belong to other processes. Without one Keras leaves
        them to the first trace, which then is done twice; the metrics' are made here."""
        strategy = self._distribute_strategy
        if strategy is None:
            dataset = getattr(iterator, "_distributed_dataset", None)
            self._build_metrics(data_batch if dataset is None else dataset.element_spec)
            return
        if data_batch is None:
            data_batch = self._symbolic_batch(iterator)
        if iterator is not None and data_batch is None:
            _, _, batches = next(iter(iterator))
            data_batch = tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], next(batches))
        super()._maybe_symbolic_build(data_batch=data_batch)

    def _build_metrics(self, data):
        metrics = self._compile_metrics
        y = None if data is None else keras.utils.unpack_x_y_sample_weight(data)[1]
        shape = getattr(y, "shape", None)
        if metrics is None or metrics.built or shape is None or tf.TensorShape(shape).rank is None:
            return
        labels = keras.KerasTensor(tuple(shape), keras.backend.standardize_dtype(y.dtype))
        metrics.build(labels, keras.KerasTensor((shape[0], self.num_classes)))

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is not None and y.shape[0] is None and not self.jit_compile:
            fewest, message = (2, self.one_sample_message) if replicas() == 1 else (1, self.no_sample_message)
            enough = tf.debugging.assert_greater_equal(tf.shape(y)[0], fewest, message=message)
            with tf.control_dependencies([enough] if enough is not None else []):  # else another error may come first
                x, y = tf.nest.map_structure(tf.identity, (x, y))
        trainable = [tf.convert_to_tensor(v.value) for v in self.trainable_variables]
        state = [tf.convert_to_tensor(v.value) for v in self.non_trainable_variables]
        scale = self.optimizer.scale_loss(tf.constant(1.0))
        result = self.fused_step(linearize, trainable, state, x, y, sample_weight, scale)
        finite = self.is_finite(result) if self.skip_non_finite else None
        for variable, old, new in zip(self.non_trainable_variables, state, result.state, strict=True):
            if new is not old:
                variable.assign(new if finite is None else tf.where(finite, new, old))
        if self.trainable_variables:
            before = self.optimizer.iterations + 0
            gradients = _agreed(self.optimizer, result.gradients, scale)
            pairs = list(zip(gradients, self.trainable_variables, strict=True))
            if finite is None:
                self.optimizer.apply_gradients(pairs)
            else:
                _apply_if(finite, self.optimizer, pairs)
            self.ramp.advance(self.optimizer.iterations - before)
        logs = partial(self.update_logs, result, x, y, sample_weight)
        return self._logs_of_workers(
            logs() if finite is None else tf.cond(finite, logs, partial(self.log_skipped, 1.0))
        )

    def test_step(self, data):
        return self._logs_of_workers(super().test_step(data))

    def _logs_of_workers(self, logs):
        """Between processes, Keras takes the mean of the logs over an axis that scalars do not have."""
        strategy = self.distribute_strategy
        workers = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        if not workers or strategy.num_replicas_in_sync == len(strategy.extended.worker_devices):
            return logs
        return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
