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


def twin(layer):
    """A batch normalization of its own, with the configuration and the weights that this one has now."""
    copy = keras.layers.BatchNormalization.from_config({**layer.get_config(), "name": f"{layer.name}_twin"})
    copy.build((*[None] * (layer.input_spec.ndim - 1), layer.moving_mean.shape[0]))
    copy.set_weights(layer.get_weights())
    return copy
