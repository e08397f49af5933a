"""The head of a network: from the user's option, from the graph, or from what is usual in a framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convscope.networks.graph import Call, linear_by_graph, undoable_head
from convscope.networks.head import Head, HeadActivation, HeadChoice
from convscope.networks.trace import Graph


@dataclass(frozen=True)
class Habits:
    """What is usual for the outputs of a framework's models.

    Attributes:
        channels_first: outputs that are maps have the channels first.
        returns_logits: where the graph shows no softmax or sigmoid, the outputs are logits.
        leaves_out_calls: one call of an operation can be left out of a pass; where False, only all of its calls.
    """

    channels_first: bool
    returns_logits: bool
    leaves_out_calls: bool


def head_of(graph: Graph, asked: HeadChoice | None, habits: Habits) -> Head | None:
    """The head of a graph's output; None where the graph does not tell, and the output's values may.

    Args:
        graph: the network's graph.
        asked: the user's option.
        habits: of the framework.
    """
    shape = graph.value.shape
    units = graph.units
    if _is_map(shape, units, habits.channels_first):
        return Head(units, spatial=True)
    found = _undoable(graph, habits)
    if found is not None and asked != "linear":
        activation, call = found
        return Head(units, activation, undone=_path_of(graph, call))
    if asked is not None:
        return Head(units) if asked == "linear" else Head(units, asked, returns_logits=habits.returns_logits)
    linear = linear_by_graph(graph.trace.flow, graph.value)
    if habits.returns_logits:
        return (
            Head(units, "softmax", returns_logits=True, guess=True) if linear and units > 1 else Head(units, guess=True)
        )
    return Head(units) if linear else None


def _is_map(shape: Sequence[int], units: int, channels_first: bool) -> bool:
    """True if an output has a value for each place."""
    if channels_first:
        return int(np.prod(shape[2:])) != 1 and len(shape) > 1 and shape[-1] != units
    return int(np.prod(shape[1:-1])) != 1


def _undoable(graph: Graph, habits: Habits) -> tuple[HeadActivation, Call] | None:
    """The softmax or sigmoid that can be left out of a pass, and its kind."""
    found = undoable_head(graph.trace.flow, graph.value)
    if found is None or habits.leaves_out_calls or graph.calls_of(found[1].operation) == 1:
        return found
    return None


def _path_of(graph: Graph, call: Call) -> str:
    return next(path for path, (other, _) in graph.calls.items() if other is call)


def activation_by_values(values: np.ndarray) -> HeadActivation | None:
    """Whether outputs `(n, units)` that no known layer made are probabilities."""
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        return None
    sums_to_one = values.shape[-1] > 1 and np.abs(values.sum(axis=-1) - 1).max() < 1e-3
    return "softmax" if sums_to_one else "sigmoid"
