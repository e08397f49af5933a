"""The measure of an objective: a number for each image, from the activations of one layer or of the whole network.

A measure is frozen and hashable, and is a part of the key of the compiled program. The values that differ from one
objective to the next (channel, place, given activations) are arguments of that program.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from convscope.errors import UsageError, option
from convscope.networks import Layer, Network, Record
from convscope.networks.foreign import Tensor
from convscope.networks.ops import Operations

OwnTarget = Any  # an object of the user's own with a `score`, and perhaps more of what `Target` has
Activations = Mapping[str, Tensor]
Arguments = tuple[Any, ...]

LOGITS = "class"  # in the place of a layer's path: the class scores, before their softmax or sigmoid
LOGIT = "logit"  # the same, of a term: a class's own logit, also where two classes share one softmax
INPUT = "input"  # in the place of a layer's path: the image itself, for regularizers
TINY = 1e-12  # guards squared lengths
LEAST_COSINE = 0.1  # as in lucid: an image whose cosine is lower still has a gradient


@dataclass(frozen=True)
class Views:
    """The values of one step of an ascent that a regularizer gets.

    Attributes:
        ops: the framework's operations.
        count: number of views of each image.
        images: `(n, h, w, c)`, in units of half the network's range around mid-grey.
        record: the pass on the views, `n * count` of them.
        again: passes other images `(n, h, w, c)`, in the network's range, through the same views.

    Example:
        A regularizer of your own that counts the views:

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Count(Measure):
        ...     name = "count"
        ...     regularizer = True
        ...     def regularize(self, views, layer, given):
        ...         return views.mean(views.ops.ones(views.images.shape[0] * views.count))
        >>> from convscope.objectives import Objective, Term, channel
        >>> objective = channel("block4_conv", 7) + Objective((Term("input", measure=Count()),))
        >>> str(objective)
        'block4_conv:7 + count(input)'
    """

    ops: Operations
    count: int
    images: Tensor
    record: Record
    again: Callable[[Tensor], Record]

    def mean(self, values: Tensor) -> Tensor:
        """The mean `(n,)` over the views of each image, of values `(n * count,)`."""
        return self.ops.mean(self.ops.reshape(values, (-1, self.count)), axis=-1)

    def answer(self, layer: Layer) -> Tensor:
        """A layer's activations on the views, or the images themselves."""
        return self.images if layer.path == INPUT else answer(self.record, layer)


def answer(record: Record, layer: Layer) -> Tensor:
    """A layer's activations: `(n, h, w, c)` or `(n, c)`; the class scores `(n, classes)` for `LOGITS`."""
    return record.logits if layer.path == LOGITS else record.activations[layer.path]


@dataclass(frozen=True)
class Measure:
    """The measure of a term on its layer. A subclass overrides the methods that it needs.

    Attributes:
        name: in the text of objectives, `name(layer)`; empty for the channels of a layer.
        regularizer: it is raised relative to the objective's value, and is no part of that value.
        together: variants of one objective have to be made side by side for it.
        of_image: it can measure the image itself, and not a layer alone.

    Example:
        >>> from dataclasses import dataclass
        >>> from convscope.objectives import Objective, Term
        >>> @dataclass(frozen=True)
        ... class Peak(Measure):
        ...     name = "peak"
        ...     def reduce(self, ops, record, layer, given):
        ...         return ops.max(record.activations[layer.path], axis=(1, 2))
        >>> peak = Objective((Term("block4_conv", channel=7, measure=Peak()),))
        >>> convscope.filters(network, objectives=peak, steps=2, size=32).rows[0].name
        'peak(block4_conv)'
    """

    name: ClassVar[str] = ""
    regularizer: ClassVar[bool] = False
    together: ClassVar[bool] = False
    of_image: ClassVar[bool] = False

    def record(self, layer: Layer) -> tuple[str, ...]:
        """Paths of the layers that it reads."""
        return () if layer.path in (LOGITS, INPUT) else (layer.path,)

    def scores(self, layer: Layer) -> bool:
        """True if it reads the class scores."""
        return layer.path == LOGITS

    def reduce(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """Numbers `(n, c)` for each image with its own argument `given` `(n, ...)`; the term's vector weighs them."""
        raise NotImplementedError

    def means(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """The same for each of the arguments `given` `(u, ...)`: `(n, u, c)`."""
        found = [self._with(ops, record, layer, given[index : index + 1]) for index in range(given.shape[0])]
        return ops.stack(found, axis=1)

    def _with(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        count = answer(record, layer).shape[0]
        return self.reduce(ops, record, layer, ops.repeat(given, count, axis=0))

    def regularize(self, views: Views, layer: Layer, given: Tensor) -> Tensor:
        """The number `(n,)` of a regularizer."""
        raise NotImplementedError

    def argument(self, own: np.ndarray, image: np.ndarray | None, group: int) -> np.ndarray:
        """The argument of the measure for one image of an ascent.

        Args:
            own: the argument from binding.
            image: the prepared image that the ascent began with.
            group: images of one group are variants of one objective.
        """
        return own


@dataclass(frozen=True)
class Linear(Measure):
    """The mean of each channel, weighted by the argument, a mask `(h, w)`.

    Example:
        >>> Linear() == Linear()
        True
    """

    def reduce(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.reduce`."""
        seen = self.values(ops, answer(record, layer))
        return seen if len(seen.shape) == 2 else ops.einsum("nhwc,nhw->nc", seen, given)

    def means(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.means`."""
        seen = self.values(ops, answer(record, layer))
        if len(seen.shape) == 2:
            return ops.reshape(seen, (-1, 1, seen.shape[-1]))
        return ops.einsum("nhwc,uhw->nuc", seen, given)

    def values(self, ops: Operations, seen: Tensor) -> Tensor:
        """The values of the mean."""
        return seen


@dataclass(frozen=True)
class Energy(Linear):
    """The mean square of a whole layer, which DeepDream raises.

    Example:
        >>> from convscope.objectives import parse
        >>> parse("block4_conv:*").terms[0].measure
        Energy()
    """

    def values(self, ops: Operations, seen: Tensor) -> Tensor:
        """See `Linear.values`."""
        return ops.square(seen)


@dataclass(frozen=True)
class DotCosine(Measure):
    """The dot product with given activations times a power of their cosine: lucid's caricature and activation atlas.

    With weights m of the cells (their sum is 1), activations a and given ones g:
    `d = sum m a g`, `cos = d / sqrt(sum m a a * sum m g g)`, and the measure is `d * max(cos, 0.1) ** power`.

    The argument is `(h, w, c + 1)`: the given activations and, as the last channel, m.

    Attributes:
        power: exponent of the cosine; 0 for the dot product alone.

    Example:
        >>> DotCosine(power=1.0).power
        1.0
    """

    power: float = 2.0
    name: ClassVar[str] = "dot_cosine"

    def reduce(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.reduce`."""
        seen = answer(record, layer)
        seen = ops.reshape(seen, (-1, 1, 1, seen.shape[-1])) if len(seen.shape) == 2 else seen
        other, mask = given[..., :-1], given[..., -1:]
        dot, own, theirs = (
            ops.sum(mask * product, axis=(1, 2, 3)) for product in (seen * other, ops.square(seen), ops.square(other))
        )
        if self.power:
            cosine = dot * ops.rsqrt(ops.maximum(own * theirs, TINY))
            dot = dot * ops.exp(self.power * ops.log(ops.maximum(cosine, LEAST_COSINE)))
        return ops.reshape(dot, (-1, 1))


@dataclass(frozen=True)
class Diversity(Measure):
    """Minus the mean cosine of an image's Gram matrix with those of the others of its group (Olah et al. 2017).

    Example:
        >>> Diversity().regularizer, Diversity().together
        (True, True)
    """

    name: ClassVar[str] = "diversity"
    regularizer: ClassVar[bool] = True
    together: ClassVar[bool] = True

    def regularize(self, views: Views, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.regularize`."""
        ops, groups, seen = views.ops, given[:, 0, 0], views.answer(layer)
        flat = ops.reshape(seen, (seen.shape[0], -1, seen.shape[-1]))
        grams = ops.einsum("npc,npd->ncd", flat, flat)
        grams = ops.reshape(grams, (grams.shape[0] // views.count, views.count, -1))
        grams = ops.mean(grams, axis=1)
        grams = grams * ops.rsqrt(ops.maximum(ops.sum(ops.square(grams), axis=-1, keepdims=True), TINY))
        together = ops.cast(ops.equal(groups[:, None], groups[None, :]), "float32")
        others = together * ops.convert_to_tensor(1 - np.eye(grams.shape[0], dtype=np.float32))
        count = ops.maximum(ops.sum(others, axis=-1), 1.0)
        return -ops.sum(others * ops.einsum("nd,md->nm", grams, grams), axis=-1) / count

    def argument(self, own: np.ndarray, image: np.ndarray | None, group: int) -> np.ndarray:
        """The number of the group, in the shape of the argument from binding."""
        return np.full_like(own, group)


@dataclass(frozen=True)
class Likeness(Measure):
    """Minus the squared distance of a layer's map from that of the image that the ascent began with, as a share of the
    latter's square (Hamblin et al. 2024, Feature Accentuation, 2402.10039).

    Example:
        >>> Likeness().regularizer
        True
    """

    name: ClassVar[str] = "likeness"
    regularizer: ClassVar[bool] = True

    def regularize(self, views: Views, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.regularize`."""
        ops, seen = views.ops, answer(views.record, layer)
        theirs = ops.stop_gradient(answer(views.again(given), layer))
        axes = tuple(range(1, len(seen.shape)))
        apart = ops.sum(ops.square(seen - theirs), axis=axes)
        share = apart / ops.maximum(ops.sum(ops.square(theirs), axis=axes), TINY)
        return -views.mean(share)

    def argument(self, own: np.ndarray, image: np.ndarray | None, group: int) -> np.ndarray:
        """The image that the ascent began with.

        Raises:
            UsageError: it began with noise.
        """
        if image is None:
            raise UsageError(
                f"a likeness needs an image to compare with; give one with {option('image')}.", code="image-missing"
            )
        return image


@dataclass(frozen=True)
class TotalVariation(Measure):
    """The mean absolute difference of neighbouring cells, along both axes: of the image, or of a layer's map.

    Example:
        >>> TotalVariation().name
        'tv'
    """

    name: ClassVar[str] = "tv"
    regularizer: ClassVar[bool] = True
    of_image: ClassVar[bool] = True

    def regularize(self, views: Views, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.regularize`."""
        ops, seen = views.ops, views.answer(layer)
        down, right = seen[:, 1:] - seen[:, :-1], seen[:, :, 1:] - seen[:, :, :-1]
        found = sum(ops.mean(ops.maximum(part, -part), axis=(1, 2, 3)) for part in (down, right))
        return found if layer.path == INPUT else views.mean(found)


@dataclass(frozen=True)
class L2(Measure):
    """The mean square: of the image around mid-grey, in units of half the network's range, or of a layer's map.

    Example:
        >>> L2().name
        'l2'
    """

    name: ClassVar[str] = "l2"
    regularizer: ClassVar[bool] = True
    of_image: ClassVar[bool] = True

    def regularize(self, views: Views, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.regularize`."""
        seen = views.answer(layer)
        found = views.ops.mean(views.ops.square(seen), axis=tuple(range(1, len(seen.shape))))
        return found if layer.path == INPUT else views.mean(found)


NAMED: Mapping[str, Measure] = {one.name: one for one in (Diversity(), Likeness(), TotalVariation(), L2())}


# -- of the user's own -----------------------------------------------------------------------------------


class Target(Protocol):
    """A number for each image. Any object with a `score` is one; a subclass is not needed.

    Attributes:
        record: paths of the layers it reads; none where it has no such attribute.
        scores: it reads the class scores; True where it has no such attribute.
        text: its description; the name of its class where it has no such attribute.

    Example:
        >>> class Margin:
        ...     text = "cat less the mean of all classes"
        ...     def score(self, ops, logits, activations, arguments):
        ...         return logits[:, 2] - ops.mean(logits, axis=1)
        >>> convscope.heatmap(network, PHOTOS[0], Margin()).rows[0].class_name
        'cat less the mean of all classes'
    """

    if TYPE_CHECKING:  # no attributes of this class itself: a dataclass would take them for its fields' defaults

        @property
        def record(self) -> tuple[str, ...]:
            """Paths of the layers it reads."""

        @property
        def scores(self) -> bool:
            """True if it reads the class scores."""

        @property
        def text(self) -> str:
            """Its description."""

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """The arguments with everything filled in that depends on the image, such as its best class.

        A user's own object has no arguments, unless it has a method `resolve` that returns some: tensors
        `(n, ...)`. A heatmap keeps them while it changes the image; an ascent finds them anew in each step.
        """
        return arguments

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """The number `(n,)`.

        Args:
            ops: the framework's operations under NumPy's names.
            logits: class scores `(n, classes)`, or None where `scores` is False.
            activations: for each path of `record` the layer's activations, `(n, h, w, c)` or `(n, c)`.
            arguments: resolved.
        """


@dataclass(frozen=True)
class Custom:
    """Any scalar of the network's activations and scores, such as the score of a detector's box.

    Attributes:
        function: from `(ops, logits, activations)` to a number for each image `(n,)`, in the framework's own tensors:
            `ops` has its operations under NumPy's names, `activations` those of `layers` by path, channels last.
        layers: paths that it reads.
        text: its description.
        scores: it reads the class scores.
        regularizer: filters raise it relative to the other terms, and it is no part of the activation that they report.

    Example:
        >>> both = Custom(lambda ops, logits, activations: logits[:, 2] + logits[:, 3], text="cat and coffee")
        >>> convscope.heatmap(network, PHOTOS[0], both).rows[0].class_name
        'cat and coffee'
    """

    function: Callable[[Operations, Tensor, Activations], Tensor]
    layers: tuple[str, ...] = ()
    text: str = "a function"
    scores: bool = True
    regularizer: bool = False

    @property
    def record(self) -> tuple[str, ...]:
        """See `Target.record`."""
        return self.layers

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        return arguments

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        return self.function(ops, logits, activations)


@dataclass(frozen=True)
class Own:
    """An objective of the user's own, a `Custom` among them, with the network's paths of layers and its result checked.

    Attributes:
        key: identifies it; of an object that can change it is a new one each time.
        target: the user's object.
        names: for each layer that it reads its own name for it, and its path.
        scores, text: see `Target`.
    """

    key: Hashable
    target: OwnTarget = field(compare=False)
    names: tuple[tuple[str, str], ...]
    scores: bool
    text: str

    @property
    def record(self) -> tuple[str, ...]:
        """See `Target.record`."""
        return tuple(path for _, path in self.names)

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        resolve = getattr(self.target, "resolve", None)
        return arguments if resolve is None else tuple(resolve(ops, logits, self._named(activations), arguments))

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`.

        Raises:
            UsageError: it is not a number for each image.
        """
        found = self.target.score(ops, logits, self._named(activations), arguments)
        shape = None if getattr(found, "shape", None) is None else tuple(found.shape)
        if shape is None or len(shape) != 1:
            what = f"the shape {shape}" if shape else type(found).__name__ if shape is None else "a single number"
            raise UsageError(
                f"expected a number for each image (n,) from {self.text}, found {what}.",
                code="scores-misfit",
                name=self.text,
                found=what,
            )
        return found

    def _named(self, activations: Activations) -> Activations:
        return {name: activations[path] for pair in self.names for name, path in (pair, (pair[1], pair[1]))}


@dataclass(frozen=True)
class Scored(Measure):
    """The score of a user's own object on a network.

    Attributes:
        own: the object, bound.
    """

    own: Own

    def record(self, layer: Layer) -> tuple[str, ...]:
        """See `Measure.record`."""
        return self.own.record

    def scores(self, layer: Layer) -> bool:
        """See `Measure.scores`."""
        return self.own.scores

    def score(self, ops: Operations, record: Record) -> Tensor:
        """The score `(n,)`."""
        arguments = self.own.resolve(ops, record.logits, record.activations, ())
        fixed = tuple(map(ops.stop_gradient, arguments))
        return self.own.score(ops, record.logits, record.activations, fixed)

    def reduce(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.reduce`."""
        return ops.reshape(self.score(ops, record), (-1, 1))

    def means(self, ops: Operations, record: Record, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.means`."""
        return ops.reshape(self.score(ops, record), (-1, 1, 1))

    def regularize(self, views: Views, layer: Layer, given: Tensor) -> Tensor:
        """See `Measure.regularize`."""
        return views.mean(self.score(views.ops, views.record))


@dataclass(frozen=True)
class ScoredBeside(Scored):
    """The same of an object whose `regularizer` is True."""

    regularizer: ClassVar[bool] = True


def described_own(found: Own) -> dict[str, object]:
    """What identifies a user's own object, for provenance: plain JSON values.

    Its code is named, with the SHA-256 of its text where Python knows that.
    """
    code = found.target.function if isinstance(found.target, Custom) else type(found.target)
    return {
        **{"kind": "own", "layers": list(found.record), "scores": found.scores},
        **{"code": f"{code.__module__}.{_named(code)}", "code_sha256": _code_sha256(code)},
        "repr": repr(found.target)[:1000] if found.key.__class__ is tuple else None,
    }


def _named(code: object) -> str:
    return getattr(code, "__qualname__", type(code).__qualname__)


def _code_sha256(code: Callable) -> str | None:
    try:
        return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def is_target(given: object) -> bool:
    """True for an object with a `score`, such as a `Custom`.

    Example:
        >>> is_target(Custom(lambda ops, logits, activations: logits[:, 0])), is_target("cat")
        (True, False)
    """
    return callable(getattr(given, "score", None)) and not isinstance(given, type | str)


def text_of(target: object) -> str:
    """The description of a user's own object."""
    return str(getattr(target, "text", type(target).__name__))


def own(network: Network, target: OwnTarget, with_input: bool = False) -> Own:
    """A user's own object on a network.

    Args:
        network: the network with the layers that it reads.
        target: the object.
        with_input: `INPUT` stands for the image itself, as in an ascent.

    Raises:
        UsageError: an attribute does not follow `Target`, or there is no such layer.
    """
    record, scores = getattr(target, "record", ()), getattr(target, "scores", True)
    text = getattr(target, "text", type(target).__name__)
    if not isinstance(text, str) or not isinstance(scores, bool):
        raise UsageError(
            f"expected a target with a str as text and a bool as scores, found {text!r} and {scores!r}.",
            code="own-object-invalid",
            found=repr(text),
        )
    if not isinstance(record, tuple | list) or not all(isinstance(path, str) for path in record):
        raise UsageError(
            f"expected the paths of the layers that {text} reads as a tuple, found {record!r}.",
            code="own-object-invalid",
            name=text,
            found=repr(record),
        )
    names = tuple((path, path if with_input and path == INPUT else network.layer(path).path) for path in record)
    return Own(_key(target), target, names, scores, text)


def _key(target: object) -> Hashable:
    """A frozen dataclass is a value; any other object may be changed from one call to the next."""
    parameters = getattr(target, "__dataclass_params__", None)
    try:
        return (type(target), target, hash(target)) if parameters is not None and parameters.frozen else object()
    except TypeError:  # with a mutable value inside
        return object()
