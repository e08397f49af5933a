"""The inputs, the outcomes and the limits of a try."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

# The columns of the table; a finding is a try in one of FINDINGS. What could not be tried is no finding, and is listed.
FINE = ("accepted", "refused")
UNTRIED = "untried"
FINDINGS = ("other", "hang", "memory", "code", "changed")
HEADS = {
    "accepted": "accepted",
    "refused": "refused clearly",
    "other": "other exception",
    "hang": "hang",
    "memory": "memory over the limit",
    "code": "code run",
    "changed": "model changed",
    UNTRIED: "not tried",
}

MIB = 2**20
# An image may take this many times its decoded 8-bit RGB size (3 bytes a pixel), beside a constant.
IMAGE_TIMES, IMAGE_CONSTANT = 6, 200 * MIB
# A model file may take this many times its unpacked size, beside a constant for what a framework loads late.
MODEL_TIMES, MODEL_CONSTANT = 10, 900 * MIB  # TensorFlow alone takes 600 MiB in the reader
# What a process that was started during a try, such as the reader, takes by itself: it may import TensorFlow or ONNX.
NEW_PROCESS = 700 * MIB
# Growth of what the process holds over 1,000 calls, after a start of STEADY_AFTER calls, that counts as a leak.
LOOP_GROWTH, STEADY_AFTER = 5 * MIB, 200
# What the trial gives to convscope's own limit of one operation: a result is held several times (in PyTorch's layouts,
# as the array of the activation and as its copy), and all of it has to stay below MODEL_CONSTANT.
VALUES = 128 * MIB
# Seconds that the trial gives to convscope's own limit, and those after which the supervisor calls it a hang.
READER_SECONDS, HANG_SECONDS = 10, 40


class NotTried(Exception):
    """The trial itself failed, such as on a machine that has other work: convscope was not tried."""


@dataclass(frozen=True)
class Place:
    """Where one try takes place.

    Attributes:
        folder: fresh and empty; the working directory of the try.
        outside: a watched folder that the file must not reach; `marker` in it must not appear.
        bases: valid files that a run made once.
        seed, number: with the name of the kind, what the try is drawn from.
    """

    kind: str
    seed: int
    number: int
    folder: Path
    outside: Path
    bases: Path

    @cached_property
    def rng(self) -> random.Random:
        return random.Random(f"{self.kind}:{self.seed}:{self.number}")

    @cached_property
    def arrays(self) -> np.random.Generator:
        return np.random.default_rng(self.rng.getrandbits(64))

    @property
    def marker(self) -> Path:
        return self.outside / "marker"

    def base(self, pattern: str) -> Path:
        """One of the valid files whose name fits."""
        found = sorted(self.bases.glob(pattern))
        if not found:
            raise FileNotFoundError(f"no base {pattern} in {self.bases}")
        return self.rng.choice(found)


@dataclass(frozen=True)
class Case:
    """A file to try.

    Attributes:
        action: one of `actions.ACTIONS`.
        path: the file or folder.
        what: what was done to it, for the report of a finding.
        memory: bytes that it may take.
        arguments: more for the action.
    """

    action: str
    path: Path
    what: str
    memory: int = MODEL_CONSTANT
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The outcome of one call of a worker: tries by column, and a text for each finding."""

    counts: Counter[str]
    findings: tuple[tuple[str, str], ...] = ()
    tried: int = 1

    @staticmethod
    def of(column: str, text: str = "") -> Answer:
        return Answer(Counter([column]), ((column, text),) if column in FINDINGS else ())

    @staticmethod
    def untried(text: str) -> Answer:
        """A try that did not take place, and why."""
        return Answer(Counter([UNTRIED]), ((UNTRIED, text),), tried=0)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(inner.lstat().st_size for inner in path.rglob("*"))
