"""Heatmaps of the image's own pixels, from the gradient of the score there.

Such maps are as large as the image and noisy; none of them depends on the choice of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convscope.techniques.heatmaps.evidence import ImageView
from convscope.techniques.heatmaps.methods import MethodResult, PerImageMethod, formula, registered
from convscope.techniques.heatmaps.options import option


@formula(
    "saliency", "Simonyan et al. 2013, Deep Inside Convolutional Networks, arXiv:1312.6034, section 3", at_image=True
)
def saliency(images: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The largest absolute gradient over the colours of each pixel.

    Args:
        images: as the network takes them `(n, h, w, c)`.
        gradients: of the explained score with respect to them, `(n, h, w, c)`.

    Returns:
        `(n, h, w)`, not negative.
    """
    return np.abs(gradients).max(axis=-1).astype(np.float32)


@formula("input-x-gradient", "Shrikumar et al. 2016, Not Just a Black Box, arXiv:1605.01713", at_image=True)
def input_x_gradient(images: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Sum over the colours of value times gradient, signed; else as `saliency`. A value of 0 contributes nothing."""
    return np.einsum("nhwc,nhwc->nhw", images, gradients, dtype=np.float64).astype(np.float32)


@registered
@dataclass(frozen=True)
class SmoothGrad(PerImageMethod):
    """`saliency` of the mean gradient over noisy copies of the image: `(h, w)`, not negative.

    Attributes:
        noise: standard deviation of the noise, as a share of the image's range.
        copies: number of noisy copies.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], method=SmoothGrad(noise=0.1, copies=4)).maps.shape
        (1, 224, 224)
    """

    name = "smoothgrad"
    paper = "Smilkov et al. 2017, SmoothGrad, arXiv:1706.03825"
    at_image = True
    sampled = "copies"
    noise: float = option(0.15, "standard deviation of the noise, as a share of the image's range", low=0)
    copies: int = option(32, "number of noisy copies", low=1)

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`."""
        shape, scale = view.x.shape[1:], self.noise * float(view.x.max() - view.x.min())

        def noisy(numbers: np.ndarray) -> np.ndarray:
            # A generator for each copy: the noise does not depend on the number of copies passed together.
            noise = [np.random.default_rng((view.seed, int(n))).normal(0, 1, shape) for n in numbers]
            return view.x + scale * np.stack(noise)

        total = np.zeros(shape)
        for gradients, _ in view.input_gradients(noisy, self.copies):
            total += gradients.sum(axis=0, dtype=np.float64)
        return MethodResult(np.abs(total / self.copies).max(axis=-1).astype(np.float32))


@registered
@dataclass(frozen=True)
class IntegratedGradients(PerImageMethod):
    """The image less a baseline, times the mean gradient on the straight way between them, by the midpoint rule.

    The map `(h, w)` is signed. Its sum is the difference of the two scores (completeness); the note has the error.

    Attributes:
        baseline: "zero" is 0 in the network's own range: black, or grey where it takes -1..1 or a mean is subtracted.
            "black" and "white" are images of these colours, "mean" is one of the image's mean colour.
        steps: number of steps on the way.

    Example:
        >>> found = convscope.heatmap(network, PHOTOS[0], method=IntegratedGradients(baseline="mean", steps=4))
        >>> found.maps.shape
        (1, 224, 224)
    """

    name = "integrated-gradients"
    paper = "Sundararajan et al. 2017, Axiomatic Attribution, arXiv:1703.01365"
    at_image = True
    sampled = "steps"
    baseline: str = option(
        "zero",
        "image at which the path starts: 0 in the network's own range, or one colour",
        choices=("zero", "black", "white", "mean"),
    )
    steps: int = option(64, "number of steps on the path", low=1)

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`."""
        start = self._start(view)
        change = view.x - start

        def on_the_way(numbers: np.ndarray) -> np.ndarray:
            return start + change * ((numbers + 0.5) / self.steps)[:, None, None, None].astype(np.float32)

        total = np.zeros(view.x.shape[1:])
        for gradients, _ in view.input_gradients(on_the_way, self.steps):
            total += gradients.sum(axis=0, dtype=np.float64)
        heat = (change[0] * total / self.steps).sum(axis=-1)
        gained = view.score - view.scores_of_images(lambda numbers: np.repeat(start, len(numbers), axis=0), 1)[0]
        missing = abs(heat.sum() - gained) / max(abs(gained), 1e-12)
        note = f"sums up to {heat.sum():.4g} of {gained:.4g}: {100 * missing:.1f} % off"
        return MethodResult(heat.astype(np.float32), note)

    def _start(self, view: ImageView) -> np.ndarray:
        """The baseline `(1, h, w, c)` float32, as the network takes it."""
        black, white = view.network.preprocessing.range(view.x.shape[-1])
        colours = {"zero": np.float32(0), "black": black, "white": white, "mean": view.x.mean(axis=(1, 2))[0]}
        return np.broadcast_to(colours[self.baseline], view.x.shape).astype(np.float32)


@registered
@dataclass(frozen=True)
class GuidedBackprop(PerImageMethod):
    """`saliency` of the gradient that comes back through each ReLU only where it is positive.

    Example:
        >>> GuidedBackprop().at_image
        True
    """

    name = "guided-backprop"
    paper = "Springenberg et al. 2014, Striving for Simplicity, arXiv:1412.6806"
    at_image = True
    warning = "guided backpropagation hardly depends on the class or on the weights: it shows edges"

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`.

        Raises:
            Unfit: the network has no ReLU.
        """
        ((gradients, _),) = view.input_gradients(lambda numbers: view.x[numbers], 1, guided=True)
        return MethodResult(np.abs(gradients[0]).max(axis=-1).astype(np.float32))
