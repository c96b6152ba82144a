from keras_abra.losses.arcface import ArcFace, arcface_logits
from keras_abra.losses.cosface import CosFace, cosface_logits
from keras_abra.losses.distribution_alignment import (
    DistributionAlignment,
    coral,
    jensen_shannon,
    mmd,
    symmetric_kl,
)
from keras_abra.losses.softmax_cross_entropy import softmax_cross_entropy

__all__ = [
    "ArcFace",
    "CosFace",
    "DistributionAlignment",
    "arcface_logits",
    "coral",
    "cosface_logits",
    "jensen_shannon",
    "mmd",
    "softmax_cross_entropy",
    "symmetric_kl",
]
