"""PyTorch's array operations as `Operations` has them: NumPy's names and rules."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convscope.networks.ops import Axes, Operations, namespace

exp, log, log1p, square, sqrt, rsqrt = torch.exp, torch.log, torch.log1p, torch.square, torch.sqrt, torch.rsqrt
cos, sin, tanh, sigmoid, relu = torch.cos, torch.sin, torch.tanh, torch.sigmoid, torch.relu
abs, negative, sign, floor, ceil, round = torch.abs, torch.neg, torch.sign, torch.floor, torch.ceil, torch.round
isfinite, isnan, logical_not = torch.isfinite, torch.isnan, torch.logical_not
reshape, einsum, matmul, broadcast_to = torch.reshape, torch.einsum, torch.matmul, torch.broadcast_to
zeros_like, ones_like, tile = torch.zeros_like, torch.ones_like, torch.tile

_TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}

DType = str | torch.dtype
Operand = Any  # a tensor, an array, a number or a list of numbers


def _type(dtype: DType) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else _TYPES[dtype]


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[object, object], Tensor]:
    """A function of two tensors, of which one may be a number, which takes part as NumPy's do."""

    def of_two(x: Operand, y: Operand, /) -> Tensor:
        given = x if isinstance(x, Tensor) else y
        device = given.device if isinstance(given, Tensor) else None
        # Without axes, so that a number does not widen the type of the other.
        return function(*(one if isinstance(one, Tensor) else torch.as_tensor(one, device=device) for one in (x, y)))

    return of_two


add, subtract, multiply = _of_two(torch.add), _of_two(torch.sub), _of_two(torch.mul)
divide, power = _of_two(torch.true_divide), _of_two(torch.pow)
logical_and, logical_or = _of_two(torch.logical_and), _of_two(torch.logical_or)
equal, not_equal, less = _of_two(torch.eq), _of_two(torch.ne), _of_two(torch.lt)
less_equal, greater, greater_equal = _of_two(torch.le), _of_two(torch.gt), _of_two(torch.ge)
minimum, _maximum = _of_two(torch.minimum), _of_two(torch.maximum)


def maximum(x: Operand, y: Operand, /) -> Tensor:
    """The larger of the two."""
    number = isinstance(x, Tensor) and isinstance(y, int | float) and x.is_floating_point()
    return torch.clamp(x, min=y) if number else _maximum(x, y)  # a clamp makes no tensor of the number


def convert_to_tensor(x: Operand, /, *, device: torch.device | None = None) -> Tensor:
    """A tensor of anything that NumPy takes; Python's numbers as float32."""
    if isinstance(x, Tensor):
        return x
    array = np.asarray(x)
    python = array.dtype == np.float64 and not isinstance(x, np.ndarray | np.generic)
    return torch.as_tensor(array.astype(np.float32) if python else array, device=device)


def zeros(shape: Sequence[int], dtype: DType = "float32", *, device: torch.device | None = None) -> Tensor:
    """A tensor of zeros."""
    return torch.zeros(tuple(shape), dtype=_type(dtype), device=device)


def ones(shape: Sequence[int], dtype: DType = "float32", *, device: torch.device | None = None) -> Tensor:
    """A tensor of ones."""
    return torch.ones(tuple(shape), dtype=_type(dtype), device=device)


def arange(
    start: int, stop: int | None = None, step: int = 1, dtype: DType = "int32", *, device: torch.device | None = None
) -> Tensor:
    """Numbers from `start` up to `stop`; from 0 to `start` where there is none."""
    ends = (0, start) if stop is None else (start, stop)
    return torch.arange(*ends, step, dtype=_type(dtype), device=device)


def on(device: torch.device) -> Operations:
    """The operations of a network, which make their tensors where it computes."""
    made = {"convert_to_tensor": convert_to_tensor, "zeros": zeros, "ones": ones, "arange": arange}
    own = {name: partial(function, device=device) for name, function in made.items()}
    return namespace(sys.modules[__name__], own)


def cast(x: Operand, dtype: DType) -> Tensor:
    """`x` in another type."""
    return convert_to_tensor(x).to(_type(dtype))


def _real(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.float32)


def _axes(x: Tensor, axis: Axes) -> tuple[int, ...]:
    """Every axis where None; an empty tuple means none, as in NumPy and not as in PyTorch."""
    if axis is None:
        return tuple(range(x.ndim))
    return tuple(one % x.ndim for one in ((axis,) if isinstance(axis, int) else axis))


def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Mean over `axis`, over everything where None."""
    axes = _axes(x, axis)
    return torch.mean(_real(x), dim=axes, keepdim=keepdims) if axes else _real(x)


def sum(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Sum over `axis`, over everything where None."""
    axes = _axes(x, axis)
    return torch.sum(x, dim=axes, keepdim=keepdims) if axes else x


def var(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Mean square of the distance from the mean."""
    return mean(torch.square(_real(x) - mean(x, axis, keepdims=True)), axis, keepdims)


def std(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Square root of `var`."""
    return torch.sqrt(var(x, axis, keepdims))


def max(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The largest value along `axis`."""
    axes = _axes(x, axis)
    return torch.amax(x, dim=axes, keepdim=keepdims) if axes else x


def min(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The smallest value along `axis`."""
    axes = _axes(x, axis)
    return torch.amin(x, dim=axes, keepdim=keepdims) if axes else x


def prod(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """The product along `axis`."""
    for one in sorted(_axes(x, axis), reverse=True):
        x = torch.prod(x, dim=one, keepdim=keepdims)
    return x


def any(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """True if one value along `axis` is not zero."""
    return max((x != 0).to(torch.uint8), axis, keepdims).bool()


def all(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """True if no value along `axis` is zero."""
    return min((x != 0).to(torch.uint8), axis, keepdims).bool()


def logsumexp(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Logarithm of the sum of `exp(x)` along `axis`."""
    axes = _axes(x, axis)
    return torch.logsumexp(_real(x), dim=axes, keepdim=keepdims) if axes else _real(x)


def count_nonzero(x: Tensor, axis: Axes = None) -> Tensor:
    """How many values along `axis` are not zero."""
    return sum((x != 0).to(torch.int64), axis)


PIECE = 2**20  # values that are compared together: the result of the comparison stays in the processor's cache


def counts_of_nonzero(x: Tensor, axis: tuple[int, ...]) -> Tensor:
    """How many values along `axis`, without the first, are not zero, as float32.

    Exact up to 2**24, and many times quicker than torch's own.
    """
    pieces = x.split(builtins.max(1, PIECE // builtins.max(1, x[0].numel())))
    counts = [torch.ne(piece, 0, out=torch.empty_like(piece, dtype=torch.float32)).sum(dim=axis) for piece in pieces]
    return torch.cat(counts)


def argmax(x: Tensor, axis: int | None = None) -> Tensor:
    """Index of the largest value along `axis`."""
    return torch.argmax(x, dim=axis)


def argmin(x: Tensor, axis: int | None = None) -> Tensor:
    """Index of the smallest value along `axis`."""
    return torch.argmin(x, dim=axis)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """`exp(x)` over its sum along `axis`."""
    return torch.softmax(x, dim=axis)


def cumsum(x: Tensor, axis: int) -> Tensor:
    """The sum of each value and those before it along `axis`."""
    return torch.cumsum(x, dim=axis)


def sort(x: Tensor, axis: int = -1) -> Tensor:
    """The values along `axis` from the smallest on."""
    return torch.sort(x, dim=axis, stable=True).values


def argsort(x: Tensor, axis: int = -1) -> Tensor:
    """The indices of the values along `axis` from the smallest on."""
    return torch.sort(x, dim=axis, stable=True).indices


def clip(x: Tensor, low: float, high: float, /) -> Tensor:
    """`x` held between two numbers."""
    return torch.clamp(x, low, high)


def where(condition: Tensor, x: Operand, y: Operand, /) -> Tensor:
    """`x` where the condition holds, else `y`."""
    return torch.where(condition, x, y)


def one_hot(x: Tensor, classes: int, /, *, dtype: DType = "float32") -> Tensor:
    """Rows of zeros with a one at the place that `x` names."""
    return torch.nn.functional.one_hot(x.long(), classes).to(_type(dtype))


def transpose(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """The axes in another order; reversed where None."""
    return torch.permute(x, tuple(range(x.ndim))[::-1] if axes is None else tuple(axes))


def squeeze(x: Tensor, axis: int | None = None) -> Tensor:
    """Without an axis of length 1, or without all of them."""
    if axis is None:
        return torch.squeeze(x)
    if x.shape[axis] != 1:
        raise ValueError(f"axis {axis} of the shape {tuple(x.shape)} has not the length 1")
    return torch.squeeze(x, axis)


def expand_dims(x: Tensor, axis: int) -> Tensor:
    """With a further axis of length 1."""
    return torch.unsqueeze(x, axis)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors side by side along a new axis."""
    return torch.stack(list(tensors), dim=axis)


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors joined along `axis`."""
    return torch.cat(list(tensors), dim=axis)


def pad(x: Tensor, widths: Sequence[tuple[int, int]], /) -> Tensor:
    """Zeros around `x`, so many before and after along each axis."""
    return torch.nn.functional.pad(x, [width for pair in reversed(widths) for width in pair])


def flip(x: Tensor, axis: int) -> Tensor:
    """Backwards along `axis`."""
    return torch.flip(x, (axis,))


def _from_the_end(indices: Operand, length: int, device: torch.device) -> Tensor:
    """Indices of which negative ones count from the end, as PyTorch takes them."""
    found = torch.as_tensor(indices, device=device).long()
    # Reading is quicker than writing; on an accelerator it would wait for all that is being computed.
    if found.device.type == "cpu" and (not found.numel() or found.min() >= 0):
        return found
    return torch.where(found < 0, found + length, found)


def take(x: Tensor, indices: Operand, axis: int) -> Tensor:
    """Entries of `x` along `axis` by their indices."""
    axis = axis % x.ndim
    found = _from_the_end(indices, x.shape[axis], x.device)
    return torch.index_select(x, axis, found.reshape(-1)).reshape(*x.shape[:axis], *found.shape, *x.shape[axis + 1 :])


def take_along_axis(x: Tensor, indices: Operand, axis: int) -> Tensor:
    """For each place of `indices` the entry of `x` along `axis` that it names."""
    return torch.take_along_dim(x, _from_the_end(indices, x.shape[axis], x.device), dim=axis)


def stop_gradient(x: Tensor, /) -> Tensor:
    """`x` as a constant for differentiation."""
    return x.detach()


def repeat(x: Tensor, repeats: int, axis: int) -> Tensor:
    """Each entry along `axis` so many times, one after another."""
    return torch.repeat_interleave(x, repeats, dim=axis)
