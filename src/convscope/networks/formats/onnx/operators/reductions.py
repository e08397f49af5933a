"""ONNX operators that reduce axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convscope.networks.formats.onnx.operators.node import OPERATORS, Node, ints, operator


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x.double(), axes, keep).to(x.dtype)


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).double().sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduced(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else ints(axes)
    if not given and n.get("noop_with_empty_axes", 0):
        given = ()
        if n.operator in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
            return x
    dims = tuple(given) if given else tuple(range(x.dim()))
    if given == ():
        dims = ()
        x = x.unsqueeze(-1)
        return _REDUCTIONS[n.operator](x, (-1,), False).to(x.dtype)
    if x.dtype == torch.bool:
        return _REDUCTIONS[n.operator](x.to(torch.uint8), dims, bool(n.get("keepdims", 1))).bool()
    return _REDUCTIONS[n.operator](x, dims, bool(n.get("keepdims", 1))).to(x.dtype) if dims else x


for _name in _REDUCTIONS:
    OPERATORS[_name] = ("global_pool" if _name == "ReduceMean" else "other", _reduced)


@operator("other", "ReduceProd")
def _reduce_prod(n: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = n.get("axes") if axes is None else ints(axes)
    if not given and n.get("noop_with_empty_axes", 0):
        return x
    keep = bool(n.get("keepdims", 1))
    for axis in sorted((axis % x.dim() for axis in given or range(x.dim())), reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


def _arg(n: Node, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    axis = n.get("axis", 0)
    keep = bool(n.get("keepdims", 1))
    if not n.get("select_last_index", 0):
        return function(x, dim=axis, keepdim=keep)
    return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)


@operator("other", "ArgMax")
def _argmax(n: Node, x: Tensor) -> Tensor:
    return _arg(n, x, torch.argmax)


@operator("other", "ArgMin")
def _argmin(n: Node, x: Tensor) -> Tensor:
    return _arg(n, x, torch.argmin)


@operator("other", "TopK")
def _top_k(n: Node, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    count = int(n.get("k") if k is None else k)
    axis, largest = n.get("axis", -1), bool(n.get("largest", 1))
    order = torch.argsort(x, dim=axis, descending=largest, stable=True)  # of equal values the first comes first
    places = order.narrow(axis, 0, count)
    return torch.gather(x, axis, places), places
