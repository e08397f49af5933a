"""Tests run on the Keras backend that KERAS_BACKEND names; TensorFlow where it names none."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Without it TensorFlow has no channels-first convolution on processors that lack VNNI instructions.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """A mark `slow` has to say what takes the time."""
    bare = sorted({item.nodeid for item in items for mark in item.iter_markers("slow") if not reason_of(mark)})
    if bare:
        raise pytest.UsageError(f"@pytest.mark.slow needs a reason, slow(reason=...): {', '.join(bare)}")


LONG = 5  # seconds


def pytest_terminal_summary(terminalreporter):
    """The tests without the mark `slow` that took longer than it is for: on a quiet machine each of them needs it."""
    passed = terminalreporter.stats.get("passed", [])
    long = sorted({test.nodeid for test in passed if test.duration > LONG and "slow" not in test.keywords})
    if long:
        terminalreporter.section(f"over {LONG} s without the mark slow", sep="-")
        for name in long:
            terminalreporter.line(name)


def reason_of(mark):
    """The reason of a mark `slow`; empty where it has none."""
    reason = mark.kwargs.get("reason", "")
    return reason.strip() if isinstance(reason, str) and not mark.args else ""


@pytest.fixture(autouse=True)
def _seeded():
    np.random.seed(0)


@pytest.fixture
def photo():
    """An image with something in it: a bright disc on a gradient, (48, 64, 3) uint8."""
    y, x = np.mgrid[:48, :64]
    image = np.stack([4 * x, 5 * y, 128 + 0 * x], axis=-1).astype(np.uint8)
    image[(y - 20) ** 2 + (x - 40) ** 2 < 100] = (250, 240, 60)
    return image
