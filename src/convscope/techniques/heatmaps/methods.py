"""The registry of heatmap methods: a new one is one decorated function in a file that `__init__` imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convscope.errors import UsageError, nearest

if TYPE_CHECKING:
    from convscope.techniques.heatmaps.evidence import Evidence, Single

Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]
Made = np.ndarray | tuple[np.ndarray, str]  # a map, and perhaps a word about it


class Unfit(UsageError):
    """A method does not fit this network, layer or target: where several were asked for, it can be left out."""


@dataclass(frozen=True)
class Method:
    """A way to make a heatmap.

    Attributes:
        name: as `--method` takes it.
        paper: where it is defined.
        explain: from the evidence about some pictures to a map `(h, w)` for each, raw and signed.
        formula: for methods that need no more than one pass, what `explain` calls: from maps and gradients, both
            `(n, h, w, c)`, to heatmaps `(n, h, w)`; None for the others.
        at_picture: the map is one of the picture's pixels or places, whatever the layer.
        warning: what has to be said beside each of its maps.
    """

    name: str
    paper: str
    explain: Callable[[Evidence], Sequence[Made]]
    formula: Formula | None = None
    at_picture: bool = False
    warning: str = ""

    @property
    def one_pass(self) -> bool:
        """True if the pass that gives a layer's maps and gradients is enough."""
        return self.formula is not None and not self.at_picture


METHODS: dict[str, Method] = {}


def method(name: str, paper: str, *, at_picture: bool = False, warning: str = "") -> Callable[[Formula], Formula]:
    """Register a formula of maps and gradients: those of the layer, or the picture and the gradient at its pixels."""

    def register(formula: Formula) -> Formula:
        def explain(evidence: Evidence) -> Sequence[Made]:
            if at_picture:
                return list(formula(evidence.x, evidence.slopes))
            return list(formula(evidence.maps, evidence.gradients))

        METHODS[name] = Method(name, paper, explain, formula, at_picture, warning)
        return formula

    return register


def explained(name: str, paper: str) -> Callable[[Callable], Callable]:
    """Register a method that asks the evidence of some pictures for more than one pass gives."""

    def register(function: Callable[[Evidence], Sequence[Made]]) -> Callable:
        METHODS[name] = Method(name, paper, function)
        return function

    return register


def replayed(name: str, paper: str, *, at_picture: bool = False, warning: str = "") -> Callable[[Callable], Callable]:
    """Register a method that replays the network for one picture at a time."""

    def register(function: Callable[[Single], Made]) -> Callable:
        def explain(evidence: Evidence) -> Sequence[Made]:
            return [function(single) for single in evidence.singles()]

        METHODS[name] = Method(name, paper, explain, None, at_picture, warning)
        return function

    return register


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"no heatmap method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]
