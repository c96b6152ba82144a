import keras
from keras import ops

from contenders.experiment_risks import risks_of


class GroupDRO(keras.layers.Layer):
    """Group distributionally robust optimization with experiments as groups, as an objective of `ObjectiveModel`.

        q_e <- q_e exp(step_size R_e) for the experiments of the mini-batch, then q / sum(q);   L = sum of q_e R_e

    with `q` a state of the objective, constant to the gradient. Sagawa et al., "Distributionally Robust Neural
    Networks", ICLR 2020, algorithm 1; WILDS's `GroupDRO`.

    Args:
        num_experiments: int.
        step_size: of the weights. Default: DomainBed's and WILDS's, 0.01.
    """

    def __init__(self, num_experiments, step_size=0.01, **kwargs):
        super().__init__(**kwargs)
        self.num_experiments, self.step_size = num_experiments, step_size
        uniform = keras.initializers.Constant(1.0 / num_experiments)
        self.shares = self.add_weight(
            shape=(num_experiments,), initializer=uniform, dtype="float32", trainable=False, name="shares"
        )
        self.built = True

    def call(self, logits, embedding, labels, experiments):
        risks, _ = risks_of(logits, labels, experiments, self.num_experiments)
        growth = self.step_size * ops.stop_gradient(risks)  # absent: risk 0, factor 1
        shares = ops.softmax(ops.log(self.shares) + growth)  # the same, and finite at any step size
        self.shares.assign(shares)
        return ops.sum(shares * risks)
