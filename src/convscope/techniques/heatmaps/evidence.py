"""What passes through the network tell about some pictures: the evidence that heatmap methods are made from.

One pass forward and back gives a layer's maps and gradients, and settles which class is explained. Whatever else a
method asks for (gradients at the pixels, a Hessian's product, replays of changed maps or pictures) is computed when it
asks, for the score that was settled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from convscope.networks import Layer, Network
from convscope.techniques.heatmaps.methods import Unfit
from convscope.techniques.heatmaps.targets import ClassScore, Target, chosen

CHUNK = 128  # replays of a map at a time
PICTURES = 16  # replays of a picture at a time
# Layers at which a map can't be repeated alone, since what comes before them is joined again after them.
WHOLE: WeakKeyDictionary[Network, set[str]] = WeakKeyDictionary()


class TailNeedsMore(Exception):
    """A map can't be repeated alone: the layers after it join it with earlier values, which are those of one image."""


@dataclass(frozen=True)
class Asked:
    """What methods are told beside the evidence.

    Attributes:
        budget: passes that a sampling method may spend on a picture; None for its own number.
        seed: of what is drawn.
        precision: "float32" or "bfloat16", of passes that only score pictures.
    """

    budget: int | None = None
    seed: int = 0
    precision: str = "float32"


@dataclass(frozen=True, eq=False)
class Evidence:
    """About at most a batch of pictures, at one layer, for one target.

    Attributes:
        network, layer, target: of what; the layer is None where no method looks at one.
        x: prepared pictures `(n, h, w, c)`.
        arguments: of the target, resolved: a row for each picture.
        scores: what is explained `(n,)`.
        logits: `(n, classes)`; None where the network has no class scores.
        maps, gradients: of the layer `(n, h, w, c)`.
        batch: pictures that are passed together.
        asked: what methods are told.
    """

    network: Network
    layer: Layer | None
    target: Target
    x: np.ndarray
    arguments: tuple[np.ndarray, ...]
    scores: np.ndarray
    logits: np.ndarray | None
    maps: np.ndarray
    gradients: np.ndarray
    batch: int
    asked: Asked = field(default_factory=Asked)

    @cached_property
    def slopes(self) -> np.ndarray:
        """The gradient of each picture's score at its own pixels `(n, h, w, c)`."""
        if self.layer is None:  # the pass that was made first gave them already
            return self.gradients
        return slopes(self.network, self.target, self.x, self.arguments, self.batch)[0]

    def gradients_of(self, arguments: tuple[np.ndarray, ...]) -> np.ndarray:
        """The layer's gradients `(n, h, w, c)` of the same target with other resolved arguments."""
        return _passed(self, _explaining, arguments)[2]

    def curvature(self) -> np.ndarray:
        """The product of the score's Hessian at the layer with the layer's own maps `(n, h, w, c)`."""
        return _passed(self, _curving, self.arguments, self.maps)[0]

    def again(self, x: np.ndarray) -> Evidence:
        """The evidence about other pictures `x` `(n, h, w, c)`, for what is explained of these: its arguments stay."""
        return look(
            *(self.network, self.layer, self.target, x, self.arguments, self.batch), resolved=True, asked=self.asked
        )

    def singles(self) -> Iterator[Single]:
        """The pictures one by one."""
        for index in range(len(self.x)):
            yield Single(
                self.network,
                self.layer,
                self.target,
                self.x[index][None],
                self.maps[index],
                tuple(argument[index] for argument in self.arguments),
                float(self.scores[index]),
                self.asked,
            )


def look(
    network: Network,
    layer: Layer | None,
    target: Target,
    x: np.ndarray,
    arguments: tuple[np.ndarray, ...],
    batch: int,
    *,
    resolved: bool = False,
    asked: Asked | None = None,
) -> Evidence:
    """The evidence about at most `batch` pictures, from one pass.

    Args:
        network, layer, target: of what. Without a layer no maps are recorded, and gradients are those of the pixels.
        x: prepared pictures `(n, h, w, c)`.
        arguments: of the target, a row for each.
        batch: the pictures are filled up to this number, so that one compiled program serves every chunk.
        resolved: the arguments are resolved already.
        asked: what methods are told.
    """
    blank = Evidence(
        network, layer, target, x, arguments, np.zeros(0), None, x, x, batch, Asked() if asked is None else asked
    )
    make = _explaining if resolved else _settling
    scores, maps, gradients, logits, *settled = _passed(blank, make, arguments)
    return replace(
        blank,
        scores=scores,
        maps=maps,
        gradients=gradients,
        logits=logits if network.head.kind != "maps" else None,
        arguments=tuple(settled) if not resolved else arguments,
    )


def _passed(
    evidence: Evidence, make: Callable[..., Callable], arguments: Sequence[np.ndarray], *more: np.ndarray
) -> list[np.ndarray]:
    """Run the program that `make` makes, on pictures filled up to the batch; a row for each picture comes back."""
    network, layer, count = evidence.network, evidence.layer, len(evidence.x)
    path = None if layer is None else layer.path
    program = network.program(
        ("passed", make, path, evidence.target), lambda: network.compile(make(network, layer, evidence.target))
    )
    at = evidence.x.shape[1:] if layer is None else layer.shape
    given = [evidence.x, np.zeros((count, *at), np.float32), *more, *arguments]
    filled = [network.tensor(np.resize(array, (evidence.batch, *array.shape[1:]))) for array in given]
    return [network.numpy(tensor)[:count] for tensor in program(*filled)]


def _scored(network: Network, layer: Layer | None, target: Target, run: Callable, x: Any, delta: Any) -> tuple:
    """Logits, and activations by path, of pictures whose layer (the pixels where None) is changed by `delta`."""
    path = None if layer is None else layer.path
    rules = {} if path is None else {path: lambda activation: activation + delta}
    record = tuple(dict.fromkeys((*target.record, *(() if path is None else (path,)))))
    seen = run(x + delta if path is None else x, record=record, rules=rules, outputs=_whole(network, target))
    return seen.logits, seen.activations


def _whole(network: Network, target: Target) -> bool:
    """True if the pass has to reach the output: for the score, or to say what the network predicts."""
    return target.scores or network.head.kind != "maps"


def _settling(network: Network, layer: Layer | None, target: Target) -> Callable:
    """As `_explaining`, with arguments that are resolved in the same pass."""
    return _explaining(network, layer, target, settle=True)


def _explaining(network: Network, layer: Layer | None, target: Target, settle: bool = False) -> Callable:
    ops = network.ops

    def explain(run: Callable, x: Any, delta: Any, *arguments: Any) -> list:
        def score(delta: Any) -> tuple:
            logits, activations = _scored(network, layer, target, run, x, delta)
            settled = target.resolve(ops, logits, activations, arguments) if settle else arguments
            values = target.score(ops, logits, activations, settled)
            maps = x if layer is None else activations[layer.path]
            return ops.sum(values), (values, maps, values if logits is None else logits, *settled)

        (_, (values, maps, logits, *settled)), gradient = network.value_and_grad(score)(delta)
        return [values, maps, gradient, logits, *settled]

    return explain


def _curving(network: Network, layer: Layer | None, target: Target) -> Callable:
    ops = network.ops

    def curve(run: Callable, x: Any, delta: Any, direction: Any, *arguments: Any) -> list:
        def score(delta: Any) -> tuple:
            logits, activations = _scored(network, layer, target, run, x, delta)
            values = target.score(ops, logits, activations, arguments)
            return ops.sum(values), values

        def along(delta: Any) -> tuple:
            (_, values), gradient = network.value_and_grad(score)(delta)
            return ops.sum(gradient * direction), values

        return [network.value_and_grad(along)(delta)[1]]

    return curve


def slopes(
    network: Network,
    target: Target,
    x: np.ndarray,
    arguments: tuple[np.ndarray, ...],
    batch: int,
    guided: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of each picture's score at its own pixels `(n, h, w, c)`, and the scores `(n,)`.

    Args:
        network, target: whose score; x: prepared pictures `(n, h, w, c)`; arguments: resolved, a row for each.
        batch: pictures at a time.
        guided: through each ReLU only what is positive comes back (guided backpropagation).

    Raises:
        Unfit: guided, and there is no ReLU.
    """
    found: list[list[np.ndarray]] = []
    gates = _gates(network) if guided else ()
    if guided and not gates:
        raise Unfit(
            f"guided backpropagation changes how gradients pass a ReLU, and {network.name} has none; use saliency."
        )
    program = network.program(("slopes", gates, target), lambda: network.compile(_sloping(network, target, gates)))
    for start in range(0, len(x), batch):
        some = np.minimum(np.arange(start, start + batch), len(x) - 1)  # one shape
        given = [x[some].astype(np.float32), *(argument[some] for argument in arguments)]
        parts = [network.numpy(tensor) for tensor in program(*map(network.tensor, given))]
        found.append([part[: min(batch, len(x) - start)] for part in parts])
    gradients, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return gradients, scores


def _gates(network: Network) -> tuple[str, ...]:
    """Paths of the layers that end in a ReLU, under any framework's name: "relu", "ReLU6", "Clip"."""
    ends = ((layer.path, (layer.activation or "").lower()) for layer in network.layers if layer.on_path)
    return tuple(path for path, name in ends if name.startswith(("relu", "clip")))


def _sloping(network: Network, target: Target, gates: Sequence[str]) -> Callable:
    ops = network.ops

    def slope(run: Callable, x: Any, *arguments: Any) -> list:
        def score(x: Any) -> tuple:
            rules = dict.fromkeys(gates, network.positive_gradient)
            seen = run(x, record=target.record, rules=rules, outputs=target.scores)
            values = target.score(ops, seen.logits, seen.activations, arguments)
            return ops.sum(values), values

        (_, values), gradient = network.value_and_grad(score)(x)
        return [gradient, values]

    return slope


# -- one picture, many times -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Single:
    """One picture at one layer, and the score that is explained: for what is asked many times of one picture.

    Attributes:
        network, layer, target: of what.
        x: the prepared picture `(1, h, w, c)`.
        maps: what the layer answers to it `(h, w, c)`.
        arguments: of the target, resolved, without an axis for pictures.
        whole: the score of the picture as it is.
        asked: what methods are told.
    """

    network: Network
    layer: Layer | None
    target: Target
    x: np.ndarray
    maps: np.ndarray
    arguments: tuple[np.ndarray, ...]
    whole: float
    asked: Asked = field(default_factory=Asked)

    def scores(self, factors: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
        """The score `(count,)` of each replay of the layer's map.

        Args:
            factors: from numbers of replays `(n,)` to what the map's channels are multiplied by `(n, c)`.
            count: how many.
        """
        return self._in_chunks(lambda numbers: self._replayed(factors(numbers).astype(np.float32)), count, CHUNK)

    def of_pictures(
        self, pictures: Callable[[np.ndarray], np.ndarray], count: int, precision: str = "float32"
    ) -> np.ndarray:
        """The score `(count,)` of pictures `(n, h, w, c)`, which are made for some numbers `(n,)` at a time."""
        return np.concatenate([scores for scores, _ in self._scored(pictures, count, precision)])[:count]

    def _scored(
        self, pictures: Callable[[np.ndarray], np.ndarray], count: int, precision: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The scores `(n,)` of some pictures at a time, and their logits `(n, classes)` where the target reads them."""
        program = self.network.program(("score", self.target, precision), lambda: self._compiled(_scoring, precision))
        for numbers in _chunks(count, PICTURES):
            x = self.network.tensor(pictures(numbers).astype(np.float32))
            scores, logits = map(self.network.numpy, program(x, *self._rows(len(numbers))))
            yield scores.astype(np.float64), logits

    @property
    def has_chances(self) -> bool:
        """True if what is explained has a probability: a class, or one against the only other one."""
        if not isinstance(self.target, ClassScore) or self.network.head.kind == "linear":
            return False
        return bool(self.arguments[0].min() >= 0) or self.network.head.paired

    def chances(
        self, pictures: Callable[[np.ndarray], np.ndarray], count: int, precision: str = "float32"
    ) -> np.ndarray:
        """The probability `(count,)` of the class, or the score where what is explained has none."""
        if not self.has_chances:
            return self.of_pictures(pictures, count, precision)
        found = [logits for _, logits in self._scored(pictures, count, precision)]
        probabilities = self.network.head.probabilities(np.concatenate(found)[:count])
        assert probabilities is not None, "a head that is not linear has probabilities"
        return probabilities[:, chosen(self.arguments[0])[0]].astype(np.float64)

    def slopes(
        self, pictures: Callable[[np.ndarray], np.ndarray], count: int, guided: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gradients at the pixels `(n, h, w, c)` and scores `(n,)` of pictures, some at a time."""
        for start in range(0, count, PICTURES):
            numbers = np.arange(start, min(start + PICTURES, count))
            rows = tuple(np.repeat(argument[None], len(numbers), axis=0) for argument in self.arguments)
            yield slopes(self.network, self.target, pictures(numbers), rows, min(PICTURES, count), guided)

    def _in_chunks(self, scores: Callable[[np.ndarray], np.ndarray], count: int, chunk: int) -> np.ndarray:
        found = [scores(numbers) for numbers in _chunks(count, chunk)]
        return np.concatenate(found)[:count].astype(np.float64)

    def _compiled(self, make: Callable[..., Callable], *more: Any) -> Callable:
        return self.network.compile(make(self.network, self.layer, self.target, *more))

    def _rows(self, count: int) -> list[Any]:
        return [self.network.tensor(np.repeat(argument[None], count, axis=0)) for argument in self.arguments]

    def _replayed(self, factors: np.ndarray) -> np.ndarray:
        network, path = self.network, self.layer.path if self.layer else ""
        program = network.program(("replay", path, self.target), lambda: self._compiled(_replaying))
        shaped = factors[:, None, None, :]
        whole = WHOLE.setdefault(network, set())
        if path not in whole:
            try:
                return network.numpy(program(*map(network.tensor, (self.x, shaped)), *self._rows(len(shaped))))
            except Exception as error:
                # TensorFlow may learn of a shape only while it computes. What is the target's fault comes again below.
                if not isinstance(error, TailNeedsMore) and type(error).__name__ != "InvalidArgumentError":
                    raise
        # What was computed before the layer is needed after it too, and has to be there as often: fewer at a time.
        found = []
        for start in range(0, len(shaped), PICTURES):
            part = shaped[start : start + PICTURES]
            given = map(network.tensor, (np.repeat(self.x, len(part), axis=0), part))
            found.append(network.numpy(program(*given, *self._rows(len(part)))))
        whole.add(path)
        return np.concatenate(found)


def _chunks(count: int, chunk: int) -> Iterator[np.ndarray]:
    """Numbers up to `count`, in chunks of one shape: the last one is repeated where there are too few."""
    for start in range(0, count, chunk):
        yield np.minimum(np.arange(start, start + min(chunk, count)), count - 1)


def _replaying(network: Network, layer: Layer, target: Target) -> Callable:
    def replay(run: Callable, x: Any, factors: Any, *arguments: Any) -> Any:
        rules = {layer.path: lambda activation: activation * factors}
        try:
            seen = run(x, record=target.record, rules=rules, outputs=target.scores)
        except Exception as error:
            if not network.shapes_clash(error):
                raise
            raise TailNeedsMore from error
        answers = [seen.activations[path] for path in target.record] + ([seen.logits] if target.scores else [])
        if any(answer.shape[0] != factors.shape[0] for answer in answers):
            raise TailNeedsMore  # the network remembers how many pictures it was given
        return target.score(network.ops, seen.logits, seen.activations, arguments)

    return replay


def _scoring(network: Network, layer: Layer | None, target: Target, precision: str) -> Callable:
    def score(run: Callable, x: Any, *arguments: Any) -> tuple:
        seen = run(x, record=target.record, outputs=target.scores, precision=precision)
        values = target.score(network.ops, seen.logits, seen.activations, arguments)
        # A map as long as the picture would have to be kept for each of many replays.
        return values, values if network.head.kind == "maps" or seen.logits is None else seen.logits

    return score


def explains_a_class(evidence: Evidence) -> bool:
    """True if what is explained is a sum of class scores."""
    return isinstance(evidence.target, ClassScore)
