import keras
from keras import ops


class AnnealedPenalty(keras.layers.Layer):
    """The weight of a penalty: 1 for the first steps, then `weight`, as IRM's and V-REx's code has it.

    DomainBed does so for 500 steps of a pretrained network, and then starts its optimizer anew, which is left out here.

    Args:
        weight: >= 0, of the penalty.
        anneal_steps: number of training steps with weight 1.
    """

    def __init__(self, weight, anneal_steps, **kwargs):
        super().__init__(**kwargs)
        self.weight, self.anneal_steps = weight, anneal_steps
        self.steps = self.add_weight(shape=(), initializer="zeros", dtype="float32", trainable=False, name="steps")
        self.built = True

    def next_weight(self):
        """The weight of this step, which is counted."""
        done = self.steps + 0.0
        self.steps.assign(done + 1.0)
        return ops.where(done < self.anneal_steps, 1.0, self.weight)
