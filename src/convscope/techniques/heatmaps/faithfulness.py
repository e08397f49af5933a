"""Measures of how far to trust a heatmap.

The measures and the limits of the badge were fixed before any method was scored. A score is the probability of the
class; where the target has none, it is the number itself over the difference of the whole image from an image of its
mean colour, which then scores 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from convscope.arrays import resize_map
from convscope.results import Check
from convscope.techniques.heatmaps.evidence import ImageView
from convscope.techniques.heatmaps.ranks import rank_correlation

STEPS = 15  # of the curves of deletion and insertion: with both ends as many as are passed together
REMOVED = (0.2, 0.4, 0.6, 0.8)  # shares of the image that ROAD removes
NOISE, COPIES = 0.02, 4  # of the stability: standard deviation over the image's range, and how many noisy copies
BLUR = 16  # insertion begins with the image at so many times fewer pixels a side
# The badge: a map that hardly changes with the weights fails, and so does one that changes with everything.
FAILS, DOUBTFUL = 0.75, 0.5  # rank correlation with the maps of scrambled weights, above which
UNSTABLE, UNSTEADY = 0.25, 0.5  # rank correlation with the maps of noisy copies, below which it fails or is doubtful

Remake = Callable[[np.ndarray], np.ndarray]


def check(view: ImageView, raw: np.ndarray, remake: Remake, seed: int = 0) -> Check:
    """All measures of one heatmap.

    Args:
        view: the image and the target.
        raw: the map `(h, w)`.
        remake: makes the map of a prepared image `(1, h, w, c)` for the same score, with the present weights.
        seed: random seed of noise, ties and permutations.
    """
    random = np.random.default_rng(seed)
    heat = ranked(raw, view.x.shape[1:3], random)
    steady = stability(view.x, raw, remake, random)
    scrambled = randomisation(view, raw, remake, seed)
    badge, reason = verdict(raw, scrambled, steady)
    return Check(
        deletion=deletion(view, heat),
        insertion=insertion(view, heat),
        **drop_and_increase(view, raw),
        road=road(view, heat, random),
        stability=steady,
        randomisation=scrambled,
        badge=badge,
        reason=reason,
    )


def verdict(raw: np.ndarray, scrambled: float | None, steady: float) -> tuple[str, str]:
    """The badge, "pass", "doubtful" or "fail", and why; `scrambled` is None where no weights could be scrambled."""
    if not raw.max() > raw.min():
        return "fail", "the map has the same value everywhere"
    noisy = f"the rank correlation with maps of noisy copies is {steady:.2f}"
    if scrambled is None:
        return "doubtful", f"no weights were found to scramble, so the randomisation check was not made; {noisy}"
    other = f"the rank correlation with maps of scrambled weights is {scrambled:.2f}"
    if scrambled > FAILS:
        return "fail", f"{other}: the map hardly depends on what the network learned"
    if steady < UNSTABLE:
        return "fail", f"{noisy}: the map changes with imperceptible noise"
    if scrambled > DOUBTFUL:
        return "doubtful", f"{other}: part of the map does not depend on what the network learned"
    if steady < UNSTEADY:
        return "doubtful", f"{noisy}: the map changes with imperceptible noise"
    return "pass", f"{other}; {noisy}"


# -- curves ----------------------------------------------------------------------------------------------


def ranked(raw: np.ndarray, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """The pixels' places in the order of the map, 0 for the most important `(h, w)`; ties are broken at random."""
    heat = resize_map(np.asarray(raw, np.float32), *size).astype(np.float64).ravel()
    order = np.lexsort((random.random(heat.size), -heat))
    places = np.empty(heat.size, np.int64)
    places[order] = np.arange(heat.size)
    return places.reshape(size)


def deletion(view: ImageView, places: np.ndarray) -> float:
    """Area under the score while the most important pixels turn into the mean colour (1806.07421); less is better."""
    return _area(score_curve(view, places, view.x[0], _grey(view.x)[0]))


def insertion(view: ImageView, places: np.ndarray) -> float:
    """Area under the score while the most important pixels come back into a blurred image; more is better."""
    return _area(score_curve(view, places, _blurred(view.x[0]), view.x[0]))


def score_curve(view: ImageView, places: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The score `(STEPS + 1,)` while pixels of one image are replaced by another's, by their places."""

    def mixed(numbers: np.ndarray) -> np.ndarray:
        limits = np.round(numbers / STEPS * places.size)
        return np.where((places[None] < limits[:, None, None])[..., None], after, before)

    return _probabilities(view, mixed, STEPS + 1)


def _probabilities(view: ImageView, images: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Probabilities of some images; without them scores over the size of the whole one's, from that of grey on.

    Not a number where the whole image scores as grey does: there is nothing to lose then.
    """
    scores = view.probabilities(images, count)
    if view.has_probability:
        return scores
    empty = view.probabilities(lambda numbers: np.repeat(_grey(view.x), len(numbers), axis=0), 1)[0]
    span = abs(view.score - empty)
    return (scores - empty) / (span if span > 1e-3 * max(abs(view.score), abs(empty)) else np.nan)


def _area(curve: np.ndarray) -> float:
    """By the trapezoidal rule over 0..1."""
    return float((curve[:-1] + curve[1:]).mean() / 2)


def _grey(x: np.ndarray) -> np.ndarray:
    """An image of the mean colour `(1, h, w, c)`."""
    return np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)


def _blurred(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    small = max(2, height // BLUR), max(2, width // BLUR)
    channels = [resize_map(_halved(image[..., k], small), height, width) for k in range(image.shape[-1])]
    return np.stack(channels, axis=-1)


def _halved(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The means `size` of blocks of a channel."""
    rows, columns = (np.array_split(np.arange(side), parts) for side, parts in zip(channel.shape, size, strict=True))
    means = [[channel[block[0] : block[-1] + 1, part[0] : part[-1] + 1].mean() for part in columns] for block in rows]
    return np.array(means, np.float32)


# -- the image seen through the map-----------------------------------------------------------------------


def drop_and_increase(view: ImageView, raw: np.ndarray) -> dict[str, float]:
    """Average drop and increase (1710.11063, section 5): the share of the score that is lost
    where the image is seen through the map alone (0..1), and 1 if it rises instead.
    """
    heat = np.maximum(resize_map(np.asarray(raw, np.float32), *view.x.shape[1:3]), 0)
    mask = (heat / max(float(heat.max()), 1e-12))[..., None]
    grey = _grey(view.x)[0]
    shown = [view.x[0], grey + mask * (view.x[0] - grey)]
    whole, seen = _probabilities(view, lambda numbers: np.stack([shown[number] for number in numbers]), 2)
    return {"drop": float(max(0.0, whole - seen) / max(abs(whole), 1e-12)), "increase": float(seen > whole)}


# -- remove and debias -----------------------------------------------------------------------------------


def road(view: ImageView, places: np.ndarray, random: np.random.Generator) -> float:
    """ROAD (2202.00449): the mean, over shares removed, of the score without the least important pixels less the score
    without the most important ones. The removed pixels are filled in from their neighbours, so that their outline
    has no information; -1..1, more is better.
    """
    masks = [places < share * places.size for share in REMOVED]
    masks += [places >= (1 - share) * places.size for share in REMOVED]
    filled = [imputed(view.x[0], mask, random) for mask in masks]
    scores = _probabilities(view, lambda numbers: np.stack([filled[number] for number in numbers]), len(filled))
    return float((scores[len(REMOVED) :] - scores[: len(REMOVED)]).mean())


BESIDE, ACROSS = np.float32(1 / 6), np.float32(1 / 12)  # weights of a pixel's eight neighbours
SWEEPS = 16  # over each size, from the coarsest to the finest


def imputed(image: np.ndarray, removed: np.ndarray, random: np.random.Generator, noise: float = 0.01) -> np.ndarray:
    """An image `(h, w, c)` whose removed pixels `(h, w)` are each the weighted mean of their eight neighbours.

    The weights are 1/6 beside and 1/12 across, over those inside of the image (2202.00449, section 5.1), with noise
    of a share of the image's range. The equations are solved by sweeps over ever finer images: approximately, on
    large holes.
    """
    filled = _solved(image.astype(np.float32), removed)
    scale = noise * float(image.max() - image.min())
    return np.where(removed[..., None], filled + random.normal(0, scale, image.shape), image).astype(np.float32)


def _solved(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    height, width = removed.shape
    start = np.broadcast_to(_mean_of_known(image, removed), image.shape)
    if min(height, width) >= 8 and removed.any():
        coarse = _solved(*_coarser(image, removed))
        start = np.repeat(np.repeat(coarse, 2, axis=0), 2, axis=1)[:height, :width]
    filled = np.where(removed[..., None], start, image)
    weights = _around(np.ones((height, width, 1), np.float32))
    for _ in range(SWEEPS):
        filled = np.where(removed[..., None], _around(filled) / weights, image)
    return filled


def _coarser(image: np.ndarray, removed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half the size: means of the known pixels of each block, removed where a block has none."""
    pad = [(0, side % 2) for side in removed.shape]
    known = np.pad(~removed, pad).astype(np.float32)[..., None]
    padded = np.pad(image, [*pad, (0, 0)])
    height, width = known.shape[0] // 2, known.shape[1] // 2
    counts = known.reshape(height, 2, width, 2, 1).sum(axis=(1, 3))
    sums = (padded * known).reshape(height, 2, width, 2, -1).sum(axis=(1, 3))
    return sums / np.maximum(counts, 1), counts[..., 0] == 0


def _around(values: np.ndarray) -> np.ndarray:
    """The weighted sum of each pixel's eight neighbours, nothing outside of the image."""
    padded = np.pad(values, [(1, 1), (1, 1), (0, 0)])
    height, width = values.shape[:2]

    def moved(rows: int, columns: int) -> np.ndarray:
        return padded[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    beside = moved(-1, 0) + moved(1, 0) + moved(0, -1) + moved(0, 1)
    across = moved(-1, -1) + moved(-1, 1) + moved(1, -1) + moved(1, 1)
    return BESIDE * beside + ACROSS * across


def _mean_of_known(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    return image[~removed].mean(axis=0) if not removed.all() else image.mean(axis=(0, 1))


# -- dependence on noise and weights ---------------------------------------------------------------------


def stability(x: np.ndarray, raw: np.ndarray, remake: Remake, random: np.random.Generator) -> float:
    """Rank correlation of the map with those of copies under noise of 2 % of the image's range, the mean; -1..1."""
    scale = NOISE * float(x.max() - x.min())
    copies = [(x + random.normal(0, scale, x.shape)).astype(np.float32) for _ in range(COPIES)]
    return float(np.mean([rank_correlation(raw, np.nan_to_num(remake(copy))) for copy in copies]))


def randomisation(view: ImageView, raw: np.ndarray, remake: Remake, seed: int = 0) -> float | None:
    """The cascading randomisation check (1810.03292): how much the map stays the same while weights are scrambled.

    The values inside of each kernel, and of the norms and biases after it, change places: of the last one on the way to
    the target, of a third of them, two thirds, all. The number is the mean over these of the absolute rank
    correlation with the map, 0..1; less is better. A map that does not use the weights has 1. None where there is no
    kernel to scramble (weights that are constants of a program).
    """
    stages = view.network.stages(view.target.record)
    count, found = len(stages), []
    for last in sorted({round(share * count) or 1 for share in (0, 1 / 3, 2 / 3, 1)}) if count else ():
        with view.network.scrambled(stages[-last:], seed):
            found.append(abs(rank_correlation(raw, np.nan_to_num(remake(view.x)))))
    return float(np.mean(found)) if found else None


# -- which layer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """The quality of a layer's maps: insertion less deletion, the mean over images."""

    layer: str
    value: float


def better_layers(views: Sequence[ImageView], maps: Sequence[tuple[str, Sequence[np.ndarray]]]) -> list[Judged]:
    """Layers by insertion less deletion, the best first.

    Args:
        views: the images and the targets.
        maps: for each layer its path and its map for each image.
    """
    found = []
    for path, made in maps:
        gained = []
        for view, raw in zip(views, made, strict=True):
            places = ranked(raw, view.x.shape[1:3], np.random.default_rng(0))
            gained.append(insertion(view, places) - deletion(view, places))
        found.append(Judged(path, float(np.mean(gained))))
    return sorted(found, key=lambda judged: -judged.value)
