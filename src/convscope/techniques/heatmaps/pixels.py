"""Heatmaps of the picture's own pixels, from the gradient of the score there.

Such maps are as large as the picture and grainy; none of them depends on the choice of a layer.
"""

from __future__ import annotations

import numpy as np

from convscope.techniques.heatmaps.evidence import Single
from convscope.techniques.heatmaps.methods import Made, method, replayed

NOISE = 0.15  # standard deviation of SmoothGrad's noise, of the picture's range
DRAWS = 32  # noisy pictures that SmoothGrad takes the mean of
STEPS = 64  # of the path that integrated gradients sum over


@method(
    "saliency", "Simonyan et al. 2013, Deep Inside Convolutional Networks, arXiv:1312.6034, section 3", at_picture=True
)
def saliency(pictures: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The largest absolute gradient over the colours of each pixel.

    Args:
        pictures: as the network takes them `(n, h, w, c)`.
        gradients: of the explained score with respect to them, `(n, h, w, c)`.

    Returns:
        `(n, h, w)`, not negative.
    """
    return np.abs(gradients).max(axis=-1).astype(np.float32)


@method("input-x-gradient", "Shrikumar et al. 2016, Not Just a Black Box, arXiv:1605.01713", at_picture=True)
def input_x_gradient(pictures: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum over the colours of value times gradient, signed; else as `saliency`. What is 0 to the network has no say."""
    return np.einsum("nhwc,nhwc->nhw", pictures, gradients, dtype=np.float64).astype(np.float32)


@replayed("smoothgrad", "Smilkov et al. 2017, SmoothGrad, arXiv:1706.03825", at_picture=True)
def smoothgrad(single: Single) -> Made:
    """`saliency` of the mean gradient over noisy copies of the picture (noise of 15 % of its range).

    Returns:
        `(h, w)`, not negative.
    """
    draws = single.asked.budget or DRAWS
    scale = NOISE * float(single.x.max() - single.x.min())

    def noisy(numbers: np.ndarray) -> np.ndarray:
        # A generator for each copy: what is drawn does not depend on how many are passed together.
        noise = [np.random.default_rng((single.asked.seed, int(n))).normal(0, 1, single.x.shape[1:]) for n in numbers]
        return single.x + scale * np.stack(noise)

    total = np.zeros(single.x.shape[1:])
    for gradients, _ in single.slopes(noisy, draws):
        total += gradients.sum(axis=0, dtype=np.float64)
    return np.abs(total / draws).max(axis=-1).astype(np.float32)


@replayed("integrated-gradients", "Sundararajan et al. 2017, Axiomatic Attribution, arXiv:1703.01365", at_picture=True)
def integrated_gradients(single: Single) -> Made:
    """The picture times the mean gradient on the straight way to it from a picture of zeros, by the midpoint rule.

    Zeros in the network's own range are black, or grey where it takes -1..1 or a mean is taken away.

    Returns:
        `(h, w)`, signed, and how far its sum is from the difference of the two scores (completeness).
    """
    steps = single.asked.budget or STEPS

    def on_the_way(numbers: np.ndarray) -> np.ndarray:
        return single.x * ((numbers + 0.5) / steps)[:, None, None, None].astype(np.float32)

    total = np.zeros(single.x.shape[1:])
    for gradients, _ in single.slopes(on_the_way, steps):
        total += gradients.sum(axis=0, dtype=np.float64)
    heat = (single.x[0] * total / steps).sum(axis=-1)
    gained = single.whole - single.of_pictures(lambda n: np.zeros((len(n), *single.x.shape[1:])), 1)[0]
    missing = abs(heat.sum() - gained) / max(abs(gained), 1e-12)
    return heat.astype(np.float32), f"sums up to {heat.sum():.4g} of {gained:.4g}: {100 * missing:.1f} % off"


@replayed(
    "guided-backprop",
    "Springenberg et al. 2014, Striving for Simplicity, arXiv:1412.6806",
    at_picture=True,
    warning="guided backpropagation hardly depends on the class or on the weights: it shows edges",
)
def guided_backprop(single: Single) -> Made:
    """`saliency` of the gradient that comes back through each ReLU only where it is positive.

    Raises:
        UsageError: the network has none.
    """
    ((gradients, _),) = single.slopes(lambda numbers: single.x[numbers], 1, guided=True)
    return np.abs(gradients[0]).max(axis=-1).astype(np.float32)
