"""From an ONNX graph to its steps: functions and branches are unfolded, constants are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
import torch

from convscope import limits
from convscope.errors import ModelError, one_line
from convscope.networks.formats.onnx.content import Body, FileNode, Input, OnnxFile
from convscope.networks.formats.onnx.operators import OPERATORS, TYPES, Batch, Node, check_node
from convscope.networks.formats.onnx.step import Step, as_tuple
from convscope.networks.torch.limits import allowance

_QUANTIZED = (
    *("QLinear", "QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize"),
    *("QGemm", "QAttention"),
)
_CONTROL = {"If", "Loop", "Scan"}


def refusal(path: Path, names: Counter[str]) -> ModelError:
    """Everything that the table does not have, at once."""
    listed = ", ".join(f"{name} ({count})" for name, count in names.most_common(6)) + (", …" if len(names) > 6 else "")
    if any(name.rpartition(".")[2].startswith(_QUANTIZED) for name in names):
        return ModelError(
            f"{path} has int8 operators ({listed}), which have no gradient and are not supported. Give the float model "
            "that it was made from.",
            code="model-quantized",
            path=str(path),
            names=list(names),
        )
    what = "control flow or " if _CONTROL & set(names) else ""
    do = "Export the model without them, or open the model that it was made from."
    if any(name.startswith("com.microsoft.") for name in names):
        do = "They are onnxruntime's own: give the file from before its optimiser."
    return ModelError(
        f"{path} uses {what}operators that convscope can't convert: {listed}. {do}",
        code="operator-unknown",
        path=str(path),
        names=list(names),
    )


HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def is_whole(item: Input) -> bool:
    """True for an input of whole numbers."""
    return item.kind in TYPES and not TYPES[item.kind].is_floating_point


# A tensor of the graph: the name under which it is passed on, or, where nothing but constants goes into it, itself.
Given = str | torch.Tensor


class _Scope:
    """Names as one graph, one branch or one call of a function has them.

    Attributes:
        opset: the version of ONNX's operators in it.
        around: where names that it lacks are looked for: a branch sees the graph around it, a function does not.
        arguments: attributes that a function is called with.
        suffix: after the names of layers, so that each call of a function has its own.
        wanted: by the names of a function's outputs, what they are called outside.
    """

    def __init__(self, opset: int, around: _Scope | None = None, arguments: Mapping[str, object] | None = None) -> None:
        self.opset, self.around, self.arguments = opset, around, arguments or {}
        self.suffix: str = "" if around is None else around.suffix
        self.wanted: dict[str, str] = {}
        self.names: dict[str, Given | None] = {}

    def key_of(self, name: str) -> str:
        """The best name of a tensor beyond this scope."""
        return self.wanted.get(name, f"{name}{self.suffix}")

    def find(self, name: str) -> Given | None:
        """What a name stands for; None for an input of a function that was left out.

        Raises:
            KeyError: nothing has made it yet.
        """
        if name in self.names or self.around is None:
            return self.names[name]
        return self.around.find(name)


class Builder:
    """The result of converting a graph.

    Attributes:
        steps: in the order of execution.
        missing: operators that can't be converted, with how often they occur.
        widened: True if values of half precision were made float32.
    """

    def __init__(self, file: OnnxFile) -> None:
        self.file, self.batch, self.widened = file, Batch(held=file.held), file.widened
        self.steps: list[Step] = []
        self.missing: Counter[str] = Counter()
        self._keys, self._paths, self._calls = set(file.inputs), set[str](), 0
        self._left = allowance(1, file.held).size

    def build(self) -> dict[str, Given]:
        """Convert the graph into steps; returns its outputs."""
        scope = _Scope(self.file.opset)
        scope.names.update((name, name) for name in self.file.inputs)
        self._add(self.file.graph, scope)
        if not self.file.graph.outputs:
            raise ModelError(
                f"{self.file.path} declares no output, so there is nothing to explain.",
                code="no-output",
                path=str(self.file.path),
            )
        found = {name: self._made(name, scope, f"output {name!r}") for name in self.file.graph.outputs}
        return {name: given for name, given in found.items() if given is not None}

    def _add(self, body: Body, scope: _Scope) -> None:
        for name, array in body.constants.items():
            self._name(scope, name, self._tensor(array, name))
        for node in body.nodes:
            try:
                self._add_node(node, scope)
            except (ModelError, RecursionError):
                raise
            except Exception as error:  # whatever torch or Python raise at values of the file that don't fit
                raise self._refused(node)(one_line(error)[:200].rstrip(".")) from error

    def _add_node(self, node: FileNode, scope: _Scope) -> None:
        inputs = [self._made(name, scope, node.where) if name else None for name in node.inputs]
        attributes = self._bound(node, scope)
        function = self.file.functions.get(node.function)
        standard = not node.domain
        if function is not None:
            self._call(function, node, inputs, attributes, scope)
        elif standard and node.operator == "If" and inputs and isinstance(inputs[0], torch.Tensor):
            self._take_branch(node, inputs[0], attributes, scope)
        elif standard and node.operator == "Constant":
            self._name(scope, node.outputs[0], self._constant(node, attributes))
        elif standard and node.operator in OPERATORS:
            self._add_step(node, inputs, attributes, scope)
        else:
            self.missing[f"{node.domain}.{node.operator}" if node.domain else node.operator] += 1
            self._name_all(scope, node.outputs, [self._key(name, scope) for name in node.outputs], node)

    def _bound(self, node: FileNode, scope: _Scope) -> dict[str, object]:
        """A node's attributes; where one refers to the function's and that was not given, it is left out."""
        values = {key: scope.arguments.get(name) for key, name in node.references.items()}
        return {**node.attributes, **{key: value for key, value in values.items() if value is not None}}

    # what a node becomes ---------------------------------------------------------------------------

    def _add_step(
        self, node: FileNode, inputs: list[Given | None], attributes: dict[str, object], scope: _Scope
    ) -> None:
        """A step, or, where nothing but constants goes in, its value."""
        check_node(node.operator, inputs, node.outputs, attributes, self._refused(node))
        if node.operator == "Cast" and attributes.get("to") in HALF:
            attributes["to"], self.widened = onnx.TensorProto.FLOAT, True
        attributes = {key: self._attribute(value, key) for key, value in attributes.items()}
        keys = [self._key(name, scope) for name in node.outputs]
        path = self._path_of(node, keys, scope)
        about = Node(path, node.operator, scope.opset, attributes, len(node.outputs), self.batch)
        step = Step(about, inputs, keys)
        if any(isinstance(given, str) for given in inputs):
            self.steps.append(step)
            self._name_all(scope, node.outputs, keys, node)
            return
        with torch.no_grad():
            made = as_tuple(step())
        self._left -= sum(value.numel() * value.element_size() for value in made)
        if self._left < 0:
            raise self._refused(node)(f"the constants up to it are too large ({limits.how_to_raise('values')})")
        self._name_all(scope, node.outputs, made, node)

    def _take_branch(self, node: FileNode, yes: torch.Tensor, attributes: dict[str, object], scope: _Scope) -> None:
        """The branch of an `If` whose condition is known."""
        if yes.numel() != 1:
            raise self._refused(node)(f"its condition has {yes.numel()} values, and not one")
        branch = attributes.get("then_branch" if bool(yes) else "else_branch")
        if not isinstance(branch, Body) or branch.inputs:
            raise self._refused(node)("it lacks a branch, or that has inputs")
        self._add_inside(branch, _Scope(scope.opset, scope, scope.arguments), node, scope)

    def _call(
        self, function: Body, node: FileNode, inputs: list[Given | None], attributes: dict[str, object], scope: _Scope
    ) -> None:
        """Insert the steps of a function of the file in place of the node that calls it."""
        if len(inputs) > len(function.inputs):
            raise self._refused(node)(f"the function takes {len(function.inputs)} inputs, and it has {len(inputs)}")
        self._calls += 1
        arguments = {**function.defaults, **attributes}
        inner = _Scope(function.opset or scope.opset, None, arguments)
        inner.suffix = f"__{self._calls}"
        inner.names.update(zip_longest(function.inputs, inputs))
        self._add_inside(function, inner, node, scope)

    def _add_inside(self, body: Body, inner: _Scope, node: FileNode, scope: _Scope) -> None:
        if len(node.outputs) > len(body.outputs):
            raise self._refused(node)(f"it has {len(node.outputs)} outputs, and what it does makes {len(body.outputs)}")
        for name, outside in zip(body.outputs, node.outputs, strict=False):
            if outside:
                inner.wanted.setdefault(name, scope.key_of(outside))
        self._add(body, inner)
        made = [self._made(name, inner, f"end of {node.where}") for name in body.outputs[: len(node.outputs)]]
        self._name_all(scope, node.outputs, made, node)

    def _constant(self, node: FileNode, attributes: dict[str, object]) -> torch.Tensor:
        key, value = next(((key, value) for key, value in attributes.items() if key in _CONSTANTS), ("", None))
        if isinstance(value, np.ndarray):
            return self._tensor(value, node.outputs[0])
        if key in ("value_string", "value_strings"):
            return torch.zeros(0)  # text: no operator here takes it
        if not isinstance(value, int | float | list):
            raise self._refused(node)("it has no value that convscope reads")
        return torch.tensor(value, dtype=torch.float32 if "float" in key else torch.int64)

    def _attribute(self, value: object, name: str) -> object:
        return self._tensor(value, name) if isinstance(value, np.ndarray) else value

    def _tensor(self, array: np.ndarray, name: str) -> torch.Tensor:
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{self.file.path} holds a tensor of a type that PyTorch does not compute with ({name}: "
                f"{array.dtype.name}). Give the float model that it was made from.",
                code="values-unsupported",
                path=str(self.file.path),
                name=name,
                found=array.dtype.name,
            ) from error

    # names -----------------------------------------------------------------------------------------

    def _refused(self, node: FileNode) -> Callable[[str], ModelError]:
        return lambda what: ModelError(
            f"{self.file.path} can't be computed: {node.where}: {what}.",
            code="node-failed",
            path=str(self.file.path),
            name=node.where,
            reason=what,
        )

    def _made(self, name: str, scope: _Scope, where: str) -> Given | None:
        """What a name stands for, for `where`.

        Raises:
            ModelError: nothing before that makes it.
        """
        try:
            return scope.find(name)
        except KeyError:
            raise ModelError(
                f"{self.file.path} is damaged: nothing before the {where.removeprefix('the ')} makes {name!r}. "
                "Copy or download it again.",
                code="file-damaged",
                path=str(self.file.path),
                name=name,
            ) from None

    def _name(self, scope: _Scope, name: str, given: Given | None) -> None:
        if name in scope.names:
            raise ModelError(
                f"{self.file.path} is damaged: two of its tensors are called {name!r}.",
                code="file-damaged",
                path=str(self.file.path),
                name=name,
            )
        scope.names[name] = given

    def _name_all(self, scope: _Scope, names: Sequence[str], made: Sequence[Given | None], node: FileNode) -> None:
        named = sum(bool(name) for name in names[len(made) :])
        if named:
            raise self._refused(node)(f"it makes {len(made)} outputs, and has {len(names)}")
        for name, given in zip(names, made, strict=False):
            if name:
                self._name(scope, name, given)

    def _key(self, name: str, scope: _Scope) -> str:
        """The name under which a tensor is passed on, which no other has; "" for one that is not used."""
        if not name:
            return ""
        return _unused(scope.key_of(name), self._keys)

    def _path_of(self, node: FileNode, keys: Sequence[str], scope: _Scope) -> str:
        """The layer's path: the node's name, or its first output's; the same one twice is numbered."""
        own = f"{node.name}{scope.suffix}" if node.name else next(key for key in keys if key)
        return _unused(own, self._paths)


_CONSTANTS = ("value", "value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings")


def _unused(base: str, taken: set[str]) -> str:
    """`base`, numbered if it is taken, and taken from now on."""
    name, again = base, 1
    while name in taken:
        again += 1
        name = f"{base}~{again}"
    taken.add(name)
    return name
