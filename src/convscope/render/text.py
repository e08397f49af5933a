"""Text and colour bars on white."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from convscope.render.colour import colour, palette

WHITE = 255

INK, FAINT_INK = (32, 32, 32), (110, 110, 110)

_TEXT_WIDTH = 720

MARGIN = 12


def legend(texts: Sequence[str], height: int, size: int = 13) -> np.ndarray:
    """Texts under each other, each beside its colour of `palette`: (height or more, w, 3) uint8."""
    line, pad = math.ceil(size * 1.9), 6
    width = line + pad + max(text_width(text, size) for text in texts)
    image = Image.new("RGB", (width, max(height, line * len(texts))), "white")
    draw, font = ImageDraw.Draw(image), font_of(size)
    for place, (text, colour_) in enumerate(zip(texts, palette(len(texts)), strict=True)):
        top = place * line
        draw.rectangle((0, top + 4, line - 8, top + line - 5), tuple(int(part) for part in colour_))
        draw.text((line + pad - 6, top + line / 2), text, INK, font, anchor="lm")
    return np.asarray(image)


def text_strip(text: str, width: int, size: int = 14, ink: tuple[int, int, int] = INK) -> np.ndarray:
    """One line of dark text on white: (h, width, 3) uint8. A text too long has an ellipsis in its middle."""
    font = font_of(size)
    strip = Image.new("RGB", (width, math.ceil(size * 1.5)), "white")
    ImageDraw.Draw(strip).text((0, strip.height / 2), shortened(text, width, size), ink, font, anchor="lm")
    return np.asarray(strip)


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all renderings, at a size in pixels."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """How wide a line of text is, in pixels."""
    return math.ceil(font_of(size).getbbox(text)[2])


def shortened(text: str, width: int, size: int) -> str:
    """A text that is at most `width` pixels wide: where it is wider, its middle is left out."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text

    def keep(count: int) -> str:  # the ends of a layer's path are more informative than its middle
        return text[: count - count // 2] + "…" + text[len(text) - count // 2 :]

    fitting = range(1, len(text))
    return keep(bisect_left(fitting, True, key=lambda count: text_width(keep(count), size) > width))


def colour_bar(height: int, low: str, high: str, colours: str = "viridis") -> np.ndarray:
    """An upright bar of a colour map, its two ends labelled: (height, w, 3) uint8."""
    ramp = colour(np.linspace(255, 0, height).round().astype(np.uint8), colours)
    size, bar, pad = 12, 14, 5
    width = bar + pad + max(text_width(low, size), text_width(high, size))
    image = Image.new("RGB", (width, height), "white")
    image.paste(Image.fromarray(np.repeat(ramp[:, None], bar, axis=1)))
    draw, font = ImageDraw.Draw(image), font_of(size)
    draw.text((bar + pad, 0), high, INK, font, anchor="lt")
    draw.text((bar + pad, height), low, INK, font, anchor="ls")
    return np.asarray(image)


def beside(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Images (h, w, 3) uint8 side by side on white, tops in line: (H, W, 3) uint8."""
    height = max(len(part) for part in parts)
    widths = [part.shape[1] + MARGIN for part in parts[:-1]] + [parts[-1].shape[1]]
    return np.hstack([padded(part, height, width) for part, width in zip(parts, widths, strict=True)])


def page(body: np.ndarray, title: str, *subtitles: str) -> np.ndarray:
    """An image (h, w, 3) uint8 on white with a title above and a margin around: (H, W, 3) uint8.

    A long title or subtitle makes a narrow page wider, up to 720 pixels, and is shortened beyond.
    """
    lines = [(title, 18, INK)] + [(subtitle, 13, FAINT_INK) for subtitle in subtitles if subtitle]
    longest = max(text_width(text, size) for text, size, _ in lines)
    width = max(body.shape[1], min(longest, _TEXT_WIDTH))
    strips = [text_strip(text, width, size, ink) for text, size, ink in lines]
    whole = np.vstack([*strips, padded(body[:0], 6, width), padded(body, len(body), width)])
    return np.pad(whole, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=WHITE)


def padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A rendering (h, w, 3) uint8 with white at its right and below it: (height, width, 3) uint8."""
    missing = (0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)
    return np.pad(image, missing, constant_values=WHITE)


def leading(size: int) -> int:
    """Pixels from one line of text to the next."""
    return math.ceil(size * 1.3)


def wrapped(text: str, width: int, size: int) -> list[str]:
    """Lines of whole words; a word that is wider than `width` stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
