"""The start of a training run, counted in optimizer steps and saved with the model."""

import keras
from keras import ops


class Ramp(keras.layers.Layer):
    """Two numbers in one non-trainable weight: the optimizer steps taken, and the length of the ramp in steps.

    While `steps < length` the margin is `steps / length` of the whole and the adversary has not started.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.progress = self.add_weight(
            shape=(2,),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            aggregation="only_first_replica",
            name="progress",
        )
        self.built = True

    def start(self, length):
        """Sets the length in optimizer steps, unless the ramp has begun: a resumed run keeps its own. Steps that were
        taken before there was a length are none of it."""
        if not self.has_begun():
            taken = 0.0 if length else ops.convert_to_numpy(self.progress)[0]
            self.progress.assign([taken, float(length)])

    def has_begun(self):
        """Whether a length above 0 was set, and a step taken since."""
        return bool(ops.convert_to_numpy(self.progress).all())

    def advance(self, steps):
        """Adds optimizer steps (a tensor: skipped and accumulated steps do not count)."""
        taken, length = self.progress[0], self.progress[1]
        self.progress.assign(ops.stack([taken + ops.cast(steps, "float32"), length]))

    def margin_factor(self):
        """Share of the whole margin, in [0, 1]."""
        return ops.minimum(
            ops.where(self.progress[1] > 0, self.progress[0] / ops.maximum(self.progress[1], 1.0), 1.0), 1.0
        )

    def is_multiple(self, number):
        """1.0 in every `number`-th optimizer step, the first one included, else 0.0."""
        return ops.cast(self.progress[0] % number == 0, "float32")

    def adversary_started(self):
        """1.0 once the ramp has ended, else 0.0."""
        return ops.cast(self.progress[0] >= self.progress[1], "float32")
