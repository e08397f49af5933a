"""Arrays: resizing, and reading NumPy's files.

The size that a header declares is compared with the file's before anything is allocated; no pickle and no `eval`: see
`reading.npy_header`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import numpy as np
from PIL import Image

from convscope import limits
from convscope.errors import ConvscopeError, Unreadable
from convscope.reading import Header, npy_header


class NotAnArray(Exception):
    """A file is not the expected array; the text describes what was found."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of arrays that belong together.

    Attributes:
        start: the number of the first row.
        count: number of rows in use; those after them only fill the batch up.
        arrays: a part of each array, of the batch's size.
    """

    start: int
    count: int
    arrays: tuple[np.ndarray, ...]


def batched(size: int, *arrays: np.ndarray) -> Iterator[Batch]:
    """The rows of arrays, `size` at a time; the last batch is padded, so that one compiled program serves all.

    >>> [(batch.start, batch.count, batch.arrays[0].tolist()) for batch in batched(2, np.arange(3))]
    [(0, 2, [0, 1]), (2, 1, [2, 2])]
    """
    total = len(arrays[0])
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield Batch(start, stop - start, tuple(padded(array[start:stop], size) for array in arrays))


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """A new array with `size` rows: the array's own, repeated in their order as often as needed."""
    # A new array in any case: an axis of one row may have any stride, and PyTorch rounds differently with another one.
    return np.resize(array, (size, *array.shape[1:]))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; no link, and never a pipe or a device, whose reading could wait for ever.

    Raises:
        OSError: it can't be opened.
        NotAnArray: it is no regular file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise NotAnArray("a link, a folder, a pipe or a device")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it may have been replaced in between
        file.close()
        raise NotAnArray("a link, a folder, a pipe or a device")
    return file


def header(file: BinaryIO, available: int) -> Header:
    """The header of a `.npy` file, whose values are all there.

    Args:
        file: at its first byte.
        available: bytes of the whole file.

    Raises:
        NotAnArray: it is damaged, contains no real numbers, or has another size than the header declares.
    """
    try:
        declared = npy_header(file)
    except Unreadable as reason:
        raise NotAnArray(f"one that can't be read ({reason.message})") from None
    if declared.start + declared.size != available:
        raise NotAnArray(f"{available} bytes where the header declares {declared.start + declared.size}")
    return declared


def read_npy(path: str | os.PathLike[str], *, mapped: bool = False, room: int | None = None) -> np.ndarray:
    """The array of a `.npy` file.

    Args:
        path: of a regular file.
        mapped: memory-mapped and read-only, instead of in memory.
        room: most bytes that it may take in memory; the limit `weights` where None.

    Raises:
        OSError: it can't be read. NotAnArray: it contains no plain array.
        ConvscopeError: it would take more than `room`.
    """
    with open_regular(path) as file:
        declared = header(file, os.fstat(file.fileno()).st_size)
        if mapped and declared.size:
            return np.memmap(file, declared.dtype, "r", declared.start, declared.shape, declared.order)
        if declared.size > (limits.current().weights if room is None else room):
            raise ConvscopeError(
                f"{os.fspath(path)!r} holds an array of {limits.shown('weights', declared.size)}, and what is read may "
                f"take less ({limits.how_to_raise('weights')}).",
                code="input-too-large",
                limit="weights",
            )
        values = np.fromfile(file, declared.dtype, prod(declared.shape))
    if len(values) != prod(declared.shape):
        raise NotAnArray("fewer values than the header declares")
    return values.reshape(declared.shape, order=declared.order)


_METHODS = {"nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}


def scale_pixels(pixels: np.ndarray, scale: float, method: str = "lanczos") -> np.ndarray:
    """Pixels to show, (h, w) or (h, w, 3) uint8, with both sides times `scale`, at least one pixel each.

    Args:
        method: "nearest", "box" or "lanczos", as Pillow names them.

    Example:
        >>> scale_pixels(np.zeros((40, 30, 3), np.uint8), 0.5).shape
        (20, 15, 3)
    """
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, _METHODS[method]))


def resize_map(heatmap: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) resized bilinearly, averaged where it shrinks: (height, width) float32."""
    image = Image.fromarray(np.ascontiguousarray(heatmap, np.float32))
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
