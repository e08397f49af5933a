"""Heatmap methods and their registry.

A method is an object: its fields are its options, its class has its name, its source and its needs, and
`explain` makes maps from the evidence about some images. A user's own method is used like the ones here: a subclass of
`Method`, or any object with a `name` and such an `explain`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from convscope.errors import UsageError, nearest
from convscope.schema import Json
from convscope.techniques.heatmaps.options import Given, Option, Value, check_options, listed, options_of, parsed

if TYPE_CHECKING:
    from convscope.techniques.heatmaps.evidence import Evidence, ImageView

Function = Callable[[np.ndarray, np.ndarray], np.ndarray]
LONGEST_REPR = 1000


class Unfit(UsageError):
    """A method does not fit this network, layer or target: where several were asked for, it can be left out.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], "block3_conv:7", "block2_conv", method="finer-cam")
        Traceback (most recent call last):
        convscope.techniques.heatmaps.methods.Unfit: ...
    """


@dataclass(frozen=True, eq=False)
class MethodResult:
    """The result of a method on one image.

    Attributes:
        heat: the map `(h, w)`, raw and signed.
        note: a remark to show beside it, such as its accuracy.

    Example:
        >>> MethodResult(np.zeros((2, 2), np.float32), note="of two cells a side").note
        'of two cells a side'
    """

    heat: np.ndarray
    note: str = ""


class Explains(Protocol):
    """The least that a method of the user's own needs: a name, and a map `(h, w)` for each image of the evidence.

    Example:
        >>> class Mean:
        ...     name = "mean-map"
        ...     def explain(self, evidence):
        ...         return list(evidence.maps.mean(axis=-1))
        >>> convscope.heatmap(network, PHOTOS[0], method=Mean()).rows[0].method
        'mean-map'
    """

    @property
    def name(self) -> str:
        """The name in results."""

    def explain(self, evidence: Evidence) -> Sequence[np.ndarray] | Sequence[MethodResult]:
        """See `Method.explain`."""


class Method:
    """A way to make a heatmap; a frozen dataclass that derives from it has its options as fields.

    Attributes:
        name: as `--method` takes it.
        paper: where it is defined.
        at_image: the map is one of the image's pixels or places, whatever the layer.
        one_pass: the pass that gives a layer's maps and gradients is enough.
        warning: a remark to show beside each of its maps.
        needs_gradient: it is made of gradients, so that it needs a network whose graph is whole.
        sampled: the name of the option that sets the number of passes on an image; empty where none does.

    Example:
        >>> from dataclasses import dataclass
        >>> from convscope.techniques.heatmaps import Method
        >>> @dataclass(frozen=True)
        ... class Power(Method):
        ...     name = "power"
        ...     exponent: float = 2.0
        ...     def explain(self, evidence):
        ...         return [abs(maps).mean(axis=-1) ** self.exponent for maps in evidence.maps]
        >>> Power(3).values
        {'exponent': 3.0}
    """

    name: str = ""
    paper: str = ""
    at_image: bool = False
    one_pass: bool = False
    warning: str = ""
    needs_gradient: bool = True
    sampled: str = ""

    def __post_init__(self) -> None:
        for name, value in check_options(self.name, self).items():
            object.__setattr__(self, name, value)

    def explain(self, evidence: Evidence) -> Sequence[np.ndarray] | Sequence[MethodResult]:
        """A map `(h, w)` for each image, raw and signed, or a `MethodResult` for each.

        Args:
            evidence: the evidence about some images at one layer, or at the pixels for a method `at_image`.

        Raises:
            Unfit: the method does not fit this network, layer or target.
        """
        raise NotImplementedError

    @property
    def options(self) -> tuple[Option, ...]:
        """The options, in the order of the fields."""
        return options_of(self)

    @property
    def values(self) -> dict[str, Value]:
        """The values of the options, by name."""
        return {one.name: getattr(self, one.name) for one in self.options}

    @property
    def text(self) -> str:
        """The name, and the options that differ from their defaults: "rise(masks=500)"."""
        changed = [
            f"{one.name}={one.written(value)}"
            for one, value in zip(self.options, self.values.values(), strict=True)
            if value != one.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def with_budget(self, passes: int) -> Method:
        """The same with as many passes for an image, where it samples; else itself."""
        return self._changed({self.sampled: passes}) if self.sampled else self

    def with_texts(self, given: Mapping[str, str]) -> Method:
        """The same with the options that texts stand for.

        Raises:
            UsageError: there is no such option, or its text stands for no value.
        """
        return self._changed(parsed(self.name, self.options, given))

    def with_values(self, **values: Value) -> Method:
        """The same with other values of options, as provenance has them.

        Raises:
            UsageError: there is no such option, or it can't have this value.
        """
        known = {one.name for one in self.options}
        unknown = next((name for name in values if name not in known), None)
        if unknown is not None:
            raise UsageError(
                f"method {self.name!r} has no option {unknown!r}; {nearest(unknown, known)}. "
                f"{listed(self.name, self.options)}",
                code="method-option-unknown",
                method=self.name,
                name=unknown,
            )
        return self._changed(values)

    def described(self) -> dict[str, Json]:
        """What identifies it besides its options, for provenance: plain JSON values.

        A method of the user's own is named, with the SHA-256 of its text where Python knows that.
        """
        known = METHODS.get(self.name)
        if known is not None and known._source is self._source:
            return {"kind": "built in"}
        return {"kind": "own", **_code(self._source), "repr": repr(self)[:LONGEST_REPR]}

    @property
    def _source(self) -> object:
        return type(self)

    def _changed(self, values: Mapping[str, Value]) -> Method:
        return dataclasses.replace(self, **values) if values else self  # type: ignore[type-var]


class PerImageMethod(Method):
    """A method that passes changed copies of one image at a time through the network.

    Example:
        >>> from dataclasses import dataclass
        >>> from convscope.techniques.heatmaps import option
        >>> @dataclass(frozen=True)
        ... class Brightness(PerImageMethod):
        ...     name = "brightness"
        ...     at_image = True
        ...     share: float = option(0.5, "factor of the image", low=0, high=1)
        ...     def explain_image(self, view):
        ...         return MethodResult(self.share * view.x[0].mean(axis=-1))
        >>> convscope.heatmap(network, PHOTOS[0], method=Brightness(share=0.2)).maps.shape
        (1, 224, 224)
    """

    def explain(self, evidence: Evidence) -> Sequence[MethodResult]:
        """See `Method.explain`."""
        return [self.explain_image(view) for view in evidence.views()]

    def explain_image(self, view: ImageView) -> MethodResult:
        """The map `(h, w)` of one image, raw and signed.

        Args:
            view: the image, and the score that is explained.

        Raises:
            Unfit: the method does not fit this network, layer or target.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Formula(Method):
    """A method without options that a pure function defines.

    Attributes:
        name, paper, at_image, warning, needs_gradient: see `Method`.
        function: from maps and gradients `(n, h, w, c)` to heatmaps `(n, h, w)`: those of the layer, or where it is
            `at_image` the images and the gradients at their pixels.

    Example:
        >>> mean = Formula("mean-map", "", lambda maps, gradients: maps.mean(axis=-1))
        >>> convscope.heatmap(network, PHOTOS[0], method=mean).maps.shape
        (1, 28, 28)
    """

    name: str = field()
    paper: str = field()
    function: Function = field(repr=False)
    at_image: bool = False
    warning: str = ""
    needs_gradient: bool = True

    @property
    def options(self) -> tuple[Option, ...]:
        """None: its fields identify it."""
        return ()

    @property
    def one_pass(self) -> bool:  # type: ignore[override]
        """See `Method`."""
        return not self.at_image

    def explain(self, evidence: Evidence) -> Sequence[np.ndarray]:
        """See `Method.explain`."""
        if self.at_image:
            return list(self.function(evidence.x, evidence.input_gradients))
        return list(self.function(evidence.maps, evidence.gradients))

    @property
    def _source(self) -> object:
        return self.function


@dataclass(frozen=True, eq=False)
class Own(Method):
    """An object of the user's own that is no `Method`: missing attributes have the defaults of `Method`."""

    method: Explains

    def __post_init__(self) -> None:
        for name in ("name", "paper", "at_image", "one_pass", "warning", "needs_gradient"):
            object.__setattr__(self, name, getattr(self.method, name, getattr(Method, name)))

    def explain(self, evidence: Evidence) -> Sequence[np.ndarray] | Sequence[MethodResult]:
        """See `Method.explain`."""
        return self.method.explain(evidence)

    @property
    def options(self) -> tuple[Option, ...]:
        """Those of the object, where it is a dataclass."""
        return options_of(self.method)

    @property
    def values(self) -> dict[str, Value]:
        """See `Method.values`."""
        return {one.name: getattr(self.method, one.name) for one in self.options}

    @property
    def _source(self) -> object:
        return type(self.method)

    def _changed(self, values: Mapping[str, Value]) -> Own:
        return Own(dataclasses.replace(self.method, **values)) if values else self  # type: ignore[type-var]


# -- the registry ----------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {}
MethodClass = TypeVar("MethodClass", bound=type[Method])


def formula(
    name: str, paper: str, *, at_image: bool = False, warning: str = "", needs_gradient: bool = True
) -> Callable[[Function], Function]:
    """Register a pure function of maps and gradients as a method, see `Formula`; the function is returned unchanged.

    Example:
        >>> @formula("mean-map", "an example")
        ... def mean_map(maps, gradients):
        ...     return maps.mean(axis=-1)
        >>> convscope.heatmap(network, PHOTOS[0], method="mean-map").maps.shape
        (1, 28, 28)
        >>> del METHODS["mean-map"]  # so that no other example finds it
    """

    def register(function: Function) -> Function:
        METHODS[name] = Formula(name, paper, function, at_image, warning, needs_gradient)
        return function

    return register


def registered(method: MethodClass) -> MethodClass:
    """Register a class of methods, with the defaults of its options.

    Example:
        >>> from dataclasses import dataclass
        >>> from convscope.techniques.heatmaps import option
        >>> @registered
        ... @dataclass(frozen=True)
        ... class Power(Method):
        ...     name = "power"
        ...     exponent: float = option(2.0, "exponent of the map", low=0)
        ...     def explain(self, evidence):
        ...         return list(abs(evidence.maps).mean(axis=-1) ** self.exponent)
        >>> convscope.heatmap(network, PHOTOS[0], method="power").maps.shape
        (1, 28, 28)
        >>> del METHODS["power"]  # so that no other example finds it
    """
    METHODS[method.name] = method()
    return method


def without_gradients() -> str:
    """The names of the methods that need no gradient, for a message.

    Example:
        >>> without_gradients().split(", ")[-2:]
        ['occlusion', 'rise']
    """
    return ", ".join(name for name, one in METHODS.items() if not one.needs_gradient)


def as_method(given: str | Method | Explains) -> Method:
    """The method that a name stands for, or a method as it is, also one of the user's own.

    Raises:
        UsageError: there is none of that name, or it is no method.
    """
    if isinstance(given, Method):
        return given
    if isinstance(given, str):
        if given not in METHODS:
            raise UsageError(
                f"no heatmap method {given!r}; {nearest(given, METHODS)}", code="method-unknown", name=given
            )
        return METHODS[given]
    if isinstance(given, type) or not callable(getattr(given, "explain", None)):
        hint = f"; give an object of it, {given.__name__}()" if isinstance(given, type) else ""
        raise UsageError(
            f"expected a method's name or an object with a name and a function explain, found {given!r}{hint}.",
            code="method-invalid",
            found=repr(given),
        )
    if not isinstance(getattr(given, "name", None), str):
        raise UsageError(
            f"expected a method with a text as its name, found {type(given).__name__} without one.",
            code="method-invalid",
            found=type(given).__name__,
        )
    return Own(given)


def as_methods(given: Given) -> list[Method]:
    """One method or several, by names and as objects; of "all" those that share one pass.

    Raises:
        UsageError: see `as_method`.

    Example:
        >>> [method.name for method in as_methods(["grad-cam", "rise"])]
        ['grad-cam', 'rise']
    """
    if isinstance(given, str) and given == "all":
        return [one for one in METHODS.values() if one.one_pass]
    several = given if isinstance(given, list | tuple) else [given]
    if not several:
        raise UsageError(f"expected at least one method, found none; {nearest('', METHODS)}.", code="method-missing")
    return [as_method(one) for one in several]


def with_options(methods: Sequence[Method], given: Mapping[str, str]) -> list[Method]:
    """Methods with the options that texts stand for: each goes to every method that declares it.

    Args:
        methods: the methods.
        given: texts by the name of an option.

    Raises:
        UsageError: no method has such an option, or its text stands for no value.

    Example:
        >>> [method.text for method in with_options(as_methods(["smoothgrad", "rise"]), {"copies": "8"})]
        ['smoothgrad(copies=8)', 'rise']
    """
    known = [{one.name for one in method.options} for method in methods]
    for name in given:
        if not any(name in names for names in known):
            if len(methods) == 1:
                return [methods[0].with_texts(given)]  # its message lists the options
            lists = " ".join(listed(one.name, one.options) for one in methods if one.options)
            raise UsageError(
                f"none of these methods has an option {name!r}. {lists or 'They have no options.'}",
                code="method-option-unknown",
                name=name,
            )
    return [
        method.with_texts({name: text for name, text in given.items() if name in names})
        for method, names in zip(methods, known, strict=True)
    ]


def labels(methods: Sequence[Method]) -> list[str]:
    """Labels that distinguish the methods of one call: their names, with options where a name occurs more than once."""
    times = Counter(one.name for one in methods)
    return [one.text if times[one.name] > 1 else one.name for one in methods]


def results_of(method: Method, evidence: Evidence) -> list[MethodResult]:
    """The maps of a method for some images.

    Raises:
        UsageError: not a map `(h, w)` for each image.
    """
    given = method.explain(evidence)
    found = [one if isinstance(one, MethodResult) else MethodResult(np.asarray(one)) for one in given]
    shapes = [np.shape(one.heat) for one in found]
    if len(found) != len(evidence.x) or any(len(shape) != 2 for shape in shapes):
        raise UsageError(
            f"expected a map (h, w) for each of {len(evidence.x)} images from method {method.name!r}, found "
            f"{len(found)} of the shapes {', '.join(map(str, shapes))}.",
            code="maps-misfit",
            method=method.name,
            expected=len(evidence.x),
            found=[list(shape) for shape in shapes],
        )
    return found


def _code(code: Given) -> dict[str, str | None]:
    """The place of the user's own code, and the SHA-256 of its text where Python knows that."""
    try:
        digest = hashlib.sha256(inspect.getsource(code).encode()).hexdigest()
    except (OSError, TypeError):
        digest = None
    name = getattr(code, "__qualname__", type(code).__qualname__)
    return {"code": f"{getattr(code, '__module__', '')}.{name}", "code_sha256": digest}
