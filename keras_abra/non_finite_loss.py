import math

import keras


class NonFiniteLossError(FloatingPointError):
    """Training was stopped because the loss or a gradient became NaN or infinite.

    Attributes:
        epoch: epoch, from 0, as `fit` counts.
        step: last step of the epoch, from 0, that had been run. With `steps_per_execution` > 1 the fault may lie up to
            that many steps before.
    """

    def __init__(self, epoch, step, what):
        self.epoch, self.step, self._what = epoch, step, what
        super().__init__(
            f"{what} in epoch {epoch}, step {step} (both from 0); training was stopped and the weights are not to be "
            "used. Usual causes: a label outside [0, num_classes), images that are not standardized or hold NaN, a "
            "sample weight of NaN, a learning rate that is too high, a margin or scale too large for the warm-up."
        )

    def __reduce__(self):  # from a process to another
        return type(self), (self.epoch, self.step, self._what)


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Raises `NonFiniteLossError` after the first step whose running loss is not finite. The loss that an `ABRAModel`
    logs is NaN for a gradient too."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        logs = logs or {}
        value = float(logs.get("loss", 0.0))
        if not math.isfinite(value):
            parts = [float(logs[name]) for name in ("clean_loss", "perturbed_loss", "alignment") if name in logs]
            only_gradient = parts and all(map(math.isfinite, parts))
            what = "A gradient became NaN or infinite" if only_gradient else f"The training loss became {value}"
            raise NonFiniteLossError(self.epoch, batch, what)
