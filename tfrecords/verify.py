"""Checks every record of a finished folder, and mends it: `python -m tfrecords.verify DEST [--repair]`."""

import argparse
import sys

from tfrecords.check_folder import verify_records
from tfrecords.devices import keep_tensorflow_off_gpu
from tfrecords.manifest import read_manifest
from tfrecords.parallel import add_workers
from tfrecords.repair import repair_records


def main(argv=None):
    """The command line; returns the exit status: 0 if all is well, at last, 1 if a fault stays."""
    parser = argparse.ArgumentParser(prog="python -m tfrecords.verify", description=__doc__)
    parser.add_argument("dest", help="folder of records")
    parser.add_argument("--repair", action="store_true", help="write the damaged files anew, from the source")
    parser.add_argument("--source", help="folder to repair from (default: the one that the records were built from)")
    add_workers(parser)
    arguments = parser.parse_args(argv)
    keep_tensorflow_off_gpu()
    try:
        faults = verify_records(arguments.dest, arguments.workers)
        for fault in faults:
            print(fault)
        if faults and arguments.repair:
            mended, faults = repair_records(arguments.dest, arguments.source, arguments.workers, faults)
            print(f"Repaired {len(mended)} of the files: {', '.join(mended) or 'none'}.")
            for fault in faults:
                print(f"not repaired: {fault}")
        manifest = read_manifest(arguments.dest)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shards = manifest["shards"]
    print(
        f"{arguments.dest}: {len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'} in {len(shards):,} files with "
        f"{sum(shard['count'] for shard in shards):,} records, {sum(shard['bytes'] for shard in shards) / 1e6:,.1f} MB."
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
