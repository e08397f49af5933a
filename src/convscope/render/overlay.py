"""Heatmaps and regions over an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convscope.arrays import resize_map
from convscope.errors import UsageError, nearest
from convscope.render.colour import colour, palette

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
        raise UsageError(f"no scaling of {compat!r}; {nearest(compat, COMPAT)}", code="scaling-unknown", name=compat)
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
    """How a heatmap is drawn on an image.

    Attributes:
        opacity: of the colour at the highest value, 0..1.
        signed: regions that oppose the target are drawn too, on a scale with two ends.
        peak: the value of the full colour; the map's own highest one where None.
        contours: draw lines at a quarter, a half and three quarters of the peak.
        colours: a colour map of matplotlib; "inferno", or "PuOr_r" where signed, if None: both are safe for
            colour-blind eyes.

    Example:
        >>> Paint(signed=True).map
        'PuOr_r'
    """

    opacity: float = 0.7
    signed: bool = False
    peak: float | None = None
    contours: bool = False
    colours: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1:
            raise UsageError(
                f"an opacity has to be between 0 and 1, but it is {self.opacity}",
                code="opacity-out-of-range",
                found=self.opacity,
            )

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


def overlay(image: np.ndarray, heatmap: np.ndarray, paint: Paint | float = 0.7) -> np.ndarray:
    """The image with a heatmap in colour on it: its positive part, or both signs.

    The map is divided by its peak, and drawn the more opaquely the further it is from 0, so that the image stays
    unchanged where no region supports the target.

    Args:
        image: (h, w, 3) uint8.
        heatmap: (h', w'), raw and signed.
        paint: the style, or the opacity alone.

    Returns:
        (h, w, 3) uint8; the image unchanged where there is nothing to draw or some values are not finite.

    Raises:
        UsageError: the opacity is not in 0..1, or there is no such colour map.
    """
    paint = paint if isinstance(paint, Paint) else Paint(paint)
    height, width = image.shape[:2]
    laid_on = tint(heatmap, height, width, paint)
    alpha = paint.opacity * (laid_on[..., 3:] / 255)
    drawn = np.rint((1 - alpha) * image + alpha * laid_on[..., :3]).astype(np.uint8)
    return _with_contours(drawn, heatmap, paint) if paint.contours else drawn


def tint(heatmap: np.ndarray, height: int, width: int, paint: Paint | None = None) -> np.ndarray:
    """The layer of colour that `overlay` draws on an image at full opacity, as a transparent image of its own.

    Args:
        heatmap: (h', w'), raw and signed.
        height, width: of the image.
        paint: the style.

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
    """Lines where the map crosses quarters of its peak: white with a dark edge, to be seen on any image."""
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


def regions(image: np.ndarray, values: np.ndarray, highest: np.ndarray, opacity: float = 0.75) -> np.ndarray:
    """The image with each place in the colour of the strongest concept there, the more opaque the stronger it is.

    Args:
        image: (h, w, 3) uint8.
        values: strength of each of k concepts, (h', w', k), not negative.
        highest: the full strength of each, (k,).
        opacity: at full strength, 0..1.

    Returns:
        (h, w, 3) uint8.
    """
    height, width = image.shape[:2]
    shares = np.asarray(values, np.float64) / np.maximum(highest, 1e-30)
    large = np.stack([resize_map(shares[..., k], height, width) for k in range(shares.shape[-1])], axis=-1)
    alpha = opacity * np.clip(large.max(axis=-1, keepdims=True), 0, 1)
    drawn = palette(large.shape[-1])[large.argmax(axis=-1)]
    return np.rint((1 - alpha) * image + alpha * drawn).astype(np.uint8)
