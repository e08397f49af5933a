"""A request for a result: a technique and its arguments by value, so that two requests can be compared."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum

import numpy as np

from convscope.errors import UsageError, nearest
from convscope.events import Progress
from convscope.images.image import InputImage
from convscope.images.source import Failure, Images, ImageSource, image_source
from convscope.networks import Network
from convscope.results import Result
from convscope.techniques.activations import activations
from convscope.techniques.filters import filters
from convscope.techniques.heatmaps import heatmap
from convscope.techniques.heatmaps.concepts import concepts

__all__ = ["TECHNIQUES", "Request"]

TECHNIQUES: Mapping[str, Callable[..., Result]] = {
    "activations": activations,
    "concepts": concepts,
    "filters": filters,
    "heatmap": heatmap,
}
_IMAGES = frozenset({"images", "image", "natural_images"})  # the arguments that hold images
_OF_THE_SESSION = frozenset({"network", "progress"})  # the arguments that a session gives


@dataclass(frozen=True)
class Request:
    """One call of a technique, as a value: requests are equal where they ask for the same of the same images.

    Make one with `Request.of`.

    Attributes:
        technique: one of `TECHNIQUES`: "activations", "concepts", "filters" or "heatmap".
        arguments: name and value of each argument of the technique, also of those that were left out; without the
            network and `progress`, which the session gives.

    >>> from convscope.demo import PHOTOS
    >>> Request.of("heatmap", PHOTOS[0]) == Request.of("heatmap", PHOTOS[0], target="top")
    True
    """

    technique: str
    arguments: tuple[tuple[str, Hashable], ...]

    @classmethod
    def of(cls, technique: str, *positional: object, **named: object) -> Request:
        """The request for `technique(network, *positional, **named)`; images are read now.

        Args:
            technique: one of `TECHNIQUES`.
            positional, named: its arguments after the network. Lists and iterators are kept as tuples.

        Raises:
            UsageError: no such technique, or arguments that it does not take; ImageError: an image can't be read.

        >>> from convscope.demo import PHOTOS
        >>> Request.of("filters", "block4_conv", channels=[0, 3], steps=8).technique
        'filters'
        """
        if technique not in TECHNIQUES:
            raise UsageError(
                f"no technique {technique!r}; {nearest(technique, TECHNIQUES)}",
                code="technique-unknown",
                name=technique,
            )
        given = sorted(_OF_THE_SESSION & set(named))
        if given:
            raise UsageError(
                f"{', '.join(given)}: a request has no such argument; the session gives it.",
                code="argument-of-session",
                names=given,
            )
        try:
            bound = inspect.signature(TECHNIQUES[technique]).bind(None, *positional, **named)
        except TypeError as error:
            raise UsageError(
                f"{technique}: {error}.", code="arguments-misfit", name=technique, reason=str(error)
            ) from error
        bound.apply_defaults()
        kept = {name: value for name, value in bound.arguments.items() if name not in _OF_THE_SESSION}
        return cls(
            technique,
            tuple((name, _read(value) if name in _IMAGES else _frozen(value)) for name, value in kept.items()),
        )

    @property
    def by_value(self) -> bool:
        """True if equal requests are sure to have equal answers, so that answers may be cached.

        A function, an array or another object that can change is compared by identity, and makes this False.

        >>> Request.of("filters", "block4_conv").by_value
        True
        """
        return not any(_holds_identity(value) for _, value in self.arguments)

    def run(self, network: Network, progress: Progress = None) -> Result:
        """Call the technique on this thread.

        Args:
            network: the network to call it with.
            progress: as the technique takes it.

        >>> import convscope
        >>> from convscope.demo import MODEL
        >>> network = convscope.open_model(MODEL)
        >>> Request.of("filters", "block4_conv", channels=[0, 3], steps=2).run(network).values.shape[0]
        2
        """
        arguments = {name: _thawed(value) for name, value in self.arguments}
        return TECHNIQUES[self.technique](network, progress=progress, **arguments)


@dataclass(frozen=True)
class _Image:
    """An image that is compared by its fingerprint."""

    fingerprint: str
    image: InputImage = field(compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that is compared by identity."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _fingerprint(image: InputImage) -> str:
    """The fingerprint of the pixels and of the source that a result names."""
    digest = hashlib.sha256(
        repr((image.name, image.source, image.notes, image.sha256, image.label, image.colour)).encode()
    )
    for array in image.arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read(images: Images | None) -> Hashable:
    """The images themselves; of a source, which may be too large for that, the source by identity.

    Raises:
        ImageError: one can't be read.
    """
    if images is None or (isinstance(images, list | tuple) and not images):
        return None if images is None else ()
    if isinstance(images, ImageSource):
        return _Same(images)
    found = []
    for image in image_source(images).images():
        if isinstance(image, Failure):
            raise image.error
        found.append(_Image(_fingerprint(image), image))
    return tuple(found)


def _frozen(value: object) -> Hashable:
    if isinstance(value, list | tuple | Iterator):
        return tuple(_frozen(item) for item in value)
    return value if isinstance(value, Hashable) and _is_value(value) else _Same(value)


def _is_value(value: object) -> bool:
    """True if the object is hashable and compared by value, and so are its parts."""
    if value is None or isinstance(value, Enum):
        return True
    if isinstance(value, tuple | frozenset):
        return all(map(_is_value, value))
    if is_dataclass(value) and not all(_is_value(getattr(value, one.name)) for one in fields(value) if one.compare):
        return False
    return type(value).__eq__ is not object.__eq__ and type(value).__hash__ is not None


def _holds_identity(value: object) -> bool:
    return any(map(_holds_identity, value)) if isinstance(value, tuple) else isinstance(value, _Same)


def _thawed(value: object) -> object:
    """The arguments of `_read` and `_frozen`, lists and iterators as tuples."""
    if isinstance(value, tuple):
        return tuple(map(_thawed, value))
    return value.image if isinstance(value, _Image) else value.value if isinstance(value, _Same) else value
