"""Tiles in rows, with labels under them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from convscope.arrays import scale_pixels
from convscope.errors import UsageError
from convscope.render.text import FAINT_INK, INK, WHITE, font_of, leading, padded, text_strip, text_width, wrapped

_NARROWEST = 104  # pixels that a label of three digits and a word needs

_LONGEST = 30_000  # pixels; beyond, many programs can't show an image

_FLAGS = {"weak": (166, 77, 0), "dead": (92, 92, 92)}


def grid(tiles: Sequence[np.ndarray], columns: int, gap: int, fill: int = 0) -> np.ndarray:
    """All tiles, row by row, the last row as long as it happens to be.

    Args:
        tiles: n images of one shape (h, w, 3) or (h, w, 4) uint8.
        columns: tiles in a row; fewer where there are fewer tiles.
        gap: pixels between tiles (none around them).
        fill: grey of the gaps and of places without a tile (0 is clear where there is a fourth channel).

    Returns:
        (rows * (h + gap) - gap, columns * (w + gap) - gap, 3 or 4) uint8.

    Raises:
        UsageError: there is no tile, or less than one column.
    """
    if not len(tiles) or columns < 1:
        raise UsageError(
            f"a grid needs a tile and a column at least, not {len(tiles)} and {columns}",
            code="grid-empty",
            count=len(tiles),
            columns=columns,
        )
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width, depth = tiles[0].shape
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, depth), fill, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        out[top : top + height, left : left + width] = tile
    return out


@dataclass(frozen=True)
class Label:
    """The label under a tile.

    Attributes:
        name: in dark ink.
        value: at the right of the name, or below where both don't fit.
        lines: fainter, below.
        flag: "weak" or "dead", which gets a strip and a frame of its own colour; "" for neither.
    """

    name: str
    value: str = ""
    lines: tuple[str, ...] = ()
    flag: str = ""


def tile_side(count: int) -> int:
    """How long the longer side of each of `count` labelled tiles may be, in pixels."""
    return 160 if count <= 64 else 128 if count <= 256 else _NARROWEST


def sized_tile(image: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    """An image (h, w, 3) uint8 with its longer side in the range: enlarged by a whole number, or averaged."""
    height, width = image.shape[:2]
    side = max(height, width)
    if side < smallest:
        times = min(math.ceil(smallest / side), max(1, largest // side))
        return image.repeat(times, axis=0).repeat(times, axis=1)
    if side <= largest:
        return image
    return scale_pixels(image, largest / side)


def at_most(image: np.ndarray, side: int) -> np.ndarray:
    """An image brought to a longest side of `side` pixels, up or down, so that panels are alike."""
    scale = side / max(image.shape[:2])
    return scale_pixels(image, scale, "nearest" if scale >= 4 else "lanczos")


def words_tile(height: int, width: int, text: str) -> np.ndarray:
    """A grey tile with `text` in the largest letters that fit, or with a cross where none do: (h, w, 3) uint8."""
    tile = Image.new("RGB", (width, height), (208, 208, 208))
    draw, room = ImageDraw.Draw(tile), width - 8
    for size in (13, 12, 11, 10, 9):
        lines = wrapped(text, room, size)
        if len(lines) * leading(size) <= height - 8 and all(text_width(line, size) <= room for line in lines):
            draw.multiline_text((4, 4), "\n".join(lines), INK, font_of(size), spacing=leading(size) - size)
            return np.asarray(tile)
    draw.line((0, 0, width - 1, height - 1), FAINT_INK)
    draw.line((0, height - 1, width - 1, 0), FAINT_INK)
    return np.asarray(tile)


def labelled_grid(tiles: Sequence[np.ndarray], labels: Sequence[Label], columns: int | None = None) -> np.ndarray:
    """Tiles on white, row by row, each with its label under it.

    Args:
        tiles: n images of one shape (h, w, 3) uint8.
        labels: n of them.
        columns: tiles in a row; 8 for up to 64 tiles, else about as many as rows. Fewer or more where the sheet would
            be longer than 30,000 pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UsageError: there is no tile, or less than one column.
    """
    if not tiles or (columns is not None and columns < 1):
        raise UsageError(
            f"a sheet needs a tile and a column at least, not {len(tiles)} and {columns}",
            code="grid-empty",
            count=len(tiles),
            columns=columns,
        )
    width = max(tiles[0].shape[1], _NARROWEST)
    stacked = any(text_width(f"{label.name}  {label.value}", 12) > width for label in labels)
    captions = [_caption(label, width, stacked) for label in labels]
    tall = max(map(len, captions))
    whole = [
        np.vstack([_framed(tile, label.flag, width), padded(caption, tall, width)])
        for tile, label, caption in zip(tiles, labels, captions, strict=True)
    ]
    wanted = columns or (8 if len(tiles) <= 64 else math.ceil(math.sqrt(len(tiles))))
    return grid(whole, _bounded_columns(wanted, len(whole), whole[0].shape), 10, WHITE)


def _bounded_columns(wanted: int, count: int, shape: tuple[int, ...]) -> int:
    """The requested number, if neither side of the sheet gets too long."""
    most_rows, most = (max(1, _LONGEST // (side + 10)) for side in shape[:2])
    return min(max(wanted, math.ceil(count / most_rows)), most, count)


def _framed(tile: np.ndarray, flag: str, width: int) -> np.ndarray:
    """A tile in the middle of its column; one with a flag has a frame."""
    missing = width - tile.shape[1]
    tile = np.pad(tile, ((0, 0), (missing // 2, missing - missing // 2), (0, 0)), constant_values=WHITE)
    if flag not in _FLAGS:
        return tile
    for line in range(min(3, len(tile) // 4)):
        tile[line], tile[-1 - line], tile[:, line], tile[:, -1 - line] = (_FLAGS[flag],) * 4
    return tile


def _caption(label: Label, width: int, stacked: bool) -> np.ndarray:
    """The strips under a tile: flag, name and value, lines."""
    strips = [_flag_strip(label.flag, width)] if label.flag in _FLAGS else []
    if stacked:
        strips += [text_strip(text, width, 12) for text in (label.name, label.value) if text]
    else:
        strips.append(_two_ended(label.name, label.value, width))
    strips += [text_strip(line, width, 12, FAINT_INK) for line in label.lines]
    return np.vstack(strips)


def _two_ended(left: str, right: str, width: int) -> np.ndarray:
    strip = Image.fromarray(text_strip(left, width, 12))
    ImageDraw.Draw(strip).text((width, strip.height / 2), right, INK, font_of(12), anchor="rm")
    return np.asarray(strip)


def _flag_strip(flag: str, width: int) -> np.ndarray:
    strip = Image.new("RGB", (width, 18), _FLAGS[flag])
    ImageDraw.Draw(strip).text((6, 9), flag, "white", font_of(12), anchor="lm")
    return np.asarray(strip)
