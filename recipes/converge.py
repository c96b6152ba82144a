import math
import time

import keras


class Converge(keras.callbacks.Callback):
    """Trains as long as a method needs, then lets the learning rate fall: warm up, hold, decay.

    The rate rises over `warmup` epochs and is held until accuracy on the validation experiments, averaged over the last
    `smooth` epochs, has not been better than its best for `patience` epochs; then it falls linearly to 0 over `decay`
    times the epochs it was held, and training ends. So a method that learns slowly is given the epochs it takes, by the
    same rule as every other.

    Args:
        accuracy: function without arguments, accuracy on the validation experiments.
        rate: learning rate while held.
        warmup: epochs.
        patience: epochs.
        smooth: epochs; at a held rate the accuracy of single epochs is mostly noise (on the embedded screen it jumps
            between 0.1 and 0.3).
        least, most: bounds of the number of held epochs.
        decay: length of the fall, as a part of the held epochs.
        stretch: all is drawn out by this factor once it has converged: 2 gives twice the steps.

    Afterwards `accuracies` (from the first epoch to the last held), `seconds` (processor time of each epoch's
    training), `fall` and `end` (epochs) say what was done, and `at_most` whether it ended at the bound.
    """

    def __init__(self, accuracy, rate, warmup, patience, smooth, least, most, decay, stretch=1.0):
        super().__init__()
        self.accuracy, self.rate, self.warmup = accuracy, rate, warmup
        self.patience, self.smooth = patience, smooth
        self.least, self.most = least, most
        self.decay, self.stretch = decay, stretch
        self.best, self.since, self.fall, self.end, self.at_most = -math.inf, 0, None, None, False
        self.accuracies, self.seconds = [], []

    @property
    def longest(self):
        """More epochs than these it never takes."""
        return self.warmup + math.ceil(self.stretch * (self.most + 1) * (1 + self.decay)) + 2

    def on_epoch_begin(self, epoch, logs=None):
        rate = self.rate * min(1.0, (epoch + 0.5) / self.warmup if self.warmup else 1.0)
        if self.end is not None and epoch >= self.fall:
            rate = self.rate * (self.end - epoch - 0.5) / (self.end - self.fall)
        self.model.optimizer.learning_rate = rate
        self._start = time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.process_time() - self._start)
        if self.end is None:
            self._look(epoch + 1 - self.warmup)
        if self.end is not None and epoch + 1 >= self.end:
            self.model.stop_training = True

    def _look(self, held):
        self.accuracies.append(self.accuracy())
        recent = sum(self.accuracies[-self.smooth :]) / len(self.accuracies[-self.smooth :])
        self.since += 1
        if recent > self.best:
            self.best, self.since = recent, 0
        converged = self.since >= self.patience and held >= self.least
        if converged or held >= self.most:
            self.at_most = not converged
            self.fall = self.warmup + math.ceil(self.stretch * held)
            self.end = self.fall + math.ceil(self.stretch * self.decay * held)
