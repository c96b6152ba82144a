"""Which site goes into which shard, at which place: decided before anything is written."""

import hashlib
import urllib.parse
from typing import NamedTuple

# 256 sites are 400 MB at RxRx1's 512 x 512 x 6 and 50 MB at WILDS's 256 x 256 x 3.
SITES_PER_SHARD = 256


class Shard(NamedTuple):
    """One file to write: `name` below the destination, and the ids of its sites in order."""

    name: str
    split: str
    experiment: str
    kind: str
    site_ids: tuple


def plan_shards(sites, seed=0, sites_per_shard=SITES_PER_SHARD):
    """Plans the shards. A pure function: the order of the rows does not matter, nor does any other state.

    A shard's sites are of one split, one experiment and one kind, `treatment` or `control` (positive and negative), so
    that each of these can be read by itself. Sites are put in the order of a hash of seed and site id: random to the
    eye, equal on every machine and release of NumPy, and hardly changed when a site is added.

    Args:
        sites: table with `site_id`, `split`, `experiment` and `well_type`.
        seed: integer.
        sites_per_shard: most sites in a file; files of a group differ by at most one site.

    Returns:
        List of `Shard` sorted by name, such as `train/HUVEC-01_treatment_00000-of-00002.tfrecord`.
    """
    shards = []
    kind = sites["well_type"].map(lambda value: "treatment" if value == "treatment" else "control")
    for (split, experiment, group), rows in sites.groupby(["split", "experiment", kind], sort=True):
        ids = sorted(rows["site_id"], key=lambda site_id: (_draw(seed, site_id), site_id))
        count = -(-len(ids) // sites_per_shard)
        for i in range(count):
            part = ids[len(ids) * i // count : len(ids) * (i + 1) // count]
            # RxRx1's names stay as they are; of others, what a file's name cannot hold is written as %XX.
            stem = urllib.parse.quote(str(experiment), safe="")
            name = f"{split}/{stem}_{group}_{i:05d}-of-{count:05d}.tfrecord"
            shards.append(Shard(name, split, experiment, group, tuple(part)))
    return sorted(shards)


def hash_plan(shards):
    """A short text that tells two plans apart."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update("\t".join([shard.name, *shard.site_ids]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _draw(seed, site_id):
    return hashlib.blake2b(f"{seed}/{site_id}".encode(), digest_size=8).digest()
