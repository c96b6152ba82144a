from keras_abra.models.abra_model import ABRAModel

__all__ = ["ABRAModel"]
