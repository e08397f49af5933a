"""The one language for a number of each image: filters raise it, heatmaps explain it.

    channel("conv3", 17) + 0.5 * channel("conv2", 9)        # "conv3:17 + 0.5*conv2:9"
    unit("conv3", 17, row=4, column=5)                      # "conv3:17@4,5"
    class_score("tabby") - class_score("tiger cat")         # "class:tabby - class:tiger cat", or "tabby - tiger cat"
    logit("cat")                                            # "logit:cat", also where two classes share one softmax
    layer("conv3")                                          # "conv3:*", DeepDream's
    direction("conv3", [0.5, -1.0])                         # "conv3:[0.5,-1]"
    dot_cosine("conv3", activations)                        # a caricature
    channel("conv3", 17) - 0.1 * total_variation()          # "conv3:17 - 0.1*tv(input)", with a regularizer

Every objective is a weighted sum of terms. A term has a measure of its layer (`measures.py`) and a weight. So
one compiled program serves all objectives with the same measures of the same layers: cells and channels are arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.errors import UsageError, option
from convscope.measures import (
    INPUT,
    L2,
    LOGIT,
    LOGITS,
    NAMED,
    Diversity,
    DotCosine,
    Energy,
    Likeness,
    Linear,
    Measure,
    OwnTarget,
    Scored,
    ScoredBeside,
    TotalVariation,
    is_target,
    own,
    text_of,
)
from convscope.networks import Layer, Network
from convscope.networks.foreign import Tensor
from convscope.networks.layers import check_channel

EXPECTED = (
    "expected LAYER:CHANNEL, LAYER:CHANNEL@ROW,COLUMN, LAYER:*, LAYER:[NUMBERS], a class (NAME, NUMBER, class:NAME or "
    f"logit:NAME) or a regularizer, {', '.join(f'{name}(LAYER)' for name in NAMED)}"
)
LINEAR, ENERGY = Linear(), Energy()


@dataclass(frozen=True)
class Term:
    """A weight times a measure of one layer's activations.

    Attributes:
        layer: its path, `LOGITS` for the score of a class, `LOGIT` for its logit alone, or `INPUT` for the image (of
            regularizers); empty of a user's own object.
        weight: weight of the term in the sum.
        channel: number of the channel, or a class; None for a direction, or for the layer as a whole.
        place: `(row, column)` in the map; the mean over the map where None.
        direction: a number for each channel.
        measure: the measure of the layer: see `measures.py`.
        given: activations `(h, w, c)` or `(c,)` to compare the layer's with (`DotCosine`).
        own: a user's own object: see `measures.Target`.

    Example:
        >>> Term("block4_conv", weight=0.5, channel=7).text
        'block4_conv:7'
    """

    layer: str
    weight: float = 1.0
    channel: int | str | None = None
    place: tuple[int, int] | None = None
    direction: tuple[float, ...] | None = None
    measure: Measure = LINEAR
    given: Given | None = None
    own: OwnTarget = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UsageError(
                f"expected a finite number as the weight of a term, found {self.weight}.",
                code="weight-not-finite",
                found=self.weight,
            )

    @property
    def of_class(self) -> bool:
        """True for the score or the logit of a class."""
        return self.layer in (LOGITS, LOGIT) and self.channel is not None and self.own is None

    @property
    def regularizer(self) -> bool:
        """True if it is raised relative to the other terms, and is no part of the value that is reported."""
        return self.measure.regularizer if self.own is None else bool(getattr(self.own, "regularizer", False))

    @property
    def anywhere(self) -> bool:
        """True if it means the same at each size of the images: no place, no given map, no user's own object."""
        return self.place is None and self.own is None and (self.given is None or self.given.array.ndim == 1)

    @property
    def text(self) -> str:
        """The term without its weight, as `parse` reads it; given activations and own objects have no such text."""
        return f"{self.layer}:[{','.join(map(number_text, self.direction))}]" if self.direction else self.label

    @property
    def label(self) -> str:
        """The same for people: without the numbers of a direction."""
        if self.own is not None:
            return text_of(self.own)
        if self.measure.name:
            return f"{self.measure.name}({self.layer})"
        if self.of_class:
            return f"{self.layer}:{_class_text(str(self.channel))}"
        if self.direction is not None:
            return f"{self.layer}:<direction>"
        place = "" if self.place is None else f"@{self.place[0]},{self.place[1]}"
        return f"{self.layer}:{'*' if self.channel is None else self.channel}{place}"


@dataclass(frozen=True, eq=False)
class Given:
    """Activations that are compared with; equal where they are the same array's values.

    Attributes:
        array: `(h, w, c)` or `(c,)` float32.

    Example:
        >>> Given(np.zeros(3, np.float32)) == Given(np.zeros(3, np.float32))
        True
    """

    array: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash((self.array.shape, self.array.tobytes()))


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms. Arithmetic gives new objectives and changes no operand.

    >>> str(channel("conv3", 17) - 0.5 * class_score("tabby"))
    'conv3:17 - 0.5*class:tabby'
    """

    terms: tuple[Term, ...]

    def __add__(self, other: Objective | object) -> Objective:
        return Objective(self.terms + as_objective(other).terms)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Objective:
        return Objective(tuple(replace(term, weight=float(factor) * term.weight) for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __sub__(self, other: Objective | object) -> Objective:
        return self + -as_objective(other)

    def __str__(self) -> str:
        return _sum_text((term.weight, term.text) for term in self.terms)

    @property
    def reported(self) -> Objective:
        """The objective without its regularizers."""
        return Objective(tuple(term for term in self.terms if not term.regularizer))

    @property
    def label(self) -> str:
        """The text of the reported value, for people: without the numbers of directions."""
        return _sum_text((term.weight, term.label) for term in self.reported.terms)


def as_objective(given: object) -> Objective:
    """An objective from an objective, its text, or a user's own object with a `score`.

    Raises:
        UsageError: it is none of them.

    Example:
        >>> as_objective("block4_conv:7 - cat") == channel("block4_conv", 7) - class_score("cat")
        True
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        return parse(given)
    if is_target(given):
        return Objective((Term("", own=given),))
    raise UsageError(
        f"expected an objective, its text, or an object with a score method; found {type(given).__name__}.",
        code="objective-invalid",
        found=type(given).__name__,
    )


def channel(layer: str, number: int) -> Objective:
    """The mean of one channel of a layer (the unit of a dense one).

    Example:
        >>> str(channel("block4_conv", 7))
        'block4_conv:7'
        >>> convscope.filters(network, objectives=channel("block4_conv", 7), steps=2, size=32).values.shape
        (1, 32, 32, 3)
    """
    return Objective((Term(layer, channel=int(number)),))


def unit(layer: str, number: int, row: int, column: int) -> Objective:
    """One channel at one place of the map.

    Example:
        >>> str(unit("block4_conv", 7, row=4, column=5))
        'block4_conv:7@4,5'
    """
    return Objective((Term(layer, channel=int(number), place=(int(row), int(column))),))


def class_score(target: int | str) -> Objective:
    """The score of a class, by number or name, before the softmax or sigmoid.

    Where two classes share one softmax, it is the difference of their logits: only that decides. An objective that
    names both classes is taken as it is written.

    Example:
        >>> str(class_score("cat") - class_score(3))
        'class:cat - class:3'
    """
    return Objective((Term(LOGITS, channel=str(target)),))


def logit(target: int | str) -> Objective:
    """The logit of a class, by number or name: as `class_score`, but also where two classes share one softmax.

    Example:
        >>> str(logit("cat") - 0.5 * logit(3))
        'logit:cat - 0.5*logit:3'
    """
    return Objective((Term(LOGIT, channel=str(target)),))


def layer(path: str) -> Objective:
    """The mean square of all activations of a layer, which DeepDream raises on an image.

    Example:
        >>> str(layer("block4_conv"))
        'block4_conv:*'
    """
    return Objective((Term(path, measure=ENERGY),))


def direction(path: str, vector: Sequence[float]) -> Objective:
    """The mean over the map of the scalar product of a layer's channels with `vector` `(c,)`.

    Example:
        >>> str(direction("average", [0.5, -1]))
        'average:[0.5,-1]'
    """
    numbers = tuple(map(float, vector))
    if not numbers or not np.isfinite(numbers).all():
        raise UsageError(
            f"expected a direction of finite numbers in {path}, found {len(numbers)} numbers.",
            code="direction-invalid",
            layer=path,
            found=len(numbers),
        )
    return Objective((Term(path, direction=numbers),))


def dot_cosine(
    path: str, activations: np.ndarray, power: float = 2.0, place: tuple[int, int] | None = None
) -> Objective:
    """The dot product of a layer's activations with given ones, times a power of their cosine: see `DotCosine`.

    Lucid's caricatures raise it with the activations of an image, its activation atlas with a mean of many.

    Args:
        path: path of the layer.
        activations: `(h, w, c)`, or `(c,)` for the same at each place.
        power: exponent of the cosine; 0 for the dot product alone.
        place: `(row, column)` where they are compared; over the whole map where None.

    Example:
        >>> image = convscope.images.decode.read_image(PHOTOS[0])
        >>> _, answers = network.forward(network.prepare([image]), ["block4_conv"])
        >>> dot_cosine("block4_conv", answers["block4_conv"][0]).terms[0].given.array.shape
        (28, 28, 96)
    """
    return Objective((Term(path, place=place, measure=DotCosine(float(power)), given=Given(_frozen(activations))),))


def diversity(path: str) -> Objective:
    """A regularizer: the diversity of the images of one objective, minus the mean cosine of the layer's Gram matrices
    (Olah et al. 2017, Feature Visualization). It has a meaning where there are several images of each objective
    (`variants`).

    Example:
        >>> str(channel("block4_conv", 7) + diversity("block4_conv"))
        'block4_conv:7 + diversity(block4_conv)'
    """
    return Objective((Term(path, measure=Diversity()),))


def likeness(path: str) -> Objective:
    """A regularizer: minus the squared distance of a layer's map from that of the image that the ascent began with, as
    a share of the latter's square (Hamblin et al. 2024, Feature Accentuation, 2402.10039).

    Example:
        >>> str(layer("block4_conv") + 0.5 * likeness("block2_conv"))
        'block4_conv:* + 0.5*likeness(block2_conv)'
    """
    return Objective((Term(path, measure=Likeness()),))


def total_variation(path: str = INPUT) -> Objective:
    """A regularizer, to be subtracted: the mean absolute difference of neighbours in the image, or in a layer's map.

    Example:
        >>> smooth = channel("block4_conv", 7) - 0.1 * total_variation()
        >>> str(smooth), str(smooth.reported)
        ('block4_conv:7 - 0.1*tv(input)', 'block4_conv:7')
    """
    return Objective((Term(path, measure=TotalVariation()),))


def l2(path: str = INPUT) -> Objective:
    """A regularizer, to be subtracted: the mean square of the image around mid-grey, or of a layer's map.

    Example:
        >>> str(channel("block4_conv", 7) - 0.1 * l2())
        'block4_conv:7 - 0.1*l2(input)'
    """
    return Objective((Term(path, measure=L2()),))


def _frozen(activations: np.ndarray) -> np.ndarray:
    array = np.array(activations, np.float32)
    if array.ndim not in (1, 3) or not np.isfinite(array).all():
        raise UsageError(
            f"expected finite activations (h, w, c) or (c,), found the shape {array.shape}.",
            code="activations-invalid",
            shape=list(array.shape),
        )
    array.flags.writeable = False
    return array


# -- text ------------------------------------------------------------------------------------------------

_SIGN = re.compile(r"\s*([+-])\s*")
_FACTOR = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*")
_NAME = r"[^\s\":*()@][^\s\":*]*(?:\s+(?![+-](?:\s|$))[^\s\":*]+)*"
_CLASS = re.compile(r'(?P<score>class|logit):(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<name>[^\s"].*?)(?=\s+[+-]\s|\s*$))')
_BARE = re.compile(rf"(?P<name>{_NAME})(?=\s+[+-](?:\s|$)|\s*$)")
_NAMED = re.compile(rf"(?P<measure>{'|'.join(NAMED)})\((?P<layer>[^\s()]+)\)(?=\s|$)")
_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_PLACE = re.compile(
    r"(?P<layer>[^\s:]+):(?:(?P<all>\*)|(?P<channel>\d+)(?:@(?P<row>\d+),(?P<column>\d+))?"
    rf"|\[(?P<direction>{_NUMBER}(?:,{_NUMBER})*)\])(?=\s|$)"
)


def parse(text: str) -> Objective:
    """An objective from its text.

    Terms are "conv3:17", "conv3:17@4,5", "conv3:*", "conv3:[0.5,-1]", classes ("tabby", "281", "class:tabby",
    'class:"a + b"', "logit:tabby") and regularizers ("tv(input)"), with factors and signs: "a:3 + 0.5*b:9 - tabby".
    Signs have spaces around them, since names may contain them. `parse(str(objective)) == objective`.

    Raises:
        UsageError: the text is not valid; a caret marks the first invalid place.

    Example:
        >>> parse("block4_conv:7 + 0.5*cat").terms[1].weight
        0.5
        >>> parse("block4_conv:7 +")
        Traceback (most recent call last):
        convscope.errors.UsageError: ...
    """
    position, terms = 0, list[Term]()
    while not terms or text[position:].strip():
        sign = _SIGN.match(text, position)
        if terms and sign is None:
            raise _not_understood(text, position, 'expected "+" or "-" with spaces around it, or the end')
        position = sign.end() if sign else _past_spaces(text, position)
        factor = _FACTOR.match(text, position)
        position = factor.end() if factor else position
        found = next((found for one in (_CLASS, _NAMED, _PLACE, _BARE) if (found := one.match(text, position))), None)
        if found is None:
            raise _not_understood(text, position, EXPECTED)
        weight = (float(factor[1]) if factor else 1.0) * (-1 if sign and sign[1] == "-" else 1)
        terms.append(replace(_term(found), weight=weight))
        position = found.end()
    return Objective(tuple(terms))


def _term(found: re.Match[str]) -> Term:
    parts = found.groupdict()
    if "layer" not in parts:
        name = json.loads(parts["quoted"]) if parts.get("quoted") else parts["name"]
        return Term(parts.get("score") or LOGITS, channel=name)
    if parts.get("measure"):
        return Term(parts["layer"], measure=NAMED[parts["measure"]])
    if parts["all"]:
        return Term(parts["layer"], measure=ENERGY)
    if parts["direction"]:
        return Term(parts["layer"], direction=tuple(map(float, parts["direction"].split(","))))
    place = None if parts["row"] is None else (int(parts["row"]), int(parts["column"]))
    return Term(parts["layer"], channel=int(parts["channel"]), place=place)


def number_text(value: float) -> str:
    """The shortest text of a number that reads as the same number: "0.1", "2"."""
    return repr(float(value)).removesuffix(".0")


def _sum_text(terms: Iterable[tuple[float, str]]) -> str:
    text = ""
    for weight, of in terms:
        sign = "-" if math.copysign(1, weight) < 0 else "+"
        factor = "" if abs(weight) == 1 else f"{number_text(abs(weight))}*"
        text += (f" {sign} " if text else sign.strip("+")) + factor + of
    return text


def _class_text(name: str) -> str:
    """The name of a class, in quotes where it could be taken for something else."""
    plain = name and not re.search(r'["\\]|[^\S ]', name) and not {"", "+", "-"} & set(name.split(" "))
    return name if plain else json.dumps(name)


def _past_spaces(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip()) if text[position:].strip() else position


def _not_understood(text: str, position: int, expected: str) -> UsageError:
    position = _past_spaces(text, position)
    shown = "".join(" " if character.isspace() else character for character in text)
    return UsageError(
        f"the objective is not understood:\n  {shown}\n  {' ' * position}^ {expected}.",
        code="objective-not-understood",
        text=text,
        position=position,
        expected=expected,
    )


# -- objectives on a network -----------------------------------------------------------------------------


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
    """The layer of an objective, with its shape for images of `size`.

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
    if len(found.shape) not in (1, 3):
        raise UsageError(
            f"layer {path!r} has no channels to raise; its output has the shape {found.shape}.",
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
            return term, spec, _compared(term, term.given.array, self._mask(term, layer), layer), one
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


def _compared(term: Term, given: np.ndarray, mask: np.ndarray, found: Layer) -> np.ndarray:
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
            chosen = np.flatnonzero(
                bound.vectors[place]
            )  # a product with zeros would make NaN of an overflow elsewhere
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
