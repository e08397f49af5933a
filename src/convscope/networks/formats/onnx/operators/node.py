"""An ONNX operator in PyTorch: a function of its node and its inputs, entered in a table by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from convscope.networks.foreign import Attribute, Structure


@dataclass
class Batch:
    """The state that the nodes of a graph share.

    Attributes:
        declared: the batch that the graph declares; actual: the one that it is run with.
        held: bytes of the file's own arrays.
        met: what has been found to be within the limits: operators, with the shapes and numbers that go in.
    """

    declared: int | None = None
    actual: int = 1
    held: int = 0
    met: set[object] = field(default_factory=set)


@dataclass(frozen=True)
class Node:
    """The context of an operator besides its inputs."""

    name: str
    operator: str
    opset: int
    attributes: dict[str, Attribute]
    outputs: int = 1
    batch: Batch = field(default_factory=Batch)

    def get(self, key: str, default: Attribute = None) -> Attribute:
        """An attribute."""
        return self.attributes.get(key, default)


Operator = Callable[..., Structure]
OPERATORS: dict[str, tuple[str, Operator]] = {}


def operator(kind: str, *names: str) -> Callable[[Operator], Operator]:
    """Enter a function as the operators `names`, layers of `kind`."""

    def entered(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, (kind, function)))
        return function

    return entered


def enter(kind: str, **functions: Callable[..., object]) -> None:
    """Enter functions that need nothing of the node as operators of their names, layers of `kind`."""
    for name, function in functions.items():
        OPERATORS[name] = (kind, lambda n, *inputs, _of=function: _of(*inputs))


# Operators whose inputs after the first are numbers for Python: shapes, axes, amounts.
READS_NUMBERS = frozenset(
    {
        *("Reshape", "Squeeze", "Unsqueeze", "Expand", "Tile", "Slice", "Split", "Pad", "Resize", "Upsample"),
        *("ConstantOfShape", "Range", "TopK", "CumSum", "Trilu", "Dropout"),
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
        *("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
    }
)


def ints(x: Structure) -> list[int]:
    """The values of a tensor or a list as Python numbers."""
    return [int(value) for value in (x.reshape(-1).tolist() if isinstance(x, Tensor) else x)]


def of_batch(n: Node, x: Tensor, sides: list[int]) -> list[int]:
    """The sides that a file gives for `x`: one that declares a batch may have its number in there."""
    batch = n.batch
    if sides and batch.declared not in (None, batch.actual) and x.shape[:1] == (batch.actual,):
        return [batch.actual if sides[0] == batch.declared else sides[0], *sides[1:]]
    return sides
