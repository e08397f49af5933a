"""The end of a network, read from its graph: the steps that make probabilities of scores, whatever they are written as.

The walk begins at the output and goes back. It passes what changes no value (dropout, casts, reshapes) and what changes
no decision (a logarithm, a clip to just inside of 0..1), up to a softmax or sigmoid: a layer, an activation of a layer,
a function, or written out by hand. Each step that is found can be left out of a pass, which then gives its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from convscope.networks.graph import Call, Flow, Value
from convscope.networks.head import HeadActivation
from convscope.networks.layers import PASSING

# Names as `_name` makes them. A logarithm of probabilities is left out with the softmax or sigmoid before it.
_SOFTMAX = {"softmax", "logsoftmax", "softmax2d"}
_SIGMOID = {"sigmoid", "logsigmoid", "expit", "specialexpit", "logistic"}
_HARD_SIGMOID = {"hardsigmoid"}
_DIVIDES = {"div", "divide", "truedivide", "truediv"}
_SUBTRACTS = {"sub", "subtract"}
_SUMS = {"sum", "reducesum"}
_HIGHEST = {"max", "amax", "reducemax"}
_LOG_OF_SUM = {"logsumexp", "reducelogsumexp"}
_CLIPS = {"clip", "clamp", "clampmin"}
_RECIPROCALS = {"reciprocal", "rdiv"}
_NEGATES = {"neg", "negative", "negate"}
_UNIT_LENGTH = {"normalize", "unitnormalization", "lpnormalization"}
_LINEAR = ("dense", "conv", "norm", "merge", "global_pool")  # kinds of layers whose outputs can be logits
NEARLY = 1e-3  # a clip that leaves probabilities from this to 1 less it as they are changes no decision
SLOPE = 1 / 6  # of a hard sigmoid, where it has no other


@dataclass(frozen=True, eq=False)
class Ending:
    """How a network's output is made, as far as the graph shows.

    Attributes:
        activation: makes probabilities of scores; None where the graph shows none.
        slope: of a hard sigmoid.
        left_out: the calls to leave out of a pass, so that it gives the scores; the activation's own first.
        classes: number of values that the activation is one distribution of; None where that is not known.
        scores: the tensor of the scores: what is left where nothing is passed on or left out.
        maker: the call that makes it; None where that is not seen.
    """

    activation: HeadActivation | None
    left_out: tuple[Call, ...]
    scores: Value
    maker: Call | None
    slope: float = SLOPE
    classes: int | None = None

    @property
    def shown(self) -> bool:
        """True if the graph shows what made the scores; code of the user's own may do anything."""
        return self.maker is not None and not self.maker.facts.get("opaque", False)

    @property
    def linear(self) -> bool:
        """True if a layer without a non-linearity made the scores, so that they can be logits."""
        if self.maker is None or not self.shown or self.maker.activation is not None:
            return False
        return self.maker.kind in _LINEAR and _name(self.maker) not in _UNIT_LENGTH

    @property
    def measurable(self) -> bool:
        """True if only the output's values can tell whether they are probabilities."""
        if self.maker is None or not self.shown:
            return True
        return self.maker.activation is None and self.maker.kind in ("merge", "other")


def ending_of(flow: Flow, output: Value) -> Ending:
    """The end of a network whose output is `output`."""
    passed: list[Call] = []
    value = output
    while True:
        value, call = passed_back(flow, value)
        if call is None:
            break
        found = _probabilities(flow, value, call)
        if found is not None:
            return replace(found, left_out=(*found.left_out[:1], *passed, *found.left_out[1:]))
        if not (_name(call) == "log" or _clips_nothing(call)) or not call.inputs:
            break
        passed.append(call)
        value = call.inputs[0]
    value, call = passed_back(flow, output)
    return Ending(None, (), value, call)


def passed_back(flow: Flow, value: Value) -> tuple[Value, Call | None]:
    """The tensor with the same values that a call made which does more than pass on or reshape, and this call."""
    call = flow.maker(value)
    while call is not None and _passes(call, value):
        value = call.inputs[0]
        call = flow.maker(value)
    return value, call


def _passes(call: Call, output: Value) -> bool:
    """True for a call one of whose outputs, `output`, has all values of its input."""
    if not call.inputs or call.activation is not None or call.facts.get("function") is not None:
        return False
    if call.kind in PASSING or call.kind == "activation":  # an activation without a name is linear
        return True
    return call.kind == "reshape" and prod(call.inputs[0].shape) == prod(output.shape)


def _name(call: Call) -> str:
    """The name of what a call computes, in one spelling for all frameworks: "log_softmax_v2" is "logsoftmax"."""
    name = str(call.facts.get("function") or call.activation or call.class_name)
    return name.lower().removesuffix("_v2").replace("_", "")


def _probabilities(flow: Flow, value: Value, call: Call) -> Ending | None:
    """The ending in a call whose output `value` are probabilities that it makes of scores, or their logarithms."""
    if not call.inputs:
        return None
    if call.facts.get("opaque") and call.facts.get("function") is None:
        return None
    name, fused = _name(call), call.kind != "activation" and call.activation is not None
    scores = value if fused else call.inputs[0]
    maker = call if fused else None
    if name in _SOFTMAX:
        return _with_maker(flow, Ending("softmax", (call,), scores, maker, classes=_size_along(call, value)))
    if name in _SIGMOID:
        return _with_maker(flow, Ending("sigmoid", (call,), scores, maker))
    slope = call.facts.get("slope", SLOPE)
    if name in _HARD_SIGMOID and slope is not None:
        return _with_maker(flow, Ending("hard_sigmoid", (call,), scores, maker, slope=slope))
    found = _softmax_by_hand(flow, call) or _log_softmax_by_hand(flow, call) or _sigmoid_by_hand(flow, call)
    return None if found is None else _with_maker(flow, found)


def _with_maker(flow: Flow, ending: Ending) -> Ending:
    if ending.maker is not None:
        return ending
    value, call = passed_back(flow, ending.scores)
    return replace(ending, scores=value, maker=call)


def _size_along(call: Call, output: Value) -> int | None:
    """The number of values of `output` along the axes of a softmax; None where they are not known."""
    axes: slice | None = call.facts.get("axes")
    return None if axes is None else prod(output.shape[axes])


def _clips_nothing(call: Call) -> bool:
    """True for a clip that leaves probabilities as they are, but for the nearest to 0 and 1."""
    if _name(call) not in _CLIPS:
        return False
    low, high = call.facts.get("bounds", (1, 0))
    return (low is None or 0 <= low <= NEARLY) and (high is None or high >= 1 - NEARLY)


# -- written out by hand -----------------------------------------------------------------------------------


def _softmax_by_hand(flow: Flow, call: Call) -> Ending | None:
    """exp(z) / sum(exp(z)), where z may be less its highest value."""
    if _name(call) not in _DIVIDES or len(call.inputs) != 2:
        return None
    above, exp = passed_back(flow, call.inputs[0])
    _, total = passed_back(flow, call.inputs[1])
    if exp is None or total is None or _name(exp) != "exp" or _name(total) not in _SUMS:
        return None
    if passed_back(flow, total.inputs[0])[0] != above:
        return None
    return _less_highest(flow, Ending("softmax", (call, exp), exp.inputs[0], None, classes=_terms(total)))


def _log_softmax_by_hand(flow: Flow, call: Call) -> Ending | None:
    """z - log(sum(exp(z)))."""
    if _name(call) not in _SUBTRACTS or len(call.inputs) != 2:
        return None
    scores, _ = passed_back(flow, call.inputs[0])
    _, normal = passed_back(flow, call.inputs[1])
    if normal is not None and _name(normal) in _LOG_OF_SUM:
        total, value = normal, normal.inputs[0]
    elif normal is not None and _name(normal) == "log":
        _, summed = passed_back(flow, normal.inputs[0])
        if summed is None or _name(summed) not in _SUMS:
            return None
        _, exp = passed_back(flow, summed.inputs[0])
        if exp is None or _name(exp) != "exp":
            return None
        total, value = summed, exp.inputs[0]
    else:
        return None
    if passed_back(flow, value)[0] != scores:
        return None
    return _less_highest(flow, Ending("softmax", (call,), call.inputs[0], None, classes=_terms(total)))


def _less_highest(flow: Flow, ending: Ending) -> Ending:
    """The same without the subtraction of the highest score, which changes no softmax but every gradient."""
    _, call = passed_back(flow, ending.scores)
    if call is None or _name(call) not in _SUBTRACTS or len(call.inputs) != 2:
        return ending
    own, _ = passed_back(flow, call.inputs[0])
    _, highest = passed_back(flow, call.inputs[1])
    if highest is None or _name(highest) not in _HIGHEST or passed_back(flow, highest.inputs[0])[0] != own:
        return ending
    return replace(ending, left_out=(*ending.left_out, call), scores=call.inputs[0])


def _sigmoid_by_hand(flow: Flow, call: Call) -> Ending | None:
    """1 / (1 + exp(-z))."""
    steps = (_DIVIDES | _RECIPROCALS, {"add"}, {"exp"}, _NEGATES)
    left_out: list[Call] = []
    step: Call | None = call
    for names in steps:
        if step is None or _name(step) not in names or len(step.inputs) != 1 or not _adds_only_ones(step):
            return None
        left_out.append(step)
        _, step = passed_back(flow, step.inputs[0])
    return Ending("sigmoid", tuple(left_out), left_out[-1].inputs[0], None)


def _adds_only_ones(call: Call) -> bool:
    """True if the numbers that a call combines its tensor with are all 1, and are known."""
    numbers: Sequence[float] = call.facts.get("scalars", ())
    needed = 0 if _name(call) in {"exp", "reciprocal"} | _NEGATES else 1
    return len(numbers) >= needed and all(number == 1 for number in numbers)


def _terms(total: Call) -> int | None:
    """How many values each sum of a call has."""
    before, after = prod(total.inputs[0].shape), prod(total.outputs[0][1].shape)
    return before // after if after and before % after == 0 else None
