"""ONNX files as PyTorch modules that can be differentiated: one `Step` for each node, named as Netron names it.

The well-known converters need a torchvision that fits the torch at hand, or know old operator sets only; the operators
that convolutional networks use are few, and `onnx_operators.py` has them in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import external_data_helper, helper, numpy_helper
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.files import sha256
from convscope.networks.modules import Described, OpenedModule
from convscope.networks.network import Source
from convscope.networks.onnx_operators import OPERATORS, READS_NUMBERS, TYPES, Batch, Node

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Input:
    """What a graph declares of an input: its shape, None where free or not said, and ONNX's number of its type."""

    shape: Shape | None
    kind: int

    @property
    def text(self) -> str:
        """For messages: "(?, 3, 224, 224)"."""
        if self.shape is None:
            return "of unknown shape"
        return "(" + ", ".join("?" if side is None else str(side) for side in self.shape) + ")"


def read(path: Path) -> OpenedModule:
    """An ONNX file as a module.

    Raises:
        ModelError: it is damaged, lacks its external data, takes no picture, or uses what can't be converted, by name.
    """
    model = _loaded(path)
    opset = _opset(model)
    inputs = _inputs(model.graph, path)
    picture = _picture(inputs, path)
    last = _is_channels_last(model.graph, picture, inputs[picture].shape)
    module = module_of(model.graph, opset, inputs, path, picture)
    shape = inputs[picture].shape
    return OpenedModule(
        module,
        Source(path.name, str(path), sha256(path), _notes(model, opset, module, last)),
        # Whatever batch is declared, others are passed.
        input_shape=None if shape is None else (None, *shape[1:]),
        options={
            "channels_last_input": last,
            "name": path.stem,
            **({"input": picture} if len(inputs) > 1 else {}),
        },
    )


def _notes(model: Any, opset: int, module: OnnxModule, last: bool) -> tuple[str, ...]:
    made = " ".join(part for part in (model.producer_name, model.producer_version) if part)
    notes = [f"ONNX, operator set {opset}, IR version {model.ir_version}"]
    notes += [f"made by {made}"] if made else []
    notes += ["takes pictures (n, h, w, c)"] if last else []
    notes += ["of half precision, computed with in float32"] if module.widened else []
    if any(step.node.operator == "QuantizeLinear" for step in module.steps):
        notes.append("quantised; computed with in float, values rounded as in the file, gradients as if they were not")
    return tuple(notes)


# -- the file --------------------------------------------------------------------------------------------


def _loaded(path: Path) -> Any:
    try:
        # Without a format the file's name decides, and text would be read as well.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf has its own errors
        raise ModelError(
            f"{path} can't be read as ONNX ({one_line(error)[:160]}). Copy or download it again."
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path} holds no ONNX graph: it is damaged, or of another format. Copy or download it again.")
    _load_beside(model, path)
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _load_beside(model: Any, path: Path) -> None:
    """Weights that lie in files of their own, from the model's folder only."""
    stored = [item for item in model.graph.initializer if external_data_helper.uses_external_data(item)]
    names = dict.fromkeys(_location(item) for item in stored)
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ModelError(
            f"{path} keeps its weights outside of its folder, in {outside[0]!r}, which is not read. "
            "Put them beside it and save the model anew."
        )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(f"{path} keeps its weights in {missing[0]!r}, which is not beside it. Put it into the folder.")
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # ONNX's own checks: links, files that are too short
        raise ModelError(
            f"the weights beside {path} can't be read ({one_line(error)[:160]}). Copy them again."
        ) from error


def _location(tensor: Any) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _opset(model: Any) -> int:
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 1)


# -- inputs ----------------------------------------------------------------------------------------------


def _inputs(graph: Any, path: Path) -> dict[str, Input]:
    """What the graph is given, by name; files of old versions list weights among them."""
    weights = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in weights]
    for value in values:
        what = value.type.WhichOneof("value") or "tensor_type"
        if what != "tensor_type" or value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            kind = "text" if what == "tensor_type" else what.removesuffix("_type")
            raise ModelError(
                f"{path} takes {kind} at its input {value.name!r}; convscope feeds tensors of numbers only."
            )
    return {value.name: Input(_shape(value), value.type.tensor_type.elem_type) for value in values}


def _shape(value: Any) -> Shape | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in kind.shape.dim
    )


def _picture(inputs: dict[str, Input], path: Path) -> str:
    """The input for the picture: the first of four axes, else the first whose shape is not declared."""
    for fits in (lambda shape: shape is not None and len(shape) == 4, lambda shape: shape is None):
        for name, item in inputs.items():
            if fits(item.shape):
                return name
    found = "; ".join(f"{name} {item.text}" for name, item in inputs.items()) or "none"
    raise ModelError(f"{path} has no input for a picture (n, c, h, w); its inputs: {found}.")


# What may stand between a picture and the transposition that brings its channels to the front.
_BEFORE = {"Cast", "Identity", "Add", "Sub", "Mul", "Div", "Clip", "QuantizeLinear", "DequantizeLinear"}


def _is_channels_last(graph: Any, picture: str, shape: Shape | None) -> bool:
    """Whether pictures enter as (n, h, w, c): the shape says so, or the graph brings the channels to the front."""
    if shape is not None and shape[1] in (1, 3):
        return False
    return (shape is not None and shape[3] in (1, 3)) or _is_turned(graph, picture)


def _is_turned(graph: Any, picture: str) -> bool:
    names = {picture}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in names:
            return any(list(item.ints) == [0, 3, 1, 2] for item in node.attribute)
        if node.op_type in _BEFORE and names & set(node.input):
            names.update(node.output)
    return False


# -- what can't be converted -----------------------------------------------------------------------------

_QUANTISED = (
    *("QLinear", "QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize"),
    *("QGemm", "QAttention"),
)
_CONTROL = {"If", "Loop", "Scan"}


def _refusal(path: Path, names: Counter[str]) -> ModelError:
    """Everything that the table does not have, at once."""
    listed = ", ".join(f"{name} ({count})" for name, count in names.most_common(6)) + (", …" if len(names) > 6 else "")
    if any(name.rpartition(".")[2].startswith(_QUANTISED) for name in names):
        return ModelError(
            f"{path} is int8-quantised ({listed}): it has no gradients to look with. Give the float model that it was "
            "made from."
        )
    what = "control flow or " if _CONTROL & set(names) else ""
    do = "Export the model without them, or open the model that it was made from."
    if any(name.startswith("com.microsoft.") for name in names):
        do = "They are onnxruntime's own: give the file from before its optimiser."
    return ModelError(f"{path} uses {what}operators that convscope can't convert: {listed}. {do}")


# -- the module ------------------------------------------------------------------------------------------

# What an operator's inputs are called where they are weights: as `torch.nn` calls them.
_WEIGHTS = {
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Gemm": ("", "weight", "bias"),
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "InstanceNormalization": ("", "weight", "bias"),
    "LayerNormalization": ("", "weight", "bias"),
    "GroupNormalization": ("", "weight", "bias"),
}


class Step(nn.Module):
    """One node of the graph.

    Args:
        node: what the operator has to know.
        inputs: for each input the name of its tensor, or the constant itself, or None where it is left out.
        outputs: names of what it makes, "" where nobody asks for it.
    """

    def __init__(self, node: Node, inputs: Sequence[str | torch.Tensor | None], outputs: Sequence[str]) -> None:
        super().__init__()
        kind, self._operator = OPERATORS[node.operator]
        self.node, self.outputs = node, tuple(outputs)
        self.described = Described(node.operator, kind, node.name)
        self.inputs: list[str | None] = [name if isinstance(name, str) else None for name in inputs]
        self._held: list[str | None] = [
            self._hold(place, value) if isinstance(value, torch.Tensor) else None for place, value in enumerate(inputs)
        ]
        self.groups = int(node.get("group", 1))
        kernel = getattr(self, "weight", None)
        if node.operator == "Conv" and kernel is not None:
            self.in_channels = int(kernel.shape[1]) * self.groups

    def _hold(self, place: int, value: torch.Tensor) -> str:
        """Keep a constant, and say under which name: weights and what is computed with as PyTorch's modules do."""
        names = _WEIGHTS.get(self.node.operator, ())
        name = names[place] if place < len(names) and names[place] else f"input_{place}"
        learned = not name.startswith("running") and value.numel() > 1 and self.node.operator not in READS_NUMBERS
        if value.is_floating_point() and (name in ("weight", "bias") or learned):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        elif value.is_floating_point() and not (place and self.node.operator in READS_NUMBERS):
            self.register_buffer(name, value)
        else:
            # Shapes, axes and indices stay on the CPU, where Python reads them without waiting for a device.
            object.__setattr__(self, name, value)
        return name

    @property
    def constants(self) -> list[torch.Tensor]:
        """The inputs that are constants."""
        return [getattr(self, held) for held in self._held if held is not None]

    def forward(self, *given: torch.Tensor) -> Any:
        """What the operator makes of the tensors that are no constants.

        Raises:
            ModelError: they don't fit it.
        """
        tensors = iter(given)
        values = [
            next(tensors) if name is not None else (None if held is None else getattr(self, held))
            for name, held in zip(self.inputs, self._held, strict=True)
        ]
        if self.node.operator not in READS_NUMBERS:
            values = _together(values)
        try:
            return self._operator(self.node, *values)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, NotImplementedError) as error:
            raise ModelError(self._cant(error)) from error

    def _cant(self, error: Exception) -> str:
        batch = self.node.batch
        reason = one_line(error)[:200].rstrip(".")
        why = f"the node {self.node.name!r} ({self.node.operator}) can't be computed: {reason}."
        if batch.declared not in (None, batch.actual):
            why += f" The file declares batches of {batch.declared}, and this one has {batch.actual}: "
            why += "export it with a free batch."
        return why


def _together(values: list[Any]) -> list[Any]:
    """Numbers made from shapes are on the CPU; beside a tensor on another device they follow it."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    if device is None:
        return values
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


class OnnxModule(nn.Module):
    """A graph, node after node; a tensor is let go after its last use.

    Attributes:
        input_names, output_names: as in the file; input_shapes: `(n, ...)` by name, None for what is free.
        widened: True if values of half precision were made float32.
    """

    def __init__(self, graph: _Graph, inputs: dict[str, Input], outputs: dict[str, str], picture: str) -> None:
        super().__init__()
        self.input_names, self.output_names = list(inputs), list(outputs)
        self.input_shapes = {name: item.shape for name, item in inputs.items() if item.shape is not None}
        self.widened = graph.widened or any(item.kind in _HALF for item in inputs.values())
        # The picture comes in float, whatever the file declares, so that it has a gradient.
        self._casts = {name: TYPES[item.kind] for name, item in inputs.items() if _is_whole(item) and name != picture}
        self._outputs, self._picture, self._batch = outputs, self.input_names.index(picture), graph.batch
        for number, step in enumerate(graph.steps):
            self.add_module(str(number), step)
        self._kept = {name: graph.constants[name] for name in outputs.values() if name in graph.constants}
        self._gone = _last_uses(graph.steps, keep=set(outputs.values()))

    @property
    def steps(self) -> list[Step]:
        """The nodes in the order of execution."""
        return [step for step in self.children() if isinstance(step, Step)]

    def forward(self, *given: torch.Tensor) -> Any:
        """The output, or a dictionary of several; one tensor for each of `input_names`."""
        values: dict[str, Any] = dict(self._kept)
        for name, value in zip(self.input_names, given, strict=True):
            values[name] = value.to(self._casts[name]) if name in self._casts else value
        picture = given[self._picture]
        self._batch.actual = int(picture.shape[0]) if picture.dim() else 1
        for step, gone in zip(self.steps, self._gone, strict=True):
            made = step(*(values[name] for name in step.inputs if name is not None))
            values.update(zip(step.outputs, made if isinstance(made, tuple | list) else (made,), strict=False))
            for name in gone:
                values.pop(name, None)
        returned = {name: values[inner] for name, inner in self._outputs.items()}
        return returned if len(returned) > 1 else next(iter(returned.values()))


def _last_uses(steps: Sequence[Step], keep: set[str]) -> list[list[str]]:
    """For each step the tensors that no later one needs."""
    last = {name: number for number, step in enumerate(steps) for name in (*step.inputs, *step.outputs) if name}
    gone: list[list[str]] = [[] for _ in steps]
    for name, number in last.items():
        if name not in keep:
            gone[number].append(name)
    return gone


def module_of(graph: Any, opset: int, inputs: dict[str, Input], path: Path, picture: str) -> OnnxModule:
    """A graph as a module.

    Raises:
        ModelError: it uses operators that can't be converted, or tensors that nothing makes.
    """
    built = _Graph(path, opset, inputs)
    built.add(graph)
    if built.missing:
        raise _refusal(path, built.missing)
    outputs = {value.name: built.renamed.get(value.name, value.name) for value in graph.output}
    for name, inner in outputs.items():
        built.check_made(inner, f"output {name!r}")
    # Only now: constants that were folded above belong to no batch.
    shape = inputs[picture].shape
    built.batch.declared = shape[0] if shape else None
    return OnnxModule(built, inputs, outputs, picture)


_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def _is_whole(item: Input) -> bool:
    return item.kind in TYPES and not TYPES[item.kind].is_floating_point


class _Graph:
    """What a graph is turned into: steps, and the constants that nothing but constants goes into.

    Attributes:
        steps: in the order of execution; constants: tensors by name.
        renamed: what a branch calls a tensor, by the name that the graph has for it.
        missing: operators that can't be converted, with how often they occur.
    """

    def __init__(self, path: Path, opset: int, inputs: Iterable[str]) -> None:
        self.path, self.opset, self.batch = path, opset, Batch()
        self.steps: list[Step] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.renamed: dict[str, str] = {}
        self.missing: Counter[str] = Counter()
        self.widened = False
        self._made, self._paths = set(inputs), set[str]()

    def add(self, graph: Any) -> None:
        """The nodes of a graph, or of a branch that is known to be taken."""
        for tensor in graph.initializer:
            self.constants[tensor.name] = self._tensor(tensor)
        for node in graph.node:
            self._add_node(node)

    def check_made(self, name: str, where: str) -> None:
        """Make sure that something makes a tensor."""
        if name not in self.constants and name not in self._made:
            raise ModelError(
                f"{self.path} is damaged: nothing before the {where} makes {name!r}. Copy or download it again."
            )

    def _add_node(self, node: Any) -> None:
        attributes = {item.name: self._attribute(item) for item in node.attribute}
        foreign = node.domain not in ("", "ai.onnx")
        inputs = [self._given(name, node) for name in node.input]
        if node.op_type == "Constant" and not foreign:
            self.constants[node.output[0]] = _constant(attributes)
        elif node.op_type == "If" and not foreign and isinstance(inputs[0], torch.Tensor):
            self._take_branch(node, attributes["then_branch" if bool(inputs[0]) else "else_branch"])
        elif foreign or node.op_type not in OPERATORS:
            self.missing[f"{node.domain}.{node.op_type}" if foreign else node.op_type] += 1
            self._made.update(node.output)
        else:
            self._add_step(node, attributes, inputs)

    def _add_step(self, node: Any, attributes: dict[str, Any], inputs: list[str | torch.Tensor | None]) -> None:
        """A step, or, where nothing but constants goes in, its value."""
        if node.op_type == "Cast" and attributes.get("to") in _HALF:
            attributes["to"], self.widened = onnx.TensorProto.FLOAT, True
        operator = Node(self._path_of(node), node.op_type, self.opset, attributes, len(node.output), self.batch)
        step = Step(operator, inputs, node.output)
        if any(isinstance(given, str) for given in inputs):
            self.steps.append(step)
            self._made.update(node.output)
            return
        with torch.no_grad():
            made = step()
        self.constants.update(zip(node.output, made if isinstance(made, tuple | list) else (made,), strict=False))

    def _take_branch(self, node: Any, branch: Any) -> None:
        self.add(branch)
        for name, value in zip(node.output, branch.output, strict=True):
            self.renamed[name] = self.renamed.get(value.name, value.name)

    def _given(self, name: str, node: Any) -> str | torch.Tensor | None:
        if not name:
            return None
        name = self.renamed.get(name, name)
        self.check_made(name, f"node {node.name or node.output[0]!r} ({node.op_type})")
        return self.constants.get(name, name)

    def _path_of(self, node: Any) -> str:
        """The node's name, or its first output's; the same one twice is numbered."""
        path = base = node.name or next(output for output in node.output if output)
        again = 1
        while path in self._paths:
            again += 1
            path = f"{base}~{again}"
        self._paths.add(path)
        return path

    def _attribute(self, item: Any) -> Any:
        value = helper.get_attribute_value(item)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if isinstance(value, onnx.TensorProto):
            return self._tensor(value)
        return list(value) if item.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value

    def _tensor(self, tensor: Any) -> torch.Tensor:
        try:
            array = numpy_helper.to_array(tensor)
        except Exception as error:
            raise ModelError(
                f"{self.path} holds a tensor that can't be read ({tensor.name}: {one_line(error)[:160]})."
            ) from error
        if array.dtype.kind in "OSU":
            return torch.zeros(0)  # text: no operator here takes it
        if array.dtype.name in ("float16", "bfloat16"):
            self.widened = True
            array = array.astype(np.float32)
        try:
            # A copy: the file's own bytes can't be written to, and may not be aligned.
            return torch.from_numpy(np.array(array, copy=True))
        except TypeError as error:
            raise ModelError(
                f"{self.path} holds a tensor of a type that PyTorch does not compute with ({tensor.name}: "
                f"{array.dtype.name}). Give the float model that it was made from."
            ) from error


def _constant(attributes: dict[str, Any]) -> torch.Tensor:
    (key, value), *_ = attributes.items()
    if isinstance(value, torch.Tensor):
        return value
    if key not in ("value_float", "value_floats", "value_int", "value_ints"):
        return torch.zeros(0)  # text: no operator here takes it
    return torch.tensor(value, dtype=torch.float32 if "float" in key else torch.int64)
