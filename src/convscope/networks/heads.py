"""The head of a network: from the graph, the user's option, the output's values, or what is usual in a framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from convscope.networks.endings import Ending, ending_of
from convscope.networks.graph import Call, Value
from convscope.networks.head import Head, HeadActivation, HeadChoice
from convscope.networks.layers import Layer
from convscope.networks.trace import Graph

Outputs = Callable[[], np.ndarray | None]


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


def head_of(graph: Graph, asked: HeadChoice | None, habits: Habits, outputs: Outputs) -> Head:
    """The head of a graph's output.

    What the graph shows decides. Where it shows no softmax or sigmoid, the user's option says what the outputs mean;
    without one they are what is usual, or what their values show where the graph does not tell.

    Args:
        graph: the network's graph.
        asked: the user's option.
        habits: of the framework.
        outputs: the network's outputs `(n, units)` for some images, or None; called only where they have to tell.
    """
    ending = ending_of(graph.trace.flow, graph.value)
    if _is_map(graph.value.shape, graph.units, habits.channels_first):
        return _head_of_maps(graph, ending, asked, habits)
    undone = _undone(graph, ending, graph.units, habits)
    if undone is not None and asked != "linear":
        return undone
    if asked == "linear":
        return Head(graph.units)
    refused = ending.activation if undone is None else None
    measured = activation_by_values(outputs()) if ending.measurable or refused else None
    if asked is not None:
        return Head(graph.units, asked, returns_logits=not _are_probabilities(asked, measured, ending))
    if measured == "softmax" or (measured == "sigmoid" and (refused == "sigmoid" or not ending.shown)):
        return Head(graph.units, measured, guess=True)
    return _by_habit(graph.units, ending, habits)


def _by_habit(units: int, ending: Ending, habits: Habits) -> Head:
    """The head of outputs that are no probabilities."""
    if ending.linear and habits.returns_logits:
        return Head(units, "softmax", returns_logits=True, guess=True) if units > 1 else Head(units, guess=True)
    return Head(units, guess=not ending.shown)


def _are_probabilities(asked: HeadChoice, measured: HeadActivation | None, ending: Ending) -> bool:
    """True if outputs whose head the user named are its probabilities, and not its logits."""
    if asked == "softmax" or ending.linear:
        return measured == "softmax"
    return measured is not None


def _undone(graph: Graph, ending: Ending, classes: int, habits: Habits) -> Head | None:
    """The head whose activation is left out of a pass; None where there is none, or it can't be left out."""
    alone = habits.leaves_out_calls or all(graph.calls_of(call.operation) == 1 for call in ending.left_out)
    if ending.activation is None or not alone or ending.classes not in (None, classes):
        return None
    first, *more = (_path_of(graph, call, call.outputs[0][1]) for call in ending.left_out)
    return Head(classes, ending.activation, undone=first, also_left_out=tuple(more), slope=ending.slope)


def _path_of(graph: Graph, call: Call, value: Value) -> str:
    """The path of the output `value` of a call, which may have several."""
    return next(
        path
        for path, (other, index) in graph.calls.items()
        if other is call and call.outputs[index][1].key == value.key
    )


def activation_by_values(values: np.ndarray | None) -> HeadActivation | None:
    """Whether outputs `(n, units)` that no known layer made are probabilities; None where they are none, or unknown."""
    if values is None or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        return None
    sums_to_one = values.shape[-1] > 1 and np.abs(values.sum(axis=-1) - 1).max() < 1e-3
    return "softmax" if sums_to_one else "sigmoid"


# -- maps --------------------------------------------------------------------------------------------------


def _is_map(shape: Sequence[int], units: int, channels_first: bool) -> bool:
    """True if an output has a value for each place."""
    if len(shape) == 4 and prod(shape[2:]) == 1:
        return False
    if channels_first:
        return prod(shape[2:]) != 1 and len(shape) > 1 and shape[-1] != units
    return prod(shape[1:-1]) != 1


def _head_of_maps(graph: Graph, ending: Ending, asked: HeadChoice | None, habits: Habits) -> Head:
    """The head of an output that has a value for each place, with a class for each channel where that is seen."""
    if asked == "linear":
        value, maker = graph.value, graph.trace.flow.maker(graph.value)
        ending = Ending(None, (), value, maker)
    layer = _map_of_scores(graph, ending)
    if layer is None:
        return Head(graph.units, spatial=True)
    classes = layer.channels
    undone = _undone(graph, ending, classes, habits)
    if undone is not None:
        return replace(undone, spatial=True, map=layer.path)
    if ending.activation is not None:  # it can't be left out: the output itself is explained
        return Head(graph.units, spatial=True)
    if asked in ("softmax", "sigmoid"):
        return Head(classes, asked, returns_logits=True, spatial=True, map=layer.path)
    if ending.linear and habits.returns_logits and classes > 1:
        return Head(classes, "softmax", returns_logits=True, guess=True, spatial=True, map=layer.path)
    return Head(classes, spatial=True, map=layer.path)


def _map_of_scores(graph: Graph, ending: Ending) -> Layer | None:
    """The layer with a map of as many values as the output has: a channel for each class; None where none is seen."""
    flow, value = graph.trace.flow, ending.scores
    layers = {layer.path: layer for layer in graph.layers}
    while (call := flow.maker(value)) is not None:
        layer = layers[_path_of(graph, call, value)]
        if layer.spatial and prod(layer.shape) == graph.units and prod(layer.shape[:2]) > 1:
            return layer
        if call.kind != "reshape" or not call.inputs:
            return None
        value = call.inputs[0]
    return None
