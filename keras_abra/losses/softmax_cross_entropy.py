from keras import ops

ADD_UP = 0.01  # how far from 1 the sum of a sample's shares may be


def class_shares(y_true, num_classes):
    """Share of each class in each sample, float32 `(batch, num_classes)`: rows with a single 1 for class numbers, the
    labels themselves where they are shares; a row without 1 for a number that is no class.

    Class numbers are compared, not gathered by: a label outside [0, num_classes), a fraction or NaN finds no column on
    any backend, where a gather would crash, wrap or clamp. They are compared in float32, as `keras.losses.Loss` hands
    them over, exact up to 2^24 classes.

    Args:
        y_true: class numbers, integers of any dtype (or floats of integer value), `(batch,)` or `(batch, 1)`; or shares
            `(batch, num_classes)`, one-hot or of several classes.
        num_classes: int.

    Raises:
        ValueError: if the labels have another shape.
    """
    labels = ops.convert_to_tensor(y_true, dtype="float32")
    if len(labels.shape) == 2 and labels.shape[-1] == num_classes and num_classes > 1:
        return labels
    if len(labels.shape) == 2 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    if len(labels.shape) != 1:
        raise ValueError(
            "Labels must be class numbers of shape (batch,) or (batch, 1), or shares of the classes of shape (batch, "
            f"{num_classes}). Received: shape {tuple(labels.shape)}."
        )
    return ops.cast(ops.equal(labels[:, None], ops.arange(num_classes, dtype="float32")[None, :]), "float32")


def shares_of(y_true, values):
    """`(class_shares, values in float32)` for values `(batch, num_classes)`; ValueError when the two do not fit."""
    values = ops.cast(ops.convert_to_tensor(values), "float32")
    if len(values.shape) != 2 or values.shape[-1] is None:
        raise ValueError(
            f"Predictions must have shape (batch, num_classes) with num_classes known. Received: shape "
            f"{tuple(values.shape)}."
        )
    shares = class_shares(y_true, values.shape[-1])
    labels, samples = shares.shape[0], values.shape[0]
    if labels is not None and samples is not None and labels != samples:
        raise ValueError(f"Every sample needs one label. Received: {labels} labels for {samples} predictions.")
    return shares, values


def softmax_cross_entropy(y_true, logits):
    """Cross-entropy of each sample in float32, NaN where the label is none.

        L_i = - sum_k y_ik log( exp(z_ik) / sum_j exp(z_ij) )

    with `z` the logits and `y` the share of each class: 1 for the true class and 0 for the others, or those of a mixed
    sample (CutMix, mixup). It is what ArcFace and CosFace compute on their margin logits; on `scale * cosine` it is the
    margin-free loss.

    A class number outside [0, num_classes), or shares that are negative or do not add up to 1 (to 0.01), give that
    sample a NaN loss and no gradient, on every backend: the mean of the batch becomes NaN and a `TerminateOnNaN` sees
    it, while the other samples' gradients stay what they were.

    Args:
        y_true: class numbers, `(batch,)` or `(batch, 1)`, or shares `(batch, num_classes)`.
        logits: `(batch, num_classes)`.

    Returns:
        `(batch,)`, float32.

    Raises:
        ValueError: if labels or logits have another shape or do not fit each other.

    Example:

    >>> import numpy as np
    >>> from keras_abra.losses import softmax_cross_entropy
    >>> loss = softmax_cross_entropy(np.array([0, 7]), np.zeros((2, 4), "float32"))
    >>> [round(float(value), 4) for value in loss]
    [1.3863, nan]
    """
    shares, logits = shares_of(y_true, logits)
    good = ops.logical_and(ops.all(shares >= 0, axis=-1), ops.abs(ops.sum(shares, axis=-1) - 1.0) <= ADD_UP)
    counted = ops.logical_and(shares > 0, good[:, None])
    shares = ops.where(counted, shares, 0.0)  # NaN times a slope of 0 is NaN
    loss = -ops.sum(ops.where(counted, shares * ops.log_softmax(logits, axis=-1), 0.0), axis=-1)
    return ops.where(good, loss, float("nan"))
