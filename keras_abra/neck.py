import keras


def embedding_neck(features, embedding_dim, dtype=None, synchronized=False):
    """BatchNormalization-Dense-BatchNormalization from pooled features to the embedding, after RxRx1 practice.

    The Dense layer has no bias, which the normalization behind it would cancel; the moving statistics have momentum
    0.9, that of the PyTorch networks the practice comes from (0.1 there). The first place of RxRx1's Kaggle
    competition has one Dense layer and a ReLU more (kaggle-rcic-1st: BN-FC-ReLU-BN-FC-BN, 1,024).

    Args:
        features: size of the pooled features.
        embedding_dim: size of the embedding.
        dtype: dtype policy of the layers. Default: the global one.
        synchronized: as in `keras.layers.BatchNormalization`: whether to normalize over all replicas (TensorFlow only).

    Returns:
        A built `keras.Sequential`, `(batch, features)` to `(batch, embedding_dim)`.
    """
    norm = {"momentum": 0.9, "synchronized": synchronized, "dtype": dtype}
    neck = keras.Sequential(
        [
            keras.layers.BatchNormalization(**norm, name="neck_norm1"),
            keras.layers.Dense(embedding_dim, use_bias=False, dtype=dtype, name="neck_dense"),
            keras.layers.BatchNormalization(**norm, name="neck_norm2"),
        ],
        name="neck",
    )
    neck.build((None, features))
    return neck
