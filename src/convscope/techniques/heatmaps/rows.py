"""The words and numbers beside a heatmap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convscope.ancestry import read_layers
from convscope.cuts import Score
from convscope.images.image import InputImage
from convscope.results import HeatmapRow
from convscope.techniques.heatmaps.evidence import Evidence
from convscope.techniques.heatmaps.methods import Method, MethodResult, without_gradients
from convscope.techniques.heatmaps.targets import ClassScore, MapClass, chosen

SATURATED = 1 - 1e-6
AFTER = ", or a layer after the cut"


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
    reason = _why_blank(evidence, index, method, result.heat, row.probability)
    if isinstance(evidence.target, MapClass):
        row = replace(row, against=evidence.target.against)
        if not evidence.arguments[0][index].any():
            reason = f"there is no place with {evidence.target.text}"
    return replace(row, status="blank" if reason else "ok", reason=reason)


def _unread(evidence: Evidence) -> str:
    """The reason for a zero gradient where the target does not depend on the layer's grid, as measured; else ""."""
    network, layer, record = evidence.network, evidence.layer, read_layers(evidence.target)
    if layer is None or network.map_reaches_output(layer, record):
        return ""
    return (
        "zero gradient: after this layer the network reads only tokens beside the grid, such as a class token, which "
        f"have no place in the image; give an earlier layer, such as {network.last_spatial_layer(None, record).path!r}"
    )


def _why_blank(evidence: Evidence, index: int, method: Method, heat: np.ndarray, probability: float | None) -> str:
    """The reason why a map is blank, or "" where it is not."""
    if not np.isfinite(heat).all():
        return "the map holds values that are not finite numbers"
    if heat.max() > 0:
        return ""
    place = None if method.at_image else evidence.spec.path
    if method.needs_gradient and not _has_gradient(evidence, index, place, heat):
        return _why_no_gradient(evidence, index, place, probability)
    if not heat.any():
        reason = "" if method.at_image else ": the channels that matter for this class are zero"
        return f"the map is zero everywhere{reason}"
    return "all negative: every place in this layer lowers the score of this class"


def _has_gradient(evidence: Evidence, index: int, place: str | None, heat: np.ndarray) -> bool:
    """True if a gradient reaches the layer at `place`, or the pixels where None."""
    # The gradient at the pixels is another one than that at the layer; a map of pixels shows it.
    return bool(evidence.gradients[index].any() if place == evidence.spec.path else heat.any())


def _why_no_gradient(evidence: Evidence, index: int, place: str | None, probability: float | None) -> str:
    """Why the gradient at a layer, or at the pixels where None, is zero: measured by changing these."""
    arguments = tuple(argument[index][None] for argument in evidence.arguments)
    score = Score(evidence.network, evidence.target, evidence.x[index][None], arguments)
    here = "the image" if place is None else "this layer's output"
    saturated = probability is not None and not 1 - SATURATED < probability < SATURATED
    if evidence.network.head.log_probabilities and saturated:
        return f"saturated: the probability is {round(probability or 0)} in floating point, so its gradient is zero"
    effect = score.effect(place)
    if effect.is_cut:
        return (
            f"the graph is cut: changing {here} changes the score, but the gradient is zero; {score.cut(place).text}. "
            f"Use a method that needs no gradient ({without_gradients()})" + ("" if place is None else AFTER)
        )
    unread = "" if place is None else _unread(evidence)
    if unread:
        return unread
    if not effect.tried:
        return f"zero gradient: the network can't be run with changes of {here}, to see their effect ({effect.error})"
    if not effect.changes:
        return f"zero gradient: changing {here} does not change the score of this class"
    if not effect.flat:
        return f"the map is zero everywhere: the product of the gradient and the values of {here} is zero"
    return f"zero gradient: small changes of {here} do not change the score for this image, larger ones do"
