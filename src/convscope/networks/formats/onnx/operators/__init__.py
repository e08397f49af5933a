"""ONNX operators in PyTorch: one entry each, for every version of the operator set in which it exists.

An operator is a function of the node (its attributes, the version of the operator set) and its inputs, None where an
optional one is left out. What ONNX means by each is in its operator documents; `tests/test_onnx.py` runs the project's
own cases of every operator here. A module for each kind enters its operators in `OPERATORS` when it is imported.
"""

from convscope.networks.formats.onnx.operators import (
    activations,
    arithmetic,
    convolution,
    makers,
    norms,
    quantized,
    reductions,
    resizing,
    shapes,
)
from convscope.networks.formats.onnx.operators.node import OPERATORS, READS_NUMBERS, Batch, Node
from convscope.networks.formats.onnx.operators.shapes import TYPES
from convscope.networks.formats.onnx.operators.signatures import check_node

__all__ = [
    "OPERATORS",
    "READS_NUMBERS",
    "TYPES",
    "Batch",
    "Node",
    "activations",
    "arithmetic",
    "check_node",
    "convolution",
    "makers",
    "norms",
    "quantized",
    "reductions",
    "resizing",
    "shapes",
]
