"""ONNX files as PyTorch modules that can be differentiated: one `Step` for each node, named as Netron names it.

The well-known converters need a torchvision that fits the torch at hand, or know old operator sets only; the operators
that convolutional networks use are few, and `operators.py` has them in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from convscope import limits
from convscope.errors import ModelError, UsageError, nearest, one_line
from convscope.networks.formats.files import sha256
from convscope.networks.formats.onnx import files as onnx_files
from convscope.networks.formats.onnx.files import Body, FileNode, Input, OnnxFile, Shape
from convscope.networks.formats.onnx.operators import OPERATORS, READS_NUMBERS, TYPES, Batch, Node, check_node
from convscope.networks.network import Source
from convscope.networks.torch.limits import BeyondLimits, allowance, held_to
from convscope.networks.torch.modules import Described, OpenedModule


def read(path: Path, picture: str | None = None) -> OpenedModule:
    """An ONNX file as a module.

    Args:
        path: the file.
        picture: the name of the input that gets the picture; the first that fits where None.

    Raises:
        ModelError: it is damaged, lacks its external data, takes no picture, uses what can't be converted, by name, or
        goes beyond the limits; UsageError: there is no such input for pictures.
    """
    file = onnx_files.read(path)
    picture = _picture(file, picture)
    shape = file.inputs[picture].shape
    last = _is_channels_last(file.graph, picture, shape)
    module = module_of(file, picture)
    return OpenedModule(
        module,
        Source(path.name, str(path), sha256(path), _notes(file, module, last)),
        # Whatever batch is declared, others are passed.
        input_shape=None if shape is None else (None, *shape[1:]),
        input=picture,
        options={"channels_last_input": last, "name": path.stem},
    )


def _notes(file: OnnxFile, module: OnnxModule, last: bool) -> tuple[str, ...]:
    notes = [f"ONNX, operator set {file.opset}, IR version {file.ir_version}"]
    notes += [f"made by {file.made_by}"] if file.made_by else []
    notes += ["takes pictures (n, h, w, c)"] if last else []
    notes += ["of half precision, computed with in float32"] if module.widened else []
    if any(step.node.operator == "QuantizeLinear" for step in module.steps):
        notes.append("quantised; computed with in float, values rounded as in the file, gradients as if they were not")
    return tuple(notes)


# -- inputs ----------------------------------------------------------------------------------------------


def _picture(file: OnnxFile, asked: str | None) -> str:
    """The input for the picture: the one that was asked for, the first of four axes, or of no declared shape."""
    inputs = file.inputs
    if asked is not None:
        return _asked(file, asked)
    for fits in (lambda shape: shape is not None and len(shape) == 4, lambda shape: shape is None):
        for name, item in inputs.items():
            if fits(item.shape):
                return name
    found = "; ".join(f"{name} {item.text}" for name, item in inputs.items()) or "none"
    raise ModelError(f"{file.path} has no input for a picture (n, c, h, w); its inputs: {found}.")


def _asked(file: OnnxFile, name: str) -> str:
    if name not in file.inputs:
        raise UsageError(f"no input {name!r}; {nearest(name, file.inputs)}")
    item = file.inputs[name]
    if item.shape is not None and len(item.shape) != 4:
        raise UsageError(f"the input {name!r} takes no picture (n, c, h, w): it is {item.text}.")
    return name


# What may stand between a picture and the transposition that brings its channels to the front.
_BEFORE = {"Cast", "Identity", "Add", "Sub", "Mul", "Div", "Clip", "QuantizeLinear", "DequantizeLinear"}


def _is_channels_last(graph: Body, picture: str, shape: Shape | None) -> bool:
    """Whether pictures enter as (n, h, w, c): the shape says so, or the graph brings the channels to the front."""
    if shape is not None and shape[1] in (1, 3):
        return False
    return (shape is not None and shape[3] in (1, 3)) or _is_turned(graph, picture)


def _is_turned(graph: Body, picture: str) -> bool:
    names = {picture}
    for node in graph.nodes:
        if node.operator == "Transpose" and names & set(node.inputs[:1]):
            return node.attributes.get("perm") == [0, 3, 1, 2]
        if node.operator in _BEFORE and names & set(node.inputs):
            names.update(node.outputs)
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
        self._like = (node.operator, node.opset, node.outputs, repr(sorted(node.attributes.items())))
        self._numbers = _are_numbers(node.operator, len(inputs))
        self._forms = [
            _form_of(value, is_number) if isinstance(value, torch.Tensor) else None
            for value, is_number in zip(inputs, self._numbers, strict=True)
        ]
        self.groups = int(node.get("group", 1))
        kernel = getattr(self, "weight", None)
        if node.operator == "Conv" and kernel is not None and kernel.dim() > 2:
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
            ModelError: they don't fit it, or it would take more than the limits allow.
        """
        tensors = iter(given)
        values = [
            next(tensors) if name is not None else (None if held is None else getattr(self, held))
            for name, held in zip(self.inputs, self._held, strict=True)
        ]
        if self.node.operator not in READS_NUMBERS:
            values = _together(values)
        try:
            return self._within_limits(values)
        except BeyondLimits as error:
            raise ModelError(self._cant(error)) from error
        except (torch.OutOfMemoryError, ModelError):
            raise
        except Exception as error:  # whatever Python, NumPy or torch raise at values that don't fit
            raise ModelError(self._cant(error)) from error

    def _within_limits(self, values: list[Any]) -> Any:
        """What the operator makes. Shapes and numbers that no such node has met yet are checked beforehand."""
        batch = self.node.batch
        form = self._form(values)
        if form is not None and form in batch.met:
            return self._operator(self.node, *values)
        with held_to(allowance(batch.actual, batch.held)):
            made = self._operator(self.node, *values)
        if form is not None:
            batch.met.add(form)
        return made

    def _form(self, values: list[Any]) -> Any:
        """Everything that decides how much the operator makes; None if that is a lot of numbers."""
        form: list[Any] = [self._like, self.node.batch.actual]
        for value, held, is_number in zip(values, self._forms, self._numbers, strict=True):
            if held is not None:
                form.append(held)
            elif value is not None and is_number and value.numel() > MOST_NUMBERS:
                return None
            elif value is not None:
                form.append(_form_of(value, is_number))
        return tuple(form)

    def _cant(self, error: Exception) -> str:
        batch = self.node.batch
        reason = one_line(error)[:200].rstrip(".")
        why = f"the node {self.node.name!r} ({self.node.operator}) can't be computed: {reason}."
        if batch.declared not in (None, batch.actual):
            why += f" The file declares batches of {batch.declared}, and this one has {batch.actual}: "
            why += "export it with a free batch."
        return why


MOST_NUMBERS = 64


def _form_of(value: torch.Tensor, is_number: bool) -> Any:
    return value.shape, value.dtype, tuple(value.reshape(-1).tolist()) if is_number else ()


def _are_numbers(operator: str, count: int) -> list[bool]:
    """For each input whether its values decide how much is made."""
    reads = operator in READS_NUMBERS or operator == "OneHot"
    return [reads and (place > 0 or operator in ("ConstantOfShape", "Range")) for place in range(count)]


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
        unbatched: inputs that are the same whole array for every batch.
        widened: True if values of half precision were made float32.
    """

    remembers_nothing = True  # of a pass

    def __init__(self, built: _Builder, outputs: dict[str, str | torch.Tensor], picture: str) -> None:
        super().__init__()
        inputs = built.file.inputs
        self.input_names, self.output_names = list(inputs), list(outputs)
        self.input_shapes = {name: item.shape for name, item in inputs.items() if item.shape is not None}
        self.unbatched = _unbatched(self.input_shapes, picture)
        self.widened = built.widened or any(item.kind in _HALF for item in inputs.values())
        # The picture comes in float, whatever the file declares, so that it has a gradient.
        self._casts = {name: TYPES[item.kind] for name, item in inputs.items() if _is_whole(item) and name != picture}
        self._outputs = {name: value for name, value in outputs.items() if isinstance(value, str)}
        self._kept = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        self._picture, self._batch = self.input_names.index(picture), built.batch
        for number, step in enumerate(built.steps):
            self.add_module(str(number), step)
        self._gone = _last_uses(built.steps, keep=set(self._outputs.values()))

    @property
    def steps(self) -> list[Step]:
        """The nodes in the order of execution."""
        return [step for step in self.children() if isinstance(step, Step)]

    def forward(self, *given: torch.Tensor) -> Any:
        """The output, or a dictionary of several; one tensor for each of `input_names`.

        Raises:
            ModelError: a node can't be computed, or all of them together take more than the limits allow.
        """
        values: dict[str, Any] = {}
        for name, value in zip(self.input_names, given, strict=True):
            values[name] = value.to(self._casts[name]) if name in self._casts else value
        picture = given[self._picture]
        self._batch.actual = int(picture.shape[0]) if picture.dim() else 1
        left = _WHOLE * allowance(self._batch.actual, self._batch.held).size
        for step, gone in zip(self.steps, self._gone, strict=True):
            made = _tuple(step(*(values[name] for name in step.inputs if name is not None)))
            left -= sum(value.numel() * value.element_size() for value in made)
            if left < 0:
                raise ModelError(
                    f"the nodes up to {step.node.name!r} make more values than one image should take "
                    f"({limits.how_to_raise('values')})."
                )
            values.update(zip(step.outputs, made, strict=False))
            for name in gone:
                values.pop(name, None)
        returned = self._kept | {name: values[inner] for name, inner in self._outputs.items()}
        returned = {name: returned[name] for name in self.output_names}
        return returned if len(returned) > 1 else next(iter(returned.values()))


_WHOLE = 16  # so many times what one operation may make, for all of a pass


def _tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return tuple(made) if isinstance(made, tuple | list) else (made,)


def _unbatched(shapes: dict[str, Shape], picture: str) -> set[str]:
    """Inputs whose first side is a number that is no batch: sizes, anchors, a scalar."""
    batch = next(iter(shapes.get(picture, ())), None)
    return {
        name for name, shape in shapes.items() if name != picture and (not shape or shape[0] not in (None, 1, batch))
    }


def _last_uses(steps: Sequence[Step], keep: set[str]) -> list[list[str]]:
    """For each step the tensors that no later one needs."""
    last = {name: number for number, step in enumerate(steps) for name in (*step.inputs, *step.outputs) if name}
    gone: list[list[str]] = [[] for _ in steps]
    for name, number in last.items():
        if name not in keep:
            gone[number].append(name)
    return gone


def module_of(file: OnnxFile, picture: str) -> OnnxModule:
    """A graph as a module.

    Raises:
        ModelError: it uses operators that can't be converted, or tensors that nothing makes.
    """
    built = _Builder(file)
    try:
        outputs = built.build()
    except RecursionError as error:
        raise ModelError(f"{file.path} nests functions too deep.") from error
    if built.missing:
        raise _refusal(file.path, built.missing)
    # Only now: constants that were folded above belong to no batch.
    shape = file.inputs[picture].shape if picture in file.inputs else None
    built.batch.declared = shape[0] if shape else None
    return OnnxModule(built, outputs, picture)


_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def _is_whole(item: Input) -> bool:
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

    def __init__(self, opset: int, around: _Scope | None = None, arguments: Mapping[str, Any] | None = None) -> None:
        self.opset, self.around, self.arguments = opset, around, arguments or {}
        self.suffix: str = "" if around is None else around.suffix
        self.wanted: dict[str, str] = {}
        self.names: dict[str, Given | None] = {}

    def key_of(self, name: str) -> str:
        """What a tensor is best called beyond this scope."""
        return self.wanted.get(name, f"{name}{self.suffix}")

    def find(self, name: str) -> Given | None:
        """What a name stands for; None for an input of a function that was left out.

        Raises:
            KeyError: nothing has made it yet.
        """
        if name in self.names or self.around is None:
            return self.names[name]
        return self.around.find(name)


class _Builder:
    """What a graph is turned into.

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
        """Turn the graph into steps; what its outputs are."""
        scope = _Scope(self.file.opset)
        scope.names.update((name, name) for name in self.file.inputs)
        self._add(self.file.graph, scope)
        if not self.file.graph.outputs:
            raise ModelError(f"{self.file.path} declares no output, so there is nothing to explain.")
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

    def _bound(self, node: FileNode, scope: _Scope) -> dict[str, Any]:
        """A node's attributes; where one refers to the function's and that was not given, it is left out."""
        values = {key: scope.arguments.get(name) for key, name in node.references.items()}
        return {**node.attributes, **{key: value for key, value in values.items() if value is not None}}

    # what a node becomes ---------------------------------------------------------------------------

    def _add_step(self, node: FileNode, inputs: list[Given | None], attributes: dict[str, Any], scope: _Scope) -> None:
        """A step, or, where nothing but constants goes in, its value."""
        check_node(node.operator, inputs, node.outputs, attributes, self._refused(node))
        if node.operator == "Cast" and attributes.get("to") in _HALF:
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
            made = _tuple(step())
        self._left -= sum(value.numel() * value.element_size() for value in made)
        if self._left < 0:
            raise self._refused(node)(f"the constants up to it are too large ({limits.how_to_raise('values')})")
        self._name_all(scope, node.outputs, made, node)

    def _take_branch(self, node: FileNode, yes: torch.Tensor, attributes: dict[str, Any], scope: _Scope) -> None:
        """The branch of an `If` whose condition is known."""
        if yes.numel() != 1:
            raise self._refused(node)(f"its condition has {yes.numel()} values, and not one")
        branch = attributes.get("then_branch" if bool(yes) else "else_branch")
        if not isinstance(branch, Body) or branch.inputs:
            raise self._refused(node)("it lacks a branch, or that has inputs")
        self._add_inside(branch, _Scope(scope.opset, scope, scope.arguments), node, scope)

    def _call(
        self, function: Body, node: FileNode, inputs: list[Given | None], attributes: dict[str, Any], scope: _Scope
    ) -> None:
        """What a function of the file does, in place of the node that calls it."""
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

    def _constant(self, node: FileNode, attributes: dict[str, Any]) -> torch.Tensor:
        key, value = next(((key, value) for key, value in attributes.items() if key in _CONSTANTS), ("", None))
        if isinstance(value, np.ndarray):
            return self._tensor(value, node.outputs[0])
        if key in ("value_string", "value_strings"):
            return torch.zeros(0)  # text: no operator here takes it
        if not isinstance(value, int | float | list):
            raise self._refused(node)("it has no value that convscope reads")
        return torch.tensor(value, dtype=torch.float32 if "float" in key else torch.int64)

    def _attribute(self, value: Any, name: str) -> Any:
        return self._tensor(value, name) if isinstance(value, np.ndarray) else value

    def _tensor(self, array: np.ndarray, name: str) -> torch.Tensor:
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{self.file.path} holds a tensor of a type that PyTorch does not compute with ({name}: "
                f"{array.dtype.name}). Give the float model that it was made from."
            ) from error

    # names -----------------------------------------------------------------------------------------

    def _refused(self, node: FileNode) -> Callable[[str], ModelError]:
        return lambda what: ModelError(f"{self.file.path} can't be computed: {node.where}: {what}.")

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
                "Copy or download it again."
            ) from None

    def _name(self, scope: _Scope, name: str, given: Given | None) -> None:
        if name in scope.names:
            raise ModelError(f"{self.file.path} is damaged: two of its tensors are called {name!r}.")
        scope.names[name] = given

    def _name_all(self, scope: _Scope, names: Sequence[str], made: Sequence[Given | None], node: FileNode) -> None:
        named = sum(bool(name) for name in names[len(made) :])
        if named:
            raise self._refused(node)(f"it makes {len(made)} outputs, and has {len(names)}")
        for name, given in zip(names, made, strict=False):
            if name:
                self._name(scope, name, given)

    def _key(self, name: str, scope: _Scope) -> str:
        """The name under which a tensor is passed on, which no other has; "" for one that nobody asks for."""
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
