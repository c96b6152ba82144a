from types import SimpleNamespace

import pytest
from converge import Converge


def train(accuracies, **rule):
    """The learning rates of the epochs of a training whose accuracies are these, the last one for ever."""
    accuracies = iter(accuracies)
    last = [0.0]

    def accuracy():
        last[0] = next(accuracies, last[0])
        return last[0]

    options = {"warmup": 2, "patience": 2, "smooth": 1, "least": 3, "most": 10, "decay": 0.5} | rule
    converge = Converge(accuracy, 1.0, **options)
    converge.set_model(SimpleNamespace(optimizer=SimpleNamespace(learning_rate=None), stop_training=False))
    rates = []
    for epoch in range(converge.longest):
        converge.on_epoch_begin(epoch)
        rates.append(converge.model.optimizer.learning_rate)
        converge.on_epoch_end(epoch)
        if converge.model.stop_training:
            return converge, rates
    raise AssertionError("not stopped within `longest`")


def test_the_rate_rises_is_held_until_accuracy_rests_and_falls_to_nothing():
    converge, rates = train([0.1, 0.2, 0.3, 0.4, 0.4, 0.3])  # the best is epoch 3; two more make patience 2
    assert rates[:2] == [0.25, 0.75] and rates[2:6] == [1, 1, 1, 1]
    assert rates[6:] == [0.75, 0.25] and not converge.at_most
    assert converge.accuracies == [0.1, 0.2, 0.3, 0.4, 0.4, 0.3] and len(converge.seconds) == 8


def test_a_method_that_learns_slowly_is_given_more_epochs():
    slow = [i / 20 for i in range(9)]
    assert len(train(slow)[1]) > len(train([0.3])[1]) == 2 + 3 + 2


def test_smoothed_it_sees_a_rise_through_noise():
    rising = [0.1, 0.3, 0.1, 0.3, 0.2, 0.4, 0.2, 0.4]  # rising, but not from each best epoch to the next two
    assert len(train(rising, smooth=2)[0].accuracies) > len(train(rising, smooth=1)[0].accuracies)


def test_it_ends_at_most_and_says_so():
    converge, rates = train([i / 100 for i in range(99)])
    assert len(rates) == 2 + 10 + 5 and converge.at_most


@pytest.mark.parametrize("stretch", [1.5, 2.0])
def test_stretched_it_takes_so_many_times_the_steps_after_the_same_look(stretch):
    (_, rates), (_, longer) = (
        train([0.1] * 9, warmup=0, least=4),
        train([0.1] * 9, warmup=0, least=4, stretch=stretch),
    )
    assert len(longer) == stretch * len(rates) and longer.count(1) == stretch * 4
    assert train([0.1, 0.2], stretch=stretch)[0].accuracies == train([0.1, 0.2])[0].accuracies
