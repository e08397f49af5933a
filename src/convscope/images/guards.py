"""Guards of decoding: the size, time and memory that an image may take, and one error for whatever a decoder raises."""

from __future__ import annotations

import mmap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from convscope import isolation, limits
from convscope.errors import ConvscopeError, ImageError, one_line

HEADER_MEMORY = 256 * 2**20  # limit of opening a file and of decoding a small one
PIXEL_MEMORY = 32  # bytes: openjpeg, which takes most, has needed 22 for RGB; the other decoders need 6 to 18
WIDE_MEMORY = 64  # of a pixel of more than 8 bits, beside that of its channels
CHANNEL_MEMORY = 32  # of each value of an image of channels
CANVAS_MEMORY = 16  # of a pixel of a WebP, whose decoder makes two canvases of 4 bytes when the file is opened
BYTES_OF_A_PIXEL = 4  # times the limit of pixels: most bytes that the values of one image may have


class Damaged(ValueError):
    """A file is not as its format demands; the text is the reason."""


@contextmanager
def enough_for(pixels: int, each: int) -> Iterator[None]:
    """Time and memory for the pixels that the header declares: half of the time, and a share of the other half.

    The slowest format needs 0.3 s for a million pixels (JPEG 2000), so half a minute is enough for any image, also
    where the machine has other work, and only the largest images need more.

    Raises:
        MemoryError: the memory does not suffice; see `room`.
    """
    limit = limits.current()
    more = pixels * each
    seconds = limit.seconds * min(1, 0.5 + 0.5 * pixels / limit.pixels)
    large = more > HEADER_MEMORY / 4
    with isolation.bounded(HEADER_MEMORY + more if large else None, seconds), room(HEADER_MEMORY / 2 + more):
        yield


@contextmanager
def room(memory: float) -> Iterator[None]:
    """A block that needs so many bytes of memory at most; where the system has less, its errors are due to that.

    A decoder reports an allocation that failed as `MemoryError`, as `SystemError`, or as it reports a damaged file. So
    the system is asked before the block begins whether it has the memory, and its answer tells them apart.

    Raises:
        MemoryError: the block failed, and the memory does not suffice.
    """
    enough = fits(int(memory))
    try:
        yield
    except (ConvscopeError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:
        if enough:
            raise
        raise MemoryError(one_line(error)) from error


def fits(count: int) -> bool:
    """Whether `count` bytes can be allocated now: the system is asked for them, and gets them back untouched."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        mmap.mmap(-1, max(count, 1), **private).close()
    except (OSError, OverflowError, MemoryError):
        return False
    return True


@contextmanager
def pillow_limit(pixels: int | None) -> Iterator[None]:
    """The number of pixels that Pillow warns of, and twice of which it refuses; the user's own comes back."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def one_message(what: str, path: str | None = None) -> Iterator[None]:
    """Turn whatever a decoder throws into one ImageError; its warnings are of no use to the reader.

    Args:
        what: the image, for the message.
        path: of its file, for programs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ConvscopeError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large(what, one_line(error)) from error
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what is needed to make the message
        raise ImageError(
            f"{what} does not fit in the memory: make a smaller copy, or free memory", code="out-of-memory", path=path
        ) from error
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        reason = one_line(error)
        said = reason if isinstance(error, Damaged) else f"Pillow says: {reason}"
        raise ImageError(
            f"{what} should be a whole image, but it is damaged or cut short ({said}): "
            "copy or download it again, or save it anew as PNG",
            code="file-damaged",
            path=path,
            reason=reason,
        ) from error


def too_large(what: str, found: str) -> ImageError:
    """The error of an image that is beyond the limit of pixels."""
    most = limits.current().pixels
    limit = f"at most {most // 1_000_000} million" if most >= 1_000_000 else f"at most {most}"
    return ImageError(
        f"{what} is too large to decode safely, {limit} pixels are read ({found}; {limits.how_to_raise('pixels')}): "
        "make a smaller copy",
        code="input-too-large",
        limit="pixels",
    )


def check_size(width: int, height: int, what: str) -> None:
    """Check the size that a header declares.

    Raises:
        ImageError: it has no pixels, or more than the limit.
    """
    if width * height > limits.current().pixels:
        raise too_large(what, f"its header says {width} x {height}")
    if not width * height:
        raise ImageError(
            f"{what} should hold pixels, but it is {width} x {height}: make it anew",
            code="image-empty",
            size=[height, width],
        )


def check_bytes(count: int, what: str) -> None:
    """Check the bytes of the values that a header declares, unpacked.

    Raises:
        ImageError: they are more than `BYTES_OF_A_PIXEL` times the limit of pixels.
    """
    most = BYTES_OF_A_PIXEL * limits.current().pixels
    if count > most:
        raise too_large(what, f"its header declares {count} bytes of values, and at most {most} are unpacked")
