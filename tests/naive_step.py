"""One ABRA step written out plainly: whole-network passes, one gradient call for each thing that is asked for.

The rules are those of the fused step, the code is not: statistics, spreads, margin and sphere are written here again,
the search is done in NumPy, and every pass starts at the image.
"""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_abra.fused_step import PenaltyScope
from tests.gradients import gradients


def naive_step(model, x, y, sample_weight=None, mutant=None):
    """`(gradients, new state, losses)` of one step, as NumPy; `mutant` names a mistake to make (see the tests)."""
    step = _Step(model, x, y, sample_weight, mutant)
    return step.run()


class _Step:
    def __init__(self, model, x, y, sample_weight, mutant):
        self.model, self.mutant = model, mutant
        self.image, self.experiment = ops.convert_to_tensor(x["image"]), x["experiment"]
        self.y = np.asarray(y)
        self.weight = ops.ones(len(y)) if sample_weight is None else ops.convert_to_tensor(sample_weight)
        self.trainable = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        self.state = [keras.ops.convert_to_numpy(v) for v in model.non_trainable_variables]
        self.steps, self.length = keras.ops.convert_to_numpy(model.ramp.progress)
        self.norms = "own" if mutant == "own norms" else model.perturbed_norms
        self.moments = {}

    @contextlib.contextmanager
    def branch(self, perturbed):
        """With other calls of the batch normalizations behind the first stage."""
        model = self.model
        layers = [layer for part in [*model.backbone_parts[1:], model.neck] for layer in part.layers]
        layers = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
        own = {layer.name: layer.call for layer in layers}
        twins = {layer.name.removesuffix("_twin"): layer for layer in model.auxiliary_norms}

        def note(layer):
            def call(x, training=None, mask=None):
                axes = tuple(range(len(x.shape) - 1))
                mean, variance = ops.stop_gradient(ops.mean(x, axes)), ops.stop_gradient(ops.var(x, axes))
                self.moments[layer.name] = mean, variance
                return own[layer.name](x, training=True)

            return call

        def other(layer):
            def call(x, training=None, mask=None):
                if self.norms == "auxiliary":
                    return twins[layer.name].call(x, training=True)
                if self.norms == "moving":
                    return own[layer.name](x, training=False)
                mean, variance = moments[layer.name]
                scaled = (x - mean) / ops.sqrt(variance + layer.epsilon) * ops.convert_to_tensor(layer.gamma)
                return scaled + ops.convert_to_tensor(layer.beta)

            return call

        moments = dict(self.moments)
        if self.norms != "own" and (perturbed or self.norms == "clean"):
            for layer in layers:
                vars(layer)["call"] = other(layer) if perturbed else note(layer)
        yield
        for layer in layers:
            vars(layer).pop("call", None)

    def forward(self, trainable, offsets, state=None, perturbed=False):
        with self.branch(perturbed):
            return self.run_network(trainable, offsets, state)

    def run_network(self, trainable, offsets, state):
        """The network from the image on: `(cosine, embedding, activity penalty, statistics, new state)`."""
        model = self.model
        variables = model.trainable_variables + model.non_trainable_variables
        mapping = zip(variables, [*trainable, *(self.state if state is None else state)], strict=True)
        with PenaltyScope(state_mapping=mapping, collect_losses=True) as scope:
            parts, statistics = model.backbone_parts, []
            x = parts[0](self.image, training=True)
            for part, offset in zip(parts[1:], [ops.convert_to_tensor(o) for o in offsets], strict=True):
                mu, sigma = ops.mean(x, axis=(1, 2)), ops.sqrt(ops.var(x, axis=(1, 2)) + 1e-6)
                statistics.append(ops.concatenate([mu, sigma], axis=1))
                beta, gamma = mu + offset[:, : mu.shape[1]], sigma + offset[:, mu.shape[1] :]
                gamma = ops.minimum(ops.maximum(gamma, 0.1 * sigma), 10 * sigma)
                x = (x - mu[:, None, None]) / sigma[:, None, None] * gamma[:, None, None] + beta[:, None, None]
                x = part(x, training=True)
            embedding = model.neck(ops.mean(x, axis=(1, 2)), training=True)
            unit = embedding / ops.sqrt(ops.sum(embedding**2, axis=1, keepdims=True))
            kernel = ops.convert_to_tensor(model.head.kernel)
            cosine = ops.matmul(unit, kernel / ops.sqrt(ops.sum(kernel**2, axis=0, keepdims=True)))
            penalty = sum(scope.penalties)
        return (
            cosine,
            embedding,
            penalty,
            statistics,
            [scope.get_current_value(v) for v in model.non_trainable_variables],
        )

    def margin_loss(self, cosine):
        """ArcFace by its angle: cos(theta + m)."""
        return self.cross_entropy(cosine, self.model.loss_function.margin * self.ramp())

    def ramp(self):
        return min(self.steps / self.length, 1.0) if self.length else 1.0

    def cross_entropy(self, cosine, m):
        s = self.model.loss_function.scale
        theta = ops.arccos(ops.clip(cosine, -1 + 1e-6, 1 - 1e-6))
        target = ops.where(theta + m < np.pi, ops.cos(theta + m), cosine - m * np.sin(m))
        true = self.y if self.y.ndim == 2 else np.eye(cosine.shape[1], dtype="float32")[self.y]
        true = np.eye(cosine.shape[1], dtype="float32")[true.argmax(1)] if self.mutant == "main class" else true
        true = ops.convert_to_tensor(true)
        log_p = ops.log_softmax(s * (true * target + (1 - true) * cosine))
        return -ops.sum(ops.sum(true * log_p, axis=1) * self.weight) / len(self.y)

    def divergence(self, clean, perturbed):
        """Symmetric KL of the margin-free softmax."""
        p, q = (
            ops.softmax(self.model.loss_function.scale * clean),
            ops.softmax(self.model.loss_function.scale * perturbed),
        )
        both = ops.sum(p * ops.log(p / q), axis=1) + ops.sum(q * ops.log(q / p), axis=1)
        return ops.sum(0.5 * both * self.weight) / len(self.y)

    def regularization(self, trainable):
        pairs = zip(self.model.trainable_variables, trainable, strict=True)
        return sum(0.01 * ops.sum(ops.square(value)) for v, value in pairs if v.regularizer is not None)

    def zeros(self):
        return [np.zeros((len(self.y), 2 * stage.channels), "float32") for stage in self.model.stages]

    def directions(self, statistics, stage):
        """Rows M whose combinations are the perturbations, and the spread S of each statistic; NumPy."""
        m = keras.ops.convert_to_numpy(statistics)
        mean = m.mean(0)
        if stage.structure == "diagonal":
            rows = np.diag(m.std(0, ddof=1))
        elif stage.structure == "low_rank":
            rows = (m - mean) / np.sqrt(len(m) - 1)
        else:
            seen = keras.ops.convert_to_numpy(stage.experiments_seen) > 0
            means = keras.ops.convert_to_numpy(stage.experiment_means)
            rows = np.zeros_like(means)
            if seen.sum() > 1:
                mean = means[seen].mean(0)
                rows[seen] = (means[seen] - mean) / np.sqrt(seen.sum() - 1)
        spread = np.sqrt((rows**2).sum(0))
        counted = spread > 1e-6 * (np.abs(mean) + 1e-3)
        return rows * counted, np.where(counted, spread, np.inf), counted.sum()

    def run(self):
        model = self.model
        template = model.uncertainty
        clean = self.forward(self.trainable, self.zeros())
        statistics, state = clean[3], clean[4]
        spaces = [self.directions(m, stage) for m, stage in zip(statistics, model.stages, strict=True)]
        radius = template.radius * (self.ramp() if template.ramp_radius else 1)
        lengths = [radius * np.sqrt(n) for _, _, n in spaces]

        def size(coordinates, space):
            return np.sqrt(((coordinates @ space[0] / space[1]) ** 2).sum(1, keepdims=True))

        def offsets(points):
            return [ops.matmul(p, np.float32(space[0])) for p, space in zip(points, spaces, strict=True)]

        def rescale(coordinates, space, length):
            norm = size(coordinates, space)
            return coordinates * np.where(norm > 0, length / np.where(norm > 0, norm, 1), 1)

        points, active, state = self.draw(statistics, state)
        if template.shared_by:
            points = [np.stack([p[self.experiment == e].sum(0) for e in self.experiment]) for p in points]
        points = [rescale(p, space, length) for p, space, length in zip(points, spaces, lengths, strict=True)]
        if template.start == "zero":
            points = [np.zeros_like(p) for p in points]

        def searched(points):
            cosine, _, penalty, _, _ = self.forward(self.trainable, offsets(points), perturbed=True)
            if template.search_loss == "softmax":
                return self.cross_entropy(cosine, 0.0)
            return self.margin_loss(cosine) + penalty

        def shared(slopes, active):
            if template.shared_by is None:
                return slopes
            alike = self.experiment[:, None] == self.experiment
            return np.stack([(slopes * active)[row].sum(0) for row in alike])

        eta = template.step_size * (self.steps >= self.length) * (-1 if self.mutant == "ascent sign" else 1)
        eta *= self.steps % template.adversary_every == 0
        for k in range(template.steps):
            start = (
                [np.zeros_like(p) for p in points] if k == 0 else [p * a for p, a in zip(points, active, strict=True)]
            )
            slopes = gradients(searched, [np.float32(p) for p in start])
            for i, (g, space, length) in enumerate(zip(slopes, spaces, lengths, strict=True)):
                g = g if self.mutant == "slopes apart" else shared(g, active[i])
                norm = size(g.astype("float64"), space)
                moved = rescale(points[i] + eta * length * g / np.where(norm > 0, norm, 1), space, length)
                points[i] = np.where(norm > 0, moved, points[i])
        worst = [np.float32((p * a) @ space[0]) for p, a, space in zip(points, active, spaces, strict=True)]
        learned = self.learned() if template.learned_scale else []

        def stretched(trainable):
            """With a scale for each coordinate, whose gradient is reversed, and 0 before the adversary starts."""
            found = []
            for i, point, a, (rows, spread, _) in zip(learned, points, active, spaces, strict=True):
                value = trainable[i]
                if self.mutant != "scale descends":
                    value = 2 * ops.stop_gradient(value) - value
                if self.steps < self.length:
                    value = ops.stop_gradient(value)
                moved = ops.convert_to_tensor(np.float32(point)) * ops.exp(2 * ops.tanh(value))
                offset = ops.matmul(moved, np.float32(rows))
                squares = ops.sum((offset * ops.convert_to_tensor(np.float32(1 / spread))) ** 2, axis=1)[:, None]
                norm = ops.where(squares > 0, ops.sqrt(ops.where(squares > 0, squares, 1.0)), 0.0)
                length = size(point, (rows, spread)) * a
                found.append(offset / ops.where(norm > 0, norm, 1.0) * ops.convert_to_tensor(np.float32(length)))
            return found

        def total(trainable, parts=False):
            cosine, embedding, penalty, _, _ = self.forward(trainable, self.zeros())
            shared = trainable
            if self.mutant == "shared part":
                shared = [ops.stop_gradient(v) if i in self.prefix() else v for i, v in enumerate(trainable)]
            new_cosine, new_embedding, _, _, _ = self.forward(
                shared, stretched(trainable) if learned else worst, perturbed=True
            )
            clean_side = cosine if model.alignment.two_sided else ops.stop_gradient(cosine)
            alignment = self.divergence(clean_side, new_cosine)
            regularization = self.regularization(trainable) * (2 if self.mutant == "regularization twice" else 1)
            losses = self.margin_loss(cosine), self.margin_loss(new_cosine), alignment
            loss = losses[0] + model.perturbed_weight * losses[1] + model.alignment.weight * alignment
            return (loss + penalty + regularization, *losses) if parts else loss + penalty + regularization

        values = [float(v) for v in total([ops.convert_to_tensor(v) for v in self.trainable], parts=True)]
        if self.mutant == "batch norm twice":
            moved = self.forward(self.trainable, worst, state, perturbed=True)[4]
            state = [
                b if "moving" in v.path else a
                for v, a, b in zip(model.non_trainable_variables, state, moved, strict=True)
            ]
        losses = dict(zip(("loss", "clean_loss", "perturbed_loss", "alignment"), values, strict=True))
        losses["gain"] = losses["perturbed_loss"] - losses["clean_loss"]
        slopes = gradients(total, self.trainable)
        return slopes, [keras.ops.convert_to_numpy(v) for v in state], losses

    def learned(self):
        """Positions of the stages' scales among the trainable variables."""
        ids = [id(v) for v in self.model.trainable_variables]
        return [ids.index(id(stage.log_scale)) for stage in self.model.stages]

    def prefix(self):
        ids = {id(v) for v in self.model.backbone_parts[0].trainable_variables}
        return {i for i, v in enumerate(self.model.trainable_variables) if id(v) in ids}

    def draw(self, statistics, state):
        """The stages' own draws (their law is tested with the layer), seeds and running means moved once."""
        variables = self.model.non_trainable_variables
        points, active = [], []
        with keras.StatelessScope(state_mapping=zip(variables, state, strict=True)) as scope:
            for stage, m in zip(self.model.stages, statistics, strict=True):
                u = stage.uncertainty(m, self.experiment)
                points.append(keras.ops.convert_to_numpy(stage.draw(u, len(self.y))).astype("float64"))
            perturbed = keras.ops.convert_to_numpy(self.model.stages[0].draw_perturbed(len(self.y)))
            for stage in self.model.stages:
                active.append(float(stage.draw_active()) * perturbed)
        state = {id(v): keras.ops.convert_to_numpy(scope.get_current_value(v)) for v in variables}
        for stage, m in zip(self.model.stages, statistics, strict=True):
            if stage.structure == "domain":
                means, seen = state[id(stage.experiment_means)].copy(), state[id(stage.experiments_seen)].copy()
                for e in np.unique(self.experiment):
                    mean = keras.ops.convert_to_numpy(m)[self.experiment == e].mean(0)
                    means[e] = 0.9 * means[e] + 0.1 * mean if seen[e] else mean
                    seen[e] = 1
                state[id(stage.experiment_means)], state[id(stage.experiments_seen)] = means, seen
        state[id(self.model.ramp.progress)] = np.array([self.steps + 1, self.length], "float32")
        return points, active, [state[id(v)] for v in variables]
