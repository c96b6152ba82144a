from keras_abra.layers.cosine_head import CosineHead
from keras_abra.layers.feature_statistics_uncertainty import FeatureStatisticsUncertainty

__all__ = ["CosineHead", "FeatureStatisticsUncertainty"]
