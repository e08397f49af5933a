"""Class-activation maps: pure functions from a layer's maps and gradients to a heatmap, in one registry.

A new method is one decorated function. None needs a framework; all are raw and signed, before ReLU and scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convscope.errors import UsageError, nearest

Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Method:
    """A way to make a heatmap.

    Attributes:
        name: as `--method` takes it.
        paper: where it is defined.
        formula: from maps and gradients, both `(n, h, w, c)`, to a heatmap `(n, h, w)`.
    """

    name: str
    paper: str
    formula: Formula


METHODS: dict[str, Method] = {}


def method(name: str, paper: str) -> Callable[[Formula], Formula]:
    """Register a formula under `name`."""

    def register(formula: Formula) -> Formula:
        METHODS[name] = Method(name, paper, formula)
        return formula

    return register


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"no heatmap method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


@method("grad-cam", "Selvaraju et al. 2017, Grad-CAM, arXiv:1610.02391, eq. 1 and 2 before the ReLU")
def grad_cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum of the maps, each weighted with the mean of its gradient over space.

    Args:
        maps: activations `(n, h, w, c)`.
        gradients: of the explained score with respect to them, `(n, h, w, c)`.

    Returns:
        `(n, h, w)`, raw and signed.
    """
    weights = gradients.mean(axis=(1, 2), dtype=np.float64)
    return np.einsum("nhwc,nc->nhw", maps, weights).astype(np.float32)


@method("hirescam", "Draelos and Carin 2020, Use HiResCAM instead of Grad-CAM, arXiv:2011.08891, eq. 5")
def hirescam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum over channels of map times gradient, place by place; the arguments and the result are those of `grad_cam`."""
    return np.einsum("nhwc,nhwc->nhw", maps, gradients, dtype=np.float64).astype(np.float32)


@method("layercam", "Jiang et al. 2021, LayerCAM, IEEE TIP 30, eq. 5 and 6 before the ReLU")
def layercam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum over channels of map times the positive part of its gradient; else as `grad_cam`."""
    return np.einsum("nhwc,nhwc->nhw", maps, np.maximum(gradients, 0), dtype=np.float64).astype(np.float32)
