"""What every opened model looks like to the techniques: a `Network` with `Layer`s, a `Head` and taps.

Nothing here names a framework. A file for each framework (`keras/network.py`, `torch/network.py`) fills in the few
abstract methods; selection, preparation of pictures and the reading of outputs are the same for all.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convscope import limits
from convscope.errors import ConvscopeError, ModelError, OutOfMemoryError, UsageError, nearest, one_line
from convscope.images.decode import InputImage, fit_batch
from convscope.networks.failing import failure
from convscope.networks.ops import Operations
from convscope.networks.preprocessing import Preprocessing
from convscope.networks.restoring import Block

Tensor = Any
Rule = Callable[[Tensor], Tensor]
Recording = Sequence[str] | Mapping[str, Callable[[Tensor], Any]]

KINDS = (
    *("conv", "pool", "global_pool", "dense", "norm", "activation", "merge", "reshape", "padding", "resize"),
    *("rescaling", "augmentation", "dropout", "identity", "model", "other"),
)
# Layers of these kinds hand on what they are given when nothing is being trained.
PASSING = frozenset({"dropout", "identity"})


@dataclass(frozen=True)
class Layer:
    """One node of the network: one output of one call of one layer.

    Attributes:
        path: names from the top as the framework joins them, "/" in Keras and "." in PyTorch; "#k" marks the k-th
            call of a layer that is called more than once, "[i]" the i-th of several outputs.
        kind: "conv", "pool", "global_pool", "dense", "norm", "activation", "merge", "model", ... .
        class_name: the framework's own name of the layer's class.
        shape: of the output for one picture, channels last: `(h, w, c)` or `(c,)`.
        parameters: number of weights, trainable or not, counted at the first call only.
        rectified: path of the layer after whose non-linearity this layer's zeros are counted: itself, the
            activation that follows a linear convolution, or None where there is none.
        on_path: False if the picture does not reach the chosen output through this layer (another branch, or a call
            on another input).
    """

    path: str
    kind: str
    class_name: str
    shape: tuple[int, ...]
    parameters: int
    rectified: str | None = None
    on_path: bool = True
    activation: str | None = None

    @property
    def spatial(self) -> bool:
        """True if the output is a map: `(h, w, c)`."""
        return len(self.shape) == 3

    @property
    def channels(self) -> int:
        """Number of channels (units of a dense layer)."""
        return self.shape[-1]


@dataclass(frozen=True)
class Head:
    """How the network's output relates to class scores.

    Attributes:
        kind: "softmax" or "sigmoid" (a layer that could be taken away, so that logits are explained),
            "softmax_output" or "sigmoid_output" (outputs are probabilities, nothing to take away: their logarithm is
            explained), "logits" or "sigmoid_logits" (outputs are logits already), "linear" (outputs are taken as they
            are, with no probabilities) or "maps" (a value for each place: no class scores).
        units: number of output units.
        layer: path of the layer whose softmax or sigmoid is taken away, or None.
        guess: True if only the values that the network returns tell of the kind.
    """

    kind: str
    units: int
    layer: str | None = None
    guess: bool = False

    @property
    def binary(self) -> bool:
        """One sigmoid unit: class 1 is its logit, class 0 is minus its logit."""
        return self.units == 1 and self.kind.startswith("sigmoid")

    @property
    def paired(self) -> bool:
        """Two classes under one softmax: only the difference of their logits decides."""
        return self.units == 2 and self.kind in ("softmax", "softmax_output", "logits")

    @property
    def classes(self) -> int:
        """Number of classes that can be explained."""
        return 2 if self.binary else self.units

    @property
    def text(self) -> str:
        """What was found out, as a sentence for people."""
        if self.kind == "maps":
            return "a value for each place and not for each class, so there are no predictions"
        if self.kind == "linear":
            one = self.units == 1
            return f"{self.units} linear output{'' if one else 's'}, explained as {'it is' if one else 'they are'}"
        if self.kind.endswith("logits"):
            by = "sigmoid" if self.kind.startswith("sigmoid") else "softmax"
            sure = " is a guess; set --head" if self.guess else ""
            return f"{self.units} logits, explained as they are (that probabilities are their {by}{sure})"
        kind = self.kind.removesuffix("_output")
        what = "one sigmoid unit" if self.binary else f"{kind} over {self.units} outputs"
        if self.layer is not None:
            return f"{what}, undone at {self.layer}: the logit is explained"
        sure = ", a guess by its values" if self.guess else ""
        return f"{what} that can't be taken away{sure}: {self.score} is explained"

    @property
    def score(self) -> str:
        """What the number is that is explained: "logit", "log p", "log p/(1-p)" or "value"."""
        names = {"linear": "value", "softmax_output": "log p", "sigmoid_output": "log p/(1-p)"}
        return names.get(self.kind, "logit")

    def logits(self, ops: Operations, outputs: Tensor) -> Tensor:
        """Scores `(n, classes)` to explain, from what the network returned with its head undone `(n, units)`."""
        if self.kind == "softmax_output":
            outputs = ops.log(ops.maximum(outputs, 1e-30))
        elif self.kind == "sigmoid_output":
            clipped = ops.clip(outputs, 1e-7, 1 - 1e-7)
            outputs = ops.log(clipped) - ops.log(1 - clipped)
        return ops.concatenate([-outputs, outputs], axis=-1) if self.binary else outputs

    def probabilities(self, logits: np.ndarray) -> np.ndarray | None:
        """Class probabilities `(n, classes)` from `logits` `(n, classes)`; None where the outputs are linear."""
        logits = logits.astype(np.float64)
        if self.kind == "linear":
            return None
        if self.kind.startswith("sigmoid"):
            return (1 / (1 + np.exp(-np.clip(logits, -700, 700)))).astype(np.float32)
        exponent = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return (exponent / exponent.sum(axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Record:
    """What one pass through the network left behind, as tensors of its framework.

    Attributes:
        logits: `(n, classes)`, see `Head.logits`; None if the pass stopped before the output.
        activations: for each recorded path `(n, h, w, c)` or `(n, c)`, float32, or what the function given for it made.
    """

    logits: Tensor
    activations: Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """One class of one picture: its index, name, logit and probability (None for linear outputs)."""

    index: int
    name: str
    logit: float
    probability: float | None

    @property
    def text(self) -> str:
        """ "tabby 0.83", or the value itself where there is no probability."""
        value = self.logit if self.probability is None else self.probability
        return f"{self.name} {value:.3g}" if self.probability is None else f"{self.name} {value:.2f}"


@dataclass(frozen=True)
class Source:
    """Where a network came from: its name without folders, file and hash, and what had to be done to open it."""

    name: str
    file: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """The picture that a network takes.

    Attributes:
        name: of the input that gets the picture.
        size: `(h, w)` in pixels that pictures are brought to.
        free: True if the network would take other sizes too.
        channels: 1 for grey, 3 for RGB.
        others: names of further inputs, and what they are fed.
        note: what to say about the size, where it is a guess.
    """

    name: str
    size: tuple[int, int]
    free: bool
    channels: int
    others: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(eq=False)
class _InForce:
    """A block of `Network.replaced` with its weights, or of `unchanging` with what was found out in it."""

    thread: int
    weights: list[Tensor] | None = None
    values: list[Tensor] | None = None
    sha256: str | None = None


def check_input(name: str, shape: Sequence[int]) -> None:
    """Refuse an input before it is made.

    Args:
        name: of the input.
        shape: for one picture; of a picture the channels last.

    Raises:
        ModelError: a side is no positive number, or the array is larger than the limits allow.
    """
    sides = [int(side) for side in shape]
    if any(side < 1 for side in sides):
        raise ModelError(f"the input {name!r} has the shape {tuple(sides)}; expected positive numbers.")
    if len(sides) == 3 and sides[0] * sides[1] > limits.current().pixels:
        raise ModelError(
            f"the input {name!r} takes images of {sides[0]}x{sides[1]} pixels ({limits.how_to_raise('pixels')})."
        )
    taken = 4 * math.prod(sides)
    if taken > limits.current().values:
        raise ModelError(
            f"the input {name!r} has the shape {tuple(sides)}, which takes {limits.shown('values', taken)} "
            f"({limits.how_to_raise('values')})."
        )


def blank_input(name: str, shape: Sequence[int | None], whole: bool = False) -> np.ndarray:
    """Zeros for an input that does not get the image, of a declared `shape`.

    Args:
        name: of the input.
        shape: its first side is the batch, of which one is made.
        whole: its first side is no batch.

    Raises:
        ModelError: see `check_input`.
    """
    sides = [side or 1 for side in shape]
    sides = sides if whole else [1, *sides[1:]]
    check_input(name, sides)
    return np.zeros(sides)


class Network(ABC):
    """One opened model with its preprocessing: the thing that every technique takes.

    Attributes:
        name: for titles and file names.
        source: where it came from.
        framework: "keras 3.15.1" and the like; `backend`: "tensorflow 2.21.0" and the like.
        inputs: what picture it takes.
        output: the output that is explained; `outputs`: the names of all.
        layers: every node in the order of execution.
        head: how its outputs relate to classes.
        preprocessing: what is done to pixels before they enter.
        ops: the framework's array operations under NumPy's names, for objectives and targets: see `Operations`.
    """

    name: str
    source: Source
    framework: str
    backend: str
    inputs: Inputs
    output: str
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    head: Head
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    ops: Operations

    def __init__(self) -> None:
        self._programs: dict[tuple, Callable] = {}
        self._in_force: list[_InForce] = []

    # -- what a framework provides ---------------------------------------------------------------------

    @abstractmethod
    def compile(self, function: Callable) -> Callable:
        """Make `function(run, *tensors)` ready to be called many times as `compiled(*tensors)`.

        `run(x, record=(), rules={}, outputs=True, undone=True) -> Record` passes pictures `x` `(n, h, w, c)`
        through the network; the paths in `record` are recorded, or what a function makes of the activation where
        `record` is a mapping; an activation at a path in `rules` is replaced by `rule(activation)`. Without `outputs`
        the pass stops once every tap has spoken; with `undone` the softmax or sigmoid of the head is taken away.

        Further options of `run`: `linear`, paths whose non-linearity is left out (see `linearisable`), so that what is
        recorded there is what comes before it; `before`, rules for what comes before the non-linearity that a layer
        has of its own; `precision` "bfloat16", that the pass computes in (recorded and returned are float32 all the
        same); `folded`, that frozen batch norms may be one multiplication and addition, which is exact up to rounding.
        """

    @abstractmethod
    def value_and_grad(self, function: Callable) -> Callable:
        """From `f(x) -> (scalar, aux)` the function `x -> ((scalar, aux), gradient)`, for use inside `compile`.

        `x` is a tensor or a tuple of them, and so is the gradient. Inside of itself it gives second derivatives.
        """

    @abstractmethod
    def positive_gradient(self, x: Tensor) -> Tensor:
        """`x`, through which only what is positive of a gradient comes back; for use inside `compile`."""

    @abstractmethod
    def tensor(self, array: np.ndarray) -> Tensor:
        """A NumPy array as a tensor of the framework."""

    @abstractmethod
    def numpy(self, tensor: Tensor) -> np.ndarray:
        """A tensor of the framework as a NumPy array."""

    @abstractmethod
    def layers_at(self, size: tuple[int, int]) -> tuple[Layer, ...]:
        """The layers with their shapes for pictures of `size` `(h, w)`."""

    @abstractmethod
    def weights(self) -> list[np.ndarray]:
        """Every weight, in a fixed order, for the hash."""

    @abstractmethod
    def _as_replacing(self, weights: Sequence[np.ndarray]) -> list[Tensor]:
        """`weights`, in the order of `weights()`, as what a pass can take in the place of the network's own."""

    @abstractmethod
    def linearisable(self, path: str) -> tuple[str, ...]:
        """The paths that make of what is recorded at `path` what comes before its non-linearity, as `linear` of a pass.

        Its own; or those of what it concatenates, pools or hands on. Empty where there is none, where one is made from
        another, or where one can't be left out.
        """

    def precision_for_ascent(self) -> str:
        """ "bfloat16" where this machine computes faster in it on this runtime, else "float32"."""
        return "float32"

    # -- the same for all ------------------------------------------------------------------------------

    def out_of_memory(self, error: BaseException) -> bool:
        """True if an exception says that the memory did not suffice, in the words of any framework."""
        names = {kind.__name__ for kind in type(error).__mro__}
        said = ("RESOURCE_EXHAUSTED", "not enough memory", "out of memory")
        return bool(names & {"MemoryError", "ResourceExhaustedError", "OutOfMemoryError"}) or any(
            words in str(error) for words in said
        )

    def explained(self, error: Exception) -> ModelError | None:
        """What is said where a pass ended in an error of another library's or of the user's; None where it is left."""
        if isinstance(error, ConvscopeError):
            return None
        if self.out_of_memory(error):
            return OutOfMemoryError(
                f"the memory does not suffice to run {self.name} ({one_line(error)[:200]}). "
                "Give fewer images at a time, or smaller ones."
            )
        return failure(error, self.name, self._failing_layer(error))

    @abstractmethod
    def _failing_layer(self, error: BaseException) -> str | None:
        """The path of the layer that raised an error, see `failing.failing_layer`."""

    def shapes_clash(self, error: BaseException) -> bool:
        """True if an exception may say that the shapes of tensors do not go together, as any framework says it."""
        if self.out_of_memory(error):
            return False
        kinds = {type(error).__name__, type(error.__cause__).__name__}
        return bool(kinds & _SHAPE_ERRORS)

    def count_nonzero(self, x: Tensor, axis: tuple[int, ...]) -> Tensor:
        """How many values along `axis` are not zero, as float32 (Keras' own count turns axes round on torch)."""
        return self.ops.sum(self.ops.cast(x != 0, "float32"), axis=axis)

    @property
    def parameters(self) -> int:
        """Number of weights, trainable or not."""
        return sum(weight.size for weight in self.weights())

    def layer(self, path: str) -> Layer:
        """The layer at `path`.

        Raises:
            UsageError: no layer, or more than one, answers to `path`; the nearest names are said.
        """
        return find_layer(self.layers, path)

    def select(self, spec: str | Sequence[str] | None = None) -> list[Layer]:
        """The layers that `spec` names, in the order of execution; see `select_layers`."""
        return select_layers(self.layers, spec)

    def last_spatial_layer(self, before: int | None = None) -> Layer:
        """The last layer that makes something of its own and whose map has h * w > 1; of the first `before` layers.

        Raises:
            UsageError: the network has none.
        """
        for layer in reversed(self.layers[:before]):
            makes_its_own = layer.kind not in PASSING | {"model", "reshape"}
            if layer.on_path and makes_its_own and layer.spatial and layer.shape[0] * layer.shape[1] > 1:
                return layer
        raise UsageError(
            f"a heatmap needs a layer with a map of more than one cell; {self.name} has none. "
            "Look at `convscope layers` for what it has."
        )

    def check_scores(self) -> None:
        """Make sure that there are class scores to explain.

        Raises:
            UsageError: the output is a map.
        """
        if self.head.kind == "maps":
            raise UsageError(
                f"expected class scores (n, classes) from {self.name}, found an output with {self.head.text}. "
                "Activations and filters work, and heatmaps of --class NUMBER (a channel of the output) or "
                "LAYER:CHANNEL; if another output has classes, choose it with --output."
            )

    def prepare(self, sources: Sequence[InputImage], size: tuple[int, int] | None = None) -> np.ndarray:
        """Pictures as the network takes them: `(n, h, w, c)` float32 after preprocessing."""
        height, width = size or self.inputs.size
        return self.preprocessing.apply(fit_batch(sources, height, width, self.inputs.channels))

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Logits `(n, classes)` float32 of prepared pictures `x` `(n, h, w, c)`."""
        return np.asarray(self.forward(x)[0])

    def forward(self, x: np.ndarray, record: Sequence[str] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits `(n, classes)` and the activations of the paths in `record`, in one pass."""
        program = self.program(("forward", tuple(record)), lambda: self.compile(_forward(tuple(record))))
        logits, activations = program(self.tensor(x))
        return self.numpy(logits), {path: self.numpy(activations[path]) for path in record}

    def predictions(self, logits: np.ndarray, count: int = 5) -> list[Prediction]:
        """The `count` highest classes of one picture's `logits` `(classes,)`, best first."""
        order = np.argsort(-logits, kind="stable")[:count]
        return [self.prediction(logits, int(index)) for index in order]

    def prediction(self, logits: np.ndarray, index: int) -> Prediction:
        """Class `index` of one picture's `logits` `(classes,)`."""
        probabilities = self.head.probabilities(logits[None])
        probability = None if probabilities is None else float(probabilities[0, index])
        return Prediction(index, self.class_name(index), float(logits[index]), probability)

    def checked_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Class names as a tuple.

        Raises:
            UsageError: there are not as many as classes.
        """
        if len(names) != self.head.classes:
            raise UsageError(
                f"expected {self.head.classes} class names for {self.name}, found {len(names)}. "
                "Give one name for each class, in the order of the network's outputs."
            )
        return tuple(names)

    def class_name(self, index: int) -> str:
        """The name of class `index`, or its number as text where there are no names ("output 0" of a regression)."""
        if self.class_names:
            return self.class_names[index]
        return f"{'output' if self.head.kind == 'linear' else 'class'} {index}"

    def class_index(self, target: int | str) -> int:
        """The class that `target` names: a number, or a name (letter case and "_" for a space do not matter).

        Raises:
            UsageError: out of range, unknown, or ambiguous.
        """
        if isinstance(target, int | np.integer) or re.fullmatch(r"-?\d+", str(target)):
            return self._class_in_range(int(target))
        if not self.class_names:
            raise UsageError(
                f"class {target!r} can't be looked up: the network's {self.head.classes} classes have no names here. "
                f"Give a number from 0 to {self.head.classes - 1}, or the names with classes= (--classes FILE)."
            )
        plain = [_plain(name) for name in self.class_names]
        if plain.count(_plain(str(target))) > 1:
            raise UsageError(f"more than one class is named {target!r}; give its number.")
        if _plain(str(target)) not in plain:
            raise UsageError(f"no class is named {target!r}; {nearest(str(target), self.class_names)}")
        return plain.index(_plain(str(target)))

    def _class_in_range(self, index: int) -> int:
        if 0 <= index < self.head.classes:
            return index
        raise UsageError(
            f"class {index} is out of range: {self.name} has {self.head.classes} "
            f"class{'es' if self.head.classes > 1 else ''}, numbered from 0 to {self.head.classes - 1}."
        )

    def weights_sha256(self) -> str:
        """Hash over every weight's shape, type and bytes; made once in a block of `unchanging`."""
        block = self._unchanging()
        if block is None:
            return self._hashed()
        if block.sha256 is None:
            block.sha256 = self._hashed()
        return block.sha256

    def _hashed(self) -> str:
        digest = hashlib.sha256()
        for weight in self.weights():
            digest.update(f"{weight.shape}{weight.dtype}".encode())
            digest.update(np.ascontiguousarray(weight).tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What is needed to know which network this was, for provenance: plain JSON values."""
        (height, width), class_names = self.inputs.size, self.class_names
        return {
            "name": self.name,
            "source": self.source.name,
            "sha256": self.source.sha256,
            "weights_sha256": self.weights_sha256(),
            "framework": self.framework,
            "backend": self.backend,
            "opened": list(self.source.notes),
            "input": {
                "name": self.inputs.name,
                "height": height,
                "width": width,
                "channels": self.inputs.channels,
                "free_size": self.inputs.free,
                "others": dict(self.inputs.others),
            },
            "output": self.output,
            "class_names_sha256": class_names and hashlib.sha256("\n".join(class_names).encode()).hexdigest(),
            "preprocessing": self.preprocessing.describe(),
            "head": {
                "kind": self.head.kind,
                "units": self.head.units,
                "layer": self.head.layer,
                "text": self.head.text,
            },
        }

    def stages(self, before: Sequence[str] = ()) -> list[list[int]]:
        """The weights in the order of execution, a stage for each kernel with the norms and biases that follow it.

        Args:
            before: paths of layers; only what leads to them, to the output where there are none.

        Returns:
            for each kernel the numbers, in the order of `weights()`, of its own and the following arrays.
        """
        weights, places = self.weights(), self._weight_places()
        names = [layer.path for layer in self.layers]
        last = max((names.index(path) for path in before), default=len(names) - 1)
        found: list[list[int]] = []
        known: set[int] = set()
        for layer in self.layers[: last + 1]:
            own = [index for index in places.get(_base(layer.path), ()) if index not in known] if layer.on_path else []
            known.update(own)
            if any(_is_kernel(weights[index]) for index in own):
                found.append(own)
            elif found:
                found[-1] += own
        return found

    @abstractmethod
    def _weight_places(self) -> Mapping[str, Sequence[int]]:
        """For each layer, without marks for one of several calls, the numbers of its own arrays in `weights()`."""

    def replaced(self, weights: Sequence[np.ndarray]) -> Block:
        """For the length of a block the passes of this thread compute with `weights`, in the order of `weights()`.

        The model's own are not touched but for the length of a pass.
        """
        return self._block(_InForce(threading.get_ident(), self._as_replacing(weights)))

    def scrambled(self, stages: Sequence[Sequence[int]], seed: int = 0) -> Block:
        """For the length of a block the values inside of each array of some `stages` have changed places."""
        chosen = {index for stage in stages for index in stage}
        random = np.random.default_rng(seed)
        shuffled = [
            random.permutation(weight.ravel()).reshape(weight.shape) if index in chosen else weight
            for index, weight in enumerate(self.weights())
        ]
        return self.replaced(shuffled)

    def unchanging(self) -> Block:
        """For the length of a block nobody changes the weights, so that they need not be read or hashed again.

        It holds for the passes of this thread. Blocks may overlap: each ends by itself, in any order.
        """
        return self._block(_InForce(threading.get_ident()))

    def _block(self, block: _InForce) -> Block:
        def begin(undo: ExitStack) -> None:
            undo.callback(self._in_force.remove, block)
            self._in_force.append(block)

        return Block(begin)

    def _replacing(self) -> list[Tensor] | None:
        """What the passes of this thread compute with in place of the network's own weights."""
        return next((block.weights for block in self._of_this_thread() if block.weights is not None), None)

    def _unchanging(self) -> _InForce | None:
        """The last block of this thread in which the weights stay as they are."""
        return next((block for block in self._of_this_thread() if block.weights is None), None)

    def _of_this_thread(self) -> list[_InForce]:
        own = threading.get_ident()
        return [block for block in reversed(self._in_force) if block.thread == own] if self._in_force else []

    def program(self, key: tuple, make: Callable[[], Callable]) -> Callable:
        """A compiled function, made once for each `key`: a loop over pictures must not compile again.

        The key has to hold everything that `make` bakes into the function. The least recently used go first.
        """
        made = self._programs.pop(key, None) or make()
        while len(self._programs) >= _PROGRAMS_KEPT:
            self._programs.pop(next(iter(self._programs)))
        self._programs[key] = made
        return made


_PROGRAMS_KEPT = 32
# By their own names: a class of the user's that is derived from one of these says something else.
_SHAPE_ERRORS = {"ValueError", "TypeError", "RuntimeError", "IndexError", "AssertionError", "InvalidArgumentError"}


def _is_kernel(weight: np.ndarray) -> bool:
    """True for an array with two axes or more along which it has more than one value."""
    return weight.dtype.kind == "f" and sum(side > 1 for side in weight.shape) > 1


def _forward(record: tuple[str, ...]) -> Callable:
    def forward(run: Callable, x: Tensor) -> tuple:
        seen = run(x, record=record)
        return seen.logits, dict(seen.activations)

    return forward


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def as_recording(record: Recording) -> Mapping[str, Callable[[Tensor], Any]]:
    """What to keep of the activation at each path: itself, unless a function says otherwise."""
    return record if isinstance(record, Mapping) else dict.fromkeys(record, lambda activation: activation)


def find_layer(layers: Sequence[Layer], path: str) -> Layer:
    """The one layer at `path`; a last part that is unique will do ("conv3_block4_out" in a nested model, "1.conv2").

    Raises:
        UsageError: no layer, or more than one, answers to `path`; the nearest names are said.
    """
    for candidates in (
        [layer for layer in layers if layer.path == path],
        [layer for layer in layers if _base(layer.path) == path],
        [layer for layer in layers if _ends_with(layer.path, path) or _ends_with(_base(layer.path), path)],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            several = ", ".join(layer.path for layer in candidates)
            raise UsageError(f"layer {path!r} stands for more than one: {several}. Name one of them.")
    raise UsageError(f"no layer {path!r}; {nearest(path, [layer.path for layer in layers])}")


def _ends_with(path: str, end: str) -> bool:
    return path.endswith(("/" + end, "." + end))


def _base(path: str) -> str:
    """The path without the marks for one of several calls or outputs."""
    return re.sub(r"(#\d+)?(\[[^\]]*\])?$", "", path)


def select_layers(layers: Sequence[Layer], spec: str | Sequence[str] | None = None) -> list[Layer]:
    """Layers by kind, glob and place, in the order of execution.

    Args:
        layers: to choose from.
        spec: None for "conv|pool"; kinds or globs of paths joined by "|" or ","; a slice of the chosen
            (":8" the first eight, "2:5", "conv:4:" from the fifth convolution on); or a sequence of such texts.

    Raises:
        UsageError: some part of `spec` names nothing.
    """
    if spec is None:
        return [layer for layer in layers if layer.kind in ("conv", "pool")] or list(layers)
    parts = [spec] if isinstance(spec, str) else spec
    chosen = {layer.path for part in parts for layer in _by_spec(layers, part)}
    if not chosen:
        raise UsageError(
            f"{spec!r} chooses none of the {len(layers)} layers; expected kinds, globs or places such as ':8'."
        )
    return [layer for layer in layers if layer.path in chosen]


def _by_spec(layers: Sequence[Layer], spec: str) -> list[Layer]:
    if re.fullmatch(r"-?\d*:-?\d*", spec):  # as Python writes slices: "2:5", ":8"
        spec = f":{spec}"
    place = re.fullmatch(r"(?P<names>[^:]*):(?P<start>(-?\d+)?)(?P<range>:(?P<stop>(-?\d+)?))?", spec)
    if place is None:
        return _by_names(layers, spec)
    start, stop = (place["start"], place["stop"]) if place["range"] is not None else ("", place["start"])
    # ":8" counts among all layers, as the notes' `model.layers[:8]` does; a container is not one of them.
    chosen = _by_names(layers, place["names"]) if place["names"] else [la for la in layers if la.kind != "model"]
    return chosen[slice(int(start) if start else None, int(stop) if stop else None)]


def _by_names(layers: Sequence[Layer], spec: str) -> list[Layer]:
    wanted: set[str] = set()
    names = [part.strip() for part in re.split(r"[|,]", spec) if part.strip()]
    for name in names:
        found = [layer.path for layer in layers if _answers(layer, name)]
        # "conv|pool" is a fair question to a network that never pools.
        if not found and not (name in KINDS and len(names) > 1):
            kinds = sorted({layer.kind for layer in layers})
            hint = nearest(name, [*kinds, *(layer.path for layer in layers)])
            raise UsageError(f"no layer of the kind or name {name!r}; {hint} Kinds here: {', '.join(kinds)}.")
        wanted.update(found)
    return [layer for layer in layers if layer.path in wanted]


def _answers(layer: Layer, name: str) -> bool:
    if name == layer.kind or name in ("*", "all"):
        return True
    # A path holds brackets where a layer has several outputs; a glob would take them as a set of letters.
    pattern = name.replace("[", "[[]")
    return any(
        fnmatch.fnmatchcase(path, start + pattern)
        for path in (layer.path, _base(layer.path))
        for start in ("", "*/", "*.")
    )


def check_finite(network: Network, logits: np.ndarray) -> None:
    """Refuse outputs that are not numbers, and name the layer whose weights are none.

    Raises:
        ModelError: the network returned NaN or infinite values.
    """
    if np.isfinite(logits).all():
        return
    damaged = _not_finite(network)
    if damaged:
        raise ModelError(
            f"{network.name} returned values that are not finite numbers, since weights of {damaged} are none; "
            "the file is damaged, or its training went wrong there."
        )
    raise ModelError(
        f"{network.name} returned values that are not finite numbers, though its weights are; the picture's scaling "
        f"({network.preprocessing.name}) may not be the one it was trained with: try --preprocess."
    )


def _not_finite(network: Network) -> str:
    """The first layer with a weight that is no finite number, or ""."""
    weights = network.weights()
    wrong = {
        index for index, weight in enumerate(weights) if weight.dtype.kind == "f" and not np.isfinite(weight).all()
    }
    places = network._weight_places()
    for layer in network.layers:
        if wrong & set(places.get(_base(layer.path), ())):
            return f"layer {layer.path!r}"
    return "some layer" if wrong else ""
