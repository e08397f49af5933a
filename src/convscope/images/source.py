"""Streams of images: any number of them, a few batches in memory at a time.

An `ImageSource` gives its images one after another, in the same order each time. `stream` reads them ahead of the
network in a thread, in batches; files are decoded in a reader process of the stream's own, and shrunk there to the size
that the network takes. An image that can't be read is left out, counted and named, and the stream goes on.

>>> import numpy as np
>>> from convscope.images.source import image_source, stream
>>> source = image_source([np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)])
>>> with stream(source, batch=1) as batches:
...     print([batch.images[0].name for batch in batches], batches.failures)
['image', 'image-2'] []
"""

from __future__ import annotations

import contextvars
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from convscope import isolation
from convscope.errors import ConvscopeError, ImageError, UsageError, bulleted, printable
from convscope.images.decode import Source, read_entries, read_images
from convscope.images.image import InputImage, Shape
from convscope.images.listing import Entry, different, entries_of, listed, no_images

AHEAD = 2  # batches that wait for the network, beside the one that it works on and the one that is being read
SHOWN = 5  # failures that a message names
CHUNK = 8  # files that the reader process is asked for together, where they are shrunk


@dataclass(frozen=True)
class Failure:
    """An image that was left out.

    Attributes:
        name: its name in the source.
        source: its path; None where it is no file.
        error: why it can't be read.

    Example:
        >>> source = image_source([PHOTOS[0], "no-such-file.jpg"])
        >>> [found.name for found in source.images() if isinstance(found, Failure)]
        ['no-such-file']
    """

    name: str
    source: str | None
    error: ConvscopeError


@runtime_checkable
class ImageSource(Protocol):
    """Images in a fixed order: the input of `stream` and of every technique.

    A source of your own is any object with this method. Where it has a length too, progress has a total.

    Example:
        >>> class Noise:
        ...     def images(self, shape=None):
        ...         for seed in range(3):
        ...             pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        ...             yield InputImage(f"noise-{seed}", pixels)
        >>> [row.image for row in convscope.heatmap(network, Noise()).rows]
        ['noise-0', 'noise-1', 'noise-2']
    """

    def images(self, shape: Shape | None = None) -> Iterator[InputImage | Failure]:
        """The images from the first to the last; each call begins anew.

        Args:
            shape: `(height, width, channels)` that the network takes. A source may give images of that size (see
                `image.fit`) instead of larger ones, to save memory; images of any size are right.
        """
        ...


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images by their entries, which lists, folders and tables become. A file is opened when it is its turn.

    Attributes:
        entries: in order.

    Example:
        >>> source = ImageList((Entry(PHOTOS[0], "tom", label="cats"),))
        >>> len(source), source.labels
        (1, ('cats',))
    """

    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that there are, sorted."""
        return tuple(sorted({entry.label for entry in self.entries if entry.label is not None}))

    def images(self, shape: Shape | None = None) -> Iterator[InputImage | Failure]:
        """As in `ImageSource`; the files are decoded in a reader process that ends with the iterator."""
        reader = isolation.Reader()
        try:
            size = 1 if shape is None else CHUNK
            for start in range(0, len(self.entries), size):
                yield from _read(self.entries[start : start + size], shape, reader)
        finally:
            reader.close()
            reader.stop()


Images = ImageSource | Source | Iterable[Source]


def image_source(images: Images) -> ImageSource:
    """The image source of a user's argument.

    Args:
        images: a folder of images; a folder whose subfolders hold the images of one class each, which are its labels;
            a `.csv` file with a column `path` (from the file's own folder) and perhaps a column `label`; a file; an
            array, or what else `read_image` takes; a list of all these; or a source, which comes back as it is.

    Returns:
        the source; files in the order of their names, without regard to case, and of a table in its order.

    Raises:
        UsageError: there is nothing to read. ImageError: a folder or table can't be read, or holds no image.

    Example:
        >>> source = convscope.image_source(PHOTOS[:2])
        >>> [image.name for image in source.images()]
        ['cat', 'coffee']
    """
    if isinstance(images, ImageSource):
        return images
    entries = [entry for one in listed(images) for entry in entries_of(one)]
    if not entries:
        raise no_images()
    names = different([entry.name for entry in entries])
    return ImageList(tuple(replace(entry, name=name) for entry, name in zip(entries, names, strict=True)))


def hold(images: Images, shape: Shape) -> tuple[InputImage, ...]:
    """Images for a technique that needs them all at once: those of a source at the size that the network takes.

    Args:
        images: a source, of which unreadable files are left out with a warning; or what `read_images` takes, which has
            to be whole and keeps its size.
        shape: `(height, width, channels)` that the network takes.

    Raises:
        ImageError: no image of the source can be read, or one of another collection can't. UsageError: there is none.
    """
    if not isinstance(images, ImageSource):
        return tuple(read_images(images))
    with stream(images, CHUNK, shape) as batches:
        found = tuple(image for batch in batches for image in batch.images)
    report_failures(batches)
    if not found:
        raise UsageError("at least one image is needed, but the source gives none", code="no-images")
    return found


def report_failures(batches: ImageStream) -> None:
    """At the end of a stream: a warning that counts and names the images left out.

    Raises:
        ImageError: nothing could be read.
    """
    failures = batches.failures
    if not failures:
        return
    shown = bulleted([f"{printable(failure.name)}: {failure.error.message}" for failure in failures], SHOWN)
    if not batches.read:
        raise ImageError(
            f"none of {len(failures)} images can be read:{shown}", code="images-unreadable", count=len(failures)
        )
    text = f"{len(failures)} of {len(failures) + batches.read} images can't be read and are left out:{shown}"
    warnings.warn(str(ConvscopeError(text, code="images-left-out", count=len(failures))), stacklevel=3)


def _read(entries: Sequence[Entry], shape: Shape | None, reader: isolation.Reader) -> Iterator[InputImage | Failure]:
    for entry, found in zip(entries, read_entries(entries, shape, reader), strict=True):
        yield Failure(entry.name, entry.path, found) if isinstance(found, ConvscopeError) else found


# -- the stream ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images that go through the network together.

    Attributes:
        start: the number of the first one among those that could be read.
        images: at most as many as were asked for; fewer in the last batch.

    Example:
        >>> with stream(image_source(PHOTOS[:3]), batch=2) as batches:
        ...     [(batch.start, len(batch.images)) for batch in batches]
        [(0, 2), (2, 1)]
    """

    start: int
    images: tuple[InputImage, ...]


@dataclass(frozen=True)
class _End:
    """The last item of the queue: the outcome of reading."""

    error: BaseException | None = None


@dataclass(eq=False)
class ImageStream:
    """Batches of a source, read ahead in a thread. Made by `stream`; `close` it, or use it in a `with` block.

    Attributes:
        source: of the images.
        batch: images in each batch but the last.
        shape: `(height, width, channels)` to which images are decoded, or None for their own.
        read: images that were taken so far.
        failures: the images left out so far; all of them at the end of the stream.

    Example:
        >>> with stream(image_source([PHOTOS[0], "no-such-file.jpg"]), batch=2) as batches:
        ...     [len(batch.images) for batch in batches], len(batches.failures)
        ([1], 1)
    """

    source: ImageSource
    batch: int
    shape: Shape | None = None
    failures: list[Failure] = field(default_factory=list)
    read: int = 0
    # Simple queues alone: Ctrl-C inside of another queue or of an Event could leave its lock held for ever.
    _ready: queue.SimpleQueue[ImageBatch | Failure | _End] = field(default_factory=queue.SimpleQueue, repr=False)
    _room: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue, repr=False)  # one for each item ahead
    _unwanted: bool = field(default=False, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _readers: list[isolation.Reader] = field(default_factory=list, repr=False)
    _ended: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        for _ in range(AHEAD):
            self._room.put(None)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self

    def __next__(self) -> ImageBatch:
        while not self._ended:
            self._begin()
            item = self._ready.get()
            self._room.put(None)
            match item:
                case ImageBatch() as found:
                    self.read += len(found.images)
                    return found
                case Failure() as failure:
                    self.failures.append(failure)
                case _End(error):
                    self.close()
                    if error is not None:
                        raise error
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and its reader process; images read ahead are dropped."""
        self._ended = True
        self._unwanted = True
        while self._thread is not None and self._thread.is_alive():
            self._room.put(None)
            for reader in list(self._readers):
                reader.close()
            self._thread.join(0.05)
        self._thread = None
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._ready.put(_End())  # a thread that waits for a batch is woken

    def _begin(self) -> None:
        if self._thread is None:
            context = contextvars.copy_context()  # the limits in force are those of the caller
            self._readers = context.run(isolation.watch_readers)
            self._thread = threading.Thread(target=context.run, args=(self._produce,), name="images", daemon=True)
            self._thread.start()

    def _produce(self) -> None:
        end = _End()
        try:
            images = self.source.images(self.shape)
            try:
                self._fill(images)
            finally:
                with suppress(AttributeError):  # an iterator that is no generator has nothing to close
                    images.close()  # type: ignore[attr-defined]
        except BaseException as error:  # the caller's thread raises it
            end = _End(error)
        self._put(end)

    def _fill(self, images: Iterator[InputImage | Failure]) -> None:
        some: list[InputImage] = []
        start = 0
        for found in images:
            if self._unwanted:
                return
            if isinstance(found, Failure):
                self._put(found)
                continue
            some.append(found)
            if len(some) == self.batch:
                self._put(ImageBatch(start, tuple(some)))
                start, some = start + len(some), []
        if some:
            self._put(ImageBatch(start, tuple(some)))

    def _put(self, what: ImageBatch | Failure | _End) -> None:
        self._room.get()
        if not self._unwanted:
            self._ready.put(what)


def stream(source: ImageSource, batch: int, shape: Shape | None = None) -> ImageStream:
    """The images of a source in batches, read ahead of whoever takes them.

    At most `AHEAD + 2` batches are in memory: those that wait, the one that is taken and the one that is being read
    (and `CHUNK` images beside it).

    Args:
        source: of the images; `image_source` makes one of a folder, a table or a list.
        batch: images in each batch but the last.
        shape: `(height, width, channels)` that the network takes: files are resized to it as they are decoded, bilinear
            as `image.fit` does. A JPEG of at least four times the size a side is decoded at 1/2, 1/4 or 1/8 first, so
            its pixels differ a little from those of `fit`; all others are the same. The images' own size where None.

    Raises:
        UsageError: `batch` is less than 1.

    Example:
        >>> with stream(image_source(PHOTOS[:2]), batch=1, shape=network.image_shape) as batches:
        ...     [batch.images[0].pixels.shape for batch in batches]
        [(224, 224, 3), (224, 224, 3)]
    """
    if batch < 1:
        raise UsageError(
            f"a batch needs at least 1 image, found {batch}.",
            code="argument-too-small",
            name="batch",
            found=batch,
            expected=1,
        )
    return ImageStream(source, batch, shape)
