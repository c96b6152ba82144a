from keras import ops


def reverse_gradient(x, weight=1.0):
    """The value of x (but for rounding), and `-weight` times its gradient.

    Ganin & Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015. Written as
    `stop_gradient((1 + weight) x) - weight x`, so that every backend differentiates it.
    """
    return ops.stop_gradient((1.0 + weight) * x) - weight * x
