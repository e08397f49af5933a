"""Heatmaps from replaying the network while parts of a layer's map, or of the picture, are taken away.

Memory is bounded by the chunk of `evidence` and not by the number of channels or masks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convscope.imaging import resize_map
from convscope.techniques.heatmaps.evidence import Single
from convscope.techniques.heatmaps.methods import Made, replayed
from convscope.techniques.heatmaps.ranks import rank_correlation

CELLS = 8  # occlusion: patches of a side, half of which lies under the next one
MASKS = 1000  # of RISE
GRID, SHOWN = 7, 0.5  # of RISE: cells of a side, and the share that is seen


@replayed("ablation-cam", "Desai and Ramaswamy 2020, Ablation-CAM, WACV 2020, eq. 3")
def ablation_cam(single: Single) -> np.ndarray:
    """Sum of the maps, each weighted with what the score loses without it, as a share of the score's size.

    Returns:
        `(h, w)`, raw and signed: w_k = (y - y_k) / |y|, so that a negative score turns no sign round.
    """
    channels = single.maps.shape[-1]

    def without(numbers: np.ndarray) -> np.ndarray:
        return 1.0 - np.eye(channels)[numbers]

    drops = single.whole - single.scores(without, channels)
    return (single.maps.astype(np.float64) @ (drops / max(abs(single.whole), 1e-12))).astype(np.float32)


@replayed("score-cam", "Wang et al. 2020, Score-CAM, arXiv:1910.01279, eq. 6 to 8")
def score_cam(single: Single) -> Made:
    """Sum of the maps, each weighted with what the score is of the picture seen through that map alone.

    Each map is brought to the picture's size and to 0..1, and the picture, as the network takes it, is multiplied by
    it. The weights are the softmax over channels of the scores; what an empty picture says, which the paper takes away
    from each, cancels in it. A map that is the same everywhere lets nothing through and weighs nothing.

    With a budget only so many channels are passed (see `_sampled`), and the scores of the others are guessed from these
    (see `_guessed`).

    Returns:
        `(h, w)`, raw: no weight is negative; and with a budget, how well the guess does on channels it was not told.
    """
    low, high = single.maps.min(axis=(0, 1)), single.maps.max(axis=(0, 1))
    told = np.flatnonzero(high > low)
    if not len(told):
        return np.zeros(single.maps.shape[:2], np.float32)
    size = single.x.shape[1:3]

    def through(channels: np.ndarray) -> np.ndarray:
        masks = [(resize_map(single.maps[..., k], *size) - low[k]) / (high[k] - low[k]) for k in channels]
        return single.x * np.stack(masks)[..., None]

    maps, note, budget = single.maps[..., told].astype(np.float64), "", single.asked.budget
    if budget is None or budget >= len(told):
        scores = single.of_pictures(lambda numbers: through(told[numbers]), len(told), single.asked.precision)
    else:
        masks = ((maps - low[told]) / (high - low)[told]).reshape(-1, len(told)).T
        passed, known = _sampled(
            masks,
            budget,
            lambda some: single.of_pictures(lambda n: through(told[some[n]]), len(some), single.asked.precision),
        )
        scores, left_out = _guessed(masks, passed, known)
        agreement = rank_correlation(left_out, known)
        note = (
            f"{len(passed)} of {len(told)} channels; the scores of those, guessed from each other, agree by "
            f"{agreement:.2f} in rank with what they are"
        )
    return _weighted(maps, scores).astype(np.float32), note


def _weighted(maps: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The sum `(h, w)` of maps `(h, w, c)`, weighted with the softmax of their scores `(c,)`."""
    weights = np.exp(scores - scores.max())
    return maps @ (weights / weights.sum())


def _spread(masks: np.ndarray, count: int) -> np.ndarray:
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
    """Which of the masks `(c, places)` are passed, and their scores: half of the budget spread over what they show,
    half on those that are guessed to score the highest, which weigh the most in a softmax.
    """
    first = _spread(masks, -(-budget // 2))
    known = score(first)
    guessed = _guessed(masks, first, known)[0]
    guessed[first] = -np.inf
    second = np.argsort(-guessed, kind="stable")[: budget - len(first)]
    return np.concatenate([first, second]), np.concatenate([known, score(second)])


def _guessed(masks: np.ndarray, passed: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores `(c,)` of all masks `(c, places)`, by kernel ridge regression from those that were passed.

    The kernel is exp(-d^2 / 2 s^2), s the median distance; its ridge is the one of a few that guesses best what it was
    not told.

    Returns:
        the scores, as they are where they were passed; and for each of those the guess from all others.
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
    guessed = best[1].copy()
    guessed[passed] = scores
    return guessed, best[2]


@replayed("occlusion", "Zeiler and Fergus 2013, Visualizing Convolutional Networks, arXiv:1311.2901", at_picture=True)
def occlusion(single: Single) -> Made:
    """What the score loses when a patch in the picture's mean colour covers it.

    A patch is an eighth of a side, and moves by half of that. Where several patches cover a place, their mean.

    Returns:
        the picture's `(h, w)`, signed.
    """
    height, width = single.x.shape[1:3]
    patch = max(1, round(height / CELLS)), max(1, round(width / CELLS))
    rows, columns = (_starts(side, length) for side, length in zip((height, width), patch, strict=True))
    corners = [(row, column) for row in rows for column in columns]
    grey = single.x.mean(axis=(1, 2))[0]

    def covered(numbers: np.ndarray) -> np.ndarray:
        pictures = np.repeat(single.x, len(numbers), axis=0)
        for picture, number in zip(pictures, numbers, strict=True):
            row, column = corners[number]
            picture[row : row + patch[0], column : column + patch[1]] = grey
        return pictures

    losses = single.whole - single.of_pictures(covered, len(corners))
    total, times = np.zeros((height, width)), np.zeros((height, width))
    for (row, column), loss in zip(corners, losses, strict=True):
        area = slice(row, row + patch[0]), slice(column, column + patch[1])
        total[area] += loss
        times[area] += 1
    return (total / times).astype(np.float32)


def _starts(side: int, patch: int) -> list[int]:
    """Where patches begin along a side, half of one apart, the last one at the end."""
    last = side - patch
    return sorted({*range(0, last + 1, max(1, patch // 2)), last})


@replayed("rise", "Petsiuk et al. 2018, RISE, arXiv:1806.07421, eq. 6, with cells of a seventh", at_picture=True)
def rise(single: Single) -> Made:
    """The mean of random soft masks, each weighted with the score of the picture seen through it.

    The picture, as the network takes it, is multiplied by a mask of 7x7 random cells, half of them seen, enlarged and
    shifted. The score is the probability of the class where there is one.

    Returns:
        the picture's `(h, w)`, less what a mask of the mean score would give, and its standard error.
    """
    count = single.asked.budget or MASKS
    size = single.x.shape[1:3]

    def mask(number: int) -> np.ndarray:
        random = np.random.default_rng((single.asked.seed, int(number)))
        cells = (random.random((GRID + 1, GRID + 1)) < SHOWN).astype(np.float32)
        cell = -(-size[0] // GRID), -(-size[1] // GRID)
        large = resize_map(cells, (GRID + 1) * cell[0], (GRID + 1) * cell[1])
        row, column = random.integers(cell[0]), random.integers(cell[1])
        return large[row : row + size[0], column : column + size[1]]

    def seen(numbers: np.ndarray) -> np.ndarray:
        return single.x * np.stack([mask(number) for number in numbers])[..., None]

    scores = single.chances(seen, count, single.asked.precision)
    total, squares = np.zeros(size), np.zeros(size)
    for number, score in enumerate(scores - scores.mean()):
        part = score * mask(number) / SHOWN
        total += part
        squares += part**2
    heat = total / count
    error = np.sqrt(np.maximum(squares / count - heat**2, 0) / count).mean()
    share = f"{error / np.abs(heat).max():.2f}" if heat.any() else "0"
    return heat.astype(np.float32), f"{count} masks; standard error {share} of the largest value"
