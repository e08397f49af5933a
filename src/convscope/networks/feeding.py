"""What the inputs take that don't get the image: arrays as they are, and images, which are prepared like the image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from convscope import reading
from convscope.errors import ImageError, Unreadable, UsageError, nearest, option
from convscope.images import memory
from convscope.images.decode import read_image
from convscope.images.image import InputImage, fit_batch
from convscope.networks.inputs import blank_input
from convscope.networks.preprocessing import Preprocessing

Feed = np.ndarray | InputImage
Sides = Sequence[int | None]

MOST_CHANNELS = memory.MOST_CHANNELS


def read_feed(feed: Mapping[str, object]) -> dict[str, Feed]:
    """The values to feed as arrays and images.

    Args:
        feed: by the name of the input: an array or tensor; the path of a `.npy` file, or of a `.npz` file of one array;
            an image, as a path or as else `read_image` takes it, but as an array it is fed as it is.

    Raises:
        UsageError: a file is neither an array nor an image, or holds no numbers.

    Example:
        >>> read_feed({"mask": np.zeros((1, 4))})["mask"].shape
        (1, 4)
    """
    return {name: _read(name, value) for name, value in feed.items()}


def _read(name: str, value: object) -> Feed:
    try:
        if isinstance(value, str | os.PathLike) and not _is_image(os.fspath(value)):
            return np.asarray(reading.array_of(os.fspath(value)))
        if not isinstance(value, str | os.PathLike):
            array = memory.array_of(value)
            if array is None and isinstance(value, int | float | list | tuple):
                array = np.asarray(value)
            if array is not None:
                return _numbers(name, array)
        return read_image(value)  # type: ignore[arg-type]
    except (Unreadable, ImageError) as error:
        raise UsageError(
            f"expected an array (1, ...) or an image for the input {name!r}, found {value!r:.200} ({error.message}); "
            f"give one with {option('feed')}.",
            code="feed-invalid",
            name=name,
            reason=error.message,
        ) from error


def _is_image(path: str) -> bool:
    """True for a file that begins as no file of arrays does."""
    try:
        with reading.opened(reading.real(path)) as file:
            start = file.read(6)
    except (Unreadable, OSError):
        return False  # whose message says why
    return bool(start) and start != b"\x93NUMPY" and start[:4] != b"PK\x03\x04"


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise UsageError(
            f"the input {name!r} takes numbers, but the array that it is fed is of {array.dtype}.",
            code="feed-invalid",
            name=name,
            found=str(array.dtype),
        )
    return array


def image_input(asked: str | None, shapes: Mapping[str, Sides | None], fed: Collection[str]) -> str:
    """The name of the input that gets the image: the first that can take one and is not fed.

    Args:
        asked: the user's choice.
        shapes: of the inputs, the batch first, None for what is free; None where it is not known.
        fed: names of the inputs that are fed.

    Raises:
        UsageError: there is no such input, or it is fed, or all are.
    """
    if asked is not None and asked not in shapes:
        raise UsageError(f"no input {asked!r}; {nearest(asked, shapes)}", code="input-unknown", name=asked)
    for name in fed:
        if name not in shapes:
            raise UsageError(f"no input {name!r} to feed; {nearest(name, shapes)}", code="input-unknown", name=name)
    free = [name for name in shapes if name not in fed]
    if asked in fed or not free:
        name = asked or next(iter(fed))
        raise UsageError(
            f"the input {name!r} gets the image that is explained, so it can't be fed: leave it out of "
            f"{option('feed')}, or choose another input for the image with {option('open_model.input')}.",
            code="feed-is-image",
            name=name,
        )
    return asked or max(free, key=lambda name: _fitness(shapes[name]))


def _fitness(shape: Sides | None) -> int:
    """How well a shape fits that of images; the first one of the best is chosen."""
    if shape is None:
        return 2
    if len(shape) == 4:
        counts = [side for side in (shape[1], shape[3]) if side is None or side <= MOST_CHANNELS]
        return 4 if counts else 3
    return 1 if len(shape) == 3 else 0


def fed_values(
    names: Iterable[str], shapes: Mapping[str, Sides], feed: Mapping[str, Feed], whole: Collection[str] = ()
) -> dict[str, Feed]:
    """The values of the inputs that don't get the image; zeros where nothing is fed.

    Args:
        names: of these inputs; a shape is known of each that is not fed.
        shapes: of the inputs, the batch first.
        feed: the user's values.
        whole: names of inputs whose first side is no batch.

    Raises:
        UsageError: an array has another shape than its input.
    """
    return {
        name: _checked(name, feed[name], shapes.get(name), name in whole)
        if name in feed
        else blank_input(name, shapes[name], whole=name in whole)
        for name in names
    }


def _checked(name: str, value: Feed, shape: Sides | None, whole: bool) -> Feed:
    """A value that fits its input; an array of one item may lack the batch."""
    if isinstance(value, InputImage):
        if shape is not None and (whole or len(shape) not in (3, 4)):
            raise UsageError(
                f"the input {name!r} takes an array of shape {_text(shape, whole)}, and no image.",
                code="feed-misfit",
                name=name,
                expected=list(shape),
            )
        return value
    array = np.asarray(value)
    if shape is None:
        return array
    if not whole and array.ndim == len(shape) - 1:
        array = array[None]
    wanted = list(shape) if whole else [1, *shape[1:]]
    if array.ndim != len(wanted) or any(
        side not in (None, found) for side, found in zip(wanted, array.shape, strict=True)
    ):
        raise UsageError(
            f"the input {name!r} takes an array of shape {_text(shape, whole)}, but the one that it is fed has "
            f"{np.shape(value)}: give one of its shape.",
            code="feed-misfit",
            name=name,
            expected=wanted,
            found=list(np.shape(value)),
        )
    return array


def _text(shape: Sides, whole: bool) -> str:
    sides = ["any" if side is None else str(side) for side in (shape if whole else (1, *shape[1:]))]
    return f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"


def prepared(image: InputImage, shape: tuple[int, int, int], preprocessing: Preprocessing | None) -> np.ndarray:
    """A fed image as its input takes it: `(1, h, w, c)` float32.

    Args:
        image: the image.
        shape: `(h, w, c)` of its input.
        preprocessing: that of the image that is explained; None while it is not known yet.
    """
    pixels = fit_batch([image], *shape)
    return pixels if preprocessing is None else preprocessing.apply(pixels)


def described(value: Feed | None) -> str:
    """The value of an input other than the image, for people and for provenance."""
    if isinstance(value, InputImage):
        return f"the image {value.name!r} ({_digest(*value.arrays)})"
    if value is None or not value.any():
        return "zeros"
    return f"a given array {np.shape(value)} ({_digest(value)})"


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]
