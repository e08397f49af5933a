"""The interface of every opened model for the techniques: a `Network` with `Layer`s, a `Head` and taps.

Nothing here names a framework. A file for each framework (`keras/network.py`, `torch/network.py`) fills in the few
abstract methods; preparation of images and the reading of outputs are the same for all.
"""

from __future__ import annotations

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from convscope.errors import ConvscopeError, ModelError, OutOfMemoryError, UsageError, nearest, one_line, option
from convscope.images.image import InputImage, fit_batch
from convscope.networks.failing import failure
from convscope.networks.foreign import Tensor
from convscope.networks.head import Head, Prediction
from convscope.networks.inputs import Inputs
from convscope.networks.layers import Layer, base_path, find_layer, select_layers
from convscope.networks.measured import Measurement, StoredNorm, measured
from convscope.networks.ops import Operations
from convscope.networks.passes import Pass, Run
from convscope.networks.preprocessing import FOUND, SET, Preprocessing
from convscope.networks.restoring import Block, exclusively
from convscope.schema import Json

if TYPE_CHECKING:
    from convscope.networks.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """Where a network came from.

    Attributes:
        name: without folders.
        file: its path; sha256: of its content.
        notes: the steps that were needed to open it.
        beside_sha256: of the other files that hold its weights (`formats.files.sha256_of_several`), if there are any.

    Example:
        >>> network.source.name
        'model.keras'
    """

    name: str
    file: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    beside_sha256: str | None = None


@dataclass(eq=False)
class _InForce:
    """A block of `Network.replaced` with its weights, or of `unchanging` with its cached values."""

    thread: int
    weights: list[Tensor] | None = None
    values: list[Tensor] | None = None
    sha256: str | None = None
    measured: dict[Hashable, object] = field(default_factory=dict)


class Network(ABC):
    """One opened model with its preprocessing: the argument of every technique.

    Attributes:
        name: for titles and file names.
        source: where it came from.
        framework: "keras 3.15.1" and the like; `backend`: "tensorflow 2.21.0" and the like.
        inputs: the image that it takes.
        output: the output that is explained; `outputs`: the names of all.
        layers: every node in the order of execution.
        head: the relation of its outputs to classes.
        preprocessing: the scaling of pixels before they enter.
        spec: the arguments that it was opened with; None where a subclass was made by hand.
        ops: the framework's array operations under NumPy's names, for objectives and targets: see `Operations`.
        limitations: what the techniques found that this network can't do, whatever its weights are.

    Example:
        >>> image = convscope.images.decode.read_image(PHOTOS[0])
        >>> x = network.prepare([image])
        >>> x.shape, network.predict(x).shape
        ((1, 224, 224, 3), (1, 13))
        >>> logits, activations = network.forward(x, ["block4_conv"])
        >>> activations["block4_conv"].shape
        (1, 28, 28, 96)
        >>> network.predictions(logits[0], count=1)[0].name, network.class_index("cat"), network.class_name(2)
        ('cat', 2, 'cat')
        >>> [layer.path for layer in network.select("block4*")], network.last_spatial_layer().path
        (['block4_conv'], 'block4_conv')
        >>> network.layers_at((64, 64))[-3].shape
        (8, 8, 96)
        >>> with network.unchanging():
        ...     network.weights_sha256() == network.describe()["weights_sha256"]
        True
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
    spec: ModelSpec | None = None

    def __init__(self) -> None:
        self._programs: dict[tuple[object, ...], Callable] = {}
        self._programs_lock = threading.RLock()
        self._in_force: list[_InForce] = []
        self.limitations: set[Hashable] = set()
        self._measured_with: tuple[str, dict[Hashable, object]] = ("", {})
        self._measured = False
        self._measurement: Measurement | None = None

    # -- provided by each framework -------------------------------------------------------------------

    @abstractmethod
    def compile(self, function: Callable) -> Callable:
        """Make `function(run, *tensors)` ready to be called many times as `compiled(*tensors)`.

        `run` is a `Run`: `run(x, Pass(...), rules, reductions) -> Record`.
        """

    @abstractmethod
    def value_and_grad(self, function: Callable) -> Callable:
        """From `f(x) -> (scalar, aux)` the function `x -> ((scalar, aux), gradient)`, for use inside `compile`.

        `x` is a tensor or a tuple of them, and so is the gradient. Inside of itself it gives second derivatives.
        """

    @abstractmethod
    def positive_gradient(self, x: Tensor) -> Tensor:
        """`x`, through which only the positive part of a gradient passes back; for use inside `compile`."""

    @abstractmethod
    def tensor(self, array: np.ndarray) -> Tensor:
        """A NumPy array as a tensor of the framework."""

    @abstractmethod
    def numpy(self, tensor: Tensor) -> np.ndarray:
        """A tensor of the framework as a NumPy array."""

    @abstractmethod
    def layers_at(self, size: tuple[int, int]) -> tuple[Layer, ...]:
        """The layers with their shapes for images of `size` `(h, w)`."""

    @abstractmethod
    def weights(self) -> list[np.ndarray]:
        """Every weight, in a fixed order, for the hash."""

    @abstractmethod
    def _as_replacing(self, weights: Sequence[np.ndarray]) -> list[Tensor]:
        """`weights`, in the order of `weights()`, as tensors that a pass can take instead of the network's own."""

    @abstractmethod
    def nonlinearities(self, path: str) -> tuple[str, ...]:
        """The non-linearities of the output at `path`, which can be left out (`Pass.preactivations`).

        Its own; or those of what it concatenates, pools or passes on. Empty where there is none, where one is made from
        another, or where one can't be left out.
        """

    def ancestors(self, path: str) -> frozenset[str] | None:
        """Paths of the layers that the image passes on its way to the output of the layer at `path`, without itself.

        None where the graph does not tell.
        """
        return None

    def stored_norms(self, count: int) -> tuple[StoredNorm, ...]:
        """The first `count` trained batch norms that maps of the image enter, in the order of execution."""
        return ()

    @property
    def folds_norms(self) -> bool:
        """True if a run can fold batch norms into what comes before them (`Pass.folded`), which is faster."""
        return False

    def precision_for_ascent(self) -> str:
        """ "bfloat16" where this machine computes faster in it on this runtime, else "float32"."""
        return "float32"

    # -- the same for all ------------------------------------------------------------------------------

    def out_of_memory(self, error: BaseException) -> bool:
        """True if an exception of any framework means that the memory did not suffice."""
        names = {kind.__name__ for kind in type(error).__mro__}
        said = ("RESOURCE_EXHAUSTED", "not enough memory", "out of memory")
        return bool(names & {"MemoryError", "ResourceExhaustedError", "OutOfMemoryError"}) or any(
            words in str(error) for words in said
        )

    def explained(self, error: Exception) -> ModelError | None:
        """The message for a pass that ended in a foreign error; None to keep the error."""
        if isinstance(error, ConvscopeError):
            return None
        if self.out_of_memory(error):
            return OutOfMemoryError(
                f"the memory does not suffice to run {self.name} ({one_line(error)[:200]}). "
                "Give fewer images at a time, or smaller ones.",
                code="out-of-memory",
                name=self.name,
            )
        return failure(error, self.name, self._failing_layer(error))

    @abstractmethod
    def _failing_layer(self, error: BaseException) -> str | None:
        """The path of the layer that raised an error, see `failing.failing_layer`."""

    def shapes_clash(self, error: BaseException) -> bool:
        """True if an exception of any framework may mean that the shapes of tensors do not fit together."""
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
            UsageError: no layer, or more than one, matches `path`; the message has the nearest names.
        """
        return find_layer(self.layers, path)

    def select(self, spec: str | Sequence[str] | None = None) -> list[Layer]:
        """The layers that `spec` names, in the order of execution; see `select_layers`."""
        return select_layers(self.layers, spec)

    def last_spatial_layer(self, among: Sequence[Layer] | None = None, record: tuple[str, ...] = ()) -> Layer:
        """The last layer with an output of its own and a map with h * w > 1.

        Args:
            among: layers in the order of execution; where None, those between the image and the output whose map has an
                effect on it.
            record: see `map_reaches_output`.

        Raises:
            UsageError: there is none.
        """
        chosen = [one for one in self.layers if one.on_path] if among is None else among
        found = [
            layer
            for layer in reversed(chosen)
            if (layer.computes or layer.stops_gradients) and layer.spatial and layer.shape[0] * layer.shape[1] > 1
        ]
        with self.unchanging():
            for layer in sorted(found, key=lambda one: one.in_block):  # first what a transformer's blocks hand on
                if self.map_reaches_output(layer, record):
                    return layer
        raise UsageError(
            f"a heatmap needs a layer with a map of more than one cell; {self.name} has none. "
            "Look at `convscope layers` for what it has; methods that work at the image, such as occlusion, rise and "
            "saliency, need no layer.",
            code="no-map-layer",
            name=self.name,
        )

    def map_reaches_output(self, layer: Layer, record: tuple[str, ...] = ()) -> bool:
        """False if it was measured that a change of the layer's map does not change what is read; else True.

        After the last attention of a transformer only the class token may be read, where there is one. It takes a pass
        for each layer, and is kept for the same weights.

        Args:
            layer: one of the network's.
            record: paths of the layers that are read; the class scores where there are none.
        """
        return True

    def check_scores(self) -> None:
        """Make sure that there are class scores to explain.

        Raises:
            UsageError: the output is a map.
        """
        if not self.head.has_scores:
            raise UsageError(
                f"expected class scores (n, classes) from {self.name}, found an output with {self.head.text}. "
                f"Activations and filters work, and heatmaps of {option('target')} "
                f"{'LAYER:CHANNEL' if self.head.map is None else 'CLASS (its number or name) or LAYER:CHANNEL'}; "
                f"if another output has classes, choose it with {option('output')}.",
                code="no-class-scores",
                name=self.name,
                found=self.head.text,
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of the images that the network takes."""
        height, width = self.inputs.size
        return height, width, self.inputs.channels

    def prepare(self, sources: Sequence[InputImage], size: tuple[int, int] | None = None) -> np.ndarray:
        """Images as the network takes them: `(n, h, w, c)` float32 after preprocessing."""
        height, width = size or self.inputs.size
        return self.preprocessing.apply(fit_batch(sources, height, width, self.inputs.channels))

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Logits `(n, classes)` float32 of prepared images `x` `(n, h, w, c)`."""
        return np.asarray(self.forward(x)[0])

    def forward(self, x: np.ndarray, record: Sequence[str] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits `(n, classes)` and the activations of the paths in `record`, in one pass."""
        program = self.program(_forward, Pass(record=tuple(record)))
        logits, activations = program(self.tensor(x))
        return self.numpy(logits), {path: self.numpy(activations[path]) for path in record}

    def predictions(self, logits: np.ndarray, count: int = 5) -> list[Prediction]:
        """The `count` highest classes of one image's `logits` `(classes,)`, best first."""
        order = np.argsort(-logits, kind="stable")[:count]
        return [self.prediction(logits, int(index)) for index in order]

    def prediction(self, logits: np.ndarray, index: int) -> Prediction:
        """Class `index` of one image's `logits` `(classes,)`."""
        probabilities = self.head.probabilities(logits[None])
        probability = None if probabilities is None else float(probabilities[0, index])
        return Prediction(index, self.class_name(index), float(logits[index]), probability)

    def class_name(self, index: int) -> str:
        """The name of class `index`, or its number as text where there are no names ("output 0" of a regression)."""
        if self.class_names:
            return self.class_names[index]
        return f"{'output' if self.head.linear else 'class'} {index}"

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
                f"Give a number from 0 to {self.head.classes - 1}, or the names with {option('classes')}.",
                code="classes-unnamed",
                name=str(target),
            )
        plain = [_plain(name) for name in self.class_names]
        if plain.count(_plain(str(target))) > 1:
            raise UsageError(
                f"more than one class is named {target!r}; give its number.", code="class-ambiguous", name=str(target)
            )
        if _plain(str(target)) not in plain:
            raise UsageError(
                f"no class is named {target!r}; {nearest(str(target), self.class_names)}",
                code="class-unknown",
                name=str(target),
            )
        return plain.index(_plain(str(target)))

    def _class_in_range(self, index: int) -> int:
        if 0 <= index < self.head.classes:
            return index
        raise UsageError(
            f"class {index} is out of range: {self.name} has {self.head.classes} "
            f"class{'es' if self.head.classes > 1 else ''}, numbered from 0 to {self.head.classes - 1}.",
            code="class-out-of-range",
            found=int(index),
            count=self.head.classes,
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

    def describe(self) -> dict[str, Json]:
        """The identification of the network, for provenance: plain JSON values."""
        (height, width), class_names = self.inputs.size, self.class_names
        return {
            "name": self.name,
            "source": self.source.name,
            "sha256": self.source.sha256,
            "spec": None if self.spec is None else self.spec.describe(),
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
            "preprocessing": self._describe_preprocessing(),
            "head": self.head.describe(),
        }

    def _describe_preprocessing(self) -> dict[str, Json]:
        found = self.measurement
        return {
            **self.preprocessing.describe(),
            "measured": None if found is None else found.describe(),
            "contradiction": self.contradiction or None,
        }

    @property
    def measurement(self) -> Measurement | None:
        """The preprocessing as the stored statistics of the first batch norms show it: see `measured`.

        Made once: at opening where the preprocessing would be a guess, else at the first use. None for a network
        without trained batch norms.
        """
        if not self._measured:  # two threads may both measure, with one result
            with self.replaced(self.weights()) if self._replacing() is not None else nullcontext():
                self._measurement = measured(self)
            self._measured = True
        return self._measurement

    @property
    def contradiction(self) -> str:
        """The contradiction between the measurement and a preprocessing that was given or found, for people, or ""."""
        known = self.preprocessing.certainty in (FOUND, SET)
        return self.measurement.contradiction(self.preprocessing) if known and self.measurement is not None else ""

    def stages(self, before: Sequence[str] = ()) -> list[list[int]]:
        """The weights in the order of execution, a stage for each kernel with the norms and biases that follow it.

        Args:
            before: paths of layers; only weights on the way to them, or to the output where there are none.

        Returns:
            for each kernel the numbers, in the order of `weights()`, of its own and the following arrays.
        """
        weights, places = self.weights(), self._weight_places()
        names = [layer.path for layer in self.layers]
        last = max((names.index(path) for path in before), default=len(names) - 1)
        found: list[list[int]] = []
        known: set[int] = set()
        for layer in self.layers[: last + 1]:
            at = places.get(base_path(layer.path), ()) if layer.on_path else ()
            own = [index for index in at if index not in known]
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

        It applies to the passes of this thread. Blocks may overlap: each ends by itself, in any order.
        """
        return self._block(_InForce(threading.get_ident()))

    def _block(self, block: _InForce) -> Block:
        def begin(undo: ExitStack) -> None:
            undo.callback(self._in_force.remove, block)
            self._in_force.append(block)

        return Block(begin)

    def _replacing(self) -> list[Tensor] | None:
        """The weights that the passes of this thread use instead of the network's own."""
        block = self._replacing_block()
        return None if block is None else block.weights

    def _replacing_block(self) -> _InForce | None:
        """The last block of this thread with weights of its own."""
        return next((block for block in self._of_this_thread() if block.weights is not None), None)

    @property
    def measured_values(self) -> dict[Hashable, object]:
        """A store of what was measured with the weights that the passes of this thread use now.

        It is another one after the weights changed, and in each block of `replaced`.
        """
        block = self._replacing_block()
        if block is not None:
            return block.measured
        sha256 = self.weights_sha256()
        if self._measured_with[0] != sha256:
            self._measured_with = (sha256, {})
        return self._measured_with[1]

    def _unchanging(self) -> _InForce | None:
        """The last block of this thread in which the weights stay as they are."""
        return next((block for block in self._of_this_thread() if block.weights is None), None)

    def _of_this_thread(self) -> list[_InForce]:
        own = threading.get_ident()
        # A copy: another thread's block may end while this goes through them.
        return [block for block in self._in_force[::-1] if block.thread == own] if self._in_force else []

    def program(self, make: Callable[..., Callable], *arguments: object) -> Callable:
        """The program of `make(network, *arguments)`, compiled once: a loop over images must not compile again.

        `make` and `arguments` are the key, with the settings of the network after opening. So `make` has to be a
        function of a module, which has nothing else to bake in. The least recently used programs go first.

        Args:
            make: from the network and `arguments` to a `function(run, *tensors)`, see `compile`.
            arguments: hashable values: a `Pass`, layers, an objective.

        Raises:
            TypeError: `make` is a function inside of another one or an argument is not hashable.

        Example:
            `network.program(scoring, Pass(record=("conv1",), stop=True))`
        """
        if "<" in make.__qualname__:
            raise TypeError(f"expected a function of a module, found {make.__qualname__}, which may enclose more.")
        key = (make, *arguments, self.preprocessing, self.head)
        found = exclusively(self._programs_lock, lambda: self._used_again(key))
        if found is not None:
            return found
        made = self.compile(make(self, *arguments))  # outside of the lock: it may wait for another thread's pass
        return exclusively(self._programs_lock, lambda: self._kept(key, made))

    def _used_again(self, key: tuple[object, ...]) -> Callable | None:
        return self._kept(key, self._programs[key]) if key in self._programs else None

    def _kept(self, key: tuple[object, ...], made: Callable) -> Callable:
        """The program under a key, or `made` where there is none yet: it is now the last one to go."""
        kept = self._programs[key] = self._programs.pop(key, made)
        while len(self._programs) > _PROGRAMS_KEPT:
            self._programs.pop(next(iter(self._programs)))
        return kept


def checked_names(names: Sequence[str], head: Head, name: str) -> tuple[str, ...]:
    """Class names as a tuple; `name` is the network's.

    Raises:
        UsageError: there are not as many as classes.
    """
    if len(names) != head.classes:
        raise UsageError(
            f"expected {head.classes} class names for {name}, found {len(names)}. "
            "Give one name for each class, in the order of the network's outputs.",
            code="class-names-misfit",
            expected=head.classes,
            found=len(names),
        )
    return tuple(names)


_PROGRAMS_KEPT = 32
# By their own names: a class of the user's that is derived from one of these has another meaning.
_SHAPE_ERRORS = {"ValueError", "TypeError", "RuntimeError", "IndexError", "AssertionError", "InvalidArgumentError"}


def _is_kernel(weight: np.ndarray) -> bool:
    """True for an array with two axes or more along which it has more than one value."""
    return weight.dtype.kind == "f" and sum(side > 1 for side in weight.shape) > 1


def _forward(network: Network, request: Pass) -> Callable:
    def forward(run: Run, x: Tensor) -> tuple:
        seen = run(x, request)
        return seen.logits, dict(seen.activations)

    return forward


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


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
            "the file is damaged, or its training went wrong there.",
            code="weights-not-finite",
            layer=damaged,
        )
    raise ModelError(
        f"{network.name} returned values that are not finite numbers, though its weights are; the image's scaling "
        f"({network.preprocessing.name}) may not be the one it was trained with: try {option('preprocess')}.",
        code="output-not-finite",
        name=network.name,
        preprocessing=network.preprocessing.name,
    )


def _not_finite(network: Network) -> str:
    """The first layer with a weight that is no finite number, or ""."""
    weights = network.weights()
    wrong = {
        index for index, weight in enumerate(weights) if weight.dtype.kind == "f" and not np.isfinite(weight).all()
    }
    places = network._weight_places()
    for layer in network.layers:
        if wrong & set(places.get(base_path(layer.path), ())):
            return f"layer {layer.path!r}"
    return "some layer" if wrong else ""
