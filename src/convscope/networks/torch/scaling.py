"""Evidence on a PyTorch module's preprocessing: scaling of its own, or the statistics of its first norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convscope.networks import preprocessing as pp
from convscope.networks.graph import Call, first_norm
from convscope.networks.trace import Graph


def preprocessing_of(graph: Graph, channels: int) -> pp.Preprocessing:
    """The preprocessing that a module indicates, else a guess that is marked as one: the first evidence decides."""
    inside = _scaling_inside(graph.trace.flow.first_steps(graph.trace.image))
    if inside is not None:
        return inside
    told = _told_by_statistics(first_norm(graph.trace.calls, graph.trace.flow))
    if told is not None:
        return told
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


def _told_by_statistics(pair: tuple[Call, Call] | None) -> pp.Preprocessing | None:
    """The preprocessing from the running statistics of a batch norm right after the first convolution."""
    if pair is None:
        return None
    conv, norm = (call.operation for call in pair)
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    kernel = getattr(conv, "weight", None)
    if mean is None or variance is None or kernel is None or kernel.dim() != 4 or getattr(conv, "groups", 1) != 1:
        return None
    bias = getattr(conv, "bias", None)
    arrays = [tensor.detach().float().cpu().numpy() for tensor in (kernel, mean, variance)]
    shift = np.zeros_like(arrays[1]) if bias is None else bias.detach().float().cpu().numpy()
    seen = pp.seen_by_batch_norm(arrays[0].transpose(2, 3, 1, 0), shift, arrays[1], arrays[2])
    return pp.guess_from_statistics(*seen) if seen else None
