import keras
import numpy as np


def gradient(function, x):
    """d sum(function(x)) / dx as a NumPy array, on whatever backend Keras runs; zero where nothing depends on x."""
    x = keras.ops.convert_to_tensor(x)
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(x)
                y = keras.ops.sum(function(x))
            slope = tape.gradient(y, x, unconnected_gradients="zero")
        case "jax":
            import jax

            slope = jax.grad(lambda x: keras.ops.sum(function(x)))(x)
        case "torch":
            import torch

            x = x.detach().clone().requires_grad_(True)
            y = keras.ops.sum(function(x))
            slope = torch.zeros_like(x)
            if y.requires_grad:
                slope = torch.autograd.grad(y, x, allow_unused=True, materialize_grads=True)[0]
    return keras.ops.convert_to_numpy(slope)


def finite_difference(function, x, step=1e-6):
    """The same for a float64 NumPy function, by central differences."""
    x = np.asarray(x, "float64")
    slope = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (np.sum(function(up)) - np.sum(function(down))) / (2 * step)
    return slope


def gradients(function, tensors):
    """d function(tensors) / d tensors of a scalar function of a list of tensors, as NumPy arrays; zero where none."""
    tensors = [keras.ops.convert_to_tensor(tensor) for tensor in tensors]
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = function(tensors)
            slopes = tape.gradient(value, tensors, unconnected_gradients="zero")
        case "jax":
            import jax

            slopes = jax.grad(function)(tensors)
        case "torch":
            import torch

            tensors = [tensor.detach().clone().requires_grad_(True) for tensor in tensors]
            value = function(tensors)
            slopes = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    return [keras.ops.convert_to_numpy(slope) for slope in slopes]
