"""Maps of several layers, or of a moved and mirrored image, made into one: around any method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convscope.arrays import resize_map
from convscope.techniques.heatmaps.evidence import Evidence
from convscope.techniques.heatmaps.methods import Method, MethodResult, results_of

SHIFT = 1 / 16  # of a side, by which smoothing moves an image


def combined(method: Method, evidence: Sequence[Evidence], smooth: bool) -> list[MethodResult]:
    """The maps of one method, one for each image.

    Args:
        method: the method.
        evidence: the evidence about the same images at one layer or more.
        smooth: the mean over the image moved and mirrored.
    """
    parts = [smoothed(method, one) if smooth else results_of(method, one) for one in evidence]
    return parts[0] if len(parts) == 1 or method.at_image else [fused(results) for results in zip(*parts, strict=True)]


def fused(results: Sequence[MethodResult]) -> MethodResult:
    """The mean of several layers' maps, the positive part of each over its highest value, at the largest one's size.

    Where none has a positive part it is the mean of the maps, each over its largest absolute value.
    """
    raw, note = [one.heat for one in results], "; ".join(one.note for one in results if one.note)
    kept = [np.maximum(one, 0) for one in raw] if any(one.max() > 0 for one in raw) else raw
    size = max((one.shape for one in raw), key=lambda shape: shape[0] * shape[1])
    scaled = [resize_map(one, *size) / max(float(np.abs(one).max()), 1e-12) for one in kept]
    return MethodResult(np.mean(scaled, axis=0), note)


def smoothed(method: Method, evidence: Evidence) -> list[MethodResult]:
    """The mean of a method's maps `(h, w)` over moved and mirrored images, each moved back to its place.

    The target stays that of the unchanged image.
    """
    size = evidence.x.shape[1:3]
    step = max(1, round(size[0] * SHIFT)), max(1, round(size[1] * SHIFT))
    total: list[np.ndarray] = [np.zeros(size) for _ in evidence.x]
    notes = [""] * len(evidence.x)
    moves = [(0, 0), (step[0], 0), (-step[0], 0), (0, step[1]), (0, -step[1])]
    for rows, columns in moves:
        for mirrored in (False, True):
            x = _moved(evidence.x, rows, columns)[:, :, :: -1 if mirrored else 1]
            for index, found in enumerate(results_of(method, evidence.again(np.ascontiguousarray(x)))):
                heat = resize_map(found.heat, *size)
                total[index] += _moved(heat[None, :, :: -1 if mirrored else 1], -rows, -columns)[0]
                notes[index] = notes[index] or found.note  # of the unchanged image, which comes first
    return [MethodResult(one / (2 * len(moves)), note) for one, note in zip(total, notes, strict=True)]


def _moved(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Images `(n, h, w, ...)` moved, with the edge repeated where the shift leaves a gap."""
    height, width = images.shape[1:3]
    at_rows = np.clip(np.arange(height) - rows, 0, height - 1)
    at_columns = np.clip(np.arange(width) - columns, 0, width - 1)
    return images[:, at_rows][:, :, at_columns]
