"""What a training of the ladder is fed, method by method."""

import ladder_screens
import numpy as np
import pytest
from ladder_contenders import build_contender, more_compute
from ladder_methods import method_settings
from ladder_screens import batch_filled, groups_together, screen_records, training_data

from keras_abra import step_cost
from tfrecords import list_sites

SCREEN = {"seed": 7, "batch_effect": 1.0, "image_size": 24, "treatments": 8, "train": 4, "val": 1, "test": 1}
CLASSES = 8


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return screen_records(tmp_path_factory.mktemp("screens"), SCREEN)


def batches(records, method, experiments=False):
    settings = method_settings(method, batch_size=8)
    return [*training_data(records, settings, 3, CLASSES, experiments).as_numpy_iterator()]


@pytest.mark.any_backend
@pytest.mark.parametrize("method, group", [("ben", "experiment"), ("ben_plate", "plate")])
def test_ben_has_mini_batches_of_one_experiment_or_plate(records, method, group):
    sites = list_sites(records, "train")
    found = []
    for images, labels in batches(records, method, experiments=True):
        for number in set(images["experiment"].tolist()):
            rows = sites[(sites["experiment"] == sorted(set(sites["experiment"]))[number])]
            assert len(set(images["experiment"].tolist())) == 1
            plates = rows.set_index(rows["label"].astype(int))["plate"]
            found.append((number, sorted({int(plates[label]) for label in labels}), len(labels)))
    assert len({number for number, *_ in found}) == 4
    filled = batch_filled(records, method_settings(method, batch_size=8), len(found))
    assert filled == (0.25 if group == "plate" else 1)
    if group == "plate":  # whole plates, smaller than the mini-batch
        every = [(number, plate) for number in range(4) for plate in range(1, 5)]
        assert sorted((number, plates[0]) for number, plates, _ in found) == every
        assert all(len(plates) == 1 and size == 2 for _, plates, size in found)
    else:
        assert all(plates == [1, 2, 3, 4] and size == 8 for _, plates, size in found)
    together = groups_together(sites, method_settings(method))
    assert together.nunique() == len(found)
    for _, rows in sites.groupby(together.to_numpy()):
        assert rows["experiment"].nunique() == 1 and rows["plate"].nunique() == (1 if group == "plate" else 4)


@pytest.mark.any_backend
def test_mixtures_have_the_images_of_plain_training_mixed_and_soft_labels(records):
    plain = batches(records, "erm")
    for method in ("mixup", "cutmix"):
        soft = [labels for _, labels in batches(records, method)]
        assert len(soft) == len(plain)
        for (images, numbers), (mixed, labels) in zip(plain, batches(records, method), strict=True):
            np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-5)
            assert mixed.shape == images.shape and labels.shape == (8, CLASSES)
            assert all(labels[i, number] > 0 or labels[i].max() == 1 for i, number in enumerate(numbers))
        assert any(((labels > 0.01) & (labels < 0.99)).any() for labels in soft), method
    kept = [(a[0] == b[0]).all(-1).mean() for a, b in zip(plain, batches(records, "cutmix"), strict=True)]
    assert 0 < np.mean(kept) < 1  # a box of another image, the rest the image itself


@pytest.mark.any_backend
@pytest.mark.parametrize("method, alpha", [("mixup", 0.7), ("cutmix", 0.1)])
def test_mixtures_are_drawn_with_the_alpha_of_the_settings(records, monkeypatch, method, alpha):
    asked = []
    monkeypatch.setattr(ladder_screens, "mix_batches", lambda data, *args, **options: asked.append((*args, options)))
    training_data(records, method_settings(method, batch_size=8, alpha=alpha), 3, CLASSES, False)
    assert asked == [(getattr(ladder_screens, method), CLASSES, 3, {"alpha": alpha})]


@pytest.mark.any_backend
def test_gain_and_bias_come_after_standardization_for_each_channel(records):
    for (images, labels), (moved, same) in zip(batches(records, "erm"), batches(records, "gain_and_bias"), strict=True):
        np.testing.assert_array_equal(labels, same)
        gains = []
        for before, after in zip(images, moved, strict=True):
            for channel in range(6):
                gain, bias = np.polyfit(before[..., channel].ravel(), after[..., channel].ravel(), 1)
                np.testing.assert_allclose(after[..., channel], gain * before[..., channel] + bias, atol=1e-4)
                gains.append(gain)
        assert 0.03 < np.std(gains) < 0.3


@pytest.mark.parametrize("method", ["erm_more", "arcface_more", "dsu_more"])
def test_more_steps_are_as_many_times_as_a_step_of_abra_costs(method):
    settings = method_settings(method, width=8, embedding_dim=6)
    abra = build_contender(method_settings("abra", width=8, embedding_dim=6), (24, 24, 6), 4, ["RPE"], 2).model
    assert more_compute(settings, (24, 24, 6), 4, 2) == pytest.approx(step_cost(abra))
    assert 1.5 < step_cost(abra) < 2  # 1 + f
    assert more_compute(method_settings(method.removesuffix("_more")), (24, 24, 6), 4, 2) == 1
