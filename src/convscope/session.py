"""One opened network with a worker thread of its own: requests queue there, can be cancelled, and are cached.

A page that a person explores asks for many things at once and no longer needs most of them a moment later. A `Session`
computes one request at a time on its own thread; a newer request of a kind replaces an older one that still waits; a
request that runs stops at its next step once it is cancelled; and results are cached.

>>> import convscope
>>> from convscope.demo import CLASSES, MODEL, PHOTOS
>>> with convscope.Session(MODEL, classes=CLASSES) as session:
...     request = convscope.Request.of("heatmap", PHOTOS[0], target="cat")
...     heatmap = session.get(request)
...     session.get(request) is heatmap
True
"""

from __future__ import annotations

import atexit
import contextvars
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from convscope.errors import ConvscopeError, UsageError
from convscope.events import Event, Progress, tell
from convscope.networks import Network, open_model
from convscope.networks.restoring import exclusively, stoppable
from convscope.requests import Request
from convscope.results import Result

__all__ = ["CACHE_BYTES", "Handle", "RequestCancelled", "RequestReplaced", "Session"]

CACHE_BYTES = 512 * 2**20
PATIENCE = 10.0  # seconds that closing waits for a pass that is running
TICK = 0.2  # seconds between checks for Ctrl-C, which can't interrupt a wait on Windows


class RequestCancelled(ConvscopeError):
    """A request was cancelled, or its session was closed.

    >>> import convscope
    >>> from convscope.demo import MODEL, PHOTOS
    >>> session = convscope.Session(MODEL)
    >>> handle = session.submit(convscope.Request.of("filters", "block4_conv", steps=10_000))
    >>> handle.cancel()
    True
    >>> session.close()
    >>> handle.result()
    Traceback (most recent call last):
    convscope.session.RequestCancelled: the request was cancelled.
    """


class RequestReplaced(RequestCancelled):
    """A newer request of the same kind took a waiting one's place.

    >>> issubclass(RequestReplaced, RequestCancelled)
    True
    """


class _Stopped(BaseException):
    """A cancelled request stops here. Not an Exception, so that no layer and no technique catches it."""


# -- handles ---------------------------------------------------------------------------------------------


class Handle(Future[Result]):
    """The handle of a request: a `concurrent.futures.Future`, also for `asyncio.wrap_future`.

    `result()` waits for the result and raises the error of the request instead if there was one: `RequestCancelled`
    if it was cancelled, `RequestReplaced` if a newer request of its kind took its place.

    Attributes:
        request: the request.
        kind: the kind that it was submitted as, or None.

    >>> import convscope
    >>> from convscope.demo import MODEL, PHOTOS
    >>> with convscope.Session(MODEL) as session:
    ...     handle = session.submit(convscope.Request.of("activations", PHOTOS[0], "block4_conv"))
    ...     handle.result().layers[0].path, handle.done(), handle.cancelled()
    ('block4_conv', True, False)
    """

    def __init__(self, session: Session, request: Request, kind: Hashable, progress: Progress) -> None:
        super().__init__()
        self.request, self.kind = request, kind
        self._worker = session._worker
        self._session: Session | None = session  # a session that somebody waits for does not end
        self._progress = progress
        self._context = contextvars.copy_context()  # limits and NumPy's error state are those of the caller
        self._stopping = self._settled = False  # of the worker, under its lock

    def cancel(self) -> bool:
        """Cancel the request: it ends with `RequestCancelled`, at its next step if it is running.

        Returns:
            False if it had ended before.
        """
        return self._worker.cancel(self)

    def cancelled(self) -> bool:
        """True if it ended with `RequestCancelled`."""
        return self.done() and isinstance(self.exception(), RequestCancelled)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Args:
            timeout: seconds to wait; for as long as it takes if None.

        Raises:
            TimeoutError: it took longer; RequestCancelled; UsageError: this is the session's own thread, which can't
                wait for itself; or the technique's own error.
        """
        if not self.done() and self._worker.is_here():
            raise UsageError(
                "a callback of a session can't wait for a request to it: submit it, and add a callback.",
                code="wait-in-callback",
            )
        return super().result(timeout)

    def _check(self) -> None:
        if self._stopping or self._worker.ended:
            raise _Stopped

    def _told(self, event: Event) -> None:
        """The `progress` of the technique."""
        self._check()
        tell(self._progress, event)

    def _end(self, answer: Result | BaseException) -> None:
        self._session = None
        if isinstance(answer, BaseException):
            self.set_exception(answer)
        else:
            self.set_result(answer)


# -- the session -----------------------------------------------------------------------------------------


class Session:
    """An opened network whose requests are computed one at a time, on a thread of its own.

    Args:
        model: an opened network, or what `open_model` takes; `options` are those of `open_model`.
        cache_bytes: results are kept until their arrays take more than this, the least recently used
            are dropped first. A result that alone takes more is not kept. 0 keeps none.
        unchanging: nobody changes the weights while the session is open. They are hashed once then, and a result that
            is kept is answered at once, also while another request runs. Otherwise they are hashed for each request,
            so that the session of a model that is being trained gives no answer of earlier weights. None: True if the
            session opens a file itself.

    The arrays of its results are read-only, since a result may be given out more than once. Callbacks (`progress`, and
    those of `Handle.add_done_callback`) run on the session's thread. Any number of threads may use a session, and
    several sessions and direct calls may use models that share layers: their passes take turns.

    Errors of a request reach its handle alone, and the session goes on. Passes through the model by other code than
    convscope's have to wait until no request runs.

    Attributes:
        network: the opened network.

    >>> import convscope
    >>> from convscope.demo import CLASSES, MODEL, PHOTOS
    >>> session = convscope.Session(MODEL, classes=CLASSES)
    >>> hovers = [convscope.Request.of("heatmap", PHOTOS[0], target=name) for name in CLASSES]
    >>> handles = [session.submit(request, kind="hover") for request in hovers]
    >>> handles[-1].result().rows[0].class_name == CLASSES[-1]  # all but the last may have been replaced
    True
    >>> session.close()
    """

    def __init__(
        self,
        model: object,
        *,
        cache_bytes: int = CACHE_BYTES,
        unchanging: bool | None = None,
        **options: Any,
    ) -> None:
        if cache_bytes < 0:
            raise UsageError(
                f"cache_bytes must be at least 0, found {cache_bytes}.",
                code="argument-too-small",
                name="cache_bytes",
                found=cache_bytes,
                expected=0,
            )
        self.network: Network = open_model(model, **options)
        stays = isinstance(model, str | os.PathLike) if unchanging is None else unchanging
        self._worker = _Worker(self.network, _Cache(cache_bytes), stays)
        self._unused = weakref.finalize(self, self._worker.end)
        self._unused.atexit = False  # frameworks register what they do at exit when they are first used, so after this
        self._worker.start()

    def submit(self, request: Request, kind: Hashable = None, progress: Progress = None) -> Handle:
        """Put a request into the queue.

        Args:
            request: see `Request.of`.
            kind: if a request of this kind is waiting, this one takes its place, and the other one ends with
                `RequestReplaced`. One that is running goes on.
            progress: called on the session's thread, as the technique calls its own `progress`. An error that it raises
                ends the request.

        Raises:
            UsageError: the session is closed.

        >>> import convscope
        >>> from convscope.demo import MODEL, PHOTOS
        >>> with convscope.Session(MODEL) as session:
        ...     handle = session.submit(convscope.Request.of("heatmap", PHOTOS[0]), kind="hover")
        ...     len(handle.result().maps)
        1
        """
        handle = Handle(self, request, kind, progress)
        self._worker.submit(handle)
        return handle

    def get(self, request: Request, kind: Hashable = None, progress: Progress = None) -> Result:
        """Submit a request and wait for its result; Ctrl-C cancels it.

        Args:
            request, kind, progress: see `submit`.

        Raises:
            RequestCancelled: see `Handle`; or the technique's own error.

        >>> import convscope
        >>> from convscope.demo import MODEL, PHOTOS
        >>> with convscope.Session(MODEL) as session:
        ...     session.get(convscope.Request.of("concepts", PHOTOS, count=3)).values.shape[-1]
        3
        """
        handle = self.submit(request, kind, progress)
        try:
            while True:
                try:
                    return handle.result(TICK)
                except TimeoutError:
                    if handle.done():
                        return handle.result()
        except BaseException:
            handle.cancel()
            raise

    def close(self) -> None:
        """Cancel waiting and running requests, and end the thread; a second call does nothing.

        >>> import convscope
        >>> from convscope.demo import MODEL
        >>> session = convscope.Session(MODEL)
        >>> session.close()
        >>> session.closed
        True
        """
        self._worker.end()
        self._worker.join()

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._worker.ended

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The thread of a session. It holds no reference to the session, so that one that nobody uses ends."""

    def __init__(self, network: Network, cache: _Cache, unchanging: bool) -> None:
        self._network, self._cache, self._unchanging = network, cache, unchanging
        self._sha256: str | None = None  # of weights that do not change, once it is known
        self._lock = threading.RLock()
        self._waiting: OrderedDict[Hashable, Handle] = OrderedDict()
        self._running: Handle | None = None
        self.ended = False
        # One token for each thing to check. A SimpleQueue can be put to while garbage is collected.
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"session of {network.name}", daemon=True)

    def start(self) -> None:
        """Begin; the thread ends before the process does, which a thread in a framework's code could crash."""
        self._thread.start()
        atexit.register(self._at_exit)

    def is_here(self) -> bool:
        """True if this is the session's own thread."""
        return threading.current_thread() is self._thread

    def submit(self, handle: Handle) -> None:
        """See `Session.submit`."""
        found, replaced = exclusively(self._lock, lambda: self._queued(handle))
        if replaced is not None:
            replaced._end(
                RequestReplaced("a newer request of the same kind took the place of this one.", code="request-replaced")
            )
        if found is not None:
            handle._end(found)
        self._tokens.put(None)

    def _queued(self, handle: Handle) -> tuple[Result | None, Handle | None]:
        """Its result if it is kept; else the handle is put into the queue. And the handle whose place it takes."""
        if self.ended:
            raise UsageError("the session is closed.", code="session-closed")
        place = handle if handle.kind is None else handle.kind
        found = None if self._sha256 is None else self._cache.get((self._sha256, handle.request))
        replaced = self._waiting.get(place)
        if found is not None:
            self._waiting.pop(place, None)
        else:
            self._waiting[place] = handle  # where another one stood, at its place in the queue
        for settled in (None if found is None else handle, replaced):
            if settled is not None:
                settled._settled = True
        return found, replaced

    def cancel(self, handle: Handle) -> bool:
        """See `Handle.cancel`."""
        before = exclusively(self._lock, lambda: self._left(handle))
        if before == "waiting":
            handle._end(_cancelled())
        return before != "ended"

    def _left(self, handle: Handle) -> str:
        """Let a request stop, and take it out of the queue; it was "waiting", "running" or "ended" before."""
        if handle._settled:
            return "ended"
        handle._stopping = True
        if handle is self._running:
            return "running"
        del self._waiting[handle if handle.kind is None else handle.kind]
        handle._settled = True
        return "waiting"

    def end(self) -> None:
        """Cancel everything, and let the thread end. Takes no lock: it is also called while garbage is collected."""
        atexit.unregister(self._at_exit)
        self.ended = True
        self._tokens.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, but not for a pass that takes too long."""
        if not self.is_here():
            self._thread.join(PATIENCE)

    def _at_exit(self) -> None:
        self.end()
        self.join()

    def _work(self) -> None:
        with ExitStack() as block:
            if self._unchanging:
                block.enter_context(self._network.unchanging())
            while not self.ended:
                self._tokens.get()
                self._serve_next()
        with self._lock:
            left = list(self._waiting.values())
            self._waiting.clear()
            for handle in left:
                handle._settled = True
        for handle in left:
            handle._end(_cancelled())

    def _serve_next(self) -> None:
        with self._lock:
            if self.ended or not self._waiting:
                return
            _, handle = self._waiting.popitem(last=False)
            self._running = handle
        handle.set_running_or_notify_cancel()
        answer: Result | BaseException
        try:
            answer = handle._context.run(self._answer, handle)
        except _Stopped:
            answer = _cancelled()
        except BaseException as error:  # any error belongs to the request
            answer = error
        with self._lock:
            self._running, handle._settled = None, True
        handle._end(_cancelled() if handle._stopping else answer)
        del handle, answer  # the traceback of an error holds this frame

    def _answer(self, handle: Handle) -> Result:
        """The result from the cache, else from the technique. The key holds the hash of the weights."""
        request, network = handle.request, self._network
        with stoppable(handle._check), ExitStack() as block:
            if not self._unchanging:
                block.enter_context(network.unchanging())  # for the length of a request, which reads them once
            sha256 = network.weights_sha256()
            if self._unchanging:
                self._sha256 = sha256
            found = self._cache.get((sha256, request))
            if found is not None:
                return found
            result = request.run(network, handle._told)
        for array in _arrays(result):
            array.flags.writeable = False
        if request.by_value and (self._unchanging or network.weights_sha256() == sha256):
            self._cache.put((sha256, request), result)
        return result


def _cancelled() -> RequestCancelled:
    return RequestCancelled("the request was cancelled.", code="request-cancelled")


# -- the cache -------------------------------------------------------------------------------------------


class _Cache:
    """Results under a limit of bytes; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._kept: OrderedDict[tuple[str, Request], tuple[Result, int]] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: tuple[str, Request]) -> Result | None:
        """The result under a key, if it is kept."""
        return exclusively(self._lock, lambda: self._found(key))

    def _found(self, key: tuple[str, Request]) -> Result | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: tuple[str, Request], result: Result) -> None:
        """Keep a result; one that is larger than the limit is not kept."""
        size = sum(array.nbytes for array in _arrays(result))
        with self._lock:
            if size > self._limit or key in self._kept:
                return
            while self._used + size > self._limit:
                _, (_, freed) = self._kept.popitem(last=False)
                self._used -= freed
            self._kept[key] = result, size
            self._used += size


def _arrays(value: object) -> Iterator[np.ndarray]:
    """Every array in a result."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _arrays(item)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _arrays(getattr(value, one.name))
