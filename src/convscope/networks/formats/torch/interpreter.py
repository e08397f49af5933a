"""The graphs of TorchScript, run operation by operation: hooks do not fire inside scripted code.

A `Scripted` module mirrors one of the file's: it has its children, parameters and buffers under the same names, and
its `forward` interprets the module's own graph. A call of a child's `forward` goes through the mirror of the child, so
hooks fire on it; every other operation is called from Python, where `networks/torch/graph.py` sees it.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from convscope import limits
from convscope.errors import ModelError
from convscope.networks.formats.torch import code as torch_code
from convscope.networks.torch import quantized
from convscope.networks.torch.graph import quantized_kind
from convscope.networks.torch.limits import BeyondLimits, allowance, held_to
from convscope.networks.torch.modules import Described

Compiled = Any  # what torch's compiler of scripts makes: a unit, module, graph, block, node, schema or operator
Value = Any  # of a graph: a tensor, number, text, list, tuple, dictionary or module


@dataclass(frozen=True)
class Code:
    """The functions of a file, and whether they may do more than compute.

    Attributes:
        programs: those of them that were taken apart.
        steps: how many operations the pass that is running has done.
    """

    unit: Compiled
    trusted: bool
    programs: dict[str, _Program] = field(default_factory=dict)
    steps: _Steps = field(default_factory=lambda: _Steps())

    def __deepcopy__(self, memo: object) -> Code:
        return self  # a copy of a mirror runs the same functions, and its operations count as the mirror's do

    def program(self, name: str, graph: Compiled) -> _Program:
        """A function, taken apart when it is first called."""
        if name not in self.programs:
            self.programs[name] = _Program(graph, self)
        return self.programs[name]


@dataclass
class _Steps:
    """How many operations a pass has done, in calls within calls; each pass counts anew.

    Attributes:
        most: the limit; images: how many the pass is given; held: bytes of the file's weights.
        met: the forms of operations that were found to keep within the limits.
    """

    done: int = 0
    depth: int = 0
    most: int = 0
    images: int = 1
    held: int = 0
    met: set[object] = field(default_factory=set)

    def __deepcopy__(self, memo: object) -> _Steps:
        return self

    @contextmanager
    def counted(self, arguments: Sequence[object]) -> Iterator[None]:
        """A call, of the whole or within another."""
        if not self.depth:
            self.done, self.most = 0, limits.current().nodes
            first = next((value for value in arguments if isinstance(value, torch.Tensor) and value.dim()), None)
            self.images = 1 if first is None else int(first.shape[0])
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def take(self, count: int) -> None:
        """Count operations before they are done.

        Raises:
            BeyondLimits: they are too many.
        """
        self.done += count
        if self.done > self.most:
            raise BeyondLimits(
                f"a loop or a function in the TorchScript file runs too often ({limits.how_to_raise('nodes')}).",
                code="input-too-large",
                limit="nodes",
            )


class Scripted(nn.Module):
    """The mirror of one scripted module. It remembers nothing of a pass: attributes can't be set in one.

    Args:
        scripted: the module of the file; code: where its functions are.
        mirrors: those that were made already: a module that is reached twice has one mirror.
    """

    remembers_nothing = True

    def __init__(self, scripted: Compiled, code: Code, mirrors: dict[object, Scripted]) -> None:
        super().__init__()
        mirrors[scripted._c] = self
        self._scripted, self._code = scripted._c, code
        self._programs: dict[str, tuple[_Program, object]] = {}
        name, home = str(scripted.original_name), scripted._c._type().qualified_name()
        own = "torch.nn.modules" in home and list(scripted.children()) == []
        self.described = Described(name, None if own else "model")
        if quantized.is_home(home):
            self.described = Described(quantized.named(name, home), quantized_kind(name))
        for child_name, child in scripted.named_children():
            self.add_module(child_name, mirrors.get(child._c) or Scripted(child, code, mirrors))
        for key, value in scripted.named_parameters(recurse=False):
            self.register_parameter(key, nn.Parameter(value.detach(), requires_grad=False))
        for key, value in scripted.named_buffers(recurse=False):
            self.register_buffer(key, value.detach())

    def share(self, own: Compiled) -> None:
        """Take the tensors of the same module in memory as they are, so that a pass sees what becomes of them."""
        for holder, tensors in (
            (self._parameters, own.named_parameters(recurse=False)),
            (self._buffers, own.named_buffers(recurse=False)),
        ):
            holder.update({name: tensor for name, tensor in tensors if name in holder})
        for name, child in own.named_children():
            mirror = self._modules.get(name)
            if isinstance(mirror, Scripted):
                mirror.share(child)

    def forward(self, *arguments: object) -> object:
        """The return value of the scripted module's `forward`."""
        return self.call("forward", arguments)

    def call(self, name: str, arguments: tuple) -> Value:
        """The return value of one of its methods."""
        if name not in self._programs:
            method = self._scripted._get_method(name)
            self._programs[name] = (_Program(method.graph, self._code), method.schema)
        program, schema = self._programs[name]
        with self._code.steps.counted(arguments):
            return program.call(_filled((self, *arguments), schema))

    def attribute(self, name: str) -> object:
        """A child, parameter, buffer or plain attribute."""
        for holder in (self._modules, self._parameters, self._buffers):
            if name in holder:
                return holder[name]
        return self.training if name == "training" else self._scripted.getattr(name)


# What a node does with the values of the graph so far and with those that it is given.
Doing = Callable[[dict[str, Value], list[Value]], Value]


@dataclass(frozen=True)
class _Node:
    """One node of a graph, taken apart once: what it does, and the names of its values."""

    run: Doing
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Program:
    """A graph or a block of one, taken apart once and run many times.

    Args:
        block: of TorchScript; code: where the functions are that it calls.
    """

    def __init__(self, block: Compiled, code: Code) -> None:
        self._steps = code.steps
        self.inputs = [value.debugName() for value in block.inputs()]
        self.outputs = [value.debugName() for value in block.outputs()]
        self._nodes = [
            _Node(
                _compiled(node, code),
                tuple(value.debugName() for value in node.inputs()),
                tuple(value.debugName() for value in node.outputs()),
            )
            for node in block.nodes()
        ]

    def run(self, values: dict[str, Value]) -> list[Value]:
        """Its outputs, with `values` by name, to which its own are added."""
        self._steps.take(len(self._nodes) + 1)
        for node in self._nodes:
            returned = _bounded(node.run(values, [values[name] for name in node.inputs]))
            if len(node.outputs) == 1:
                values[node.outputs[0]] = returned
            elif node.outputs:  # else it only changed what it was given
                values.update(zip(node.outputs, returned, strict=True))
        return [values[name] for name in self.outputs]

    def call(self, arguments: Sequence[object]) -> Value:
        """Its value for its inputs: one, or a tuple of several."""
        return _one(self.run(dict(zip(self.inputs, arguments, strict=True))))


def _bounded(value: Value) -> Value:
    """A value, unless it has grown as none of a network's does: lists and texts can double with each operation."""
    most = _LARGEST.get(type(value))
    if most is not None and not -most() <= (value if type(value) is int else len(value)) < most():
        raise BeyondLimits(
            f"the TorchScript file makes a {type(value).__name__} that is too large "
            f"({limits.how_to_raise('entries')}).",
            code="input-too-large",
            limit="entries",
        )
    return value


# Whole numbers have 64 bits in TorchScript.
_LARGEST: Mapping[type, Callable[[], int]] = {
    int: lambda: 2**63,
    str: lambda: 2**14,
    list: lambda: limits.current().entries,
}


def _one(returned: Sequence[object]) -> object:
    return returned[0] if len(returned) == 1 else tuple(returned)


def _filled(arguments: tuple, schema: Compiled) -> tuple:
    """The arguments of a call with the defaults of those that are not given."""
    missing = schema.arguments[len(arguments) :]
    lacking = [argument.name for argument in missing if not argument.has_default_value()]
    if lacking:
        raise ModelError(
            f"the TorchScript module takes {', '.join(lacking)} too, for which it has no default.",
            code="argument-missing",
            names=lacking,
        )
    return (*arguments, *(argument.default_value for argument in missing))


def _compiled(node: Compiled, code: Code) -> Doing:
    """What a node does with the values of the graph so far and with those that it is given."""
    kind = node.kind()
    if kind == "prim::If":
        branches = [_Program(block, code) for block in node.blocks()]
        return lambda values, given: _one(branches[0 if given[0] else 1].run(values))
    if kind == "prim::Loop":
        (body,) = (_Program(block, code) for block in node.blocks())
        return lambda values, given: _one(_looped(body, values, given))
    if kind == "prim::CallFunction":
        return _function(node, code)
    if kind == "prim::Constant":
        value = _constant(node)
        # A pass may change a list.
        return lambda values, given: copy.copy(value) if isinstance(value, list | dict) else value
    if kind in _NAMED:
        name, do = node.s("name"), _NAMED[kind]
        return lambda values, given: do(name, given)
    if kind in _STRUCTURE:
        make = _STRUCTURE[kind]
        return lambda values, given: make(given)
    return _operation(node, code)


def _looped(body: _Program, values: dict[str, Value], given: list[Value]) -> list[Value]:
    """`prim::Loop(most, go on, carried ...)`: its block gives whether to go on, and what is carried."""
    most, going, *carried = given
    count = 0
    while going and count < most:
        values.update(zip(body.inputs, (count, *carried), strict=True))
        going, *carried = body.run(values)
        count += 1
    return carried


def _function(node: Compiled, code: Code) -> Doing:
    name = next(iter(node.inputs())).type().annotation_str
    found = code.unit.find_function(name)
    if found is None:
        raise ModelError(
            f"the TorchScript file calls the function {name!r}, which it does not hold.", code="file-damaged", name=name
        )
    return lambda values, given: code.program(name, found.graph).call(given[1:])


def _constant(node: Compiled) -> object:
    output = node.output()
    return None if output.type().kind() == "FunctionType" else output.toIValue()


def _get(name: str, given: list[Value]) -> object:
    (owner,) = given
    return owner.attribute(name) if isinstance(owner, Scripted) else getattr(owner, name)


def _method(name: str, given: list[Value]) -> object:
    owner, *arguments = given
    if not isinstance(owner, Scripted):
        raise ModelError(
            f"the TorchScript file calls the method {name!r} of something that is no module.",
            code="file-invalid",
            name=name,
        )
    return owner(*arguments) if name == "forward" else owner.call(name, tuple(arguments))


def _set(name: str, given: list[Value]) -> None:
    raise ModelError(
        f"the TorchScript file sets its attribute {name!r} in a pass, which convscope does not do.",
        code="attribute-set",
        name=name,
    )


def _raise(given: list[Value]) -> Value:
    raise RuntimeError(str(given[0]) if given else "the scripted code raised an error")


def _format(given: list[Value]) -> str:
    """TorchScript's own: each {} in its turn, and nothing that Python's would look up."""
    text, *values = given
    first, *rest = str(text).split("{}")
    return first + "".join(f"{value}{part}" for value, part in zip(values, rest, strict=False))


def _changed(method: str, given: list[Value]) -> Value:
    """A list or dictionary after one of its methods has changed it."""
    getattr(given[0], method)(*given[1:])
    return given[0]


_NAMED: Mapping[str, Callable[[str, list[Value]], object]] = {
    "prim::GetAttr": _get,
    "prim::CallMethod": _method,
    "prim::SetAttr": _set,
}

_STRUCTURE: Mapping[str, Callable[[list[Value]], Value]] = {
    "prim::ListConstruct": lambda given: list(given),
    "prim::TupleConstruct": lambda given: tuple(given),
    "prim::DictConstruct": lambda given: dict(zip(given[::2], given[1::2], strict=True)),
    "prim::TupleUnpack": lambda given: tuple(given[0]),
    "prim::ListUnpack": lambda given: tuple(given[0]),
    "prim::TupleIndex": lambda given: given[0][given[1]],
    "prim::RaiseException": _raise,
    "prim::unchecked_cast": lambda given: given[0],
    "prim::unchecked_unwrap_optional": lambda given: given[0],
    "prim::Uninitialized": lambda given: None,
    "prim::NumToTensor": lambda given: torch.tensor(given[0]),
    "prim::dtype": lambda given: given[0].dtype,
    "prim::device": lambda given: given[0].device,
    "prim::layout": lambda given: given[0].layout,
    "prim::is_cuda": lambda given: given[0].is_cuda,
    "prim::Print": lambda given: None,
    "prim::min": lambda given: min(*given),
    "prim::max": lambda given: max(*given),
    "aten::Int": lambda given: int(given[0]),
    "aten::Float": lambda given: float(given[0]),
    "aten::Bool": lambda given: bool(given[0]),
    "aten::IntImplicit": lambda given: int(given[0]),
    "aten::FloatImplicit": lambda given: float(given[0]),
    "aten::ScalarImplicit": lambda given: given[0].item() if isinstance(given[0], torch.Tensor) else given[0],
    "aten::__is__": lambda given: given[0] is given[1],
    "aten::__isnot__": lambda given: given[0] is not given[1],
    "aten::__not__": lambda given: not given[0],
    "aten::__and__": lambda given: given[0] & given[1],
    "aten::__or__": lambda given: given[0] | given[1],
    "aten::__contains__": lambda given: given[1] in given[0],
    "aten::format": _format,
    "aten::set_grad_enabled": lambda given: None,  # what a pass needs gradients for is not the file's to say
    "aten::append": lambda given: _changed("append", given),
    "aten::extend": lambda given: _changed("extend", given),
    "aten::insert": lambda given: _changed("insert", given),
    "aten::reverse": lambda given: _changed("reverse", given),
    "aten::clear": lambda given: _changed("clear", given),
    "aten::_set_item": lambda given: _changed("__setitem__", given),
    "aten::Delete": lambda given: _changed("__delitem__", given),
    "aten::pop": lambda given: given[0].pop(*given[1:]),
    "aten::values": lambda given: list(given[0].values()),
    "aten::items": lambda given: list(given[0].items()),
    "aten::list": lambda given: list(given[0]),
    "aten::keys": lambda given: list(given[0]),
    "aten::warn": lambda given: None,
}


def _times(left: Value, right: Value) -> object:
    for values, count in ((left, right), (right, left)):
        if isinstance(values, list | str) and len(values) * count > limits.current().entries:
            raise BeyondLimits(
                f"the TorchScript file makes a list that is too large ({limits.how_to_raise('entries')}).",
                code="input-too-large",
                limit="entries",
            )
    return left * right


def _power(base: Value, exponent: Value) -> object:
    """Python computes a power of whole numbers in full, and can't be interrupted at it."""
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(base) > 1 and exponent > 63:
        raise BeyondLimits("the TorchScript file computes a power that has more than 64 bits.", code="number-too-large")
    return base**exponent


# Operators that TorchScript also has for numbers and lists, where Python's own do the same.
_PLAIN: Mapping[str, Callable[..., object]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": _times,
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
    "pow": _power,
    "abs": abs,
    "slice": lambda values, start, stop, step: values[start:stop:step],
    "floor": lambda x: int(x // 1),
    "ceil": lambda x: -int(-x // 1),
    "sqrt": lambda x: x**0.5,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__derive_index": lambda index, start, step: start + index * step,
}


def _operation(node: Compiled, code: Code) -> Doing:
    """An operator of ATen: torch's own, or Python's where no tensor is among what it is given."""
    space, _, name = node.kind().partition("::")
    plain = _PLAIN.get(name)
    found = getattr(getattr(torch.ops, space), name, None)
    overload = re.match(r"[\w:]+\.(\w+)\(", node.schema())
    call = None if found is None else getattr(found, overload[1] if overload else "default", None)
    named = [] if call is None else [argument.name for argument in call._schema.arguments if argument.kwarg_only]
    odd = None if code.trusted else torch_code.what_operator(space, name)
    if call is None and odd is None:
        odd = f"the operator {node.kind()}, which can't be run from Python"

    def operation(_: dict[str, object], given: list[Value]) -> Value:
        if plain is not None and not any(isinstance(value, torch.Tensor) for value in given):
            return plain(*given)
        if odd is not None:  # reported only where it would run: a branch may never be taken
            raise ModelError(f"the TorchScript file uses {odd}.", code="operator-refused", found=odd)
        assert call is not None
        places = len(given) - len(named)
        return _within_limits(code, call, given[:places], dict(zip(named, given[places:], strict=True)))

    return operation


def _within_limits(code: Code, call: Compiled, places: list[Value], named: dict[str, object]) -> object:
    """The output of an operator. Shapes and numbers that it has not met yet are checked beforehand."""
    if code.trusted:
        return call(*places, **named)
    form = (call, code.steps.images, _form(places), _form(list(named.values())))
    if form in code.steps.met:
        return call(*places, **named)
    try:
        with held_to(allowance(code.steps.images, code.steps.held)):
            made = call(*places, **named)
    except BeyondLimits as error:  # of this size of image; another may do
        raise ModelError(
            f"the operator {call} of the TorchScript file can't be computed: {error}.",
            code=error.code,
            name=str(call),
            **error.data,
        ) from error
    if len(code.steps.met) < limits.current().entries:
        code.steps.met.add(form)
    return made


def _form(values: Sequence[object]) -> object:
    """The values that determine the size of an operator's output."""
    return tuple(
        (value.shape, value.dtype, value.device)
        if isinstance(value, torch.Tensor)
        else _form(value)
        if isinstance(value, list | tuple)
        else repr(value)
        for value in values
    )
