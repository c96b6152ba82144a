import keras
from keras import ops

from contenders.gradient_reversal import reverse_gradient
from keras_abra.losses import softmax_cross_entropy


class DANN(keras.layers.Layer):
    """Embeddings from which a discriminator cannot tell the experiment, as an objective of `ObjectiveModel`.

        L = cross-entropy of the class + cross-entropy of the experiment, from embeddings with reversed gradient

    The discriminator descends its loss, the network behind the embedding climbs it, times `weight`. Ganin et al.,
    "Domain-Adversarial Training of Neural Networks", JMLR 2016, in one step and with constant weight; the discriminator
    is DomainBed's, three layers of 256.

    Args:
        num_experiments: int.
        dim: size of the embedding.
        weight: of the reversed gradient. Default: DomainBed's, 1.
        width: of the discriminator. Default: DomainBed's, 256.
    """

    def __init__(self, num_experiments, dim, weight=1.0, width=256, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight
        hidden = [keras.layers.Dense(width, activation="relu") for _ in range(2)]
        self.discriminator = keras.Sequential([*hidden, keras.layers.Dense(num_experiments)], name="discriminator")
        self.discriminator.build((None, dim))
        self.built = True

    def call(self, logits, embedding, labels, experiments):
        guess = self.discriminator(reverse_gradient(embedding, self.weight))
        return ops.mean(softmax_cross_entropy(labels, logits)) + ops.mean(softmax_cross_entropy(experiments, guess))
