"""The results of passes through the network on some images: the evidence that heatmap methods use.

One pass forward and back gives a layer's maps and gradients, and fixes the explained class. Anything else that a
method asks for (gradients at the pixels, a Hessian-vector product, replays of changed maps or images) is computed when
it asks, for the same score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from convscope.ancestry import layers_in
from convscope.arrays import batched, padded
from convscope.cuts import may_be_of_gradient, reason_of
from convscope.networks import Layer, Network, Pass, Run
from convscope.networks.foreign import Tensor
from convscope.techniques.heatmaps.methods import Unfit, without_gradients
from convscope.techniques.heatmaps.targets import ClassScore, Target, chosen

MAPS_AT_ONCE = 128  # replays of a map
IMAGES_AT_ONCE = 16  # replays of an image
# Of `Network.limitations`:
WHOLE = "whole"  # with a layer: its map can't be repeated alone, since what comes before it is joined again after it
WITHOUT_GRADIENT = "without gradient"  # with a layer and a target: the framework can't compute the gradient
Found = TypeVar("Found")

Images = Callable[[np.ndarray], np.ndarray]  # from numbers `(n,)` to prepared images `(n, h, w, c)`


class TailNeedsMore(Exception):
    """A map can't be repeated alone: the layers after it join it with earlier values, which are those of one image."""


@dataclass(frozen=True)
class CallOptions:
    """Options of one call that are the same for all methods.

    Attributes:
        seed: random seed.
        precision: "float32" or "bfloat16", for passes that only score images.
    """

    seed: int = 0
    precision: str = "float32"


@dataclass(frozen=True, eq=False)
class TraceSpec:
    """A trace to make: the gradient of a target at a layer of a network.

    Attributes:
        network, layer, target: the parts of the trace. Without a layer no maps are recorded, and gradients are those of
            the pixels.
        batch: images in one pass; fewer are filled up to it, so that one compiled program serves every batch.
        call: options of the call.
    """

    network: Network
    layer: Layer | None
    target: Target
    batch: int = 1
    call: CallOptions = field(default_factory=CallOptions)

    @property
    def path(self) -> str | None:
        """The layer's path; None without a layer."""
        return None if self.layer is None else self.layer.path


class _OfSpec:
    """The network, layer and target of a `TraceSpec`."""

    spec: TraceSpec

    @property
    def network(self) -> Network:
        """The network."""
        return self.spec.network

    @property
    def layer(self) -> Layer | None:
        """The layer; None where no method uses one."""
        return self.spec.layer

    @property
    def target(self) -> Target:
        """The target."""
        return self.spec.target


@dataclass(frozen=True, eq=False)
class Evidence(_OfSpec):
    """The evidence about at most a batch of images, at one layer, for one target.

    Attributes:
        spec: network, layer and target.
        x: prepared images `(n, h, w, c)`.
        arguments: the target's arguments, resolved: a row for each image.
        scores: the explained score of each image `(n,)`.
        logits: `(n, classes)`; None where the network has no class scores.
        maps, gradients: the layer's, `(n, h, w, c)`; without a layer the images and the gradients at their pixels. The
            gradients are zero where the framework can't compute them.
    """

    spec: TraceSpec
    x: np.ndarray
    arguments: tuple[np.ndarray, ...]
    scores: np.ndarray
    logits: np.ndarray | None
    maps: np.ndarray
    gradients: np.ndarray

    @cached_property
    def input_gradients(self) -> np.ndarray:
        """The gradient of each image's score at its own pixels `(n, h, w, c)`."""
        if self.layer is None:  # the pass that was made first gave them already
            return self.gradients
        return input_gradients(self.spec, self.x, self.arguments)[0]

    def gradients_of(self, arguments: tuple[np.ndarray, ...]) -> np.ndarray:
        """The layer's gradients `(n, h, w, c)` of the same target with other resolved arguments."""
        return self._differentiated(lambda: _passed(self.spec, _explaining, self.x, arguments)[2])

    def hessian_vector_product(self) -> np.ndarray:
        """The product of the score's Hessian at the layer with the layer's own maps `(n, h, w, c)`."""
        make = _differentiating_twice
        return self._differentiated(lambda: _passed(self.spec, make, self.x, self.arguments, self.maps)[0])

    def _differentiated(self, body: Callable[[], np.ndarray]) -> np.ndarray:
        return differentiated(self.network, body, lambda: _passed(self.spec, _only_scoring, self.x, self.arguments))

    def again(self, x: np.ndarray) -> Evidence:
        """The evidence about other images `x` `(n, h, w, c)` for the same target with the same arguments."""
        return trace(self.spec, x, self.arguments, resolved=True)

    def views(self) -> Iterator[ImageView]:
        """The images one by one."""
        for index in range(len(self.x)):
            arguments = tuple(argument[index] for argument in self.arguments)
            yield ImageView(self.spec, self.x[index][None], self.maps[index], arguments, float(self.scores[index]))


def trace(spec: TraceSpec, x: np.ndarray, arguments: tuple[np.ndarray, ...], *, resolved: bool = False) -> Evidence:
    """The evidence about at most a batch of images, from one pass.

    Args:
        spec: the target and the layer.
        x: prepared images `(n, h, w, c)`.
        arguments: the target's arguments, a row for each image.
        resolved: the arguments are resolved already.
    """
    scores, maps, gradients, logits, *settled = _with_gradient_if_any(spec, x, arguments, resolved)
    return Evidence(
        spec,
        x,
        arguments if resolved else tuple(settled),
        scores,
        logits if spec.network.head.has_scores else None,
        maps,
        gradients,
    )


def _with_gradient_if_any(
    spec: TraceSpec, x: np.ndarray, arguments: tuple[np.ndarray, ...], resolved: bool
) -> list[np.ndarray]:
    """The values of `_explaining`; with a gradient of zero where the framework can't compute it.

    An operation without a gradient must not keep methods from work that need none.
    """
    make, instead = (_explaining, _only_scoring) if resolved else (_settling, _only_settling)
    key, known = (WITHOUT_GRADIENT, spec.path, spec.target), spec.network.limitations
    if key in known:
        return _passed(spec, instead, x, arguments)
    for _ in range(2):  # a failure that does not repeat tells nothing of the network
        try:
            return _passed(spec, make, x, arguments)
        except Exception as error:
            if not may_be_of_gradient(spec.network, error):
                raise
            found = _or_raise(error, lambda: _passed(spec, instead, x, arguments))
    known.add(key)
    return found


def differentiated(network: Network, body: Callable[[], Found], plainly: Callable[[], object]) -> Found:
    """The result of `body`, which needs a gradient.

    Args:
        network: the network.
        body: passes with a gradient.
        plainly: the same without: where it works it is the gradient that fails.

    Raises:
        Unfit: the framework can't compute the gradient.
    """
    try:
        return body()
    except Exception as error:
        if not may_be_of_gradient(network, error):
            raise
        _or_raise(error, plainly)
        raise Unfit(
            f"{network.name} runs, and its gradient can't be computed ({reason_of(error)}). "
            f"Use a method that needs no gradient: {without_gradients()}.",
            code="gradient-failed",
            name=network.name,
            reason=reason_of(error),
        ) from error


def _or_raise(error: Exception, body: Callable[[], Found]) -> Found:
    """The result of `body`; where it fails too, `error` is what matters."""
    try:
        return body()
    except Exception:
        raise error from error.__cause__


def _passed(
    spec: TraceSpec,
    make: Callable[[TraceSpec], Callable],
    x: np.ndarray,
    arguments: Sequence[np.ndarray],
    *more: np.ndarray,
) -> list[np.ndarray]:
    """Run the program that `make` makes, on images filled up to the batch; returns a row for each image."""
    network, count = spec.network, len(x)
    program = network.program(_of_spec, make, spec.layer, spec.target)
    at = x.shape[1:] if spec.layer is None else spec.layer.shape
    given = [x, np.zeros((count, *at), np.float32), *more, *arguments]
    filled = [network.tensor(padded(array, spec.batch)) for array in given]
    return [network.numpy(tensor)[:count] for tensor in program(*filled)]


def _of_spec(network: Network, make: Callable[..., Callable], layer: Layer | None, target: Target) -> Callable:
    """The program that `make` makes of a spec; it depends on nothing else."""
    return make(TraceSpec(network, layer, target))


def _scored(spec: TraceSpec, run: Run, x: Tensor, delta: Tensor) -> tuple:
    """Logits, and activations by path, of images whose layer (the pixels where None) is changed by `delta`."""
    path, target = spec.path, spec.target
    rules = {} if path is None else {path: lambda activation: activation + delta}
    record = tuple(dict.fromkeys((*target.record, *(() if path is None else (path,)))))
    request = Pass(record=record, replace=tuple(rules), stop=not _whole(spec.network, target))
    seen = run(x + delta if path is None else x, request, rules)
    return seen.logits, seen.activations


def _whole(network: Network, target: Target) -> bool:
    """True if the pass has to reach the output: for the score, or for the predictions."""
    return target.scores or network.head.has_scores


def _settling(spec: TraceSpec) -> Callable:
    """As `_explaining`, with arguments that are resolved in the same pass."""
    return _explaining(spec, settle=True)


def _only_settling(spec: TraceSpec) -> Callable:
    """As `_settling`, with a gradient of zero that is not computed."""
    return _explaining(spec, settle=True, differentiate=False)


def _only_scoring(spec: TraceSpec) -> Callable:
    """As `_explaining`, with a gradient of zero that is not computed."""
    return _explaining(spec, differentiate=False)


def _explaining(spec: TraceSpec, settle: bool = False, differentiate: bool = True) -> Callable:
    network, target, ops = spec.network, spec.target, spec.network.ops

    def explain(run: Run, x: Tensor, delta: Tensor, *arguments: object) -> list:
        def score(delta: Tensor) -> tuple:
            logits, activations = _scored(spec, run, x, delta)
            settled = target.resolve(ops, logits, activations, arguments) if settle else arguments
            values = target.score(ops, logits, activations, settled)
            maps = x if spec.path is None else activations[spec.path]
            return ops.sum(values), (values, maps, values if logits is None else logits, *settled)

        if differentiate:
            (_, (values, maps, logits, *settled)), gradient = network.value_and_grad(score)(delta)
        else:
            (_, (values, maps, logits, *settled)), gradient = score(delta), ops.zeros_like(delta)
        return [values, maps, gradient, logits, *settled]

    return explain


def _differentiating_twice(spec: TraceSpec) -> Callable:
    network, target, ops = spec.network, spec.target, spec.network.ops

    def product(run: Run, x: Tensor, delta: Tensor, direction: Tensor, *arguments: object) -> list:
        def score(delta: Tensor) -> tuple:
            logits, activations = _scored(spec, run, x, delta)
            values = target.score(ops, logits, activations, arguments)
            return ops.sum(values), values

        def along(delta: Tensor) -> tuple:
            (_, values), gradient = network.value_and_grad(score)(delta)
            return ops.sum(gradient * direction), values

        return [network.value_and_grad(along)(delta)[1]]

    return product


def input_gradients(
    spec: TraceSpec, x: np.ndarray, arguments: tuple[np.ndarray, ...], guided: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of each image's score at its own pixels `(n, h, w, c)`, and the scores `(n,)`.

    Args:
        spec: the target and the number of images in one pass; the layer is not used.
        x: prepared images `(n, h, w, c)`.
        arguments: resolved, a row for each.
        guided: only positive gradients pass back through each ReLU (guided backpropagation).

    Raises:
        Unfit: guided, and there is no ReLU.
    """
    network, target, batch = spec.network, spec.target, spec.batch
    found: list[list[np.ndarray]] = []
    gates = _gates(network, target) if guided else ()
    if guided and not gates:
        raise Unfit(
            f"guided backpropagation changes how gradients pass a ReLU, and {network.name} has none; use saliency.",
            code="no-relu",
            name=network.name,
        )
    program = network.program(_at_pixels, target, gates)
    plain = network.program(_scoring, target, "float32")
    for some in batched(batch, x.astype(np.float32), *arguments):
        given = [network.tensor(array) for array in some.arrays]
        made = differentiated(network, partial(program, *given), partial(plain, *given))
        found.append([network.numpy(tensor)[: some.count] for tensor in made])
    gradients, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return gradients, scores


def _gates(network: Network, target: Target) -> tuple[str, ...]:
    """Paths of the layers before a target that end in a ReLU, under any framework's name: "relu", "ReLU6", "Clip"."""
    ends = ((layer.path, (layer.activation or "").lower()) for layer in layers_in(network, target))
    return tuple(path for path, name in ends if name.startswith(("relu", "clip")))


def _at_pixels(network: Network, target: Target, gates: Sequence[str]) -> Callable:
    ops = network.ops

    def gradients(run: Run, x: Tensor, *arguments: object) -> list:
        def score(x: Tensor) -> tuple:
            rules = dict.fromkeys(gates, network.positive_gradient)
            request = Pass(record=tuple(target.record), replace=tuple(gates), stop=not target.scores)
            seen = run(x, request, rules)
            values = target.score(ops, seen.logits, seen.activations, arguments)
            return ops.sum(values), values

        (_, values), gradient = network.value_and_grad(score)(x)
        return [gradient, values]

    return gradients


# -- one image, many times -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageView(_OfSpec):
    """One image at one layer, and the score that is explained: for many passes on one image.

    Attributes:
        spec: network, layer and target.
        x: the prepared image `(1, h, w, c)`.
        maps: the layer's activation `(h, w, c)`.
        arguments: the target's arguments, resolved, without an axis for images.
        score: the score of the unchanged image.
    """

    spec: TraceSpec
    x: np.ndarray
    maps: np.ndarray
    arguments: tuple[np.ndarray, ...]
    score: float

    @property
    def seed(self) -> int:
        """The random seed."""
        return self.spec.call.seed

    @property
    def has_probability(self) -> bool:
        """True if the target has a probability: a class, or one against the other of two under one softmax."""
        if not isinstance(self.target, ClassScore) or self.network.head.linear:
            return False
        return bool(self.arguments[0].min() < 0) == self.network.head.paired

    def scores_of_maps(self, factors: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
        """The score `(count,)` of each replay of the layer's map.

        Args:
            factors: from numbers of replays `(n,)` to the factors of the map's channels `(n, c)`.
            count: number of replays.
        """
        found = [self._replayed(factors(numbers).astype(np.float32)) for numbers in _chunks(count, MAPS_AT_ONCE)]
        return np.concatenate(found)[:count].astype(np.float64)

    def scores_of_images(self, images: Images, count: int, precision: str = "float32") -> np.ndarray:
        """The score `(count,)` of images `(n, h, w, c)`, which are made for some numbers `(n,)` at a time."""
        return np.concatenate([scores for scores, _ in self._scored(images, count, precision)])[:count]

    def probabilities(self, images: Images, count: int, precision: str = "float32") -> np.ndarray:
        """The probability `(count,)` of the class, or the score where the target has none."""
        if not self.has_probability:
            return self.scores_of_images(images, count, precision)
        found = [logits for _, logits in self._scored(images, count, precision)]
        probabilities = self.network.head.probabilities(np.concatenate(found)[:count])
        assert probabilities is not None, "a head that is not linear has probabilities"
        return probabilities[:, chosen(self.arguments[0])[0]].astype(np.float64)

    def input_gradients(
        self, images: Images, count: int, guided: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Gradients at the pixels `(n, h, w, c)` and scores `(n,)` of images, some at a time."""
        spec = replace(self.spec, batch=min(IMAGES_AT_ONCE, count))
        for start in range(0, count, IMAGES_AT_ONCE):
            numbers = np.arange(start, min(start + IMAGES_AT_ONCE, count))
            rows = tuple(np.repeat(argument[None], len(numbers), axis=0) for argument in self.arguments)
            yield input_gradients(spec, images(numbers), rows, guided)

    def _scored(self, images: Images, count: int, precision: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The scores `(n,)` of some images at a time, and their logits `(n, classes)` where the target reads them."""
        network = self.network
        program = network.program(_scoring, self.target, precision)
        for numbers in _chunks(count, IMAGES_AT_ONCE):
            x = network.tensor(images(numbers).astype(np.float32))
            scores, logits = map(network.numpy, program(x, *self._rows(len(numbers))))
            yield scores.astype(np.float64), logits

    def _rows(self, count: int) -> list[object]:
        return [self.network.tensor(np.repeat(argument[None], count, axis=0)) for argument in self.arguments]

    def _replayed(self, factors: np.ndarray) -> np.ndarray:
        network, path = self.network, self.spec.path or ""
        program = network.program(_of_spec, _replaying, self.spec.layer, self.target)
        shaped = factors[:, None, None, :]
        if (WHOLE, path) not in network.limitations:
            try:
                return network.numpy(program(*map(network.tensor, (self.x, shaped)), *self._rows(len(shaped))))
            except Exception as error:
                # TensorFlow may find a shape only while it computes. An error of the target is raised again below.
                if not isinstance(error, TailNeedsMore) and type(error).__name__ != "InvalidArgumentError":
                    raise
        # Values from before the layer are needed after it too, as many times: so fewer replays in one pass.
        found = []
        for start in range(0, len(shaped), IMAGES_AT_ONCE):
            part = shaped[start : start + IMAGES_AT_ONCE]
            given = map(network.tensor, (np.repeat(self.x, len(part), axis=0), part))
            found.append(network.numpy(program(*given, *self._rows(len(part)))))
        network.limitations.add((WHOLE, path))
        return np.concatenate(found)


def _chunks(count: int, chunk: int) -> Iterator[np.ndarray]:
    """Numbers up to `count`, in chunks of one shape."""
    for some in batched(min(chunk, count), np.arange(count)):
        yield some.arrays[0]


def _replaying(spec: TraceSpec) -> Callable:
    network, target, path = spec.network, spec.target, spec.path or ""

    def replay(run: Run, x: Tensor, factors: Tensor, *arguments: object) -> Tensor:
        request = Pass(record=tuple(target.record), replace=(path,), stop=not target.scores)
        try:
            seen = run(x, request, {path: lambda activation: activation * factors})
        except Exception as error:
            if not network.shapes_clash(error):
                raise
            raise TailNeedsMore from error
        answers = [seen.activations[path] for path in target.record] + ([seen.logits] if target.scores else [])
        if any(answer.shape[0] != factors.shape[0] for answer in answers):
            raise TailNeedsMore  # the network remembers how many images it was given
        return target.score(network.ops, seen.logits, seen.activations, arguments)

    return replay


def _scoring(network: Network, target: Target, precision: str) -> Callable:
    def score(run: Run, x: Tensor, *arguments: object) -> tuple:
        seen = run(x, Pass(record=tuple(target.record), stop=not target.scores, precision=precision))
        values = target.score(network.ops, seen.logits, seen.activations, arguments)
        # A map as long as the image would have to be kept for each of many replays.
        return values, values if network.head.spatial or seen.logits is None else seen.logits

    return score


def explains_a_class(evidence: Evidence) -> bool:
    """True if the target is a sum of class scores."""
    return isinstance(evidence.target, ClassScore)
