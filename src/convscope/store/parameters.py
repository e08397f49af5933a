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
    Result,
)
from convscope.results.parameters import AGAINST_CHOICES, LAYER_CHOICES
from convscope.schema import Json
from convscope.store.shelf import IMAGE

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

_NETWORK = schema.entries({
    "name": schema.text,
    "input_size": schema.optional(schema.sequence(schema.whole(1, 65536), 2, 2)),
})  # fmt: skip


def _record(value: object, where: str) -> dict[str, Json]:
    """A provenance as it is, without the parameters, which the manifest has in an entry of their own."""
    found = dict(schema.table(value, where))
    found.pop("parameters", None)
    return found


MADE: dict[str, schema.Reader] = {"network": _NETWORK, "parameters": schema.table, "provenance": _record}
WITH_IMAGES: dict[str, schema.Reader] = {"photos": schema.sequence(IMAGE), **MADE}
PREDICTION = schema.record(Prediction, index=schema.whole(0))


def describe_made(result: Result) -> dict[str, Json]:
    """The entries of a manifest from which `read_made` reads the origin and the parameters."""
    origin = result.origin
    return {"network": {"name": origin.network, "input_size": origin.input_size}, "parameters": result.described()}


def read_made(manifest: Mapping[str, Json], reader: schema.Reader) -> tuple[Origin, Json]:
    """The origin and the parameters of a manifest that fits `MADE`; its provenance is kept as it is, unread."""
    parameters = reader(manifest["parameters"], "parameters")
    known = {one.name for one in fields(parameters)}
    details = {name: value for name, value in manifest["parameters"].items() if name not in known}
    network = manifest["network"]
    return Origin(network["name"], network["input_size"], manifest["provenance"], details), parameters
