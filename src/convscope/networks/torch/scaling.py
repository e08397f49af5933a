"""Evidence on a PyTorch module's preprocessing: scaling of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convscope.networks import preprocessing as pp
from convscope.networks.graph import Call
from convscope.networks.trace import Graph


def preprocessing_of(graph: Graph, channels: int) -> pp.Preprocessing:
    """The preprocessing that a module indicates, else a guess that is marked as one: the first evidence decides."""
    inside = _scaling_inside(graph.trace.flow.first_steps(graph.trace.image))
    if inside is not None:
        return inside
    if channels != 3:
        reason = "most networks for such images take 0..1; give the preprocessing if yours differs"
        return pp.PRESETS["0..1"].because(pp.GUESS, reason)
    reason = "most networks made with PyTorch take it; give the preprocessing if yours differs"
    return pp.PRESETS["torch"].because(pp.GUESS, reason)


def _scaling_inside(steps: Sequence[Call]) -> pp.Preprocessing | None:
    """The pixels that the first operations expect, where they divide or multiply by constants."""
    for step in steps:
        name = step.class_name.lower()
        numbers = [abs(number) for number in step.facts.get("scalars", ()) if number]
        if name in ("div", "mul") and numbers:
            factors = [1 / number if name == "div" else number for number in numbers]
            taken = pp.range_before_scaling(float(np.mean(factors)))
            return pp.PRESETS[taken].because(pp.FOUND, f"the model scales its own input in {step.path}")
    return None
