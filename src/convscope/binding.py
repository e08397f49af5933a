"""Objectives on a network: layers are found, channels and cells become the arguments of a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.errors import UsageError, option
from convscope.measures import (
    INPUT,
    LOGIT,
    LOGITS,
    Measure,
    Scored,
    ScoredBeside,
    own,
)
from convscope.networks import Layer, Network
from convscope.networks.foreign import Tensor
from convscope.networks.layers import check_channel
from convscope.objectives import LINEAR, Objective, Term


@dataclass(frozen=True)
class TermSpec:
    """The part of one term that a program depends on: its layer and its measure; the rest are arguments."""

    layer: Layer
    measure: Measure


@dataclass(frozen=True)
class ProgramKey:
    """The key of the compiled program that several objectives share.

    Attributes:
        specs: one for each term.
        preactivations: paths whose own non-linearity is left out, for filters that have no gradient behind it.
    """

    specs: tuple[TermSpec, ...]
    preactivations: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the layers to record."""
        return tuple(
            path
            for path in dict.fromkeys(path for spec in self.specs for path in spec.measure.record(spec.layer))
            if path != INPUT
        )

    @property
    def scores(self) -> bool:
        """True if class scores are asked for, and so the whole network has to run."""
        return any(spec.measure.scores(spec.layer) for spec in self.specs)


@dataclass(frozen=True, eq=False)
class BoundObjective:
    """An objective on a network, at one size of its images.

    Attributes:
        objective: with the full paths of layers.
        key: key of the compiled program.
        arguments: for each term the argument of its measure; of `Linear` the weight of each cell `(h, w)`, which sum to
            1, `(1, 1)` of a dense layer.
        vectors: for each term the weight of each number `(c,)` of its measure, times the term's weight.
    """

    objective: Objective
    key: ProgramKey
    arguments: tuple[np.ndarray, ...]
    vectors: tuple[np.ndarray, ...]

    @property
    def channel(self) -> int | None:
        """The number of the channel where the objective is that channel alone."""
        (term, *more) = self.objective.reported.terms
        alone = not more and isinstance(term.channel, int) and term.place is None and term.weight == 1
        return term.channel if alone and isinstance(term.channel, int) and not term.of_class else None


def no_border(side: int) -> int:
    """No cells are left out at the border."""
    return 0


def layer_with_channels(network: Network, path: str, size: tuple[int, int]) -> Layer:
    """The layer of an objective or a target, with its shape for images of `size`.

    Args:
        network: the network.
        path: of the layer, or its last part if that is unique.
        size: `(h, w)` of the images in pixels.

    Raises:
        UsageError: no such layer, or it does not take images of this size, or has no channels.

    Example:
        >>> layer_with_channels(network, "block4_conv", (64, 96)).shape
        (8, 12, 96)
    """
    path = network.layer(path).path
    found = next((layer for layer in network.layers_at(size) if layer.path == path), None)
    if found is None:
        height, width = network.inputs.size
        raise UsageError(
            f"layer {path!r} does not take images of {size[0]}x{size[1]} pixels in {network.name}; "
            f"leave {option('size')} out, or give {height if height == width else f'{height}x{width}'}.",
            code="size-not-taken",
            layer=path,
            size=size,
        )
    if not found.has_channels:
        raise UsageError(
            f"layer {path!r} has no channels; its output has the shape {found.shape}.",
            code="layer-without-channels",
            layer=path,
            shape=list(found.shape),
        )
    if min(found.shape) < 1:
        raise UsageError(
            f"images of {size[0]}x{size[1]} pixels are too small for layer {path!r}; give a larger {option('size')}.",
            code="image-too-small",
            layer=path,
            size=size,
        )
    return found


@dataclass(frozen=True)
class Binder:
    """Binds objectives to a network's layers.

    Attributes:
        network: the network with the layers and classes.
        size: `(h, w)` of the images in pixels.
        border: from the shorter side of a map to the number of cells left out on each side.
    """

    network: Network
    size: tuple[int, int]
    border: Callable[[int], int] = no_border

    def bind(self, objective: Objective) -> BoundObjective:
        """The objective on the network's layers.

        Raises:
            UsageError: no such layer, channel, place or class; a direction or given activations of the wrong shape;
                nothing but regularizers.
        """
        if not objective.reported.terms:
            raise UsageError(
                "an objective needs a term that is no regularizer, such as conv3:17.", code="only-regularizers"
            )
        bound = [self._bound(term, objective) for term in objective.terms]
        terms, specs, arguments, vectors = zip(*bound, strict=True)
        return BoundObjective(Objective(terms), ProgramKey(specs), arguments, vectors)

    def _bound(self, term: Term, objective: Objective) -> tuple[Term, TermSpec, np.ndarray, np.ndarray]:
        one = np.full(1, term.weight, np.float32)
        nothing = np.zeros((1, 1), np.float32)
        if term.own is not None:
            found = own(self.network, term.own, with_input=True)
            measure = ScoredBeside(found) if term.regularizer else Scored(found)
            path = next((path for path in found.record if path != INPUT), LOGITS if found.scores else INPUT)
            return term, TermSpec(self.layer(path), measure), nothing, one
        layer = self.layer(term.layer)
        if layer.path == INPUT and not term.measure.of_image:
            raise UsageError(
                "the image itself can only be regularized, by tv(input) and l2(input).", code="image-not-regularized"
            )
        path = term.layer if term.of_class else layer.path
        term = replace(term, layer=path, channel=self._number(term, layer))
        spec = TermSpec(layer, term.measure)
        if term.given is not None:
            return term, spec, _compared(term.given.array, self._mask(term, layer), layer), one
        vector = _vector(term, layer)
        if term.layer == LOGITS and self._stands_for_pair(objective):
            vector = vector - vector[::-1]
        return term, spec, self._mask(term, layer), vector

    def _stands_for_pair(self, objective: Objective) -> bool:
        """True if a class stands for a difference: one of two under one softmax, where the other is not named."""
        named = {self.network.class_index(term.channel or 0) for term in objective.terms if term.of_class}
        return self.network.head.paired and len(named) == 1

    def layer(self, path: str) -> Layer:
        """The layer at `path`, which may be `LOGITS`, `LOGIT` or `INPUT`."""
        network = self.network
        if path in (LOGITS, LOGIT):
            network.check_scores()
            return Layer(LOGITS, "other", "scores", (network.head.classes,), 0)
        if path == INPUT:
            return Layer(INPUT, "other", "image", (network.inputs.channels,), 0)
        return layer_with_channels(network, path, self.size)

    def _number(self, term: Term, found: Layer) -> int | None:
        if term.channel is None:
            return None
        if term.of_class:
            return self.network.class_index(term.channel)
        check_channel(int(term.channel), found.channels, found.path)
        return int(term.channel)

    def _mask(self, term: Term, found: Layer) -> np.ndarray:
        if not found.spatial:
            return np.ones((1, 1), np.float32)
        height, width = found.shape[:2]
        mask = np.zeros((height, width), np.float32)
        if term.place is None:
            edge = self.border(min(height, width)) if term.measure == LINEAR else 0
            inside = mask[edge : height - edge, edge : width - edge]
            inside[:] = 1 / inside.size
            return mask
        row, column = term.place
        if not (row < height and column < width):
            raise UsageError(
                f"place {row},{column} is outside of {found.path}, whose map is {height}x{width} here.",
                code="place-out-of-range",
                layer=found.path,
                place=[row, column],
                size=[height, width],
            )
        mask[row, column] = 1
        return mask


def _vector(term: Term, found: Layer) -> np.ndarray:
    if term.channel is not None:
        return (term.weight * (np.arange(found.channels) == term.channel)).astype(np.float32)
    if term.direction is None:  # the layer as a whole
        return np.full(found.channels, term.weight / found.channels, np.float32)
    if len(term.direction) != found.channels:
        raise UsageError(
            f"a direction in {found.path} needs {found.channels} numbers, one for each channel; "
            f"found {len(term.direction)}.",
            code="direction-misfit",
            layer=found.path,
            expected=found.channels,
            found=len(term.direction),
        )
    return (term.weight * np.asarray(term.direction)).astype(np.float32)


def _compared(given: np.ndarray, mask: np.ndarray, found: Layer) -> np.ndarray:
    """The argument of `DotCosine`: `(h, w, c + 1)`."""
    shape = (*mask.shape, found.channels)
    if given.shape not in (shape, shape[-1:]):
        raise UsageError(
            f"{found.path} has activations {shape} here; found {given.shape} to compare them with"
            f"{'; the size of the images differs' if given.ndim == 3 and given.shape[-1] == shape[-1] else ''}.",
            code="activations-misfit",
            layer=found.path,
            expected=list(shape),
            found=list(given.shape),
        )
    return np.concatenate([np.broadcast_to(given, shape), mask[..., None]], axis=-1).astype(np.float32)


def values_of(means: Sequence[np.ndarray], bounds: Sequence[BoundObjective], arguments: Sequence[Tensor]) -> np.ndarray:
    """The value of each objective from the means of `Measure.means`: `(n, k)` float32.

    Args:
        means: for each term `(n, u, c)`.
        bounds: `k` objectives of one program.
        arguments: for each term the `u` arguments that the means are of, as `distinct_arguments` gives them.
    """
    total = np.zeros((len(means[0]), len(bounds)), np.float32)
    for place, found in enumerate(means):
        if bounds[0].key.specs[place].measure.regularizer:
            continue
        at = [_index(bound.arguments[place], arguments[place]) for bound in bounds]
        for index, bound in enumerate(bounds):
            # A product with zeros would make NaN of an overflow elsewhere.
            chosen = np.flatnonzero(bound.vectors[place])
            total[:, index] += found[:, at[index], chosen] @ bound.vectors[place][chosen]
    return total


def distinct_arguments(bounds: Sequence[BoundObjective]) -> list[np.ndarray]:
    """For each term of the objectives' program their different arguments `(u, ...)`."""
    found: list[list[np.ndarray]] = [[] for _ in bounds[0].arguments]
    for bound in bounds:
        for arguments, argument in zip(found, bound.arguments, strict=True):
            if not any(np.array_equal(argument, other) for other in arguments):
                arguments.append(argument)
    return [np.stack(arguments) for arguments in found]


def _index(argument: np.ndarray, arguments: Iterable[np.ndarray]) -> int:
    return next(index for index, other in enumerate(arguments) if np.array_equal(argument, other))
