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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.errors import UsageError
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
    TotalVariation,
    is_target,
    text_of,
)

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
