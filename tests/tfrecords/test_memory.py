import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from tfrecords.memory import keep_freed_memory
kept = len(sys.argv) > 1 and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = 40 * 2**20
for _ in range(3):
    bytearray(size)
before = faults()
for _ in range(20):
    bytearray(size)
print(kept, faults() - before)
"""


def run(*arguments):
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    kept, faults = result.stdout.split()
    return kept == "True", int(faults)


def test_pages_are_used_again():
    kept, faults = run("keep")
    if not kept:
        pytest.skip("there is no glibc")
    kept, without = run()
    assert not kept and without >= 20 * 10  # at least one for each huge page of each array
    assert faults < 0.1 * without


def test_elsewhere_it_does_nothing(monkeypatch):
    from tfrecords import memory

    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
