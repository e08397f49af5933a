"""The layers in a serialised config: how they are recognized, found and referred to."""

from __future__ import annotations

from collections.abc import Iterator

from convscope.schema import Json

Node = dict[str, Json]  # a serialised object: {"class_name": ..., "config": ...}
Scope = tuple[str, ...]  # names of layers from the outside to the inside


# Keys of a layer's config under which other layers lie.
INNER = ("layers", "layer", "forward_layer", "backward_layer", "cell", "cells", "activation")
MODELS = {"Sequential", "Functional", "Model"}


def is_node(item: object) -> bool:
    """True for a serialised object with a class and a config."""
    return (
        isinstance(item, dict)
        and isinstance(item.get("class_name"), str)
        and isinstance(item.get("config"), (dict, list))
    )


def config_of(layer: Node) -> Node:
    """The arguments of a layer; none for a Sequential that is still a plain list."""
    return layer["config"] if isinstance(layer["config"], dict) else {}


def inner_layers(layer: Node) -> list[Node]:
    """The layers directly inside a layer: of a model, a wrapper or a cell, or one used as an activation."""
    config = layer["config"]
    values = [config] if isinstance(config, list) else [config.get(key) for key in INNER]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in items if is_node(item) and item["class_name"] != "function"]


def layers_of(layer: Node) -> Iterator[Node]:
    """A layer and all layers inside it."""
    yield layer
    for inner in inner_layers(layer):
        yield from layers_of(inner)


def is_graph(layer: Node) -> bool:
    """True for a functional model whose nodes are the nested lists that Keras 1 and 2 wrote."""
    config = config_of(layer)
    nodes = [node for inner in inner_layers(layer) for node in inner.get("inbound_nodes") or []]
    return "output_layers" in config and all(isinstance(node, list) for node in nodes)


def references(item: object) -> Iterator[list[Json]]:
    """The references `["layer", node, tensor, ...]` in inbound nodes and in lists of inputs and outputs."""
    if not isinstance(item, (list, dict)):
        return
    if isinstance(item, list) and len(item) >= 3 and isinstance(item[0], str) and isinstance(item[1], int):
        yield item
        item = item[3:]
    for child in item.values() if isinstance(item, dict) else item:
        yield from references(child)


def set_value(config: Node, key: str, value: object) -> bool:
    """Set a value; True if it was another one."""
    changed = key not in config or config[key] != value
    config[key] = value
    return changed


def flat(name: str) -> str:
    """The name of a layer as Keras 3 allows it."""
    return name.replace("/", "_")
