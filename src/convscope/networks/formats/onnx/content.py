"""What an ONNX file holds, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convscope.networks.foreign import Attribute

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Input:
    """A graph's declaration of an input: its shape, None where free or missing, and ONNX's number of its type."""

    shape: Shape | None
    kind: int

    @property
    def text(self) -> str:
        """For messages: "(?, 3, 224, 224)"."""
        if self.shape is None:
            return "of unknown shape"
        return "(" + ", ".join("?" if side is None else str(side) for side in self.shape) + ")"


@dataclass(frozen=True, eq=False)
class FileNode:
    """A node as the file has it.

    Attributes:
        domain: "" for ONNX's own operators.
        attributes: int, float, str, lists of these, `np.ndarray`, `Body`, or None for what no operator takes.
        references: by attribute, the attribute of the function around it that gives its value.
        where: for messages: "the node 'stem' (Conv)".
    """

    name: str
    domain: str
    operator: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]
    references: dict[str, str]

    @property
    def where(self) -> str:
        """For messages."""
        name = self.name or next(filter(None, self.outputs), "")
        return f"the node {name!r} ({self.operator})" if name else f"a node without a name ({self.operator})"

    @property
    def function(self) -> tuple[str, str, str]:
        """The function that it calls, if there is one of that name."""
        return self.domain, self.operator, self.overload


@dataclass(frozen=True, eq=False)
class Body:
    """A graph, a branch, or the body of a function.

    Attributes:
        inputs, outputs: names in order; constants: arrays by name.
        defaults: of a function's attributes; None where it has no default.
        opset: the version of ONNX's operators; None for that of what is around it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, np.ndarray]
    nodes: tuple[FileNode, ...]
    defaults: dict[str, object] = field(default_factory=dict)
    opset: int | None = None


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A file.

    Attributes:
        inputs: what the graph is given, by name: not the weights that old files list among them.
        functions: by domain, name and overload.
        held: bytes of its arrays; widened: True if some were of half precision.
        beside: names of the other files that arrays were read from, relative to its folder.
    """

    path: Path
    graph: Body
    inputs: dict[str, Input]
    functions: dict[tuple[str, str, str], Body]
    opset: int
    ir_version: int
    made_by: str
    held: int
    widened: bool
    beside: tuple[str, ...] = ()
