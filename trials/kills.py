"""Kills: `kill -9` at a moment of each writing command, after which every file under its final name has to be whole.

The process that is killed is forked from the worker, which has imported everything and computed nothing. Half of the
kills come at a time, the others at one of the moments at which the command opens, renames or removes a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from trials.outcomes import Answer, NotTried, Place

_PHOTO = ("photo.png",)
_COMMANDS: dict[str, tuple[str, ...]] = {
    "activations": ("activations", "{net}", "{photo}", "--raw", "--out", "out"),
    "filters": (
        "filters",
        "{net}",
        "--layer",
        "0",
        "--channels",
        "0-3",
        "--steps",
        "4",
        "--size",
        "32",
        "--out",
        "out",
    ),
    "film": (
        "filters",
        "{net}",
        "--layer",
        "0",
        "--channels",
        "0-1",
        "--steps",
        "8",
        "--size",
        "32",
        "--frames",
        "4",
        "--out",
        "out",
    ),
    "heatmap": ("heatmap", "{net}", "{photo}", "--out", "out"),
    "concepts": ("concepts", "{net}", "{photo}", "--layer", "2", "--count", "2", "--out", "out"),
    "report": ("report", "{net}", "{photo}", "--channels", "1", "--out", "out/page.html"),
    "demo": ("demo", "--out", "out"),
    "keras": ("activations", "{keras}", "{photo}", "--raw", "--out", "out"),
}


@dataclass(frozen=True)
class _Ended:
    """The exit of a child; `overdue` if it had to be ended because it took too long."""

    status: int
    seconds: float
    text: str
    overdue: bool


@dataclass(frozen=True)
class _Whole:
    """An undisturbed run: its files by hash, how long it took, how often it touched its folder, when it began to."""

    files: dict[str, str]
    seconds: float
    moments: int
    first: float


_WHOLE: dict[str, _Whole] = {}


def attempt(place: Place, command: str, seconds: float) -> Answer:
    """One kill of one command, and the run again; each of the runs may take some seconds."""
    base = place.base(_PHOTO[0])
    named = {
        "net": f"{place.bases / 'net.py'}:plain",
        "photo": str(base),
        "keras": str(place.bases / "keras-sequential.keras"),
    }
    arguments = [part.format(**named) for part in _COMMANDS[command]]
    if command not in _WHOLE:
        _WHOLE[command] = _undisturbed(arguments, place.folder, seconds)
        shutil.rmtree(place.folder / "out")
    whole, rng = _WHOLE[command], place.rng
    if rng.random() < 0.5:
        moment = rng.randrange(whole.moments) + 1
        ended, what = (
            _run(arguments, place.folder, seconds, moment=moment),
            f"killed at file operation {moment} of {whole.moments}",
        )
    else:
        after = rng.uniform(whole.first * 0.95, whole.seconds)
        ended = _run(arguments, place.folder, seconds, after=after)
        what = f"killed after {after:.2f} of {whole.seconds:.2f} s"
    out = place.folder / "out"
    broken = [f"{said} after it was {what}" for said in _broken(out)]
    if ended.status not in (0, -signal.SIGKILL):
        broken.append(f"it ended with {ended.status} ({what}): {ended.text}")
    again = _run(arguments, place.folder, seconds)
    if ended.overdue or again.overdue:
        which = "it" if ended.overdue else f"the run after it was {what}"
        return Answer.of("hang", f"{which} did not end within {seconds:g} s (undisturbed: {whole.seconds:.1f} s)")
    if again.status != 0:
        broken.append(f"the run after it was {what} ended with {again.status}: {again.text}")
    else:
        broken += [f"{said} in the run after it was {what}" for said in (*_broken(out), *_differing(out, whole.files))]
    if broken:
        return Answer.of("other", "; ".join(broken[:3]))
    return Answer.of("accepted")


def _undisturbed(arguments: list[str], folder: Path, seconds: float) -> _Whole:
    notes = folder / "moments"
    ended = _run(arguments, folder, seconds, notes=notes)
    if ended.overdue:
        raise NotTried(f"{' '.join(arguments)} takes more than {seconds:g} s here, undisturbed")
    if ended.status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {ended.status}: {ended.text}")
    times = [float(line) for line in notes.read_text().splitlines()]
    return _Whole(_hashes(folder / "out"), ended.seconds, len(times), times[0])


def _run(
    arguments: list[str], folder: Path, seconds: float, moment: int = 0, after: float = 0, notes: Path | None = None
) -> _Ended:
    """The command in a forked child, killed at its nth file operation, or after some seconds, or not at all."""
    log = folder / "said"
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(arguments, folder, log, _Moments(folder / "out", moment, notes, begun))
    end, overdue = begun + (after or seconds), False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            overdue = not after
            break
        time.sleep(0.001)
    return _Ended(
        os.waitstatus_to_exitcode(status),
        time.monotonic() - begun,
        log.read_text(errors="replace")[-300:] if log.exists() else "",
        overdue,
    )


class _Moments:
    """Counts what a command does in its folder, through Python's audit hook, and kills at one of these moments."""

    _EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")

    def __init__(self, out: Path, moment: int, notes: Path | None, begun: float) -> None:
        self.out, self.moment, self.begun, self.count = str(out), moment, begun, 0
        self.file = None if notes is None else os.open(notes, os.O_WRONLY | os.O_CREAT)

    def __call__(self, event: str, arguments: tuple) -> None:
        """Python's audit hook."""
        if event not in self._EVENTS or isinstance(arguments[0], int):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(self.out):
            return
        self.count += 1
        if self.file is not None:
            os.write(self.file, f"{time.monotonic() - self.begun}\n".encode())
        if self.count == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)


def _child(arguments: list[str], folder: Path, log: Path, moments: Callable[[str, tuple], None]) -> None:
    status = 99
    try:
        os.chdir(folder)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.addaudithook(moments)
        from convscope import cli

        cli.main(arguments)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        from convscope import isolation

        with contextlib.suppress(Exception):
            isolation.SHARED_READER.stop()
        os._exit(status)


# -- whether files are whole -----------------------------------------------------------------------------


def _broken(out: Path) -> list[str]:
    """Files under their final names that are not whole."""
    said = []
    for path in sorted(out.rglob("*")) if out.exists() else ():
        if path.is_file() and not _is_aside(path):
            try:
                _check(path)
            except Exception as error:
                said.append(f"{path.relative_to(out)} is not whole ({type(error).__name__}: {str(error)[:80]})")
    return said


def _is_aside(path: Path) -> bool:
    """True for a file that shows by its name that it was not finished."""
    return path.name.startswith(".") and path.name.endswith((".part", ".tmp"))


def _check(path: Path) -> None:
    if path.suffix in (".png", ".gif", ".webp", ".jpg"):
        with Image.open(path) as image:
            for frame in range(getattr(image, "n_frames", 1)):
                image.seek(frame)
                image.load()
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix in (".npy", ".npz"):
        loaded = np.load(path)
        for name in getattr(loaded, "files", ()):
            loaded[name]
    elif path.suffix == ".html":
        if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
            raise ValueError("it has no end")
    elif path.suffix in (".csv", ".txt", ".md", ".svg"):
        path.read_text(encoding="utf-8")
    else:
        raise ValueError("a file of unknown sort")


def _hashes(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(_without_times(path)).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not _is_aside(path)
    }


def _without_times(path: Path) -> bytes:
    """A file without the values that differ from run to run by nature: the times."""
    data = path.read_bytes()
    return re.sub(rb"\d+(\.\d+)? (s|seconds)\b", b"", data) if path.suffix in (".html", ".json") else data


def _differing(out: Path, expected: dict[str, str]) -> list[str]:
    found = _hashes(out)
    names = sorted(name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name))
    return [f"{name} is another than in an undisturbed run" for name in names]
