"""What gradient ascent raises: immutable objectives with arithmetic, their text form, and how a layer answers them.

    channel("conv3", 17) + 0.5 * channel("conv2", 9)        # "conv3:17 + 0.5*conv2:9"
    unit("conv3", 17, row=4, column=5)                      # "conv3:17@4,5"
    logit("tabby") - logit("tiger cat")                     # "class:tabby - class:tiger cat"
    layer("conv3")                                          # "conv3:*", DeepDream's
    direction("conv3", vector)

Every objective is a weighted sum of terms, and every term weighs the cells and the channels of one layer's map. So one
compiled program serves all objectives that look at the same layers: which cells and channels is an argument.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convscope.errors import UsageError
from convscope.networks import Layer, Network, Record

Tensor = Any
LOGITS = "class"  # in the place of a layer's path: the class scores, before their softmax or sigmoid
BESIDE = ("diversity", "likeness")  # measures that are raised too, and are no part of what a picture reaches
EXPECTED = "expected LAYER:CHANNEL, LAYER:CHANNEL@ROW,COLUMN, LAYER:* or class:NAME"


@dataclass(frozen=True)
class Term:
    """A weight times what one layer answers.

    Attributes:
        layer: its path, or `LOGITS`.
        weight: of the term in the sum.
        channel: number of the channel, or a class; None for a direction, or for the layer as a whole.
        place: `(row, column)` in the map; the mean over the map where None.
        direction: a number for each channel.
        measure: "linear", "energy" (mean square of the whole layer), or one of `BESIDE`: "diversity" (how unlike each
            other the pictures of one objective are), "likeness" (to the photo that the ascent began with).
    """

    layer: str
    weight: float = 1.0
    channel: int | str | None = None
    place: tuple[int, int] | None = None
    direction: tuple[float, ...] | None = None
    measure: str = "linear"

    @property
    def text(self) -> str:
        """The term without its weight, as `parse` reads it (a direction has no such text)."""
        if self.measure in BESIDE:
            return f"{self.measure}({self.layer})"
        if self.direction is not None:
            return f"{self.layer}:<direction>"
        place = "" if self.place is None else f"@{self.place[0]},{self.place[1]}"
        return f"{self.layer}:{'*' if self.channel is None else self.channel}{place}"


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms. Arithmetic gives new objectives and changes no operand."""

    terms: tuple[Term, ...]

    def __add__(self, other: Objective) -> Objective:
        return Objective(self.terms + other.terms)

    def __mul__(self, factor: float) -> Objective:
        return Objective(tuple(replace(term, weight=float(factor) * term.weight) for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __sub__(self, other: Objective) -> Objective:
        return self + -other

    def __str__(self) -> str:
        text = ""
        for term in self.terms:
            sign = "-" if term.weight < 0 else "+"
            size = "" if abs(term.weight) == 1 else f"{abs(term.weight):g}*"
            text += (f" {sign} " if text else sign.strip("+")) + size + term.text
        return text


def channel(layer: str, number: int) -> Objective:
    """The mean of one channel of a layer (the unit of a dense one)."""
    return Objective((Term(layer, channel=int(number)),))


def unit(layer: str, number: int, row: int, column: int) -> Objective:
    """One channel at one place of the map."""
    return Objective((Term(layer, channel=int(number), place=(int(row), int(column))),))


def logit(target: int | str) -> Objective:
    """The score of a class, by number or name, before the softmax or sigmoid."""
    return Objective((Term(LOGITS, channel=target),))


def layer(path: str) -> Objective:
    """The mean square of all that a layer answers, which DeepDream raises on a photo."""
    return Objective((Term(path, measure="energy"),))


def direction(path: str, vector: Sequence[float]) -> Objective:
    """The mean over the map of the scalar product of a layer's channels with `vector` `(c,)`."""
    return Objective((Term(path, direction=tuple(map(float, vector))),))


def diversity(path: str) -> Objective:
    """How unlike each other the pictures of one objective are: minus the mean cosine of the layer's Gram matrices
    (Olah et al. 2017, Feature Visualization). Means something where there are several pictures of each (`variants`).
    """
    return Objective((Term(path, measure="diversity"),))


def likeness(path: str) -> Objective:
    """Minus the squared distance of a layer's map from the photo's, as a share of the photo's square: what keeps a
    picture near the photo it began with (Hamblin et al. 2024, Feature Accentuation, 2402.10039).
    """
    return Objective((Term(path, measure="likeness"),))


# -- text ------------------------------------------------------------------------------------------------

_SIGN = re.compile(r"\s*([+-])\s*")
_FACTOR = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*\*\s*")
_CLASS = re.compile(r'class:(?:"(?P<quoted>[^"]+)"|(?P<name>[^\s"].*?)(?=\s+[+-]\s|\s*$))')
_PLACE = re.compile(r"(?P<layer>[^\s:]+):(?:(?P<all>\*)|(?P<channel>\d+)(?:@(?P<row>\d+),(?P<column>\d+))?)(?=\s|$)")


def parse(text: str) -> Objective:
    """An objective from its text: "conv3:17", "a:3 + 0.5*b:9", "class:tabby - class:lynx", "conv3:17@4,5", "conv3:*".

    Raises:
        UsageError: with a caret where the text stops being understood.
    """
    position, terms = 0, list[Term]()
    while not terms or text[position:].strip():
        sign = _SIGN.match(text, position)
        if terms and sign is None:
            raise _not_understood(text, position, 'expected "+" or "-" with spaces around it, or the end')
        position = sign.end() if sign else _past_spaces(text, position)
        factor = _FACTOR.match(text, position)
        position = factor.end() if factor else position
        found = _CLASS.match(text, position) or _PLACE.match(text, position)
        if found is None:
            raise _not_understood(text, position, EXPECTED)
        weight = (float(factor[1]) if factor else 1.0) * (-1 if sign and sign[1] == "-" else 1)
        terms.append(replace(_term(found), weight=weight))
        position = found.end()
    return Objective(tuple(terms))


def _term(found: re.Match) -> Term:
    parts = found.groupdict()
    if "layer" not in parts:
        return Term(LOGITS, channel=parts["quoted"] or parts["name"])
    if parts["all"]:
        return Term(parts["layer"], measure="energy")
    place = None if parts["row"] is None else (int(parts["row"]), int(parts["column"]))
    return Term(parts["layer"], channel=int(parts["channel"]), place=place)


def _past_spaces(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip()) if text[position:].strip() else position


def _not_understood(text: str, position: int, expected: str) -> UsageError:
    position = _past_spaces(text, position)
    shown = "".join(" " if character.isspace() else character for character in text)
    return UsageError(f"the objective is not understood:\n  {shown}\n  {' ' * position}^ {expected}.")


# -- objectives on a network -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """What a program has to know of one term: its layer and how it is measured; the rest are arguments."""

    layer: Layer
    measure: str

    def reduce(self, activation: Tensor, masks: Tensor, ops: Any) -> Tensor:
        """The mean of each channel `(n, c)` over what `masks` `(n, h, w)` weighs; of its square for energy."""
        activation = ops.square(activation) if self.measure == "energy" else activation
        return activation if len(activation.shape) == 2 else ops.einsum("nhwc,nhw->nc", activation, masks)

    def means(self, activation: Tensor, masks: Tensor, ops: Any) -> Tensor:
        """The same for each of `masks` `(u, h, w)`: `(n, u, c)`."""
        activation = ops.square(activation) if self.measure == "energy" else activation
        if len(activation.shape) == 2:
            return ops.reshape(activation, (-1, 1, activation.shape[-1]))
        return ops.einsum("nhwc,uhw->nuc", activation, masks)


@dataclass(frozen=True)
class Form:
    """What objectives that share a compiled program have in common.

    Attributes:
        slots: one for each term.
        linear: paths whose own non-linearity is left out, for filters that their ReLU keeps silent.
    """

    slots: tuple[Slot, ...]
    linear: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the layers to record."""
        return tuple(dict.fromkeys(slot.layer.path for slot in self.slots if slot.layer.path != LOGITS))

    @property
    def scores(self) -> bool:
        """True if class scores are asked for, and so the whole network has to run."""
        return any(slot.layer.path == LOGITS for slot in self.slots)

    def maps(self, seen: Record) -> list[Tensor]:
        """What each slot looks at."""
        return [seen.logits if s.layer.path == LOGITS else seen.activations[s.layer.path] for s in self.slots]


@dataclass(frozen=True, eq=False)
class Bound:
    """An objective on a network, at one size of its pictures.

    Attributes:
        objective: with the full paths of layers.
        form: what is compiled.
        masks: for each slot the weight of each cell `(h, w)`, which sum to 1; `(1, 1)` of a dense layer.
        vectors: for each slot the weight of each channel `(c,)`, the term's weight in it.
    """

    objective: Objective
    form: Form
    masks: tuple[np.ndarray, ...]
    vectors: tuple[np.ndarray, ...]

    @property
    def channel(self) -> int | None:
        """The number of the channel where the objective is that channel alone."""
        (term, *more) = [term for term in self.objective.terms if term.measure not in BESIDE]
        alone = not more and isinstance(term.channel, int) and term.place is None and term.weight == 1
        return term.channel if alone and isinstance(term.channel, int) and term.layer != LOGITS else None


def bind(network: Network, objective: Objective, layers: Mapping[str, Layer], border: Any) -> Bound:
    """The objective on the network's layers.

    Args:
        network: whose layers and classes.
        objective: what is raised.
        layers: by path, with their shapes at the size of the pictures.
        border: from the shorter side of a map to the number of cells left out on each side.

    Raises:
        UsageError: no such layer, channel, place or class; a direction of the wrong length.
    """
    terms, slots, masks, vectors = [], [], [], []
    for term in objective.terms:
        found = _layer_of(network, term, layers)
        term = replace(term, layer=found.path, channel=_number(network, term, found))
        terms.append(term)
        slots.append(Slot(found, term.measure))
        masks.append(_mask(term, found, border))
        vectors.append(_vector(term, found))
    return Bound(Objective(tuple(terms)), Form(tuple(slots)), tuple(masks), tuple(vectors))


def _layer_of(network: Network, term: Term, layers: Mapping[str, Layer]) -> Layer:
    if term.layer == LOGITS:
        network.check_scores()
        return Layer(LOGITS, "other", "scores", (network.head.classes,), 0)
    path = network.layer(term.layer).path
    if path not in layers:
        height, width = network.inputs.size
        raise UsageError(
            f"layer {path!r} does not take pictures of this size in {network.name}; "
            f"leave --size out, or give {height if height == width else f'{height}x{width}'}."
        )
    found = layers[path]
    if len(found.shape) not in (1, 3):
        raise UsageError(f"layer {path!r} has no channels to raise; its output has the shape {found.shape}.")
    if min(found.shape) < 1:
        raise UsageError(f"pictures of this size are too small for layer {path!r}; give a larger --size.")
    return found


def _number(network: Network, term: Term, found: Layer) -> int | None:
    if term.channel is None:
        return None
    if term.layer == LOGITS:
        return network.class_index(term.channel)
    if not 0 <= int(term.channel) < found.channels:
        raise UsageError(
            f"channel {term.channel} is out of range: {found.path} has {found.channels} channels, "
            f"numbered from 0 to {found.channels - 1}."
        )
    return int(term.channel)


def _mask(term: Term, found: Layer, border: Any) -> np.ndarray:
    if not found.spatial:
        return np.ones((1, 1), np.float32)
    height, width = found.shape[:2]
    mask = np.zeros((height, width), np.float32)
    if term.place is None:
        edge = border(min(height, width)) if term.measure == "linear" else 0
        inside = mask[edge : height - edge, edge : width - edge]
        inside[:] = 1 / inside.size
        return mask
    row, column = term.place
    if not (row < height and column < width):
        raise UsageError(f"place {row},{column} is outside of {found.path}, whose map is {height}x{width} here.")
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
            f"found {len(term.direction)}."
        )
    return (term.weight * np.asarray(term.direction)).astype(np.float32)


def values_of(means: Sequence[np.ndarray], bounds: Sequence[Bound], masks: Sequence[Any]) -> np.ndarray:
    """What each objective makes of the means that `Slot.means` found: `(n, k)` float32.

    Args:
        means: for each slot `(n, u, c)`.
        bounds: `k` objectives of one form.
        masks: for each slot the `u` masks that the means are over, as `distinct_masks` gives them.
    """
    total = np.zeros((len(means[0]), len(bounds)), np.float32)
    for slot, found in enumerate(means):
        if bounds[0].form.slots[slot].measure in BESIDE:
            continue
        at = [_index(bound.masks[slot], masks[slot]) for bound in bounds]
        for index, bound in enumerate(bounds):
            chosen = np.flatnonzero(bound.vectors[slot])  # a product with zeros would make NaN of an overflow elsewhere
            total[:, index] += found[:, at[index], chosen] @ bound.vectors[slot][chosen]
    return total


def distinct_masks(bounds: Sequence[Bound]) -> list[np.ndarray]:
    """For each slot of the objectives' form their different masks `(u, h, w)`."""
    found: list[list[np.ndarray]] = [[] for _ in bounds[0].masks]
    for bound in bounds:
        for masks, mask in zip(found, bound.masks, strict=True):
            if not any(np.array_equal(mask, other) for other in masks):
                masks.append(mask)
    return [np.stack(masks) for masks in found]


def _index(mask: np.ndarray, masks: Iterable[np.ndarray]) -> int:
    return next(index for index, other in enumerate(masks) if np.array_equal(mask, other))
