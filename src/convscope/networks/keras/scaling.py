"""Evidence on a Keras model's preprocessing: scaling of its own, or its family."""

from __future__ import annotations

from dataclasses import dataclass, replace

import keras
import numpy as np

from convscope.networks import preprocessing as pp
from convscope.networks.foreign import KerasLayer
from convscope.networks.trace import Graph

_ARITHMETIC = ("TrueDivide", "Divide", "Multiply", "Subtract", "Add")


@dataclass(frozen=True)
class Kinship:
    """The family of `keras.applications` that a model belongs to.

    Attributes:
        family: the family.
        name: the name of the model, or of a model in it, by which it belongs to it.
        certain: `keras.applications` made the model.
    """

    family: pp.Family
    name: str
    certain: bool


def preprocessing_of(graph: Graph, kinship: Kinship | None) -> pp.Preprocessing:
    """The preprocessing that a model indicates, else a guess that is marked as one: the first evidence decides."""
    inside = _scaling_inside([step.operation for step in graph.trace.flow.first_steps(graph.trace.image)])
    if inside is not None:
        return inside
    if kinship is not None:
        return _of_family(kinship)
    reason = "most networks trained from scratch take 0..1; give the preprocessing if yours differs"
    return pp.PRESETS["0..1"].because(pp.GUESS, reason)


def _of_family(kinship: Kinship) -> pp.Preprocessing:
    preset = pp.PRESETS[kinship.family.preset]
    if kinship.certain:
        return preset.because(pp.FOUND, "as keras.applications does for this model")
    reason = f"as keras.applications does for {kinship.name!r}, which this model has by its name"
    return replace(preset, certainty=pp.GUESS, reason=reason, named_after=kinship.name)


def _scaling_inside(steps: list[KerasLayer]) -> pp.Preprocessing | None:
    """The pixels that the first operations expect: 0..255, or 0..1; None if they scale nothing."""
    known = [step for step in steps if type(step).__name__ in ("Rescaling", "Normalization")]
    other = [step for step in steps if type(step).__name__ in _ARITHMETIC]
    if known and not other:
        factor = float(np.prod([_factor(step) for step in known]))
        name = pp.range_before_scaling(factor)
        return pp.PRESETS[name].because(pp.FOUND, f"the model scales its own input in {known[0].name}")
    if known or other:
        reason = f"the model does arithmetic on its own input in {(other or known)[0].name}"
        return pp.PRESETS["none"].because(pp.GUESS, reason)
    return None


def _factor(step: KerasLayer) -> float:
    """The factor of a `Rescaling` or `Normalization` layer, the mean over channels."""
    if hasattr(step, "scale"):
        return float(np.mean(step.scale))
    deviation = np.sqrt(keras.ops.convert_to_numpy(step.variance))
    return float(np.mean(deviation if step.invert else 1 / np.maximum(deviation, 1e-12)))
