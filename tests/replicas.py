"""Devices of one process, for tests of `MirroredStrategy`: one training step on several replicas, on one device, and on
one device with the replicas' parts one after another."""

import functools
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_abra import backend, uncertainty
from keras_abra.layers import FeatureStatisticsUncertainty
from tests.recording import RecordingOptimizer


@functools.cache  # strategies on the same devices would give their collectives the same keys, and these mix
def mirrored(number, collectives=False, kind="CPU"):
    """A strategy with that many replicas; without collectives, which are threads that wait for each other and slow in
    eager steps, sums are made on the first device."""
    import tensorflow as tf

    class Strategy(tf.distribute.MirroredStrategy):
        _collective_key_base = 100_000 * (2 * number + collectives)  # as TensorFlow's own tests put strategies apart

    devices = [d.name for d in tf.config.list_logical_devices(kind)[:number]]
    return Strategy(devices, None if collectives else tf.distribute.ReductionToOneDevice())


def two_replicas():
    return mirrored(2, collectives=True)


class Step(NamedTuple):
    """What one `fit` left: the last gradients that the optimizer took, after reduction; the values of the non-trainable
    variables, one for each replica; the history; the model."""

    gradients: list
    state: list
    history: dict
    model: Any


def pipeline(x, y, batch):
    import tensorflow as tf

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA  # between processes
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch).with_options(options)


def set_values(model):
    """Values for every variable but seeds and ramp, the same in every process and strategy; every experiment seen."""
    random = np.random.default_rng(0)
    for v in model.variables:
        noise = random.normal(size=v.shape).astype("float32")
        if v.path.endswith("gamma"):
            v.assign(1 + 0.4 * noise)
        elif "moving_variance" in v.path or "experiments_seen" in v.path:
            v.assign(np.ones(v.shape))
        elif "seed" not in v.path and "progress" not in v.path:
            v.assign(0.4 * noise)


def train(strategy, build, x, y, batch=None, eagerly=True, optimizer=RecordingOptimizer):
    """Builds under the strategy, sets the values, fits once over the data (one batch unless said otherwise)."""
    with strategy.scope():
        model = build()
        set_values(model)
        recording = optimizer()
        loss = {} if hasattr(model, "ramp") else {"loss": "sparse_categorical_crossentropy"}
        model.compile(optimizer=recording, metrics=["accuracy"], run_eagerly=eagerly, **loss)
    history = model.fit(pipeline(x, y, batch or len(y)), verbose=0, shuffle=False).history
    values = [strategy.experimental_local_results(v.value) for v in model.non_trainable_variables]
    state = [[local.numpy() for local in replicas] for replicas in values]
    return Step(getattr(recording, "inner_optimizer", recording).recorded(), state, history, model)


def draw_by_sample(monkeypatch, first=0, shared=False):
    """Starts of the search that are functions of a sample's place in the global batch, counted from `first`; `shared`:
    of its place in the replica's part."""

    def draw(self, uncertain, batch):
        columns = uncertain.coordinates
        place = ops.arange(batch)
        if not shared:
            everybody = backend.global_rows(ops.convert_to_tensor([batch]))
            place = place + ops.sum(everybody[: backend.fold_in_replica(ops.zeros(2, "int64"))[0] // 1000003])
        place, column = ops.cast(first + place, "float32"), ops.cast(ops.arange(columns), "float32")
        coordinates = ops.cos(3.1 * place[:, None] + 1.7 * column[None])
        if self.radius is None:
            return coordinates
        return uncertainty.rescale(uncertain, coordinates, self.length(uncertain))

    monkeypatch.setattr(FeatureStatisticsUncertainty, "draw", draw)


def one_after_another(monkeypatch, replicas, build, x, y):
    """The `Step` of each replica's part on one device, given the spread over all parts, and the rows that the alignment
    compares of all parts: three rounds, of which the second knows the spreads and the third the rows too."""
    import tensorflow as tf

    rows, spread, gather = len(y) // replicas, FeatureStatisticsUncertainty.uncertainty, backend.global_rows
    statistics, seen, calls = {}, [], []

    def record(self, found, experiment=None):
        statistics.setdefault(self.name, []).append(found)
        return alone(self, found, experiment)

    def given(self, found, experiment=None):
        return alone(self, ops.concatenate(statistics[self.name]), experiment)

    def alone(*args):
        look, backend.global_rows = backend.global_rows, gather  # these are no rows of the alignment
        try:
            return spread(*args)
        finally:
            backend.global_rows = look

    def record_rows(own):
        if own.dtype == tf.float32:  # not the replicas' numbers of samples
            seen[-1].append(tf.stop_gradient(own))
        return own

    def given_rows(own):
        if own.dtype != tf.float32:
            return own
        place, call = len(calls) - 1, calls[-1]
        calls[-1] += 1
        parts = [found[call] for found in seen[replicas:]]
        # of the mean of the parts' gradients this is one, of the sum of what the rows give it is the whole
        parts[place] = parts[place] + replicas * (own - tf.stop_gradient(own))
        return tf.concat(parts, axis=0)

    steps = []
    for measure, look in ((record, record_rows), (given, record_rows), (given, given_rows)):
        monkeypatch.setattr(FeatureStatisticsUncertainty, "uncertainty", measure)
        calls.clear()
        for first in range(0, len(y), rows):
            seen.append([]) if look is record_rows else calls.append(0)
            draw_by_sample(monkeypatch, first)
            monkeypatch.setattr(backend, "global_rows", look)
            part = {name: value[first : first + rows] for name, value in x.items()}
            steps.append(train(tf.distribute.get_strategy(), build, part, y[first : first + rows]))
            monkeypatch.setattr(backend, "global_rows", gather)
    monkeypatch.setattr(FeatureStatisticsUncertainty, "uncertainty", spread)
    assert all(count == len(found) for count, found in zip(calls, seen[replicas:], strict=True))
    return steps[-replicas:]


def distance(found, expected):
    """Largest relative difference of the gradients of a variable, small ones measured by 1e-3 of the whole."""
    whole = np.sqrt(sum(np.sum(np.square(e)) for e in expected))
    pairs = zip(found, expected, strict=True)
    return max(np.linalg.norm(f - e) / max(np.linalg.norm(e), 1e-3 * whole) for f, e in pairs)
