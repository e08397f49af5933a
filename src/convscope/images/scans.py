"""What a file declares, read without decoding: scans of a JPEG, frames of a GIF or TIFF, the size of a WebP."""

from __future__ import annotations

import re
import struct

from PIL import Image

from convscope.errors import ImageError
from convscope.images import tiff

MAX_SCANS = 100  # of a JPEG: files that people make have about ten, and each takes as long as a whole image
MAX_FRAMES = 10_000  # that are counted


def check_scans(image: Image.Image, data: bytes, path: str) -> None:
    """A JPEG of many scans takes the time of as many images.

    Raises:
        ImageError: it has more than `MAX_SCANS`.
    """
    if image.format not in ("JPEG", "MPO") or data.count(b"\xff\xda") <= MAX_SCANS:
        return  # the common case in the time that finding two bytes takes
    if (scans := _scans(data)) > MAX_SCANS:
        raise ImageError(
            f"{path} should be an image, but it is a JPEG of {scans} scans or more, and at most {MAX_SCANS} are "
            "decoded: save it anew as PNG",
            code="input-too-large",
            found=scans,
            expected=MAX_SCANS,
        )


# Of any number of bytes 0xff before a marker the last one is enough: a pattern of two bytes is found in linear time.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)


def _scans(data: bytes) -> int:
    """How many scans the first image of a JPEG file has, counted to one more than `MAX_SCANS`."""
    at, count = 2, 0
    while count <= MAX_SCANS and (found := _MARKER.search(data, at)):
        kind, at = found[1][0], found.end()
        if kind == 0xD9:
            break
        if len(data) < at + 2:
            break
        count += kind == 0xDA
        at += 0 if kind == 0x01 else struct.unpack_from(">H", data, at)[0]
    return count


def frame_notes(kind: str, data: bytes, image: Image.Image | None = None) -> tuple[str, ...]:
    """The number of frames, where there are several, for people.

    Pillow counts the frames of a GIF and the directories of a TIFF by reading each: there is a shorter way.
    """
    counted = {"TIFF": _tiff_frames, "GIF": _gif_frames}.get(kind)
    try:
        frames = counted(data) if counted else getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:  # one of the later frames is damaged
        return ("first of several frames",)
    if frames > MAX_FRAMES:
        return (f"first of more than {MAX_FRAMES} frames",)
    return (f"first of {frames} frames",) if frames > 1 else ()


def _tiff_frames(data: bytes) -> int:
    return len(tiff.places(data, MAX_FRAMES + 1))


def _gif_frames(data: bytes) -> int:
    """The frames of a GIF; counted to one more than `MAX_FRAMES`."""
    at, frames = 13 + _table(data[10]), 0
    while frames <= MAX_FRAMES and at < len(data) and data[at : at + 1] != b";":
        kind = data[at : at + 1]
        if kind == b"!":
            at = _after_blocks(data, at + 2)
        elif kind == b",":
            frames += 1
            at = _after_blocks(data, at + 11 + _table(data[at + 9]))
        else:
            at += 1
    return frames


def _table(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while length := data[at]:
        at += length + 1
    return at + 1


def size_of_webp(data: bytes) -> tuple[int, int] | None:
    """Width and height that the header of a WebP declares; None where it is none.

    Source: RFC 9649, sections 2.5 to 2.7 and 3.4; RFC 6386, section 9.1.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    return None
