from keras import ops


def true_class(y_true, num_classes):
    """Boolean mask (batch, num_classes) of each sample's class; a row without True for a label that is no class.

    Labels are compared, not gathered by: a label outside [0, num_classes), a fraction or NaN finds no column on any
    backend, where a gather would crash, wrap or clamp. They are compared in float32, as `keras.losses.Loss` hands them
    over, exact up to 2^24 classes.

    Args:
        y_true: labels, integers of any dtype (or floats of integer value), `(batch,)` or `(batch, 1)`.
        num_classes: int.

    Raises:
        ValueError: if the labels have another shape, for example one-hot rows.
    """
    labels = ops.convert_to_tensor(y_true, dtype="float32")
    if len(labels.shape) == 2 and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, axis=-1)
    if len(labels.shape) != 1:
        raise ValueError(
            f"Labels must be class numbers of shape (batch,) or (batch, 1). Received: shape {tuple(labels.shape)}. "
            f"Turn one-hot labels into numbers with keras.ops.argmax(y, axis=-1)."
        )
    return ops.equal(labels[:, None], ops.arange(num_classes, dtype="float32")[None, :])


def classes_of(y_true, values):
    """`(true_class mask, values in float32)` for values `(batch, num_classes)`; ValueError when the two do not fit."""
    values = ops.cast(ops.convert_to_tensor(values), "float32")
    if len(values.shape) != 2 or values.shape[-1] is None:
        raise ValueError(
            f"Predictions must have shape (batch, num_classes) with num_classes known. Received: shape "
            f"{tuple(values.shape)}."
        )
    mask = true_class(y_true, values.shape[-1])
    labels, samples = mask.shape[0], values.shape[0]
    if labels is not None and samples is not None and labels != samples:
        raise ValueError(f"Every sample needs one label. Received: {labels} labels for {samples} predictions.")
    return mask, values


def softmax_cross_entropy(y_true, logits):
    """Cross-entropy of each sample in float32, NaN where the label is no class.

        L_i = - log( exp(z_i[y_i]) / sum_k exp(z_i[k]) )

    with `z` the logits and `y` the labels. It is what ArcFace and CosFace compute on their margin logits; on
    `scale * cosine` it is the margin-free loss.

    A label outside [0, num_classes) gives that sample a NaN loss and no gradient, on every backend: the mean of the
    batch becomes NaN and a `TerminateOnNaN` sees it, while the other samples' gradients stay what they were.

    Args:
        y_true: labels, `(batch,)` or `(batch, 1)`.
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
    mask, logits = classes_of(y_true, logits)
    loss = -ops.sum(ops.where(mask, ops.log_softmax(logits, axis=-1), 0.0), axis=-1)
    return ops.where(ops.any(mask, axis=-1), loss, float("nan"))
