"""Two processes on torch, and two devices or two processes on JAX, take the steps that one device takes."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_abra.layers import FeatureStatisticsUncertainty
from tests import parallel_steps
from tests.parallel_steps import MUTANTS, injected, run
from tests.processes import ROOT, run_together, xla_flags

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    pytest.skip("test_mirrored_strategy.py is TensorFlow's", allow_module_level=True)

torch_only = pytest.mark.skipif(BACKEND != "torch", reason="each process is a replica on torch only")

MISTAKEN = [f"{case}/{mistake}" for mistake, case in MUTANTS.items()]
if BACKEND == "torch":
    ONE = ["diagonal", "low_rank", "domain", "shared", "learned", "coral", "mmd", "dsu", "erm", "clipped", "uneven"]
    MANY = {"processes": [*ONE, "norm", "own", "noise", "noise/no mistake", *MISTAKEN]}
else:  # each case is compiled anew
    ONE = ["coral", "mmd", "domain", "dsu"]
    MANY = {"2 devices": [*ONE, *MISTAKEN], "processes": ["coral", "domain"]}
COMPARED = [(where, case) for where, cases in MANY.items() for case in cases if case in ONE]


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """What was found on many devices: `{where: [results of each process]}`; on JAX also on "1 device"."""
    folder, found = tmp_path_factory.mktemp("many"), {}
    if BACKEND == "jax":
        arguments = []
        for where, cases in {"1 device": ONE, **MANY}.items():
            if where != "processes":
                arguments += ["--", f"{folder / where}.npz:{where[0]}", *cases]
        environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4)}
        command = [sys.executable, "-m", "tests.parallel_steps", *arguments[1:]]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        found = {file.stem: [np.load(file)] for file in folder.iterdir()}
    files = [folder / f"{i} of 2.npz" for i in range(2)]
    commands = [["-m", "tests.parallel_steps", file, *MANY["processes"]] for file in files]
    codes, texts = run_together(commands, KERAS_BACKEND=BACKEND, XLA_FLAGS=xla_flags())
    assert codes == [0, 0], "\n".join(text[-3000:] for text in texts)
    return found | {"processes": [np.load(file) for file in files]}


@pytest.fixture(scope="session")
def one(many):
    """What one device finds, by case."""
    if BACKEND == "jax":
        return lambda case: {k: v for k, v in many["1 device"][0].items() if k.startswith(f"{case} ")}
    with injected(0):
        found = {case: run(case) for case in ONE}
    return found.__getitem__


def mismatches(found, expected, case=None):
    """Names of what differs, gradients by the bound of 1e-4 (float32)."""
    name = next(iter(expected)).split()[0]
    whole = np.sqrt(sum(np.sum(np.square(v)) for k, v in expected.items() if " gradient " in k))
    wrong = []
    for key, value in expected.items():
        got = found[key.replace(name, case or name, 1)]
        least = 1e-3 * whole if " gradient " in key else 1e-2
        difference = np.linalg.norm(got.astype("float64") - value) / max(np.linalg.norm(value), least)
        if not difference <= 1e-4:
            wrong.append(f"{key}: {difference:.1e}")
    return wrong


@pytest.mark.parametrize(("where", "case"), COMPARED)
def test_gradients_weights_state_logs_and_predictions_equal_those_of_one_device(where, case, many, one):
    expected = one(case)
    assert sum(" gradient " in key for key in expected) > 5
    for found in many[where]:
        assert mismatches(found, expected) == []


def test_all_processes_end_alike(many):
    first, second = many["processes"]
    for key in first.files:
        if "/" not in key and key != "draw":
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@torch_only
def test_with_plain_batch_normalization_it_is_the_mean_of_the_replicas_given_the_global_spread(many, monkeypatch):
    own, seen = FeatureStatisticsUncertainty.uncertainty, []

    def note(self, statistics, experiment=None):
        seen[-1].append(statistics)
        return own(self, statistics)

    def given(self, statistics, experiment=None):
        place = int(self.name.rpartition("_")[2]) - 1
        return own(self, ops.concatenate([found[place] for found in seen]))

    def step(number):
        with injected(number):
            return run("norm", number, 2)

    monkeypatch.setattr(FeatureStatisticsUncertainty, "uncertainty", note)
    for number in range(2):
        seen.append([])
        step(number)
    monkeypatch.setattr(FeatureStatisticsUncertainty, "uncertainty", given)
    parts = [step(number) for number in range(2)]
    assert_mean_of(parts, many)


@torch_only
def test_not_synchronized_at_all_each_replica_is_a_device_of_its_own(many):
    parts = []
    for number in range(2):
        with injected(number):
            parts.append(run("own", number, 2))
    assert_mean_of(parts, many)


def assert_mean_of(parts, many):
    """What each process found is the mean of what two devices find, each by itself."""
    first, second = parts
    gradient = next(key for key in first if key.endswith(" gradient 0"))
    assert not np.allclose(first[gradient], second[gradient], rtol=0.1)
    for found in many["processes"]:
        assert mismatches(found, {key: (first[key] + second[key]) / 2 for key in first}) == []


@torch_only
def test_noise_differs_between_replicas_and_is_a_function_of_the_seed(many):
    first, second = many["processes"]
    assert np.abs(first["draw"] - second["draw"]).max() > 0.1
    again = {k: v for k, v in first.items() if k.startswith("noise ")}
    assert len(again) > 5 and mismatches(first, again, "noise/no mistake") == []


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_comparison_sees(mistake, many, one):
    found, case = many["processes" if BACKEND == "torch" else "2 devices"][0], MUTANTS[mistake]
    expected = {k: v for k, v in found.items() if k.startswith("noise ")} if case == "noise" else one(case)
    what = " state " if mistake.startswith("running means") else " gradient "
    assert any(what in name for name in mismatches(found, expected, f"{case}/{mistake}"))


@torch_only
def test_a_step_sends_the_gradients_and_a_few_numbers_a_stage(many):
    sent, plain = (many["processes"][0][f"bytes {case}"] for case in ("diagonal", "uneven"))
    model = parallel_steps.CASES["diagonal"](backbone=parallel_steps.smooth(), embedding_dim=None)
    weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert sent.max() == plain.max() == 4 * weights
    # sums and squares of mean and deviation, and their count; three more losses, and these as three more metrics
    stages = sum(4 * (1 + 4 * stage.channels) for stage in model.stages)
    assert sent.sum() - plain.sum() == stages + 3 * 4 + 3 * 2 * 8


@pytest.mark.skipif(BACKEND != "jax", reason="what XLA makes of a global array")
def test_devices_send_each_branchs_gradients_and_a_few_numbers_a_stage(many):
    """XLA on a CPU sums the two gradients of a weight behind the first stage over the devices before it adds them."""
    sent, plain = (many["2 devices"][0][f"floats {case}"].sum() for case in ("diagonal", "uneven"))
    model = parallel_steps.CASES["diagonal"](backbone=parallel_steps.smooth(), embedding_dim=None)
    weights, before = (
        sum(int(np.prod(v.shape)) for v in part.trainable_variables) for part in (model, model.backbone_parts[0])
    )
    assert weights <= plain <= weights + 6
    # mean and sum of squares of mean and deviation, some of them twice; the perturbed branch's own losses
    assert 0 < sent - plain - (weights - before) <= sum(8 * stage.channels + 2 for stage in model.stages)


@pytest.mark.skipif(BACKEND != "jax", reason="torch's processes may have parts of different sizes")
def test_batches_that_do_not_divide_are_refused(many):
    said = {key: str(text) for key, text in many["2 devices"][0].items() if key.startswith("refused ")}
    sizes = {"fit": 7, "validation": 3, "evaluate": 3, "predict": 3, "embed": 5, "fixed": 5, "pipeline": 1}
    for name, size in sizes.items():
        text = said[f"refused {name}"]
        assert text.startswith("Every batch must divide among the 2 devices"), (name, text)
        assert text.endswith(f"Received: a batch of size {size}"), (name, text)
