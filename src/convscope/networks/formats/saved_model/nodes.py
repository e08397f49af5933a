"""What a node of a TensorFlow graph names: tensors, and the functions that it calls."""

from __future__ import annotations

from collections.abc import Sequence

from convscope.errors import printable
from convscope.networks.foreign import Message


def node_of(tensor: str) -> str:
    """The node that computes a tensor: `"^add"` and `"add:1"` are outputs of the node `add`."""
    return tensor.removeprefix("^").split(":")[0]


def functions_of(node: Message) -> list[str]:
    """Names of the functions that a node calls."""
    return [called.name for called in calls(node)]


def calls(node: Message) -> list[Message]:
    """The functions in the attributes of a node, also in lists."""
    values = node.attr.values()
    named = [value.func for value in values if value.HasField("func")]
    return named + [item for value in values for item in value.list.func]


def shown(names: Sequence[str]) -> str:
    """Names from the file, for a message."""
    return ", ".join(printable(name)[:80] for name in names)
