"""The array operations that objectives and targets may use: one list, the same on every runtime, under NumPy's names.

`network.ops` is an `Operations`. Values, broadcasting, `axis` and `keepdims` are NumPy's; where a name has no place in
NumPy (`rsqrt`, `one_hot`, `softmax`), it is Keras'. Tensors are the framework's own, so its own functions work on them
too, on that framework alone. `x + y`, `x < y`, `x[...]` and `x.shape` are those of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol, cast

from convscope.errors import UsageError, nearest
from convscope.networks.foreign import Tensor

Axes = int | tuple[int, ...] | None


class UnknownOperation(UsageError, AttributeError):
    """An operation that is not in the list.

    Example:
        >>> network.ops.average
        Traceback (most recent call last):
        convscope.networks.ops.UnknownOperation: ...
    """


class Operations(Protocol):
    """Operations on tensors; `x` and `y` may be numbers where another argument is a tensor.

    Example:
        >>> ops = network.ops
        >>> maps = ops.convert_to_tensor(np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2))
        >>> network.numpy(ops.mean(maps, axis=(1, 2))).tolist()
        [[3.0, 4.0]]
    """

    # element by element: the shape of `x` -----------------------------------------------------------

    def abs(self, x: Tensor, /) -> Tensor:
        """The size without the sign."""

    def negative(self, x: Tensor, /) -> Tensor:
        """`-x`."""

    def sign(self, x: Tensor, /) -> Tensor:
        """-1, 0 or 1."""

    def exp(self, x: Tensor, /) -> Tensor:
        """e to the power of `x`."""

    def log(self, x: Tensor, /) -> Tensor:
        """The natural logarithm."""

    def log1p(self, x: Tensor, /) -> Tensor:
        """The natural logarithm of `1 + x`."""

    def sqrt(self, x: Tensor, /) -> Tensor:
        """The square root."""

    def rsqrt(self, x: Tensor, /) -> Tensor:
        """One over the square root."""

    def square(self, x: Tensor, /) -> Tensor:
        """`x * x`."""

    def sin(self, x: Tensor, /) -> Tensor:
        """The sine."""

    def cos(self, x: Tensor, /) -> Tensor:
        """The cosine."""

    def tanh(self, x: Tensor, /) -> Tensor:
        """The hyperbolic tangent."""

    def sigmoid(self, x: Tensor, /) -> Tensor:
        """`1 / (1 + exp(-x))`."""

    def relu(self, x: Tensor, /) -> Tensor:
        """`maximum(x, 0)`."""

    def floor(self, x: Tensor, /) -> Tensor:
        """The next whole number below."""

    def ceil(self, x: Tensor, /) -> Tensor:
        """The next whole number above."""

    def round(self, x: Tensor, /) -> Tensor:
        """The nearest whole number; of two, the even one."""

    def isfinite(self, x: Tensor, /) -> Tensor:
        """Where it is neither infinite nor NaN: bool."""

    def isnan(self, x: Tensor, /) -> Tensor:
        """Where it is NaN: bool."""

    def logical_not(self, x: Tensor, /) -> Tensor:
        """Where it is zero or false: bool."""

    def stop_gradient(self, x: Tensor, /) -> Tensor:
        """`x` as a constant for differentiation."""

    # of two: broadcast against each other -----------------------------------------------------------

    def add(self, x: Tensor, y: Tensor, /) -> Tensor:
        """`x + y`."""

    def subtract(self, x: Tensor, y: Tensor, /) -> Tensor:
        """`x - y`."""

    def multiply(self, x: Tensor, y: Tensor, /) -> Tensor:
        """`x * y`."""

    def divide(self, x: Tensor, y: Tensor, /) -> Tensor:
        """`x / y`."""

    def power(self, x: Tensor, y: Tensor, /) -> Tensor:
        """`x ** y`."""

    def maximum(self, x: Tensor, y: Tensor, /) -> Tensor:
        """The larger of the two."""

    def minimum(self, x: Tensor, y: Tensor, /) -> Tensor:
        """The smaller of the two."""

    def equal(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where `x == y`: bool."""

    def not_equal(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where `x != y`: bool."""

    def less(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where `x < y`: bool."""

    def less_equal(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where `x <= y`: bool."""

    def greater(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where `x > y`: bool."""

    def greater_equal(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where `x >= y`: bool."""

    def logical_and(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where neither is zero or false: bool."""

    def logical_or(self, x: Tensor, y: Tensor, /) -> Tensor:
        """Where not both are zero or false: bool."""

    def where(self, condition: Tensor, x: Tensor, y: Tensor, /) -> Tensor:
        """`x` where the condition holds, else `y`."""

    def clip(self, x: Tensor, low: float, high: float, /) -> Tensor:
        """`x` held between two numbers."""

    # along axes: over everything where `axis` is None -----------------------------------------------

    def sum(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The sum."""

    def mean(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The mean, of whole numbers as float."""

    def var(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The mean square of the distance from the mean."""

    def std(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The square root of `var`."""

    def max(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The largest value."""

    def min(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The smallest value."""

    def prod(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The product."""

    def any(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """True if one value is not zero or false."""

    def all(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """True if no value is zero or false."""

    def logsumexp(self, x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        """The logarithm of the sum of `exp(x)`."""

    def count_nonzero(self, x: Tensor, axis: Axes = None) -> Tensor:
        """How many values are not zero, as whole numbers."""

    def argmax(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The index of the largest value."""

    def argmin(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The index of the smallest value."""

    def softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        """`exp(x)` over its sum: the shape of `x`."""

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        """The sum of each value and those before it: the shape of `x`."""

    def sort(self, x: Tensor, axis: int = -1) -> Tensor:
        """The values from the smallest on: the shape of `x`."""

    def argsort(self, x: Tensor, axis: int = -1) -> Tensor:
        """The indices of the values from the smallest on: the shape of `x`."""

    # products ---------------------------------------------------------------------------------------

    def matmul(self, x: Tensor, y: Tensor, /) -> Tensor:
        """The product of matrices `(..., n, k)` and `(..., k, m)`: `(..., n, m)`."""

    def einsum(self, subscripts: str, /, *operands: Tensor) -> Tensor:
        """A sum of products by its indices: `einsum("nhwc,nhw->nc", maps, weights)`."""

    # shapes -----------------------------------------------------------------------------------------

    def reshape(self, x: Tensor, shape: Sequence[int], /) -> Tensor:
        """The values in their order under another shape; one side may be -1."""

    def transpose(self, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        """The axes in another order; reversed where None."""

    def squeeze(self, x: Tensor, axis: int | None = None) -> Tensor:
        """Without an axis of length 1, or without all of them."""

    def expand_dims(self, x: Tensor, axis: int) -> Tensor:
        """With a further axis of length 1."""

    def broadcast_to(self, x: Tensor, shape: Sequence[int], /) -> Tensor:
        """Repeated to a shape."""

    def concatenate(self, tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
        """Joined along an axis."""

    def stack(self, tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
        """Side by side along a new axis."""

    def pad(self, x: Tensor, widths: Sequence[tuple[int, int]], /) -> Tensor:
        """Zeros around it, so many before and after along each axis."""

    def repeat(self, x: Tensor, repeats: int, axis: int) -> Tensor:
        """Each entry along an axis so many times, one after another."""

    def tile(self, x: Tensor, repeats: Sequence[int], /) -> Tensor:
        """The whole so many times along each axis."""

    def flip(self, x: Tensor, axis: int) -> Tensor:
        """Backwards along an axis."""

    def take(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        """Entries along an axis by their indices; negative ones count from the end."""

    def take_along_axis(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        """For each place of `indices` the entry of `x` along the axis that it names, as after `argsort`."""

    # making and converting --------------------------------------------------------------------------

    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        """Zeros."""

    def ones(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        """Ones."""

    def zeros_like(self, x: Tensor, /) -> Tensor:
        """Zeros of the shape and type of `x`."""

    def ones_like(self, x: Tensor, /) -> Tensor:
        """Ones of the shape and type of `x`."""

    def arange(self, start: int, stop: int | None = None, step: int = 1, dtype: str = "int32") -> Tensor:
        """Numbers from `start` up to `stop`, which is left out; from 0 to `start` where there is none."""

    def one_hot(self, x: Tensor, classes: int, /, *, dtype: str = "float32") -> Tensor:
        """Zeros with a one at the place that `x` names, along a new last axis."""

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """In another type: "float32", "int32", "int64" or "bool"."""

    def convert_to_tensor(self, x: object, /) -> Tensor:
        """A tensor of what NumPy takes for an array."""


NAMES = tuple(name for name in vars(Operations) if not name.startswith("_"))


class _Namespace:
    """The operations of one runtime, and nothing else."""

    def __init__(self, found: Mapping[str, object]) -> None:
        vars(self).update(found)

    def __getattr__(self, name: str) -> NoReturn:
        raise UnknownOperation(
            f"ops has no operation {name!r}; {nearest(name, NAMES)} It has {', '.join(sorted(NAMES))}. The tensors are "
            "the framework's own, so its own functions work on them too.",
            code="operation-unknown",
            name=name,
        )


def namespace(source: object, own: Mapping[str, object]) -> Operations:
    """The operations of one runtime.

    Args:
        source: a module that has them under their names.
        own: those that are made for this runtime, instead of the module's.
    """
    return cast(Operations, _Namespace({name: own.get(name) or getattr(source, name) for name in NAMES}))
