"""The words and numbers beside a heatmap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convscope.images.image import InputImage
from convscope.results import HeatmapRow
from convscope.techniques.heatmaps.evidence import Evidence
from convscope.techniques.heatmaps.methods import Method, MethodResult
from convscope.techniques.heatmaps.targets import ClassScore, MapClass, chosen

SATURATED = 1 - 1e-6


def row_of(evidence: Evidence, index: int, image: InputImage, method: Method, result: MethodResult) -> HeatmapRow:
    """The row of one map.

    Args:
        evidence: the evidence that the map was made from.
        index: the image's place in it.
        image, method, result: the image, the method and its result.
    """
    network, logits = evidence.network, None if evidence.logits is None else evidence.logits[index]
    row = HeatmapRow(
        image=image.name,
        class_index=None,
        class_name=evidence.target.text,
        score=float(evidence.scores[index]),
        probability=None,
        layer="" if method.at_image else evidence.spec.path or "",
        method=method.name,
        status="ok",
        reason="",
        predictions=() if logits is None else tuple(network.predictions(logits)),
        note="; ".join(filter(None, (result.note, method.warning))),
    )
    if isinstance(evidence.target, ClassScore) and logits is not None:
        target, rival = chosen(evidence.arguments[0][index])
        explained = network.prediction(logits, target)
        row = replace(
            row,
            class_index=target,
            class_name=explained.name,
            probability=explained.probability,
            against=None if rival is None else network.class_name(rival),
        )
    reason = _why_blank(result.heat, evidence.gradients[index], row.probability, network.head.log_probabilities)
    if isinstance(evidence.target, MapClass):
        row = replace(row, against=evidence.target.against)
        if not evidence.arguments[0][index].any():
            reason = f"there is no place with {evidence.target.text}"
    return replace(row, status="blank" if reason else "ok", reason=reason)


def _why_blank(heat: np.ndarray, gradient: np.ndarray, probability: float | None, saturates: bool) -> str:
    """The reason why a map is blank, or "" where it is not."""
    if not np.isfinite(heat).all():
        return "the map holds values that are not finite numbers"
    if heat.max() > 0:
        return ""
    if not gradient.any():
        if saturates and probability is not None and not 1 - SATURATED < probability < SATURATED:
            return f"saturated: the probability is {round(probability)} in floating point, so its gradient is zero"
        return "zero gradient: nothing in this layer changes the score of this class"
    if not heat.any():
        return "the map is zero everywhere: the channels that matter for this class are zero"
    return "all negative: every place in this layer lowers the score of this class"
