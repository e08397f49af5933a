"""Values of more than 8 bits, and channels that are not red, green and blue: their range, and what is shown of them.

Everything here is in pixel units, 0..255: a network's preprocessing begins there. Values keep their fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

MOST_CHANNELS = 16
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# Ceilings of whole numbers, with their bits: cameras and scanners of 10, 12 and 14 bits write files of 16.
_CEILINGS = {255: 8, 1023: 10, 4095: 12, 16383: 14, 65535: 16}


@dataclass(frozen=True, eq=False)
class Decoded:
    """What decoding makes of an image.

    Attributes:
        pixels: `(h, w, 3)` uint8, RGB, upright.
        notes: descriptions of the changes by decoding.
        values: what the image holds beyond that, see `InputImage.values`.
        colour: False where `pixels` only show the image, see `InputImage.colour`.
    """

    pixels: np.ndarray
    notes: tuple[str, ...] = ()
    values: tuple[np.ndarray, ...] = ()
    colour: bool = True


@dataclass(frozen=True)
class Range:
    """The values that become 0 and 255.

    Attributes:
        low, high: these.
        note: the choice, for people.
    """

    low: float
    high: float
    note: str

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Values in pixel units, float32, not rounded."""
        wide = finite(values)
        return ((wide - self.low) * (255 / ((self.high - self.low) or 1))).astype(np.float32)


def finite(values: np.ndarray) -> np.ndarray:
    """Values as float64, with zeros in place of what is no finite number."""
    return np.nan_to_num(np.asarray(values).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


_BLOCK = 2**20  # values of one channel that are computed at once


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Values in pieces along their first axis, so that what is computed of them takes little memory."""
    step = max(1, _BLOCK * len(values) // max(1, values.size))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def _by_rows(
    function: Callable[[np.ndarray], np.ndarray], values: np.ndarray, channels: int, dtype: npt.DTypeLike
) -> np.ndarray:
    """`(h, w, channels)` of a function of rows of `(h, w, c)`, computed in pieces."""
    out = np.empty((*values.shape[:2], channels), dtype)
    done = 0
    for rows in _blocks(values):
        out[done : done + len(rows)] = function(rows)
        done += len(rows)
    return out


def range_of(parts: Iterable[np.ndarray], bits: int | None = None, what: str = "grey") -> Range:
    """The range of an image's values.

    It is the smallest usual one that holds all values, so that images of one kind stay comparable: 8, 10, 12, 14 or 16
    bits of whole numbers, 0..1 of others. Where none does, the values are stretched from their lowest to their highest.

    Args:
        parts: the values, in pieces of any shape.
        bits: as the file declares them, where it does.
        what: the image, for the note.

    Example:
        >>> range_of([np.array([0, 3000], np.uint16)]).high
        4095.0
    """
    ends, whole = [], True
    for part in parts:
        exact = part.dtype.kind in "iub"  # these are finite, and an image of them would take eight times its memory
        values = [part] if exact else (finite(rows) for rows in _blocks(part))
        ends += [(wide.min(), wide.max()) for wide in values]
        whole = whole and part.dtype.kind in "iub"
    low, high = float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    if low < 0 or high > (65535 if whole else 255):
        return Range(low, high, f"{what} stretched from {low:g}..{high:g}, not rounded to 8 bits")
    if not whole:
        return _of_floats(high, what)
    declared = None if bits is None else 2**bits - 1
    if declared is not None and high <= declared:
        return Range(0.0, float(declared), f"{bits}-bit {what} scaled from 0..{declared}, not rounded to 8 bits")
    return _of_whole_numbers(high, what)


def _of_floats(high: float, what: str) -> Range:
    if high <= 1:
        return Range(0.0, 1.0, f"floating-point {what} scaled from 0..1, not rounded to 8 bits")
    return Range(0.0, 255.0, f"floating-point {what} kept as it is, for its values fit 0..255")


def _of_whole_numbers(high: float, what: str) -> Range:
    top = next(ceiling for ceiling in _CEILINGS if high <= ceiling)
    if top == 255:
        return Range(0.0, 255.0, f"{what} of more than 8 bits kept as it is, for its values fit 0..255")
    reason = "" if top == 65535 else f" (by its highest value, {high:g})"
    return Range(0.0, float(top), f"{_CEILINGS[top]}-bit {what}{reason} scaled from 0..{top}, not rounded to 8 bits")


def shown(values: np.ndarray) -> np.ndarray:
    """RGB `(h, w, 3)` uint8 of values `(h, w, c)` in pixel units: grey of one or two channels, else the first three."""
    some = values[..., :3] if values.shape[-1] >= 3 else values[..., :1]
    return _by_rows(lambda rows: np.clip(np.rint(rows), 0, 255).astype(np.uint8), some, 3, np.uint8)


def over_white(values: np.ndarray) -> np.ndarray:
    """RGB `(h, w, 3)` float32 of values `(h, w, 4)` in pixel units, whose last channel is the opacity."""
    return _by_rows(_rows_over_white, values, 3, np.float32)


def _rows_over_white(values: np.ndarray) -> np.ndarray:
    opacity = values[..., 3:] / np.float32(255)
    return (values[..., :3] * opacity + 255 * (1 - opacity)).astype(np.float32)


def as_channels(values: np.ndarray, channels: int) -> np.ndarray:
    """Values `(h, w, c)` of 1 or 3 channels as 1 (luma) or 3 (the same three times)."""
    if values.shape[-1] == channels:
        return values
    if channels == 1:
        return (values.astype(np.float32) @ _LUMA)[..., None]
    return np.broadcast_to(values, (*values.shape[:2], 3))


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values `(h, w, c)` resized: `(height, width, c)` float32; bilinear, averaged where they shrink."""
    out = np.empty((height, width, values.shape[-1]), np.float32)
    for channel in range(values.shape[-1]):
        image = Image.fromarray(np.ascontiguousarray(values[..., channel], np.float32))
        out[..., channel] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return out


@dataclass(frozen=True)
class Meaning:
    """What the channels of an image stand for.

    Attributes:
        colour: the first three are red, green and blue, where there are more than two.
        opacity: a fourth one is the opacity.
    """

    colour: bool = True
    opacity: bool = True


def of_channels(values: np.ndarray, scale: Callable[[np.ndarray], np.ndarray], note: str, meaning: Meaning) -> Decoded:
    """An image of the channels `(h, w, c)`.

    Args:
        values: as they are.
        scale: brings one channel to pixel units.
        note: what it does, for people; "" for nothing.
        meaning: of the channels.
    """
    count = values.shape[-1]

    def each(rows: np.ndarray) -> np.ndarray:
        return np.stack([scale(rows[..., channel]) for channel in range(count)], axis=-1)

    scaled = _by_rows(each, values, count, each(values[:1]).dtype)
    notes = (note,) if note else ()
    if count == 4 and meaning.colour and meaning.opacity:
        rgb = over_white(scaled)
        more = ("transparency laid over white",) if (scaled[..., 3] < 255).any() else ()
        return Decoded(shown(rgb), notes + more, (rgb, scaled))
    if count > 3 and meaning.colour:
        return Decoded(shown(scaled), notes, (scaled[..., :3], scaled))
    return Decoded(shown(scaled), notes, (scaled,), colour=count in (1, 3))
