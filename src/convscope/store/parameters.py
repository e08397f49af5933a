"""Readers of saved parameters and origins: from the JSON of a result to typed fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from convscope import schema
from convscope.networks import Prediction
from convscope.results import (
    ActivationParameters,
    ConceptParameters,
    FilterParameters,
    HeatmapParameters,
    MethodParameters,
    Origin,
    RecipeParameters,
)
from convscope.results.parameters import AGAINST_CHOICES, LAYER_CHOICES
from convscope.schema import Json
from convscope.store.shelf import IMAGE, PROVENANCE

_SEED = schema.optional(schema.whole(-(2**63), 2**64))
_COUNT = schema.whole(0)


def _memory(value: object, where: str) -> int | str:
    return schema.text(value, where) if isinstance(value, str) else schema.whole(0, 2**62)(value, where)


def _recipe(value: object, where: str) -> RecipeParameters | None:
    if value is None:
        return None
    known = schema.entries({"name": schema.text, "steps": _COUNT})(value, where)
    return RecipeParameters(known["name"], known["steps"], known)


def _option(value: object, where: str) -> int | float | bool | str | None:
    if value is None or isinstance(value, bool):
        return value
    reader = schema.text if isinstance(value, str) else schema.whole() if isinstance(value, int) else schema.number
    found: int | float | str = reader(value, where)
    return found


ACTIVATION_PARAMETERS = schema.record(ActivationParameters, memory=_memory)
FILTER_PARAMETERS = schema.record(
    FilterParameters,
    channels=schema.optional(schema.sequence(_COUNT)),
    recipe=_recipe,
    size=schema.sequence(_COUNT),
    seed=_SEED,
    frame_steps=schema.optional(schema.sequence(_COUNT)),
)
HEATMAP_PARAMETERS = schema.record(
    HeatmapParameters,
    layer_choice=schema.one_of(*LAYER_CHOICES),
    against_choice=schema.one_of(*AGAINST_CHOICES),
    left_out=schema.mapping(schema.text),
    seed=_SEED,
    methods=schema.sequence(schema.record(MethodParameters, options=schema.mapping(_option))),
)
CONCEPT_PARAMETERS = schema.record(ConceptParameters)

WITH_IMAGES: dict[str, schema.Reader] = {"photos": schema.sequence(IMAGE), "provenance": PROVENANCE}
PREDICTION = schema.record(Prediction, index=schema.whole(0))


def read_made(provenance: Mapping[str, Json], reader: schema.Reader) -> tuple[Origin, Json]:
    """The origin and the parameters in a saved provenance that fits `PROVENANCE`."""
    parameters = reader(provenance["parameters"], "provenance.parameters")
    network, known = provenance["network"], {one.name for one in fields(parameters)}
    record = {name: value for name, value in provenance.items() if name != "parameters"}
    details = {name: value for name, value in provenance["parameters"].items() if name not in known}
    size = network["input"]["height"], network["input"]["width"]
    return Origin(network["name"], size, record, details), parameters
