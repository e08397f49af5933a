"""From a Pillow image to upright pixels, in strips: the memory for conversion does not grow with the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from convscope.images.values import Decoded, range_of

STRIP = 2**20  # pixels that are converted at a time

_ORIENTATION = 0x0112
TURNS = (2, 3, 4, 5, 6, 7, 8)  # all that change something
TURNED = "turned upright by its EXIF orientation"
LYING = (5, 6, 7, 8)  # the stored rows are the columns of the upright image


def orientation_of(image: Image.Image) -> int:
    """The number of EXIF that says how the stored rows lie; 1 where there is none."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except MemoryError:  # the note may be whole
        raise
    except Exception:  # a damaged note is no reason to refuse the pixels
        return 1


def upright(image: Image.Image, bits: int | None = None) -> Decoded:
    """Pixels, values and notes of an image; `bits` are those that its file declares, where it does."""
    before = orientation_of(image)
    image.load()
    after = orientation_of(image)  # PNG has it only now, and TIFF has been turned by now
    plan = _plan(image, bits)
    pixels = _filled(image, plan.pixels, (3,), np.uint8, after)
    values = tuple(_filled(image, *one, after) for one in plan.values)
    turned = (TURNED,) if before in TURNS or after in TURNS else ()
    return Decoded(pixels, (*plan.notes, *turned), values)


def turned_upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """An array `(h, w, ...)` as it is stored, upright."""
    height, width = stored.shape[:2]
    lying = orientation in LYING
    out = np.empty((width, height, *stored.shape[2:]) if lying else stored.shape, stored.dtype)
    as_stored(out, orientation)[:] = stored
    return out


def as_stored(out: np.ndarray, orientation: int) -> np.ndarray:
    """A view of an upright array, whose rows and columns are those that are stored."""
    turned = out.swapaxes(0, 1) if orientation in LYING else out
    if orientation in (3, 4, 6, 7):  # the first stored row is the last row, or column
        turned = turned[::-1]
    if orientation in (2, 3, 7, 8):
        turned = turned[:, ::-1]
    return turned


Convert = Callable[[Image.Image], np.ndarray]


@dataclass(frozen=True)
class _Plan:
    """How an image is converted; the notes are complete when all strips are done.

    Attributes:
        pixels: from a strip to RGB.
        values: from a strip to further values, with the shape of a pixel and the type.
        notes: what changes.
    """

    pixels: Convert
    values: tuple[tuple[Convert, tuple[int, ...], type], ...]
    notes: list[str]


def _plan(image: Image.Image, bits: int | None) -> _Plan:
    notes: list[str] = []
    if image.mode == "F" or image.mode.startswith("I"):
        return _of_wide_grey(image, bits)
    if image.mode in ("RGBA", "LA"):
        depth = len(image.mode)
        return _Plan(lambda strip: _over_white(strip, notes), ((np.asarray, (depth,), np.uint8),), notes)
    if image.has_transparency_data:
        return _Plan(lambda strip: _over_white(strip, notes), (), notes)
    if image.mode == "RGBX":  # a TIFF of four channels, of which the first three are colours
        return _Plan(lambda strip: np.asarray(strip.convert("RGB")), ((np.asarray, (4,), np.uint8),), notes)
    if image.mode not in ("RGB", "L", "P", "1"):
        notes.append(f"{image.mode} converted to RGB")
    return _Plan(lambda strip: np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB")), (), notes)


def _of_wide_grey(image: Image.Image, bits: int | None) -> _Plan:
    scale = range_of((np.asarray(strip) for _, strip in _strips(image)), bits)

    def values(strip: Image.Image) -> np.ndarray:
        return scale.scaled(np.asarray(strip))[..., None]

    def pixels(strip: Image.Image) -> np.ndarray:
        return np.clip(np.rint(values(strip)), 0, 255).astype(np.uint8)

    return _Plan(pixels, ((values, (1,), np.float32),), [scale.note])


def _over_white(strip: Image.Image, notes: list[str]) -> np.ndarray:
    rgba = strip if strip.mode == "RGBA" else strip.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return np.asarray(rgba.convert("RGB"))
    if not notes:
        notes.append("transparency laid over white")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _filled(image: Image.Image, convert: Convert, pixel: tuple[int, ...], kind: type, orientation: int) -> np.ndarray:
    """All strips converted, each put where it belongs in the upright image."""
    width, height = image.size
    out: np.ndarray = np.empty((width, height, *pixel) if orientation in LYING else (height, width, *pixel), kind)
    stored = as_stored(out, orientation)
    for start, strip in _strips(image):
        stored[start : start + strip.height] = convert(strip)
    out.setflags(write=False)
    return out


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of full width from top to bottom, with their first rows."""
    rows = max(1, STRIP // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for start in range(0, image.height, rows):
        yield start, image.crop((0, start, image.width, min(start + rows, image.height)))
