"""Several processes on this machine that train together, for tests: no network but loopback."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds: a loaded machine is no failure


def environment(number, processes, port):
    """What torchrun would tell a process of torch, and Keras's own names for one of JAX."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
        **{"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"},  # also on a machine with GPUs
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"localhost:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
        "KERAS_DISTRIBUTION_PROCESS_ID": str(number),
    }


def xla_flags(devices=None):
    """`XLA_FLAGS` of a process of JAX: those of this one, or what compiles in half the time; so many CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
    return f"{flags} --xla_force_host_platform_device_count={devices}" if devices else flags


def free_port():
    """One that the system gives to nobody who asks for any: it is bound only seconds later."""
    for port in random.SystemRandom().sample(range(20000, 32000), 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError("50 ports between 20000 and 32000 are all in use.")


def run_together(commands, cwd=ROOT, patience=PATIENCE, **variables):
    """Runs one command for each process and waits; the texts each has printed. Ends all a minute after one fails."""
    port = free_port()
    outputs = [tempfile.TemporaryFile("w+") for _ in commands]
    children = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env={**environment(i, len(commands), port), **variables},
            stdout=outputs[i],
            stderr=subprocess.STDOUT,
        )
        for i, command in enumerate(commands)
    ]
    end = time.monotonic() + patience
    try:
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            if any(child.poll() for child in children):
                give_up = min(end, time.monotonic() + 60)  # until then the others may still say why
                while any(child.poll() is None for child in children) and time.monotonic() < give_up:
                    time.sleep(0.1)
                break
            time.sleep(0.1)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    texts = []
    for file in outputs:
        file.seek(0)
        texts.append(file.read())
        file.close()
    return codes, texts
