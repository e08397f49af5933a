"""ONNX files as PyTorch modules that can be differentiated: one `Step` for each node, named as Netron names it.

The well-known converters need a torchvision that fits the torch at hand, or know old operator sets only; the operators
that convolutional networks use are few, and `onnx_operators.py` has them in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import external_data_helper, helper, numpy_helper
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.files import sha256
from convscope.networks.modules import Described, OpenedModule
from convscope.networks.network import Source
from convscope.networks.onnx_operators import OPERATORS, Batch, Node

_QUANTISED = ("QLinear", "QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize")


def read(path: Path) -> OpenedModule:
    """An ONNX file as a module.

    Raises:
        ModelError: it is damaged, lacks its external data, takes no picture, or uses what can't be converted, by name.
    """
    model = _loaded(path)
    opsets = {item.domain or "ai.onnx": item.version for item in model.opset_import}
    graph = model.graph
    _check_operators(path, graph.node)
    inputs = _inputs(graph)
    pictures = [name for name, shape in inputs.items() if shape is None or len(shape) == 4]
    if not pictures:
        found = "; ".join(f"{name} {tuple(shape or ())}" for name, shape in inputs.items()) or "none"
        raise ModelError(f"{path} has no input for a picture (n, c, h, w); its inputs: {found}.")
    module = OnnxModule(graph, opsets.get("ai.onnx", 1), inputs, path)
    shape = inputs[pictures[0]]
    last = shape is not None and shape[1] not in (1, 3, None) and shape[3] in (1, 3)
    free = None if shape is None else (None, *shape[1:])
    made = " ".join(part for part in (model.producer_name, model.producer_version) if part)
    notes = [f"ONNX, operator set {opsets.get('ai.onnx', '?')}, IR version {model.ir_version}"]
    notes += [f"made by {made}"] if made else []
    notes += ["weights of half precision, computed with in float32"] if module.widened else []
    return OpenedModule(
        module,
        Source(path.name, str(path), sha256(path), tuple(notes)),
        input_shape=free,
        options={"channels_last_input": last, "name": path.stem, **({"input": pictures[0]} if len(inputs) > 1 else {})},
    )


def _loaded(path: Path) -> Any:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has its own errors
        raise ModelError(
            f"{path} can't be read as ONNX ({one_line(error)[:160]}). Copy or download it again."
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path} holds no ONNX graph: it is damaged, or of another format. Copy or download it again.")
    beside = {
        _location(tensor) for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)
    }
    missing = [name for name in beside if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(f"{path} keeps its weights in {missing[0]!r}, which is not beside it. Put it into the folder.")
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # also where the file names a place outside of its folder
        raise ModelError(f"the weights beside {path} can't be read ({one_line(error)[:160]}).") from error
    return model


def _location(tensor: Any) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _check_operators(path: Path, nodes: Iterable[Any]) -> None:
    """Refuse, all at once, what the table does not have."""
    names = Counter(
        f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for node in nodes
        if node.domain not in ("", "ai.onnx") or (node.op_type not in OPERATORS and node.op_type != "Constant")
    )
    if not names:
        return
    listed = ", ".join(f"{name} ({count})" for name, count in names.most_common(6)) + (", …" if len(names) > 6 else "")
    if any(name.rpartition(".")[2].startswith(_QUANTISED) for name in names):
        raise ModelError(
            f"{path} is int8-quantised ({listed}): it has no gradients to look with. Give the float model that it was "
            "made from."
        )
    what = "control flow or " if {"If", "Loop", "Scan"} & set(names) else ""
    raise ModelError(
        f"{path} uses {what}operators that convscope can't convert: {listed}. Export the model without them, or open "
        "the model that it was made from."
    )


def _inputs(graph: Any) -> dict[str, tuple[int | None, ...] | None]:
    """Shape of each input by name, None where free; None for one without a shape. Old files list weights as inputs."""
    weights = {tensor.name for tensor in graph.initializer}
    return {value.name: _shape(value) for value in graph.input if value.name not in weights}


def _shape(value: Any) -> tuple[int | None, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in kind.shape.dim
    )


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
        self._constants: list[str | None] = []
        names = _WEIGHTS.get(node.operator, ())
        for place, value in enumerate(inputs):
            name = names[place] if place < len(names) and names[place] else f"input_{place}"
            self._constants.append(name if isinstance(value, torch.Tensor) else None)
            if isinstance(value, torch.Tensor):
                weight = name in ("weight", "bias") and value.is_floating_point()
                held = nn.Parameter(value, requires_grad=False) if weight else value
                self.register_parameter(name, held) if weight else self.register_buffer(name, held)  # type: ignore[arg-type]
        self.groups = int(node.get("group", 1))
        kernel = getattr(self, "weight", None)
        if node.operator == "Conv" and kernel is not None:
            self.in_channels = int(kernel.shape[1]) * self.groups

    def forward(self, *given: torch.Tensor) -> Any:
        """What the operator makes of the tensors that are no constants."""
        tensors = iter(given)
        values = [
            next(tensors) if name is not None else (None if held is None else getattr(self, held))
            for name, held in zip(self.inputs, self._constants, strict=True)
        ]
        return self._operator(self.node, *values)


class OnnxModule(nn.Module):
    """A graph, node after node; a tensor is let go after its last use.

    Attributes:
        input_names, output_names: as in the file; input_shapes: `(n, ...)` by name, None for what is free.
        widened: True if weights of half precision were made float32.
    """

    def __init__(self, graph: Any, opset: int, inputs: dict[str, tuple[int | None, ...] | None], path: Path) -> None:
        super().__init__()
        self.input_names = list(inputs)
        self.input_shapes = {name: shape for name, shape in inputs.items() if shape is not None}
        self.output_names = [value.name for value in graph.output]
        first = next((shape for shape in inputs.values() if shape), None)
        self._batch = Batch(first[0] if first else None)
        self._path, self.widened = path, False
        constants: dict[str, torch.Tensor] = {}
        for tensor in graph.initializer:
            constants[tensor.name] = self._tensor(tensor)
        taken: set[str] = set()
        for number, node in enumerate(graph.node):
            name = self._name(node, taken)
            taken.add(name)
            self._add(number, node, name, opset, constants)
        self._kept = {name: value for name, value in constants.items() if name in self.output_names}
        self._last = self._last_uses()

    def forward(self, *given: torch.Tensor) -> Any:
        """The output, or a dictionary of several; one tensor for each of `input_names`."""
        values = {**self._kept, **dict(zip(self.input_names, given, strict=True))}
        self._batch.actual = int(given[0].shape[0]) if given and given[0].dim() else 1
        for number, step in self.named_children():
            assert isinstance(step, Step)
            made = step(*(values[name] for name in step.inputs if name is not None))
            values.update(zip(step.outputs, made if isinstance(made, tuple | list) else (made,), strict=False))
            for name in self._last[number]:
                values.pop(name, None)
        returned = {name: values[name] for name in self.output_names}
        return returned if len(returned) > 1 else next(iter(returned.values()))

    def _tensor(self, tensor: Any) -> torch.Tensor:
        try:
            array = numpy_helper.to_array(tensor)
        except Exception as error:
            raise ModelError(
                f"{self._path} holds a tensor that can't be read ({tensor.name}: {one_line(error)})."
            ) from error
        if array.dtype.kind in "OSU":
            return torch.zeros(0)  # text: no operator here takes it
        if array.dtype == np.float16 or array.dtype.name == "bfloat16":
            self.widened = True
            array = array.astype(np.float32)
        # From bytes: NumPy's memory may be read-only, and unaligned.
        return torch.from_numpy(np.array(array, copy=True))

    def _name(self, node: Any, taken: set[str]) -> str:
        """The node's name, or its first output's; the same one twice is numbered."""
        name = base = node.name or next(output for output in node.output if output)
        again = 1
        while name in taken:
            again += 1
            name = f"{base}~{again}"
        return name

    def _add(self, number: int, node: Any, name: str, opset: int, constants: dict[str, torch.Tensor]) -> None:
        """A step, or, where nothing but constants goes in, its value."""
        attributes = {item.name: self._attribute(item) for item in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(attributes)
            return
        if node.op_type == "Cast" and attributes.get("to") in (10, 16) and self.widened:
            attributes["to"] = 1
        outputs = len([output for output in node.output if output]) if node.output else 1
        operator = Node(name, node.op_type, opset, attributes, max(outputs, len(node.output)), self._batch)
        inputs = [constants.get(given, given) if given else None for given in node.input]
        step = Step(operator, inputs, node.output)
        if any(isinstance(given, str) for given in inputs):
            self.add_module(str(number), step)
            return
        with torch.no_grad():
            made = step()
        constants.update(zip(node.output, made if isinstance(made, tuple | list) else (made,), strict=False))

    def _attribute(self, item: Any) -> Any:
        value = helper.get_attribute_value(item)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, onnx.TensorProto):
            return self._tensor(value)
        return list(value) if item.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value

    def _last_uses(self) -> dict[str, list[str]]:
        """For each step the tensors that no later one needs."""
        last: dict[str, str] = {}
        for number, step in self.named_children():
            assert isinstance(step, Step)
            last.update({name: number for name in (*step.inputs, *step.outputs) if name})
        gone: dict[str, list[str]] = {number: [] for number, _ in self.named_children()}
        for name, number in last.items():
            if name not in self.output_names:
                gone[number].append(name)
        return gone


def _constant(attributes: dict[str, Any]) -> torch.Tensor:
    (key, value), *_ = attributes.items()
    kinds = {"value_float": torch.float32, "value_floats": torch.float32}
    kinds |= {"value_int": torch.int64, "value_ints": torch.int64}
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=kinds.get(key))
