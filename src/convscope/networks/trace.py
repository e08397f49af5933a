"""The record of a watched run, and the graph that is read from it: head, preprocessing and network are made of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from convscope.errors import UsageError, nearest
from convscope.networks.endings import ending_of
from convscope.networks.graph import Call, Flow, Outputs, Value, layers_of, paths_of
from convscope.networks.layers import Layer

Calls = Mapping[str, tuple[Call, int]]


@dataclass(frozen=True, eq=False)
class Trace:
    """The record of one watched run.

    Attributes:
        calls: of the operations, in the order of execution.
        flow: the call that made each tensor.
        given: the tensors that the model was called with; `image` is one of them.
        outputs: the returned tensors, by name; empty where it did not come to its end.
        names: of the inputs, in the order of `given`.
    """

    calls: list[Call]
    flow: Flow
    given: list[Value]
    image: Value
    outputs: dict[str, Value]
    names: tuple[str, ...] = ()

    def output_named(self, asked: str | None) -> str:
        """The requested output, else the first that ends in softmax or sigmoid, else the first.

        Raises:
            UsageError: no such output.
        """
        if asked:
            if asked not in self.outputs:
                raise UsageError(
                    f"no output {asked!r}; {nearest(asked, self.outputs)}", code="output-unknown", name=asked
                )
            return asked
        heads = [name for name, output in self.outputs.items() if ending_of(self.flow, output).activation]
        return [*heads, *self.outputs][0]

    def origins(self) -> dict[int, tuple[str, ...]]:
        """For each call, by its id, the names of the inputs that it is computed from."""
        known: dict[Hashable, frozenset[str]] = {}
        for name, value in zip(self.names, self.given, strict=True):
            known[value.key] = frozenset({name})
        found: dict[int, tuple[str, ...]] = {}
        for call in self.calls:
            names = frozenset[str]().union(*(known.get(value.key, frozenset()) for value in call.inputs))
            for _, value in call.outputs:
                known.setdefault(value.key, names)
            found[id(call)] = tuple(name for name in self.names if name in names)
        return found

    def reached(self, output: str) -> Outputs | None:
        """The outputs of calls through which the image reaches `output`; None where that is unknown."""
        value = self.outputs.get(output)
        return None if value is None else self.flow.between(self.given, self.image, value)


@dataclass(frozen=True, eq=False)
class Graph:
    """A model's graph for one size of image, as seen from the output that is explained.

    Attributes:
        trace: the run that it was read from.
        output: the name of the output that is explained.
        calls: for each path the call, and which of its outputs: taps are placed there.
        layers: every node in the order of execution.
    """

    trace: Trace
    output: str
    calls: Calls
    layers: tuple[Layer, ...]

    @property
    def value(self) -> Value:
        """The tensor that is explained."""
        return self.trace.outputs[self.output]

    @property
    def units(self) -> int:
        """Number of values of the output that is explained, for one image."""
        return prod(self.value.shape[1:])

    def ancestors(self, path: str) -> frozenset[str] | None:
        """Paths of the layers that the image passes on its way to the output of the layer at `path`.

        Without the layer itself, and others with the same output. None where some step between them is not seen.
        """
        call, index = self.calls[path]
        value = call.outputs[index][1]
        between = self.trace.flow.between(self.trace.given, self.trace.image, value)
        if between is None:
            return None
        before = {name for name, (one, place) in self.calls.items() if one.outputs[place][1].key != value.key}
        return frozenset(name for name in before if self._within(name, between))

    def _within(self, path: str, between: Outputs) -> bool:
        """True for an output in `between`, and for that of a container which one of them is."""
        call, index = self.calls[path]
        if call.kind != "model":
            return (id(call), index) in between
        value = call.outputs[index][1]
        maker = self.trace.flow.maker(value)
        made = maker.outputs if maker else ()
        return any((id(maker), place) in between for place, (_, one) in enumerate(made) if one.key == value.key)

    def calls_of(self, operation: object) -> int:
        """How often an operation is called."""
        return sum(call.operation is operation for call in self.trace.calls)


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm that maps of the image enter.

    Attributes:
        path: of the norm; call: its call.
        before: path of the layer whose output enters it; None where the image itself does.
        channels: of what enters it.
    """

    path: str
    call: Call
    before: str | None
    channels: int


def norms_of(graph: Graph) -> Iterator[Norm]:
    """The norms between the image and the output that maps `(n, h, w, c)` enter, in the order of execution.

    Of a norm that is called several times only the first call counts.
    """
    made: dict[Hashable, tuple[str, Layer]] = {}
    for layer, (path, (call, index)) in zip(graph.layers, graph.calls.items(), strict=True):
        if call.kind == "norm" and call.nth == 0 and layer.on_path and call.inputs and len(call.inputs[0].shape) == 4:
            entering = call.inputs[0]
            if entering.key in made:
                before, source = made[entering.key]
                yield Norm(path, call, before, source.shape[-1])
            elif entering.key == graph.trace.image.key:
                yield Norm(path, call, None, layer.shape[-1])
        if call.kind != "model":
            made.setdefault(call.outputs[index][1].key, (path, layer))


def graph_of(trace: Trace, output: str) -> Graph:
    """The graph of a watched run; `output` is the name of the output that is explained."""
    calls = paths_of(trace.calls)
    return Graph(trace, output, calls, layers_in(trace, calls, output))


def layers_in(trace: Trace, calls: Calls, output: str) -> tuple[Layer, ...]:
    """The layers of a watched run; `output` is the name of the output that is explained."""
    layers = layers_of(calls, trace.flow, trace.reached(output))
    if len(trace.names) > 1 and len(trace.names) == len(trace.given):
        origins = trace.origins()
        layers = tuple(replace(layer, inputs=origins[id(calls[layer.path][0])]) for layer in layers)
    return layers
