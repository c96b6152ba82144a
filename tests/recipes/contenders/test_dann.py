import keras
import numpy as np
from contenders.dann import DANN
from contenders.objective_model import ObjectiveModel
from keras import ops

from tests.recipes.contenders.reference import EMBEDDING, EXPERIMENTS, IDS, LABELS, LOGITS, losses


def test_both_cross_entropies_are_added():
    objective = DANN(EXPERIMENTS, 3, width=4)
    guess = ops.convert_to_numpy(objective.discriminator(EMBEDDING)).astype("float64")
    domain = np.log(np.exp(guess).sum(1)) - guess[np.arange(11), IDS]
    found = float(objective(LOGITS, EMBEDDING, LABELS, IDS))
    np.testing.assert_allclose(found, losses().mean() + domain.mean(), rtol=1e-4)


def test_the_embedding_climbs_what_the_discriminator_descends():
    """The change of the embedding's weights by the domain loss is `-weight` times that of plain descent."""
    changes = {}
    for weight in (-1.0, 0.0, 2.0):  # -1: no reversal
        keras.utils.set_random_seed(0)
        image = keras.Input((3,))
        embedding = keras.layers.Dense(3, name="embedding")(image)
        network = keras.Model(image, [keras.layers.Dense(5)(embedding), embedding])
        model = ObjectiveModel(network, DANN(EXPERIMENTS, 3, weight=weight, width=4))
        model.compile(keras.optimizers.SGD(0.01))
        before = network.get_layer("embedding").get_weights()[0]
        hidden = model.objective.discriminator.get_weights()[0]
        model.train_on_batch({"image": EMBEDDING, "experiment": IDS}, LABELS)
        changes[weight] = network.get_layer("embedding").get_weights()[0] - before
        assert np.abs(model.objective.discriminator.get_weights()[0] - hidden).max() > 0
    plain = changes[-1.0] - changes[0.0]
    assert np.abs(plain).max() > 1e-5
    np.testing.assert_allclose(changes[2.0] - changes[0.0], -2 * plain, rtol=1e-2, atol=1e-7)
