"""Heatmaps from replaying the network while parts of a layer's map, or of the image, are removed.

Memory is bounded by the chunk of `evidence` and not by the number of channels or masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convscope.arrays import resize_map
from convscope.errors import UsageError
from convscope.techniques.heatmaps.evidence import ImageView
from convscope.techniques.heatmaps.methods import MethodResult, PerImageMethod, Unfit, registered
from convscope.techniques.heatmaps.options import option
from convscope.techniques.heatmaps.ranks import rank_correlation

PATCHES = 8  # of a side, where the size of a patch is left open


@registered
@dataclass(frozen=True)
class AblationCAM(PerImageMethod):
    """Sum of the maps, each weighted with the decrease of the score without it, as a share of the score's size.

    The map `(h, w)` is raw and signed: w_k = (y - y_k) / |y|, so that a negative score does not reverse the signs.

    Example:
        >>> AblationCAM().options
        ()
    """

    name = "ablation-cam"
    paper = "Desai and Ramaswamy 2020, Ablation-CAM, WACV 2020, eq. 3"
    needs_gradient = False

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`."""
        channels = view.maps.shape[-1]

        def without(numbers: np.ndarray) -> np.ndarray:
            return 1.0 - np.eye(channels)[numbers]

        drops = view.score - view.scores_of_maps(without, channels)
        weights = drops / max(abs(view.score), 1e-12)
        return MethodResult((view.maps.astype(np.float64) @ weights).astype(np.float32))


@registered
@dataclass(frozen=True)
class ScoreCAM(PerImageMethod):
    """Sum of the maps, each weighted with the score of the image seen through that map alone.

    Each map is brought to the image's size and to 0..1, and the image, as the network takes it, is multiplied by
    it. The weights are the softmax over channels of the scores; the score of an empty image, which the paper subtracts
    from each, cancels in it. A constant map hides the whole image and has no weight. No weight is
    negative.

    Where not all channels are passed (see `_sampled`), the scores of the others are estimated from these (see
    `estimated_scores`), and the note has the accuracy of the estimates for the channels that were passed.

    Attributes:
        channels: number of channels that are passed; None for all.

    Example:
        >>> ScoreCAM(channels=8).text
        'score-cam(channels=8)'
        >>> convscope.heatmap(network, PHOTOS[0], method=ScoreCAM(channels=8)).maps.shape
        (1, 28, 28)
    """

    name = "score-cam"
    paper = "Wang et al. 2020, Score-CAM, arXiv:1910.01279, eq. 6 to 8"
    needs_gradient = False
    sampled = "channels"
    channels: int | None = option(None, "number of channels that are passed", low=2, none="all")

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`."""
        low, high = view.maps.min(axis=(0, 1)), view.maps.max(axis=(0, 1))
        varying = np.flatnonzero(high > low)
        if not len(varying):
            return MethodResult(np.zeros(view.maps.shape[:2], np.float32))
        size, precision = view.x.shape[1:3], view.spec.call.precision

        def through(channels: np.ndarray) -> np.ndarray:
            masks = [(resize_map(view.maps[..., k], *size) - low[k]) / (high[k] - low[k]) for k in channels]
            return view.x * np.stack(masks)[..., None]

        def scored(places: np.ndarray) -> np.ndarray:
            return view.scores_of_images(lambda numbers: through(varying[places[numbers]]), len(places), precision)

        maps = view.maps[..., varying].astype(np.float64)
        if self.channels is None or self.channels >= len(varying):
            return MethodResult(_weighted(maps, scored(np.arange(len(varying)))).astype(np.float32))
        masks = ((maps - low[varying]) / (high - low)[varying]).reshape(-1, len(varying)).T
        passed, known = _sampled(masks, self.channels, scored)
        scores, left_out = estimated_scores(masks, passed, known)
        note = (
            f"{len(passed)} of {len(varying)} channels were passed; the rank correlation of their scores with "
            f"estimates from each other is {rank_correlation(left_out, known):.2f}"
        )
        return MethodResult(_weighted(maps, scores).astype(np.float32), note)


def _weighted(maps: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The sum `(h, w)` of maps `(h, w, c)`, weighted with the softmax of their scores `(c,)`."""
    weights = np.exp(scores - scores.max())
    return maps @ (weights / weights.sum())


def spread_out(masks: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` of the masks `(c, places)`: each as far as can be from those that were chosen before it."""
    chosen = [int(np.argmax(np.linalg.norm(masks - masks.mean(axis=0), axis=1)))]
    nearest = np.full(len(masks), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, ((masks - masks[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(nearest)))
    return np.array(sorted(set(chosen)))


def _sampled(
    masks: np.ndarray, budget: int, score: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the masks `(c, places)` are passed, and their scores: half of the budget spread over their range,
    half for those that are estimated to score the highest, which weigh the most in a softmax.
    """
    first = spread_out(masks, -(-budget // 2))
    known = score(first)
    estimated = estimated_scores(masks, first, known)[0]
    estimated[first] = -np.inf
    second = np.argsort(-estimated, kind="stable")[: budget - len(first)]
    return np.concatenate([first, second]), np.concatenate([known, score(second)])


def estimated_scores(masks: np.ndarray, passed: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores `(c,)` of all masks `(c, places)`, by kernel ridge regression from those that were passed.

    The kernel is exp(-d^2 / 2 s^2), s the median distance; its ridge is the one of a few with the smallest
    error of scores that are left out one by one.

    Returns:
        the scores, as they are where they were passed; and for each of those the estimate from all others.
    """
    lengths = (masks**2).sum(axis=1)
    squares = np.maximum(lengths[:, None] + lengths[None, passed] - 2 * masks @ masks[passed].T, 0)
    kernel = np.exp(-squares / max(2 * np.median(squares[passed]), 1e-12))
    centre, best = scores.mean(), (np.inf, scores, scores)
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        inverse = np.linalg.inv(kernel[passed] + ridge * np.eye(len(passed)))
        weights = inverse @ (scores - centre)
        # Leaving one out in closed form (Rasmussen and Williams 2006, eq. 5.12).
        left_out = scores - weights / np.diag(inverse)
        error = float(((left_out - scores) ** 2).mean())
        if error < best[0]:
            best = (error, centre + kernel @ weights, left_out)
    estimated = best[1].copy()
    estimated[passed] = scores
    return estimated, best[2]


@registered
@dataclass(frozen=True)
class Occlusion(PerImageMethod):
    """The decrease of the score when a patch of the image's mean colour covers a place: the image's `(h, w)`, signed.

    Where several patches cover a place, it is their mean.

    Attributes:
        patch: side of the square patch in pixels of the network's input; None for an eighth of each side.
        stride: distance between patches in pixels; None for half of the patch.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], method=Occlusion(patch=112)).maps.shape
        (1, 224, 224)
    """

    name = "occlusion"
    paper = "Zeiler and Fergus 2013, Visualizing Convolutional Networks, arXiv:1311.2901"
    needs_gradient = False
    at_image = True
    patch: int | None = option(None, "side of the patch in pixels", low=1, none="auto: an eighth of each side")
    stride: int | None = option(
        None, "distance between patches in pixels, at most the patch", low=1, none="auto: half of the patch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch is not None and self.stride is not None:
            self._check_stride(self.patch)

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`.

        Raises:
            Unfit: the patch is larger than the image, or the stride larger than the patch.
        """
        height, width = view.x.shape[1:3]
        patch = self._side(height), self._side(width)
        rows, columns = (self._starts(side, length) for side, length in zip((height, width), patch, strict=True))
        corners = [(row, column) for row in rows for column in columns]
        mean = view.x.mean(axis=(1, 2))[0]

        def covered(numbers: np.ndarray) -> np.ndarray:
            images = np.repeat(view.x, len(numbers), axis=0)
            for image, number in zip(images, numbers, strict=True):
                row, column = corners[number]
                image[row : row + patch[0], column : column + patch[1]] = mean
            return images

        losses = view.score - view.scores_of_images(covered, len(corners))
        total, times = np.zeros((height, width)), np.zeros((height, width))
        for (row, column), loss in zip(corners, losses, strict=True):
            area = slice(row, row + patch[0]), slice(column, column + patch[1])
            total[area] += loss
            times[area] += 1
        return MethodResult((total / times).astype(np.float32))

    def _side(self, side: int) -> int:
        patch = max(1, round(side / PATCHES)) if self.patch is None else self.patch
        if patch > side:
            raise Unfit(
                f"expected a patch of at most {side} pixels, the network's input, found {patch}.",
                code="patch-too-large",
                method="occlusion",
                expected=side,
                found=patch,
            )
        self._check_stride(patch)
        return patch

    def _check_stride(self, patch: int) -> None:
        if self.stride is not None and self.stride > patch:
            raise UsageError(
                f"option 'stride' of method 'occlusion': expected at most the side of the patch, {patch} pixels, so "
                f"that every place is covered, found {self.stride}.",
                code="method-option-invalid",
                method="occlusion",
                name="stride",
                found=self.stride,
            )

    def _starts(self, side: int, patch: int) -> list[int]:
        """Where patches begin along a side, the last one at the end."""
        last = side - patch
        return sorted({*range(0, last + 1, self.stride or max(1, patch // 2)), last})


@registered
@dataclass(frozen=True)
class RISE(PerImageMethod):
    """The mean of random soft masks, each weighted with the score of the image seen through it.

    The image, as the network takes it, is multiplied by a mask of random cells, some of them visible, enlarged and
    shifted. The score is the probability of the class where there is one. The map of a mask of the mean score is
    subtracted from the map `(h, w)`; the note is its standard error.

    Attributes:
        masks: number of masks.
        resolution: number of cells along a side of a mask.
        visible: probability that a cell is visible.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0], method=RISE(masks=8, resolution=4)).maps.shape
        (1, 224, 224)
    """

    name = "rise"
    paper = "Petsiuk et al. 2018, RISE, arXiv:1806.07421, eq. 6"
    needs_gradient = False
    at_image = True
    sampled = "masks"
    masks: int = option(1000, "number of random masks", low=2)
    resolution: int = option(7, "cells of a side of a mask", low=1, high=256)
    visible: float = option(0.5, "probability with which a cell is visible", low=0.01, high=1)

    def explain_image(self, view: ImageView) -> MethodResult:
        """See `PerImageMethod.explain_image`."""
        size = view.x.shape[1:3]

        def seen(numbers: np.ndarray) -> np.ndarray:
            return view.x * np.stack([self._mask(view.seed, number, size) for number in numbers])[..., None]

        scores = view.probabilities(seen, self.masks, view.spec.call.precision)
        total, squares = np.zeros(size), np.zeros(size)
        for number, score in enumerate(scores - scores.mean()):
            part = score * self._mask(view.seed, number, size) / self.visible
            total += part
            squares += part**2
        heat = total / self.masks
        error = np.sqrt(np.maximum(squares / self.masks - heat**2, 0) / self.masks).mean()
        share = f"{error / np.abs(heat).max():.2f}" if heat.any() else "0"
        return MethodResult(heat.astype(np.float32), f"{self.masks} masks; standard error {share} of the largest value")

    def _mask(self, seed: int, number: int, size: tuple[int, ...]) -> np.ndarray:
        """One mask `size`, 0..1."""
        random = np.random.default_rng((seed, int(number)))
        side = self.resolution + 1
        cells = (random.random((side, side)) < self.visible).astype(np.float32)
        cell = -(-size[0] // self.resolution), -(-size[1] // self.resolution)
        large = resize_map(cells, side * cell[0], side * cell[1])
        row, column = random.integers(cell[0]), random.integers(cell[1])
        return large[row : row + size[0], column : column + size[1]]
