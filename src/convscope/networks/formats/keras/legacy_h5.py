"""Whole-model HDF5 files of Keras 1, 2 and 3, opened by what they hold and never by what they are called.

Three steps, in the order of this file: *look* at the file without trusting it, *translate* its config to
what today's Keras deserialises (`RULES`, one for each change of the format), and put each weight where it
belongs by layer path, weight name and shape. Nothing is assigned before every dataset of the file has found
its variable and every variable its dataset.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convscope.errors import ModelError
from convscope.networks.formats import hdf5
from convscope.networks.formats.files import is_hdf5
from convscope.networks.formats.hdf5 import Contents, Dataset
from convscope.networks.formats.keras import config as keras_config

Node = dict[str, Any]  # a serialised object: {"class_name": ..., "config": ...}
Scope = tuple[str, ...]  # names of layers from the outside to the inside

TOP = "top_level_model_weights"  # the group of weights that belong to no layer


@dataclass(frozen=True)
class Opened:
    """What `read` made of a file.

    Attributes:
        model: the network, with the weights of the file and without its optimizer.
        version: of the Keras that wrote the file, "2.1.6"; "1" where the file does not say, as the first.
        translated: what had to be changed for today's Keras, a line each, in the order of the changes; empty
            where the file could be taken as it is.
    """

    model: Any
    version: str
    translated: tuple[str, ...]


def read(path: Path | str, trust: bool = False) -> Opened:
    """Open the Keras whole-model HDF5 file at `path`.

    Args:
        path: the file; its name plays no part.
        trust: run Python code that the file carries (`Lambda` layers of Keras 3). Bytecode of Keras 1 and 2
            is never run.

    Raises:
        ModelError: the file is damaged, is not Keras', has no architecture, carries code, names a layer that
            Keras does not know, or its weights and its architecture do not fit each other.
        BackendError: h5py is not installed.
    """
    path = Path(path)
    if not is_hdf5(path):
        found = "another format" if path.is_file() else "no such file"
        raise ModelError(f"{path.name}: expected a model in an HDF5 file, found {found}.")
    stored = _look(hdf5.read(path, but=BESIDE), path)
    _refuse_code(stored, trust)
    said = _translate(stored)
    _refuse_unknown(stored)
    model = _build(stored, trust)
    said += _fill(model, stored)
    return Opened(model, stored.version, tuple(said))


def build(path: Path, version: str, config: Node, size: int, trust: bool) -> tuple[Any, list[str]]:
    """A model with fresh weights from a config of Keras 2 that came from elsewhere, and what was translated.

    Args:
        path: of the file.
        version: of the Keras that wrote it.
        config: the architecture.
        size: how many numbers its weights are.
        trust: run Python code that it carries.

    Raises:
        ModelError: the config can't be read, or names a layer that Keras does not know.
    """
    if not _is_node(config):
        raise ModelError(f"{path.name}: expected the class_name and config of a model in its config.")
    stored = Stored(path, version, "tensorflow", config, {}, size)
    said = _translate(stored)
    _refuse_unknown(stored)
    return _build(stored, trust), said


def holds_layers(contents: Contents) -> bool:
    """True for HDF5 files that keep weights by layer, as Keras 1 and 2 wrote them, whole models among them."""
    return bool(_listed(contents, "", "layer_names")) or "model_weights" in contents.groups


def fill(model: Any, path: Path, contents: Contents) -> list[str]:
    """Give a model that code has made the weights in a file of Keras 1 or 2, by names of layers and weights.

    Where layers differ from the file's in their automatic numbers alone (conv2d_1, conv2d_5), their order within the
    same stem decides, and that is said.

    Raises:
        ModelError: a weight is missing, has another shape, or is left over.
    """
    version = _version(contents)
    top = "model_weights" if "model_weights" in contents.groups else ""
    weights = _weights(contents, _major(version) < 2, top)
    named, said = _renumbered(weights, [layer.name for layer in model.layers if layer.weights])
    backend = _attribute(contents, "backend")
    stored = Stored(path, version, backend, {"class_name": "Model", "config": {}}, named)
    return said + _fill(model, stored)


def _renumbered(weights: dict[str, list[Weight]], layers: list[str]) -> tuple[dict[str, list[Weight]], list[str]]:
    """The weights under the names of the model's layers, where these differ in numbers alone."""
    full = {name: found for name, found in weights.items() if found}
    if set(full) == set(layers):
        return full, []
    in_file, in_model = _by_stem(full), _by_stem(layers)
    if {stem: len(names) for stem, names in in_file.items()} != {stem: len(names) for stem, names in in_model.items()}:
        return full, []  # what is missing and what is left over is said by name
    places = {old: new for stem, names in in_file.items() for old, new in zip(names, in_model[stem], strict=True)}
    moved = ", ".join(f"{old} to {new}" for old, new in list(places.items())[:4] if old != new)
    said = f"layers are numbered otherwise in the file, so their order decided ({moved}, …)"
    return {places[name]: found for name, found in full.items()}, [said]


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    return stems


# ------------------------------------------------------------------------------------------------------------
# Look: what the file says, made sense of.


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
    """What a file says about its model."""

    path: Path
    version: str
    backend: str
    config: Node
    weights: dict[str, list[Weight]]  # by the layer's name (made `_flat`), both in the order of the file
    size: int = 0  # numbers in all of its arrays

    @property
    def major(self) -> int:
        """The first number of the version."""
        return _major(self.version)

    @property
    def channels_first(self) -> bool:
        """True if the layers of Keras 1 lay their maps out channels first (`dim_ordering` "th")."""
        return any(_config(layer).get("dim_ordering") == "th" for layer in _layers(self.config))


def _major(version: str) -> int:
    return int(version.split(".")[0])


# Paths of data sets beside the weights: of the optimizer, and what a user keeps in the same file.
BESIDE = r"(?!model_weights(/|$))"


def _look(contents: Contents, path: Path) -> Stored:
    config, backend = _attribute(contents, "model_config"), _attribute(contents, "backend")
    if not config or "model_weights" not in contents.groups:
        raise ModelError(_not_a_model(path, contents, bool(config)))
    version = _version(contents)
    weights = _weights(contents, _major(version) < 2, "model_weights")
    return Stored(path, version, backend, _parsed(config, path), weights, contents.size)


def _attribute(contents: Contents, name: str) -> str:
    """A text in the attributes of the file; empty where there is none."""
    value = contents.groups[""].get(name, "")
    return value if isinstance(value, str) else ""


def _version(contents: Contents) -> str:
    version = _attribute(contents, "keras_version")
    return version if re.match(r"\d+(\.|$)", version) else "1"


def _parsed(text: str, path: Path) -> Node:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{path.name}: expected JSON in its model_config, found something else. The file is damaged."
        raise ModelError(message) from error
    if not _is_node(config):
        raise ModelError(f"{path.name}: expected the class_name and config of a model in its model_config.")
    keras_config.check_depth(config, path.name)
    return config


def _not_a_model(path: Path, contents: Contents, has_config: bool) -> str:
    """Why the file is no whole model, and what to do."""
    if has_config:
        return f"{path.name}: expected weights, found the architecture alone. Save the model by model.save()."
    layers = _listed(contents, "", "layer_names") or _modern_layers(contents)
    if not layers:
        layers = _listed(contents, "model_weights", "layer_names")
    if layers:
        first = ", ".join(layers[:5]) + (", …" if len(layers) > 5 else "")
        return (
            f"{path.name}: expected a whole model, found weights without an architecture (of the layers "
            f"{first}). Give the code that makes the network: convscope layers file.py:function --weights {path}."
        )
    found = ", ".join(repr(name) for name in contents.children("")[:8]) or "nothing"
    return f"{path.name}: expected a model saved by Keras, found an HDF5 file without one: it holds {found}."


def _modern_layers(contents: Contents) -> list[str]:
    """Layers of a `.weights.h5` file of Keras 3."""
    found = [name.split("/")[1] for name in contents.groups if re.fullmatch(r"layers/[^/]+", name)]
    return found if any(name.endswith("/vars") for name in contents.groups) else []


def _listed(contents: Contents, group: str, name: str) -> list[str]:
    """A list of names in the attributes of a group; long ones lie in pieces `name0`, `name1`, ... ."""
    attributes = contents.groups.get(group, {})
    if isinstance(attributes.get(name), list):
        return list(attributes[name])
    names: list[str] = []
    while isinstance(attributes.get(f"{name}{len(names)}"), list):
        names.append(f"{name}{len(names)}")
    return [item for piece in names for item in attributes[piece]]


def _weights(contents: Contents, old_names: bool, top: str) -> dict[str, list[Weight]]:
    """The datasets below the group `top` ("model_weights", or "" in a file of weights alone) by layer.

    Those that no layer claims are under "".
    """
    layers = _listed(contents, top, "layer_names") or contents.children(top)
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
        _flat(layer): sorted(weights, key=lambda weight: ranks[layer].get(weight.path, len(weights)))
        for layer, weights in found.items()
    }


def _owner(path: str, layers: Mapping[str, Any]) -> str:
    """The layer that a path belongs to. Names may contain "/": of "conv1" and "conv1/bn" the longer one is it."""
    parts = path.split("/")
    starts = ("/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((start for start in starts if start in layers), "")


def _ranks(contents: Contents, group: str) -> dict[str, int]:
    return {name: rank for rank, name in enumerate(_listed(contents, group, "weight_names"))}


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


# ------------------------------------------------------------------------------------------------------------
# Code in the file.

# Layers whose config is code, or names a file that holds code.
CODE = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")


def _refuse_code(stored: Stored, trust: bool) -> None:
    """Raise ModelError if building the model would run code that the file carries."""
    found = list(code_layers(stored.config, ""))
    if not found:
        return
    names = ", ".join(dict.fromkeys(f"{class_name} layer {layer!r}" for class_name, layer, _ in found))
    head = f"{stored.path.name}: expected no code in the file, found Python code in the {names}"
    if stored.major < 3 or any(bytecode for _, _, bytecode in found):
        raise ModelError(
            f"{head}. Keras {stored.version} kept it as bytecode or by name alone, which no other Python can "
            "run, not even with --trust. Write the architecture as a function and take the weights alone: "
            f"convscope layers file.py:function --weights {stored.path}."
        )
    if not trust:
        raise ModelError(f"{head}. If you trust the file, give --trust to run it.")


def code_layers(item: Any, layer: str) -> Iterator[tuple[str, str, bool]]:
    """Class and name of the layers that hold code, and whether it is bytecode as Keras 1 and 2 wrote it."""
    if isinstance(item, dict):
        config, class_name = item.get("config"), item.get("class_name")
        if isinstance(config, dict) and isinstance(config.get("name"), str):
            layer = config["name"]
        if class_name == "__lambda__":  # the code itself: inside a Lambda, or an activation
            yield "Lambda", layer, False
        elif class_name in CODE or (class_name == "Merge" and _is_bytecode(config)):
            yield class_name, layer, _is_bytecode(config)
    if isinstance(item, (dict, list)):
        for child in item.values() if isinstance(item, dict) else item:
            yield from code_layers(child, layer)


def _is_bytecode(config: Any) -> bool:
    """True if an argument is the list `[code, defaults, closure]` that Keras 1 and 2 made of a lambda."""
    if not isinstance(config, dict):
        return False
    values = [config.get(key) for key in ("function", "output_shape", "mask", "mode")]
    return any(isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) for value in values)


# ------------------------------------------------------------------------------------------------------------
# Translate: each rule looks at one layer of the config, changes it in place and says whether it did.


@dataclass(frozen=True)
class Rule:
    """One change of the format.

    Attributes:
        said: what `Opened.translated` says when the rule changed something.
        change: given a layer of the config and what the file says; True if it changed the layer.
    """

    said: str
    change: Callable[[Node, Stored], bool]


# Keys of a layer's config under which other layers lie.
INNER = ("layers", "layer", "forward_layer", "backward_layer", "cell", "cells", "activation")
MODELS = {"Sequential", "Functional", "Model"}


def _is_node(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("class_name"), str)
        and isinstance(item.get("config"), (dict, list))
    )


def _config(layer: Node) -> Node:
    """The arguments of a layer; none for a Sequential that is still a plain list."""
    return layer["config"] if isinstance(layer["config"], dict) else {}


def _inner(layer: Node) -> list[Node]:
    """The layers directly inside a layer: of a model, a wrapper or a cell, or one used as an activation."""
    config = layer["config"]
    values = [config] if isinstance(config, list) else [config.get(key) for key in INNER]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in items if _is_node(item) and item["class_name"] != "function"]


def _layers(layer: Node) -> Iterator[Node]:
    yield layer
    for inner in _inner(layer):
        yield from _layers(inner)


def _is_graph(layer: Node) -> bool:
    """True for a functional model whose nodes are the nested lists that Keras 1 and 2 wrote."""
    config = _config(layer)
    nodes = [node for inner in _inner(layer) for node in inner.get("inbound_nodes") or []]
    return "output_layers" in config and all(isinstance(node, list) for node in nodes)


def _references(item: Any) -> Iterator[list[Any]]:
    """The references `["layer", node, tensor, ...]` in inbound nodes and in lists of inputs and outputs."""
    if not isinstance(item, (list, dict)):
        return
    if isinstance(item, list) and len(item) >= 3 and isinstance(item[0], str) and isinstance(item[1], int):
        yield item
        item = item[3:]
    for child in item.values() if isinstance(item, dict) else item:
        yield from _references(child)


def _change(config: Node, key: str, value: Any) -> bool:
    """Set a value; True if it was another one."""
    changed = key not in config or config[key] != value
    config[key] = value
    return changed


def sequential_list(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.2.2: the config of a Sequential is the list of its layers."""
    if layer["class_name"] != "Sequential" or not isinstance(layer["config"], list):
        return False
    layer["config"] = {"name": layer.get("name"), "layers": layer["config"]}
    return True


def nested_names(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.2.2: such a list has no name; inside a Sequential only the weights know it."""
    names = [name for name in stored.weights if name not in ("", TOP)]
    inner = _inner(layer)
    if layer is not stored.config or layer["class_name"] != "Sequential" or len(inner) != len(names):
        return False
    pairs = [(item["config"], name) for item, name in zip(inner, names, strict=True)]
    nameless = [(config, name) for config, name in pairs if config.get("name") is None]
    if any(_flat(config.get("name") or name) != name for config, name in pairs):
        return False
    for config, name in nameless:
        config["name"] = name
    return bool(nameless)


def first_shape(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.3 (tf.keras before 2.2): a Sequential has no InputLayer, its first layer has the shape.

    Keras 3 takes that shape, batch and all, for the shape of one picture, and looks for none in a nested
    model that is the only layer.
    """
    inner = _inner(layer)
    if layer["class_name"] != "Sequential" or not inner or inner[0]["class_name"] == "InputLayer":
        return False
    given = _given(inner[0])
    if "batch_input_shape" not in given:
        return False
    dtype = given.get("input_dtype", given.get("dtype"))
    config = {
        "name": f"{_config(inner[0]).get('name')}_input",
        "batch_shape": given["batch_input_shape"],
        "dtype": dtype if isinstance(dtype, str) else "float32",
    }
    layer["config"]["layers"].insert(0, {"class_name": "InputLayer", "config": config})
    return True


def _given(layer: Node) -> Node:
    """The arguments with the shape of a layer's input: its own, or those of a nested model's one input."""
    config, inner = _config(layer), _inner(layer)
    if layer["class_name"] not in MODELS or "batch_input_shape" in config:
        return config
    inputs = [item for item in inner if item["class_name"] == "InputLayer"]
    if not inputs and layer["class_name"] == "Sequential":
        inputs = inner[:1]
    return _given(inputs[0]) if len(inputs) == 1 else {}


def input_shape(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: an InputLayer's shape is its `batch_input_shape`, and other layers may repeat it."""
    shape = _config(layer).pop("batch_input_shape", None)
    if shape is not None and layer["class_name"] == "InputLayer":
        layer["config"]["batch_shape"] = shape
    return shape is not None


def axis_list(layer: Node, stored: Stored) -> bool:
    """tf.keras: the one axis of a normalisation is a list.

    Keras 3 mends this where the layer has no module, not inside wrappers.
    """
    axis = _config(layer).get("axis")
    if layer["class_name"] != "BatchNormalization" or not (isinstance(axis, list) and len(axis) == 1):
        return False
    return _change(layer["config"], "axis", axis[0])


def dtype_policy(layer: Node, stored: Stored) -> bool:
    """tf.keras 2.1 to 2.15: a mixed-precision `Policy` is today's `DTypePolicy`."""
    policy: Any = _config(layer).get("dtype")
    if not _is_node(policy) or policy["class_name"] not in ("Policy", "PolicyV1"):
        return False
    name = _config(policy).get("name")
    known = name in ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float32", "float64")
    config = {"name": name if known else "float32"}
    today = {"module": "keras", "class_name": "DTypePolicy", "registered_name": None}
    layer["config"]["dtype"] = {**today, "config": config}
    return True


RENAMED_CLASSES = {
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
    "ThresholdedReLU": "ReLU",
    # Outside training they hand on what they are given.
    "RandomHeight": "Identity",
    "RandomWidth": "Identity",
}


def renamed_class(layer: Node, stored: Stored) -> bool:
    """Keras 2: layers that live on under another name."""
    new = RENAMED_CLASSES.get(layer["class_name"])
    if new == "Identity":
        layer["config"] = {"name": _config(layer).get("name")}
    if new == "ReLU":
        layer["config"]["threshold"] = layer["config"].pop("theta", 1.0)
    layer["class_name"] = new or layer["class_name"]
    return new is not None


ANYTHING = object()
# (layers, argument, value that changes nothing outside training): other values stay, and Keras refuses them.
DROPPED = (
    (r"DepthwiseConv[12]D|SeparableConv[12]D|Conv[123]DTranspose", "groups", 1),
    (r"SeparableConv[12]D", "kernel_initializer", ANYTHING),
    (r"SeparableConv[12]D", "kernel_regularizer", ANYTHING),
    (r"SeparableConv[12]D", "kernel_constraint", ANYTHING),
    (r"SpatialDropout[123]D", "noise_shape|trainable", ANYTHING),
    (r"Random.*", "rng_type", ANYTHING),
    (r"LSTM|GRU|SimpleRNN|RNN|ConvLSTM[123]D", "time_major", False),
    (r"MultiHeadAttention", "(query|key|value)_shape", ANYTHING),
    (r"MultiHeadAttention", "softmax_robust_masking", False),
    (r"Attention|AdditiveAttention", "causal", False),
)


def dropped_argument(layer: Node, stored: Stored) -> bool:
    """tf.keras 2: arguments that Keras 3 does not take any more and that change nothing."""
    config = _config(layer)
    gone = [
        key
        for classes, argument, value in DROPPED
        if re.fullmatch(classes, layer["class_name"])
        for key in config
        if re.fullmatch(argument, key) and (value is ANYTHING or config[key] == value)
    ]
    for key in gone:
        del config[key]
    return bool(gone)


def leaky_slope(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: the slope of LeakyReLU is `alpha`."""
    if layer["class_name"] != "LeakyReLU" or "alpha" not in _config(layer):
        return False
    layer["config"]["negative_slope"] = layer["config"].pop("alpha")
    return True


def initializer_arguments(layer: Node, stored: Stored) -> bool:
    """tf.keras 1.13 to 1.15: initializers have a `dtype`."""
    arguments = [value for key, value in _config(layer).items() if key.endswith("_initializer")]
    gone = [_config(item).pop("dtype", None) for item in arguments if _is_node(item)]
    return any(item is not None for item in gone)


def gru_bias(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.1: a GRU without `reset_after` has one bias; the default is two since."""
    old = layer["class_name"] == "GRU" and stored.major < 3 and "reset_after" not in _config(layer)
    return old and _change(layer["config"], "reset_after", False)


ACTIVATIONS = {
    "softmax_v2": "softmax",  # TensorFlow's own name of tf.nn.softmax, 2.0 to 2.3
    "hard_sigmoid": {
        "module": "builtins", "class_name": "function", "config": "hard_sigmoid_of_keras_2",
        "registered_name": "hard_sigmoid_of_keras_2",
    },
}  # fmt: skip


def activation_name(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: activations of another name; a hard_sigmoid of slope 0.2 where Keras 3 has 1/6."""
    config = _config(layer)
    keys = [key for key in ("activation", "recurrent_activation") if isinstance(config.get(key), str)]
    old = [key for key in keys if config[key] in ACTIVATIONS and stored.major < 3]
    for key in old:
        config[key] = copy.deepcopy(ACTIVATIONS[config[key]])
    return bool(old)


def hard_sigmoid_of_keras_2(x: Any) -> Any:
    """Keras 1 and 2: 0.2 x + 0.5 between 0 and 1."""
    from keras import ops

    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


RESCALING: dict[str, Callable[[float], tuple[float, float]]] = {
    "math.truediv": lambda y: (1 / y, 0.0),
    "math.divide": lambda y: (1 / y, 0.0),
    "math.multiply": lambda y: (y, 0.0),
    "math.add": lambda y: (1.0, y),
    "__operators__.add": lambda y: (1.0, y),
    "math.subtract": lambda y: (1.0, -y),
}


def tensorflow_operation(layer: Node, stored: Stored) -> bool:
    """tf.keras 2.4 to 2.15: `x / 127.5 - 1` in a functional model is a TFOpLambda for each operation.

    With a number this is Rescaling; `tf.nn.relu` is an Activation. Others stay, and are unknown to Keras 3.
    """
    if layer["class_name"] != "TFOpLambda":
        return False
    function, nodes = _config(layer).get("function"), layer.get("inbound_nodes", [])
    arguments = _as_layer(function, nodes)
    if arguments is None:
        return False
    layer["class_name"], extra = arguments
    layer["config"] = {"name": layer["config"].get("name"), **extra}
    layer["inbound_nodes"] = [[[*node[:3], {}]] for node in (_only_reference(item) for item in nodes)]
    return True


def _as_layer(function: Any, nodes: list[Any]) -> tuple[str, Node] | None:
    """The layer that does what the TensorFlow function does in all its calls, or None where there is none."""
    calls = [_only_reference(node)[3:] for node in nodes]
    options = [{key: value for key, value in call[0].items() if value is not None} for call in calls if call]
    if not options or len(options) != len(calls) or any(option != options[0] for option in options):
        return None
    given, constant = options[0], options[0].get("y")
    if function in RESCALING and set(given) == {"y"} and isinstance(constant, (int, float)):
        scale, offset = RESCALING[function](constant)
        return "Rescaling", {"scale": scale, "offset": offset}
    if function in ("nn.relu", "nn.relu6", "nn.softmax", "math.sigmoid", "math.tanh") and not given:
        return "Activation", {"activation": function.split(".")[1]}
    return None


def _only_reference(node: Any) -> list[Any]:
    """The one reference of a node that has one, else an empty list."""
    found = list(_references(node))
    return found[0] if len(found) == 1 else []


def flat_name(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: a layer may be called "conv1/bn"; Keras 3 has no "/" in names."""
    old = [inner["config"]["name"] for inner in _inner(layer) if "/" in str(_config(inner).get("name"))]
    if not old:
        return False
    for inner in _inner(layer):
        for holder in (inner, _config(inner)):
            if isinstance(holder.get("name"), str):
                holder["name"] = _flat(holder["name"])
    config = _config(layer)
    calls = [inner.get("inbound_nodes") for inner in _inner(layer)]
    for reference in _references([calls, config.get("input_layers"), config.get("output_layers")]):
        reference[0] = _flat(reference[0])
    return True


def _flat(name: str) -> str:
    return name.replace("/", "_")


def nested_nodes(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: the first call of a nested model is node 1, as node 0 is the model itself; now it is 0.

    Keras 3 counts that way in the outputs of a graph alone, and there for functional models alone.
    """
    if not _is_graph(layer):
        return False
    inner = _inner(layer)
    kinds = {item.get("name"): item["class_name"] for item in inner if item["class_name"] in MODELS}
    calls = _references([item.get("inbound_nodes") for item in inner])
    outputs = _references(layer["config"]["output_layers"])
    counted = [reference for reference in calls if reference[0] in kinds]
    counted += [reference for reference in outputs if kinds.get(reference[0]) == "Sequential"]
    late = [reference for reference in counted if reference[1] > 0]
    for reference in late:
        reference[1] -= 1
    return bool(late)


def single_tensor(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: one input or output is a list of one; Keras 3 makes a model of it that wants a list."""
    if not _is_graph(layer):
        return False
    config, changed = layer["config"], False
    for key in ("input_layers", "output_layers"):
        if len(config[key]) == 1 and isinstance(config[key][0], list):
            changed = _change(config, key, config[key][0])
    return changed


def keyword_tensor(layer: Node, stored: Stored) -> bool:
    """tf.keras 2: a tensor given by keyword, as to attention, is a reference; Keras 3 marks tensors."""
    changed = False
    for inner in _inner(layer) if _is_graph(layer) else ():
        for index, node in enumerate(inner.get("inbound_nodes") or []):
            keywords = node[-1][3] if node and isinstance(node[-1], list) and len(node[-1]) > 3 else {}
            if list(_references(keywords)):
                tensors = [_tensor(reference) for reference in node]
                arguments = tensors if len(tensors) == 1 else [tensors]
                inner["inbound_nodes"][index] = {"args": arguments, "kwargs": _with_tensors(keywords)}
                changed = True
    return changed


def _tensor(reference: list[Any]) -> Node:
    # Keras 3 looks at the history alone.
    config = {"shape": [], "dtype": "float32", "keras_history": reference[:3]}
    return {"class_name": "__keras_tensor__", "config": config}


def _with_tensors(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _with_tensors(child) for key, child in item.items()}
    if isinstance(item, list) and next(_references(item), None) is item:
        return _tensor(item)
    return [_with_tensors(child) for child in item] if isinstance(item, list) else item


KERAS_1_CLASSES = {
    "Convolution1D": "Conv1D",
    "AtrousConvolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "AtrousConvolution2D": "Conv2D",
    "SeparableConvolution2D": "SeparableConv2D",
    "Convolution3D": "Conv3D",
    "TimeDistributedDense": "Dense",
}


def keras_1_class(layer: Node, stored: Stored) -> bool:
    """Keras 1: layers of another name. Not Deconvolution2D: its output_shape can't be given any more."""
    new = KERAS_1_CLASSES.get(layer["class_name"]) if stored.major < 2 else None
    layer["class_name"] = new or layer["class_name"]
    return new is not None


_KERNEL = {
    "init": "kernel_initializer",
    "W_regularizer": "kernel_regularizer",
    "W_constraint": "kernel_constraint",
}
_BIAS = {"bias": "use_bias", "b_regularizer": "bias_regularizer", "b_constraint": "bias_constraint"}
_LAYOUT = {"dim_ordering": "data_format"}
_POOLING = {"border_mode": "padding", **_LAYOUT}
_CONVOLUTION = {"nb_filter": "filters", "subsample": "strides", "atrous_rate": "dilation_rate", **_POOLING, **_BIAS}
_SERIES = {"border_mode": "padding", "pool_length": "pool_size", "stride": "strides"}
_RECURRENT = {
    "output_dim": "units",
    "inner_init": "recurrent_initializer",
    "inner_activation": "recurrent_activation",
    "U_regularizer": "recurrent_regularizer",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "b_regularizer": "bias_regularizer",
    **_KERNEL,
}
_EMBEDDING = {key: new.replace("kernel", "embeddings") for key, new in _KERNEL.items()}
# Arguments of Keras 1 and their names today, by today's class. Layers that are not here kept their arguments, or are
# the user's own, or are gone: Highway, MaxoutDense, ParametricSoftplus, SReLU, LocallyConnected, Deconvolution2D.
KERAS_1_ARGUMENTS: dict[str, dict[str, str]] = {
    "Dense": {"output_dim": "units", **_KERNEL, **_BIAS},
    "Conv1D": {**_CONVOLUTION, **_KERNEL, "filter_length": "kernel_size", "subsample_length": "strides"},
    "Conv2D": {**_CONVOLUTION, **_KERNEL},
    "Conv3D": {**_CONVOLUTION, **_KERNEL},
    "SeparableConv2D": {**_CONVOLUTION, **_KERNEL},
    "MaxPooling1D": _SERIES,
    "AveragePooling1D": _SERIES,
    "MaxPooling2D": _POOLING,
    "AveragePooling2D": _POOLING,
    "MaxPooling3D": _POOLING,
    "AveragePooling3D": _POOLING,
    "GlobalMaxPooling2D": _LAYOUT,
    "GlobalAveragePooling2D": _LAYOUT,
    "GlobalMaxPooling3D": _LAYOUT,
    "GlobalAveragePooling3D": _LAYOUT,
    "UpSampling1D": {"length": "size"},
    "UpSampling2D": _LAYOUT,
    "UpSampling3D": _LAYOUT,
    "ZeroPadding2D": _LAYOUT,
    "ZeroPadding3D": _LAYOUT,
    "Cropping2D": _LAYOUT,
    "Cropping3D": _LAYOUT,
    "Dropout": {"p": "rate"},
    "SpatialDropout1D": {"p": "rate"},
    "SpatialDropout2D": {"p": "rate", **_LAYOUT},
    "SpatialDropout3D": {"p": "rate", **_LAYOUT},
    "GaussianDropout": {"p": "rate"},
    "GaussianNoise": {"sigma": "stddev"},
    "Embedding": _EMBEDDING,
    "BatchNormalization": {"gamma_init": "gamma_initializer", "beta_init": "beta_initializer"},
    "PReLU": {"init": "alpha_initializer"},
    "SimpleRNN": _RECURRENT,
    "GRU": _RECURRENT,
    "LSTM": {**_RECURRENT, "forget_bias_init": "unit_forget_bias"},
    "ConvLSTM2D": {**_CONVOLUTION, **_RECURRENT, "forget_bias_init": "unit_forget_bias"},
}
KERAS_1_LAYOUTS = {"tf": "channels_last", "th": "channels_first"}
KERAS_1_INITIALIZERS = {"zero": "zeros", "one": "ones", "uniform": "random_uniform", "normal": "random_normal"}
# Said by the input or by the layer before, or without meaning outside training.
KERAS_1_DROPPED = ("input_dim", "input_length", "input_dtype", "consume_less")


def keras_1_arguments(layer: Node, stored: Stored) -> bool:
    """Keras 1: arguments of another name and values of another spelling, as each class of layers has them."""
    config, name = _config(layer), layer["class_name"]
    if stored.major >= 2 or name in ("InputLayer", *MODELS):
        return False
    before, names = dict(config), KERAS_1_ARGUMENTS.get(name, {})
    for old in [key for key in config if key in names]:
        config[names[old]] = _keras_1_value(names[old], config.pop(old))
    for key in KERAS_1_DROPPED if _is_builtin(name) else ():
        if (name, key) != ("Embedding", "input_dim"):
            config.pop(key, None)
    if name == "Embedding":
        config.pop("dropout", None)
    return config != before


def _keras_1_value(key: str, value: Any) -> Any:
    if key == "unit_forget_bias":
        return value == "one"
    if key == "data_format" and isinstance(value, str):
        return KERAS_1_LAYOUTS.get(value, value)
    initial = key.endswith("_initializer") and isinstance(value, str)
    return KERAS_1_INITIALIZERS.get(value, value) if initial else value


KERAS_1_SIZES = (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3"))


def keras_1_kernel(layer: Node, stored: Stored) -> bool:
    """Keras 1: a kernel's size is `nb_row` and `nb_col`; one `init` is for both parts of a separable one."""
    config = _config(layer)
    sizes = next((keys for keys in KERAS_1_SIZES if keys[0] in config), None)
    if stored.major >= 2 or sizes is None or not _is_builtin(layer["class_name"]):
        return False
    config["kernel_size"] = [config.pop(key, None) for key in sizes]
    if layer["class_name"] == "SeparableConv2D":
        init = config.pop("kernel_initializer", "glorot_uniform")
        config.update(depthwise_initializer=init, pointwise_initializer=init)
    return True


def keras_1_layout(layer: Node, stored: Stored) -> bool:
    """Keras 1: padding, cropping, upsampling and flattening do not say the layout; it is that of the others.

    Flatten did not look at it: it took the values as they lie, which Keras 3 calls channels_last.
    """
    silent = ("ZeroPadding2D", "Cropping2D", "UpSampling2D", "ZeroPadding3D", "Cropping3D", "UpSampling3D", "Flatten")
    if stored.major >= 2 or layer["class_name"] not in silent or "data_format" in _config(layer):
        return False
    first = stored.channels_first and layer["class_name"] != "Flatten"
    return _change(layer["config"], "data_format", "channels_first" if first else "channels_last")


def keras_1_padding(layer: Node, stored: Stored) -> bool:
    """Keras 1: ZeroPadding2D takes four numbers in a row, or a dict of them."""
    padding: Any = _config(layer).get("padding")
    if layer["class_name"] != "ZeroPadding2D" or stored.major >= 2:
        return False
    if isinstance(padding, dict):
        padding = [padding.get(f"{side}_pad", 0) for side in ("top", "bottom", "left", "right")]
    return len(padding) == 4 and _change(layer["config"], "padding", [padding[:2], padding[2:]])


def keras_1_penalty(layer: Node, stored: Stored) -> bool:
    """Keras 1: regularizers and constraints have their class under "name". They act in training alone."""
    config = _config(layer)
    penalties = [key for key in config if key.endswith(("_regularizer", "_constraint"))]
    old = [key for key in penalties if isinstance(config[key], dict) and "class_name" not in config[key]]
    for key in old:
        config[key] = None
    return bool(old)


def keras_1_batch_norm(layer: Node, stored: Stored) -> bool:
    """Keras 1: the `mode` of BatchNormalization; modes other than 0 are gone, and Keras refuses them."""
    if layer["class_name"] != "BatchNormalization" or _config(layer).get("mode") != 0:
        return False
    del layer["config"]["mode"]
    return True


KERAS_1_MERGES = {
    "sum": "Add",
    "mul": "Multiply",
    "ave": "Average",
    "max": "Maximum",
    "concat": "Concatenate",
}


def keras_1_merge(layer: Node, stored: Stored) -> bool:
    """Keras 1: Merge with a mode; now there is a layer for each. Dot products stay, and are unknown."""
    config = _config(layer)
    mode = config.get("mode")
    if layer["class_name"] != "Merge" or not isinstance(mode, str) or mode not in KERAS_1_MERGES:
        return False
    layer["class_name"] = KERAS_1_MERGES[mode]
    layer["config"] = {"name": config.get("name")}
    if mode == "concat":
        layer["config"]["axis"] = config.get("concat_axis", -1)
    return True


def keras_1_input(layer: Node, stored: Stored) -> bool:
    """Keras 1: the dtype of an InputLayer is its `input_dtype`."""
    if layer["class_name"] != "InputLayer" or "input_dtype" not in _config(layer):
        return False
    layer["config"]["dtype"] = layer["config"].pop("input_dtype")
    return True


# In this order: a rule may count on those before it.
OLD_PACKAGES = (
    "keras.src.",
    "keras.engine",
    "keras.layers.",
    "tf_keras",
    "tensorflow.python.keras",
    "tensorflow.keras",
)


def module_path(layer: Node, stored: Stored) -> bool:
    """tf.keras 2.12 to 2.15: a layer's module is a path inside of a Keras that is gone; Keras 3 has `keras.layers`."""
    if stored.major >= 3 or not str(layer.get("module") or "").startswith(OLD_PACKAGES):
        return False
    layer["module"] = "keras" if layer["class_name"] in MODELS else "keras.layers"
    return True


RULES: tuple[Rule, ...] = (
    Rule("module paths of tf.keras 2, such as keras.src.engine.functional (2.12 to 2.15)", module_path),
    Rule("Sequential written as a list of layers (Keras 1 to 2.2.2)", sequential_list),
    Rule("names of nested Sequentials taken from the weights (Keras 1 to 2.2.2)", nested_names),
    Rule("shape of the first layer made an InputLayer (Keras 1 to 2.3)", first_shape),
    Rule("batch_input_shape is batch_shape, or repeats the input's (Keras 1 and 2)", input_shape),
    Rule("layer classes of Keras 1", keras_1_class),
    Rule("Merge layers of Keras 1", keras_1_merge),
    Rule("input_dtype of Keras 1", keras_1_input),
    Rule("layout of padding, cropping, upsampling and flattening (Keras 1)", keras_1_layout),
    Rule("arguments of Keras 1", keras_1_arguments),
    Rule("nb_row and nb_col of Keras 1", keras_1_kernel),
    Rule("padding written as four numbers (Keras 1)", keras_1_padding),
    Rule("regularizers and constraints of Keras 1 left out: they act in training alone", keras_1_penalty),
    Rule("mode of BatchNormalization (Keras 1)", keras_1_batch_norm),
    Rule("layer classes of Keras 2", renamed_class),
    Rule("axis of BatchNormalization written as a list (tf.keras 2)", axis_list),
    Rule("mixed-precision policies (tf.keras 2)", dtype_policy),
    Rule("arguments that Keras 3 has no more and that change nothing (Keras 2)", dropped_argument),
    Rule("alpha of LeakyReLU (Keras 1 and 2)", leaky_slope),
    Rule("dtype of initializers (tf.keras 1)", initializer_arguments),
    Rule("GRU with one bias (Keras 1 to 2.1)", gru_bias),
    Rule("activations, among them the hard_sigmoid of Keras 1 and 2", activation_name),
    Rule("TensorFlow operations made Rescaling or Activation (tf.keras 2.4 to 2.15)", tensorflow_operation),
    Rule('"/" in layer names made "_" (Keras 1 and 2)', flat_name),
    Rule("calls of nested models counted from 0 (Keras 1 and 2)", nested_nodes),
    Rule("one input or output taken out of its list (Keras 1 and 2)", single_tensor),
    Rule("tensors given by keyword (tf.keras 2)", keyword_tensor),
)  # fmt: skip


# What a rule runs into in a config that no Keras wrote.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError)


def _translate(stored: Stored) -> list[str]:
    """Change the config in place; what was changed.

    Raises:
        ModelError: the config is so malformed that a rule can't read it.
    """
    said = []
    try:
        for rule in RULES:
            changed = [rule.change(layer, stored) for layer in list(_layers(stored.config))]
            said += [rule.said] if any(changed) else []
    except MALFORMED as error:
        found = f"one that can't be read ({error!r})"
        message = f"{stored.path.name}: expected a config as Keras writes it, found {found}."
        raise ModelError(message) from error
    return said


# ------------------------------------------------------------------------------------------------------------
# Build


def _refuse_unknown(stored: Stored) -> None:
    """Give each layer the address where Keras 3 looks it up.

    Layers come from `keras.layers` or from the registry of the user, from nowhere else: a module path in the
    file is not followed. Layers of Keras 3 are left as they are, its own loader looks at the same two places.

    Raises:
        ModelError: Keras has no such layer.
    """
    unknown: dict[str, str] = {}
    for layer in list(_layers(stored.config)):
        name = str(_config(layer).get("name") or layer.get("name") or "?")
        if not _address(layer, old=stored.major < 3):
            unknown.setdefault(layer["class_name"], name)
        unknown |= dict.fromkeys(_unknown_activations(layer), name)
    if unknown:
        classes = ", ".join(f"{name!r} (in the layer {layer!r})" for name, layer in unknown.items())
        raise ModelError(
            f"{stored.path.name}: expected layers of Keras 3, found {classes}, unknown to it. If they "
            "are your own, register them with keras.saving.register_keras_serializable before the file is "
            "opened, or open the model in Python and hand it over."
        )


def _unknown_activations(layer: Node) -> list[str]:
    """Activations that Keras does not know by name; those that the user registered get their address."""
    from keras import activations

    config, unknown = _config(layer), []
    for key in ("activation", "recurrent_activation"):
        name = config.get(key)
        if isinstance(name, dict) and name.get("class_name") == "function":
            name = name.get("config")
        known = (*dir(activations), hard_sigmoid_of_keras_2.__name__)
        if not isinstance(name, str) or name in known:
            continue
        registered = registered_key(name)
        if registered:
            function = {"module": "builtins", "class_name": "function", "registered_name": registered}
            config[key] = {**function, "config": registered}
        else:
            unknown.append(name)
    return unknown


def _address(layer: Node, old: bool) -> bool:
    name = layer["class_name"]
    registered = registered_key(layer.get("registered_name")) or (not _is_builtin(name) and registered_key(name))
    if old or registered:
        for key in ("build_config", "compile_config", "shared_object_id"):
            layer.pop(key, None)
        module = "keras" if name in MODELS else "keras.layers"
        layer.update(module=module, registered_name=None, class_name=_exported(name))
    if registered:
        layer.update(module=None, registered_name=registered, class_name=registered)
    return bool(registered) or _is_builtin(name)


def _exported(name: str) -> str:
    """Keras exports functional models as Model."""
    return "Model" if name == "Functional" else name


def _is_builtin(name: str) -> bool:
    import keras

    found = getattr(keras.layers, name, None)
    return name in MODELS or (isinstance(found, type) and issubclass(found, keras.layers.Layer))


def registered_key(name: Any) -> str | None:
    """The key of a registered object: "Mine" also finds "package>Mine", as old files leave it out."""
    from keras import saving

    known = saving.get_custom_objects()
    if not isinstance(name, str) or not name:
        return None
    return next((key for key in known if key == name or key.endswith(f">{name}")), None)


def _build(stored: Stored, trust: bool) -> Any:
    """The model with fresh weights.

    Raises:
        ModelError: Keras refuses the config.
    """
    import keras

    custom = {hard_sigmoid_of_keras_2.__name__: hard_sigmoid_of_keras_2}
    name = _exported(stored.config["class_name"])
    root = {"module": "keras", "registered_name": None, **stored.config, "class_name": name}
    if not trust:
        own = hard_sigmoid_of_keras_2.__name__
        root = keras_config.checked(root, lambda key: own if key == own else registered_key(key), stored.path.name)
    try:
        with keras_config.building(stored.size, stored.path.name):
            model = keras.saving.deserialize_keras_object(root, custom_objects=custom, safe_mode=not trust)
    except ModelError:
        raise
    except Exception as error:  # Keras raises what its layers raise
        reason = " ".join(str(error).rsplit("Exception encountered:", 1)[-1].split())[:300]
        expected = f"expected a config that Keras {keras.__version__} can build"
        raise ModelError(f"{stored.path.name}: {expected}, found: {reason}.") from error
    if not isinstance(model, keras.Model) or not model.built:
        raise ModelError(f"{stored.path.name}: expected a model with an input shape, found one without.")
    keras_config.check_outputs(model, stored.path.name)
    return model


# ------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class Slot:
    """A variable of the model and the way to it: the layers around it, outermost first."""

    scope: Scope
    owner: Any
    variable: Any

    @property
    def path(self) -> str:
        """For messages."""
        return "/".join((*self.scope, self.variable.name))


@dataclass(frozen=True)
class Layout:
    """One way in which old files laid out the values of a weight.

    Attributes:
        said: what `Opened.translated` says.
        applies: given the variable and what the file says.
        change: the values of the file as today's Keras wants them.
    """

    said: str
    applies: Callable[[Slot, Stored], bool]
    change: Callable[[np.ndarray], np.ndarray]


def _is_kernel(slot: Slot, *classes: str) -> bool:
    return type(slot.owner).__name__ in classes and slot.variable.name.endswith("kernel")


def _filters_first(slot: Slot, stored: Stored) -> bool:
    """Keras 1 with dim_ordering "th" kept a kernel as (filters, channels, rows, columns)."""
    old = stored.major < 2 and _is_kernel(slot, "Conv2D", "SeparableConv2D", "Conv3D")
    return old and slot.owner.data_format == "channels_first"


def _by_theano(slot: Slot, stored: Stored) -> bool:
    """Theano turns kernels round when it convolves. Keras 1 named no backend; "th" is Theano's layout."""
    if not _is_kernel(slot, "Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose"):
        return False
    silent = stored.major < 2 and not stored.backend and slot.owner.data_format == "channels_first"
    return stored.backend == "theano" or silent


def _turned(kernel: np.ndarray) -> np.ndarray:
    return np.flip(kernel, axis=tuple(range(kernel.ndim - 2)))


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "kernels transposed from (filters, channels, rows, columns) (Keras 1, dim_ordering th)",
        _filters_first,
        lambda kernel: kernel.transpose(*range(2, kernel.ndim), 1, 0),
    ),
    Layout("kernels turned by 180 degrees (from Theano, or Keras 1 in its layout)", _by_theano, _turned),
)

# (class, name in the file): name today.
RENAMED_WEIGHTS = {
    ("DepthwiseConv1D", "depthwise_kernel"): "kernel",
    ("DepthwiseConv2D", "depthwise_kernel"): "kernel",
    ("Embedding", "kernel"): "embeddings",
}


def _fill(model: Any, stored: Stored) -> list[str]:
    """Give each variable its dataset; what had to be said.

    Raises:
        ModelError: a dataset without a variable, a variable without a dataset, or other shapes.
    """
    pairs, said, problems = [], [], _strays(model, stored)
    for name, slots in _places(model):
        matched = _match(stored.weights.get(name, []), slots)
        pairs += matched.pairs
        said += [f"{name}: {matched.said}"] if matched.said else []
        problems += [_homeless(name, weight) for weight in matched.weights]
        problems += [f"{slot.path} of the model is not in the file" for slot in matched.slots]
    problems += [problem for weight, slot in pairs for problem in _misfits(weight, slot, stored)]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ModelError(f"{stored.path.name}: expected its weights to fit its architecture, found: {shown}.")
    used = [layout for layout in LAYOUTS if any(layout.applies(slot, stored) for _, slot in pairs)]
    _assign(pairs, stored)
    _finalize(model)
    return said + [layout.said for layout in used]


def _places(model: Any) -> Iterator[tuple[str, list[Slot]]]:
    """For each group of weights its name and the variables, in the order of the file format."""
    inside: set[int] = set()
    for layer in model.layers:
        slots = _slots(layer, (layer.name,))
        inside |= {id(slot.variable) for slot in slots}
        yield layer.name, slots
    yield TOP, [Slot((), model, variable) for variable in model.weights if id(variable) not in inside]


def _slots(layer: Any, scope: Scope) -> list[Slot]:
    """The variables in and below a layer, the trainable ones first: so the file format orders them."""
    found = {id(slot.variable): slot for slot in _walk(layer, scope)}
    return [found[id(variable)] for variable in [*layer.trainable_weights, *layer.non_trainable_weights]]


def _walk(layer: Any, scope: Scope) -> Iterator[Slot]:
    children = layer._flatten_layers(include_self=False, recursive=False)
    below = [slot for child in children for slot in _walk(child, (*scope, child.name))]
    taken = {id(slot.variable) for slot in below}
    yield from (Slot(scope, layer, variable) for variable in layer.weights if id(variable) not in taken)
    yield from below


def _strays(model: Any, stored: Stored) -> list[str]:
    """Datasets in groups of layers that the model does not have."""
    known = {layer.name for layer in model.layers} | {TOP}
    strays = {name: weights for name, weights in stored.weights.items() if name not in known}
    return [_homeless(name, weight) for name, weights in strays.items() for weight in weights]


def _homeless(layer: str, weight: Weight) -> str:
    return f"{layer}/{weight.path}".strip("/") + " of the file has no place in the model"


@dataclass(frozen=True)
class Matched:
    """Which dataset goes where in one group, what is left over on either side, and what to say about it."""

    pairs: list[tuple[Weight, Slot]]
    weights: list[Weight]
    slots: list[Slot]
    said: str = ""


Same = Callable[[str, str], bool]
Alike = Callable[[Scope, Scope], bool]


def _equal(written: str, name: str) -> bool:
    return written == name


def _numbered(written: str, name: str) -> bool:
    """TensorFlow numbers a scope that is taken: conv2d_1 is written conv2d_1_1."""
    return written == name or re.fullmatch(re.escape(name) + r"_\d+", written) is not None


def _stems(written: str, name: str) -> bool:
    """Cells and the like are not in the config and are numbered anew: lstm_cell_3 is lstm_cell_1."""
    return re.sub(r"(_\d+)+$", "", written) == re.sub(r"(_\d+)+$", "", name)


def _along(same: Same) -> Alike:
    """Scopes alike if one is the other with some layers left out: wrappers, cells, the model around."""

    def within(short: Scope, long: Scope, compare: Same) -> bool:
        rest = iter(long)
        return all(any(compare(name, other) for other in rest) for name in short)

    def alike(written: Scope, scope: Scope) -> bool:
        return within(written, scope, same) or within(scope, written, lambda name, other: same(other, name))

    return alike


def _joined(written: Scope, scope: Scope) -> bool:
    """Alike if the file wrote layers with "/" in their names: conv1/bn is the layer conv1_bn."""
    return any(_numbered("_".join(written), "_".join(scope[start:])) for start in range(len(scope)))


def _innermost(written: Scope, scope: Scope) -> bool:
    return written[-1:] == scope[-1:] and _along(_equal)(written, scope)


# From strict to loose. A way counts only if under it there is exactly one way to put everything in its place.
WAYS: tuple[Alike, ...] = (
    _innermost,
    _along(_equal),
    _joined,
    _along(_numbered),
    _along(_stems),
    lambda written, scope: len(scope) == 1,  # a layer without layers inside: the names of its weights suffice
)


def _match(weights: list[Weight], slots: list[Slot]) -> Matched:
    """Match a group of weights with the variables of its layer by name."""
    best = Matched([], weights, slots)
    for alike in WAYS:
        matched = _matched(weights, slots, _forced(weights, slots, alike))
        if not matched.weights and not matched.slots:
            return matched
        best = max(best, matched, key=lambda item: len(item.pairs))
    return _in_order(weights, slots) or best


def _matched(weights: list[Weight], slots: list[Slot], places: dict[int, int]) -> Matched:
    return Matched(
        [(weights[index], slots[place]) for index, place in places.items()],
        [weight for index, weight in enumerate(weights) if index not in places],
        [slot for place, slot in enumerate(slots) if place not in places.values()],
    )


def _forced(weights: list[Weight], slots: list[Slot], alike: Alike) -> dict[int, int]:
    """Places that follow: again and again, a dataset with one place left or a place with one dataset left.

    This finds the one-to-one match if there is exactly one, and leaves out what names do not decide.
    """
    options = {
        index: {place for place, slot in enumerate(slots) if _fits(weight, slot, alike)}
        for index, weight in enumerate(weights)
    }
    forced: dict[int, int] = {}
    while True:
        wanted: dict[int, list[int]] = {}
        for index, places in options.items():
            for place in places:
                wanted.setdefault(place, []).append(index)
        found = {indices[0]: place for place, indices in wanted.items() if len(indices) == 1}
        found |= {index: next(iter(places)) for index, places in options.items() if len(places) == 1}
        takers = Counter(found.values())
        found = {index: place for index, place in found.items() if takers[place] == 1}
        if not found:
            return forced
        forced |= found
        gone = set(found.values())
        options = {index: places - gone for index, places in options.items() if index not in found}


def _fits(weight: Weight, slot: Slot, alike: Alike) -> bool:
    name = RENAMED_WEIGHTS.get((type(slot.owner).__name__, weight.name), weight.name)
    return name == slot.variable.name and alike(weight.scope, slot.scope)


def _in_order(weights: list[Weight], slots: list[Slot]) -> Matched | None:
    """Where names differ in nothing but numbers the file's order decides, as for the Keras that wrote it.

    Only within one nested model, and only if names without numbers and shapes agree from first to last and
    no name speaks for another place.
    """
    pairs = list(zip(weights, slots, strict=False))
    agree = [
        _fits(weight, slot, _along(_stems)) and weight.shape == tuple(slot.variable.shape) for weight, slot in pairs
    ]
    against = [
        not _fits(weight, slot, _innermost) and any(_fits(weight, other, _innermost) for other in slots)
        for weight, slot in pairs
    ]
    if len(weights) != len(slots) or not all(agree) or any(against):
        return None
    said = "its names differ from the model's in numbers alone, so the order in the file decided"
    return Matched(pairs, [], [], said)


def _layouts(slot: Slot, stored: Stored) -> list[Layout]:
    return [layout for layout in LAYOUTS if layout.applies(slot, stored)]


def _misfits(weight: Weight, slot: Slot, stored: Stored) -> Iterable[str]:
    """Why the dataset can't be the variable's value, without reading it."""
    shape, wanted = weight.shape, tuple(slot.variable.shape)
    if not weight.dataset.numbers or weight.dataset.values is None:
        return [f"{slot.path} is no numbers in the file ({weight.dataset.dtype})"]
    if prod(shape) == prod(wanted) and len(shape) == len(wanted):
        value = np.broadcast_to(np.float32(0), shape)  # the shape without the memory
        for layout in _layouts(slot, stored):
            value = layout.change(value)
        shape = value.shape
    return [] if shape == wanted else [f"{slot.path} is {weight.shape} in the file and {wanted} in the model"]


def _assign(pairs: Sequence[tuple[Weight, Slot]], stored: Stored) -> None:
    for weight, slot in pairs:
        value = weight.dataset.array
        for layout in _layouts(slot, stored):
            value = layout.change(value)
        slot.variable.assign(np.array(value))  # a copy: torch takes no negative strides


def _finalize(model: Any) -> None:
    """Normalization computes what it uses from its weights when told that they are there."""
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
