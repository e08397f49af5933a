"""Migrations of names and calls of layers (Keras 1 and 2)."""

from __future__ import annotations

from convscope.networks.formats.keras.legacy_h5.nodes import (
    MODELS,
    Node,
    config_of,
    flat,
    inner_layers,
    is_graph,
    references,
    set_value,
)
from convscope.networks.formats.keras.legacy_h5.stored import Stored


def flat_name(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: a layer may be called "conv1/bn"; Keras 3 has no "/" in names."""
    old = [inner["config"]["name"] for inner in inner_layers(layer) if "/" in str(config_of(inner).get("name"))]
    if not old:
        return False
    for inner in inner_layers(layer):
        for holder in (inner, config_of(inner)):
            if isinstance(holder.get("name"), str):
                holder["name"] = flat(holder["name"])
    config = config_of(layer)
    calls = [inner.get("inbound_nodes") for inner in inner_layers(layer)]
    for reference in references([calls, config.get("input_layers"), config.get("output_layers")]):
        reference[0] = flat(reference[0])
    return True


def nested_nodes(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: the first call of a nested model is node 1, as node 0 is the model itself; now it is 0.

    Keras 3 counts that way in the outputs of a graph alone, and there for functional models alone.
    """
    if not is_graph(layer):
        return False
    inner = inner_layers(layer)
    kinds = {item.get("name"): item["class_name"] for item in inner if item["class_name"] in MODELS}
    calls = references([item.get("inbound_nodes") for item in inner])
    outputs = references(layer["config"]["output_layers"])
    counted = [reference for reference in calls if reference[0] in kinds]
    counted += [reference for reference in outputs if kinds.get(reference[0]) == "Sequential"]
    late = [reference for reference in counted if reference[1] > 0]
    for reference in late:
        reference[1] -= 1
    return bool(late)


def single_tensor(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: one input or output is a list of one; Keras 3 makes a model of it that wants a list."""
    if not is_graph(layer):
        return False
    config, changed = layer["config"], False
    for key in ("input_layers", "output_layers"):
        if len(config[key]) == 1 and isinstance(config[key][0], list):
            changed = set_value(config, key, config[key][0])
    return changed


def keyword_tensor(layer: Node, stored: Stored) -> bool:
    """tf.keras 2: a tensor given by keyword, as to attention, is a reference; Keras 3 marks tensors."""
    changed = False
    for inner in inner_layers(layer) if is_graph(layer) else ():
        for index, node in enumerate(inner.get("inbound_nodes") or []):
            keywords = node[-1][3] if node and isinstance(node[-1], list) and len(node[-1]) > 3 else {}
            if list(references(keywords)):
                tensors = [_tensor(reference) for reference in node]
                arguments = tensors if len(tensors) == 1 else [tensors]
                inner["inbound_nodes"][index] = {"args": arguments, "kwargs": _with_tensors(keywords)}
                changed = True
    return changed


def _tensor(reference: list[object]) -> Node:
    # Keras 3 uses the history alone.
    config = {"shape": [], "dtype": "float32", "keras_history": reference[:3]}
    return {"class_name": "__keras_tensor__", "config": config}


def _with_tensors(item: object) -> object:
    if isinstance(item, dict):
        return {key: _with_tensors(child) for key, child in item.items()}
    if isinstance(item, list) and next(references(item), None) is item:
        return _tensor(item)
    return [_with_tensors(child) for child in item] if isinstance(item, list) else item
