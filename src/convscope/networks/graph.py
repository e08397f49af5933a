"""The record of one watched pass through a model of any framework: calls, and the flow of data between them.

A framework's file writes down `Call`s; everything that follows from the origin of tensors is here: the layers, the
head, the non-linearity after a convolution, the first operations on the image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from convscope.networks.foreign import Operation, Tensor
from convscope.networks.layers import PASSING, Layer
from convscope.networks.layouts import Layout, Tokens

Outputs = set[tuple[int, int]]  # of calls: the id of the call, and the number of the output
Fact = Any  # what a format tells of a layer beside the rest: numbers, or which outputs were changed in place


@dataclass(frozen=True)
class Value:
    """A tensor of the watched pass: its identity, and its shape, the batch first."""

    key: Hashable
    shape: tuple[int, ...]


@dataclass(eq=False)
class Call:
    """One call of one operation, as seen while the model was watched.

    Attributes:
        path: of the operation.
        kind: one of `layers.KINDS`; class_name: the framework's own.
        operation: the operation, at which taps are placed.
        nth: the number of this call of it.
        inputs: the tensors that it took.
        outputs: the returned tensors, each with the mark that distinguishes it ("" for a single one).
        activation: the name of the non-linearity that it ends in, None if it has none.
        parameters: number of its weights.
        channels_first: whether its maps are `(n, c, h, w)`; None until `mark_layouts` has set it.
        inherits_layout: that is so since its input's have; it does not declare it itself.
        tokens: the grids of its outputs that are tokens, by their numbers; `grids` finds them.
        without_map: the numbers of outputs that are no maps, though they have as many axes.
    """

    path: str
    kind: str
    class_name: str
    operation: Operation
    nth: int
    inputs: list[Value]
    outputs: list[tuple[str, Value]]
    activation: str | None = None
    parameters: int = 0
    channels_first: bool | None = None
    inherits_layout: bool = False
    tokens: dict[int, Tokens] = field(default_factory=dict)
    without_map: set[int] = field(default_factory=set)
    facts: dict[str, Fact] = field(default_factory=dict)

    def layout(self, index: int) -> Layout:
        """The layout of one of its outputs."""
        first = bool(self.channels_first) and index not in self.without_map
        return Layout(first, self.tokens.get(index))


def flat_outputs(structure: object) -> list[tuple[str, Tensor]]:
    """Tensors of a layer's output with the text that distinguishes each ("" for a single one)."""
    if is_dataclass(structure) and not isinstance(structure, type):
        structure = {item.name: getattr(structure, item.name) for item in fields(structure)}
    if isinstance(structure, Mapping):
        return [(f"[{key}]", structure[key]) for key in structure if hasattr(structure[key], "shape")]
    if isinstance(structure, list | tuple):
        tensors = [(index, item) for index, item in enumerate(structure) if hasattr(item, "shape")]
        return [("" if len(tensors) == 1 else f"[{index}]", item) for index, item in tensors]
    return [("", structure)] if hasattr(structure, "shape") else []


def mark_layouts(calls: Sequence[Call], given: bool) -> None:
    """Mark for each call whether its maps have the channels first: as it declares itself, else like its input."""
    layout: dict[Hashable, bool] = {}
    for call in calls:
        if call.channels_first is None:
            call.inherits_layout = True
            call.channels_first = next((layout[value.key] for value in call.inputs if value.key in layout), given)
        for _, value in call.outputs:
            layout.setdefault(value.key, call.channels_first)


class Flow:
    """Who made a tensor, and who took it: the flow of data between the calls of leaf operations."""

    def __init__(self, calls: Sequence[Call]) -> None:
        # A call that returns its input (Dropout outside training) neither makes nor takes a tensor.
        self._leaves = [call for call in calls if call.kind != "model" and (_made(call) or not call.outputs)]
        self._maker: dict[Hashable, Call] = {}
        self._takers: dict[Hashable, list[Call]] = {}
        for call in self._leaves:
            for _, value in _made(call):
                self._maker.setdefault(value.key, call)
            for value in call.inputs:
                self._takers.setdefault(value.key, []).append(call)

    def maker(self, value: Value) -> Call | None:
        """The call that made `value`; None for an input of the network."""
        return self._maker.get(value.key)

    def before(self, call: Call) -> Call | None:
        """The call that made the first input of `call`."""
        return next((made for made in map(self.maker, call.inputs) if made is not None), None)

    def only_taker(self, call: Call) -> Call | None:
        """The one call that takes the output of `call`, None if there are more or none."""
        takers = [taker for _, value in call.outputs for taker in self._takers.get(value.key, [])]
        return takers[0] if len(takers) == 1 else None

    def between(self, given: Sequence[Value], image: Value, output: Value) -> Outputs | None:
        """The outputs of calls through which `image` reaches `output`; None where some step between calls is not seen.

        Args:
            given: the tensors that the model was called with; `image` is one of them.
            image, output: the ends of the way.

        Returns:
            for each the id of the call and the number of the output: a call may have another one that is not used.
        """
        before: set[tuple[int, int]] = set()
        needed, maps = {output.key}, {output.key}
        for call in reversed(self._leaves):  # in the order of execution, so one sweep does
            wanted = {(id(call), index) for index, value in _made(call) if value.key in needed}
            if wanted:
                before |= wanted
                needed.update(value.key for value in call.inputs)
                maps.update(value.key for value in call.inputs if len(value.shape) > 1)
        if not maps <= set(self._maker) | {value.key for value in given}:
            return None
        after: set[int] = set()
        reached = {image.key}
        for call in self._leaves:
            if any(value.key in reached for value in call.inputs):
                after.add(id(call))
                reached.update(value.key for _, value in call.outputs)
        return {(call, index) for call, index in before if call in after} or None

    def nonlinearities(self, call: Call) -> list[Call]:
        """The calls with the non-linearities of `call`: its own, or those of what it concatenates or passes on.

        Empty where there is none, and where one is made from another: leaving out the first would change the second.
        """
        found: dict[int, Call] = {}
        waiting, seen = [call], set[int]()
        while waiting:
            here = waiting.pop()
            if id(here) in seen:
                continue
            seen.add(id(here))
            if here.kind != "model" and (here.activation is not None or here.kind == "activation"):
                found[id(here)] = here
            elif here.kind == "model":
                waiting += self._makers([value for _, value in here.outputs])
            elif here.kind in _HANDING_ON or _concatenates(here):
                waiting += self._makers(here.inputs)
        if any(self._upstream(one) & set(found) for one in found.values()):
            return []
        return list(reversed(found.values()))

    def _makers(self, values: Sequence[Value]) -> list[Call]:
        return [made for value in values if (made := self.maker(value)) is not None]

    def _upstream(self, call: Call) -> set[int]:
        """Ids of all calls that `call` is made from."""
        found: set[int] = set()
        waiting = self._makers(call.inputs)
        while waiting:
            here = waiting.pop()
            if id(here) not in found:
                found.add(id(here))
                waiting += self._makers(here.inputs)
        return found

    def entrance(self, image: Value, is_step: Callable[[Call], bool]) -> tuple[list[Call], list[Value], bool]:
        """The calls that the image passes up to the first that is no step, and the tensors where they narrow to one.

        All that is computed of the image later is computed from each of these tensors, in the order of execution.

        Returns:
            the calls, the tensors, and whether the calls are all that there is: False where some other one takes what
            the image became unseen.
        """
        last = {value.key: place for place, call in enumerate(self._leaves) for value in call.inputs}
        steps: list[Call] = []
        narrow: list[Value] = []
        made = {image.key}
        for place, call in enumerate(self._leaves):
            if not any(value.key in made for value in call.inputs):
                continue
            if not is_step(call):
                return steps, narrow, True
            steps.append(call)
            made.update(value.key for _, value in call.outputs)
            wanted = {key for key in made if last.get(key, -1) > place}
            narrow += [value for _, value in call.outputs if wanted == {value.key}]
        return steps, narrow, len(steps) == len(self._leaves)

    def rectified(self, call: Call) -> Call | None:
        """The call after whose non-linearity the zeros of `call` are counted (FIELD.md §1), None if there is none."""
        if call.activation is not None:
            return call
        if call.kind in ("pool", "global_pool", "dropout", "padding") and self._holds_rectified(call):
            return call
        after = self.only_taker(call)
        while after is not None and after.activation is None:
            after = self.only_taker(after) if _keeps_channels(after) else None
        return after

    def _holds_rectified(self, call: Call) -> bool:
        """True if all that a call takes went through a non-linearity before, perhaps joined or pooled since."""
        makers = [self.maker(value) for value in call.inputs]
        return bool(makers) and all(made is not None and self._is_rectified(made) for made in makers)

    def _is_rectified(self, made: Call) -> bool:
        if made.activation is not None:
            return True
        joins = made.kind == "merge" and len(made.inputs) > 1  # with a constant it would be a shift
        return (joins or made.kind in _HANDING_ON) and self._holds_rectified(made)


_HANDING_ON = ("pool", "dropout", "identity", "padding", "reshape", "resize")


def _keeps_channels(call: Call) -> bool:
    """True for a step that may stand between a convolution and its non-linearity: a norm, a separate bias."""
    return call.kind in PASSING | {"norm"} or (call.kind == "merge" and len({value.key for value in call.inputs}) == 1)


def _concatenates(call: Call) -> bool:
    """True for a join that changes nothing; a sum or a product of non-linearities' outputs is not one of them."""
    return call.kind == "merge" and call.class_name.lower().startswith(("concat", "cat", "depthconcat"))


def _made(call: Call) -> list[tuple[int, Value]]:
    """The outputs of a call, by their number, that are none of its inputs."""
    given = {value.key for value in call.inputs}
    return [(index, value) for index, (_, value) in enumerate(call.outputs) if value.key not in given]


def paths_of(calls: Sequence[Call]) -> dict[str, tuple[Call, int]]:
    """Every output of every call by its full path."""
    total: dict[str, int] = {}
    for call in calls:
        total[call.path] = total.get(call.path, 0) + 1
    return {
        call.path + (f"#{call.nth}" if total[call.path] > 1 else "") + mark: (call, index)
        for call in calls
        for index, (mark, _) in enumerate(call.outputs)
    }


def nonlinearities_at(paths: Mapping[str, tuple[Call, int]], path: str) -> list[str]:
    """The paths of `Flow.nonlinearities` at `path`."""
    calls = list({id(call): call for call, _ in paths.values()}.values())
    names: dict[int, str] = {}
    for name, (call, _) in paths.items():
        names.setdefault(id(call), name)
    return [names[id(call)] for call in Flow(calls).nonlinearities(paths[path][0])]


def layers_of(paths: Mapping[str, tuple[Call, int]], flow: Flow, on_path: Outputs | None) -> tuple[Layer, ...]:
    """The public face of every output of every call."""
    names: dict[int, str] = {}
    for path, (call, _) in paths.items():
        names.setdefault(id(call), path)
    return tuple(_layer(path, call, index, flow, names, on_path) for path, (call, index) in paths.items())


_COUNTED = ("conv", "pool", "norm", "activation", "merge", "dense")


def _layer(path: str, call: Call, index: int, flow: Flow, names: dict[int, str], on_path: Outputs | None) -> Layer:
    rectified = flow.rectified(call) if call.kind in _COUNTED else None
    return Layer(
        path=path,
        kind=call.kind,
        class_name=call.class_name,
        shape=shape_of(call, index),
        parameters=call.parameters if call.nth == 0 and index == 0 else 0,
        rectified=path if rectified is call else None if rectified is None else names[id(rectified)],
        on_path=on_path is None or (id(call), index) in on_path,
        activation=call.activation,
        tokens=call.tokens.get(index),
        has_map=index not in call.without_map,
    )


def shape_of(call: Call, index: int) -> tuple[int, ...]:
    """The shape of one output of a call, for one image, channels last; of tokens that are a grid `(h, w, c)`."""
    return call.layout(index).shape_of(call.outputs[index][1].shape[1:])
