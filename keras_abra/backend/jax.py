"""JAX: `jax.vjp`, global arrays, `train_step(state, data)`."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import tree


def linearize(function, primals, keep=False):
    """See `keras_abra.backend.tensorflow.linearize`; what a pullback is not asked for, the compiler leaves out."""
    del keep
    outputs, vjp, aux = jax.vjp(function, *primals, has_aux=True)

    def pullback(cotangents, wrt):
        pairs = zip(outputs, cotangents, strict=True)
        gradients = vjp(
            tuple(jnp.zeros_like(output) if ct is None else ct.astype(output.dtype) for output, ct in pairs)
        )
        return [gradients[i] for i in wrt]

    return outputs, aux, pullback


def replicas():
    """1: an array sharded over devices is one global array, and every sum over it is global."""
    return 1


def devices():
    """Number of devices of this process that each batch is divided among, in equal parts."""
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, keras.distribution.DataParallel):
        return 1
    return len(distribution.device_mesh.backend_mesh.local_devices)


def global_sum(value):
    """The value itself: see `replicas`."""
    return value


def global_rows(value):
    """The value itself: see `replicas`."""
    return value


def fold_in_replica(seed):
    """The seed itself: one draw covers the global array."""
    return seed


def take_noise_from_state(layers):
    """Nothing: see `keras_abra.backend.torch.take_noise_from_state`."""


def replica_values(variable):
    """The NumPy value of a `keras.Variable`: it is one on all devices."""
    return [keras.ops.convert_to_numpy(variable.value)]


def set_replica_values(variable, values):
    """Sets what `replica_values` gave."""
    (value,) = values
    variable.assign(value)


def generator_state():
    """None: JAX has no global generator."""
    return None


def set_generator_state(state):
    """Nothing, see `generator_state`."""


def process_index():
    """Number of this process among those that train together; 0 is the one that writes."""
    return jax.process_index()


def process_count(model):
    """Number of processes that train the model together."""
    return jax.process_count()


def wait_for_processes():
    """Returns when all processes that train together have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("keras_abra")


@contextlib.contextmanager
def alone():
    """What one process does without the others: new variables are not given to all, for which JAX would wait for them.
    Keras makes some to save weights."""
    distribution = keras.distribution.distribution()
    if distribution is None or jax.process_count() == 1:
        yield
        return
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def largest_of_processes(number):
    """The largest of the integers of the processes that train together; all of them must ask."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.array(number, "int32"))))


def _in_every_process(value):
    """The same global array with all its rows on each device: only what a process holds can it give to NumPy."""
    distribution = keras.distribution.distribution()
    if distribution is None or jax.process_count() == 1:
        return value
    everywhere = jax.sharding.NamedSharding(distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(value, everywhere)


def _optimizer_value(optimizer, variables, read):
    with keras.StatelessScope(state_mapping=zip(optimizer.variables, variables, strict=True)):
        return read(optimizer)


class Replicated:
    """What Keras's loops lack on JAX.

    During a loop Keras takes the arrays out of the model's variables and hands them from step to step. Here they come
    back whatever ends the loop, also data that raise at the first batch; arrays that a step has been given and that are
    therefore gone are never put into variables. In several processes `predict` gives each of them all outputs.
    """

    def _get_jax_state(self, *args, purge_model_variables=False, **wanted):
        state = super()._get_jax_state(*args, purge_model_variables=purge_model_variables, **wanted)
        if purge_model_variables:
            self._jax_state = dict(zip([name for name, asked in wanted.items() if asked], state, strict=True))
        return state

    def jax_state_sync(self):
        groups = (getattr(self, "_jax_state", None) or {}).values()
        if not any(array.is_deleted() for arrays in groups for array in arrays or ()):
            super().jax_state_sync()

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):
        with self._variables_back():
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.predict)
    def predict(self, *args, **kwargs):
        with self._variables_back():
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _variables_back(self):
        try:
            yield
        finally:
            self.jax_state_sync()
            self._jax_state = None

    def predict_step(self, state, data):
        outputs, state = super().predict_step(state, data)
        return tree.map_structure(_in_every_process, outputs), state


class Trainer(Replicated):
    """The part of `ABRAModel` that JAX's `fit` calls."""

    def train_step(self, state, data):
        trainable, non_trainable, optimizer_variables, metrics_variables = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        optimizer = self.optimizer
        scale = _optimizer_value(optimizer, optimizer_variables, lambda o: o.scale_loss(jnp.float32(1.0)))
        result = self.fused_step(linearize, trainable, non_trainable, x, y, sample_weight, scale)
        old = (trainable, non_trainable, optimizer_variables, metrics_variables)
        before = _optimizer_value(optimizer, optimizer_variables, lambda o: o.iterations + 0)
        trainable, optimizer_variables = optimizer.stateless_apply(optimizer_variables, result.gradients, trainable)
        after = _optimizer_value(optimizer, optimizer_variables, lambda o: o.iterations + 0)

        mapping = [
            *zip(self.non_trainable_variables, result.state, strict=True),
            *zip(self.metrics_variables, metrics_variables, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.ramp.advance(after - before)
            logs = self.update_logs(result, x, y, sample_weight)
        non_trainable = [scope.get_current_value(v) for v in self.non_trainable_variables]
        metrics_variables = [scope.get_current_value(v) for v in self.metrics_variables]
        state = (trainable, non_trainable, optimizer_variables, metrics_variables)
        return self._skip(self.is_finite(result), old, state) if self.skip_non_finite else (logs, state)

    def _skip(self, finite, old, new):
        """The logs and the state after a step, those before it if it was not finite."""
        state = jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, tuple(map(list, new)))
        with keras.StatelessScope(state_mapping=zip(self.metrics_variables, state[3], strict=True)) as scope:
            logs = self.log_skipped(1.0 - finite)
        return logs, (*state[:3], [scope.get_current_value(v) for v in self.metrics_variables])
