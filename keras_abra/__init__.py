"""Keras layers, losses and a model that stay right in experiments they have not seen: see `ABRAModel`."""

from keras_abra import layers, losses
from keras_abra.ada_bn import ada_bn
from keras_abra.backbone_cut import cut_backbone, valid_cuts
from keras_abra.compute_cost import multiply_adds, step_cost, suffix_share
from keras_abra.models import ABRAModel
from keras_abra.neck import embedding_neck
from keras_abra.non_finite_loss import NonFiniteLossError
from keras_abra.resumable_run import ResumableRun
from keras_abra.skip_non_finite import SkipNonFinite
from keras_abra.version import __version__

__all__ = [
    "ABRAModel",
    "NonFiniteLossError",
    "ResumableRun",
    "SkipNonFinite",
    "__version__",
    "ada_bn",
    "cut_backbone",
    "embedding_neck",
    "layers",
    "losses",
    "multiply_adds",
    "step_cost",
    "suffix_share",
    "valid_cuts",
]
