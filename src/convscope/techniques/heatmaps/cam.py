"""Class-activation maps: pure functions from a layer's maps and gradients to a heatmap.

None needs a framework; all are raw and signed, before ReLU and scaling. The last two ask for one derivative more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convscope.techniques.heatmaps.evidence import Evidence, explains_a_class
from convscope.techniques.heatmaps.methods import Method, Unfit, formula, registered
from convscope.techniques.heatmaps.options import option

CLASSLESS = "no class plays a part in it"


@formula("grad-cam", "Selvaraju et al. 2017, Grad-CAM, arXiv:1610.02391, eq. 1 and 2 before the ReLU")
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


@formula("hirescam", "Draelos and Carin 2020, Use HiResCAM instead of Grad-CAM, arXiv:2011.08891, eq. 5")
def hirescam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum over channels of map times gradient, place by place; the arguments and the result are those of `grad_cam`."""
    return np.einsum("nhwc,nhwc->nhw", maps, gradients, dtype=np.float64).astype(np.float32)


@formula("layercam", "Jiang et al. 2021, LayerCAM, IEEE TIP 30, eq. 5 and 6 before the ReLU")
def layercam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum over channels of map times the positive part of its gradient; else as `grad_cam`."""
    return np.einsum("nhwc,nhwc->nhw", maps, np.maximum(gradients, 0), dtype=np.float64).astype(np.float32)


@formula("cam", "Zhou et al. 2016, Learning Deep Features for Discriminative Localization, arXiv:1512.04150, eq. 2")
def cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum of the maps, each weighted by the dense layer after a global average pooling; else as `grad_cam`.

    With such a head the score is the sum of w_k mean(A_k), so the weights are the gradient at each of the
    h * w places, times h * w.

    Raises:
        Unfit: the gradient differs from place to place, so the layer has another head.
    """
    peak = np.abs(gradients).max(axis=(1, 2, 3), keepdims=True)
    spread = np.abs(gradients - gradients.mean(axis=(1, 2), keepdims=True))
    if (spread > 1e-3 * peak).any():
        raise Unfit(
            "method 'cam' needs a network that ends in a global average pooling and one dense layer right after the "
            "chosen layer; expected one weight for each channel, found a gradient that differs from place "
            "to place. Use grad-cam or hirescam, which equal it where it is defined.",
            code="head-not-pooled",
            method="cam",
        )
    return grad_cam(maps, gradients) * (maps.shape[1] * maps.shape[2])


@formula("xgrad-cam", "Fu et al. 2020, Axiom-based Grad-CAM, arXiv:2008.02312, eq. 6")
def xgrad_cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum of the maps, each weighted with the mean of its gradient where the map is strong; else as `grad_cam`.

    The weight is sum(g A) / sum(A), and 0 for a channel whose sum is 0: it is unstable where positive and negative
    activations nearly cancel.
    """
    maps, gradients = maps.astype(np.float64), gradients.astype(np.float64)
    strength = maps.sum(axis=(1, 2))
    known = strength != 0
    weights = np.where(known, (maps * gradients).sum(axis=(1, 2)) / np.where(known, strength, 1), 0)
    return np.einsum("nhwc,nc->nhw", maps, weights).astype(np.float32)


@formula("grad-cam++", "Chattopadhay et al. 2018, Grad-CAM++, arXiv:1710.11063, eq. 10 to 12 with eq. 19")
def grad_cam_plus_plus(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum of the maps, each weighted with its positive gradients, the more the rarer these are; else as `grad_cam`.

    The paper's alpha, g^2 / (2 g^2 + g^3 sum A), is 1 / (2 + g sum A): without 0 / 0 where g is 0, and without a
    number in the denominator that would outweigh small gradients. Where g sum A is -2 it has no value and counts as 0.
    """
    maps, gradients = maps.astype(np.float64), gradients.astype(np.float64)
    below = 2 + gradients * maps.sum(axis=(1, 2), keepdims=True)
    known = (gradients > 0) & (below != 0)
    alpha = np.where(known, 1 / np.where(known, below, 1), 0)
    weights = (alpha * np.maximum(gradients, 0)).sum(axis=(1, 2))
    return np.einsum("nhwc,nc->nhw", maps, weights).astype(np.float32)


@formula(
    "eigen-cam",
    "Muhammad and Yeasin 2020, Eigen-CAM, arXiv:2008.00299, eq. 3: not centred",
    warning=CLASSLESS,
    needs_gradient=False,
)
def eigen_cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The maps' first principal component, whatever the class: no gradient is used; else as `grad_cam`.

    A decomposition leaves its sign open; here its sum is positive, so that after a ReLU no place is negative.
    """
    return np.stack([_upright(_component(one)) for one in maps]).astype(np.float32)


@formula(
    "eigen-cam-centred",
    "Muhammad and Yeasin 2020, Eigen-CAM, of each channel less its mean",
    warning=CLASSLESS,
    needs_gradient=False,
)
def eigen_cam_centred(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """As `eigen_cam` of maps less their mean over space, which is how several tools compute it.

    Its sum is zero, so its sign is the one with which it correlates with the mean of the channels.
    """
    less = maps - maps.mean(axis=(1, 2), keepdims=True)
    return np.stack([_along(_component(one), whole.mean(-1)) for one, whole in zip(less, maps, strict=True)]).astype(
        np.float32
    )


@formula("eigen-grad-cam", "the first principal component of map times gradient, as pytorch-grad-cam defines it")
def eigen_grad_cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The first principal component of map times gradient, not centred; its sign correlates with `hirescam`."""
    products = maps.astype(np.float64) * gradients
    return np.stack([_along(_component(one), one.sum(-1)) for one in products]).astype(np.float32)


MOST_PLACES = 4096  # of a map, for a matrix of all pairs of them


@formula(
    "kpca-cam",
    "Karmani et al. 2024, KPCA-CAM, arXiv:2410.00267, with a sigmoid kernel",
    warning=CLASSLESS,
    needs_gradient=False,
)
def kpca_cam(maps: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The first kernel principal component of the places of the centred maps, kernel tanh(x y / c + 1).

    No gradient is used. The sign is that of `eigen_cam_centred`.

    Raises:
        Unfit: the map has more than `MOST_PLACES` places.
    """
    if maps.shape[1] * maps.shape[2] > MOST_PLACES:
        raise Unfit(
            f"method 'kpca-cam' compares all places of a map with each other; expected at most {MOST_PLACES} of them, "
            f"found {maps.shape[1]}x{maps.shape[2]}. Choose a deeper layer, or eigen-cam.",
            code="map-too-large",
            method="kpca-cam",
            expected=MOST_PLACES,
            size=[maps.shape[1], maps.shape[2]],
        )
    return np.stack([_along(_kernel_component(one), one.mean(-1)) for one in maps]).astype(np.float32)


def _component(values: np.ndarray) -> np.ndarray:
    """The projection `(h, w)` of `(h, w, c)` on its first right singular vector; zero where there is none."""
    table = values.reshape(-1, values.shape[-1]).astype(np.float64)
    if not np.isfinite(table).all():
        return np.full(values.shape[:2], np.nan)
    # Of the smaller of the two products: the same vector, in a fraction of the time.
    if table.shape[1] <= table.shape[0]:
        _, vectors = np.linalg.eigh(table.T @ table)
        return (table @ vectors[:, -1]).reshape(values.shape[:2])
    sizes, vectors = np.linalg.eigh(table @ table.T)
    return (vectors[:, -1] * np.sqrt(max(sizes[-1], 0.0))).reshape(values.shape[:2])


def _kernel_component(values: np.ndarray) -> np.ndarray:
    table = values.reshape(-1, values.shape[-1]).astype(np.float64)
    if not np.isfinite(table).all():
        return np.full(values.shape[:2], np.nan)
    table = table - table.mean(axis=0)
    kernel = np.tanh(table @ table.T / table.shape[1] + 1)
    kernel = kernel - kernel.mean(axis=0) - kernel.mean(axis=1)[:, None] + kernel.mean()
    sizes, vectors = np.linalg.eigh(kernel)
    return (vectors[:, -1] * np.sqrt(max(sizes[-1], 0.0))).reshape(values.shape[:2])


def _upright(heat: np.ndarray) -> np.ndarray:
    return -heat if heat.sum() < 0 else heat


def _along(heat: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """With the sign with which it correlates with another map."""
    return -heat if ((heat - heat.mean()) * (direction - direction.mean())).sum() < 0 else heat


# -- from a pass or a product more -----------------------------------------------------------------------


@registered
@dataclass(frozen=True)
class FinerCAM(Method):
    """Grad-CAM of the class's score less `alpha` times those of the classes whose scores are the nearest to it.

    These are weighted with their probabilities, or alike where there are none.

    Attributes:
        alpha: share of their scores that is subtracted.
        rivals: number of these classes.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], "cat", method=FinerCAM(alpha=1.0, rivals=1)).maps.shape
        (1, 28, 28)
    """

    name = "finer-cam"
    paper = "Zhang et al. 2025, Finer-CAM, arXiv:2501.11309"
    alpha: float = option(0.6, "share of the scores of the similar classes that is subtracted", low=0)
    rivals: int = option(3, "number of similar classes", low=1)

    def explain(self, evidence: Evidence) -> Sequence[np.ndarray]:
        """See `Method.explain`.

        Raises:
            Unfit: no class is explained, or there is no other one.
        """
        if not explains_a_class(evidence) or evidence.logits is None or evidence.logits.shape[-1] < 2:
            raise Unfit(
                "method 'finer-cam' compares a class with those like it; expected a class and at least one more, "
                f"found {evidence.target.text}. Use grad-cam.",
                code="no-other-class",
                method="finer-cam",
                target=evidence.target.text,
            )
        (weights,) = evidence.arguments
        contrasted = [self._contrasted(evidence, *pair) for pair in zip(evidence.logits, weights, strict=True)]
        return list(grad_cam(evidence.maps, evidence.gradients_of((np.stack(contrasted),))))

    def _contrasted(self, evidence: Evidence, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The weights `(classes,)` of one image's scores with the similar classes subtracted."""
        target = int(weights.argmax())
        order = np.argsort(np.abs(logits - logits[target]), kind="stable")
        if evidence.network.head.paired and weights.min() < 0:
            return weights  # the only other class is subtracted already
        similar = order[order != target][: self.rivals]
        probabilities = evidence.network.head.probabilities(logits[None])
        shares = np.ones(len(similar)) if probabilities is None else probabilities[0, similar].astype(np.float64)
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(similar), 1 / len(similar))
        found = weights.astype(np.float32).copy()
        found[similar] -= self.alpha * shares
        return found


@registered
@dataclass(frozen=True)
class ShapleyCAM(Method):
    """Sum of the maps, weighted with the mean over space of g - H A / 2, H the Hessian of the score in the map A.

    Where the score is piecewise linear in the map (ReLU networks, logits) H is zero and this is Grad-CAM.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], "cat", method=ShapleyCAM()).rows[0].method
        'shapley-cam'
    """

    name = "shapley-cam"
    paper = "Cai 2025, ShapleyCAM, arXiv:2501.06261"

    def explain(self, evidence: Evidence) -> Sequence[np.ndarray]:
        """See `Method.explain`."""
        return list(grad_cam(evidence.maps, evidence.gradients - evidence.hessian_vector_product() / 2))
