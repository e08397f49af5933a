"""Views of activations: a sheet for each layer, one channel, the plot over depth."""

from __future__ import annotations

import html as markup
from collections.abc import Iterator

import numpy as np

from convscope.errors import UsageError
from convscope.files import safe_name
from convscope.networks import Layer
from convscope.render.channels import activation_sheet, default_side
from convscope.render.channels import channel_tile as one_channel
from convscope.render.colour import colour, finite, shared_tiles, span
from convscope.render.encode import encode_png, image_tag
from convscope.render.plots import Axes, axes, entitle
from convscope.render.text import beside, colour_bar, page
from convscope.results import Activations, LayerStatistics


def channel_map(result: Activations, layer: str, channel: int, image: int = 0) -> np.ndarray:
    """One channel's map in colour, lowest to highest value, enlarged, with its colour bar: (h, w, 3) uint8."""
    values = result.channel(layer, channel, image)
    levels = shared_tiles(values[..., None])[..., 0]
    scale = max(1, 320 // max(levels.shape))
    drawn = colour(np.kron(levels, np.ones((scale, scale), np.uint8)))
    low = min(float(values.min()), 0.0)
    bar = colour_bar(len(drawn), f"{low:.3g}", f"{values.max():.3g}")
    return page(beside([drawn, bar]), f"{layer} · channel {channel}", result.images[image].name)


def sheet(result: Activations, layer: str, image: int = 0, shared: bool = False) -> np.ndarray:
    """All channels of one layer beside the image (the classic style; `shared` for one scale): (h, w, 3) uint8."""
    path = result.layer(layer).path
    if not drawable(result.layer(path)):
        raise UsageError(
            f"layer {path!r} has no maps to draw; its output has the shape {result.layer(path).shape}.",
            code="layer-without-map",
            layer=path,
            shape=list(result.layer(path).shape),
        )
    row = result.row(path, image)
    return activation_sheet(
        np.asarray(result.arrays[path][image]), result.images[image].pixels, path, _caption(row), shared
    )


def channel_tile(
    result: Activations,
    layer: str,
    channel: int,
    image: int = 0,
    *,
    shared: bool = False,
    side: int | None = None,
) -> np.ndarray:
    """The tile of one channel as `sheet` has it: (h, w, 3) uint8.

    Args:
        result: the activations.
        layer, channel, image: the layer, the channel and the image.
        shared: on one scale for all channels of the layer, in place of the classic scale, the channel's own.
        side: approximate length of the longer side, in pixels; that of the sheet where None.

    Raises:
        UsageError: no such layer, channel or map.
    """
    values = result.channel(layer, channel, image)
    whole = result[layer][image]
    scale = span(finite(whole)) if shared or values.shape == (1, 1) else None
    return one_channel(values, scale, side or default_side(whole.shape[-1]))


def tile(
    result: Activations,
    layer: str,
    channel: int,
    image: int = 0,
    *,
    shared: bool = False,
    side: int | None = None,
) -> bytes:
    """The tile of one channel as the bytes of a PNG file; arguments and errors as in `channel_tile`."""
    return encode_png(channel_tile(result, layer, channel, image, shared=shared, side=side))


def renderings(result: Activations) -> Iterator[tuple[str, np.ndarray]]:
    """The sheets of every layer that has maps or units."""
    for index, image in enumerate(result.images):
        for layer in filter(drawable, result.layers):
            yield f"{safe_name(image.name)}/{safe_name(layer.path)}", sheet(result, layer.path, index)


def html(result: Activations) -> str:
    """The numbers as a table, and the first image's sheets of a few layers over the depth."""
    head = "".join(f"<th>{name}" for name in ("image", "layer", "shape", "max", "zeros", "empty channels"))
    rows = "".join(f"<tr>{''.join(f'<td>{markup.escape(cell)}' for cell in row.cells)}" for row in result.statistics)
    step = -(-len(result.layers) // 6)
    shown = [layer for layer in result.layers[::step] if drawable(layer)]
    sheets = "".join(image_tag(sheet(result, layer.path), f"channels of {layer.path}") for layer in shown)
    return f"<div><table><tr>{head}{rows}</table>{sheets}</div>"


def plot(result: Activations, ax: Axes | None = None, image: int = 0) -> Axes:
    """Share of zeros and of empty channels over depth, as one plot; returns the matplotlib axes."""
    rows = [row for row in result.rows_of(image) if row.zeros is not None]
    ax = ax or axes(7.5, 3.6)
    places = range(len(rows))
    empty = [100 * (row.empty_channels or 0) / row.shape[-1] for row in rows]
    ax.plot(places, [100 * (row.zeros or 0) for row in rows], "o-", color="#2c6fbb", label="zeros")
    ax.bar(places, empty, width=0.6, color="#e08a1e", alpha=0.75, label="empty channels")
    names = [row.layer.rpartition("/")[2] for row in rows]
    step = -(-len(rows) // 24) or 1
    ax.set_xticks(list(places)[::step], names[::step], rotation=60, ha="right", fontsize=8, parse_math=False)
    ax.set_ylim(0, 100)
    ax.set_ylabel("% of the layer")
    entitle(ax, f"Zeros and empty channels, by depth · {result.images[image].name}")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    return ax


def drawable(layer: Layer) -> bool:
    """Maps `(h, w, c)` or units `(c,)`: not the heads of a transformer's attention."""
    return layer.has_channels


def _caption(row: LayerStatistics) -> str:
    size = "x".join(map(str, row.shape))  # the font has no multiplication sign
    if row.zeros is None:
        return f"{size} · max {row.max:.3g} · no non-linearity, so zeros do not apply"
    where = "" if row.counted_at == row.layer else f" after {row.counted_at}"
    empty = f"{row.empty_channels} of {row.shape[-1]} channels empty"
    return f"{size} · max {row.max:.3g} · {100 * row.zeros:.0f} % zeros · {empty}{where}"
