"""The cost of an operation, known before it is computed: for graphs that come from files.

A few bytes of a file can request a tensor of 32 GiB, or for a convolution that takes a week. Each operation of torch is
computed on shapes alone first (on the "meta" device, where tensors have no values), and is refused if its output
or its computation exceeds the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from convscope import limits
from convscope.errors import ModelError

SPEED = 2e10  # operations a second of a slow processor: what `limits.seconds` is taken to allow


class BeyondLimits(ModelError):
    """An operation would exceed its limits; the caller that knows it adds its name."""


@dataclass(frozen=True)
class Allowance:
    """The limits of one operation.

    Attributes:
        size: bytes of its output; work: multiplications and comparisons.
    """

    size: float
    work: float

    def check_size(self, size: float) -> None:
        """Raise `BeyondLimits` if `size` bytes are too many."""
        if size > self.size:
            raise BeyondLimits(
                f"it would make {limits.shown('values', size)} of values ({limits.how_to_raise('values')})",
                code="input-too-large",
                limit="values",
            )

    def check_work(self, work: float) -> None:
        """Raise `BeyondLimits` if `work` is too much."""
        if work > self.work:
            raise BeyondLimits(
                f"it would take about {work / SPEED:.0f} s ({limits.how_to_raise('seconds')})",
                code="input-too-large",
                limit="seconds",
            )


def allowance(count: int, held: int = 0) -> Allowance:
    """The limits of an operation for `count` images, where the file itself has `held` bytes."""
    limit, count = limits.current(), max(1, count)
    return Allowance(count * limit.values + 8 * held, count * limit.seconds * SPEED)


@contextmanager
def held_to(allowed: Allowance) -> Iterator[None]:
    """Check each operation in the block before it is computed.

    Raises:
        BeyondLimits: one would take more than is allowed.
    """
    with _Checked(allowed):
        yield


class _Checked(TorchDispatchMode):
    """Sees every operation after autograd has, also those that another one consists of."""

    def __init__(self, allowed: Allowance) -> None:
        super().__init__()
        self._allowed = allowed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Called by torch in place of each operation."""
        kwargs = kwargs or {}
        taken = _taken(func, args, kwargs)
        if taken is not None:
            self._allowed.check_size(taken.size)
            self._allowed.check_work(taken.work)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Taken:
    """The cost of an operation: bytes of its output, and multiplications or comparisons."""

    size: float
    work: float = 0.0


def _taken(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> _Taken | None:
    """The cost of an operation; None where it depends on the values, as where non-zeros are counted.

    Torch's own computation on shapes knows every operation, and imports seconds' worth of torch for some: those of
    usual networks have a rule here.
    """
    name = func._overloadpacket.__name__
    if torch.Tag.pointwise in func.tags or name in _AS_LARGE or (func.is_view and name not in _SPREADING):
        return _Taken(_spread(args))
    for rule in (_RULES.get(name), lambda *_: _by_shapes(func, args, kwargs)):
        with suppress(Exception):  # the operation itself will raise the error
            if rule is not None:
                return rule(*args)
    return None


def _by_shapes(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> _Taken:
    """The cost of an operation, computed on the device for tensors without values."""
    given = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
    made = func(*tree_map(_without_values, args), **tree_map(_without_values, given))
    counted = flop_registry.get(func._overloadpacket)
    work = 0.0 if counted is None else float(counted(*args, **kwargs, out_val=made)) / 2
    return _Taken(sum(tensor.numel() * tensor.element_size() for tensor in _tensors(made)), work)


def _without_values(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _tensors(structure: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def _spread(args: object) -> float:
    """The most bytes that an operation on each value makes: its tensors laid along each other."""
    tensors = _tensors(args)
    rank = max((tensor.dim() for tensor in tensors), default=0)
    shapes = [[1] * (rank - tensor.dim()) + list(tensor.shape) for tensor in tensors]
    return _WIDEST * math.prod(max(sides) for sides in zip(*shapes, strict=True))


_WIDEST = 8  # bytes of a value

# Operations that make no more than goes in.
_AS_LARGE = frozenset(
    {
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit"),
        *("_native_batch_norm_legit_no_training", "native_group_norm", "native_layer_norm"),
        *("_softmax", "_log_softmax", "mean", "sum", "amax", "amin", "prod", "any", "all", "argmax", "argmin"),
        *("cumsum", "sort", "logsumexp", "linalg_vector_norm", "triu", "tril", "flip", "_to_copy", "clone"),
        *("_unsafe_view", "_reshape_copy", "copy_", "fill_", "zero_", "_local_scalar_dense", "lift_fresh"),
        *("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
        *("zeros_like", "ones_like", "empty_like", "full_like"),
    }
)
# Views that show a value many times.
_SPREADING = ("expand", "as_strided", "unfold")


# -- rules: the cost of an operation, from its arguments ---------------------------------------------------

Setting = Any  # an argument of an operator: a number, a truth value or a list of numbers


def _of_sides(sides: Iterable[int]) -> _Taken:
    return _Taken(_WIDEST * float(math.prod(max(0, side) for side in sides)))


def _expanded(x: torch.Tensor, sides: Sequence[int], **_: object) -> _Taken:
    own = [1] * (len(sides) - x.dim()) + list(x.shape)
    return _of_sides(had if side == -1 else side for side, had in zip(sides, own, strict=True))


def _repeated(x: torch.Tensor, times: Sequence[int]) -> _Taken:
    return _of_sides([x.numel(), *times])


def _counted(*ends: float) -> _Taken:
    start, end, step = (0, *ends, 1) if len(ends) == 1 else (*ends, 1)[:3]
    return _Taken(_WIDEST * max(0.0, (end - start) / step))


def _padded(x: torch.Tensor, pads: Sequence[int], *_: object) -> _Taken:
    more = [sum(pads[2 * place : 2 * place + 2]) for place in range(x.dim())]
    return _of_sides(side + extra for side, extra in zip(reversed(x.shape), more, strict=True))


def _joined(tensors: Sequence[torch.Tensor], *_: object) -> _Taken:
    return _Taken(_WIDEST * float(sum(tensor.numel() for tensor in tensors)))


def _product(a: torch.Tensor, b: torch.Tensor) -> _Taken:
    made = float(a.shape[0] * b.shape[-1] * (a.shape[1] if a.dim() == 3 else 1))
    return _Taken(a.element_size() * made, made * a.shape[-1])


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: object, *how: Setting) -> _Taken:
    channels = weight.shape[1] * how[5] if how[3] else weight.shape[0]
    made = float(x.shape[0] * channels * math.prod(_sides(x.shape[2:], weight.shape[2:], _Windows(*how[:5]))))
    each = weight.numel() / max(1, weight.shape[0])
    return _Taken(x.element_size() * made, each * (x.numel() if how[3] else made))


def _pool(
    x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int] = (), paddings: Sequence[int] = (0,), *how: Setting
) -> _Taken:
    rank = len(kernel)
    dilations = how[0] if how and not isinstance(how[0], bool) else (1,)
    sides = _sides(x.shape[-rank:], kernel, _Windows(strides or kernel, paddings, dilations))
    made = math.prod(x.shape[:-rank]) * float(math.prod(side + 1 for side in sides))  # one more where it rounds up
    return _Taken((x.element_size() + 8) * made, made * math.prod(kernel))


@dataclass(frozen=True)
class _Windows:
    """Positions of the windows of an operation, in PyTorch's terms; a list of one value stands for all axes."""

    strides: Sequence[int]
    paddings: Sequence[int]
    dilations: Sequence[int]
    transposed: bool = False
    extra: Sequence[int] = (0,)


def _sides(sides: Sequence[int], kernel: Sequence[int], windows: _Windows) -> Iterator[int]:
    """Height, width and so on of the output of a windowed operation."""
    given = (windows.strides, windows.paddings, windows.dilations, windows.extra)
    lists = [list(item) * (len(kernel) if len(item) == 1 else 1) for item in given]
    for side, size, stride, padding, dilation, more in zip(sides, kernel, *lists, strict=False):
        span = dilation * (size - 1) + 1
        if windows.transposed:
            yield max(0, (side - 1) * stride - 2 * padding + span + more)
        else:
            yield max(0, (side + 2 * padding - span) // max(1, stride) + 1)


_RULES: dict[str, Callable[..., _Taken]] = {
    "expand": _expanded,
    "repeat": _repeated,
    "constant_pad_nd": _padded,
    "cat": _joined,
    "stack": _joined,
    "mm": _product,
    "bmm": _product,
    "addmm": lambda x, a, b: _product(a, b),
    "convolution": _convolution,
    "max_pool2d_with_indices": _pool,
    "max_pool3d_with_indices": _pool,
    "avg_pool2d": _pool,
    "avg_pool3d": _pool,
    **dict.fromkeys(("zeros", "ones", "empty"), _of_sides),
    "full": lambda sides, value: _of_sides(sides),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), lambda x, sides: _of_sides(sides)),
    "arange": _counted,
    "new_full": lambda x, sides, value: _of_sides(sides),
    "index_select": lambda x, axis, places: _of_sides(
        places.numel() if axis % max(1, x.dim()) == place else side for place, side in enumerate(x.shape)
    ),
    "gather": lambda x, axis, places: _Taken(_WIDEST * float(places.numel())),
}
