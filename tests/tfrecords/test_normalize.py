import numpy as np
import pandas as pd
import pytest

from tfrecords.listing import list_sites
from tfrecords.normalize import channel_statistics
from tfrecords.read import read_records

BOTH = ("treatment", "control")


def expected(sites, pixels_of):
    pixels = np.stack([pixels_of(site_id) for site_id in sites["site_id"]]).astype(np.float64)
    return pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))


def columns(table, what):
    return table[[f"{what}_{channel}" for channel in range(1, 7)]].to_numpy()


@pytest.mark.parametrize(
    "group, keys", [(None, []), ("experiment", ["experiment"]), ("plate", ["experiment", "plate"])]
)
def test_statistics_are_those_of_all_pixels_of_a_group(records_tree, pixels_of, group, keys):
    sites = list_sites(records_tree, "train", BOTH)
    table = channel_statistics(records_tree, "train", group=group)
    groups = sites.groupby(keys) if keys else [(0, sites)]
    assert len(table) == (2 if keys else 1) and [name for name in table.index.names if name] == keys
    for (_, part), (_, row) in zip(groups, table.iterrows(), strict=True):
        mean, deviation = expected(part, pixels_of)
        assert row["sites"] == len(part)
        np.testing.assert_allclose(columns(row.to_frame().T, "mean")[0], mean, rtol=1e-12)
        np.testing.assert_allclose(columns(row.to_frame().T, "std")[0], deviation, rtol=1e-12)


def test_a_plate_is_normalized_by_its_negative_controls(records_tree, pixels_of):
    controls = list_sites(records_tree, "val", "control").query("well_type == 'negative_control'")
    table = channel_statistics(records_tree, "val", group="plate", well_types="negative_control")
    assert table["sites"].tolist() == [2] and len(controls) == 2
    mean, deviation = expected(controls, pixels_of)
    for images, _, metadata in read_records(records_tree, "val", batch_size=3, normalize=table, metadata=True):
        raw = np.stack([pixels_of(site_id.decode()) for site_id in metadata["site_id"].numpy()])
        np.testing.assert_allclose(images, (raw - mean) / deviation, atol=1e-5)


def test_splits_of_the_same_plates_are_taken_together(records_tree, pixels_of):
    both = [list_sites(records_tree, split, BOTH) for split in ("train", "id_test")]
    table = channel_statistics(records_tree, ["train", "id_test"], group="plate")
    sites = pd.concat(both)
    for (key, part), (other, row) in zip(sites.groupby(["experiment", "plate"]), table.iterrows(), strict=True):
        mean, deviation = expected(part, pixels_of)
        assert key == other and row["sites"] == len(part) > (both[0][["experiment", "plate"]] == key).all(axis=1).sum()
        np.testing.assert_allclose(columns(row.to_frame().T, "mean")[0], mean, rtol=1e-12)
        np.testing.assert_allclose(columns(row.to_frame().T, "std")[0], deviation, rtol=1e-12)


def test_each_experiment_has_mean_0_and_deviation_1_by_its_own_statistics(records_tree):
    table = channel_statistics(records_tree, "train", group="experiment")
    data = read_records(records_tree, "train", batch_size=8, kinds=BOTH, normalize=table, metadata=True)
    images, _, metadata = next(iter(data))
    for experiment in ("HUVEC-01", "RPE-01"):
        own = images.numpy()[metadata["experiment"].numpy() == experiment.encode()].astype(np.float64)
        np.testing.assert_allclose(own.mean((0, 1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(own.std((0, 1, 2)), 1, rtol=1e-6)


def test_a_flat_channel_gives_0_and_the_statistics_of_train_serve_all(records_tree):
    table = channel_statistics(records_tree, "train")
    table["std_2"] = 0.0
    images, _ = next(iter(read_records(records_tree, "test", batch_size=4, normalize=table)))
    assert (images.numpy()[..., 1] == 0).all() and (images.numpy()[..., 0] != 0).any()


def test_what_cannot_be_is_refused(records_tree):
    table = channel_statistics(records_tree, "train", group="plate")
    with pytest.raises(ValueError, match=r"no row for experiment HUVEC-17, plate 1 \(site 'HUVEC-17_1_B0.*the split"):
        read_records(records_tree, "val", batch_size=2, normalize=table)
    with pytest.raises(ValueError, match="Unknown group 'well'. Expected 'experiment', 'plate', or None"):
        channel_statistics(records_tree, "train", group="well")
    with pytest.raises(ValueError, match="no wells of the types .'empty'"):
        channel_statistics(records_tree, "train", well_types=("empty",))
    joined = pd.concat([table, channel_statistics(records_tree, "id_test", group="plate")])
    with pytest.raises(ValueError, match=r"several rows for experiment HUVEC-01, plate 1.*together"):
        read_records(records_tree, "train", batch_size=2, normalize=joined)


def test_a_table_of_unknown_channels_is_taken_at_its_word(records_tree):
    table = channel_statistics(records_tree, "train", group="experiment")
    assert table.attrs["channels"] == ["1", "2", "3", "4", "5", "6"]
    table.attrs = {}  # as of another release, of a CSV file, or made by hand
    one, other = (
        next(iter(read_records(records_tree, "train", batch_size=4, normalize=normalize)))[0].numpy()
        for normalize in (table, channel_statistics(records_tree, "train", group="experiment"))
    )
    np.testing.assert_array_equal(one, other)
