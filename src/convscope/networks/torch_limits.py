"""What an operation would take, known before it is computed: for graphs that come from files.

A few bytes of a file can ask for a tensor of 32 GiB, or for a convolution that takes a week. Each operation of torch is
computed on shapes alone first (on the "meta" device, where tensors have no values), and is refused if what it makes,
or how much it computes, goes beyond what it is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """An operation would take more than it is allowed; who knows which one it is says so."""


@dataclass(frozen=True)
class Allowance:
    """What one operation may take.

    Attributes:
        size: bytes of what it makes; work: multiplications and comparisons.
    """

    size: float
    work: float

    def check_size(self, size: float) -> None:
        """Raise `BeyondLimits` if `size` bytes are too many."""
        if size > self.size:
            raise BeyondLimits(
                f"it would make {limits.shown('values', size)} of values ({limits.how_to_raise('values')})"
            )

    def check_work(self, work: float) -> None:
        """Raise `BeyondLimits` if `work` is too much."""
        if work > self.work:
            raise BeyondLimits(f"it would take about {work / SPEED:.0f} s ({limits.how_to_raise('seconds')})")


def allowance(count: int, held: int = 0) -> Allowance:
    """What an operation may take for `count` images, where the file itself holds `held` bytes."""
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of each operation."""
        kwargs = kwargs or {}
        made = _shapes_only(func, args, kwargs)
        if made is not None:
            tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            self._allowed.check_size(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
            self._allowed.check_work(_work(func, args, kwargs, made))
        return func(*args, **kwargs)


def _shapes_only(func: Callable, args: Any, kwargs: Any) -> Any:
    """What an operation makes, without values; None where only the values tell, as where non-zeros are counted."""
    given = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
    try:
        return func(*tree_map(_without_values, args), **tree_map(_without_values, given))
    except Exception:  # the operation itself will say what is wrong
        return None


def _without_values(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _work(func: Any, args: Any, kwargs: Any, made: Any) -> float:
    counted = flop_registry.get(func._overloadpacket)
    if counted is not None:
        return float(counted(*args, **kwargs, out_val=made)) / 2
    if "pool" in func._overloadpacket.__name__ and len(args) > 1 and isinstance(args[1], list | tuple):
        first = next(leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        return float(first.numel()) * math.prod(args[1])
    return 0.0
