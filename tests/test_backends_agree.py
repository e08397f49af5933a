"""One small network on each installed backend, a process each: activations, gradients and heatmaps agree."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")


def installed():
    return [name for name in BACKENDS if importlib.util.find_spec(name) and importlib.util.find_spec("keras")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    if len(installed()) < 2:
        pytest.skip(f"agreement needs two backends; installed: {', '.join(installed()) or 'none'}")
    folder, found = tmp_path_factory.mktemp("answers"), {}
    for backend in installed():
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, str(HERE / "agreement.py"), str(folder / f"{backend}.npz")]
        done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[backend] = dict(np.load(folder / f"{backend}.npz"))
    return found


def test_backends_agree_to_1e_4(answers):
    reference = answers[installed()[0]]
    for backend in installed()[1:]:
        assert answers[backend].keys() == reference.keys()
        for name, expected in reference.items():
            tolerance = 0.05 if name == "final" else 1e-4
            apart = np.abs(answers[backend][name] - expected).max() / np.abs(expected).max()
            assert apart <= tolerance, f"{name} on {backend}: {apart:.2e} of its largest value"


def test_start_pictures_are_bit_equal(answers):
    first, *others = (answers[backend]["start"] for backend in installed())
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_the_comparison_would_notice(answers):
    found = answers[installed()[0]]
    assert np.abs(found["heatmap last"]).max() > 1e-3
    assert np.abs(found["gradient"]).max() > 1e-2
    assert all(np.isfinite(values).all() for values in found.values())
