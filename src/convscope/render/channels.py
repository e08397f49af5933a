"""The channels of one layer as a sheet of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from convscope.arrays import scale_pixels
from convscope.errors import UsageError
from convscope.render.colour import classic_tile, colour, finite, levels_between, span
from convscope.render.grid import grid
from convscope.render.text import FAINT_INK, WHITE, beside, colour_bar, font_of, page, text_width

_TILE_SIDE = 80

_FLAT_TILE_SIDE = 32

_IMAGE_SIDE = 200


def activation_sheet(
    activation: np.ndarray,
    image: np.ndarray | None,
    title: str,
    subtitle: str = "",
    shared: bool = False,
    columns: int = 16,
    colours: str = "viridis",
) -> np.ndarray:
    """Every channel of a layer as a tile, the number of its first channel beside each row.

    Args:
        activation: (h, w, c), or (c,) of a dense layer.
        image: (H, W, 3) uint8, drawn at the left.
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
    if image is not None:
        parts.insert(0, _thumbnail(image))
    if shared:
        low, high = span(finite(maps))
        parts.append(colour_bar(min(max(len(parts[-1]), 40), 240), f"{low:.3g}", f"{high:.3g}", colours))
    return page(beside(parts), title, subtitle)


def channel_grid(
    activation: np.ndarray, side: int, columns: int = 16, shared: bool = False, colours: str = "viridis"
) -> np.ndarray:
    """The tiles of `activation_sheet` without image, text and paper: (H, W, 4) uint8, clear between the tiles.

    Args:
        activation: (h, w, c), or (c,) of a dense layer.
        side: approximate length of the longer side of a tile, in pixels.
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
            "a sheet needs the activation of one image, (h, w, c) or (c,), "
            f"but this one is {activation.shape}: pick one image of the batch",
            code="array-misfit",
            shape=list(activation.shape),
        )
    return activation.reshape(1, 1, -1) if activation.ndim == 1 else activation


def _tiles(maps: np.ndarray, shared: bool, colours: str, side: int | None = None) -> list[np.ndarray]:
    scale, side = span(finite(maps)) if shared else None, side or default_side(maps.shape[-1])
    return [channel_tile(channel, scale, side, colours) for channel in np.moveaxis(maps, -1, 0)]


def default_side(count: int) -> int:
    """The approximate length of the longer side of each of `count` tiles of a sheet, in pixels."""
    return _TILE_SIDE if count > 4 else _IMAGE_SIDE


def channel_tile(
    channel: np.ndarray, scale: tuple[float, float] | None = None, side: int = _TILE_SIDE, colours: str = "viridis"
) -> np.ndarray:
    """One channel as a tile, as it is in a sheet: (h', w', 3) uint8.

    Args:
        channel: (h, w), any real values.
        scale: the raw values of the two ends of the colour map; the classic scale, the channel's own, where None.
        side: approximate length of the longer side, in pixels.
        colours: a colour map of matplotlib.

    Raises:
        UsageError: there is no such colour map, or the channel is no map.
    """
    if channel.ndim != 2 or not channel.size or side < 1:
        raise UsageError(
            f"a tile needs a map (h, w) and a side of 1 pixel at least, not {channel.shape} and {side}",
            code="array-misfit",
            shape=list(channel.shape),
            size=side,
        )
    levels = classic_tile(channel) if scale is None else levels_between(channel, *scale)
    return colour(sized(levels, side), colours)


def sized(levels: np.ndarray, wanted: int) -> np.ndarray:
    """A map (h, w) uint8 with its longer side near `wanted`: each cell enlarged alike, or areas averaged."""
    side = max(levels.shape)
    if side == 1:
        return np.full((_FLAT_TILE_SIDE, _FLAT_TILE_SIDE), levels[0, 0])
    whole = max(1, wanted // side)
    zoom = min(whole, whole + 1, key=lambda times: abs(math.log(times * side / wanted)))
    if side > 1.45 * wanted:
        levels = scale_pixels(levels, 1.2 * wanted / side, "box")
    thick = math.ceil(12 / (zoom * min(levels.shape)))  # a map of one row would be a hairline
    down, across = (thick, 1) if levels.shape[0] < levels.shape[1] else (1, thick)
    return levels.repeat(zoom * down, axis=0).repeat(zoom * across, axis=1)


def _numbered_grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    gap, pad, size = 2, 6, 12
    image = grid(tiles, columns, gap, WHITE)  # a dark gap would merge with empty tiles
    numbers = range(0, len(tiles), columns)
    gutter = Image.new("RGB", (text_width(str(numbers[-1]), size) + pad, len(image)), "white")
    draw, height = ImageDraw.Draw(gutter), len(tiles[0])
    for row, number in enumerate(numbers):
        middle = row * (height + gap) + height / 2
        draw.text((gutter.width - pad, middle), str(number), FAINT_INK, font_of(size), anchor="rm")
    return np.hstack([np.asarray(gutter), image])


def _thumbnail(image: np.ndarray) -> np.ndarray:
    scale = _IMAGE_SIDE / max(image.shape[:2])
    return scale_pixels(image, scale, "nearest" if scale >= 2 else "lanczos")
