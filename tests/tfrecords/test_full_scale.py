"""The plan of all of RxRx1, rebuilt from the real tables that RXRX1_SAMPLE names; no images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfrecords.sources import COLUMNS, read_sites

pytestmark = pytest.mark.skipif(
    "RXRX1_SAMPLE" not in os.environ, reason="RXRX1_SAMPLE does not name a folder with real files of RxRx1"
)
# A process of its own, whose memory and time are those of the plan alone: VmHWM, since ru_maxrss may be that of the
# parent, and the time on the one core that it uses, imports included, whatever else the machine does.
SCRIPT = """
import json, sys, time
from tfrecords.channels import find_missing
from tfrecords.labels import class_map
from tfrecords.leaks import check_splits, find_repeats
from tfrecords.plan import hash_plan, plan_shards
from tfrecords.sources import read_sites
from tfrecords.splits import assign_splits, count_splits

sites = read_sites(sys.argv[1])
classes = class_map(sites)
sites["split"] = assign_splits(sites)
check_splits(sites)
repeats = find_repeats(sites)
missing = find_missing(sys.argv[1], sites)
shards = plan_shards(sites)
experiments = sites.groupby("split")["experiment"].nunique()
of_kind = {}
for shard in shards:
    key = f"{shard.split} {shard.kind}"
    of_kind[key] = of_kind.get(key, 0) + len(shard.site_ids)
kinds = sites.drop_duplicates("well_id").groupby(["dataset", "well_type"]).size()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "sites": len(sites), "wells": sites["well_id"].nunique(), "splits": count_splits(sites["split"]),
    "experiments": experiments.to_dict(), "plates": len(sites[["experiment", "plate"]].drop_duplicates()),
    "wells_of": {" ".join(key): int(count) for key, count in kinds.items()},
    "train_of": sites[sites["split"] == "train"]["cell_type"].value_counts().to_dict(),
    "classes": len(classes), "treatments": sum(row["treatment"] for row in classes),
    "missing": int((missing != "").sum()), "repeats": len(repeats), "of_kind": of_kind,
    "planned": sum(len(shard.site_ids) for shard in shards), "largest": max(len(shard.site_ids) for shard in shards),
    "plan": hash_plan(shards), "shuffled": hash_plan(plan_shards(sites.sample(frac=1, random_state=0))),
    "tensorflow": "tensorflow" in sys.modules, "seconds": time.process_time(),
    "megabytes": int(peak.split()[1]) / 1e3,
}))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """metadata.csv of RxRx1's release, but for the labels that Kaggle withheld."""
    folder = tmp_path_factory.mktemp("full")
    sites = read_sites(Path(os.environ["RXRX1_SAMPLE"]) / "kaggle-2019")
    sites[[*COLUMNS]].to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_the_plan_of_all_sites_has_the_official_counts_within_10_seconds_and_400_megabytes(release):
    command = [sys.executable, "-c", SCRIPT, str(release)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"plan: {found['seconds']:.1f} s, {found['megabytes']:.0f} MB")
    assert (found["sites"], found["wells"], found["plates"]) == (125_510, 62_755, 204)
    assert found["splits"] == {"train": 40_612, "id_test": 40_612, "val": 9_854, "test": 34_432}
    assert found["experiments"] == {"train": 33, "id_test": 33, "val": 4, "test": 14}
    assert found["train_of"] == {"HUVEC": 19_671, "RPE": 8_623, "HEPG2": 8_622, "U2OS": 3_696}
    assert found["wells_of"] == {
        "train treatment": 36_515, "train positive_control": 3_944, "train negative_control": 153,
        "test treatment": 19_897, "test positive_control": 2_153, "test negative_control": 93,
    }  # fmt: skip
    assert (found["classes"], found["treatments"]) == (1_139, 1_108)
    assert found["planned"] == 125_510 == found["missing"] and found["largest"] <= 256
    assert found["of_kind"]["train treatment"] == 36_515 and found["of_kind"]["train control"] == 4_097
    assert found["of_kind"]["val treatment"] == 2 * 4_431 and found["of_kind"]["test treatment"] == 2 * 15_466
    assert found["repeats"] == 32
    assert found["plan"] == found["shuffled"]
    assert not found["tensorflow"]
    assert found["seconds"] <= 10 and found["megabytes"] <= 400
