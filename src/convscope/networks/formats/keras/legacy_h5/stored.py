"""The content of an old Keras file: its version, its config and its weights by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convscope.errors import ModelError, option
from convscope.networks.formats.hdf5 import Contents, Dataset
from convscope.networks.formats.keras import config as keras_config
from convscope.networks.formats.keras.legacy_h5.nodes import Node, Scope, config_of, flat, is_node, layers_of

TOP = "top_level_model_weights"  # the group of weights that belong to no layer


@dataclass(frozen=True)
class Weight:
    """A dataset of the file, its name taken apart: `conv_1/kernel:0` is "kernel" in the scope ("conv_1",)."""

    path: str
    scope: Scope
    name: str
    dataset: Dataset = field(compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return tuple(self.dataset.shape)


@dataclass(frozen=True)
class Stored:
    """The facts that a file states about its model."""

    path: Path
    version: str
    backend: str
    config: Node
    weights: dict[str, list[Weight]]  # by the layer's name (see `flat`), both in the order of the file
    size: int = 0  # numbers in all of its arrays

    @property
    def major(self) -> int:
        """The first number of the version."""
        return major_of(self.version)

    @property
    def channels_first(self) -> bool:
        """True if the layers of Keras 1 lay their maps out channels first (`dim_ordering` "th")."""
        return any(config_of(layer).get("dim_ordering") == "th" for layer in layers_of(self.config))


def major_of(version: str) -> int:
    """The first number of a version."""
    return int(version.split(".")[0])


# Paths of data sets beside the weights: of the optimizer, and what a user keeps in the same file.
BESIDE = r"(?!model_weights(/|$))"


def stored_of(contents: Contents, path: Path) -> Stored:
    """The facts that a whole-model file states.

    Raises:
        ModelError: it holds no whole model, or its config is no JSON of a model.
    """
    config, backend = attribute(contents, "model_config"), attribute(contents, "backend")
    if not config or "model_weights" not in contents.groups:
        raise _not_a_model(path, contents, bool(config))
    version = version_of(contents)
    weights = weights_of(contents, major_of(version) < 2, "model_weights")
    return Stored(path, version, backend, _parsed(config, path), weights, contents.size)


def attribute(contents: Contents, name: str) -> str:
    """A text in the attributes of the file; empty where there is none."""
    value = contents.groups[""].get(name, "")
    return value if isinstance(value, str) else ""


def version_of(contents: Contents) -> str:
    """The version of the Keras that wrote the file; "1" where the file has none, as the first."""
    version = attribute(contents, "keras_version")
    return version if re.match(r"\d+(\.|$)", version) else "1"


def _parsed(text: str, path: Path) -> Node:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{path.name}: expected JSON in its model_config, found something else. The file is damaged."
        raise ModelError(message, code="file-damaged", path=str(path)) from error
    if not is_node(config):
        raise ModelError(
            f"{path.name}: expected the class_name and config of a model in its model_config.",
            code="config-invalid",
            path=path.name,
        )
    keras_config.check_depth(config, path.name)
    return config


def _not_a_model(path: Path, contents: Contents, has_config: bool) -> ModelError:
    """The error of a file that is no whole model."""
    if has_config:
        return ModelError(
            f"{path.name}: expected weights, found the architecture alone. Save the model by model.save().",
            code="no-weights",
            path=str(path),
            found="the architecture alone",
        )
    layers = listed(contents, "", "layer_names") or _modern_layers(contents)
    if not layers:
        layers = listed(contents, "model_weights", "layer_names")
    if layers:
        first = ", ".join(layers[:5]) + (", …" if len(layers) > 5 else "")
        return ModelError(
            f"{path.name}: expected a whole model, found weights without an architecture (of the layers "
            f"{first}). Give the code that makes the network, file.py:function, and this file as {option('weights')}.",
            code="weights-alone",
            path=str(path),
            names=layers,
        )
    held = list(contents.children(""))
    found = ", ".join(map(repr, held[:8])) or "nothing"
    return ModelError(
        f"{path.name}: expected a model saved by Keras, found an HDF5 file without one: it holds {found}.",
        code="not-a-model",
        path=str(path),
        names=held,
    )


def _modern_layers(contents: Contents) -> list[str]:
    """Layers of a `.weights.h5` file of Keras 3."""
    found = [name.split("/")[1] for name in contents.groups if re.fullmatch(r"layers/[^/]+", name)]
    return found if any(name.endswith("/vars") for name in contents.groups) else []


def listed(contents: Contents, group: str, name: str) -> list[str]:
    """A list of names in the attributes of a group; long ones lie in pieces `name0`, `name1`, ... ."""
    attributes = contents.groups.get(group, {})
    if isinstance(attributes.get(name), list):
        return list(attributes[name])
    names: list[str] = []
    while isinstance(attributes.get(f"{name}{len(names)}"), list):
        names.append(f"{name}{len(names)}")
    return [item for piece in names for item in attributes[piece]]


def weights_of(contents: Contents, old_names: bool, top: str) -> dict[str, list[Weight]]:
    """The datasets below the group `top` ("model_weights", or "" in a file of weights alone) by layer.

    Those that no layer claims are under "".
    """
    layers = listed(contents, top, "layer_names") or contents.children(top)
    inside = top + "/" if top else ""
    found: dict[str, list[Weight]] = {layer: [] for layer in [*layers, TOP, ""]}
    ranks = {layer: _ranks(contents, inside + layer) for layer in found}
    for path, dataset in contents.datasets.items():
        if not path.startswith(inside):
            continue
        inner = path.removeprefix(inside)
        layer = _owner(inner, found)
        inner = inner[len(layer) + 1 :] if layer else inner
        if not _is_state(inner):
            found[layer].append(_weight(inner, dataset, old_names))
    return {
        flat(layer): sorted(weights, key=lambda weight: ranks[layer].get(weight.path, len(weights)))
        for layer, weights in found.items()
    }


def _owner(path: str, layers: Mapping[str, object]) -> str:
    """The layer that a path belongs to. Names may contain "/": of "conv1" and "conv1/bn" the longer one is it."""
    parts = path.split("/")
    starts = ("/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((start for start in starts if start in layers), "")


def _ranks(contents: Contents, group: str) -> dict[str, int]:
    return {name: rank for rank, name in enumerate(listed(contents, group, "weight_names"))}


def _is_state(path: str) -> bool:
    """True for what layers keep in their groups beside weights: states of random generators."""
    return re.sub(r":\d+$", "", path).rsplit("/", 1)[-1] in {"seed_generator_state", "StateVar"}


KERAS_1_WEIGHTS = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    "running_std": "moving_variance",  # a variance in spite of its name
    "alphas": "alpha",
    "depthwise_kernel": "depthwise_kernel",
    "pointwise_kernel": "pointwise_kernel",
}
KERAS_1_WEIGHT = re.compile(rf"(?P<layer>.*)_(?P<name>{'|'.join(KERAS_1_WEIGHTS)})(_\d+)?")


def _weight(path: str, dataset: Dataset, old_names: bool) -> Weight:
    *scope, name = re.sub(r":\d+$", "", path).split("/")
    old = KERAS_1_WEIGHT.fullmatch(name) if old_names else None
    if old:  # convolution2d_1_W
        scope, name = [*scope, old["layer"]], KERAS_1_WEIGHTS[old["name"]]
    return Weight(path, tuple(scope), name, dataset)
