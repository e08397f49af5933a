"""Heatmaps from replaying the network while parts of a layer's map, or of the picture, are taken away.

Where the map is changed, one picture is passed and its map is repeated at the layer, each time with something else left
of it: what comes before the layer runs once for many replays. Memory is bounded by the chunk and not by the number of
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from convscope.imaging import resize_map
from convscope.networks import Layer, Network
from convscope.techniques.heatmaps.cam import replayed

CHUNK = 128  # replays of a map at a time
PICTURES = 16  # replays of a picture at a time
# Layers at which a map can't be repeated alone, since what comes before them is joined again after them.
WHOLE: WeakKeyDictionary[Network, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Replay:
    """One picture at one layer, and the score that is explained.

    Attributes:
        network, layer: where.
        x: the prepared picture `(1, h, w, c)`.
        maps: what the layer answers to it `(h, w, c)`.
        target: the class; rival: the class whose logit is subtracted, None for none.
    """

    network: Network
    layer: Layer
    x: np.ndarray
    maps: np.ndarray
    target: int
    rival: int | None = None

    def score(self, logits: np.ndarray) -> np.ndarray:
        """What is explained `(n,)` of logits `(n, classes)`."""
        mine = logits[:, self.target].astype(np.float64)
        return mine if self.rival is None else mine - logits[:, self.rival]

    def scores(self, factors: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
        """The score `(count,)` of each replay.

        Args:
            factors: from numbers of replays `(n,)` to what the map's channels are multiplied by `(n, c)`.
            count: how many.
        """
        return self._in_chunks(lambda numbers: self._logits(factors(numbers).astype(np.float32)), count, CHUNK)

    def of_pictures(self, pictures: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
        """The score `(count,)` of pictures `(n, h, w, c)`, which are made for some numbers `(n,)` at a time."""
        return self._in_chunks(lambda n: self.network.predict(pictures(n).astype(np.float32)), count, PICTURES)

    def _in_chunks(self, logits: Callable[[np.ndarray], np.ndarray], count: int, chunk: int) -> np.ndarray:
        found = []
        for start in range(0, count, chunk):
            numbers = np.minimum(np.arange(start, start + min(chunk, count)), count - 1)  # one shape
            found.append(self.score(logits(numbers)))
        return np.concatenate(found)[:count]

    def _logits(self, factors: np.ndarray) -> np.ndarray:
        network, path = self.network, self.layer.path
        program = network.program(("replay", path), lambda: network.compile(_replaying(path)))
        shaped = factors[:, None, None, :]
        whole = WHOLE.setdefault(network, set())
        if path not in whole:
            try:
                return network.numpy(program(network.tensor(self.x), network.tensor(shaped)))
            except Exception as error:
                if network.out_of_memory(error):
                    raise
                whole.add(path)  # every framework has words of its own for shapes that do not go together
        # What was computed before the layer is needed after it too, and has to be there as often: fewer at a time.
        parts = [shaped[start : start + PICTURES] for start in range(0, len(shaped), PICTURES)]
        passed = [program(*map(network.tensor, (np.repeat(self.x, len(part), axis=0), part))) for part in parts]
        return np.concatenate([network.numpy(logits) for logits in passed])


def _replaying(path: str) -> Callable:
    def replay(run: Callable, x: Any, factors: Any) -> Any:
        return run(x, rules={path: lambda activation: activation * factors}).logits

    return replay


@replayed("ablation-cam", "Desai and Ramaswamy 2020, Ablation-CAM, WACV 2020, eq. 3")
def ablation_cam(replay: Replay) -> np.ndarray:
    """Sum of the maps, each weighted with what the score loses without it, as a share of the score's size.

    Returns:
        `(h, w)`, raw and signed: w_k = (y - y_k) / |y|, so that a negative score turns no sign round.
    """
    channels = replay.maps.shape[-1]

    def without(numbers: np.ndarray) -> np.ndarray:
        return 1.0 - np.eye(channels)[numbers]

    whole = replay.scores(lambda numbers: np.ones((len(numbers), channels)), 1)[0]
    drops = whole - replay.scores(without, channels)
    return (replay.maps.astype(np.float64) @ (drops / max(abs(whole), 1e-12))).astype(np.float32)


@replayed("score-cam", "Wang et al. 2020, Score-CAM, arXiv:1910.01279, eq. 6 to 8")
def score_cam(replay: Replay) -> np.ndarray:
    """Sum of the maps, each weighted with what the score is of the picture seen through that map alone.

    Each map is brought to the picture's size and to 0..1, and the picture, as the network takes it, is multiplied by
    it. The weights are the softmax over channels of the scores; what an empty picture says, which the paper takes away
    from each, cancels in it. A map that is the same everywhere lets nothing through and weighs nothing.

    Returns:
        `(h, w)`, raw: no weight is negative.
    """
    low, high = replay.maps.min(axis=(0, 1)), replay.maps.max(axis=(0, 1))
    told = np.flatnonzero(high > low)
    if not len(told):
        return np.zeros(replay.maps.shape[:2], np.float32)
    size = replay.x.shape[1:3]

    def through(numbers: np.ndarray) -> np.ndarray:
        channels = told[numbers]
        masks = [(resize_map(replay.maps[..., k], *size) - low[k]) / (high[k] - low[k]) for k in channels]
        return replay.x * np.stack(masks)[..., None]

    scores = replay.of_pictures(through, len(told))
    weights = np.exp(scores - scores.max())
    return (replay.maps[..., told].astype(np.float64) @ (weights / weights.sum())).astype(np.float32)
