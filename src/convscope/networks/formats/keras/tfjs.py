"""TensorFlow.js layers models: `model.json` with a Keras config and a manifest of weights, and their bytes beside it.

The manifest is a list of groups. A group's files, one after another, hold the values of its weights, one after another.
Files lie in the folder of `model.json` or below; all sizes are compared with theirs before they are read.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convscope import limits, reading
from convscope.errors import ModelError, Unreadable, printable
from convscope.networks.foreign import KerasModel
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.files import ModelFile, beside
from convscope.networks.formats.hdf5 import Dataset
from convscope.networks.formats.keras import config as keras_config
from convscope.networks.formats.keras.legacy_h5 import files as legacy_h5
from convscope.networks.formats.keras.legacy_h5.nodes import Node, config_of, flat, inner_layers, is_node, layers_of
from convscope.networks.formats.keras.legacy_h5.stored import Stored, Weight
from convscope.networks.formats.keras.legacy_h5.weights import fill_model
from convscope.networks.keras.models import OpenedModel
from convscope.schema import Json

# Types of weights, and of the whole numbers or halves that they may be packed as.
_TYPES = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "uint8": "|u1", "bool": "|b1"}
_PACKED = {"uint8": "|u1", "uint16": "<u2", "float16": "<f2"}
_MOST_AXES = 32


def read(file: ModelFile, trust: bool = False) -> OpenedModel:
    """The model of a `model.json` and the files of weights beside it.

    Raises:
        ModelError: it is a graph model, is damaged, keeps weights elsewhere, or can't be built, with the reason.
    """
    path = file.path
    told = _json(path)
    _refuse_graph(path, told)
    topology = told.get("modelTopology")
    config = topology.get("model_config", topology) if isinstance(topology, dict) else None
    if not isinstance(topology, dict) or not isinstance(config, dict) or not is_node(config):
        raise _invalid(path, "the class_name and config of a model in its modelTopology", config=True)
    groups = _groups(path, told)
    arrays = _arrays(path, groups)
    size = sum(array.size for array in arrays.values())
    stored = Stored(path, _version(topology), "tensorflow", config, _by_layer(_owners(config), arrays), size)
    opened = legacy_h5.opened(stored, trust)
    kinds = sorted({declared.packed for group in groups for declared in group.weights if declared.packed})
    packed = (f"weights were packed as {' and '.join(kinds)}, and are as exact as that",) if kinds else ()
    return OpenedModel(
        opened.model, file.source(_said(told, topology), *packed, *opened.translated, beside=_files(groups))
    )


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights of a `model.json` by their names, whatever its config is.

    Raises:
        ModelError: it is damaged, or keeps weights elsewhere.
    """
    return _arrays(path, _groups(path, _json(path)))


def fill(model: KerasModel, path: Path, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Give a model that code has made the weights of a `model.json`, as `read_weights` returns them.

    Raises:
        ModelError: a weight is missing, has another shape, or is left over.
    """
    inside = {layer.name: top.name for top in model.layers for layer in top._flatten_layers()}
    weights = _by_layer({**inside, **{top.name: top.name for top in model.layers}}, arrays)
    return fill_model(model, Stored(path, "2", "tensorflow", {"class_name": "Model", "config": {}}, weights))


def files_of(path: Path) -> list[str]:
    """Names of the files that hold the weights of a `model.json`, relative to its folder.

    Raises:
        ModelError: it is damaged, or keeps weights elsewhere.
    """
    return _files(_groups(path, _json(path)))


def _groups(path: Path, told: Mapping[str, Json]) -> list[_Group]:
    groups = [_Group.of(path, item) for item in _list(path, told.get("weightsManifest"), "weightsManifest")]
    _check_once(path, "file", _files(groups))
    _check_once(path, "weight", [declared.name for group in groups for declared in group.weights])
    _check_amount(path, groups)
    return groups


def _files(groups: list[_Group]) -> list[str]:
    return [name for group in groups for name in group.files]


def _arrays(path: Path, groups: list[_Group]) -> dict[str, np.ndarray]:
    return {name: array for group in groups for name, array in group.arrays(path)}


def _json(path: Path) -> dict[str, Json]:
    try:
        told = reading.json_of(reading.text_of(str(path)))
    except Unreadable as error:
        raise damaged(path, error) from error
    keras_config.check_depth(told, path.name)
    if not isinstance(told, dict):
        raise _invalid(path, "an object with modelTopology and weightsManifest")
    return told


def _refuse_graph(path: Path, told: Mapping[str, Json]) -> None:
    topology = told.get("modelTopology")
    if told.get("format") == "graph-model" or (isinstance(topology, dict) and "node" in topology):
        raise ModelError(
            f"{path} is a TensorFlow.js graph model: TensorFlow's operations, without the layers that they were made "
            "of. Give what it was converted from, a SavedModel folder, .keras or .h5 file; or convert that anew with "
            "tensorflowjs_converter, to its format tfjs_layers_model.",
            code="graph-model",
            path=str(path),
        )


def _invalid(path: Path, expected: str, config: bool = False) -> ModelError:
    return ModelError(
        f"{path.name}: expected {expected}, as TensorFlow.js writes it, found something else. Convert the model anew.",
        code="config-invalid" if config else "file-invalid",
        path=str(path),
        expected=expected,
    )


def _list(path: Path, item: Json, what: str) -> list[Json]:
    if not isinstance(item, list) or len(item) > limits.current().entries:
        raise _invalid(path, f"a list as {what}")
    return item


def _check_once(path: Path, what: str, names: list[str]) -> None:
    if len(names) > limits.current().entries:
        raise ModelError(
            f"{path} names {len(names)} {what}s ({limits.how_to_raise('entries')}).",
            code="input-too-large",
            path=str(path),
            limit="entries",
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise _invalid(path, f"each {what} once, and not {twice[0][:80]!r} twice,")


def _version(topology: Mapping[str, Json]) -> str:
    """Of the Keras that wrote it; TensorFlow.js itself writes configs as Keras 2 does."""
    version = topology.get("keras_version")
    return version if isinstance(version, str) and re.match(r"\d{1,3}(\.|$)", version) else "2"


def _said(told: Mapping[str, Json], topology: Mapping[str, Json]) -> str:
    maker = topology.get("keras_version") or told.get("generatedBy")
    shown = f" of {maker}" if isinstance(maker, str) and maker.isprintable() and len(maker) < 60 else ""
    return f"TensorFlow.js layers model{shown}"


# -- the manifest ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Declared:
    """A weight as the manifest describes it.

    Attributes:
        dtype: NumPy's text for its bytes in the file.
        packed: what its values were rounded to, or None.
        scale, least: its values are whole numbers times the one and plus the other.
        whole: they are whole numbers after that.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    packed: str | None = None
    scale: float = 1.0
    least: float = 0.0
    whole: bool = False

    @classmethod
    def of(cls, path: Path, item: Json) -> _Declared:
        """Raises: ModelError: it is no description of a weight."""
        told = item if isinstance(item, dict) else {}
        name, shape, dtype, packing = (told.get(key) for key in ("name", "shape", "dtype", "quantization"))
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise _invalid(path, "a name for each weight")
        where = f"of the weight {name[:80]!r}"
        if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(map(_is_side, shape)):
            raise _invalid(path, f"whole numbers from 0 on as the shape {where}")
        if not isinstance(dtype, str) or dtype not in _TYPES:
            raise _invalid(path, f"one of {', '.join(_TYPES)} as the dtype {where}")
        if packing is None:
            return cls(name, tuple(shape), _TYPES[dtype])
        packed = packing.get("dtype") if isinstance(packing, dict) else None
        if not isinstance(packed, str) or packed not in _PACKED:
            raise _invalid(path, f"one of {', '.join(_PACKED)} as the quantization {where}")
        if packed == "float16":
            return cls(name, tuple(shape), _PACKED[packed], packed)
        scale, least = packing.get("scale"), packing.get("min")
        if not _is_finite(scale) or not _is_finite(least):
            raise _invalid(path, f"finite numbers as the scale and min {where}")
        return cls(name, tuple(shape), _PACKED[packed], packed, float(scale), float(least), dtype == "int32")

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes these are in the file."""
        return self.count * np.dtype(self.dtype).itemsize

    def array(self, data: memoryview) -> np.ndarray:
        """The values in its bytes."""
        found = np.frombuffer(data, np.dtype(self.dtype)).reshape(self.shape)
        if self.packed in (None, "float16"):
            return found.astype(np.float32) if self.packed else found
        values = (found.astype(np.float64) * self.scale + self.least).astype(np.float32)
        return np.round(values) if self.whole else values


def _is_side(side: Json) -> bool:
    return type(side) is int and 0 <= side < 2**48


def _is_finite(number: Json) -> bool:
    """Also as float32."""
    return type(number) in (int, float) and abs(number) < 1e38


@dataclass(frozen=True)
class _Group:
    """Weights, and the names of the files that hold their bytes."""

    files: tuple[str, ...]
    weights: tuple[_Declared, ...]

    @classmethod
    def of(cls, path: Path, item: Json) -> _Group:
        """Raises: ModelError: it is no group of a manifest."""
        found = item if isinstance(item, dict) else {}
        names = [_plain(path, name) for name in _list(path, found.get("paths"), "the paths of a group")]
        weights = [_Declared.of(path, told) for told in _list(path, found.get("weights"), "the weights of a group")]
        return cls(tuple(names), tuple(weights))

    @property
    def nbytes(self) -> int:
        """How many bytes its weights have."""
        return sum(declared.nbytes for declared in self.weights)

    def arrays(self, path: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Its weights by name."""
        sizes = [_size(path, name) for name in self.files]
        if sum(sizes) != self.nbytes:
            raise ModelError(
                f"{path.name}: expected {self.nbytes:,} bytes of weights in {', '.join(self.files[:3]) or 'no file'}"
                f"{', …' if len(self.files) > 3 else ''}, found {sum(sizes):,}. Copy or download the folder again.",
                code="file-damaged",
                path=str(path),
                expected=self.nbytes,
                found=sum(sizes),
            )
        data, start = memoryview(bytearray(self.nbytes)), 0
        for name, size in zip(self.files, sizes, strict=True):
            _fill(path, name, data[start : start + size])
            start += size
        start = 0
        for declared in self.weights:
            yield declared.name, declared.array(data[start : start + declared.nbytes])
            start += declared.nbytes


def _check_amount(path: Path, groups: list[_Group]) -> None:
    """As float32, which they become; a side of 0 counts as 1, since NumPy bounds the other sides all the same."""
    total = sum(
        4 * math.prod(max(side, 1) for side in declared.shape) for group in groups for declared in group.weights
    )
    if total > limits.current().weights:
        raise ModelError(
            f"{path} declares weights of {limits.shown('weights', total)} ({limits.how_to_raise('weights')}).",
            code="input-too-large",
            path=str(path),
            limit="weights",
        )


# -- the files beside it -----------------------------------------------------------------------------------


def _plain(path: Path, name: Json) -> str:
    """A name of a file in the folder of `model.json` or below, and of none elsewhere.

    Raises:
        ModelError: it is another name, or a link to elsewhere.
    """
    if not isinstance(name, str):
        raise _invalid(path, "names as the paths of a group")
    place = beside(path.parent, name)
    if place is None:
        raise ModelError(
            f"{path} keeps its weights outside of its folder, in '{printable(name)[:80]}', which is not read. Put them "
            "beside it, as files with plain names and not as links.",
            code="weights-outside",
            path=str(path),
            name=name,
        )
    return place.relative_to(path.parent).as_posix()


def _opened(path: Path, name: str) -> reading.FileIO:
    try:
        return reading.opened(str(path.parent / name))
    except Unreadable as error:
        missing = error.code == "file-missing"
        advice = "Put it into the folder." if missing else "Copy or download the folder again."
        raise ModelError(
            f"{path} keeps its weights in {name!r}, which can't be read: {error.message}. {advice}",
            code="weights-missing" if missing else error.code,
            path=str(path),
            name=name,
        ) from error


def _size(path: Path, name: str) -> int:
    with _opened(path, name) as file:
        return os.fstat(file.fileno()).st_size


def _fill(path: Path, name: str, into: memoryview) -> None:
    done = 0
    with _opened(path, name) as file:
        while done < len(into) and (more := file.readinto(into[done : done + 2**24])):
            done += more
    if done != len(into):
        raise ModelError(
            f"{path} keeps its weights in {name!r}, which ended while it was read. Copy or download the folder again.",
            code="file-damaged",
            path=str(path),
            name=name,
        )


# -- from names to layers ----------------------------------------------------------------------------------


def _by_layer(owners: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> dict[str, list[Weight]]:
    """The weights by the outermost layer that their names lead to; those of no layer under ""."""
    found: dict[str, list[Weight]] = {"": []}
    for path, array in arrays.items():
        *scope, name = re.sub(r":\d+$", "", path).split("/")
        owner = _owner(scope, owners)
        weight = Weight(path, tuple(scope), name, Dataset(array.shape, array.dtype.str, array))
        found.setdefault(flat(owner), []).append(weight)
    return found


def _owners(config: Node) -> dict[str, str]:
    """The outermost layer of each name of a layer; its own name counts before that of one inside of another."""
    tops = {_name(top): top for top in inner_layers(config)}
    inside = {_name(layer): name for name, top in tops.items() for layer in layers_of(top)}
    return {**inside, **{name: name for name in tops}}


def _name(layer: Node) -> str:
    return str(config_of(layer).get("name") or layer.get("name") or "")


def _owner(scope: list[str], owners: Mapping[str, str]) -> str:
    """From the outside to the inside the first name of a layer, the longest first: names may contain "/"."""
    scope = scope[:_MOST_AXES]
    spans = ((start, end) for start in range(len(scope)) for end in range(len(scope), start, -1))
    return next((owners[name] for start, end in spans if (name := "/".join(scope[start:end])) in owners), "")
