"""Signatures of nodes, from the ONNX project's definition of each operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx.defs

from convscope.errors import ModelError
from convscope.networks.foreign import Attribute, Structure
from convscope.networks.formats.onnx.operators.node import OPERATORS

_KINDS: dict[str, tuple[type, ...]] = {"FLOAT": (int, float), "INT": (int,), "STRING": (str,), "TENSOR": (np.ndarray,)}


@dataclass(frozen=True)
class Signature:
    """How often an operator takes and makes tensors, and its attributes, over all operator sets that have it."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    attributes: dict[str, set[str]]

    def joined(self, other: Signature) -> Signature:
        """What one or the other allows."""
        keys = {**self.attributes, **other.attributes}
        kinds = {key: self.attributes.get(key, set()) | other.attributes.get(key, set()) for key in keys}
        return Signature(_widest(self.inputs, other.inputs), _widest(self.outputs, other.outputs), kinds)


def _widest(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
    return min(one[0], two[0]), max(one[1], two[1])


@cache
def signatures() -> dict[str, Signature]:
    """The ONNX project's definition of each of its operators."""
    found: dict[str, Signature] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.name in OPERATORS:
            attributes = {key: {str(item.type).rpartition(".")[2]} for key, item in schema.attributes.items()}
            ends = (schema.min_input, schema.max_input), (schema.min_output, schema.max_output)
            own = Signature(*ends, attributes)
            found[schema.name] = found[schema.name].joined(own) if schema.name in found else own
    return found


# The least valid value of integers: smaller ones have no meaning, and not all of torch's code checks them.
_LEAST = {
    **{"kernel_shape": 1, "strides": 1, "dilations": 1, "group": 1, "num_groups": 1, "blocksize": 1, "size": 1},
    **{
        "output_padding": 0,
        "output_shape": 0,
        "block_size": 0,
        "batch_dims": 0,
        "pads": -(2**31),
        "paddings": -(2**31),
    },
}
_MOST = 2**31 - 1


def check_node(
    operator: str,
    inputs: Sequence[Structure],
    outputs: Sequence[str],
    attributes: dict[str, object],
    refused: Callable[[str], ModelError],
) -> None:
    """Make sure that a node follows the ONNX definition; attributes that ONNX does not name are dropped.

    An input is None where it is left out.

    Raises:
        ModelError: as `refused` makes it, from a text with the reason.
    """
    known = signatures().get(operator)
    if known is None:
        raise refused("the onnx that is installed does not know its operator; run: pip install --upgrade onnx")
    for what, given, (least, most) in (("inputs", inputs, known.inputs), ("outputs", outputs, known.outputs)):
        found = len(given)
        if not least <= found <= most:
            raise refused(f"it has {found} {what}; expected {least if least == most else f'{least} to {most}'}")
    for place, given in enumerate(inputs[: known.inputs[0]]):
        if given is None:
            raise refused(f"its input number {place + 1} is left out")
    for name in list(attributes):
        if name not in known.attributes:
            del attributes[name]
        elif not _fits(attributes[name], known.attributes[name]):
            raise refused(f"its attribute {name!r} is of another type than ONNX says")
        elif name in _LEAST and not all(_LEAST[name] <= value <= _MOST for value in _listed(attributes[name])):
            raise refused(f"its attribute {name!r} is {attributes[name]!r:.80}")


def _listed(value: object) -> Sequence[Attribute]:
    return value if isinstance(value, list) else [value]


def _fits(value: object, kinds: set[str]) -> bool:
    if not isinstance(value, list):
        return any(isinstance(value, _KINDS.get(kind, ())) for kind in kinds)
    items = [_KINDS.get(kind.removesuffix("S"), ()) for kind in kinds if kind.endswith("S")]
    return any(all(isinstance(item, kind) for item in value) for kind in items)
