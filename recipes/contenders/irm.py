import keras
from keras import ops

from contenders.annealed import AnnealedPenalty
from contenders.experiment_risks import experiment_risks, mean_over_present, one_hot, risks_of
from keras_abra.losses.softmax_cross_entropy import shares_of


class IRM(keras.layers.Layer):
    """Invariant risk minimization, IRMv1, as an objective of `ObjectiveModel`.

        L = mean over e of [ R_e + weight * g_e1 g_e2 ],   g = d/dw R(w z) at w = 1 = mean of (sum_k p_k z_k - z_y)

    with `R_e` the softmax risk of experiment e, `z` the logits, `p` their softmax, and `g_e1`, `g_e2` over the samples
    of e at even and odd places: their product estimates the square without bias. The derivative has this closed form,
    so that no second differentiation is needed. Arjovsky et al. (arXiv 1907.02893); DomainBed's `IRM`, which also
    restarts Adam when the weight jumps; here it goes on.

    Args:
        num_experiments: int.
        weight: of the penalty. Default: DomainBed's, 100; WILDS's for RxRx1 is 1.
        anneal_steps: steps at weight 1 before. Default: both's, 500.
    """

    def __init__(self, num_experiments, weight=100.0, anneal_steps=500, **kwargs):
        super().__init__(**kwargs)
        self.num_experiments = num_experiments
        self.penalty_weight = AnnealedPenalty(weight, anneal_steps)
        self.built = True

    def call(self, logits, embedding, labels, experiments):
        risks, present = risks_of(logits, labels, experiments, self.num_experiments)
        penalty = irm_penalty(logits, labels, experiments, self.num_experiments)
        return mean_over_present(risks + self.penalty_weight.next_weight() * penalty, present)


def irm_penalty(logits, labels, experiments, num_experiments):
    """`g_e1 g_e2` of each experiment, `(num_experiments,)`; 0 with fewer than two samples."""
    shares, logits = shares_of(labels, logits)
    slope = ops.sum(ops.softmax(logits, axis=-1) * logits - shares * logits, axis=-1)
    members = one_hot(experiments, num_experiments)
    place = ops.sum((ops.cumsum(members, axis=0) - 1.0) * members, axis=-1)
    odd = place - 2.0 * ops.floor(place / 2.0)
    halves = []
    for half in (1.0 - odd, odd):
        total, _ = experiment_risks(slope * half, experiments, num_experiments)
        share, _ = experiment_risks(half, experiments, num_experiments)
        halves.append(total / ops.where(share > 0, share, 1.0))
    return halves[0] * halves[1]
