import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.losses import softmax_cross_entropy
from tests.gradients import gradient

LOGITS = np.random.default_rng(3).normal(size=(4, 5)).astype("float32")
LABELS = np.array([0, 4, 2, 2])


def test_is_keras_sparse_categorical_cross_entropy():
    expected = keras.losses.sparse_categorical_crossentropy(LABELS, LOGITS, from_logits=True)
    actual = softmax_cross_entropy(LABELS, LOGITS)
    np.testing.assert_allclose(ops.convert_to_numpy(actual), ops.convert_to_numpy(expected), rtol=1e-5)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_is_finite_at_extreme_logits(size):
    logits = np.array([[size, -size, 0.0]], "float32")
    assert np.isfinite(ops.convert_to_numpy(softmax_cross_entropy([1], logits))).all()
    assert np.isfinite(gradient(lambda z: softmax_cross_entropy([1], z), logits)).all()


def test_a_label_that_is_no_class_is_nan_without_gradient():
    y = np.array([0, 5, -1, 2])
    np.testing.assert_array_equal(np.isnan(ops.convert_to_numpy(softmax_cross_entropy(y, LOGITS))), [0, 1, 1, 0])
    slope = gradient(lambda z: softmax_cross_entropy(y, z), LOGITS)
    assert (slope[1:3] == 0.0).all() and (slope[[0, 3]] != 0.0).all()


def test_one_hot_rows_are_the_numbers_of_the_classes():
    numbers, rows = (ops.convert_to_numpy(softmax_cross_entropy(y, LOGITS)) for y in (LABELS, np.eye(5)[LABELS]))
    np.testing.assert_array_equal(numbers, rows)


def test_of_shares_it_is_keras_categorical_cross_entropy():
    shares = 0.3 * np.eye(5, dtype="float32")[LABELS] + 0.7 * np.eye(5, dtype="float32")[LABELS[::-1]]
    expected = keras.losses.categorical_crossentropy(shares, LOGITS, from_logits=True)
    actual = softmax_cross_entropy(shares, LOGITS)
    np.testing.assert_allclose(ops.convert_to_numpy(actual), ops.convert_to_numpy(expected), rtol=1e-5)


def test_shares_that_are_none_are_nan_without_gradient():
    shares = np.array([[0.5, 0.5, 0, 0, 0], [1, 1, 0, 0, 0], [1.5, -0.5, 0, 0, 0], [np.nan, 1, 0, 0, 0]], "float32")
    np.testing.assert_array_equal(np.isnan(ops.convert_to_numpy(softmax_cross_entropy(shares, LOGITS))), [0, 1, 1, 1])
    slope = gradient(lambda z: softmax_cross_entropy(shares, z), LOGITS)
    assert (slope[1:] == 0.0).all() and (slope[0] != 0.0).all()


def test_shares_of_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"shares of the classes of shape \(batch, 5\). Received: shape \(4, 6\)"):
        softmax_cross_entropy(np.eye(6)[LABELS], LOGITS)
