"""The outputs of a transformer that are maps: `(n, tokens, c)` whose tokens are the cells of a grid.

One walk over the calls of a watched run, from the image to the output. Where a map becomes tokens, or their number
changes, it is measured which token depends on which cell: cells of the map are changed, and the tokens that change with
them are seen (`measured_on`). From there on an output with as many tokens has the same grid: attention mixes the cells,
but the sums around it keep each in its place. Outputs that are made of tokens and fit no grid, such as the heads of an
attention, are no maps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil, log2, prod
from typing import TYPE_CHECKING

import numpy as np

from convscope.networks.failing import attempted
from convscope.networks.foreign import Tensor
from convscope.networks.graph import Call, Value
from convscope.networks.layouts import Tokens
from convscope.networks.passes import Pass, Run
from convscope.networks.trace import Graph, layers_in

if TYPE_CHECKING:
    from convscope.networks.layers import Layer
    from convscope.networks.network import Network

Grid = tuple[int, int]
CHANGE = 3.0  # of a cell, in standard deviations of its map
LEAST_CHANGE = 1e-5  # of an output, as a share of its largest value: less is rounding


@dataclass(frozen=True, eq=False)
class Step:
    """A place where a map becomes tokens, or their number changes.

    Attributes:
        source: path of the nearest map before it; None for the image.
        shape: of that map, `(h, w, c)`.
        grid: the cells of the map, or blocks of them, that the tokens may stand for.
        path: of the tokens.
        count: their number.
    """

    source: str | None
    shape: tuple[int, ...]
    grid: Grid
    path: str
    count: int


Measure = Callable[[Step], Tokens | None]  # the tokens' layout, None where they are no grid


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is known of a value on the way from the image.

    Attributes:
        place: of the nearest map, in the order of execution; path: its own, None for the image; shape: `(h, w, c)`.
        is_map: the value is that map.
        tokens: the layout of that map, where it is made of tokens.
        turned: tokens are the last axis.
        channels_first: of a map of four axes.
        by_count: the layouts on the way to it, by the number of tokens.
        grids: the sizes of the maps on the way to it.
    """

    place: int
    path: str | None
    shape: tuple[int, ...]
    is_map: bool = True
    tokens: Tokens | None = None
    turned: bool = False
    channels_first: bool = False
    by_count: Mapping[int, Tokens] = field(default_factory=dict)
    grids: frozenset[Grid] = frozenset()


def with_grids(graph: Graph, channels: int, measure: Measure) -> Graph:
    """The graph with the layouts of tokens that are grids, which are noted at its calls.

    Args:
        graph: of a watched run.
        channels: of the image.
        measure: tells the layout of tokens that are new.
    """
    sequences = any(len(value.shape) == 3 for call in graph.trace.calls for _, value in call.outputs)
    if not sequences or len(graph.trace.image.shape) not in (3, 4):
        return graph
    _Walk(graph, channels, measure).go()
    return replace(graph, layers=layers_in(graph.trace, graph.calls, graph.output))


class _Walk:
    """The walk over the calls of a graph."""

    def __init__(self, graph: Graph, channels: int, measure: Measure) -> None:
        self._calls, self._measure = graph.calls, measure
        image = graph.trace.image
        sides = image.shape[1:] if len(image.shape) == 4 else (*image.shape[1:], 1)
        first = sides[-1] != channels
        shape = (*sides[1:], sides[0]) if first else sides
        seen = _Seen(-1, None, shape, channels_first=first)
        self._seen: dict[Hashable, _Seen] = {image.key: _with_past(seen, [])}
        self._failed: set[tuple[tuple[int, ...], int]] = set()

    def go(self) -> None:
        """Note the layouts at the calls."""
        for place, (path, (call, index)) in enumerate(self._calls.items()):
            value = call.outputs[index][1]
            if value.key not in self._seen:
                found = self._of(place, path, call, index)
                if found is None:
                    continue
                self._seen[value.key] = found
            self._note(call, index, self._seen[value.key])

    def _note(self, call: Call, index: int, seen: _Seen) -> None:
        if len(call.outputs[index][1].shape) == 4:
            if not seen.is_map:
                call.without_map.add(index)
            elif seen.by_count:
                call.channels_first = seen.channels_first
        elif seen.is_map and seen.tokens is not None:
            call.tokens[index] = seen.tokens

    def _of(self, place: int, path: str, call: Call, index: int) -> _Seen | None:
        value = call.outputs[index][1]
        given = [(one, self._seen[one.key]) for one in call.inputs if one.key in self._seen]
        if (
            len(value.shape) == 4
            and not any(seen.by_count for _, seen in given)
            and not _of_windows(call, value, given)
        ):
            return self._map(place, path, call, index, given)
        if not given:
            return None
        carried = _joined([seen for _, seen in given])
        if len(value.shape) == 4:
            return self._four_axes(place, path, call, index, given) or carried
        if len(value.shape) == 3 and 1 in value.shape[:2]:
            return self._three_axes(place, path, call, value, given, carried)
        return carried

    def _map(self, place: int, path: str, call: Call, index: int, given: Sequence[tuple[Value, _Seen]]) -> _Seen:
        """A map of four axes, with the layout that its call has."""
        shape = call.layout(index).shape_of(call.outputs[index][1].shape[1:])
        first = bool(call.channels_first)
        seen = _Seen(place, path, shape, channels_first=first)
        if call.kind == "reshape":  # it may exchange the sides of a map: cells are those of the map before it
            before = [one for value, one in given if len(value.shape) == 4 and prod(one.shape) == prod(shape)]
            seen = replace(before[0], channels_first=first) if before else seen
        return _with_past(seen, [one for _, one in given])

    def _four_axes(
        self, place: int, path: str, call: Call, index: int, given: Sequence[tuple[Value, _Seen]]
    ) -> _Seen | None:
        """The map that an output of four axes is, which is made of tokens somewhere; None where it is none."""
        if call.kind in _MAKE_MAPS:
            return self._map(place, path, call, index, given)
        maps = [seen for one, seen in given if len(one.shape) == 4 and seen.is_map]
        sides = call.outputs[index][1].shape[1:]
        if maps and call.kind != "reshape":
            first = maps[0].channels_first if call.inherits_layout else bool(call.channels_first)
        else:
            one_row = call.outputs[index][1].shape[0] == 1
            fitting = _fitting(sides, _joined([seen for _, seen in given])) if one_row else []
            if not fitting:
                return None
            first = bool(call.channels_first) if len(fitting) == 2 else fitting[0]
        shape = (*sides[1:], sides[0]) if first else sides
        return _with_past(_Seen(place, path, shape, channels_first=first), [seen for _, seen in given])

    def _three_axes(
        self,
        place: int,
        path: str,
        call: Call,
        value: Value,
        given: Sequence[tuple[Value, _Seen]],
        carried: _Seen,
    ) -> _Seen:
        """What an output `(1, a, b)` or `(a, 1, b)` is: tokens with a grid, the same with axes turned, or neither."""
        second = value.shape[0] != 1
        sides = (value.shape[0], value.shape[2]) if second else value.shape[1:]
        source, seen = next(((one, seen) for one, seen in given if len(one.shape) == 3), given[0])
        turned = seen.turned and len(source.shape) == 3 and not second
        if len(source.shape) == 3 and _turns(call, source, value):
            turned = not turned
        elif len(source.shape) == 4 and seen.is_map and seen.channels_first:
            cells = seen.shape[0] * seen.shape[1]
            turned = call.kind == "reshape" and sides == (seen.shape[2], cells)
        if turned:
            return replace(carried, turned=True)
        tokens = self._tokens(path, sides[0], [one for _, one in given], carried)
        if tokens is None:
            return carried
        tokens = replace(tokens, images_second=second)
        found = _Seen(place, path, (*tokens.grid, sides[1]), tokens=tokens)
        return _with_past(found, [one for _, one in given])

    def _tokens(self, path: str, count: int, given: Sequence[_Seen], carried: _Seen) -> Tokens | None:
        """The layout of `count` tokens: as before where there were as many, else measured, else as farther before."""
        for seen in (*given, carried):
            if seen.tokens is not None and seen.tokens.count == count:
                return seen.tokens
        return self._changed(path, count, carried) or carried.by_count.get(count)

    def _changed(self, path: str, count: int, source: _Seen) -> Tokens | None:
        grid = coarse_grid((source.shape[0], source.shape[1]), count)
        key = (source.shape[:2], count)
        if grid is None or key in self._failed:
            return None
        tokens = self._measure(Step(source.path, source.shape, grid, path, count))
        if tokens is None:
            self._failed.add(key)
        return tokens


_MAKE_MAPS = ("conv", "pool", "global_pool", "resize", "padding")
_TURNING = ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t")


def _of_windows(call: Call, value: Value, given: Sequence[tuple[Value, _Seen]]) -> bool:
    """True for an output of four axes that is made of no map and has other rows than images: heads of windows."""
    maps = any(len(one.shape) == 4 and seen.is_map for one, seen in given)
    return bool(given) and value.shape[0] != 1 and call.kind not in _MAKE_MAPS and not maps


def _turns(call: Call, source: Value, value: Value) -> bool:
    """True if a call exchanges the last two of three axes."""
    return call.class_name.lower() in _TURNING and source.shape[1:] == value.shape[:0:-1]


def _fitting(sides: tuple[int, ...], seen: _Seen) -> list[bool]:
    """The layouts, by whether they have the channels first, in which an output of four axes has one of the grids."""
    last = (sides[0], sides[1]) in seen.grids
    # Where the first axis has all of the tokens, the others are the heads of an attention.
    first = (sides[1], sides[2]) in seen.grids and (seen.turned or sides[0] not in seen.by_count)
    return [False] * last + [True] * first


def _joined(given: Sequence[_Seen]) -> _Seen:
    """What is known of a value that is made of others and is no map itself."""
    return _with_past(
        replace(max(given, key=lambda one: one.place), is_map=False, turned=any(one.turned for one in given)), given
    )


def _with_past(seen: _Seen, given: Sequence[_Seen]) -> _Seen:
    """`seen` with the grids of itself and all that it is made of."""
    by_count = {count: tokens for one in given for count, tokens in one.by_count.items()}
    if seen.tokens is not None:
        by_count[seen.tokens.count] = seen.tokens
    grids = frozenset({(seen.shape[0], seen.shape[1])}).union(*(one.grids for one in given))
    return replace(seen, by_count=by_count, grids=grids)


def coarse_grid(grid: Grid, count: int) -> Grid | None:
    """The finest grid of square blocks of a map's cells that has at most `count` cells; None for a single one."""
    for block in range(1, min(grid) + 1):
        if grid[0] % block or grid[1] % block:
            continue
        found = (grid[0] // block, grid[1] // block)
        if found[0] * found[1] <= count:
            return found if found[0] * found[1] > 1 else None
    return None


# -- which token depends on which cell -------------------------------------------------------------------


def measured_on(network: Callable[[], Network]) -> Measure:
    """Measures on a network, which is asked for once and only where there is something to measure."""
    made: list[Network] = []

    def measure(step: Step) -> Tokens | None:
        if not made:
            made.append(network())
        return attempted(made[0], lambda: _measured(made[0], step))

    return measure


def _measured(network: Network, step: Step) -> Tokens | None:
    """The layout of the tokens of a step; None unless each cell changes one token, and each token one cell or none.

    The cells are numbered, and for each bit of the number those that have it, and those that have it not, are changed
    at the same time: so the tokens that change tell their cell's number, bit by bit.
    """
    random = np.random.default_rng(0)
    x = network.tensor(_noise(network))
    program = network.program(_changed_map, step.source, step.path)
    plain, unchanged = program(x, network.tensor(np.zeros((1, *step.shape), np.float32)))
    changes = (CHANGE * (network.numpy(plain).std() + 1e-6) * random.normal(size=step.shape)).astype(np.float32)
    cells, block = step.grid[0] * step.grid[1], step.shape[0] // step.grid[0]
    numbers = np.arange(cells).reshape(step.grid).repeat(block, axis=0).repeat(block, axis=1)

    def of_image(output: Tensor) -> np.ndarray:
        return network.numpy(output).reshape(step.count, -1)

    def touched(which: np.ndarray) -> np.ndarray:
        change = network.tensor((changes * which[..., None])[None])
        return _changed(of_image(program(x, change)[1]), of_image(unchanged))

    bits = range(ceil(log2(cells)))
    having = np.array([touched(numbers >> bit & 1 == 1) for bit in bits])
    lacking = np.array([touched(numbers >> bit & 1 == 0) for bit in bits])
    return _layout(having, lacking, step)


def _layout(having: np.ndarray, lacking: np.ndarray, step: Step) -> Tokens | None:
    """The layout that follows from the tokens that change with the cells which have a bit, and with the others.

    Args:
        having, lacking: `(bits, tokens)` bool.
        step: the step.
    """
    dependent = np.any(having | lacking, axis=0)
    if not (having ^ lacking)[:, dependent].all():
        return None
    numbers = (having[:, dependent] << np.arange(len(having))[:, None]).sum(axis=0)
    if sorted(numbers) != list(range(step.grid[0] * step.grid[1])):
        return None
    places = np.flatnonzero(dependent)[np.argsort(numbers)]
    return Tokens(step.grid, step.count, tuple(int(place) for place in places))


def _changed(output: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Which tokens `(tokens,)` of an output `(tokens, c)` are others than before."""
    return np.abs(output - before).max(axis=-1) > LEAST_CHANGE * np.abs(before).max()


def _changed_map(network: Network, source: str | None, path: str) -> Callable:
    """From images and a change of the map at `source`, or of the images, that map and the output at `path`."""

    def run_changed(run: Run, x: Tensor, change: Tensor) -> tuple:
        if source is None:
            return x, run(x + change, Pass(record=(path,), stop=True)).activations[path]
        request = Pass(record=(source, path), replace=(source,), stop=True)
        seen = run(x, request, {source: lambda activation: activation + change}).activations
        return seen[source], seen[path]

    return run_changed


LAST_LAYERS = 32  # those after the last attention are among them


class GridEffect:
    """Which of the last layers of tokens have a grid that others are computed from: changes of it are tried.

    Args:
        network: it is run on noise, once for each layer that is asked for.
        record: paths of the layers that have to change; the class scores where there are none.
    """

    def __init__(self, network: Network, record: tuple[str, ...] = ()) -> None:
        self._network, self._record = network, record
        paths = [layer.path for layer in network.layers if layer.tokens is not None and layer.tokens.others]
        self._paths = tuple(paths[-LAST_LAYERS:])
        self._known: dict[str, bool] = {}
        self._x = network.tensor(_noise(network))

    def __call__(self, layer: Layer) -> bool:
        """True if a change of the layer's grid changes them, or where that can't be tried."""
        if layer.path not in self._paths:
            return True
        if layer.path not in self._known:
            changes = attempted(self._network, lambda: self._changes(self._paths.index(layer.path)))
            if changes is None:
                return True
            self._known[layer.path] = changes
        return self._known[layer.path]

    def _changes(self, number: int) -> bool:
        changed, before = self._read(number + 1), self._plain
        return bool(np.abs(changed - before).max() > LEAST_CHANGE * np.abs(before).max())

    @cached_property
    def _plain(self) -> np.ndarray:
        return self._read(0)

    def _read(self, number: int) -> np.ndarray:
        network, which = self._network, np.eye(len(self._paths) + 1, dtype=np.float32)[number]
        program = network.program(_with_changes, self._paths, self._record)
        read = program(self._x, network.tensor(which))
        return np.concatenate([network.numpy(one).reshape(-1) for one in read])


def _with_changes(network: Network, paths: Sequence[str], record: tuple[str, ...]) -> Callable:
    """From an image and the number of a path, one-hot and from 1 on, what is read with the map there changed."""
    ops = network.ops

    def changed(number: int, which: Tensor, activation: Tensor) -> Tensor:
        noise = np.random.default_rng(number).normal(size=activation.shape[1:]).astype(np.float32)
        return activation + which[number] * CHANGE * ops.std(activation) * ops.convert_to_tensor(noise)

    def read(run: Run, x: Tensor, which: Tensor) -> list[Tensor]:
        rules = {path: partial(changed, number, which) for number, path in enumerate(paths, 1)}
        seen = run(x, Pass(record=record, replace=tuple(rules), logits=not record), rules)
        return [seen.activations[path] for path in record] or [seen.logits]

    return read


def _noise(network: Network) -> np.ndarray:
    """One prepared image of noise."""
    pixels = np.random.default_rng(0).uniform(0, 255, (1, *network.image_shape)).astype(np.float32)
    return network.preprocessing.apply(pixels)


def from_own_size(own: Graph) -> Measure:
    """Takes the layouts for images of another size from those of the network's own size: nothing is run."""

    def measure(step: Step) -> Tokens | None:
        call, index = own.calls.get(step.path, (None, 0))
        known = None if call is None else call.tokens.get(index)
        if known is None or step.count != step.grid[0] * step.grid[1] + known.others:
            return None
        cells = step.grid[0] * step.grid[1]
        in_rows = known.places == tuple(range(known.front, known.front + len(known.places)))
        return Tokens(step.grid, step.count, tuple(range(known.front, known.front + cells))) if in_rows else None

    return measure
