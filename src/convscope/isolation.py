"""Reading files in a process of its own, so that no file can stop, fill or end the user's.

A damaged file can make a C library loop, allocate without end or crash, and none of them answers to Ctrl-C. `call`
runs one named function of convscope's in a child, the reader, with a limit on time and memory. The child is started
once, does one call after another, and is killed when a call takes too long or the caller is interrupted; the next call
starts another. What it returns comes over a pipe as JSON and raw arrays, never as a pickle.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from typing import IO, Any

import numpy as np

from convscope import errors, limits


class ReaderError(Exception):
    """The reader could not do it: out of time, out of memory, crashed, or an error that is none of convscope's.

    Attributes:
        kind: "time", "memory", "crash", or "error".
        found: the class of the error where `kind` is "error".
    """

    def __init__(self, kind: str, text: str, found: str = "") -> None:
        super().__init__(text)
        self.kind, self.found = kind, found


def call(function: str, *arguments: Any, memory: int | None = None, seconds: float | None = None) -> Any:
    """What a function of convscope's returns, computed in the reader.

    Args:
        function: "convscope.images:decode". It has to lie in convscope.
        arguments: None, bool, int, float, str, bytes, arrays, and lists and dicts (keys are str) of these; what comes
            back is of these too (a tuple comes back as a list).
        memory: bytes that the call may add to the reader's address space; no limit where None.
        seconds: instead of `limits.current().seconds`.

    Raises:
        ReaderError: it took too long, ran out of memory or crashed, or raised an error that is none of convscope's.
        ConvscopeError: the function raised it.
    """
    if not function.startswith("convscope."):
        raise ValueError(f"only functions of convscope are called in the reader, not {function}")
    limit = limits.current()
    asked = {"function": function, "limits": vars(limit), "memory": memory, "seconds": seconds or limit.seconds}
    return _THE_READER.ask(asked, list(arguments))


def start() -> None:
    """Start the reader now, beside what is imported meanwhile: the first call then waits less."""
    _THE_READER.start()


# -- the caller's side -----------------------------------------------------------------------------------

_CHILD = "import sys; sys.path[:] = {path!r}; from convscope.isolation import serve; serve()"


class _Reader:
    """The child and the pipes to it. One call at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self) -> None:
        with self._lock:
            self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():
            self._child = None  # after a fork it is the other process's
        if self._child is None or self._child.poll() is not None:
            self._owner = os.getpid()
            self._child = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=os.name == "posix",  # Ctrl-C in a terminal goes to the caller alone
            )
            _widen(self._child.stdout)
        return self._child

    def ask(self, asked: dict[str, Any], arguments: list[Any]) -> Any:
        with self._lock:
            whole = False
            try:
                child = self._started()
                assert child.stdin is not None
                assert child.stdout is not None
                pipe = _Timed(child.stdout, asked["seconds"])
                try:
                    _send(child.stdin, {**asked, "arguments": arguments})
                    answer = _receive(pipe)
                except (EOFError, BrokenPipeError) as error:
                    raise self._ended(child, asked["seconds"]) from error
                whole = True
            finally:
                if not whole:  # too late, interrupted, or dead: its state is not known any more
                    self.stop()
        if "error" in answer:
            raise _raised(answer)
        return answer["returned"]

    def _ended(self, child: subprocess.Popen[bytes], seconds: float) -> ReaderError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
        code = child.returncode
        if code is not None and -code == _ALARM:
            return _too_late(seconds)
        return ReaderError("crash", f"reading it ended the reader process (exit status {code})")

    def stop(self) -> None:
        """End the child, whatever it does."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        child.wait()


def _widen(pipe: IO[bytes] | None) -> None:
    """Arrays come in pieces as large as the pipe's buffer: Linux lets it have 1 MiB instead of 64 KiB."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        assert pipe is not None
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, 2**20)


_ALARM = 14  # SIGALRM, which the child asks for as its own limit


def _too_late(seconds: float) -> ReaderError:
    return ReaderError("time", f"reading it took longer than {seconds:g} s ({limits.how_to_raise('seconds')})")


def _raised(answer: dict[str, Any]) -> Exception:
    name, text = answer["error"], answer["text"]
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.ConvscopeError):
        return kind(text)
    if name == "MemoryError":
        return ReaderError("memory", "reading it takes more memory than a file of its size should")
    return ReaderError("error", text or name, name)


class _Timed:
    """A pipe that gives up at a time."""

    def __init__(self, pipe: IO[bytes], seconds: float) -> None:
        self._pipe, self._seconds, self._end = pipe, seconds, time.monotonic() + seconds

    def readinto(self, buffer: memoryview) -> int:
        left = self._end - time.monotonic()
        if left <= 0 or not _readable(self._pipe, left):
            raise _too_late(self._seconds)
        return os.readv(self._pipe.fileno(), [buffer]) if hasattr(os, "readv") else self._pipe.readinto(buffer)  # type: ignore[attr-defined]


def _readable(pipe: IO[bytes], seconds: float) -> bool:
    if os.name != "posix":  # pipes can't be waited for there: the child's own alarm has to do
        return True
    if hasattr(select, "poll"):  # select refuses descriptors over 1023
        poll = select.poll()
        poll.register(pipe, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(1000 * seconds))
    return bool(select.select([pipe], [], [], seconds)[0])


_THE_READER = _Reader()
atexit.register(_THE_READER.stop)


# -- the child's side ------------------------------------------------------------------------------------


def serve() -> None:
    """Answer calls from standard input until it ends. Runs in the child."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # what a library prints doesn't get into the answers
    while True:
        try:
            asked = _receive(source)
        except EOFError:
            return
        with _alarm(asked["seconds"]), _memory(asked["memory"]):
            answer = _answer(asked)
        try:
            _send(target, answer)
        except BrokenPipeError:
            return


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    module, _, name = asked["function"].partition(":")
    try:
        with limits.using(**asked["limits"]):
            return {"returned": getattr(importlib.import_module(module), name)(*asked["arguments"])}
    except BaseException as error:
        text = errors.one_line(error) if isinstance(error, Exception) else ""
        return {"error": type(error).__name__, "text": text}


@contextlib.contextmanager
def _alarm(seconds: float):  # type: ignore[no-untyped-def]
    """The kernel ends this process some time after the caller gave up: also where the caller is dead by then."""
    import signal

    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _memory(more: int | None):  # type: ignore[no-untyped-def]
    """A limit on what is allocated beyond what the process has now."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux: the declared sizes are checked all the same
        more = None
    if more is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + int(more)
    ceiling = before[1]
    resource.setrlimit(resource.RLIMIT_AS, (wanted if ceiling < 0 else min(wanted, ceiling), ceiling))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- messages: the length of a JSON text, the text, then the bytes of the arrays in it ----------------------


def _send(pipe: IO[bytes], message: Any) -> None:
    buffers: list[Any] = []
    text = json.dumps(_packed(message, buffers)).encode()
    for part in (struct.pack("<Q", len(text)), text, *buffers):
        view = memoryview(part).cast("B")
        while len(view):
            view = view[pipe.write(view) :]
        if hasattr(pipe, "flush"):
            pipe.flush()


def _receive(pipe: Any) -> Any:
    (length,) = struct.unpack("<Q", _read(pipe, 8))
    message = json.loads(bytes(_read(pipe, length)))
    return _unpacked(message, pipe)


def _read(pipe: Any, count: int) -> memoryview:
    view = memoryview(bytearray(count))
    _read_into(pipe, view)
    return view


def _read_into(pipe: Any, view: memoryview) -> None:
    while len(view):
        got = pipe.readinto(view)
        if not got:
            raise EOFError
        view = view[got:]


def _packed(value: Any, buffers: list[Any]) -> Any:
    """JSON of a value; arrays and bytes are put aside in `buffers`, in the order in which `_unpacked` meets them."""
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects can't be sent")
        buffers.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else b"")
        return {"$": "array", "dtype": np.lib.format.dtype_to_descr(value.dtype), "shape": list(value.shape)}
    if isinstance(value, bytes):
        buffers.append(value)
        return {"$": "bytes", "size": len(value)}
    if isinstance(value, dict):
        return {"$": "dict", "keys": list(value), "values": [_packed(item, buffers) for item in value.values()]}
    if isinstance(value, list | tuple):
        return [_packed(item, buffers) for item in value]
    return value


def _unpacked(value: Any, pipe: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, pipe) for item in value]
    if not isinstance(value, dict):
        return value
    if value["$"] == "dict":
        return dict(zip(value["keys"], [_unpacked(item, pipe) for item in value["values"]], strict=True))
    if value["$"] == "bytes":
        return bytes(_read(pipe, value["size"]))
    return _array(value, pipe)


def _array(about: dict[str, Any], pipe: Any) -> np.ndarray:
    descr = about["dtype"]
    if isinstance(descr, list):  # JSON made lists of the tuples of a structured type
        descr = [tuple(field) for field in descr]
    out = np.empty(about["shape"], np.lib.format.descr_to_dtype(descr))
    if out.size:
        _read_into(pipe, memoryview(out.reshape(-1).view(np.uint8).data))
    return out
