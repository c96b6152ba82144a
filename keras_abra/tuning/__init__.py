"""Tuning `ABRAModel` with KerasTuner: `pip install "keras-abra[tune]"`."""

from keras_abra.tuning.durable_search import DurableSearch
from keras_abra.tuning.hyper_model import ABRAHyperModel
from keras_abra.tuning.project import repair_project

__all__ = ["ABRAHyperModel", "DurableSearch", "repair_project"]
