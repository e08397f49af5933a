"""Whole-model HDF5 files of Keras 1, 2 and 3, opened by their content and never by their name.

Four steps: understand the file without trusting it (`stored.py`), migrate its config to what today's Keras deserialises
(`migrations/`, one for each change of the format), build the model (`building.py`), and put each weight where it
belongs by layer path, weight name and shape (`weights.py`). Nothing is assigned before every dataset
of the file has found its variable and every variable its dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from convscope.errors import ModelError
from convscope.networks.foreign import KerasModel
from convscope.networks.formats import hdf5
from convscope.networks.formats.files import KINDS, ModelFile
from convscope.networks.formats.hdf5 import Contents
from convscope.networks.formats.keras import lambdas
from convscope.networks.formats.keras.legacy_h5.building import model_of, refuse_unknown, registered_key
from convscope.networks.formats.keras.legacy_h5.code import refuse_code
from convscope.networks.formats.keras.legacy_h5.migrations.table import migrate
from convscope.networks.formats.keras.legacy_h5.nodes import Node, is_node
from convscope.networks.formats.keras.legacy_h5.stored import (
    BESIDE,
    Stored,
    Weight,
    attribute,
    listed,
    major_of,
    stored_of,
    version_of,
    weights_of,
)
from convscope.networks.formats.keras.legacy_h5.weights import fill_model


@dataclass(frozen=True)
class Opened:
    """The result of `read` on a file.

    Attributes:
        model: the network, with the weights of the file and without its optimizer.
        version: of the Keras that wrote the file, "2.1.6"; "1" where the file has none, as the first.
        translated: the changes for today's Keras, a line each, in the order of the changes; empty
            where the file could be taken as it is.
    """

    model: KerasModel
    version: str
    translated: tuple[str, ...]


def read(file: ModelFile, trust: bool = False) -> Opened:
    """Open a Keras whole-model HDF5 file.

    Args:
        file: its name plays no part.
        trust: run Python code that the file carries (`Lambda` layers of Keras 3). Bytecode of Keras 1 and 2
            is never run.

    Raises:
        ModelError: the file is damaged, is not Keras', has no architecture, carries code, names a layer that
            Keras does not know, or its weights and its architecture do not fit each other.
        BackendError: h5py is not installed.
    """
    path = file.path
    if file.kind != "hdf5":
        raise ModelError(
            f"{path.name}: expected a model in an HDF5 file, found {KINDS[file.kind]}.",
            code="file-of-another-kind",
            path=str(path),
            found=file.kind,
        )
    return opened(stored_of(hdf5.read(path, but=BESIDE), path), trust)


def opened(stored: Stored, trust: bool = False) -> Opened:
    """The model of a config and weights by layer, wherever they were read.

    Raises:
        ModelError: see `read`.
    """
    config, decided = lambdas.resolved(stored.config, stored.path.name, registered_key(lambdas.NAME) is not None)
    stored = replace(stored, config=config)
    refuse_code(stored, trust)
    said = migrate(stored)
    refuse_unknown(stored)
    model = model_of(stored, trust)
    said += fill_model(model, stored)
    return Opened(model, stored.version, (*decided, *said))


def build(path: Path, version: str, config: Node, size: int, trust: bool) -> tuple[KerasModel, list[str]]:
    """A model with fresh weights from a config of Keras 2 that came from elsewhere, and its changes.

    Args:
        path: of the file.
        version: of the Keras that wrote it.
        config: the architecture.
        size: the number of values of its weights.
        trust: run Python code that it carries.

    Raises:
        ModelError: the config can't be read, or names a layer that Keras does not know.
    """
    if not is_node(config):
        raise ModelError(
            f"{path.name}: expected the class_name and config of a model in its config.",
            code="config-invalid",
            path=path.name,
        )
    stored = Stored(path, version, "tensorflow", config, {}, size)
    said = migrate(stored)
    refuse_unknown(stored)
    return model_of(stored, trust), said


def holds_layers(contents: Contents) -> bool:
    """True for HDF5 files that keep weights by layer, as Keras 1 and 2 wrote them, whole models among them."""
    return bool(listed(contents, "", "layer_names")) or "model_weights" in contents.groups


def fill(model: KerasModel, path: Path, contents: Contents) -> list[str]:
    """Give a model that code has made the weights in a file of Keras 1 or 2, by names of layers and weights.

    Where layers differ from the file's in their automatic numbers alone (conv2d_1, conv2d_5), their order within the
    same stem decides, and that is said.

    Raises:
        ModelError: a weight is missing, has another shape, or is left over.
    """
    version = version_of(contents)
    top = "model_weights" if "model_weights" in contents.groups else ""
    weights = weights_of(contents, major_of(version) < 2, top)
    named, said = _renumbered(weights, [layer.name for layer in model.layers if layer.weights])
    backend = attribute(contents, "backend")
    stored = Stored(path, version, backend, {"class_name": "Model", "config": {}}, named)
    return said + fill_model(model, stored)


def _renumbered(weights: dict[str, list[Weight]], layers: list[str]) -> tuple[dict[str, list[Weight]], list[str]]:
    """The weights under the names of the model's layers, where these differ in numbers alone."""
    full = {name: found for name, found in weights.items() if found}
    if set(full) == set(layers):
        return full, []
    in_file, in_model = _by_stem(full), _by_stem(layers)
    if {stem: len(names) for stem, names in in_file.items()} != {stem: len(names) for stem, names in in_model.items()}:
        return full, []  # missing and left-over weights are reported by name
    places = {old: new for stem, names in in_file.items() for old, new in zip(names, in_model[stem], strict=True)}
    moved = ", ".join(f"{old} to {new}" for old, new in list(places.items())[:4] if old != new)
    said = f"layers are numbered otherwise in the file, so their order decided ({moved}, …)"
    return {places[name]: found for name, found in full.items()}, [said]


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    return stems
