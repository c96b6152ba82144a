from keras import ops


def restyle(inputs, mean, deviation, new_mean, new_deviation):
    """`(inputs - mean) / deviation * new_deviation + new_mean` for each sample and channel.

    Args:
        inputs: feature map `(batch, height, width, channels)`.
        mean, deviation, new_mean, new_deviation: `(batch, channels)`, float32.

    Returns:
        The map with its new statistics, in the type of `inputs`.
    """
    ratio = new_deviation / deviation
    offset = new_mean - mean * ratio
    outputs = ops.cast(inputs, "float32") * ratio[:, None, None, :] + offset[:, None, None, :]
    return ops.cast(outputs, inputs.dtype)
