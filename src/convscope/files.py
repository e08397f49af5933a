"""Files are written whole or not at all, under names that are safe on every system; JSON as convscope writes it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convscope.errors import ConvscopeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_file(
    path: str | os.PathLike[str],
    data: bytes | str | Callable[[BinaryIO], object],
    before: Callable[[], object] | None = None,
) -> None:
    """Write a whole file or nothing: written aside in the same folder, then renamed.

    `data` may be a function that writes to the open file, for data that should not be in memory as a whole. Missing
    folders are made, text is UTF-8, and a link is followed. The temporary file is named `.convscope-*.part`; the
    files that a killed process left are removed when the next one writes to the folder. The file is not forced to
    the disk: a process may end at any moment, but if the computer itself stops, its last files may be lost.

    Args:
        path: path of the file.
        data: the content.
        before: called when the temporary file is complete, before it gets its name.

    Raises:
        ConvscopeError: the file can't be written; the message has the reason and the remedy.
    """
    goal = Path(os.path.realpath(path))  # renaming would put a file in the place of a link
    try:
        if not _is_free(goal):
            raise IsADirectoryError(errno.EISDIR, "it is a folder or a device")
        goal.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(str(goal.parent))
        _write_aside(goal, data, before or (lambda: None))
    except OSError as error:
        advice = _WRITE_ADVICE.get(error.errno or 0, "choose another place")
        raise ConvscopeError(
            f"{os.fspath(path)!r} can't be written ({error.strerror or error}): {advice}",
            code="file-not-writable",
            path=os.fspath(path),
        ) from error


def _is_free(goal: Path) -> bool:
    """True where a file is or could be; OSError where no file can have this name, before anything is written."""
    try:
        return stat.S_ISREG(os.stat(goal).st_mode)
    except FileNotFoundError:
        return True


def _write_aside(goal: Path, data: bytes | str | Callable[[BinaryIO], object], before: Callable[[], object]) -> None:
    held, aside = _created(goal)
    try:
        with os.fdopen(os.dup(held), "wb") as file:
            data(file) if callable(data) else file.write(data.encode() if isinstance(data, str) else data)
        before()
        if fcntl is None:  # Windows renames no open file
            os.close(held)
        os.replace(aside, goal)
    except BaseException:  # also when interrupted
        aside.unlink(missing_ok=True)
        raise
    finally:
        if fcntl is not None:
            os.close(held)


def _created(goal: Path) -> tuple[int, Path]:
    """A new file beside `goal`, locked for as long as it is open: so other processes know that it is in use."""
    while True:
        aside = goal.with_name(f".convscope-{secrets.token_hex(8)}.part")  # not tempfile: its files are private
        held = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with suppress(OSError):  # some network folders have no locks
                fcntl.flock(held, fcntl.LOCK_EX)
        if os.path.exists(aside):  # else another process took it for one that was left, before it was locked
            return held, aside
        os.close(held)


_ASIDE = re.compile(r"\.convscope-[0-9a-f]{16}\.part")


@cache  # once for each folder
def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of processes that were killed while they were writing."""
    with suppress(OSError):
        for name in filter(_ASIDE.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                _remove_if_left(os.path.join(folder, name))


def _remove_if_left(path: str) -> None:
    if fcntl is None:
        os.unlink(path)  # Windows removes no open file
        return
    held = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where it is in use, or of unknown cause
        os.unlink(path)
    finally:
        os.close(held)


_WRITE_ADVICE = {
    errno.EISDIR: "give a file name",
    errno.EACCES: "choose a folder where you may write",
    errno.EPERM: "choose a folder where you may write",
    errno.EROFS: "choose a folder where you may write",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.ENOTDIR: "a part of the path is a file, so choose another folder",
    errno.EEXIST: "a part of the path is a file, so choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}

_LONGEST_NAME = 255  # bytes, on the usual file systems

_DEVICE_NAMES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def safe_name(text: str) -> str:
    """A file name for `text` on every system: letters, digits and "-._" stay, "/" becomes ".", all else "_".

    At most 150 bytes long and never empty, hidden or a device's name (`nul`). A name that is cut ends in a
    digest of the whole, so that long texts which differ at their ends stay apart.
    """
    text = unicodedata.normalize("NFC", text).replace("/", ".")
    name = "".join(char if _is_safe(char) else "_" for char in text).strip(".") or "_"
    if name.split(".")[0].lower() in _DEVICE_NAMES:
        name = "_" + name
    encoded = name.encode()
    if len(encoded) <= 150:
        return name
    return encoded[:140].decode(errors="ignore") + "-" + hashlib.sha256(encoded).hexdigest()[:8]


def is_safe_name(name: str) -> bool:
    """True for a name of which `safe_name` would leave every character as it is."""
    device = name.split(".")[0].lower() in _DEVICE_NAMES
    plain = bool(name) and all(map(_is_safe, name)) and name.strip(".") == name
    return plain and not device and len(name.encode()) <= _LONGEST_NAME


def _is_safe(char: str) -> bool:
    return char.isalnum() or char in "-._"


# -- JSON ------------------------------------------------------------------------------------------------


def dump(data: object) -> str:
    """JSON as convscope writes it: indented, NaN and infinity as null, NumPy numbers as numbers."""
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # The name of a file may contain bytes that are no text; JSON's own escapes carry them.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(data: object) -> object:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, np.ndarray):
        return _plain(data.tolist())
    if isinstance(data, np.integer | np.bool_):
        return data.item()
    if isinstance(data, float | np.floating):
        return float(data) if np.isfinite(data) else None
    return data
