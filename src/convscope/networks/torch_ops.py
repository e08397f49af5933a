"""PyTorch's array operations under the names that the techniques use: those of NumPy and `keras.ops`."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

equal, isfinite = torch.eq, torch.isfinite
exp, log, square, sqrt, rsqrt = torch.exp, torch.log, torch.square, torch.sqrt, torch.rsqrt
cos, sin = torch.cos, torch.sin
reshape, einsum, matmul, transpose = torch.reshape, torch.einsum, torch.matmul, torch.permute
sigmoid, floor = torch.sigmoid, torch.floor

_TYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64, "bool": torch.bool}
Axes = int | tuple[int, ...] | None


def _type(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else _TYPES[dtype]


def less(x: Any, y: Any) -> Tensor:
    """Where `x` is below `y`; one of them may be a number."""
    return torch.lt(x, y) if isinstance(x, Tensor) else torch.gt(y, x)


def convert_to_tensor(x: Any) -> Tensor:
    """A tensor of anything that NumPy takes."""
    return x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))


def zeros(shape: Sequence[int], dtype: Any = "float32") -> Tensor:
    """A tensor of zeros."""
    return torch.zeros(*shape, dtype=_type(dtype))


def cast(x: Tensor, dtype: Any) -> Tensor:
    """`x` in another type."""
    return x.to(_type(dtype))


def mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Mean over `axis`, over everything where None."""
    return torch.mean(x) if axis is None else torch.mean(x, dim=axis, keepdim=keepdims)


def sum(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    """Sum over `axis`, over everything where None."""
    return torch.sum(x) if axis is None else torch.sum(x, dim=axis, keepdim=keepdims)


def argmax(x: Tensor, axis: int | None = None) -> Tensor:
    """Index of the largest value along `axis`."""
    return torch.argmax(x, dim=axis)


PIECE = 2**20  # values that are looked at together: what they are compared into stays in the processor's cache


def count_nonzero(x: Tensor, axis: tuple[int, ...]) -> Tensor:
    """How many values along `axis`, without the first, are not zero, as float32.

    Exact up to 2**24, and many times quicker than torch's own.
    """
    pieces = x.split(builtins.max(1, PIECE // builtins.max(1, x[0].numel())))
    counts = [torch.ne(piece, 0, out=torch.empty_like(piece, dtype=torch.float32)).sum(dim=axis) for piece in pieces]
    return torch.cat(counts)


def max(x: Tensor, axis: Axes = None) -> Tensor:
    """The largest value along `axis`."""
    return torch.amax(x, dim=() if axis is None else axis)


def maximum(x: Tensor, y: Tensor | float) -> Tensor:
    """The larger of the two, element by element."""
    return torch.maximum(x, y) if isinstance(y, Tensor) else torch.clamp(x, min=y)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """`x` held between two numbers."""
    return torch.clamp(x, low, high)


def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    """`x` where the condition holds, else `y`."""
    return torch.where(condition, x, y)


def one_hot(x: Tensor, classes: int, dtype: Any = "float32") -> Tensor:
    """Rows of zeros with a one at the place that `x` names."""
    return torch.nn.functional.one_hot(x.long(), classes).to(_type(dtype))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors side by side along a new axis."""
    return torch.stack(list(tensors), dim=axis)


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors joined along `axis`."""
    return torch.cat(list(tensors), dim=axis)


def pad(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around `x`, so many before and after along each axis."""
    return torch.nn.functional.pad(x, [width for pair in reversed(widths) for width in pair])


def take(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    """Rows of `x` along `axis` by their numbers."""
    return torch.index_select(x, axis, indices.reshape(-1).long()).reshape(
        *x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]
    )


def stop_gradient(x: Tensor) -> Tensor:
    """`x` as a constant to what is differentiated."""
    return x.detach()


def repeat(x: Tensor, repeats: int, axis: int) -> Tensor:
    """Each entry along `axis` so many times, one after another."""
    return torch.repeat_interleave(x, repeats, dim=axis)
