"""The results of the techniques: frozen values with typed parameters. No drawing (`render`) and no files (`store`)."""

from convscope.results.activations import Activations, LayerStatistics
from convscope.results.base import Origin, Result, array_sha256, origin, versions
from convscope.results.concepts import Concept, Concepts
from convscope.results.filters import SORTS, STATUSES, FilterRow, Filters
from convscope.results.heatmaps import Check, Heatmap, HeatmapRow
from convscope.results.parameters import (
    ActivationParameters,
    ConceptParameters,
    FilterParameters,
    HeatmapParameters,
    MethodParameters,
    Parameters,
    RecipeParameters,
)

__all__ = [
    "SORTS",
    "STATUSES",
    "ActivationParameters",
    "Activations",
    "Check",
    "Concept",
    "ConceptParameters",
    "Concepts",
    "FilterParameters",
    "FilterRow",
    "Filters",
    "Heatmap",
    "HeatmapParameters",
    "HeatmapRow",
    "LayerStatistics",
    "MethodParameters",
    "Origin",
    "Parameters",
    "RecipeParameters",
    "Result",
    "array_sha256",
    "origin",
    "versions",
]
