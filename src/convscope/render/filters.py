"""Views of filters: one tile, the sheet, the animation of the ascent, the plot of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convscope.errors import UsageError, option
from convscope.files import safe_name
from convscope.networks.preprocessing import Preprocessing
from convscope.render.colour import clipped_tile, filter_tile, plain_tile
from convscope.render.encode import animation, encode_png, image_tag
from convscope.render.grid import Label, grid, labelled_grid, sized_tile, tile_side, words_tile
from convscope.render.plots import Axes, axes, entitle
from convscope.render.text import page, text_strip
from convscope.results import FilterRow, Filters


@dataclass(frozen=True)
class Style:
    """How optimised images become tiles.

    Attributes:
        levels: images `(h, w, c)` of a result to 8-bit levels `(h', w', c)`, without the border.
        labels: whether the sheet has numbers under its tiles by default.
        sort: the order of the sheet, likewise.
    """

    levels: Callable[[Filters, np.ndarray], np.ndarray]
    labels: bool = True
    sort: str = "status"


STYLES = {
    "classic": Style(
        lambda result, canvas: filter_tile(_display_units(canvas, result.preprocessing), result.crop), False, "given"
    ),
    "plain": Style(lambda result, canvas: plain_tile(_cropped(result, result.preprocessing.restore(canvas)))),
    "clipped": Style(lambda result, canvas: clipped_tile(_cropped(result, result.preprocessing.restore(canvas)))),
}
GAP = 5  # pixels between the tiles of a sheet without labels


def drawn(result: Filters, index: int) -> np.ndarray:
    """The tile of the `index`-th filter, or one with the reason why there is none: (h, w, 3) uint8."""
    if result.rows[index].status == "dead":
        height, width = (side - 2 * result.crop for side in result.values.shape[1:3])
        return words_tile(height, width, f"{result.name(index)} {_epitaph(result.rows[index])}")
    return _canvas_drawn(result, result.values[index])


def tile(result: Filters, index: int, side: int | None = None) -> bytes:
    """The tile of the `index`-th filter as the bytes of a PNG file.

    Args:
        result: the filters.
        index: place in `rows`.
        side: the greatest length of the longer side, in pixels; the image's own where None.
    """
    pixels = drawn(result, index)
    return encode_png(pixels if side is None else sized_tile(pixels, 1, side))


def cutout(result: Filters, index: int) -> np.ndarray:
    """The tile with its transparency: (h, w, 4) uint8.

    Raises:
        UsageError: the recipe finds none.
    """
    if result.alpha is None:
        raise UsageError(
            "these filters have no transparency; choose a recipe that finds it, such as maco.", code="no-transparency"
        )
    clear = plain_tile(255 * _cropped(result, result.alpha[index])[..., None])
    return np.dstack([_canvas_drawn(result, result.values[index]), clear])


def sheet(
    result: Filters, columns: int | None = None, labels: bool | None = None, sort: str | None = None
) -> np.ndarray:
    """All tiles in one rendering: (H, W, 3) uint8.

    The classic style has the classic sheet: in the order given, 5 black pixels between the tiles, and no text. Any
    other is sorted, with the numbers under each tile, and weak and dead filters have a flag.

    Args:
        result: the filters.
        columns: tiles in a row; 8 for up to 64 filters.
        labels, sort: instead of the style's own; `sort` as `Filters.order` takes it.

    Raises:
        UsageError: no such order, less than one column, or no filter.
    """
    style = STYLES[result.style]
    order = result.order(sort or style.sort)
    if not (style.labels if labels is None else labels):
        tiles = [drawn(result, index) for index in order]
        if style.labels:
            tiles = [sized_tile(tile, 1, tile_side(len(tiles))) for tile in tiles]
        return grid(tiles, columns or (8 if len(tiles) <= 64 else 16), GAP)
    body = labelled_grid(_tiles(result, order), [label(result, index) for index in order], columns)
    where = f"{_where(result)} · {result.origin.network}"
    return page(body, where, _how(result), result.summary, _legend(result))


def animation_of(result: Filters, index: int | None = None, kind: str = "webp") -> bytes:
    """An animation of the ascent, of one filter or of the sheet: the bytes of an animated WebP or GIF file.

    Args:
        index: of the filter; all of them, sorted, where None.
        kind: "webp" or "gif".

    Raises:
        UsageError: no frames were kept, or another kind.
    """
    if result.frames is None or not result.frames.shape[1]:
        raise UsageError(f"no intermediate images were kept; ask for them with {option('frames')}.", code="no-frames")
    chosen = result.order() if index is None else [index]
    tiles, film = [_frames(result, index, len(chosen)) for index in chosen], []
    for number, text in enumerate(_moments(result)):
        body = grid([tile[number] for tile in tiles], 8 if len(tiles) <= 64 else 16, 2, 255)
        film.append(np.vstack([text_strip(text, body.shape[1], 13), body]))
    return animation(film, kind)


def renderings(result: Filters) -> Iterator[tuple[str, np.ndarray]]:
    """The sheet, then each filter's image."""
    yield "sheet", sheet(result)
    for index in range(len(result.rows)):
        yield safe_name(result.name(index)), drawn(result, index)


def plot(result: Filters, ax: Axes | None = None) -> Axes:
    """A line for each filter, its activation at each step as the ascent saw it, and a dot for the final one.

    Returns:
        the matplotlib axes; new ones where `ax` is None.
    """
    ax = ax or axes(7, 4)
    colours = {"alive": "#2c6fbb", "weak": "#e08a1e", "dead": "#999999"}
    for row in result.rows:
        ax.plot(row.activations, color=colours[row.status], alpha=0.6, linewidth=1)
        ax.plot(len(row.activations), row.activation, ".", color=colours[row.status], alpha=0.6, markersize=3)
    ax.set_xlabel("step (dots: the final image, not moved)")
    ax.set_ylabel("activation")
    entitle(ax, f"{_where(result)} · {result.summary}")
    ax.grid(alpha=0.3)
    return ax


def html(result: Filters) -> str:
    """The sheet with labels."""
    return image_tag(sheet(result, labels=True), f"{_where(result)}: {result.summary}")


def _cropped(result: Filters, image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return image[result.crop : height - result.crop, result.crop : width - result.crop]


def _canvas_drawn(result: Filters, canvas: np.ndarray) -> np.ndarray:
    """An image `(h, w, c)` in the style of the recipe: (h', w', 3) uint8."""
    levels = STYLES[result.style].levels(result, canvas)
    return np.repeat(levels, 3, axis=-1) if levels.shape[-1] == 1 else levels[..., :3]


def _tiles(result: Filters, order: Sequence[int]) -> list[np.ndarray]:
    """The images, enlarged or averaged so that the numbers fit under them."""
    longest = tile_side(len(order))
    sides = [_cropped(result, result.values[0]).shape[:2]] if order else []
    height, width = sized_tile(np.zeros((*sides[0], 3), np.uint8), 104, longest).shape[:2]
    return [
        words_tile(height, width, _epitaph(result.rows[index]))
        if result.rows[index].status == "dead"
        else sized_tile(drawn(result, index), 104, longest)
        for index in order
    ]


def label(result: Filters, index: int) -> Label:
    """The label of the `index`-th filter: name, activation, ratio to the baseline, status.

    Example:
        >>> label(convscope.filters(network, "block4_conv", [7], steps=2, size=32), 0).name
        '7'
    """
    row = result.rows[index]
    flag = "" if row.status == "alive" else row.status
    lines = [row.compared]
    lines += [] if row.robustness is None else [f"robust {100 * row.robustness:.0f} %"]
    lines += [] if row.agreement is None else [f"seeds agree {row.agreement:.2f}"]
    lines += ["from an image"] if row.started_from else []
    return Label(result.name(index), _digits(row.activation), tuple(lines), flag)


def _where(result: Filters) -> str:
    return result.layer.path if result.layer else "objectives"


def _how(result: Filters) -> str:
    """Recipe, steps, size and seed, where known."""
    recipe, seed = result.parameters.recipe, result.parameters.seed
    known = [] if recipe is None else [f"recipe {recipe.name}, {recipe.steps} steps"]
    known += [f"{'x'.join(map(str, result.values.shape[1:3]))} pixels"]
    known += [] if seed is None else [f"seed {seed}"]
    return " · ".join(known)


def _legend(result: Filters) -> str:
    """The meaning of the words that occur in the labels."""
    words = []
    if any(row.natural is not None for row in result.rows):
        words.append("natural: the best activation of the natural images")
    elif result.rows:
        words.append("noise: 99th percentile of noise images")
    if any(row.robustness is not None for row in result.rows):
        words.append("robust: share of the activation left when the image is moved")
    if any(row.started_from for row in result.rows):
        words.append("from an image: no gradient at noise")
    return " · ".join(words)


def _frames(result: Filters, index: int, count: int) -> list[np.ndarray]:
    """The tiles of one filter from the first frame to the last."""
    assert result.frames is not None
    longest = 320 if count == 1 else tile_side(count) // (1 if count <= 64 else 2)
    frames = result.frames[index]
    if result.rows[index].status == "dead":
        height, width = _cropped(result, frames[0]).shape[:2]
        still = words_tile(height, width, f"{result.name(index)} dead")
        return [sized_tile(still, min(104, longest), longest)] * len(frames)
    return [sized_tile(_canvas_drawn(result, frame), min(104, longest), longest) for frame in frames]


def _moments(result: Filters) -> list[str]:
    """The title of each frame: the step where it is known, else its number."""
    assert result.frames is not None
    count = result.frames.shape[1]
    steps = result.parameters.frame_steps
    if steps is not None and len(steps) == count:
        return [f"step {step}" for step in steps]
    return [f"{number} of {count}" for number in range(1, count + 1)]


def _digits(value: float) -> str:
    """Three digits, without an exponent where they are readable: 1230 rather than 1.23e+03."""
    return f"{float(f'{value:.3g}'):g}"


def _epitaph(row: FilterRow) -> str:
    """Why a filter is dead, in a few words: the first clause of the reason."""
    return f"dead: {row.reason.partition(';')[0].partition(',')[0]}"


def _display_units(values: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """An image in RGB order and in units of half the network's range, where the classic style is defined."""
    return preprocessing.restore(values) / 127.5 - 1
