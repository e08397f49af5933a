"""Migrations of nested lists, of first layers and of input shapes (Keras 1 and 2)."""

from __future__ import annotations

from convscope.networks.formats.keras.legacy_h5.nodes import MODELS, Node, config_of, flat, inner_layers
from convscope.networks.formats.keras.legacy_h5.stored import TOP, Stored


def sequential_list(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.2.2: the config of a Sequential is the list of its layers."""
    if layer["class_name"] != "Sequential" or not isinstance(layer["config"], list):
        return False
    layer["config"] = {"name": layer.get("name"), "layers": layer["config"]}
    return True


def nested_names(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.2.2: such a list has no name; inside a Sequential only the weights know it."""
    names = [name for name in stored.weights if name not in ("", TOP)]
    inner = inner_layers(layer)
    if layer is not stored.config or layer["class_name"] != "Sequential" or len(inner) != len(names):
        return False
    pairs = [(item["config"], name) for item, name in zip(inner, names, strict=True)]
    nameless = [(config, name) for config, name in pairs if config.get("name") is None]
    if any(flat(config.get("name") or name) != name for config, name in pairs):
        return False
    for config, name in nameless:
        config["name"] = name
    return bool(nameless)


def first_shape(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.3 (tf.keras before 2.2): a Sequential has no InputLayer, its first layer has the shape.

    Keras 3 takes that shape, batch and all, for the shape of one image, and looks for none in a nested
    model that is the only layer.
    """
    inner = inner_layers(layer)
    if layer["class_name"] != "Sequential" or not inner or inner[0]["class_name"] == "InputLayer":
        return False
    given = _given(inner[0])
    if "batch_input_shape" not in given:
        return False
    dtype = given.get("input_dtype", given.get("dtype"))
    config = {
        "name": f"{config_of(inner[0]).get('name')}_input",
        "batch_shape": given["batch_input_shape"],
        "dtype": dtype if isinstance(dtype, str) else "float32",
    }
    layer["config"]["layers"].insert(0, {"class_name": "InputLayer", "config": config})
    return True


def _given(layer: Node) -> Node:
    """The arguments with the shape of a layer's input: its own, or those of a nested model's one input."""
    config, inner = config_of(layer), inner_layers(layer)
    if layer["class_name"] not in MODELS or "batch_input_shape" in config:
        return config
    inputs = [item for item in inner if item["class_name"] == "InputLayer"]
    if not inputs and layer["class_name"] == "Sequential":
        inputs = inner[:1]
    return _given(inputs[0]) if len(inputs) == 1 else {}


def input_shape(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: an InputLayer's shape is its `batch_input_shape`, and other layers may repeat it."""
    shape = config_of(layer).pop("batch_input_shape", None)
    if shape is not None and layer["class_name"] == "InputLayer":
        layer["config"]["batch_shape"] = shape
    return shape is not None
