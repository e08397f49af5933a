"""Run one function in another process: for files that can hang or crash the library that reads them.

`call("convscope.reading:json_of", path)` runs a function in a child, the reader, with a limit on time and memory. The
child is started once, does one call after another, and is killed when a call takes too long or the caller is
interrupted; the next call starts another. Its return value comes over a pipe as JSON and raw arrays, never as a pickle.

Limits by system: time is limited everywhere. Memory is limited on Linux alone (macOS does not enforce such limits and
Windows has none), so the sizes that a file declares are checked before anything is allocated, everywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

from convscope import errors, limits
from convscope.messages import Pipe, Sent, message, receive, write_all


class ReaderError(Exception):
    """The reader could not do it: out of time, out of memory, crashed, or an error that is none of convscope's.

    Attributes:
        kind: "time", "memory", "crash", or "error".
        found: the class of the error where `kind` is "error".
    """

    def __init__(self, kind: str, text: str, found: str = "") -> None:
        super().__init__(text)
        self.kind, self.found = kind, found

    @property
    def code(self) -> str:
        """The code of the error that a caller makes of it: the file takes too much, or is so damaged."""
        return "input-too-large" if self.kind in ("time", "memory") else "file-damaged"


def call(function: str, *arguments: object, memory: int | None = None, seconds: float | None = None) -> Sent:
    """The return value of a function, computed in the reader.

    Args:
        function: "convscope.images.decode:decode_file", a function of any module that can be imported. The
            caller's code names it; no file ever does.
        arguments: None, bool, int, float, str, bytes, arrays, and lists and dicts (keys are str) of these; the return
            value is of these too (a tuple comes back as a list). A `Path` arrives as the text of an absolute path.
        memory: bytes that the call may add to the reader's address space; no limit where None.
        seconds: instead of `limits.current().seconds`.

    Raises:
        ReaderError: it took too long, ran out of memory or crashed, or raised an error that is none of convscope's.
        ConvscopeError: the function raised it, or no process can be started here.
    """
    return SHARED_READER.call(function, *arguments, memory=memory, seconds=seconds)


def each(function: str, many: Sequence[Sequence[object]], *, memory: int | None = None) -> list[Sent]:
    """`call(function, *arguments)` for each of `many`: its return value, or the error that it raises.

    Where arguments are small (paths), the reader gets the next call while the answer to the last one is fetched, so
    many small files take less time.
    """
    return SHARED_READER.each(function, many, memory=memory)


def start(*modules: str) -> None:
    """Start the reader now, in parallel with imports: the first call then waits less.

    Args:
        modules: modules that it imports at once, such as "convscope.images.decode".

    Raises:
        ConvscopeError: no process can be started here.
    """
    SHARED_READER.start(modules)


def _request(
    function: str, arguments: Sequence[object], memory: int | None, seconds: float | None
) -> dict[str, object]:
    limit = limits.current()
    seconds = limit.seconds if seconds is None else seconds
    about = {"function": function, "limits": vars(limit), "memory": memory, "seconds": seconds}
    # The reader's working folder is the one that it was started in.
    absolute = [os.path.abspath(item) if isinstance(item, os.PathLike) else item for item in arguments]
    return {**about, "arguments": absolute}


# -- the caller's side -----------------------------------------------------------------------------------

_GREETING = "here"
_CHILD = "import sys; sys.path[:] = {path!r}; from convscope.isolation import serve; serve({modules!r})"


class Reader:
    """A child of its own and the pipes to it; it does one call at a time and is started by the first."""

    def __init__(self) -> None:
        self._closed = False
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._clean = True  # no call is half done: a second interrupt can come while the first one is handled
        self._greeted = False  # the child has reported that it is ready
        _READERS.add(self)
        watched = _watched.get()
        if watched is not None:
            watched.append(self)

    def each(self, function: str, many: Sequence[Sequence[object]], *, memory: int | None = None) -> list[Sent]:
        """As the function `each` of this module does, in this reader's child."""
        return self._ask_each([_request(function, arguments, memory, None) for arguments in many])

    def close(self) -> None:
        """End the child for good, from any thread; a call that another thread waits for fails with a ReaderError."""
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()

    def start(self, modules: Sequence[str]) -> None:
        """Start the child now; see the function `start`."""
        _exclusively(self._lock, lambda: self._started(modules))

    def _started(self, modules: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        if self._closed:
            raise ReaderError("crash", "the reader process was closed")
        if not self._clean or (self._child is not None and self._child.poll() is not None):
            self.stop()
        if self._child is None:
            self._child, self._greeted = _launched(modules), False
        self._clean = True
        return self._child

    def call(self, function: str, *arguments: object, memory: int | None = None, seconds: float | None = None) -> Sent:
        """As the function `call` of this module does, in this reader's child."""
        return self._ask(_request(function, arguments, memory, seconds))

    def _ask(self, asked: dict[str, object]) -> object:
        (answer,) = self._ask_each([asked])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask_each(self, many: Sequence[dict[str, object]]) -> list[object]:
        answers: list[Sent] = []

        def ask() -> None:
            while len(answers) < len(many):
                self._converse(many[len(answers) :], answers)

        _exclusively(self._lock, ask)
        return answers

    def _converse(self, many: Sequence[dict[str, Sent]], answers: list[object]) -> None:
        """Send one call after another, until one is large, or the child has to be ended: then its last call failed."""
        child = self._asked(many[0])
        try:
            if not self._greeted:
                self._greeted = receive(_Timed(child, many[0]["seconds"])) == _GREETING
            for asked, following in zip(many, [*many[1:], None], strict=True):
                ahead = following is not None and _posted_ahead(child, following)
                answers.append(_result(receive(_Timed(child, asked["seconds"]))))
                if not ahead:
                    break
            self._clean = True
        except (EOFError, BrokenPipeError):
            answers.append(self._ended(child))
        except ReaderError as error:  # too late
            answers.append(error)
        finally:
            if not self._clean:  # too late, interrupted, or dead: its state is not known any more
                self.stop()

    def _asked(self, asked: dict[str, object]) -> subprocess.Popen[bytes]:
        """A child that has been sent a call: another one where the first one has died since its last call."""
        for last in (False, True):
            child = self._started()
            self._clean = False
            try:
                _post(child, asked)
                return child
            except BrokenPipeError:
                if last:
                    raise self._ended(child) from None
        raise AssertionError("unreachable")

    def _ended(self, child: subprocess.Popen[bytes]) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)
        code = child.returncode
        if code is not None and -code == _ALARM:
            return _too_late()
        if not self._greeted:
            return _not_startable(f"it ends at once, with exit status {code}")
        if code is not None and -code == _KILLED and not self._closed:
            return ReaderError("memory", "the system ended the reader process, as it does where the memory runs out")
        return ReaderError("crash", f"reading it ended the reader process (exit status {code})")

    def stop(self) -> None:
        """End the child in any state."""
        child = self._child
        if child is None:
            return
        child.kill()
        _close(child)
        child.wait()
        self._child = None

    def forget(self) -> None:
        """After a fork: the child is the other process's, and so is the thread that may hold the lock."""
        self._lock, child, self._child, self._clean = threading.RLock(), self._child, None, True
        if child is not None:
            child.returncode = 0  # not ours to wait for
            _close(child)


def _exclusively(lock: threading.RLock, body: Callable[[], object]) -> None:
    """Call `body` while the lock is held, which no outer call holds.

    A `with` does not suffice: a signal that is handled in a tracer's or debugger's function, on the line that leaves
    the `with`, would leave the lock held for ever. Here an interrupt of one release is followed by another.
    """
    try:
        try:
            lock.acquire()
            body()
        finally:
            _release(lock)
    finally:
        _release(lock)


def _release(lock: threading.RLock) -> None:
    with contextlib.suppress(RuntimeError):  # it is not held: not yet, or no longer
        lock.release()


def _launched(modules: Sequence[str]) -> subprocess.Popen[bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise _not_startable("this program tells of no Python interpreter")
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    environment = {**os.environ, **_FEW_THREADS}
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD.format(path=path, modules=tuple(modules))],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=os.name == "posix",  # Ctrl-C in a terminal goes to the caller alone
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except (OSError, ValueError) as error:
        raise _not_startable(getattr(error, "strerror", None) or str(error)) from error
    _widen(child)
    return child


# Each thread of a library costs address space, on which there is a limit; one file has work for few of them.
_FEW_THREADS = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _not_startable(reason: str) -> errors.ConvscopeError:
    return errors.ConvscopeError(
        f"files are read in a Python process of their own, but {sys.executable or 'none'!r} can't be started "
        f"({reason}): run convscope with a whole Python, whose interpreter sys.executable names.",
        code="reader-not-startable",
        name=sys.executable,
        reason=reason,
    )


def _widen(child: subprocess.Popen[bytes]) -> None:
    """Arrays come in pieces as large as the pipe's buffer: Linux lets it have 1 MiB instead of 64 KiB."""
    assert child.stdin is not None
    assert child.stdout is not None
    if os.name == "posix":
        os.set_blocking(child.stdin.fileno(), False)
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(child.stdout.fileno(), fcntl.F_SETPIPE_SZ, 2**20)


def _close(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


_ALARM = 14  # SIGALRM, which the child sets as its own limit
_KILLED = 9  # SIGKILL: where the memory runs out, Linux ends this process first (`_harmless_end`)


def _too_late() -> ReaderError:
    return ReaderError("time", f"reading it took too long ({limits.how_to_raise('seconds')})")


def _result(answer: dict[str, object]) -> Sent:
    return _raised(answer) if "error" in answer else answer["returned"]


def _raised(answer: dict[str, Sent]) -> Exception:
    name, text = answer["error"], answer["text"]
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.ConvscopeError):
        return kind(text, code=answer["code"], **answer["data"])
    if name == "MemoryError":
        return ReaderError("memory", "reading it takes more memory than a file of its size should")
    return ReaderError("error", text or name, name)


class _Timed:
    """The pipes of a child, with a deadline."""

    def __init__(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._in, self._out = child.stdin.fileno(), child.stdout.fileno()
        self._end = time.monotonic() + seconds

    def readinto(self, buffer: memoryview) -> int:
        self._wait(self._out, writing=False)
        if hasattr(os, "readv"):
            return os.readv(self._out, [buffer])
        got = os.read(self._out, min(len(buffer), 2**20))
        buffer[: len(got)] = got
        return len(got)

    def write(self, view: memoryview) -> int:
        while True:
            self._wait(self._in, writing=True)
            with contextlib.suppress(BlockingIOError):
                return os.write(self._in, view[: 2**20])

    def _wait(self, pipe: int, writing: bool) -> None:
        while (left := self._end - time.monotonic()) > 0:
            if _ready(pipe, writing, min(left, 60)):
                return
        raise _too_late()


def _ready(pipe: int, writing: bool, seconds: float) -> bool:
    if os.name != "posix":
        return writing or _filled(pipe)  # the child reads its input before it does anything
    if hasattr(select, "poll"):  # select refuses descriptors over 1023
        poll = select.poll()
        poll.register(pipe, select.POLLOUT if writing else select.POLLIN)
        return bool(poll.poll(1000 * seconds))
    lists = ([], [pipe]) if writing else ([pipe], [])
    return any(select.select(*lists, [], seconds))


def _filled(pipe: int) -> bool:
    """Whether a pipe of Windows has data; polled, since one can't wait for it and for Ctrl-C."""
    import _winapi  # type: ignore[import-not-found, unused-ignore]
    import msvcrt  # type: ignore[import-not-found, unused-ignore]

    held = _winapi.PeekNamedPipe(msvcrt.get_osfhandle(pipe), 0)[0]  # type: ignore[attr-defined, unused-ignore]
    if not held:
        time.sleep(0.002)
    return bool(held)


_READERS: weakref.WeakSet[Reader] = weakref.WeakSet()
_watched: ContextVar[list[Reader] | None] = ContextVar("watched", default=None)


def watch_readers() -> list[Reader]:
    """A list to which every `Reader` adds itself that is made in this context from now on.

    The caller of a function in a thread can so close the readers that it waits for.
    """
    readers: list[Reader] = []
    _watched.set(readers)
    return readers


def _stop_all() -> None:
    for reader in list(_READERS):
        reader.stop()


def _forget_all() -> None:
    for reader in list(_READERS):
        reader.forget()


SHARED_READER = Reader()
atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _post(child: subprocess.Popen[bytes], asked: dict[str, Sent]) -> None:
    write_all(_Timed(child, asked["seconds"]), message(asked))


_SMALL = 4096  # bytes that any pipe takes at once


def _posted_ahead(child: subprocess.Popen[bytes], asked: dict[str, Sent]) -> bool:
    """Whether a call was sent that the child reads later. A large one would wait for it while its answer waits."""
    parts = message(asked)
    if sum(map(len, parts)) > _SMALL:
        return False
    write_all(_Timed(child, asked["seconds"]), parts)
    return True


# -- the child's side ------------------------------------------------------------------------------------

_IN_THE_READER = False


def serve(modules: Sequence[str] = ()) -> None:
    """Answer calls from standard input until it ends. Runs in the child."""
    global _IN_THE_READER
    _IN_THE_READER = True
    source, target = _own_pipes()
    _harmless_end()
    write_all(target, message(_GREETING))
    for module in modules:
        with contextlib.suppress(Exception):  # the caller that needs it gets the error
            importlib.import_module(module)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            asked = receive(source)
            with bounded(asked["memory"], asked["seconds"] + 5):  # the caller gives up before that, if it lives
                parts = _answer(asked)
            write_all(target, parts)


def _own_pipes() -> tuple[Pipe, Pipe]:
    """The pipes to the caller, separate from the streams that a library reads or prints to."""
    source, target = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return source, target


def _harmless_end() -> None:
    """A crash leaves no core file, and where memory is short this process goes before the caller does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("900")


def _answer(asked: dict[str, Sent]) -> list[Sent]:
    """The parts of the reply."""
    module, _, name = asked["function"].partition(":")
    try:
        with limits.using(**asked["limits"]):
            return message({"returned": getattr(importlib.import_module(module), name)(*asked["arguments"])})
    except errors.ConvscopeError as error:
        data = {key: value for key, value in error.data.items() if _is_plain(value)}
        return message({"error": type(error).__name__, "text": error.message, "code": error.code, "data": data})
    except BaseException as error:
        text = errors.one_line(error) if isinstance(error, Exception) else ""
        return message({"error": type(error).__name__, "text": text})


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)


@contextlib.contextmanager
def bounded(memory: int | None = None, seconds: float | None = None) -> Iterator[None]:
    """Limits for a part of a call, set by the function that runs in the reader; elsewhere it does nothing.

    Args:
        memory: bytes that may be allocated beyond what the process has now; MemoryError where it does not suffice.
        seconds: after which the kernel ends the process, also where the caller is dead by then.
    """
    if not _IN_THE_READER:
        yield
        return
    with contextlib.ExitStack() as undo:
        if seconds is not None:
            undo.callback(_alarm(seconds))
        if memory is not None:
            undo.callback(_ceiling(memory))
        yield


def _alarm(seconds: float) -> Callable[[], object]:
    import signal

    if not hasattr(signal, "setitimer"):
        return lambda: None
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    before = signal.setitimer(signal.ITIMER_REAL, min(seconds, 10**8))[0]
    return lambda: signal.setitimer(signal.ITIMER_REAL, before)


def _ceiling(more: int) -> Callable[[], object]:
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux: the declared sizes are checked all the same
        return lambda: None
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted, hard = now + int(more), before[1]
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, before)
