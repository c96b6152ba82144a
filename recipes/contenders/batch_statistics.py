"""Batch statistics at test time: AdaBN, and the test time of BEN. Both take the images of an experiment together."""

import numpy as np

from keras_abra.perturbed_norms import MeasuredNorm, replace_norms


def with_batch_statistics(network):
    """The network, with the same weights, normalizing every mini-batch by that mini-batch's own statistics."""
    return replace_norms(network, MeasuredNorm)


def predict_by_group(network, images, groups):
    """Output of `with_batch_statistics(network)`, each group taken whole, in the order of the images.

    With experiments as groups this is AdaBN (Li et al., "Revisiting Batch Normalization For Practical Domain
    Adaptation", ICLR Workshop 2017), re-estimated on all of an experiment, and the test time of BEN (Lin & Lu, bioRxiv
    2022.10.14.512286), whose training takes batches of one experiment, `tfrecords.batches_within("experiment")` (their
    code: of one plate; so the Kaggle competition's fifth). It uses no labels, but an experiment's images
    together: transductive, to be reported apart.

    Args:
        network: what `with_batch_statistics` gives, with one output.
        images: `(samples, height, width, channels)`.
        groups: `(samples,)`, the group of each.
    """
    groups = np.asarray(groups)
    outputs = np.zeros((len(images), *network.output_shape[1:]), "float32")
    for group in np.unique(groups):
        outputs[groups == group] = network.predict_on_batch(images[groups == group])
    return outputs
