"""Workers under supervision: hangs, crashes and memory are seen from outside; the minutes are shared by weight."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trials import memory
from trials.kinds import GROUPS, Kind
from trials.outcomes import MIB, READER_SECONDS, UNTRIED, VALUES

_GROWN = 1500 * MIB  # a worker that has grown over this is replaced
_TOO_MUCH = 6000 * MIB  # a worker that takes this is ended at once


@dataclass
class Row:
    """The outcome of one kind."""

    kind: Kind
    tried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    used: float = 0
    number: int = 0

    @property
    def each(self) -> float:
        """Seconds that one more try takes."""
        return self.used / self.number if self.number else self.kind.least


@dataclass(frozen=True)
class Finding:
    """One try in a column of FINDINGS, or one that could not be tried."""

    column: str
    repeat: str
    text: str


class Ended(Exception):
    """A worker that had to be ended, or that ended by itself."""

    def __init__(self, column: str, text: str) -> None:
        super().__init__(text)
        self.column = column


class Process:
    """One worker process."""

    def __init__(self, runtime: str, scratch: Path, bases: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "tmp").mkdir(exist_ok=True)
        self.scratch = scratch
        command = [sys.executable, "-m", "trials.worker", runtime, str(scratch), str(bases)]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(scratch), start_new_session=True
        )
        self.size = 0
        try:
            self._read(180)
        except Ended as ended:
            raise Ended(UNTRIED, f"the worker did not start: {ended}") from None

    def ask(self, kind: Kind, seed: int, number: int) -> dict[str, Any]:
        """One try.

        Raises:
            Ended: it took too long or too much, or the process is dead.
        """
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"kind": kind.name, "seed": seed, "number": number}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None
        answer = self._read(kind.seconds)
        self.size = answer.get("size", 0)
        return answer

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._child.stdout is not None
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if select.select([self._child.stdout], [], [], 0.2)[0]:
                part = os.read(self._child.stdout.fileno(), 2**16)
                if not part:
                    raise self._dead()
                line += part
            elif time.monotonic() > end:
                self.end()
                raise Ended("hang", f"no answer after {seconds:g} s")
            elif max(memory.resident(pid)[0] for pid in memory.family(self._child.pid)) > _TOO_MUCH:
                self.end()
                raise Ended("memory", f"more than {_TOO_MUCH >> 20} MiB")
        return json.loads(line)

    def _dead(self) -> Ended:
        code = self._child.wait(30)
        log = self.scratch / "log"
        last = log.read_text(errors="replace")[-300:] if log.exists() else ""
        self.end()
        return Ended("other", f"the process ended with status {code}: {last!r}")

    def end(self) -> None:
        """End the process and all below it."""
        for pid in reversed(memory.family(self._child.pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._child.wait()


def environment(scratch: Path) -> dict[str, str]:
    """What a worker's process sees: one thread, a short limit, and folders of its own for what is temporary."""
    temporary = str(scratch / "tmp")
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), *(entry for entry in sys.path if entry)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "CONVSCOPE_LIMITS": f"seconds={READER_SECONDS},values={VALUES}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        **dict.fromkeys(("TMPDIR", "HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"), temporary),
    }


def set_environment(scratch: Path) -> None:
    """Make this process' environment that of a worker."""
    os.environ.update(environment(scratch))


@dataclass(frozen=True)
class Plan:
    """The options of a run."""

    kinds: Sequence[Kind]
    seconds: float
    seed: int
    jobs: int
    scratch: Path
    bases: Path


class Run:
    """Shares the time among the kinds by weight, and gathers the outcomes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows = {kind.name: Row(kind) for kind in plan.kinds}
        self.findings: list[Finding] = []
        self._lock, self._busy = threading.Lock(), set()  # type: ignore[var-annotated]
        self._shares = _shares(plan.kinds)
        self._end = time.monotonic() + plan.seconds

    def go(self) -> None:
        """Run until the time is up."""
        jobs = [threading.Thread(target=self._job, args=(number,)) for number in range(self.plan.jobs)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()

    def _job(self, number: int) -> None:
        workers: dict[str, Process] = {}
        scratch = self.plan.scratch / f"job{number}"
        try:
            while (row := self._next()) is not None:
                self._slice(row, workers, scratch)
        finally:
            for worker in workers.values():
                worker.end()
            shutil.rmtree(scratch, ignore_errors=True)

    def _next(self) -> Row | None:
        """The kind that lags the most behind its share, or None at the end."""
        with self._lock:
            left = self._end - time.monotonic()
            free = [row for row in self.rows.values() if row.kind.name not in self._busy and row.each <= left]
            if not free:
                return None
            row = min(free, key=lambda row: row.used / self._shares[row.kind.name])
            self._busy.add(row.kind.name)
            return row

    def _slice(self, row: Row, workers: dict[str, Process], scratch: Path) -> None:
        """Try one kind for a while."""
        begun = time.monotonic()
        share = self._shares[row.kind.name] * self.plan.seconds * self.plan.jobs
        until = min(begun + max(row.kind.slice, share / 4), self._end)
        while True:
            started = time.monotonic()
            self._one(row, workers, scratch / row.kind.runtime)
            row.used += time.monotonic() - started
            if time.monotonic() + row.each / 2 >= until:
                break
        with self._lock:
            self._busy.discard(row.kind.name)

    def _one(self, row: Row, workers: dict[str, Process], scratch: Path) -> None:
        kind, number = row.kind, row.number
        row.number += 1
        repeat = f"{kind.name}:{self.plan.seed}:{number}"
        try:
            if kind.runtime not in workers:
                workers[kind.runtime] = Process(kind.runtime, scratch, self.plan.bases)
            worker = workers[kind.runtime]
            answer = worker.ask(kind, self.plan.seed, number)
            if worker.size > _GROWN:
                workers.pop(kind.runtime).end()
        except Ended as ended:
            workers.pop(kind.runtime, None)
            shutil.rmtree(scratch, ignore_errors=True)
            answer = {"counts": {ended.column: 1}, "findings": [(ended.column, str(ended))]}
            answer["tried"] = int(ended.column != UNTRIED)
        with self._lock:
            row.tried += answer["tried"]
            row.counts.update(answer["counts"])
            self.findings += [Finding(column, repeat, text) for column, text in answer["findings"]]


def _shares(kinds: Sequence[Kind]) -> dict[str, float]:
    """The part of the time for each kind."""
    of_group: dict[str, float] = defaultdict(float)
    for kind in kinds:
        of_group[kind.group] += kind.share
    whole = sum(GROUPS[group] for group in of_group)
    return {kind.name: GROUPS[kind.group] / whole * kind.share / of_group[kind.group] for kind in kinds}
