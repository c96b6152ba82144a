"""torch: `torch.autograd`, processes of `torch.distributed`, `train_step(data)`.

Released Keras does not distribute on torch. Here every process of an initialized process group is a replica that is fed
its own part of each global mini-batch: what its `fit`, `evaluate` and `predict` give is that of all of them, and all of
them must take the same number of steps.
"""

import contextlib
import datetime
import functools

import keras
import torch
import torch.distributed as dist
from keras import tree

_APART = 0x9E3779B1  # odd, far from 0 modulo 2**32: the replicas' streams of seeds do not meet


def _detach(structure):
    return tree.map_structure(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, structure)


def _leaf(tensor):
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def linearize(function, primals, keep=False):
    """See `keras_abra.backend.tensorflow.linearize`."""
    primals = [[_leaf(tensor) for tensor in group] for group in primals]
    with torch.enable_grad():
        outputs, aux = function(*primals)

    def pullback(cotangents, wrt):
        pairs = zip(outputs, cotangents, strict=True)
        pairs = [(output, ct) for output, ct in pairs if ct is not None and output.requires_grad]
        if not pairs:
            return [[None] * len(primals[i]) for i in wrt]
        targets, seeds = zip(*pairs, strict=True)
        sources = [tensor for i in wrt for tensor in primals[i]]
        gradients = iter(torch.autograd.grad(targets, sources, seeds, retain_graph=keep, allow_unused=True))
        return [[next(gradients) for _ in primals[i]] for i in wrt]

    return _detach(outputs), _detach(aux), pullback


def replicas():
    """Number of processes that share the step: those of `torch.distributed`'s group, 1 without."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(value):
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return _all_reduce(value)

    @staticmethod
    def backward(ctx, gradient):
        return _all_reduce(gradient)


class _GlobalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        counts = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(replicas())]
        dist.all_gather(counts, torch.tensor([len(value)], device=value.device))
        ctx.counts = [int(count) for count in counts]
        padded = value.new_zeros((max(ctx.counts), *value.shape[1:]))
        padded[: len(value)] = value.detach()
        parts = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return torch.split(_all_reduce(gradient), ctx.counts)[dist.get_rank()]


def devices():
    """1: see `keras_abra.backend.jax.devices`."""
    return 1


def global_sum(value):
    """Sum over the replicas; differentiable."""
    return _GlobalSum.apply(value) if replicas() > 1 else value


def global_rows(value):
    """The rows of all replicas, one after another, in the order of their ranks; differentiable."""
    return _GlobalRows.apply(value) if replicas() > 1 else value


def fold_in_replica(seed):
    """Makes a seed differ between replicas, which Keras's SeedGenerator gives the same one."""
    if replicas() == 1:
        return seed
    apart = torch.tensor([dist.get_rank() * _APART, 0], device=seed.device)
    return (seed.to(torch.int64) + apart).to(seed.dtype)  # modulo 2**32, as Keras takes it


def take_noise_from_state(layers):
    """Lets dropout without a seed of its own draw from the state of its layer, as it does on the other backends: for
    `seed=None` Keras takes torch's dropout, whose masks come from a global generator and cannot be drawn again."""
    for layer in layers:
        for generator in layer._seed_generators:
            if generator._initial_seed is None:
                generator._initial_seed = int(generator.state.value[0])  # any but None; it is that


def replica_values(variable):
    """The NumPy value of a `keras.Variable`."""
    return [keras.ops.convert_to_numpy(variable.value)]


def set_replica_values(variable, values):
    """Sets what `replica_values` gave."""
    (value,) = values
    variable.assign(value)


def generator_state():
    """States of torch's global generators, of the CPU and of this process's GPU, behind each other in a NumPy array."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return torch.cat([torch.get_rng_state(), *gpu]).numpy()


def set_generator_state(state):
    """Sets what `generator_state` gave; where one machine has a GPU and the other none, the CPU's alone."""
    state, size = torch.from_numpy(state), len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if torch.cuda.is_available() and len(state) > size:
        torch.cuda.set_rng_state(state[size:][: len(torch.cuda.get_rng_state())])


def process_index():
    """Number of this process among those that train together; 0 is the one that writes."""
    return dist.get_rank() if replicas() > 1 else 0


def process_count(model):
    """Number of processes that train the model together."""
    return replicas()


def wait_for_processes():
    """Returns when all processes that train together have come here."""
    if replicas() > 1:
        dist.barrier(group=host_group())


def alone():
    """What one process does without the others: nothing is to be changed for it here."""
    return contextlib.nullcontext()


def largest_of_processes(number):
    """The largest of the integers of the processes that train together; all of them must ask."""
    if replicas() == 1:
        return number
    found = torch.tensor(number, device="cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX, group=host_group())
    return int(found)


def host_group():
    """A group of the processes that train together, whose messages do not wait for the accelerator and may be long in
    coming, as of a process that builds records. All of them must ask for it at first."""
    return _host_group(dist.group.WORLD)


@functools.cache
def _host_group(world):
    if dist.get_backend(world) == "gloo":
        return world
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


def _sum_all(tensors):
    """Each tensor summed over the replicas, in one message; None stays."""
    present = [t for t in tensors if t is not None]
    if not present:
        return list(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in present])
    dist.all_reduce(flat)
    sums = iter(torch.split(flat, [t.numel() for t in present]))
    return [None if t is None else next(sums).reshape(t.shape).to(t.dtype) for t in tensors]


def _take_means(variables):
    """Sets what each replica moved by its own part of the batch, as batch normalization does, to the replicas' mean."""
    moved = [v for v in variables if v.value.is_floating_point() and v.aggregation != "only_first_replica"]
    for variable, total in zip(moved, _sum_all([v.value for v in moved]), strict=True):
        variable.assign(total / replicas())


@contextlib.contextmanager
def _own_seeds(variables):
    """Lets the layers of a model draw other noise in each replica; the seeds themselves stay alike."""
    seeds = [v for v in variables if v.path.endswith("seed_generator_state")]
    shared = [v.value.detach().clone() for v in seeds]
    own = [fold_in_replica(value) for value in shared]
    for seed, value in zip(seeds, own, strict=True):
        seed.assign(value)
    yield
    for seed, before, value in zip(seeds, shared, own, strict=True):
        seed.assign(seed.value - value + before)


class Replicated:
    """What Keras's `fit`, `evaluate` and `predict` lack on torch to run in several processes. One process: nothing."""

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        if replicas() > 1:
            self._assert_compile_called("fit")
            self.optimizer.build(self.trainable_variables)
            take_noise_from_state(self._flatten_layers())
            for variable in [*self.variables, *self.optimizer.variables]:  # seeds among them
                value = variable.value.data.contiguous()  # NCCL takes no other
                dist.broadcast(value, 0)
                variable.value.data.copy_(value)
        return super().fit(*args, **kwargs)

    def train_step(self, data):
        if replicas() == 1:
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with _own_seeds(self.non_trainable_variables):
            y_pred = self(x, training=True)
        loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        batch = torch.tensor(float(len(tree.flatten(x)[0])), device=loss.device)
        share = self.optimizer.scale_loss(loss * (batch / global_sum(batch)))
        values = [v.value for v in self.trainable_variables]
        gradients = torch.autograd.grad(share, values, allow_unused=True)
        with torch.no_grad():
            _take_means(self.non_trainable_variables)
            self.optimizer.apply(_sum_all(gradients), self.trainable_variables)

        def update():
            self._loss_tracker.update_state(loss.detach(), sample_weight=batch)
            self.compute_metrics(x, y, y_pred.detach(), sample_weight=sample_weight)

        return self.update_together(update)

    def test_step(self, data):
        return self.update_together(lambda: super(Replicated, self).test_step(data))

    def predict_step(self, data):
        return tree.map_structure(global_rows, super().predict_step(data))

    def update_together(self, update):
        """Runs a function that updates metrics, adds up what it added in every replica, and gives the logs."""
        if replicas() == 1:
            return update()
        before = [v.value.detach().clone() for v in self.metrics_variables]
        update()
        with torch.no_grad():
            pairs = zip(self.metrics_variables, before, strict=True)
            added = _sum_all([(v.value - b).double() for v, b in pairs])
            for variable, b, a in zip(self.metrics_variables, before, added, strict=True):
                variable.assign(b + a.to(b.dtype))
            return self.get_metrics_result()


class Trainer(Replicated):
    """The part of `ABRAModel` that torch's `fit` calls."""

    def get_metrics_result(self):
        """As Keras's, in tensors of their own: a sum's result is its variable, which validation resets before the logs
        of the epoch are kept."""
        result = super().get_metrics_result()
        return tree.map_structure(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, result)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        trainable = [v.value for v in self.trainable_variables]
        state = [v.value.detach() for v in self.non_trainable_variables]
        with torch.no_grad():
            scale = torch.as_tensor(self.optimizer.scale_loss(keras.ops.ones(())))
            result = self.fused_step(linearize, trainable, state, x, y, sample_weight, scale)
            if self.skip_non_finite and not self.is_finite(result):
                return self.update_together(lambda: self.log_skipped(1.0))
            for variable, old, new in zip(self.non_trainable_variables, state, result.state, strict=True):
                if new is not old:
                    variable.assign(new)
            gradients = result.gradients
            if replicas() > 1:
                gradients = _sum_all(gradients)
                _take_means(self.non_trainable_variables)
            before = self.optimizer.iterations + 0
            self.optimizer.apply(gradients, self.trainable_variables)
            self.ramp.advance(self.optimizer.iterations - before)
            return self.update_together(lambda: self.update_logs(result, x, y, sample_weight))
