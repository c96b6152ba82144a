import keras
from keras import ops

from keras_abra.losses import ArcFace, softmax_cross_entropy


class WinnerLoss(keras.layers.Layer):
    """`0.8 CE + 0.2 ArcFace` on one embedding with two heads, as an objective of `ObjectiveModel`.

        L = (1 - share) * cross-entropy(logits) + share * ArcFace(cosine)

    The logits' head gives the answer. First place of RxRx1's Kaggle competition (kaggle-rcic-1st, model.py); its
    ArcFace loss is halved inside, which is `share` 0.11 here and a factor on all.

    Args:
        margin, scale: of ArcFace. Default: theirs, 0.5 radians and 30.
        share: of the margin loss. Default: theirs, 0.2.
    """

    def __init__(self, margin=0.5, scale=30.0, share=0.2, **kwargs):
        super().__init__(**kwargs)
        self.margin_loss, self.share = ArcFace(margin, scale), share
        self.built = True

    def call(self, logits, cosine, labels, experiments=None):
        plain = ops.mean(softmax_cross_entropy(labels, logits))
        return (1.0 - self.share) * plain + self.share * ops.mean(self.margin_loss.call(labels, cosine))
