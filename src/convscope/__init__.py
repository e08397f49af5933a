"""convscope: a microscope for convolutional networks.

>>> import convscope
>>> network = convscope.open_model("model.keras")                          # doctest: +SKIP
>>> convscope.activations(network, "photo.jpg")                            # doctest: +SKIP
>>> convscope.filters(network, layer="conv2d_3", channels=range(16))       # doctest: +SKIP
>>> convscope.heatmap(network, "photo.jpg", target="cat")                  # doctest: +SKIP

Importing convscope loads no framework; each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convscope.diagnosis import doctor as doctor
    from convscope.errors import ConvscopeError as ConvscopeError
    from convscope.images.source import image_source as image_source
    from convscope.networks import open_model as open_model
    from convscope.reports import report as report
    from convscope.requests import Request as Request
    from convscope.session import Session as Session
    from convscope.store import load as load
    from convscope.store import load_all as load_all
    from convscope.store import save as save
    from convscope.techniques.activations import activations as activations
    from convscope.techniques.filters import filters as filters
    from convscope.techniques.heatmaps import heatmap as heatmap
    from convscope.techniques.heatmaps.concepts import concepts as concepts

# No module of the package itself bears one of these names: importing it would take the function's place.
_HOMES = {
    "ConvscopeError": "convscope.errors",
    "Request": "convscope.requests",
    "Session": "convscope.session",
    "activations": "convscope.techniques.activations",
    "concepts": "convscope.techniques.heatmaps.concepts",
    "doctor": "convscope.diagnosis",
    "filters": "convscope.techniques.filters",
    "heatmap": "convscope.techniques.heatmaps",
    "image_source": "convscope.images.source",
    "load": "convscope.store",
    "load_all": "convscope.store",
    "open_model": "convscope.networks",
    "report": "convscope.reports",
    "save": "convscope.store",
}

__all__ = [
    "ConvscopeError",
    "Request",
    "Session",
    "activations",
    "concepts",
    "doctor",
    "filters",
    "heatmap",
    "image_source",
    "load",
    "load_all",
    "open_model",
    "report",
    "save",
]
_GIVE_RESULTS = ("activations", "concepts", "filters", "heatmap")


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'convscope' has no attribute {name!r}")
    if name in _GIVE_RESULTS:
        importlib.import_module("convscope.render")  # it sets the display of results in a notebook
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
