"""torch: `torch.autograd`, one process, `train_step(data)`."""

import keras
import torch
from keras import tree


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
    """1: Keras trains one process on torch."""
    return 1


def global_sum(value):
    """The value itself: see `replicas`."""
    return value


def global_rows(value):
    """The value itself: see `replicas`."""
    return value


def fold_in_replica(seed):
    """The seed itself: see `replicas`."""
    return seed


class Trainer:
    """The part of `ABRAModel` that torch's `fit` calls."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        trainable = [v.value for v in self.trainable_variables]
        state = [v.value.detach() for v in self.non_trainable_variables]
        with torch.no_grad():
            scale = torch.as_tensor(self.optimizer.scale_loss(keras.ops.ones(())))
            result = self.fused_step(linearize, trainable, state, x, y, sample_weight, scale)
            for variable, old, new in zip(self.non_trainable_variables, state, result.state, strict=True):
                if new is not old:
                    variable.assign(new)
            before = self.optimizer.iterations + 0
            self.optimizer.apply(result.gradients, self.trainable_variables)
            self.ramp.advance(self.optimizer.iterations - before)
            return self.update_logs(result, x, y, sample_weight)
