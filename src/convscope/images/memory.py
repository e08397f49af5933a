"""Images that a program holds: arrays, tensors of any library, the bytes of a file, and open files.

A tensor is told by what it can do, so no framework is imported for it. Each is accepted, or refused by one message.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol, TypeGuard, runtime_checkable

import numpy as np

from convscope import limits
from convscope.errors import ImageError, UsageError, one_line
from convscope.images.values import MOST_CHANNELS, Decoded, Meaning, of_channels, range_of

NAME = "image"  # of an image without a file
_USUAL = (1, 3, 4)
_WANTED = (
    f"an image has to be an array (h, w) or (h, w, c) of 1 to {MOST_CHANNELS} channels, of uint8 0..255, uint16, or "
    "floats 0..1"
)


@runtime_checkable
class ArrayLike(Protocol):
    """A tensor of any library, which NumPy can make an array of."""

    def __array__(self) -> np.ndarray:
        """The values."""
        ...


Encoded = bytes | bytearray | memoryview | IO[bytes]


def is_encoded(source: object) -> TypeGuard[Encoded]:
    """True for the bytes of a file, or an open file."""
    return isinstance(source, bytes | bytearray | memoryview) or callable(getattr(source, "read", None))


def encoded(source: Encoded) -> bytes:
    """The bytes of a file, from its beginning where it can go back there; an open file stays where it was.

    Raises:
        ImageError: there are more than the limit allows, or it can't be read. UsageError: it is open as text.
    """
    most = limits.current().file
    if isinstance(source, bytes | bytearray | memoryview):
        if memoryview(source).nbytes > most:
            raise _too_many_bytes()
        return bytes(source)
    data = _read_from(source, most)
    if not isinstance(data, bytes):
        raise UsageError(
            "an open file of an image has to give bytes: open it with 'rb'", code="image-kind", found="text"
        )
    if len(data) > most:
        raise _too_many_bytes()
    return data


def _read_from(file: IO[bytes], most: int) -> object:
    try:
        if not file.seekable():
            return file.read(most + 1)
        at = file.tell()
        file.seek(0)
        data = file.read(most + 1)
        file.seek(at)
        return data
    except AttributeError:  # an object that can only be read
        return file.read(most + 1)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"this open file can't be read ({one_line(error)}): open it with 'rb', and keep it open",
            code="file-unreadable",
            reason=one_line(error),
        ) from error


def _too_many_bytes() -> ImageError:
    return ImageError(
        f"the bytes of an image are more than may be read ({limits.how_to_raise('file')})",
        code="input-too-large",
        limit="file",
    )


def name_of(source: object) -> str:
    """The name of an image that is no path: that of an open file, else `NAME`."""
    name = getattr(source, "name", None) if is_encoded(source) else None
    return Path(os.path.basename(name)).stem or NAME if isinstance(name, str) else NAME


def array_of(source: object) -> np.ndarray | None:
    """The array of a tensor; None for what is none.

    Raises:
        UsageError: it has no values that can be read.
    """
    if isinstance(source, np.ndarray):
        return source
    if not isinstance(source, ArrayLike) or isinstance(source, type):
        return None
    try:
        array = np.asarray(_of_torch(source) if _is_torch(source) else source)
    except Exception as error:  # whatever the library raises
        raise UsageError(
            f"this {type(source).__name__} has no values that can be read ({one_line(error)}): give a NumPy array",
            code="image-kind",
            found=type(source).__name__,
        ) from error
    return array.astype(np.float32) if array.dtype.kind == "V" and array.dtype.itemsize <= 2 else array  # bfloat16


class _TorchTensor(ArrayLike, Protocol):
    def detach(self) -> _TorchTensor: ...
    def cpu(self) -> _TorchTensor: ...
    def float(self) -> _TorchTensor: ...
    def is_floating_point(self) -> bool: ...


def _of_torch(tensor: _TorchTensor) -> ArrayLike:
    """A tensor whose memory is the host's and belongs to no gradient."""
    here = tensor.detach().cpu()
    return here.float() if here.is_floating_point() else here


def _is_torch(source: object) -> TypeGuard[_TorchTensor]:
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(source).__mro__)


def images_of(array: np.ndarray, source: object) -> Sequence[object]:
    """The images of an array: those of a batch `(n, h, w, c)`, the paths of an array of texts, or itself."""
    if array.dtype.kind in "OUS" and array.ndim == 1:
        return array.tolist()
    if array.ndim != 4:
        return [source]
    return [Item(one, _is_torch(source)) for one in array]


class Item:
    """One image of a batch, and whether the library of the batch has channels first."""

    def __init__(self, array: np.ndarray, channels_first: bool) -> None:
        self.array, self.channels_first = array, channels_first


def decoded(source: object) -> Decoded | None:
    """The image of an array or tensor; None where it is neither.

    Raises:
        UsageError: it is no image.
    """
    if isinstance(source, Item):
        return _decoded(source.array, source.channels_first)
    array = array_of(source)
    return None if array is None else _decoded(array, _is_torch(source))


def _decoded(array: np.ndarray, channels_first: bool) -> Decoded:
    if array.dtype.kind not in "biuf":
        raise _of_kind(f"is of {array.dtype}", "make one of numbers", found=str(array.dtype))
    image, notes = _channels_last(array, channels_first)
    made = _of_bytes(image) if image.dtype == np.uint8 else _of_numbers(image)
    return Decoded(made.pixels, (*notes, *made.notes), made.values, made.colour)


def _channels_last(array: np.ndarray, habit: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """The image `(h, w, c)`, and a note where its axes were changed.

    Args:
        array: of any shape.
        habit: the library has the channels first.
    """
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        return _channels_last(array[0], habit)
    if array.ndim == 4:
        raise _of_kind(f"is a batch of {shape[0]}, {shape}", "give one of them", found=list(shape))
    if array.ndim not in (2, 3) or 0 in shape:
        raise _of_kind(f"has the shape {shape}", "give one image", found=list(shape))
    if array.ndim == 2:
        return array[..., None], ()
    if _first(shape, habit):
        return np.moveaxis(array, 0, -1), ("channels first: turned to (h, w, c)",)
    if shape[2] > MOST_CHANNELS:
        raise _of_kind(f"has the shape {shape}", "give one image, channels last", found=list(shape))
    return array, ()


def _first(shape: tuple[int, ...], habit: bool) -> bool:
    """Whether the first axis is that of the channels: only it has few enough, or the usual number of them."""
    first, last = shape[0] <= MOST_CHANNELS, shape[2] <= MOST_CHANNELS
    if not (first and last):
        return first
    usual, usual_last = shape[0] in _USUAL, shape[2] in _USUAL
    return usual and (habit or not usual_last) if usual or usual_last else habit


def _of_bytes(image: np.ndarray) -> Decoded:
    if image.shape[-1] in (1, 3):
        pixels = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        return Decoded(pixels.copy() if np.shares_memory(pixels, image) else pixels)
    return of_channels(np.array(image), lambda channel: channel, "", _meaning(image))


def _of_numbers(image: np.ndarray) -> Decoded:
    if image.dtype.kind == "b":
        made = _of_bytes(image.astype(np.uint8) * 255)
        return Decoded(made.pixels, ("boolean: False is 0, True is 255",), made.values, made.colour)
    wrong = int(image.size - np.isfinite(image).sum())
    if wrong:
        what = f"has {wrong} values that are no finite numbers (NaN or infinity)"
        raise UsageError(_message(what, "replace them"), code="image-not-finite", count=wrong)
    low, high = float(image.min()), float(image.max())
    if image.dtype.kind == "f":
        _check_floats(image, low, high)
    elif low < 0 or high > 65535:
        raise _out_of_range(low, high, "scale it to uint8 0..255 or uint16")
    scale = range_of([image], what="array")
    return of_channels(image, scale.scaled, scale.note, _meaning(image))


def _meaning(image: np.ndarray) -> Meaning:
    """Four channels are RGB with opacity; more are not known."""
    return Meaning(colour=image.shape[-1] <= 4)


def _check_floats(image: np.ndarray, low: float, high: float) -> None:
    """Floats are 0..1, or 0..255 as the loaders of frameworks give them; between these nobody can tell."""
    if low < 0:
        raise _out_of_range(low, high, "give it as it was before its preprocessing, which convscope does itself")
    if high > 255:
        raise _out_of_range(low, high, "scale it to 0..1")
    if 1 < high <= 16 and (image != np.rint(image)).any():
        raise _out_of_range(low, high, "clip it to 0..1, or scale it to 0..255")


def _out_of_range(low: float, high: float, remedy: str) -> UsageError:
    return UsageError(_message(f"has values of {low:g}..{high:g}", remedy), code="image-range", low=low, high=high)


def _of_kind(what: str, remedy: str, found: object) -> UsageError:
    return UsageError(_message(what, remedy), code="image-kind", found=found)


def _message(what: str, remedy: str) -> str:
    return f"{_WANTED}, but this one {what}: {remedy}"
