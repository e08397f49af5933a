"""The base of all results: their origin and their parameters."""

from __future__ import annotations

import hashlib
import platform
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

import numpy as np

from convscope.images.image import InputImage
from convscope.networks.network import Network
from convscope.results.parameters import Parameters
from convscope.schema import Json


@dataclass(frozen=True, eq=False)
class Origin:
    """The network of a result, and further records of how it was made.

    Attributes:
        network: the network's name.
        input_size: height and width in pixels of the images that the network takes; None where it is not known.
        record: the provenance without its parameters, as plain JSON values; written and never read.
        details: further entries of its parameters, which only describe; written and never read.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0]).origin.input_size
        (224, 224)
    """

    network: str = "a network"
    input_size: tuple[int, int] | None = None
    record: Mapping[str, Json] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)

    def provenance(self, parameters: Mapping[str, object]) -> dict[str, object]:
        """The data to reproduce a result: plain JSON values, without a time, so that equal results have equal data."""
        return {**self.record, "parameters": {**self.details, **parameters}}


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The base of all results: frozen values, the arguments as typed fields, and their JSON.

    Attributes:
        origin: the network and the images.
        parameters: the arguments that changed the result.
        kind: the name of this kind of result: "activations", "filters", "heatmaps" or "concepts".

    Example:
        >>> found = convscope.heatmap(network, PHOTOS[0])
        >>> found.kind, sorted(found.to_json()), found.provenance["technique"]
        ('heatmaps', ['heatmaps', 'provenance'], 'heatmap')
    """

    origin: Origin = field(default_factory=Origin)
    parameters: Parameters = field(default_factory=Parameters)
    kind: ClassVar[str] = ""

    @property
    def provenance(self) -> dict[str, object]:
        """The data to reproduce the result, as plain JSON values: written, and never read by the package."""
        return self.origin.provenance(self.parameters.to_json())

    def described(self) -> dict[str, Json]:
        """The parameters of the provenance."""
        return {**self.origin.details, **self.parameters.to_json()}

    def to_json(self) -> dict[str, Json]:
        """The numbers and the provenance, as plain JSON values."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.origin.network}>"

    def _repr_html_(self) -> str | None:
        return _displays[0](self) if _displays else None


_displays: list[Callable[[Result], str]] = []


def display_with(html: Callable[[Result], str]) -> None:
    """Register the function that draws results in a notebook: `render` does, once imported; else only text is shown."""
    _displays[:] = [html]


def origin(
    network: Network,
    technique: str,
    images: Sequence[InputImage],
    others: Mapping[str, InputImage | None] = types.MappingProxyType({}),
    details: Mapping[str, object] = types.MappingProxyType({}),
) -> Origin:
    """The origin of a result.

    Args:
        network, technique, images: the network, the technique and the images.
        others: further images that the result depends on, by their role: "start", "like".
        details: descriptions of the arguments beyond the typed parameters of the result.

    Example:
        >>> from convscope.images.decode import read_images
        >>> origin(network, "heatmap", read_images(PHOTOS[:1])).network
        'convscope_demo'
    """
    record = {
        "technique": technique,
        "network": network.describe(),
        "pictures": [identified(image) for image in images],
        "other_pictures": [{"role": role, **identified(one)} for role, one in others.items() if one is not None],
        "versions": versions(),
    }
    return Origin(network.name, network.inputs.size, record, dict(details))


def versions() -> dict[str, str]:
    """The versions that a result depends on.

    Example:
        >>> sorted(versions())
        ['convscope', 'numpy', 'pillow', 'python']
    """
    try:
        own = version("convscope")
    except PackageNotFoundError:
        own = "unknown"
    others = {name: version(name) for name in ("numpy", "pillow")}
    return {"convscope": own, "python": platform.python_version(), **others}


def identified(image: InputImage) -> dict[str, object]:
    """An image with a digest in place of its pixels, as plain JSON values."""
    values = {"values_sha256": [array_sha256(values) for values in image.values]} if image.values else {}
    return {
        "name": image.name,
        "source": image.source,
        "notes": list(image.notes),
        "sha256": image.sha256,
        "pixels_sha256": array_sha256(image.pixels),
        **values,
    }


def array_sha256(array: np.ndarray) -> str:
    """The SHA-256 of an array's values, in hexadecimal.

    Example:
        >>> array_sha256(np.zeros(3, np.uint8))[:8]
        '709e80c8'
    """
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
