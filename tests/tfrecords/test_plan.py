import pytest

from tfrecords.plan import hash_plan, plan_shards
from tfrecords.sources import read_sites
from tfrecords.splits import assign_splits


@pytest.fixture
def sites(release_tree):
    sites = read_sites(release_tree)
    sites["split"] = assign_splits(sites)
    return sites


def test_each_site_is_planned_once(sites):
    planned = [site_id for shard in plan_shards(sites) for site_id in shard.site_ids]
    assert sorted(planned) == sorted(sites["site_id"])


def test_the_plan_does_not_depend_on_row_order(sites):
    for seed in range(3):
        shuffled = sites.sample(frac=1, random_state=seed).reset_index(drop=True)
        assert plan_shards(shuffled, seed=7) == plan_shards(sites, seed=7)


def test_the_seed_changes_the_order_and_not_the_groups(sites):
    first, second = plan_shards(sites, seed=0), plan_shards(sites, seed=1)
    assert [set(shard.site_ids) for shard in first] == [set(shard.site_ids) for shard in second]
    assert first != second and hash_plan(first) != hash_plan(second)


def test_a_shard_is_of_one_split_one_experiment_and_one_kind(sites):
    table = sites.set_index("site_id")
    for shard in plan_shards(sites, sites_per_shard=3):
        rows = table.loc[list(shard.site_ids)]
        assert set(rows["split"]) == {shard.split} and set(rows["experiment"]) == {shard.experiment}
        assert set(rows["well_type"] == "treatment") == {shard.kind == "treatment"}


def test_shards_are_even_and_their_names_sort_and_tell(sites):
    names = {shard.name: len(shard.site_ids) for shard in plan_shards(sites, sites_per_shard=3)}
    assert list(names) == sorted(names)
    assert names["test/HUVEC-18_treatment_00000-of-00002.tfrecord"] == 2
    assert names["test/HUVEC-18_treatment_00001-of-00002.tfrecord"] == 2
    assert names["train/RPE-01_control_00000-of-00001.tfrecord"] == 2


def test_leaving_a_site_out_leaves_the_order_of_the_others(sites):
    before = plan_shards(sites)
    gone = before[0].site_ids[0]
    after = plan_shards(sites[sites["site_id"] != gone])
    assert after[0].site_ids == before[0].site_ids[1:] and after[1:] == before[1:]


def test_any_experiment_has_a_file_name_and_rxrx1s_stay_as_they_are(sites):
    renamed = sites.assign(experiment=sites["experiment"].replace({"RPE-01": "2024/03 ünï", "HUVEC-17": ".."}))
    names = {shard.name for shard in plan_shards(renamed)}
    assert "train/2024%2F03%20%C3%BCn%C3%AF_control_00000-of-00001.tfrecord" in names
    assert "val/.._control_00000-of-00001.tfrecord" in names and all(name.count("/") == 1 for name in names)
    assert "train/HUVEC-01_control_00000-of-00001.tfrecord" in names
