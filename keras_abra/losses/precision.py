import keras


def full_precision(dtype):
    """The dtype a loss of this package hands to `keras.losses.Loss`: float32 unless float64 is asked for.

    `Loss.__call__` casts predictions *and labels* to that dtype before `call` sees them, so that half precision would
    lose the angles (and every label above 2048 in float16) before the float32 arithmetic begins.
    """
    policy = keras.dtype_policies.get("float32" if dtype is None else dtype)
    if policy.compute_dtype not in ("float32", "float64"):
        raise ValueError(
            f"This loss is computed in float32: `dtype` must be None, 'float32' or 'float64'. "
            f"Received: dtype={dtype!r}. "
            f"Leave it None under a mixed-precision policy: half-precision inputs are cast up."
        )
    return policy.compute_dtype
