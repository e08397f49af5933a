"""Detecting that code ran: events of Python's audit hook, and access to the watched folder, also from C++."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

# Names that hostile files give for modules: importing one shows that a file's text was taken for a module's name.
CANARIES = frozenset({"antigravity", "this", "turtledemo", "idlelib", "nntplib", "mailbox"})
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "os.startfile")
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request")
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")
_BESIDE = ("os.remove", "os.rmdir")  # these may name a file by the descriptor of its folder
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Records what a try must not do. Python never takes an audit hook away: one for each process, switched on and off.

    Args:
        writable: folders in which a try may write.
    """

    def __init__(self, writable: tuple[Path, ...]) -> None:
        self.on, self.seen = False, []  # type: ignore[var-annotated]
        self._writable = tuple(f"{folder}/" for folder in writable)
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self):  # type: ignore[no-untyped-def]
        """Record for the length of a block."""
        self.seen.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        with contextlib.suppress(Exception):
            said = self._judged(event, arguments)
            if said:
                self.seen.append(said)

    def _judged(self, event: str, arguments: tuple) -> str | None:
        if event == "open":
            return self._opened(*arguments)
        if event == "import":
            name = str(arguments[0])
            planted = name.startswith("planted") or name.partition(".")[0] in CANARIES
            return f"imported {name}" if planted else None
        if event in _STARTS or event in _NETWORK:
            return f"{event} {arguments!r:.200}"
        if event in _CHANGES:
            beside = [part for part in arguments[1:] if isinstance(part, int) and part > 2]
            at = os.readlink(f"/proc/self/fd/{beside[-1]}") if beside and event in _BESIDE else ""
            allowed = self._may_write(os.path.join(at, os.fsdecode(arguments[0])))
            return None if allowed else f"{event} {arguments!r:.200}"
        if event == "subprocess.Popen":
            reader = any("convscope.isolation" in str(part) for part in arguments[1])
            return None if reader else f"started {arguments[1]!r:.200}"
        if event == "ctypes.dlopen":
            return self._loaded(arguments[0])
        return None

    def _opened(self, path: Any, mode: Any, flags: Any) -> str | None:
        writes = any(letter in str(mode) for letter in "wax+") if mode else bool((flags or 0) & _WRITING)
        if not writes or isinstance(path, int) or self._may_write(path):
            return None
        return f"opened {os.fsdecode(path)} for writing"

    def _may_write(self, path: Any) -> bool:
        whole = os.path.abspath(os.fsdecode(path))
        return f"{whole}/".startswith((*self._writable, "/dev/", "/proc/self/"))

    def _loaded(self, name: Any) -> str | None:
        ours = name is None or str(name).startswith((sys.prefix, sys.base_prefix, "lib", "/usr/lib", "/lib"))
        return None if ours else f"loaded the library {name}"


class Folder:
    """A folder that nothing may touch, watched by the kernel (inotify): C++ and other processes are seen too."""

    _EVENTS = (
        0x1 | 0x2 | 0x4 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200
    )  # access, modify, attrib, open, moves, create, delete

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        if sys.platform != "linux":
            return
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(self._fd, os.fsencode(path), self._EVENTS)

    def touched(self) -> list[str]:
        """Names in it that were touched since the last call; also says whether anything is there that was not."""
        seen: dict[str, None] = {}
        while self._fd >= 0:
            try:
                data = os.read(self._fd, 2**16)
            except BlockingIOError:
                break
            while data:
                _, mask, _, length = struct.unpack("iIII", data[:16])
                name = data[16 : 16 + length].rstrip(b"\0").decode(errors="replace")
                if not mask & 0x40000000 or mask & 0x300:  # listing the folder itself is harmless
                    seen[name] = None
                data = data[16 + length :]
        return list(seen)
