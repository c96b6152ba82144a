from keras import ops

from keras_abra.losses import softmax_cross_entropy


def experiment_risks(losses, experiments, num_experiments):
    """Mean loss of each experiment in the mini-batch.

    Args:
        losses: `(batch,)`.
        experiments: int `(batch,)`, in `[0, num_experiments)`.
        num_experiments: int.

    Returns:
        `(risks, present)`, each `(num_experiments,)`: the means, 0 where an experiment is not there, and 1 or 0.
    """
    members = one_hot(experiments, num_experiments)
    counts = ops.sum(members, axis=0)
    return ops.matmul(losses[None, :], members)[0] / ops.maximum(counts, 1.0), ops.cast(counts > 0, "float32")


def one_hot(experiments, num_experiments):
    """`(batch, num_experiments)`, float32."""
    return ops.one_hot(ops.cast(ops.reshape(experiments, (-1,)), "int32"), num_experiments, dtype="float32")


def mean_over_present(values, present):
    """Mean of the values of experiments that are in the mini-batch."""
    return ops.sum(values * present) / ops.maximum(ops.sum(present), 1.0)


def risks_of(logits, labels, experiments, num_experiments):
    """`experiment_risks` of the softmax cross-entropy."""
    return experiment_risks(softmax_cross_entropy(labels, logits), experiments, num_experiments)
