"""Holds the house in order: what tfrecords imports, and that its imports run one way."""

import ast
import graphlib
from pathlib import Path

import pytest

import tfrecords

FILES = sorted(Path(tfrecords.__file__).parent.glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import hides where a name comes from"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_neither_keras_nor_keras_abra_is_imported(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"keras", "keras_abra", "jax", "torch"}
    assert not any(name.startswith("tensorflow.keras") for name in imports(path))


def test_imports_inside_run_one_way():
    names = {f"tfrecords.{path.stem}" for path in FILES}
    graph = {f"tfrecords.{path.stem}": {name for name in imports(path) if name in names} for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # Raises CycleError, which names the cycle.


def test_every_public_name_can_be_reached():
    for name in tfrecords.__all__:
        assert callable(getattr(tfrecords, name)), name
    with pytest.raises(AttributeError, match="no attribute 'records'"):
        _ = tfrecords.records
