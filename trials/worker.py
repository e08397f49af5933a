"""A worker: makes one try after another in a process of its own, and reports the outcome of each.

Reads lines `{"kind": ..., "seed": ..., "number": ...}`, answers with a line each. Run as
`python -m trials.worker RUNTIME SCRATCH BASES`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from trials import memory
from trials.kinds import Kind, all_kinds
from trials.outcomes import NEW_PROCESS, Answer, Case, NotTried, Place
from trials.watch import Folder, Watch

_IMPORTS = {
    "plain": ("convscope.images.decode", "convscope.results"),
    "torch": ("torch", "convscope.networks.torch.network", "convscope.networks.formats.torch.files"),
    "tensorflow": ("tensorflow", "keras", "convscope.networks.formats.keras.files"),
    "jax": ("jax", "keras", "convscope.networks.formats.keras.files"),
    "keras-torch": ("torch", "keras", "convscope.networks.formats.keras.files"),
    # Forked for each try: nothing is computed in the worker itself, so that no threads are lost in a fork.
    "torch-forked": (
        "torch",
        "convscope.cli",
        "convscope.networks.torch.network",
        "convscope.networks.formats.torch.files",
        "convscope.reports",
    ),
    "keras-forked": ("convscope.cli", "keras", "convscope.networks.formats.keras.files", "convscope.demo"),
}
_BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "keras-torch": "torch", "keras-forked": "tensorflow"}


class Worker:
    """Everything that one process needs for its tries.

    Args:
        runtime: which framework is imported.
        scratch: a folder of this worker's own.
        bases: valid files.
        log: where standard output and error go, or -1.
    """

    def __init__(self, runtime: str, scratch: Path, bases: Path, log: int = -1) -> None:
        self.scratch, self.bases, self.log = scratch, bases, log
        self.outside, self.temporary = scratch / "outside", scratch / "tmp"
        for folder in (self.outside, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        _furnish(self.outside)
        self.watch = Watch((self.temporary,))
        self.folder = Folder(self.outside)
        self.kinds = all_kinds()
        if runtime in _BACKENDS:
            os.environ["KERAS_BACKEND"] = _BACKENDS[runtime]
        for name in _IMPORTS[runtime]:
            importlib.import_module(name)
        sys.path.insert(0, "")  # a module beside the file could be imported, as in a user's own folder

    def answer(self, name: str, seed: int, number: int, loud: bool = False) -> dict[str, Any]:
        """One try, as plain values."""
        kind = self.kinds[name]
        place = Place(name, seed, number, self.scratch / "try", self.outside, self.bases)
        shutil.rmtree(place.folder, ignore_errors=True)
        place.folder.mkdir()
        os.chdir(place.folder)
        try:
            made = kind.load()(place, **kind.arguments)
            answer = self._file(kind, place, made, loud) if isinstance(made, Case) else made
        except Exception as error:
            if loud:
                traceback.print_exc()
            answer = failed(kind, error)
        finally:
            os.chdir(self.scratch)
        return {"counts": dict(answer.counts), "findings": answer.findings, "tried": answer.tried}

    def _file(self, kind: Kind, place: Place, case: Case, loud: bool) -> Answer:
        from trials.actions import ACTIONS

        self.folder.touched()
        if self.log >= 0:  # what was said while the file was made is not the file's doing
            os.ftruncate(self.log, 0)
            os.lseek(self.log, 0, os.SEEK_SET)
        before = _start_counting()
        with self.watch.watching():
            column, text = _tried(ACTIONS[case.action], case, loud)
        findings = [(column, text)] if column == "other" else []
        used = _counted(before)
        bound = case.memory
        if used > bound and kind.group == "images":
            from trials.images import may_take

            bound = may_take(case.path)
        if used > bound:
            findings.append(("memory", f"{used >> 20} MiB, may take {bound >> 20} MiB; {text}"))
        if kind.group == "images" and self.log >= 0 and os.fstat(self.log).st_size:
            findings.append(("other", f"a library's own message came through: {os.pread(self.log, 200, 0)!r}"))
        findings += [("code", said) for said in (*self.watch.seen[:3], *self._touched(place))]
        if loud:
            print(f"{case.what}\n{column}: {text}\n{used >> 20} MiB used", file=sys.stderr)
        columns = {column, *(name for name, _ in findings)}
        return Answer(Counter(columns), tuple((name, f"{said} — {case.what}") for name, said in findings))

    def _touched(self, place: Place) -> list[str]:
        names = self.folder.touched()
        seen = [f"touched {name!r} outside of the file's folder" for name in names[:3]]
        if place.marker.exists():
            seen.append("the marker appeared")
        if names:
            shutil.rmtree(self.outside)
            self.outside.mkdir()
            _furnish(self.outside)
            self.folder = Folder(self.outside)
        return seen


def failed(kind: Kind, error: Exception) -> Answer:
    """The answer where a kind's own function failed, and not what it gave to be tried.

    A file that could not be made was not tried; a loop or a command that fails is convscope's doing.
    """
    if isinstance(error, NotTried) or kind.makes_files:
        return Answer.untried(_said(error))
    return Answer.of("other", _said(error))


def _furnish(outside: Path) -> None:
    """Fill the folder that nothing may touch."""
    (outside / "secret.txt").write_text("secret\n" * 100)
    (outside / "weights.bin").write_bytes(b"\x00\x50\x9a\x44" * 2**14)
    if not (outside / "pipe").exists() and hasattr(os, "mkfifo"):
        os.mkfifo(outside / "pipe")
    (outside / "planted_outside.py").write_text(f"open({str(outside / 'marker')!r}, 'w').close()\n")


def _start_counting() -> dict[int, int]:
    pids = memory.family(os.getpid())
    for pid in pids:
        memory.forget(pid)
    return {pid: memory.resident(pid)[0] for pid in pids}


def _counted(before: dict[int, int]) -> int:
    now = memory.family(os.getpid())
    return max(memory.resident(pid)[1] - before.get(pid, NEW_PROCESS) for pid in now)


def _tried(action: Any, case: Case, loud: bool) -> tuple[str, str]:
    from convscope.errors import ConvscopeError

    try:
        said = action(case)
        return "accepted", str(said or "")
    except ConvscopeError as error:
        if loud:
            traceback.print_exc()
        odd = unclear(str(error))
        return ("other", f"{odd}: {_said(error)}") if odd else ("refused", str(error)[:300])
    except BaseException as error:
        if loud:
            traceback.print_exc()
        return "other", _said(error)


def unclear(message: str) -> str | None:
    """Why a message is none that a user can read, or None."""
    if not message.strip():
        return "an empty message"
    if "Traceback (most recent" in message:
        return "a traceback in the message"
    if len(message) > 4000:
        return f"a message of {len(message)} characters"
    return None


def _said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in where if "convscope" in frame.filename and "trials" not in frame.filename] or list(where)
    at = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{at}: {str(error)[:200]!r}"


def main() -> None:
    """Answer until standard input ends."""
    runtime, scratch, bases = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    target = os.fdopen(os.dup(1), "w")
    log = os.open(scratch / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    worker = Worker(runtime, scratch, bases, log)
    print("{}", file=target, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = worker.answer(asked["kind"], asked["seed"], asked["number"])
        answer["size"] = memory.resident(os.getpid())[0]
        print(json.dumps(answer), file=target, flush=True)


if __name__ == "__main__":
    main()
