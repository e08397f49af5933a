"""ONNX operators of arithmetic, one value at a time, and sums along an axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convscope.networks.formats.onnx.operators.node import OPERATORS, Node, enter, operator


def _aligned(n: Node, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Before operator set 7, `b` was laid along `a` from `axis` on."""
    if n.opset < 7 and n.get("broadcast", 0) and n.get("axis") is not None:
        axis = n.get("axis") % a.dim()
        b = b.reshape(*b.shape, *[1] * (a.dim() - axis - b.dim()))
    return a, b


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


_BINARY: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "Add": ("merge", torch.add),
    "Sub": ("merge", torch.sub),
    "Mul": ("merge", torch.mul),
    "Div": ("merge", _divided),
    "And": ("other", torch.logical_and),
    "Or": ("other", torch.logical_or),
    "Xor": ("other", torch.logical_xor),
    "Equal": ("other", torch.eq),
    "Greater": ("other", torch.gt),
    "GreaterOrEqual": ("other", torch.ge),
    "Less": ("other", torch.lt),
    "LessOrEqual": ("other", torch.le),
}
for _name, (_kind, _function) in _BINARY.items():
    OPERATORS[_name] = (_kind, lambda n, a, b, _of=_function: _of(*_aligned(n, a, b)))


@operator("other", "Pow")
def _pow(n: Node, x: Tensor, power: Tensor) -> Tensor:
    x, power = _aligned(n, x, power)
    return torch.pow(x, power).to(x.dtype)


@operator("other", "Mod")
def _mod(n: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if n.get("fmod", 0) else torch.remainder(a, b)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def all_of(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return all_of


enter(
    "merge",
    Sum=_folded(torch.add),
    Max=_folded(torch.maximum),
    Min=_folded(torch.minimum),
    Mean=lambda *inputs: _folded(torch.add)(*inputs) / len(inputs),
)
enter(
    "other",
    Abs=torch.abs,
    Acos=torch.acos,
    Acosh=torch.acosh,
    Asin=torch.asin,
    Asinh=torch.asinh,
    Atan=torch.atan,
    Atanh=torch.atanh,
    Ceil=torch.ceil,
    Cos=torch.cos,
    Cosh=torch.cosh,
    Det=torch.linalg.det,
    Erf=torch.erf,
    Exp=torch.exp,
    Floor=torch.floor,
    IsNaN=torch.isnan,
    Log=torch.log,
    Neg=torch.neg,
    Not=torch.logical_not,
    Reciprocal=lambda x: 1 / x,
    Round=torch.round,
    Sign=torch.sign,
    Sin=torch.sin,
    Sinh=torch.sinh,
    Sqrt=torch.sqrt,
    Tan=torch.tan,
    Where=torch.where,
)
enter("identity", Identity=lambda x: x)


@operator("other", "IsInf")
def _is_inf(n: Node, x: Tensor) -> Tensor:
    up, down = n.get("detect_positive", 1), n.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(up)) | (torch.isneginf(x) & bool(down))


@operator("other", "CumSum")
def _cumsum(n: Node, x: Tensor, axis: Tensor) -> Tensor:
    dim = int(axis)
    x = x.flip(dim) if n.get("reverse", 0) else x
    y = torch.cumsum(x, dim).to(x.dtype)
    y = y - x if n.get("exclusive", 0) else y
    return y.flip(dim) if n.get("reverse", 0) else y


@operator("other", "Trilu")
def _trilu(n: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if n.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))
