"""Where a network's graph is cut, so that no gradient comes back: measured, by changing the outputs of layers.

A gradient of zero does not tell why it is zero. A layer can have no effect on the score; the score can be flat around
one image (every ReLU behind is off); or the graph is cut by `torch.no_grad`, `detach`, `stop_gradient`, rounding or an
operation without a gradient. So the layer's output is changed, a little and a lot: where the score changes and its
gradient is zero at each of these outputs, the graph is cut. Every framework answers that, whatever it was that cut it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from convscope.ancestry import layers_after
from convscope.errors import ConvscopeError, one_line
from convscope.measures import Activations, Arguments, Target, Tensor
from convscope.networks import Network, Pass, Run
from convscope.networks.failing import attempted
from convscope.networks.ops import Operations

CHANGES = (0.1, 1.0, 1.0, 10.0)  # sizes of changes, in units of the largest value of the layer's output
LEAST = 1e-5  # a change of the score, as a share of it, that is none of rounding


@dataclass(frozen=True)
class Effect:
    """The measured effect of a layer's output on a score.

    Attributes:
        changes: some change of the output changes the score.
        gradient: the score has a gradient at some of the outputs that were tried.
        error: the framework's reason why it can't compute the gradient, or why the output could not be changed; or "".
        tried: False where the network can't be run with a changed output there, so that nothing is known.
        flat: the gradient at the unchanged output is zero.
    """

    changes: bool
    gradient: bool
    error: str = ""
    tried: bool = True
    flat: bool = False

    @property
    def is_cut(self) -> bool:
        """True if the score changes and its gradient is zero."""
        return self.changes and not self.gradient


@dataclass(frozen=True)
class Cut:
    """The place at which a graph is cut.

    Attributes:
        before: path of the last layer that changes the score and has no gradient; None for the image itself.
        after: path of the first layer with a gradient; None where no layer that is seen has one.
        error: the framework's reason why it can't compute the gradient, or "".

    Example:
        >>> Cut("backbone.3", "mean").text
        "the gradient stops between 'backbone.3' and 'mean'"
    """

    before: str | None
    after: str | None
    error: str = ""

    @property
    def text(self) -> str:
        """The place in words."""
        before = "the image" if self.before is None else repr(self.before)
        if self.after is None:
            place = f"no gradient reaches {before}, and no layer that is seen comes after it"
        else:
            place = f"the gradient stops between {before} and {self.after!r}"
        return place + (f" ({self.error})" if self.error else "")


@dataclass(frozen=True)
class Strength:
    """The target of filters: the sum of the squares of all that they read, so that no channel is left out.

    Attributes:
        record: paths of layers; scores: the class scores are read too.
    """

    record: tuple[str, ...]
    scores: bool
    text: str = "the sum of squares"

    def resolve(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Arguments:
        """See `Target.resolve`."""
        return arguments

    def score(self, ops: Operations, logits: Tensor, activations: Activations, arguments: Arguments) -> Tensor:
        """See `Target.score`."""
        read = [activations[path] for path in self.record] + ([logits] if self.scores else [])
        sums = [ops.sum(ops.square(one), axis=tuple(range(1, len(one.shape)))) for one in read]
        return sum(sums[1:], sums[0])


@dataclass(frozen=True, eq=False)
class Score:
    """The score of one image, whose dependence on layers is measured.

    Attributes:
        network: the network.
        target: what is explained.
        x: the prepared image `(1, h, w, c)`.
        arguments: the target's, resolved, with a row for the image.
    """

    network: Network
    target: Target
    x: np.ndarray
    arguments: tuple[np.ndarray, ...] = ()

    def effect(self, path: str | None) -> Effect:
        """The effect of the output at `path`, or of the image where None.

        It is measured once; a failure may not repeat, so it is not kept.
        """
        with self.network.unchanging():  # its weights are hashed once
            known, key = self.network.measured_values, (*self._key(path), _bytes_of(self.x))
            found = known.get(key)
            if not isinstance(found, Effect):
                found = self._measured(path)
                if found.tried:
                    known[key] = found
            return found

    def _measured(self, path: str | None) -> Effect:
        try:
            scores, gradients = self._tried(path, True)
        except Exception as error:
            found = None
            if may_be_of_gradient(self.network, error):
                found = attempted(self.network, lambda: self._tried(path, False))
            if found is None:
                return Effect(False, False, reason_of(error), tried=False)
            return Effect(_differ(found[0]), False, reason_of(error))
        return Effect(_differ(scores), bool(np.any(gradients != 0)), flat=bool(gradients[0] == 0))

    def _key(self, path: str | None) -> tuple[object, ...]:
        """The measurement at `path` for any image of the same size: the arguments hold the class."""
        return path, self.target, self.x.shape, *map(_bytes_of, self.arguments)

    def cut(self, path: str | None) -> Cut:
        """The place of the cut behind `path`, whose effect `is_cut`, by bisection of the layers after it."""
        with self.network.unchanging():
            known, key = self.network.measured_values, ("cut", *self._key(path))
            found = known.get(key)
            if not isinstance(found, Cut):
                found = known[key] = self._bisected(path)
            return found

    def _bisected(self, path: str | None) -> Cut:
        before, after, error = path, None, ""
        left = [layer.path for layer in layers_after(self.network, path, self.target) if not layer.container]
        while left:
            middle = len(left) // 2
            effect = self.effect(left[middle])
            if effect.is_cut:
                before, error, left = left[middle], effect.error, left[middle + 1 :]
            elif effect.gradient:
                after, left = left[middle], left[:middle]
            else:  # a layer without an effect, or that can't be changed, tells nothing
                left.pop(middle)
        return Cut(before, after, error or self.effect(before).error)

    def _tried(self, path: str | None, differentiate: bool) -> tuple[np.ndarray, np.ndarray]:
        """The scores, and the largest size of their gradient, for the output as it is and for each change of it."""
        network = self.network
        layers = {layer.path: layer.shape for layer in network.layers_at((self.x.shape[1], self.x.shape[2]))}
        shape = (1, *(self.x.shape[1:] if path is None else layers[path]))
        program = network.program(_changing, path, self.target, differentiate)
        given = [network.tensor(argument) for argument in self.arguments]
        random = np.random.default_rng(0)
        found = []
        for size in (0.0, *CHANGES):
            delta = (size * random.standard_normal(shape)).astype(np.float32)
            tensors = program(network.tensor(self.x), network.tensor(delta), *given)
            found.append([float(network.numpy(tensor).reshape(-1)[0]) for tensor in tensors])
        scores, gradients = np.asarray(found, np.float64).T
        return scores, gradients


def _bytes_of(array: np.ndarray) -> str:
    """A hash of the values of an array."""
    return sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def may_be_of_gradient(network: Network, error: Exception) -> bool:
    """True if an error of a pass with a gradient may be one of the gradient: a pass without it will tell."""
    if isinstance(error, ConvscopeError):
        return error.code == "layer-failed"
    return not network.out_of_memory(error)


def reason_of(error: Exception) -> str:
    """The class and the line of an error that tells of the gradient; TensorFlow has it at the end of a traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if "gradient" in line.lower() and not line.startswith("File ")]
    return f"{type(error).__name__}: {(telling or [one_line(error)])[0][:160]}"


def _differ(scores: np.ndarray) -> bool:
    """True if some score is another one than the first, by more than rounding."""
    first, others = scores[0], scores[1:]
    known = np.isfinite(others) & np.isfinite(first)
    apart, size = np.abs(others - first)[known], np.maximum(np.abs(others), abs(first))[known]
    return bool(np.any(apart > LEAST * size))


def _changing(network: Network, path: str | None, target: Target, differentiate: bool) -> Callable:
    """From an image and a change the score, and the largest absolute value of its gradient at the change."""
    ops = network.ops

    def changed(run: Run, x: Tensor, delta: Tensor, *arguments: Tensor) -> list:
        def score(delta: Tensor) -> tuple:
            def rule(output: Tensor) -> Tensor:
                largest = ops.max(ops.abs(output))
                unit = largest + ops.cast(ops.equal(largest, 0.0), "float32")
                return output + delta * ops.stop_gradient(unit)

            rules = {} if path is None else {path: rule}
            request = Pass(record=tuple(target.record), replace=tuple(rules), stop=not target.scores)
            seen = run(rule(x) if path is None else x, request, rules)
            values = target.score(ops, seen.logits, seen.activations, arguments)
            return ops.sum(values), values

        if not differentiate:
            return [score(delta)[1], ops.zeros((1,))]
        (_, values), gradient = network.value_and_grad(score)(delta)
        return [values, ops.max(ops.abs(gradient))]

    return changed
