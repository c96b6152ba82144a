"""Builds over and over, each time killed (signal 9) before another of its steps, and then goes on with the same call.

`python kill_build.py SOURCE FOLDER HOW_MANY` prints a JSON list with, for each kill: the step, whether the call after
it gave the bytes of an unbroken build, and whether shards that were whole were left alone. A step is a call by which
the build reads a table, or changes something on disk: what lies between two of them leaves the same files behind. Each
build runs in a fork of this process, which so imports TensorFlow only once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import tfrecords.write as write
from tfrecords.build import build_records


def build(source, dest, kill_at=None):
    """Builds in a child; gives its steps, or None if it was killed."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        steps = []

        def step(what, path=""):
            if len(steps) == kill_at:
                os.write(send, json.dumps(f"{what} {os.path.basename(path)}").encode())
                os.kill(os.getpid(), signal.SIGKILL)
            steps.append(what)

        def audit(event, arguments):
            if event in ("open", "os.mkdir", "os.rename", "os.remove") and isinstance(arguments[0], str | Path):
                path = str(arguments[0])
                if path.startswith(str(dest)) or path.endswith(".csv"):
                    step(event.removeprefix("os."), path)

        sync, frame = os.fsync, write.frame
        os.fsync = lambda file: (step("sync"), sync(file))
        write.frame = lambda record: (step("record"), frame(record))[1]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.addaudithook(audit)
        build_records(source, dest)
        os.write(send, json.dumps(len(steps)).encode())
        os._exit(0)
    os.close(send)
    _, status = os.waitpid(child, 0)
    with open(receive, "rb") as file:
        answer = json.loads(file.read() or "null")
    if (kill_at is None) != (os.waitstatus_to_exitcode(status) == 0):
        raise RuntimeError(f"the build ended with {os.waitstatus_to_exitcode(status)}, killed at {kill_at}: {answer}")
    return answer


def content(dest):
    return {str(path.relative_to(dest)): path.read_bytes() for path in dest.rglob("*") if path.is_file()}


def main(source, folder, how_many):
    folder = Path(folder)
    total = build(source, folder / "unbroken")
    unbroken = content(folder / "unbroken")
    kills = []
    how_many = min(how_many, total)
    for number in range(how_many):
        dest = folder / f"killed-{number}"
        at = build(source, dest, total * number // how_many)
        shards = {path: path.stat().st_mtime_ns for path in dest.rglob("*.tfrecord")}
        build(source, dest)
        kept = all(path.stat().st_mtime_ns == before for path, before in shards.items())
        kills.append({"step": at, "equal": content(dest) == unbroken, "kept": kept, "shards": len(shards)})
    print(json.dumps(kills))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
