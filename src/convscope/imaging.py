"""Drawing: from raw values to 8-bit pictures (normalise, colour, grid, overlay, sheet) and to files.

Everything here takes and returns NumPy arrays, (h, w, 3) uint8 for pictures, and knows no framework.
Values are normalised here and nowhere else, so results stay raw.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import math
import os
import re
import secrets
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from convscope.errors import ConvscopeError, UsageError, nearest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_WHITE = 255
_INK, _FAINT_INK = (32, 32, 32), (110, 110, 110)
_TILE_SIDE = 80
_FLAT_TILE_SIDE = 32
_PHOTO_SIDE = 200
_TEXT_WIDTH = 720
_MARGIN = 12
_NARROWEST = 104  # pixels that a label of three digits and a word needs
_LONGEST = 30_000  # pixels; beyond, many programs can't show a picture
_FLAGS = {"weak": (166, 77, 0), "dead": (92, 92, 92)}


# --- values to levels ------------------------------------------------------------------------------------


def classic_tile(channel: np.ndarray) -> np.ndarray:
    """The classic look of one channel: mean 0, divided by its standard deviation, times 64, plus 128.

    Each channel gets its own scale, so tiles show patterns and not magnitudes; `shared_tiles` keeps those.

    Args:
        channel: (h, w), any real values; those that are not finite count as 0.

    Returns:
        (h, w) uint8, clipped to 0..255 and truncated. A constant channel has no pattern: it is 0 everywhere,
        so that it reads as empty.
    """
    values = _tame(channel)
    deviation = values.std()
    if values.min() == values.max() or not deviation:
        return np.zeros(values.shape, np.uint8)
    levels = (values - values.mean()) / deviation * 64 + 128
    return np.clip(levels, 0, 255).astype(np.uint8)


def shared_tiles(activation: np.ndarray) -> np.ndarray:
    """One scale for all channels of a layer, so that magnitudes can be compared.

    Args:
        activation: (h, w, c), any real values; those that are not finite count as 0.

    Returns:
        (h, w, c) uint8: 0 is the layer's minimum (or 0 where nothing is negative), 255 its maximum.
    """
    values = _tame(activation).astype(np.float64)
    low, high = _span(values)
    return np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def filter_picture(picture: np.ndarray, crop: int) -> np.ndarray:
    """The classic look of an optimised picture: contrast 0.15 around grey, without its border.

    Args:
        picture: (h, w, c) as the model takes it; values that are not finite count as 0.
        crop: pixels left out on each side.

    Returns:
        (h - 2 * crop, w - 2 * crop, c) uint8.

    Raises:
        UsageError: `crop` is negative or leaves nothing.
    """
    height, width = picture.shape[:2]
    if not 0 <= 2 * crop < min(height, width):
        raise UsageError(f"the crop has to leave part of a {height} x {width} picture, but it is {crop}")
    values = np.clip(_finite(picture), -1e15, 1e15)  # beyond, the variance of float32 overflows
    values = (values - values.mean()) / (values.std() + 1e-5) * 0.15
    values = values[crop : height - crop, crop : width - crop] + 0.5
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def plain_picture(pixels: np.ndarray) -> np.ndarray:
    """Pixels (h, w, c) in 0..255 as they are: uint8, clipped; values that are not finite count as 0."""
    return np.clip(np.round(_finite(pixels)), 0, 255).astype(np.uint8)


def clipped_picture(pixels: np.ndarray, share: float = 0.01) -> np.ndarray:
    """Pixels stretched to the full range, but for the outermost values, which are clipped.

    Args:
        pixels: (h, w, c), on any scale, which all channels share; values that are not finite count as 0.
        share: of the values that is clipped at each end.

    Returns:
        (h, w, c) uint8; mid-grey where nothing is left to stretch.
    """
    values = _finite(pixels)
    low, high = np.quantile(values, [share, 1 - share])
    if not high > low:
        return np.full(values.shape, 128, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _finite(values: np.ndarray) -> np.ndarray:
    """`values` in float32 or float64, where NaN and infinities are 0."""
    values = np.asarray(values)
    dtype = np.float64 if values.dtype.itemsize > 4 else np.float32
    return np.nan_to_num(values.astype(dtype), nan=0.0, posinf=0.0, neginf=0.0)


def _tame(values: np.ndarray) -> np.ndarray:
    """`values`, finite, times the power of two that brings the largest magnitude into 0.5..1.

    Nothing overflows or underflows then, and unlike another factor a power of two changes no digit.
    """
    values = _finite(values)
    _, exponent = np.frexp(np.abs(values).max(initial=0))
    return np.ldexp(values, -int(exponent))


def _span(values: np.ndarray) -> tuple[float, float]:
    return min(float(values.min()), 0.0), float(values.max())


# --- levels to pictures ----------------------------------------------------------------------------------


def colour(levels: np.ndarray, name: str = "viridis") -> np.ndarray:
    """Levels (...) uint8 through matplotlib's colour map `name`: (..., 3) uint8.

    Raises:
        UsageError: there is no such colour map.
    """
    return _lookup_table(name)[levels]


@cache
def _lookup_table(name: str) -> np.ndarray:
    from matplotlib import colormaps

    if name not in colormaps:
        raise UsageError(f"there is no colour map {name!r}: {nearest(name, colormaps)}")
    return colormaps[name](np.arange(256) / 255, bytes=True)[:, :3]


def grid(tiles: Sequence[np.ndarray], columns: int, gap: int, fill: int = 0) -> np.ndarray:
    """All tiles, row by row, the last row as long as it happens to be.

    Args:
        tiles: n pictures of one shape (h, w, 3) or (h, w, 4) uint8.
        columns: tiles in a row; fewer where there are fewer tiles.
        gap: pixels between tiles (none around them).
        fill: grey of the gaps and of places without a tile (0 is clear where there is a fourth channel).

    Returns:
        (rows * (h + gap) - gap, columns * (w + gap) - gap, 3 or 4) uint8.

    Raises:
        UsageError: there is no tile, or less than one column.
    """
    if not len(tiles) or columns < 1:
        raise UsageError(f"a grid needs a tile and a column at least, not {len(tiles)} and {columns}")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    height, width, depth = tiles[0].shape
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, depth), fill, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        out[top : top + height, left : left + width] = tile
    return out


def resize_map(heatmap: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) resized bilinearly, averaged where it shrinks: (height, width) float32."""
    image = Image.fromarray(np.ascontiguousarray(heatmap, np.float32))
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))


COMPAT = ("convscope", "pytorch-grad-cam", "tf-keras-vis", "captum")


def scaled_map(raw: np.ndarray, height: int, width: int, compat: str = "convscope") -> np.ndarray:
    """A map (h, w) scaled and resized to (height, width) float32 as a tool does it, for those who compare.

    convscope: positive part over its highest value, bilinear. pytorch-grad-cam 1.5: positive part, less its lowest
    value, over its highest value and 1e-7, bilinear, and so once more. tf-keras-vis 0.8: positive part, bilinear with
    the corners kept in place, brought to 0..1. captum 0.9: as it is, signed, each cell a square.

    Raises:
        UsageError: no such tool.
    """
    if compat not in COMPAT:
        raise UsageError(f"no scaling of {compat!r}; {nearest(compat, COMPAT)}")
    raw = np.asarray(raw, np.float32)
    if compat == "captum":
        rows, columns = (np.arange(new) * old // new for new, old in zip((height, width), raw.shape, strict=True))
        return raw[rows][:, columns]
    positive = np.maximum(raw, 0)
    if compat == "pytorch-grad-cam":
        return _between(resize_map(_between(positive), height, width))
    if compat == "tf-keras-vis":
        large = _with_corners(positive, height, width)
        return (large - large.min()) / max(float(np.ptp(large)), 1e-12)
    return np.clip(resize_map(positive / max(float(positive.max()), 1e-30), height, width), 0, 1)


def _between(values: np.ndarray) -> np.ndarray:
    """From 0 to (nearly) 1."""
    low = values - values.min()
    return low / (1e-7 + low.max())


def _with_corners(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, the first and last cells at the edges."""
    rows, columns = (np.linspace(0, old - 1, new) for new, old in zip((height, width), values.shape, strict=True))
    tall = np.stack([np.interp(rows, np.arange(len(column)), column) for column in values.T], axis=1)
    return np.stack([np.interp(columns, np.arange(len(row)), row) for row in tall]).astype(np.float32)


@dataclass(frozen=True)
class Paint:
    """How a heatmap is drawn on a photo.

    Attributes:
        opacity: of the colour at the highest value, 0..1.
        signed: what speaks against the target is drawn too, on a scale with two ends.
        peak: the value of the full colour; the map's own highest one where None.
        contours: draw lines at a quarter, a half and three quarters of the peak.
        colours: a colour map of matplotlib; "inferno", or "PuOr_r" where signed, if None: both are safe for
            colour-blind eyes.
    """

    opacity: float = 0.7
    signed: bool = False
    peak: float | None = None
    contours: bool = False
    colours: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1:
            raise UsageError(f"an opacity has to be between 0 and 1, but it is {self.opacity}")

    @property
    def map(self) -> str:
        """The name of the colour map."""
        return self.colours or ("PuOr_r" if self.signed else "inferno")

    def highest(self, heatmap: np.ndarray) -> float:
        """The value of the full colour; 0 where there is nothing to draw."""
        if not np.isfinite(heatmap).all():
            return 0.0
        heatmap = _cells(heatmap)
        own = float(np.abs(heatmap).max() if self.signed else heatmap.max())
        return own if self.peak is None or own <= 0 else self.peak


def overlay(photo: np.ndarray, heatmap: np.ndarray, paint: Paint | float = 0.7) -> np.ndarray:
    """The photo with a heatmap in colour on it: its positive part, or both signs.

    The map is divided by its peak, and laid on the more opaquely the further it is from 0, so that the photo stays
    itself where nothing spoke for the target.

    Args:
        photo: (h, w, 3) uint8.
        heatmap: (h', w'), raw and signed.
        paint: how, or the opacity alone.

    Returns:
        (h, w, 3) uint8; the photo unchanged where there is nothing to draw or some values are not finite.

    Raises:
        UsageError: the opacity is not in 0..1, or there is no such colour map.
    """
    paint = paint if isinstance(paint, Paint) else Paint(paint)
    height, width = photo.shape[:2]
    laid_on = tint(heatmap, height, width, paint)
    alpha = paint.opacity * (laid_on[..., 3:] / 255)
    drawn = np.rint((1 - alpha) * photo + alpha * laid_on[..., :3]).astype(np.uint8)
    return _with_contours(drawn, heatmap, paint) if paint.contours else drawn


def tint(heatmap: np.ndarray, height: int, width: int, paint: Paint | None = None) -> np.ndarray:
    """What `overlay` lays on a photo at full opacity, as a picture of its own that can be seen through.

    Args:
        heatmap: (h', w'), raw and signed.
        height, width: of the photo.
        paint: how.

    Returns:
        (height, width, 4) uint8; the last channel is 0 (nothing) to 255 (the peak, of either sign).

    Raises:
        UsageError: there is no such colour map.
    """
    paint = paint or Paint()
    values = _relevance(heatmap, height, width, paint)
    levels = (values + 1) / 2 if paint.signed else values
    rgb = colour(np.rint(levels * 255).astype(np.uint8), paint.map)
    alpha = np.rint(255 * np.abs(values)).astype(np.uint8)[..., None]
    return np.concatenate([np.where(alpha > 0, rgb, 0), alpha], axis=-1).astype(np.uint8)


def _relevance(heatmap: np.ndarray, height: int, width: int, paint: Paint) -> np.ndarray:
    """A map as shares of its peak (height, width): 0..1, or -1..1 where signed."""
    highest = paint.highest(heatmap)
    if not highest > 0:
        return np.zeros((height, width), np.float32)
    kept = _cells(heatmap) if paint.signed else np.maximum(_cells(heatmap), 0)
    shares = resize_map(np.asarray(kept, np.float64) / highest, height, width)
    return np.clip(shares, -1, 1)


MOST_CELLS = 64  # of a side; a single pixel of a grainy map is not seen


def _cells(heatmap: np.ndarray) -> np.ndarray:
    """A map in means over cells, where it is finer than eyes are."""
    scale = MOST_CELLS / max(heatmap.shape)
    if scale >= 1:
        return heatmap
    height, width = (max(1, round(side * scale)) for side in heatmap.shape)
    return resize_map(heatmap, height, width)


def _with_contours(drawn: np.ndarray, heatmap: np.ndarray, paint: Paint) -> np.ndarray:
    """Lines where the map crosses quarters of its peak: white with a dark edge, to be seen on any photo."""
    height, width = drawn.shape[:2]
    shares = np.abs(_relevance(heatmap, height, width, paint))
    steps = np.floor(np.minimum(shares, 1 - 1e-6) * 4)
    lines = np.zeros(steps.shape, bool)
    lines[:-1] |= steps[:-1] != steps[1:]
    lines[:, :-1] |= steps[:, :-1] != steps[:, 1:]
    padded = np.pad(lines, 1)
    wide = np.any([np.roll(padded, move, axis)[1:-1, 1:-1] for axis in (0, 1) for move in (-1, 1)], axis=0)
    found = drawn.copy()
    found[wide & ~lines] = found[wide & ~lines] // 2
    found[lines] = 255
    return found


# Okabe and Ito's colours, told apart by colour-blind eyes too, without black; then the same darker.
_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def palette(count: int) -> np.ndarray:
    """Colours of so many things, (count, 3) uint8."""
    known = np.array([ImageColor.getrgb(one) for one in _PALETTE], np.uint8)
    return np.stack([known[k % len(known)] // (1 + k // len(known)) for k in range(count)])


def regions(photo: np.ndarray, values: np.ndarray, highest: np.ndarray, opacity: float = 0.75) -> np.ndarray:
    """The photo with each place in the colour of what is the most there, the more opaque the more there is.

    Args:
        photo: (h, w, 3) uint8.
        values: how much of each of k things, (h', w', k), not negative.
        highest: what counts as all of each, (k,).
        opacity: where there is all of something, 0..1.

    Returns:
        (h, w, 3) uint8.
    """
    height, width = photo.shape[:2]
    shares = np.asarray(values, np.float64) / np.maximum(highest, 1e-30)
    large = np.stack([resize_map(shares[..., k], height, width) for k in range(shares.shape[-1])], axis=-1)
    alpha = opacity * np.clip(large.max(axis=-1, keepdims=True), 0, 1)
    drawn = palette(large.shape[-1])[large.argmax(axis=-1)]
    return np.rint((1 - alpha) * photo + alpha * drawn).astype(np.uint8)


def legend(texts: Sequence[str], height: int, size: int = 13) -> np.ndarray:
    """Texts under each other, each beside its colour of `palette`: (height or more, w, 3) uint8."""
    line, pad = math.ceil(size * 1.9), 6
    width = line + pad + max(_text_width(text, size) for text in texts)
    image = Image.new("RGB", (width, max(height, line * len(texts))), "white")
    draw, font = ImageDraw.Draw(image), _font(size)
    for place, (text, colour_) in enumerate(zip(texts, palette(len(texts)), strict=True)):
        top = place * line
        draw.rectangle((0, top + 4, line - 8, top + line - 5), tuple(int(part) for part in colour_))
        draw.text((line + pad - 6, top + line / 2), text, _INK, font, anchor="lm")
    return np.asarray(image)


# --- text, bars and pages -----------------------------------------------------------------------------------


def text_strip(text: str, width: int, size: int = 14, ink: tuple[int, int, int] = _INK) -> np.ndarray:
    """One line of dark text on white: (h, width, 3) uint8. A text too long has an ellipsis in its middle."""
    font = _font(size)
    strip = Image.new("RGB", (width, math.ceil(size * 1.5)), "white")
    ImageDraw.Draw(strip).text((0, strip.height / 2), _shortened(text, width, size), ink, font, anchor="lm")
    return np.asarray(strip)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getbbox(text)[2])


def _shortened(text: str, width: int, size: int) -> str:
    text = " ".join(text.split())
    if _text_width(text, size) <= width:
        return text

    def keep(count: int) -> str:  # the ends of a layer's path tell more than its middle
        return text[: count - count // 2] + "…" + text[len(text) - count // 2 :]

    fitting = range(1, len(text))
    return keep(bisect_left(fitting, True, key=lambda count: _text_width(keep(count), size) > width))


def colour_bar(height: int, low: str, high: str, colours: str = "viridis") -> np.ndarray:
    """An upright bar of a colour map, its two ends labelled: (height, w, 3) uint8."""
    ramp = colour(np.linspace(255, 0, height).round().astype(np.uint8), colours)
    size, bar, pad = 12, 14, 5
    width = bar + pad + max(_text_width(low, size), _text_width(high, size))
    image = Image.new("RGB", (width, height), "white")
    image.paste(Image.fromarray(np.repeat(ramp[:, None], bar, axis=1)))
    draw, font = ImageDraw.Draw(image), _font(size)
    draw.text((bar + pad, 0), high, _INK, font, anchor="lt")
    draw.text((bar + pad, height), low, _INK, font, anchor="ls")
    return np.asarray(image)


def beside(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (h, w, 3) uint8 side by side on white, tops in line: (H, W, 3) uint8."""
    height = max(len(part) for part in parts)
    widths = [part.shape[1] + _MARGIN for part in parts[:-1]] + [parts[-1].shape[1]]
    return np.hstack([_padded(part, height, width) for part, width in zip(parts, widths, strict=True)])


def page(body: np.ndarray, title: str, *subtitles: str) -> np.ndarray:
    """A picture (h, w, 3) uint8 on white with a title above and a margin around: (H, W, 3) uint8.

    A long title or subtitle makes a narrow page wider, up to 720 pixels, and is shortened beyond.
    """
    lines = [(title, 18, _INK)] + [(subtitle, 13, _FAINT_INK) for subtitle in subtitles if subtitle]
    longest = max(_text_width(text, size) for text, size, _ in lines)
    width = max(body.shape[1], min(longest, _TEXT_WIDTH))
    strips = [text_strip(text, width, size, ink) for text, size, ink in lines]
    whole = np.vstack([*strips, _padded(body[:0], 6, width), _padded(body, len(body), width)])
    return np.pad(whole, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), constant_values=_WHITE)


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    missing = (0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)
    return np.pad(picture, missing, constant_values=_WHITE)


# --- the activation sheet --------------------------------------------------------------------------------


def activation_sheet(
    activation: np.ndarray,
    photo: np.ndarray | None,
    title: str,
    subtitle: str = "",
    shared: bool = False,
    columns: int = 16,
    colours: str = "viridis",
) -> np.ndarray:
    """Every channel of a layer as a tile, the number of its first channel beside each row.

    Args:
        activation: (h, w, c), or (c,) of a dense layer.
        photo: (H, W, 3) uint8, drawn at the left.
        title: the layer's name, drawn above.
        subtitle: a second, fainter line.
        shared: one scale for the layer, with a colour bar of raw values, in place of the classic scale, which
            is each channel's own. A single cell has no deviation, so 1 x 1 maps are always drawn shared.
        columns: tiles in a row.
        colours: a colour map of matplotlib.

    Returns:
        (H', W', 3) uint8.

    Raises:
        UsageError: `activation` has another number of axes or no values.
    """
    maps = _as_maps(activation)
    shared = shared or maps.shape[:2] == (1, 1)
    parts = [_numbered_grid(_tiles(maps, shared, colours), columns)]
    if photo is not None:
        parts.insert(0, _thumbnail(photo))
    if shared:
        low, high = _span(_finite(maps))
        parts.append(colour_bar(min(max(len(parts[-1]), 40), 240), f"{low:.3g}", f"{high:.3g}", colours))
    return page(beside(parts), title, subtitle)


def channel_grid(
    activation: np.ndarray, side: int, columns: int = 16, shared: bool = False, colours: str = "viridis"
) -> np.ndarray:
    """The tiles of `activation_sheet` without photo, text and paper: (H, W, 4) uint8, clear between the tiles.

    Args:
        activation: (h, w, c), or (c,) of a dense layer.
        side: what the longer side of a tile should be near, in pixels.
        columns, shared, colours: as in `activation_sheet`.

    Raises:
        UsageError: `activation` has another number of axes or no values.
    """
    maps = _as_maps(activation)
    tiles = _tiles(maps, shared or maps.shape[:2] == (1, 1), colours, side)
    return grid([np.dstack([tile, np.full(tile.shape[:2], 255, np.uint8)]) for tile in tiles], columns, 2)


def _as_maps(activation: np.ndarray) -> np.ndarray:
    activation = np.asarray(activation)
    if activation.ndim not in (1, 3) or not activation.size:
        raise UsageError(
            "a sheet needs the activation of one picture, (h, w, c) or (c,), "
            f"but this one is {activation.shape}: pick one picture of the batch"
        )
    return activation.reshape(1, 1, -1) if activation.ndim == 1 else activation


def _tiles(maps: np.ndarray, shared: bool, colours: str, side: int | None = None) -> list[np.ndarray]:
    channels = np.moveaxis(maps, -1, 0)
    levels = np.moveaxis(shared_tiles(maps), -1, 0) if shared else map(classic_tile, channels)
    side = side or (_TILE_SIDE if len(channels) > 4 else _PHOTO_SIDE)
    return [colour(_sized(level, side), colours) for level in levels]


def _sized(levels: np.ndarray, wanted: int) -> np.ndarray:
    """A map (h, w) uint8 with its longer side near `wanted`: each cell enlarged alike, or areas averaged."""
    height, width = levels.shape
    side = max(height, width)
    if side == 1:
        return np.full((_FLAT_TILE_SIDE, _FLAT_TILE_SIDE), levels[0, 0])
    whole = max(1, wanted // side)
    zoom = min(whole, whole + 1, key=lambda times: abs(math.log(times * side / wanted)))
    if side > 1.45 * wanted:
        scale = 1.2 * wanted / side
        size = max(1, round(width * scale)), max(1, round(height * scale))
        levels = np.asarray(Image.fromarray(np.ascontiguousarray(levels)).resize(size, Image.Resampling.BOX))
    thick = math.ceil(12 / (zoom * min(levels.shape)))  # a map of one row would be a hairline
    down, across = (thick, 1) if levels.shape[0] < levels.shape[1] else (1, thick)
    return levels.repeat(zoom * down, axis=0).repeat(zoom * across, axis=1)


def _numbered_grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    gap, pad, size = 2, 6, 12
    picture = grid(tiles, columns, gap, _WHITE)  # a dark gap would merge with empty tiles
    numbers = range(0, len(tiles), columns)
    gutter = Image.new("RGB", (_text_width(str(numbers[-1]), size) + pad, len(picture)), "white")
    draw, height = ImageDraw.Draw(gutter), len(tiles[0])
    for row, number in enumerate(numbers):
        middle = row * (height + gap) + height / 2
        draw.text((gutter.width - pad, middle), str(number), _FAINT_INK, _font(size), anchor="rm")
    return np.hstack([np.asarray(gutter), picture])


def _thumbnail(photo: np.ndarray) -> np.ndarray:
    height, width = photo.shape[:2]
    scale = _PHOTO_SIDE / max(height, width)
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(size, method))


# --- labelled tiles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """What stands under a tile.

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


def sized_tile(picture: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    """A picture (h, w, 3) uint8 with its longer side in the range: enlarged by a whole number, or averaged."""
    height, width = picture.shape[:2]
    side = max(height, width)
    if side < smallest:
        times = min(math.ceil(smallest / side), max(1, largest // side))
        return picture.repeat(times, axis=0).repeat(times, axis=1)
    if side <= largest:
        return picture
    size = max(1, round(width * largest / side)), max(1, round(height * largest / side))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def words_tile(height: int, width: int, text: str) -> np.ndarray:
    """A grey tile that says `text` in the largest letters that fit, or bears a cross where none do: (h, w, 3) uint8."""
    tile = Image.new("RGB", (width, height), (208, 208, 208))
    draw, room = ImageDraw.Draw(tile), width - 8
    for size in (13, 12, 11, 10, 9):
        lines = _wrapped(text, room, size)
        if len(lines) * _leading(size) <= height - 8 and all(_text_width(line, size) <= room for line in lines):
            draw.multiline_text((4, 4), "\n".join(lines), _INK, _font(size), spacing=_leading(size) - size)
            return np.asarray(tile)
    draw.line((0, 0, width - 1, height - 1), _FAINT_INK)
    draw.line((0, height - 1, width - 1, 0), _FAINT_INK)
    return np.asarray(tile)


def _leading(size: int) -> int:
    return math.ceil(size * 1.3)


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Lines of whole words; a word that is wider than `width` stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def labelled_grid(tiles: Sequence[np.ndarray], labels: Sequence[Label], columns: int | None = None) -> np.ndarray:
    """Tiles on white, row by row, each with its label under it.

    Args:
        tiles: n pictures of one shape (h, w, 3) uint8.
        labels: n of them.
        columns: tiles in a row; 8 for up to 64 tiles, else about as many as rows. Fewer or more where the sheet would
            be longer than 30,000 pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UsageError: there is no tile, or less than one column.
    """
    if not tiles or (columns is not None and columns < 1):
        raise UsageError(f"a sheet needs a tile and a column at least, not {len(tiles)} and {columns}")
    width = max(tiles[0].shape[1], _NARROWEST)
    stacked = any(_text_width(f"{label.name}  {label.value}", 12) > width for label in labels)
    captions = [_caption(label, width, stacked) for label in labels]
    tall = max(map(len, captions))
    whole = [
        np.vstack([_framed(tile, label.flag, width), _padded(caption, tall, width)])
        for tile, label, caption in zip(tiles, labels, captions, strict=True)
    ]
    wanted = columns or (8 if len(tiles) <= 64 else math.ceil(math.sqrt(len(tiles))))
    return grid(whole, _bounded_columns(wanted, len(whole), whole[0].shape), 10, _WHITE)


def _bounded_columns(wanted: int, count: int, shape: tuple[int, ...]) -> int:
    """As many as wanted, if neither side of the sheet gets too long by it."""
    most_rows, most = (max(1, _LONGEST // (side + 10)) for side in shape[:2])
    return min(max(wanted, math.ceil(count / most_rows)), most, count)


def _framed(tile: np.ndarray, flag: str, width: int) -> np.ndarray:
    """A tile in the middle of its column; one with a flag has a frame."""
    missing = width - tile.shape[1]
    tile = np.pad(tile, ((0, 0), (missing // 2, missing - missing // 2), (0, 0)), constant_values=_WHITE)
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
    strips += [text_strip(line, width, 12, _FAINT_INK) for line in label.lines]
    return np.vstack(strips)


def _two_ended(left: str, right: str, width: int) -> np.ndarray:
    strip = Image.fromarray(text_strip(left, width, 12))
    ImageDraw.Draw(strip).text((width, strip.height / 2), right, _INK, _font(12), anchor="rm")
    return np.asarray(strip)


def _flag_strip(flag: str, width: int) -> np.ndarray:
    strip = Image.new("RGB", (width, 18), _FLAGS[flag])
    ImageDraw.Draw(strip).text((6, 9), flag, "white", _font(12), anchor="lm")
    return np.asarray(strip)


# --- files -----------------------------------------------------------------------------------------------


def animation(frames: Sequence[np.ndarray], kind: str = "webp", seconds: float = 4.0) -> bytes:
    """The bytes of a film that starts anew for ever, its last frame held for 1.5 s.

    Args:
        frames: pictures (h, w, 3) uint8 of one shape.
        kind: "webp" or "gif".
        seconds: that the frames together take, each between 0.04 and 0.4 s.

    Raises:
        UsageError: another kind, no frame, or a side that is longer than the formats allow.
    """
    if kind not in ("webp", "gif"):
        raise UsageError(f"a film is 'webp' or 'gif', not {kind!r}")
    if not len(frames):
        raise UsageError("a film needs one frame at least, but there is none")
    height, width = frames[0].shape[:2]
    if max(height, width) > 16383:
        raise UsageError(f"a film allows 16383 pixels a side, but its frames are {height} x {width}")
    pace = round(1000 * min(0.4, max(0.04, seconds / len(frames))))
    first, *others = map(Image.fromarray, frames)
    times = [pace] * len(others) + [1500]
    buffer = io.BytesIO()
    first.save(buffer, kind.upper(), save_all=True, append_images=others, duration=times, loop=0, quality=80)
    return buffer.getvalue()


def encode_png(picture: np.ndarray) -> bytes:
    """The bytes of a PNG file of a picture (h, w), (h, w, 3) or (h, w, 4) uint8; lossless."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def encode_webp(picture: np.ndarray, quality: int = 85) -> bytes:
    """The bytes of a WebP file of a picture (h, w, 3) or (h, w, 4) uint8; `quality` 0..100.

    Raises:
        UsageError: a side is longer than the 16383 pixels that the format allows.
    """
    if max(picture.shape[:2]) > 16383:
        height, width = picture.shape[:2]
        raise UsageError(f"WebP allows 16383 pixels a side, but the picture is {height} x {width}: use PNG")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def small_data_uri(picture: np.ndarray, quality: int = 85) -> str:
    """A picture (h, w, 3) or (h, w, 4) uint8 as a `data:` address: PNG, or WebP where that is smaller."""
    png = encode_png(picture)
    webp = encode_webp(picture, quality) if max(picture.shape[:2]) <= 16383 else png
    return data_uri(png, "image/png") if len(png) <= len(webp) else data_uri(webp, "image/webp")


def data_uri(data: bytes, mime: str) -> str:
    """`data` as a `data:` address, for a page that needs no other file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def write_file(
    path: str | os.PathLike[str],
    data: bytes | str | Callable[[BinaryIO], object],
    before: Callable[[], object] | None = None,
) -> None:
    """Write a whole file or nothing: written aside in the same folder, then renamed.

    `data` may be a function that writes to the open file, for what should not be in memory as a whole. Folders on
    the way are made, text is UTF-8, and a link is followed. What is written aside is named `.convscope-*.part`; what a
    process that was killed left of it is removed when the next one writes to the folder. The file is not forced to
    the disk: a process may end at any moment, but if the computer itself stops, its last files may be lost.

    Args:
        path: of the file.
        data: what is written.
        before: called when all is written aside, before the file gets its name.

    Raises:
        ConvscopeError: the file can't be written; says why and what to do.
    """
    goal = Path(os.path.realpath(path))  # renaming would put a file in the place of a link
    try:
        if goal.exists() and not goal.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is a folder or a device")
        goal.parent.mkdir(parents=True, exist_ok=True)
        _tidy(str(goal.parent))
        _write_aside(goal, data, before or (lambda: None))
    except OSError as error:
        advice = _WRITE_ADVICE.get(error.errno or 0, "choose another place")
        raise ConvscopeError(f"{os.fspath(path)!r} can't be written ({error.strerror or error}): {advice}") from error


def _write_aside(goal: Path, data: bytes | str | Callable[[BinaryIO], object], before: Callable[[], object]) -> None:
    held, aside = _created(goal)
    try:
        with os.fdopen(os.dup(held), "wb") as file:
            data(file) if callable(data) else file.write(data.encode() if isinstance(data, str) else data)
        before()
        if fcntl is None:  # Windows renames no open file
            os.close(held)
        os.replace(aside, goal)
    except BaseException:  # also when interrupted
        aside.unlink(missing_ok=True)
        raise
    finally:
        if fcntl is not None:
            os.close(held)


def _created(goal: Path) -> tuple[int, Path]:
    """A new file beside `goal`, locked for as long as it is open: so other processes know that it is in use."""
    while True:
        aside = goal.with_name(f".convscope-{secrets.token_hex(8)}.part")  # not tempfile: its files are private
        held = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with suppress(OSError):  # some network folders have no locks
                fcntl.flock(held, fcntl.LOCK_EX)
        if aside.exists():  # else another process took it for one that was left, before it was locked
            return held, aside
        os.close(held)


_ASIDE = re.compile(r"\.convscope-[0-9a-f]{16}\.part")


@cache  # once for each folder
def _tidy(folder: str) -> None:
    """Remove the temporary files of processes that were killed while they were writing."""
    with suppress(OSError):
        for name in filter(_ASIDE.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                _remove_if_left(os.path.join(folder, name))


def _remove_if_left(path: str) -> None:
    if fcntl is None:
        os.unlink(path)  # Windows removes no open file
        return
    held = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where it is in use, or nobody knows
        os.unlink(path)
    finally:
        os.close(held)


_WRITE_ADVICE = {
    errno.EISDIR: "give a file name",
    errno.EACCES: "choose a folder where you may write",
    errno.EPERM: "choose a folder where you may write",
    errno.EROFS: "choose a folder where you may write",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.ENOTDIR: "a part of the path is a file, so choose another folder",
    errno.EEXIST: "a part of the path is a file, so choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}

_LONGEST_NAME = 255  # bytes, on the usual file systems
_DEVICE_NAMES = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}


def safe_name(text: str) -> str:
    """A file name for `text` on every system: letters, digits and "-._" stay, "/" becomes ".", all else "_".

    At most 150 bytes long and never empty, hidden or a device's name (`nul`). A name that is cut ends in a
    digest of the whole, so that long texts which differ at their ends stay apart.
    """
    text = unicodedata.normalize("NFC", text).replace("/", ".")
    name = "".join(char if _is_safe(char) else "_" for char in text).strip(".") or "_"
    if name.split(".")[0].lower() in _DEVICE_NAMES:
        name = "_" + name
    encoded = name.encode()
    if len(encoded) <= 150:
        return name
    return encoded[:140].decode(errors="ignore") + "-" + hashlib.sha256(encoded).hexdigest()[:8]


def is_safe_name(name: str) -> bool:
    """True for a name of which `safe_name` would leave every character as it is."""
    device = name.split(".")[0].lower() in _DEVICE_NAMES
    plain = bool(name) and all(map(_is_safe, name)) and name.strip(".") == name
    return plain and not device and len(name.encode()) <= _LONGEST_NAME


def _is_safe(char: str) -> bool:
    return char.isalnum() or char in "-._"
