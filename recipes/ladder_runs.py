"""The trainings of a ladder, and the folder that has a file of each that is finished."""

import hashlib
import json
import os
import platform
import re
import time

import keras
from ladder_report import describe_commit
from worker_processes import processes

from tfrecords.whole import write_whole

# What settings do not say: methods whose code was mended since trainings of them were kept. A setting, its value, and
# the number of the code: another cell.
_MENDED = (("head", "adv_bn", 2), ("batch_statistics", True, 2))  # slope of the search; what TVN is made of


def make_cell(method, settings, screen, seed, plan, splits):
    grouped = settings.get("normalize", "image") != "image"  # once, of each split's own images alone: other cells
    mended = [number for name, value, number in _MENDED if settings.get(name) == value]
    return {
        **({"statistics": "of all splits"} if grouped else {}),
        **({"code": mended} if mended else {}),
        "method": method,
        "settings": settings,
        "screen": screen,
        "seed": seed,
        "rule": plan["rule"],
        "splits": splits,
        "backend": keras.backend.backend(),
    }


def cell_file(output, cell):
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]
    method = re.sub(r"[^a-z0-9_.]+", "-", cell["method"])
    return output / "cells" / f"{method}-screen{cell['screen']['seed']}-seed{cell['seed']}-{digest}.json"


def read_result(output, cell):
    """The result of a finished cell."""
    return json.loads(cell_file(output, cell).read_text())["result"]


def run_cells(cells, args):
    """Runs what is not there yet, the screens first; every result is written whole or not at all."""
    files = {cell_file(args.output, cell): cell for cell in cells}  # the same trial twice is one
    missing = [cell for file, cell in files.items() if not file.exists()]
    print(f"{len(files)} trainings, {len(files) - len(missing)} of them done before", flush=True)
    commit = describe_commit()
    kept = [json.loads(file.read_text())["result"].get("commit") for file in files if file.exists()]
    if others := {other for other in kept if other not in (None, commit)}:
        print(
            f"Taken as they are, though trained by other code: {sum(c in others for c in kept)}, of {', '.join(others)}"
        )
    screens = {json.dumps(cell["screen"], sort_keys=True): cell["screen"] for cell in missing}
    start, maker = time.monotonic(), {"commit": commit, "machine": describe_machine(args.workers)}
    with processes(
        args.workers if missing else 1
    ) as run:  # also for a single one: with all threads sums round otherwise
        for _ in run(prepare_screen, [(args.output, screen, args.data) for screen in screens.values()]):
            pass
        for done, line in enumerate(run(finish_cell, [(args.output, cell, maker) for cell in missing]), 1):
            left = (time.monotonic() - start) / done * (len(missing) - done)
            print(f"[{done}/{len(missing)}, {left / 60:.0f} min left] {line}", flush=True)


def prepare_screen(task):
    from ladder_screens import screen_records

    output, screen, data = task
    return screen_records(output / "screens", screen, data)


def finish_cell(task):
    """Runs one cell and writes its file; gives a line to print."""
    from ladder_cell import run_cell

    output, cell, maker = task
    file = cell_file(output, cell)
    try:
        result = run_cell(cell, output / "screens") | maker
    except ValueError as error:
        raise ValueError(f"{file.stem}: {error}") from error
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"cell": cell, "result": result})
    accuracies = ", ".join(f"{split} {100 * found['accuracy']:.1f}" for split, found in result["splits"].items())
    return f"{file.stem}: {accuracies} % after {result['epochs']} epochs"


def describe_machine(workers):
    threads = "one" if workers > 1 else "all"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} a training"
    return f"{machine}, {keras.backend.backend()}, Keras {keras.__version__}"


def write_json(file, content):
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
