"""The target of a heatmap: a number for each image, from the class scores or the activations of any layer.

A target is frozen, and names the layers that it reads. The values that differ from image to image (the class, a mask,
another image's activations) are arguments with a row for each, so that one compiled program serves all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convscope.binding import Binder, ProgramKey, layer_with_channels
from convscope.errors import UsageError, option
from convscope.images.decode import Source, read_images
from convscope.images.image import InputImage
from convscope.measures import (
    LOGIT,
    LOGITS,
    Activations,
    Arguments,
    Own,
    Scored,
    Target,
    Tensor,
    described_own,
    is_target,
    own,
)
from convscope.networks import Layer, Network, Record
from convscope.networks.head import Head
from convscope.networks.layers import check_channel
from convscope.networks.ops import Operations
from convscope.objectives import Objective, class_score, parse
from convscope.results import array_sha256
from convscope.schema import Json

TOP = -1  # stands for the class with the highest score of each image
RIVAL, NONE = -1, -2  # stand for the highest of the other classes, and for no class to set against
ALONE = object()  # in the place of a class to set against: the logit alone, also of two classes under one softmax
PLACE = re.compile(r"(?P<layer>[^\s*]+):(?P<channel>\d+)(?:@(?P<row>\d+),(?P<column>\d+))?")


@dataclass(frozen=True)
class ClassScore:
    """A weighted sum of class scores: one class, one against another, one against those like it.

    Arguments: classes `(n,)` and rivals `(n,)` int32, which may be `TOP`, `RIVAL` or `NONE`; resolved, the weights
    `(n, classes)`.
    """

    record: tuple[str, ...] = ()
    scores: bool = True
    text: str = "class"

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        classes, rivals = arguments
        count = logits.shape[-1]
        best = ops.cast(ops.argmax(logits, axis=-1), "int32")
        mine = ops.one_hot(ops.where(ops.less(classes, 0), best, classes), count, dtype="float32")
        other = ops.cast(ops.argmax(logits - 1e30 * mine, axis=-1), "int32")
        rival = ops.where(ops.equal(rivals, RIVAL), other, rivals)
        theirs = ops.one_hot(ops.maximum(rival, 0), count, dtype="float32")
        theirs = theirs * ops.reshape(1 - ops.cast(ops.less(rival, 0), "float32"), (-1, 1))
        return (mine - theirs,)

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        return ops.sum(logits * arguments[0], axis=-1)


def chosen(weights: np.ndarray) -> tuple[int, int | None]:
    """The class and the rival of one image's resolved weights `(classes,)`."""
    return int(weights.argmax()), int(weights.argmin()) if weights.min() < 0 else None


@dataclass(frozen=True)
class Channel:
    """The mean of one channel of a layer over some places.

    Attributes:
        layer, channel: the layer and the channel.
        text: in words.
        mask: `(h, w)`, over the places of a mask, whose sum is 1; None for all.

    Arguments: masks `(n, h, w)`.

    Example:
        >>> Channel("block4_conv", 7, "block4_conv:7").record
        ('block4_conv',)
    """

    layer: str
    channel: int
    text: str
    mask: np.ndarray | None = field(default=None, compare=False)
    scores: bool = False

    @property
    def record(self) -> tuple[str, ...]:
        """See `Target.record`."""
        return (self.layer,)

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        return arguments

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        return ops.sum(self._maps(ops, activations)[..., self.channel] * arguments[0], axis=(1, 2))

    def _maps(self, ops: Operations, activations: Activations) -> Tensor:
        activation = activations[self.layer]
        if len(activation.shape) == 2:
            return ops.reshape(activation, (-1, 1, 1, activation.shape[-1]))
        return activation


@dataclass(frozen=True)
class MapClass:
    """A class of a network whose output is a map: its mean score over the places where it is the highest.

    Attributes:
        layer: with a channel for each class.
        head: makes the classes' scores of the channels.
        number: of the class.
        rival: of the class whose score is subtracted; None for none.
        text: in words.
        against: the name of `rival`.

    Arguments: weights of the places `(n, h, w)`, whose sum is 1.
    """

    layer: str
    head: Head
    number: int
    rival: int | None
    text: str
    against: str | None = None
    scores: bool = False

    @property
    def record(self) -> tuple[str, ...]:
        """See `Target.record`."""
        return (self.layer,)

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        maps = self.head.logits(ops, activations[self.layer])
        if self.head.classes == 1:  # a value, such as the logit of a foreground
            own = ops.cast(ops.less(0.0, maps[..., 0]), "float32")
        else:
            best = ops.cast(ops.argmax(maps, axis=-1), "float32")
            own = ops.cast(ops.less(ops.square(best - self.number), 0.5), "float32")
        return (own / ops.maximum(ops.sum(own, axis=(1, 2), keepdims=True), 1.0),)

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        maps = self.head.logits(ops, activations[self.layer])
        values = maps[..., self.number]
        if self.rival is not None:
            values = values - maps[..., self.rival]
        return ops.sum(values * arguments[0], axis=(1, 2))


@dataclass(frozen=True)
class Similarity:
    """The cosine between a layer's activations (the mean over its places) and those on another image.

    Attributes:
        layer, text: the layer, and a description.
        other: the other image's activations `(c,)`, of length 1.
        image: the other image, for provenance.

    Arguments: these activations `(n, c)`.

    Example:
        >>> Similarity("average", "like another", np.ones(96, np.float32)).record
        ('average',)
    """

    layer: str
    text: str
    other: np.ndarray = field(compare=False)
    scores: bool = False
    image: InputImage | None = field(default=None, compare=False)

    @property
    def record(self) -> tuple[str, ...]:
        """See `Target.record`."""
        return (self.layer,)

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        return arguments

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        answer = activations[self.layer]
        answer = ops.mean(answer, axis=(1, 2)) if len(answer.shape) == 4 else answer
        size = ops.rsqrt(ops.maximum(ops.sum(ops.square(answer), axis=-1), 1e-12))
        return ops.sum(answer * arguments[0], axis=-1) * size


@dataclass(frozen=True)
class Combined:
    """Any objective that is neither one class nor one channel: a weighted sum of activations and class scores.

    Attributes:
        key: key of the compiled program.
        text: in words.
        objective: for provenance.

    Arguments: for each term the argument `(n, ...)` of its measure and the vectors `(n, c)` that weight its values.
    """

    key: ProgramKey
    text: str = field(compare=False)
    objective: Objective = field(compare=False)

    @property
    def record(self) -> tuple[str, ...]:
        """See `Target.record`."""
        return self.key.paths

    @property
    def scores(self) -> bool:
        """See `Target.scores`."""
        return self.key.scores

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        return arguments

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        record = Record(logits, activations)
        pairs = zip(arguments[::2], arguments[1::2], strict=True)
        values = [
            ops.sum(spec.measure.reduce(ops, record, spec.layer, given) * vectors, axis=-1)
            for spec, (given, vectors) in zip(self.key.specs, pairs, strict=True)
        ]
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


def described(target: Target) -> dict[str, Json]:
    """What identifies a target, for provenance: plain JSON values.

    Code of the user's own is named, with the SHA-256 of its text where Python knows that.
    """
    if isinstance(target, Channel):
        mask = None if target.mask is None else array_sha256(np.asarray(target.mask, np.float32))
        return {
            **{"kind": "channel", "layer": target.layer, "channel": target.channel, "mask_sha256": mask},
        }
    if isinstance(target, MapClass):
        return {"kind": "class of a map", "layer": target.layer, "class": target.number, "rival": target.rival}
    if isinstance(target, Similarity):
        return {"kind": "likeness", "layer": target.layer, "other_sha256": array_sha256(target.other)}
    if isinstance(target, Combined):
        arrays = [array_sha256(term.given.array) for term in target.objective.terms if term.given is not None]
        measures = [spec.measure for spec in target.key.specs]
        own = [described_own(one.own) for one in measures if isinstance(one, Scored)]
        return {"kind": "objective", "objective": str(target.objective), "given_sha256": arrays, "own": own}
    if isinstance(target, Own):
        return described_own(target)
    return {"kind": "class"}


# -- from the user's arguments ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Goal:
    """A target with its arguments for each image of one call.

    Attributes:
        target: the target.
        arguments: arrays whose rows belong to the images.
        image_indices: for each row the number of its image: several rows may explain one image.
        against: how the class whose score is subtracted was chosen, one of `AGAINST_CHOICES` of `HeatmapParameters`.
    """

    target: Target
    arguments: tuple[np.ndarray, ...]
    image_indices: np.ndarray
    against: str = "none"


Given = Any  # a class by name or number, a channel, an objective or its text, or an object of the user's own


def as_targets(target: Given) -> list[int | str]:
    """One class or several as a list; NumPy's integers count as numbers, and other values as their text.

    Example:
        >>> as_targets("cat"), as_targets(["cat", 3])
        (['cat'], ['cat', 3])
    """
    if isinstance(target, Objective):
        return [str(target)]
    if is_target(target):
        return [str(getattr(target, "text", type(target).__name__))]
    several = [target] if isinstance(target, str | int | np.integer) else target
    try:
        return [one if isinstance(one, str) else int(one) for one in several]
    except (TypeError, ValueError):
        raise UsageError(
            f"a target is a class by number or name, one for each image, the text of a channel, what channel_target, "
            f"similarity_target and Custom make, or an object with a score method; found {type(target).__name__}.",
            code="target-invalid",
            found=type(target).__name__,
        ) from None


def goal_of(network: Network, target: object, against: object, count: int, ranked: Callable[[], np.ndarray]) -> Goal:
    """The target to explain for each of `count` images.

    Args:
        network: the network with the classes and layers.
        target: a class by number or name, "top", "top3" for the three best, one for each image, the text of a channel
            or a unit ("conv3:17", "conv3:17@4,5"), any other objective or its text ("a:3 - 0.5*tabby"), or a `Target`,
            also one of the user's own.
        against: a class to set against it, "rival", one for each image, or None: of two classes under one softmax it is
            then the other one.
        count: number of images.
        ranked: returns each image's classes, best first `(count, classes)`: for "top3".

    Raises:
        UsageError: no such class, channel or place; as many classes as neither 1 nor `count`; `against` something that
            is no class.
    """
    everyone = np.arange(count)
    target, against = _plain(network, target, against)
    if isinstance(target, Objective):
        return _combined(network, target, count)
    target = int(target) if isinstance(target, np.integer) else target
    if network.head.spatial and isinstance(target, str | int) and _may_name_a_class(target):
        return _goal_of_maps(network, target, against, count)
    found: Target | None = target if isinstance(target, Channel | Similarity) else _channel(network, target)
    if found is None and is_target(target):
        found = own(network, target)
    if found is not None:
        if against is not None:
            raise UsageError(
                f"against works for classes only; {found.text!r} is not a class.",
                code="not-a-class",
                target=found.text,
            )
        return Goal(found, _arguments_of(network, found, count), everyone)
    network.check_scores()
    if isinstance(target, str) and (top := re.fullmatch(r"top(\d+)", target)):
        best = min(int(top[1]), network.head.classes)
        if best < 1:
            raise UsageError(
                "expected top1 or more, found top0.", code="argument-too-small", name="top", found=0, expected=1
            )
        classes, indices = ranked()[:, :best].reshape(-1).astype(np.int32), np.repeat(everyone, best)
    else:
        classes, indices = _classes(network, target, count, {"top": TOP}), everyone
    rivals = np.full(len(classes), NONE, np.int32)
    choice = "none" if against is ALONE else "given"
    if against is None:
        choice = "pair" if network.head.paired else "none"
    if choice != "none":
        rivals = _against(network, "rival" if choice == "pair" else against, classes, count, indices)
    return Goal(ClassScore(), (classes, rivals), indices, choice)


def _plain(network: Network, target: object, against: Given) -> tuple[Given, Given]:
    """A class, a channel or a class and the one to set against it, where an objective or its text is just that.

    Any other objective stays one, less the class that is to be set against it.
    """
    if isinstance(target, str) and not _names_a_class(network, target):
        plain_place = PLACE.fullmatch(target) and not target.startswith((f"{LOGITS}:", f"{LOGIT}:"))
        target = target if plain_place else parse(target)
    if not isinstance(target, Objective):
        return target, against
    if target.reported != target:
        raise UsageError(
            "regularizers are for filters; a heatmap explains an objective without them.", code="regularizers-in-target"
        )
    terms = target.terms
    if all(term.of_class for term in terms):
        weights = tuple(term.weight for term in terms)
        if weights == (1.0,):
            return terms[0].channel, ALONE if terms[0].layer == LOGIT and against is None else against
        if weights == (1.0, -1.0) and against is None:
            return terms[0].channel, terms[1].channel
        if against is not None and against != "rival":
            return target - class_score(against), None
    if against is not None:
        raise UsageError(
            f"against works for classes only; {target.label!r} is not a class.",
            code="not-a-class",
            target=target.label,
        )
    if len(terms) == 1 and terms[0].own is not None and terms[0].weight == 1:
        return terms[0].own, None
    if len(terms) == 1 and terms[0].weight == 1 and isinstance(terms[0].channel, int):
        return channel_target(network, terms[0].layer, terms[0].channel, terms[0].place), None
    return target, None


def names_one_class(network: Network, target: int | str) -> bool:
    """True for "top", and for the number, the name or the objective of one class; that it exists is not checked.

    Example:
        >>> names_one_class(network, "class:cat"), names_one_class(network, "cat - coffee")
        (True, False)
    """
    plain, rival = _plain(network, target, None)
    if rival is not None or isinstance(plain, Objective) or is_target(plain):
        return False
    if not isinstance(plain, str) or plain == "top":
        return True
    return not re.fullmatch(r"top\d+", plain) and (_names_a_class(network, plain) or not PLACE.fullmatch(plain))


def _names_a_class(network: Network, text: str) -> bool:
    """True for the words that stand for classes, for a number, and for the name of a class as it is."""
    if re.fullmatch(r"top\d*|-?\d+", text):
        return True
    plain = text.replace("_", " ").lower()
    return any(plain == name.replace("_", " ").lower() for name in network.class_names or ())


def _combined(network: Network, objective: Objective, count: int) -> Goal:
    """An objective with the same arguments for each image."""
    bound = Binder(network, network.inputs.size).bind(objective)
    pairs = zip(bound.arguments, bound.vectors, strict=True)
    arguments = tuple(np.repeat(array[None], count, axis=0) for pair in pairs for array in pair)
    return Goal(Combined(bound.key, objective.label, bound.objective), arguments, np.arange(count))


def channel_target(
    network: Network, layer: str, channel: int, place: tuple[int, int] | None = None, mask: np.ndarray | None = None
) -> Channel:
    """One channel of a layer as a target: its mean over the map, its value at `place`, or its mean over `mask`.

    Raises:
        UsageError: no such layer, channel or place.

    Example:
        >>> target = channel_target(network, "block4_conv", 7, place=(4, 5))
        >>> convscope.heatmap(network, PHOTOS[0], target, "block3_conv").maps.shape
        (1, 56, 56)
    """
    found = layer_with_channels(network, layer, network.inputs.size)
    check_channel(channel, found.channels, found.path)
    if mask is not None:
        return Channel(found.path, channel, f"{found.path}:{channel} inside of a mask", mask=_shares(mask, found))
    if place is None:
        return Channel(found.path, channel, f"{found.path}:{channel}")
    height, width = found.shape[:2] if found.spatial else (1, 1)
    if not (0 <= place[0] < height and 0 <= place[1] < width):
        raise UsageError(
            f"place {place[0]},{place[1]} is outside of {found.path}, whose map is {height}x{width}.",
            code="place-out-of-range",
            layer=found.path,
            place=list(place),
            size=[height, width],
        )
    point = np.zeros((height, width), np.float32)
    point[place] = 1
    return Channel(found.path, channel, f"{found.path}:{channel}@{place[0]},{place[1]}", mask=point)


def similarity_target(network: Network, image: Source, layer: str | None = None) -> Similarity:
    """The cosine similarity of an image to `image` in a layer, the last one before the class scores where None.

    Raises:
        UsageError: no such layer; ImageError.

    Example:
        >>> target = similarity_target(network, PHOTOS[1])
        >>> convscope.heatmap(network, PHOTOS[0], target).rows[0].class_name
        'similarity to coffee (average)'
    """
    found = layer_with_channels(network, layer, network.inputs.size) if layer else _embedding(network)
    path = found.path
    (other,) = read_images([image])
    answer = network.forward(network.prepare([other]), (path,))[1][path][0]
    answer = answer.mean(axis=(0, 1)) if answer.ndim == 3 else answer
    unit = (answer / max(float(np.linalg.norm(answer)), 1e-12)).astype(np.float32)
    return Similarity(path, f"similarity to {other.name} ({path})", unit, image=other)


def _embedding(network: Network) -> Layer:
    """The last layer on the way to the output that is not made of class scores."""
    units = network.head.units
    candidates = [
        layer
        for layer in network.layers
        if layer.on_path and layer.has_channels and not layer.structural and layer.channels != units
    ]
    if not candidates:
        raise UsageError(
            f"{network.name} has no layer before its scores to compare images in; name one.",
            code="no-layer-before-scores",
            name=network.name,
        )
    return candidates[-1]


def _may_name_a_class(target: int | str) -> bool:
    """True for a number and for a text that is neither a place in a layer nor the best class of an image."""
    return not isinstance(target, str) or not (PLACE.fullmatch(target) or re.fullmatch(r"top\d*", target))


def _channel(network: Network, target: object) -> Channel | None:
    """The channel that a text names."""
    found = PLACE.fullmatch(target) if isinstance(target, str) else None
    if found is None or (network.class_names and target in network.class_names):
        return None
    place = None if found["row"] is None else (int(found["row"]), int(found["column"]))
    return channel_target(network, found["layer"], int(found["channel"]), place)


def _goal_of_maps(network: Network, target: int | str, against: object, count: int) -> Goal:
    """A class of a network whose output is a map with a class for each channel.

    Raises:
        UsageError: no such class, or the output is no such map.
    """
    head = network.head
    if head.map is None:
        raise UsageError(
            f"the output of {network.name} is not recognized as a map of classes (height, width, classes); "
            f"explain a channel, {option('target')} LAYER:CHANNEL, or a Custom function of the outputs.",
            code="no-map-of-classes",
            name=network.name,
        )
    number = network.class_index(target)
    choice = "none" if against is ALONE else "given"
    if against is None:
        choice = "pair" if head.paired else "none"
    rival = None if choice == "none" else _rival_in_maps(network, "rival" if choice == "pair" else against, number)
    text = f"{network.class_name(number)} where it is {'above 0' if head.classes == 1 else 'the highest'}"
    name = None if rival is None else network.class_name(rival)
    found = MapClass(head.map, head, number, rival, text, name)
    return Goal(found, _arguments_of(network, found, count), np.arange(count), choice)


def _rival_in_maps(network: Network, against: object, number: int) -> int:
    (rival,) = _against(network, against, np.array([number]), 1, np.arange(1))
    if rival == RIVAL and network.head.classes != 2:
        raise UsageError(
            f"the best other class differs from place to place in the output of {network.name}; name the class to set "
            "against it.",
            code="rival-of-a-map",
            count=network.head.classes,
        )
    return 1 - number if rival == RIVAL else int(rival)


def _arguments_of(network: Network, target: Target, count: int) -> tuple[np.ndarray, ...]:
    """The arguments of a target that is the same for each of `count` images."""
    if isinstance(target, Similarity):
        return (np.repeat(target.other[None], count, axis=0),)
    if not isinstance(target, Channel | MapClass):
        return ()
    layer = network.layer(target.layer)
    height, width = layer.shape[:2] if layer.spatial else (1, 1)
    given = target.mask if isinstance(target, Channel) else None
    mask = np.full((height, width), 1 / (height * width), np.float32) if given is None else given
    return (np.repeat(mask[None], count, axis=0),)


def _shares(mask: np.ndarray, layer: Layer) -> np.ndarray:
    wanted = layer.shape[:2] if layer.spatial else (1, 1)
    if mask.shape != wanted:
        raise UsageError(
            f"expected a mask of {wanted} for {layer.path}, found {mask.shape}.",
            code="mask-misfit",
            layer=layer.path,
            shape=list(mask.shape),
        )
    total = float(np.sum(mask))
    if not total > 0:
        raise UsageError("expected a mask with a positive sum, found one whose sum is not positive.", code="mask-empty")
    return (np.asarray(mask, np.float64) / total).astype(np.float32)


def _classes(network: Network, target: object, count: int, words: dict[str, int]) -> np.ndarray:
    """The class of each image `(n,)` int32, or what stands for one of `words`."""
    given = as_targets(target)
    if len(given) not in (1, count):
        raise UsageError(
            f"expected one class, or one for each of the {count} images; found {len(given)}.",
            code="targets-misfit",
            expected=count,
            found=len(given),
        )
    numbers = [words[one] if one in words else network.class_index(one) for one in given]
    return np.asarray(numbers * (count if len(numbers) == 1 else 1), np.int32)


def _against(network: Network, against: object, classes: np.ndarray, count: int, indices: np.ndarray) -> np.ndarray:
    """The class to set against that of each row `(n,)`, or `RIVAL`."""
    if network.head.classes < 2:
        raise UsageError("the network has one output, so there is no other to set against it.", code="no-other-class")
    rivals = _classes(network, against, count, {"rival": RIVAL})[indices]
    same = [int(one) for one, other in zip(classes, rivals, strict=True) if one == other >= 0]
    if same:
        raise UsageError(
            f"class {network.class_name(same[0])!r} can't be set against itself; choose another.",
            code="class-against-itself",
            name=network.class_name(same[0]),
        )
    return rivals
