"""Batch statistics at test time: AdaBN, and the test time of BEN. Both take the images of an experiment together."""

import keras
import numpy as np

from contenders.replace_norms import replace_norms, twin


class BatchStatisticsNorm(keras.layers.BatchNormalization):
    """Batch normalization by the mini-batch at hand, in inference too; its moving statistics never move."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=True, mask=mask)


def with_batch_statistics(network):
    """The network, normalizing every mini-batch it is given by that mini-batch's own statistics."""
    return replace_norms(network, lambda layer: twin(layer, BatchStatisticsNorm, momentum=1.0))


def predict_by_group(network, images, groups):
    """Outputs of `network` with the batch statistics of each group taken whole, in the order of the images.

    With experiments as groups this is AdaBN (Li et al., "Revisiting Batch Normalization For Practical Domain
    Adaptation", ICLR Workshop 2017), re-estimated on all of an experiment, and the test time of BEN (Lin & Lu, bioRxiv
    2022.10.14.512286), whose training takes batches of one experiment: `tfrecords.batches_within("experiment")`. It
    uses no labels, but an experiment's images together: transductive, to be reported apart.

    Args:
        network: Functional `keras.Model` with one output.
        images: `(samples, height, width, channels)`.
        groups: `(samples,)`, the group of each.
    """
    adaptive, groups = with_batch_statistics(network), np.asarray(groups)
    outputs = np.zeros((len(images), *network.output_shape[1:]), "float32")
    for group in np.unique(groups):
        outputs[groups == group] = adaptive.predict_on_batch(images[groups == group])
    return outputs
