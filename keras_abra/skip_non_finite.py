import warnings

import keras

from keras_abra.non_finite_loss import NonFiniteLossError


class SkipNonFinite(keras.callbacks.Callback):
    """Makes the `fit` of an `ABRAModel` leave out steps whose loss or gradient is NaN or infinite, and counts them.

    After such a step weights, optimizer, moving statistics, running means, ramp, metrics and the seeds of all noise are
    as if it had not been; the data go on, so that the next batch meets the noise that was meant for this one. The log
    `skipped` has the number of such steps in the epoch. A warning names epoch and step. An overflow of float16, which
    a loss scale answers by itself, does not count. With `steps_per_execution`, those of one execution count as in a
    row, and its last step is named. In a `ResumableRun` it belongs among the callbacks of that.

    Args:
        most: so many in a row are let pass, one more stops. Default 10.
        explain: optional function of (epoch, step), both from 0, whose text ends the warning: say, the sites of the
            step.

    Raises:
        NonFiniteLossError: after `most` + 1 steps in a row.
        ValueError: if the model is no `ABRAModel`.
    """

    def __init__(self, most=10, explain=None):
        super().__init__()
        self.most, self.explain = most, explain
        self.in_a_row = self.epoch = self.in_epoch = 0

    def set_model(self, model):
        if not hasattr(model, "skip_non_finite"):
            raise ValueError(f"SkipNonFinite needs an ABRAModel, whose step can be left out. Received: {model!r}")
        super().set_model(model)

    def on_train_begin(self, logs=None):
        self.in_a_row = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.in_epoch = epoch, 0

    def on_train_batch_end(self, batch, logs=None):
        strategy = getattr(self._model, "distribute_strategy", None)  # whose replicas' mean TensorFlow gives here
        skipped = round(float(logs["skipped"]) * getattr(strategy, "num_replicas_in_sync", 1))
        if skipped == self.in_epoch:
            self.in_a_row = 0
            return
        self.in_a_row += skipped - self.in_epoch
        self.in_epoch = skipped
        if self.in_a_row > self.most:
            what = f"The loss or a gradient was not finite {self.in_a_row} steps in a row, the last"
            raise NonFiniteLossError(self.epoch, batch, what)
        more = f" {self.explain(self.epoch, batch)}" if self.explain else ""
        warnings.warn(
            f"The loss or a gradient was not finite in epoch {self.epoch}, step {batch} (both from 0): the step was "
            f"left out.{more}",
            stacklevel=2,
        )
