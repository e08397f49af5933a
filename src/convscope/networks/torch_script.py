"""TorchScript files: hooks do not fire inside scripted code, so its graphs are run here, operation by operation.

A `Scripted` module mirrors one of the file's: it has its children, parameters and buffers under the same names, and
its `forward` interprets the module's own graph. A call of a child's `forward` goes through the mirror of the child, so
hooks fire on it; every other operation is called from Python, where `torch_graph.py` sees it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.modules import Described, OpenedModule
from convscope.networks.torch_files import source_of


def read(path: Path) -> OpenedModule:
    """A TorchScript archive as a module of mirrors.

    Raises:
        ModelError: it is damaged, or calls what can't be run from Python.
    """
    unit = torch._C.CompilationUnit()  # as torch.jit.load does, which does not hand out the functions of the file
    try:
        loaded = torch._C.import_ir_module(unit, str(path), torch.device("cpu"), {}, False)  # type: ignore[call-arg]
    except Exception as error:  # torch raises what its reader raises
        raise ModelError(f"{path} can't be read as TorchScript ({one_line(error)[:200]}). Copy it again.") from error
    scripted = torch.jit._recursive.wrap_cpp_module(loaded).eval()
    return OpenedModule(Scripted(scripted, unit, {}), source_of(path, f"the class {scripted.original_name}"))


class Scripted(nn.Module):
    """The mirror of one scripted module.

    Args:
        scripted: the module of the file; unit: where its functions are.
        mirrors: those that were made already: a module that is reached twice has one mirror.
    """

    def __init__(self, scripted: Any, unit: Any, mirrors: dict[Any, Scripted]) -> None:
        super().__init__()
        mirrors[scripted._c] = self
        self._scripted, self._unit = scripted._c, unit
        name = str(scripted.original_name)
        own = "torch.nn.modules" in scripted._c._type().qualified_name() and list(scripted.children()) == []
        self.described = Described(name, None if own else "model")
        for child_name, child in scripted.named_children():
            self.add_module(child_name, mirrors.get(child._c) or Scripted(child, unit, mirrors))
        for key, value in scripted.named_parameters(recurse=False):
            self.register_parameter(key, nn.Parameter(value.detach(), requires_grad=False))
        for key, value in scripted.named_buffers(recurse=False):
            self.register_buffer(key, value.detach())

    def forward(self, *arguments: Any) -> Any:
        """What the scripted module's `forward` returns."""
        return self._call("forward", arguments)

    def _call(self, method: str, arguments: tuple) -> Any:
        return _Run(self._unit).graph(self._scripted._get_method(method).graph, (self, *arguments))

    def attribute(self, name: str) -> Any:
        """A child, parameter, buffer or plain attribute."""
        for holder in (self._modules, self._parameters, self._buffers):
            if name in holder:
                return holder[name]
        return self.training if name == "training" else self._scripted.getattr(name)


class _Run:
    """One run of a graph: values by name, node after node."""

    def __init__(self, unit: Any) -> None:
        self.unit = unit
        self._values: dict[str, Any] = {}

    def graph(self, graph: Any, arguments: tuple) -> Any:
        """The value of a graph for its inputs; optional ones that are not given are None."""
        inputs = list(graph.inputs())
        given = arguments + (None,) * (len(inputs) - len(arguments))
        self._values.update(zip((value.debugName() for value in inputs), given, strict=True))
        returned = self._block(graph, graph.outputs())
        return returned[0] if len(returned) == 1 else tuple(returned)

    def _block(self, block: Any, outputs: Any) -> list[Any]:
        for node in block.nodes():
            given = [self._values[value.debugName()] for value in node.inputs()]
            returned = self._node(node, given)
            names = [value.debugName() for value in node.outputs()]
            self._values.update(zip(names, [returned] if len(names) == 1 else returned or (), strict=True))
        return [self._values[value.debugName()] for value in outputs]

    def _node(self, node: Any, given: list[Any]) -> Any:
        kind = node.kind()
        if kind == "prim::If":
            branches = list(node.blocks())
            branch = branches[0 if given[0] else 1]
            returned = self._block(branch, branch.outputs())
            return returned[0] if len(returned) == 1 else returned
        if kind == "prim::Loop":
            returned = self._loop(node, given)
            return returned[0] if len(returned) == 1 else returned
        if kind == "prim::CallFunction":
            return self._function(node, given)
        if kind in _STRUCTURE:
            return _STRUCTURE[kind](node, given)
        return _operation(node, given)

    def _loop(self, node: Any, given: list[Any]) -> list[Any]:
        """`prim::Loop(most, go on, carried ...)`: its block gives whether to go on, and what is carried."""
        most, going, *carried = given
        (body,) = node.blocks()
        names = [value.debugName() for value in body.inputs()]
        count = 0
        while going and count < most:
            self._values.update(zip(names, (count, *carried), strict=True))
            going, *carried = self._block(body, body.outputs())
            count += 1
        return carried

    def _function(self, node: Any, given: list[Any]) -> Any:
        name = next(iter(node.inputs())).type().annotation_str
        found = self.unit.find_function(name)
        if found is None:
            raise ModelError(f"the TorchScript file calls the function {name!r}, which it does not hold.")
        return _Run(self.unit).graph(found.graph, tuple(given[1:]))


def _constant(node: Any, _: list[Any]) -> Any:
    output = node.output()
    return None if output.type().kind() == "FunctionType" else output.toIValue()


def _get(node: Any, given: list[Any]) -> Any:
    (owner,) = given
    name = node.s("name")
    return owner.attribute(name) if isinstance(owner, Scripted) else getattr(owner, name)


def _method(node: Any, given: list[Any]) -> Any:
    owner, *arguments = given
    name = node.s("name")
    if not isinstance(owner, Scripted):
        raise ModelError(f"the TorchScript file calls the method {name!r} of something that is no module.")
    return owner(*arguments) if name == "forward" else owner._call(name, tuple(arguments))


def _raise(_: Any, given: list[Any]) -> Any:
    raise RuntimeError(str(given[0]) if given else "the scripted code raised an error")


_STRUCTURE: Mapping[str, Callable[[Any, list[Any]], Any]] = {
    "prim::Constant": _constant,
    "prim::GetAttr": _get,
    "prim::CallMethod": _method,
    "prim::ListConstruct": lambda _, given: list(given),
    "prim::TupleConstruct": lambda _, given: tuple(given),
    "prim::DictConstruct": lambda _, given: dict(zip(given[::2], given[1::2], strict=True)),
    "prim::TupleUnpack": lambda _, given: tuple(given[0]),
    "prim::ListUnpack": lambda _, given: tuple(given[0]),
    "prim::TupleIndex": lambda _, given: given[0][given[1]],
    "prim::RaiseException": _raise,
    "prim::unchecked_cast": lambda _, given: given[0],
    "prim::unchecked_unwrap_optional": lambda _, given: given[0],
    "prim::Uninitialized": lambda _, given: None,
    "prim::NumToTensor": lambda _, given: torch.tensor(given[0]),
    "prim::dtype": lambda _, given: given[0].dtype,
    "prim::device": lambda _, given: given[0].device,
    "prim::layout": lambda _, given: given[0].layout,
    "prim::is_cuda": lambda _, given: given[0].is_cuda,
    "prim::Print": lambda _, given: None,
    "prim::min": lambda _, given: min(*given),
    "prim::max": lambda _, given: max(*given),
    "aten::Int": lambda _, given: int(given[0]),
    "aten::Float": lambda _, given: float(given[0]),
    "aten::Bool": lambda _, given: bool(given[0]),
    "aten::IntImplicit": lambda _, given: int(given[0]),
    "aten::FloatImplicit": lambda _, given: float(given[0]),
    "aten::ScalarImplicit": lambda _, given: given[0].item() if isinstance(given[0], torch.Tensor) else given[0],
    "aten::__is__": lambda _, given: given[0] is given[1],
    "aten::__isnot__": lambda _, given: given[0] is not given[1],
    "aten::__not__": lambda _, given: not given[0],
    "aten::__and__": lambda _, given: given[0] & given[1],
    "aten::__or__": lambda _, given: given[0] | given[1],
    "aten::__contains__": lambda _, given: given[1] in given[0],
    "aten::format": lambda _, given: str(given[0]).format(*given[1:]),
    "aten::append": lambda _, given: (given[0].append(given[1]), given[0])[1],
    "aten::list": lambda _, given: list(given[0]),
    "aten::keys": lambda _, given: list(given[0]),
    "aten::warn": lambda _, given: None,
}

# Operators that TorchScript also has for numbers and lists, where Python's own do the same.
_PLAIN: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "remainder": operator.mod,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "len": len,
    "__getitem__": operator.getitem,
    "pow": operator.pow,
    "abs": abs,
    "floor": lambda x: int(x // 1),
    "ceil": lambda x: -int(-x // 1),
    "sqrt": lambda x: x**0.5,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__derive_index": lambda index, start, step: start + index * step,
}


def _operation(node: Any, given: list[Any]) -> Any:
    """An operator of ATen: torch's own, or Python's where no tensor is among what it is given."""
    space, _, name = node.kind().partition("::")
    if name in _PLAIN and not any(isinstance(value, torch.Tensor) for value in given):
        return _PLAIN[name](*given)
    found = getattr(getattr(torch.ops, space), name, None)
    if found is None:
        raise ModelError(f"the TorchScript file uses the operator {node.kind()}, which can't be run from Python.")
    overload = re.match(r"[\w:]+\.(\w+)\(", node.schema())
    call = getattr(found, overload[1] if overload else "default")
    named = [argument.name for argument in call._schema.arguments if argument.kwarg_only]
    places = len(given) - len(named)
    return call(*given[:places], **dict(zip(named, given[places:], strict=True)))
