import keras


def replace_norms(model, make):
    """The same network with other batch normalizations; every other layer is shared, not copied.

    Args:
        model: Functional or Sequential `keras.Model`, its sub-models too.
        make: function of a `BatchNormalization` that gives the layer to stand in its place.

    Returns:
        A new `keras.Model`.
    """

    def clone(layer):
        return make(layer) if isinstance(layer, keras.layers.BatchNormalization) else layer

    return keras.models.clone_model(model, clone_function=clone, recursive=True)


def twin(layer, kind=keras.layers.BatchNormalization, **changes):
    """A built layer of the configuration and with the weights of this batch normalization, under a name of its own."""
    config = {**layer.get_config(), "name": f"{layer.name}_twin", **changes}
    copy = kind.from_config(config)
    rank, channels = layer.input_spec.ndim, layer.moving_mean.shape[0]
    copy.build((*[None] * (rank - 1), channels))
    copy.set_weights(layer.get_weights())
    return copy
