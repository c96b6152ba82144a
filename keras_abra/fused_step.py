"""One ABRA training step: gradients, new state and logs, the same on every backend.

The clean pass takes zero offsets *as an input that gradients flow to*. Its one backward pass gives the weights'
gradient (kept for the update), the first ascent direction, and the gradient at the output z of the part before the
first perturbed stage. The perturbed pass starts at z, and the first part is differentiated once, with the sum of both
gradients at z: K = 1 costs 1 + f training steps, f being the share of the compute behind the first perturbed stage;
every further ascent step 2f/3.

Activity regularization behind the first perturbed stage is part of the loss that the search climbs: it cannot be taken
out of the one backward pass. Without it the search climbs the margin loss, as the method says. With
`search_loss="softmax"` it climbs the margin-free loss alone, whose slope is one more backward pass of the clean branch.

Where the perturbed branch normalizes otherwise (`perturbed_norms`), the clean pass's slope is not its own: the first
direction is then the slope at zero offsets of a pass with its normalizations.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_abra import backend, checks, uncertainty
from keras_abra.losses import softmax_cross_entropy
from keras_abra.perturbed_norms import batch_moments


class StepResult(NamedTuple):
    """What one step computed: `gradients` of the trainable variables (times the loss scale), `state`, the new values of
    the non-trainable variables, `losses`, a dict of global scalars, the margin-free `logits` `(batch, classes)`, and
    the `loss_scale`."""

    gradients: list
    state: list
    losses: dict
    logits: Any
    loss_scale: Any


def fused_step(model, linearize, trainable, state, x, y, sample_weight, loss_scale):
    """Computes one training step of an `ABRAModel`.

    Args:
        model: the `ABRAModel`.
        linearize: the backend's differentiation, `keras_abra.backend.linearize`.
        trainable: values of `model.trainable_variables`.
        state: values of `model.non_trainable_variables`.
        x: images, or a dict with `"image"` and `"experiment"`.
        y: integer labels `(batch,)`, or shares of the classes `(batch, classes)`.
        sample_weight: `(batch,)` or None.
        loss_scale: scalar that multiplies every gradient.

    Returns:
        A `StepResult`.
    """
    image, experiment = model.unpack_inputs(x)
    checks.check_labels(y, model.num_classes)
    checks.check_gradients_add_up(model)
    batch = ops.shape(image)[0]
    if isinstance(batch, int) and batch == 1 and backend.replicas() == 1:
        raise ValueError(checks.ONE_SAMPLE)
    labels = y if checks.has_shares(y, model.num_classes) else ops.reshape(y, (batch,))
    count = backend.global_sum(ops.cast(batch, "float32"))
    share = ops.cast(batch, "float32") / count
    mean = _weighted_mean(batch, count, sample_weight)
    shared_state, state = state, _own_seeds(model, state)
    seed = ops.cast(loss_scale, "float32")
    stages, alignment, loss = model.stages, model.alignment, model.loss_function

    def stateless(function, trainable, state):
        return _stateless(model, function, trainable, state, share)

    def head(features, branch):
        embedding, cosine = model.embed_features(features, training=True, branch=branch)
        margin_loss = mean(
            softmax_cross_entropy(labels, loss.margin_logits(labels, cosine, model.ramp.margin_factor()))
        )
        return margin_loss, cosine * loss.scale, embedding

    def margin_free(logits):
        return mean(softmax_cross_entropy(labels, logits))

    def prefix(trainable):
        def run():
            penalty = sum((v.regularizer(v) for v in model.trainable_variables if v.regularizer is not None), 0.0)
            return model.run_prefix(image), penalty

        (z, penalty), penalties, new_state = stateless(run, trainable, state)
        return (z, ops.cast(penalty, "float32") * share + penalties), new_state

    def suffix(branch, trainable, z, offsets, moments=None):
        def run():
            with batch_moments(moments) as found:
                features, statistics = model.run_suffix(z, offsets, branch)
                return *head(features, branch), (statistics, found)

        (margin_loss, logits, embedding, found), penalties, new_state = stateless(run, trainable, before_suffix)
        return margin_loss, penalties, logits, embedding, (*found, new_state)

    # The part before the first perturbed stage, once.
    own_state = state
    (z, penalty), before_suffix, prefix_pullback = linearize(prefix, [trainable])

    # Clean: zero offsets as an input. The only pass whose state is kept.
    def clean(trainable, z, offsets):
        margin_loss, penalties, logits, embedding, found = suffix(model.branches.clean, trainable, z[0], offsets)
        return (margin_loss + penalties, logits, embedding), (margin_loss, penalties, *found)

    zeros = [ops.zeros((batch, 2 * stage.channels), "float32") for stage in stages]
    two_sided = bool(stages) and alignment.two_sided
    softmax = bool(stages) and model.uncertainty.search_loss == "softmax"
    as_clean = model.perturbed_norms == "own" and model.uncertainty.steps > 0  # the first direction is the clean pass's
    keep = two_sided or (softmax and as_clean)
    (_, logits, embedding), aux, clean_pullback = linearize(clean, [trainable, [z], zeros], keep=keep)
    clean_loss, penalties, statistics, moments, state = aux
    if not stages:
        gradients, (dz,) = clean_pullback([seed, None, None], [0, 1])
        losses = {"loss": clean_loss + penalty + penalties, "clean_loss": clean_loss}
        gradients = _add(gradients, prefix_pullback([dz, seed], [0])[0])
        state = _shared_seeds(state, own_state, shared_state)
        return StepResult(gradients, state, {k: backend.global_sum(v) for k, v in losses.items()}, logits, seed)
    slopes = None
    if softmax and as_clean:
        _, _, loss_pullback = linearize(lambda logits: ((margin_free(logits[0]),), None), [[logits]])
        ((d_logits,),) = loss_pullback([seed], [0])
        (slopes,) = clean_pullback([None, d_logits, None], [2])
    elif keep and as_clean:
        (slopes,) = clean_pullback([seed, None, None], [2])
    if not keep:
        gradients, (dz,), *first = clean_pullback([seed, None, None], [0, 1, 2] if as_clean else [0, 1])
        slopes = first[0] if first else None

    # Where each stage may move, where it starts, and the experiments' running means.
    def draw():
        uncertain = [s.uncertainty(m, experiment) for s, m in zip(stages, statistics, strict=True)]
        starts = [s.first_point(u, s.draw(u, batch), experiment) for s, u in zip(stages, uncertain, strict=True)]
        perturbed = stages[0].draw_perturbed(batch)
        active = [s.draw_active() * perturbed for s in stages]
        for stage, m in zip(stages, statistics, strict=True):
            stage.update_means(m, experiment)
        return uncertain, starts, active

    (uncertain, points, active), _, state = stateless(draw, trainable, state)
    (step_size, radius_share), _, _ = stateless(model.search_pace, trainable, state)
    lengths = [s.length(u) for s, u in zip(stages, uncertain, strict=True)]
    if radius_share is not None:
        lengths = [length * radius_share for length in lengths]
        points = [point * radius_share for point in points]

    def perturbation(points):
        pairs = zip(uncertain, points, active, strict=True)
        return [ops.stop_gradient(uncertainty.offsets(u, p) * a) for u, p, a in pairs]

    def ascend(points, slopes):
        triples = zip(stages, slopes, active, strict=True)
        slopes = [stage.shared_slopes(ops.where(acts > 0, slope, 0.0), experiment) for stage, slope, acts in triples]
        steps = zip(uncertain, points, slopes, lengths, strict=True)
        return [ops.stop_gradient(uncertainty.ascend(*step, step_size)) for step in steps]

    # The worst case: the first direction is there already, each further one is a pass that moves no state.
    def search(offsets):
        margin_loss, penalties, logits, *_ = suffix(model.branches.perturbed, trainable, z, offsets, moments)
        return (margin_free(logits) if softmax else margin_loss + penalties,), None

    for k in range(model.uncertainty.steps):
        if k or slopes is None:
            _, _, search_pullback = linearize(search, [perturbation(points) if k else zeros])
            (slopes,) = search_pullback([seed], [0])
        points = ascend(points, slopes)

    learned = model.uncertainty.learned_scale
    if learned:

        def stretched(log_scales):
            moved = [uncertainty.stretch(*each) for each in zip(uncertain, points, log_scales, strict=True)]
            triples = zip(uncertain, moved, active, strict=True)
            return tuple(uncertainty.offsets(u, p) * a for u, p, a in triples), None

        (log_scales, started), _, _ = stateless(model.learned_scales, trainable, state)
        worst, _, scale_pullback = linearize(stretched, [log_scales])
    else:
        worst = perturbation(points)

    # Perturbed: from z on, with the state and random masks of the clean pass; its own state is dropped.
    def perturbed(trainable, z, logits, embedding, worst):
        margin_loss, _, new_logits, new_embedding, _ = suffix(model.branches.perturbed, trainable, z[0], worst, moments)
        pair = (embedding[0], new_embedding) if alignment.on == "embeddings" else (logits[0], new_logits)
        average = mean if alignment.on == "logits" else _weighted_mean(batch, count, None)
        divergence = average(alignment.call(*pair))
        total = model.perturbed_weight * margin_loss + alignment.weight * divergence
        return (total,), (margin_loss, divergence)

    primals = [trainable, [z], [logits], [embedding], list(worst)]
    _, (perturbed_loss, divergence), pullback = linearize(perturbed, primals)
    sources = [0, 1, *([2, 3] if two_sided else []), *([4] if learned else [])]
    more, (more_dz,), *others = pullback([seed], sources)
    if two_sided:
        (d_logits,), (d_embedding,), *others = others
        gradients, (dz,) = clean_pullback([seed, d_logits, d_embedding], [0, 1])
    elif keep:
        gradients, (dz,) = clean_pullback([seed, None, None], [0, 1])
    first = prefix_pullback([dz + more_dz, seed], [0])[0]
    gradients = _add(_add(gradients, more), first)
    if learned:  # climbs what all others descend
        (slopes,) = scale_pullback(others[0], [0])
        climbs = {id(s.log_scale): ops.where(started > 0, -g, 0.0) for s, g in zip(stages, slopes, strict=True)}
        gradients = [climbs.get(id(v), g) for v, g in zip(model.trainable_variables, gradients, strict=True)]

    total = clean_loss + model.perturbed_weight * perturbed_loss + alignment.weight * divergence
    losses = {
        "loss": total + penalty + penalties,
        "clean_loss": clean_loss,
        "perturbed_loss": perturbed_loss,
        "alignment": divergence,
        "gain": perturbed_loss - clean_loss,
    }
    state = _shared_seeds(state, own_state, shared_state)
    return StepResult(gradients, state, {k: backend.global_sum(v) for k, v in losses.items()}, logits, seed)


class PenaltyScope(keras.StatelessScope):
    """A stateless scope that keeps every `add_loss` in `penalties`.

    When an outermost layer is called, Keras takes out of `scope.losses` what that layer added before, and knows it by
    the `id` of the tensor. A pass calls several outermost layers, and after a step such an `id` may have gone to
    another layer's penalty, which would be lost.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.penalties = []

    def add_loss(self, loss):
        self.penalties.append(loss)


def _stateless(model, function, trainable, state, share):
    """Runs a function with the given values of the variables: its result, this replica's share of the summed `add_loss`
    penalties, and the new state. By share of the samples, a penalty of the weights counts once, and the mean over a
    replica's samples as part of the mean over all."""
    variables = model.trainable_variables + model.non_trainable_variables
    mapping = zip(variables, [*trainable, *state], strict=True)
    with PenaltyScope(state_mapping=mapping, collect_losses=True) as scope:
        result = function()
    penalties = sum((ops.cast(ops.sum(loss), "float32") for loss in scope.penalties), ops.zeros((), "float32"))
    return result, penalties * share, [scope.get_current_value(v) for v in model.non_trainable_variables]


def _own_seeds(model, state):
    """The state with random masks of this replica's own, where Keras gives every replica the same ones."""
    if backend.replicas() == 1:
        return state
    seeds = {id(v) for v in model.mask_seeds()}
    pairs = zip(model.non_trainable_variables, state, strict=True)
    return [backend.fold_in_replica(value) if id(v) in seeds else value for v, value in pairs]


def _shared_seeds(state, own, shared):
    """The state with seeds that are the replicas' common ones again, as many draws later."""
    triples = zip(state, own, shared, strict=True)
    return [new if mine is common else new - mine + common for new, mine, common in triples]


def _weighted_mean(batch, count, sample_weight):
    """This replica's sum over the global number of samples: gradients summed over replicas are those of the mean."""
    weight = None if sample_weight is None else ops.reshape(ops.cast(sample_weight, "float32"), (batch,))

    def mean(values):
        return ops.sum(values if weight is None else values * weight) / count

    return mean


def _add(first, second):
    """Sums two lists of gradients; None where a variable is in neither graph."""
    pairs = zip(first, second, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]
