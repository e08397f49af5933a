"""Levels and colours: raw values become 8-bit tiles here and nowhere else, so results stay raw."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import ImageColor

from convscope.errors import UsageError, nearest


def classic_tile(channel: np.ndarray) -> np.ndarray:
    """One channel in the classic style: mean 0, divided by its standard deviation, times 64, plus 128.

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
    values = finite(activation)
    return levels_between(values, *span(values))


def levels_between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (...) on the scale from `low` (0) to `high` (255): (...) uint8, clipped.

    A tile drawn alone has the levels that it has among others, if the scale is that of all.
    """
    exponent = _exponent(max(abs(low), abs(high)))
    low, high = (float(np.ldexp(end, -exponent)) for end in (low, high))
    levels = (np.ldexp(finite(values), -exponent).astype(np.float64) - low) * (255 / ((high - low) or 1))
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


def filter_tile(image: np.ndarray, crop: int) -> np.ndarray:
    """An optimised image in the classic style: contrast 0.15 around grey, without its border.

    Args:
        image: (h, w, c) as the model takes it; values that are not finite count as 0.
        crop: pixels left out on each side.

    Returns:
        (h - 2 * crop, w - 2 * crop, c) uint8.

    Raises:
        UsageError: `crop` is negative or leaves nothing.
    """
    height, width = image.shape[:2]
    if not 0 <= 2 * crop < min(height, width):
        raise UsageError(
            f"the crop has to leave part of a {height} x {width} image, but it is {crop}",
            code="crop-misfit",
            found=crop,
            size=[height, width],
        )
    values = np.clip(finite(image), -1e15, 1e15)  # beyond, the variance of float32 overflows
    values = (values - values.mean()) / (values.std() + 1e-5) * 0.15
    values = values[crop : height - crop, crop : width - crop] + 0.5
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def plain_tile(pixels: np.ndarray) -> np.ndarray:
    """Pixels (h, w, c) in 0..255 as they are: uint8, clipped; values that are not finite count as 0."""
    return np.clip(np.round(finite(pixels)), 0, 255).astype(np.uint8)


def clipped_tile(pixels: np.ndarray, share: float = 0.01) -> np.ndarray:
    """Pixels stretched to the full range, but for the outermost values, which are clipped.

    Args:
        pixels: (h, w, c), on any scale, which all channels share; values that are not finite count as 0.
        share: of the values that is clipped at each end.

    Returns:
        (h, w, c) uint8; mid-grey where nothing is left to stretch.
    """
    values = finite(pixels)
    low, high = np.quantile(values, [share, 1 - share])
    if not high > low:
        return np.full(values.shape, 128, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def finite(values: np.ndarray) -> np.ndarray:
    """`values` in float32 or float64, where NaN and infinities are 0."""
    values = np.asarray(values)
    dtype = np.float64 if values.dtype.itemsize > 4 else np.float32
    return np.nan_to_num(values.astype(dtype), nan=0.0, posinf=0.0, neginf=0.0)


def _tame(values: np.ndarray) -> np.ndarray:
    """`values`, finite, times the power of two that brings the largest magnitude into 0.5..1.

    Nothing overflows or underflows then, and unlike another factor a power of two changes no digit.
    """
    values = finite(values)
    return np.ldexp(values, -_exponent(np.abs(values).max(initial=0)))


def _exponent(magnitude: float) -> int:
    return int(np.frexp(magnitude)[1])


def span(values: np.ndarray) -> tuple[float, float]:
    """The ends of the scale that all channels of a layer share: the minimum, at most 0, and the maximum."""
    return min(float(values.min()), 0.0), float(values.max())


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
        raise UsageError(
            f"there is no colour map {name!r}: {nearest(name, colormaps)}", code="colour-map-unknown", name=name
        )
    return colormaps[name](np.arange(256) / 255, bytes=True)[:, :3]


# Okabe and Ito's colours, distinct to colour-blind eyes too, without black; then the same darker.
_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def palette(count: int) -> np.ndarray:
    """Distinct colours, (count, 3) uint8."""
    known = np.array([ImageColor.getrgb(one) for one in _PALETTE], np.uint8)
    return np.stack([known[k % len(known)] // (1 + k // len(known)) for k in range(count)])
