import math

import keras


class NonFiniteLossError(FloatingPointError):
    """Training was stopped because the loss became NaN or infinite.

    Attributes:
        epoch: epoch, from 0, as `fit` counts.
        step: last step of the epoch, from 0, that had been run. With `steps_per_execution` > 1 the fault may lie up to
            that many steps before.
    """

    def __init__(self, epoch, step, value):
        self.epoch, self.step = epoch, step
        super().__init__(
            f"The training loss became {value} in epoch {epoch}, step {step} (both from 0); training was stopped "
            "and the weights are not to be used. Usual causes: a label outside [0, num_classes), images that are not "
            "standardized or hold NaN, a learning rate that is too high, a margin or scale too large for the warm-up."
        )


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Raises `NonFiniteLossError` after the first step whose running loss is not finite."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        value = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(value):
            raise NonFiniteLossError(self.epoch, batch, value)
