import keras
from keras import ops

from keras_abra import backend


class Embedder(backend.Replicated, keras.Model):
    """The inference network of an `ABRAModel` up to the L2-normalized embedding."""

    def __init__(self, model):
        super().__init__(name="embedder", dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.built = True

    def call(self, inputs):
        image, _ = self.model.unpack_inputs(inputs)
        embedding, _ = self.model.embed_features(self.model.backbone(image, training=False), training=False)
        return ops.normalize(embedding, axis=-1)


def run_alike(part, model):
    """A model made of another one's layers, to be run as that one is: eagerly or compiled."""
    if model.compiled:
        part.run_eagerly, part.jit_compile = model.run_eagerly, model.jit_compile
    return part
