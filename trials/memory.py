"""The highest resident memory of a process and its children, on Linux; nothing elsewhere."""

from __future__ import annotations

import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [
            int(text) for task in Path(f"/proc/{pid}/task").iterdir() for text in _read(task / "children").split()
        ]
    except OSError:
        return [pid]
    return [pid, *(inner for child in children for inner in family(child))]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def resident(pid: int) -> tuple[int, int]:
    """Bytes that a process has, and the most that it had since `forget`."""
    found = {"VmRSS": 0, "VmHWM": 0}
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return found["VmRSS"], found["VmHWM"]


def forget(pid: int) -> None:
    """Let the kernel count a process' highest memory anew."""
    try:
        fd = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(fd, b"5")
    except OSError:
        pass
    finally:
        os.close(fd)
