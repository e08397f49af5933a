"""The user's model comes back as it was, wherever an interrupt falls.

A handler of a signal (Ctrl-C, a test's time limit) runs between any two steps of the main thread, and may raise there:
also between a change and the `try` that would undo it, and inside of `__exit__`. So while something of the user's is
changed the handlers are a gate's. It decides by the present state:

- *held*: a change is being made or undone. The signal waits.
- *soft*: the model runs. The signal waits for the next `checkpoint`, where an exception is as harmless as one of the
  model's own; the frameworks' code and the user's is not made to be left anywhere. It waits `PATIENCE` seconds at
  most, for a model that never comes to an end.
- *open*: convscope's own code runs. The signal is handled at once.

Every signal reaches the user's own handler, once. Threads other than the main one never handle signals; a session stops
a cancelled request of its thread at the same places (`stoppable`).
"""

from __future__ import annotations

import _signal  # what `signal` wraps: without its enumerations reading a handler takes a fiftieth of the time
import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar

Made = TypeVar("Made")
Result = TypeVar("Result")

PATIENCE = 5.0  # seconds; tracing a large network takes as long
_HELD, _SOFT, _OPEN = "held", "soft", "open"
_NEVER = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
# The usual signals; a real-time signal with a handler that raises is not known of any program.
_SIGNALS = [int(number) for number in sorted(signal.valid_signals()) if number < 32 and number not in _NEVER]
_SIGNALS.sort(key=lambda number: number != signal.SIGINT)  # taken first and given back last


def restored(
    switch: Callable[[ExitStack], Made], body: Callable[[Made], Result], lock: threading.RLock | None = None
) -> Result:
    """The result of `body`, run between a change to the user's model and its undoing.

    Args:
        switch: makes the change, quickly; the undoing of a step is pushed on the stack before the step is taken.
        body: runs the model; its argument is the return value of `switch`.
        lock: held for the whole of it; signals are handled while it is waited for.
    """
    gate = _gate()
    before = gate.enter()
    try:
        with ExitStack() as undo:
            if lock is not None:
                _acquire(lock, gate, undo)
            made = switch(undo)
            try:
                gate.soften()
                return body(made)
            finally:  # an exception on the way into here has closed the gate itself
                gate.hold()
    finally:
        gate.leave(before)


def exclusively(lock: threading.RLock, body: Callable[[], Result]) -> Result:
    """The result of `body`, quick work that is done while `lock` is held.

    A `with` does not suffice: a signal that is handled in a tracer's or debugger's function, on the line that leaves
    the `with`, would leave the lock held for ever.
    """
    return restored(_changes_nothing, lambda _: body(), lock)


def _changes_nothing(undo: ExitStack) -> None:
    """The `switch` of `exclusively`."""


class Block:
    """A change for the length of a `with`, in which convscope's own code runs.

    Args:
        switch: as for `restored`.
    """

    def __init__(self, switch: Callable[[ExitStack], object]) -> None:
        self._switch, self._undo, self._begun = switch, ExitStack(), False
        self._gate, self._before = _gate(), _OPEN

    def __enter__(self) -> None:
        self._before = self._gate.enter()
        self._begun = True
        try:
            self._switch(self._undo)
        except BaseException:
            self._end()
            raise
        self._gate.open()

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._begun:
            self._gate.hold()
            self._begun = False
            try:
                self._undo.close()
            finally:
                self._gate.leave(self._before)


def checkpoint() -> None:
    """Handle the signals that wait, at a place where an exception does no harm."""
    _gate().checkpoint()


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[None]:
    """For the length of a block `stop` is called wherever a signal would be handled, and may raise there.

    It applies to the passes of this thread, which must not be the main one.
    """
    before, _ELSEWHERE.stop = _ELSEWHERE.stop, stop
    try:
        yield
    finally:
        _ELSEWHERE.stop = before


def _acquire(lock: threading.RLock, gate: _Gate | _Elsewhere, undo: ExitStack) -> None:
    while not lock.acquire(timeout=0.1):
        gate.checkpoint()
    undo.callback(lock.release)


# The frames in which the gate is not yet, or no longer, in force.
_SWITCHING = {Block.__enter__.__code__, Block.__exit__.__code__, Block._end.__code__}


class _Gate:
    """Takes the place of the handlers of the main thread's signals."""

    def __init__(self) -> None:
        self._mode, self._users = _OPEN, 0
        self._taken: dict[int, object] = {}
        self._waiting: dict[_thread.LockType, int] = {}  # a reminder's lock, and which signal waits
        self._overdue: set[int] = set()
        self._handler = self._arrived  # one object, so that it can be told from others

    def enter(self) -> str:
        """Hold signals from here on; returns the argument for `leave`."""
        before = self._mode if self._users else _OPEN
        if not self._users:
            self._take()
        self._mode = _HELD
        self._users += 1
        return before

    def leave(self, before: str) -> None:
        """Handle signals as before `enter`, those first that wait."""
        self._users -= 1
        try:
            if self._users:
                self._mode = before
            else:
                self._end()
        finally:
            if self._mode != _HELD:
                self._deliver()

    def hold(self) -> None:
        """Something is changed."""
        self._mode = _HELD

    def open(self) -> None:
        """Convscope's own code runs."""
        self._mode = _OPEN

    def soften(self) -> None:
        """The model runs, if no signal waits."""
        self._mode = _SOFT
        self._deliver()

    def checkpoint(self) -> None:
        """Handle the signals that wait."""
        if self._waiting:
            self._deliver()

    def _take(self) -> None:
        self._waiting.clear()
        self._overdue.clear()
        taken = self._taken = {number: own for number, own in self._taken.items() if self._is_there(number)}
        try:
            self._mode = _HELD  # from the first one that is taken
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler) and handler is not self._handler:
                    taken[number] = handler
                    _signal.signal(number, self._handler)
        except BaseException:  # the exception of another signal's own handler
            self._end()
            raise

    def _is_there(self, number: int) -> bool:
        return _signal.getsignal(number) is self._handler

    def _end(self) -> None:
        """Give the handlers back; twice, since one that is back may raise before all are."""
        try:
            self._give_back()
        finally:
            try:
                self._give_back()
            finally:
                self._mode = _OPEN

    def _give_back(self) -> None:
        """Give those handlers back that nobody has changed since."""
        for number, handler in reversed(self._taken.items()):
            if self._is_there(number) and _is_main():
                _signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals."""
        if self._mode != _HELD and number in self._overdue:
            self._overdue.discard(number)
            before, self._mode = self._mode, _HELD  # stays so if the handler raises: what follows is undoing
            self._call(number, frame)
            self._mode = before
        elif self._mode == _OPEN and not _is_switching(frame):
            self._call(number, frame)
        elif number not in self._waiting.values():
            self._wait(number)

    def _wait(self, number: int) -> None:
        delivered = _thread.allocate_lock()
        delivered.acquire()
        self._waiting[delivered] = number
        try:
            _thread.start_new_thread(self._remind, (delivered,))  # threading's own locks may be held just now
        except RuntimeError:  # no more threads: it waits for as long as it takes
            return

    def _remind(self, delivered: _thread.LockType) -> None:
        """Send a signal again that has waited for too long."""
        if not delivered.acquire(timeout=PATIENCE):
            number = self._waiting.pop(delivered, None)  # one step: it is handled here or there
            if number is not None:
                self._overdue.add(number)
                _thread.interrupt_main(signal.Signals(number))

    def _deliver(self) -> None:
        while self._waiting:
            delivered: Any = next(iter(self._waiting), None)
            number = self._waiting.pop(delivered, None)  # a reminder may have taken it
            if number is not None:
                delivered.release()
                try:
                    self._call(number, sys._getframe())
                finally:  # an exception of one does not hide the others
                    self._deliver()

    def _call(self, number: int, frame: FrameType | None) -> None:
        handler = self._taken.get(number)
        if callable(handler):
            handler(number, frame)


class _Elsewhere(threading.local):
    """The gate of all other threads, which no signal interrupts; `stoppable` takes the place of signals."""

    stop: Callable[[], None] | None = None

    def enter(self) -> str:
        """See `_Gate`."""
        return _OPEN

    def leave(self, before: str) -> None:
        """See `_Gate`."""

    def hold(self) -> None:
        """See `_Gate`."""

    def checkpoint(self) -> None:
        """See `_Gate`."""
        if self.stop is not None:
            self.stop()

    open, soften = hold, checkpoint


_MAIN, _ELSEWHERE = _Gate(), _Elsewhere()


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _gate() -> _Gate | _Elsewhere:
    return _MAIN if _is_main() else _ELSEWHERE


def _is_switching(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _SWITCHING:
            return True
        frame = frame.f_back
    return False
