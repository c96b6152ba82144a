import keras
from keras import ops

from contenders.annealed import AnnealedPenalty
from contenders.experiment_risks import mean_over_present, risks_of


class VREx(keras.layers.Layer):
    """Risk extrapolation by the variance of the experiments' risks, as an objective of `ObjectiveModel`.

        L = mean of R_e + weight * mean of (R_e - mean of R_e)^2      over the experiments e of the mini-batch

    Krueger et al. (arXiv 2003.00688); DomainBed's `VREx`, which also restarts Adam when the weight jumps.

    Args:
        num_experiments: int.
        weight: of the variance. Default: DomainBed's, 10.
        anneal_steps: steps at weight 1 before. Default: DomainBed's, 500.
    """

    def __init__(self, num_experiments, weight=10.0, anneal_steps=500, **kwargs):
        super().__init__(**kwargs)
        self.num_experiments = num_experiments
        self.penalty_weight = AnnealedPenalty(weight, anneal_steps)
        self.built = True

    def call(self, logits, embedding, labels, experiments):
        risks, present = risks_of(logits, labels, experiments, self.num_experiments)
        mean = mean_over_present(risks, present)
        return mean + self.penalty_weight.next_weight() * mean_over_present(ops.square(risks - mean), present)
