"""The shape of the package: who imports whom, and what an import brings with it."""

import ast
import doctest
import graphlib
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_abra

ROOT = Path(keras_abra.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = [m.name for m in pkgutil.walk_packages([str(ROOT)], "keras_abra.") if ".backend." not in m.name]


def imports(file):
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_backend_is_spoken_to_in_its_own_file_only(file):
    roots = {name.split(".")[0] for name in imports(file)}
    assert not roots & {"tfrecords", "recipes", "pandas"}
    assert "keras_tuner" not in roots or file.parent.name == "tuning"
    allowed = {file.stem} if file.parent.name == "backend" else set()
    assert roots & {"tensorflow", "jax", "torch"} <= allowed


def test_imports_run_one_way():
    names = {".".join(("keras_abra", *file.relative_to(ROOT).with_suffix("").parts)): file for file in FILES}
    graph = {name: {n for n in imports(file) if n in names and n != name} for name, file in names.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_importing_brings_in_the_chosen_backend_only():
    others = {"tensorflow", "jax", "torch", "keras_tuner", "pandas"} - {keras.backend.backend()}
    code = (
        "import sys, keras; before = set(sys.modules); import keras_abra;"
        f"print(sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & {others}))"
    )
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    public = {n: getattr(keras_abra, n) for n in keras_abra.__all__}
    layers = {n: getattr(keras_abra.layers, n) for n in keras_abra.layers.__all__}
    names = {"keras": keras, "keras_abra": keras_abra, "np": np, **public, **layers, **vars(module)}
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
