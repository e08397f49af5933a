"""Keras 3 models on TensorFlow, JAX or torch: the tap mechanism, and the inspection of a model.

A tap wraps an operation's `call` for the length of one pass. It reaches layers inside nested models, which graph
surgery does not, and leaves the user's model as it was. Every pass runs with `training=False` inside a
`keras.StatelessScope`, with the weights as arguments of the compiled function: constants would go stale, and a
layer that draws random numbers would leak its tracer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import keras
import numpy as np

from convscope.networks.choices import Choices
from convscope.networks.foreign import Structure, Tensor
from convscope.networks.graph import Call
from convscope.networks.head import Head
from convscope.networks.heads import Habits
from convscope.networks.inspection import Inspection, Steps, inspected
from convscope.networks.keras.folds import Fold, first_in_blocks, folds_of, norms_folded
from convscope.networks.keras.graph import kind_of, patch
from convscope.networks.keras.imagenet import CLASSES as IMAGENET_CLASSES
from convscope.networks.keras.imagenet import imagenet_names
from convscope.networks.keras.inputs import Entry
from convscope.networks.keras.models import OpenedModel
from convscope.networks.keras.runner import TRACING, Runner, WatchedModel
from convscope.networks.keras.scaling import FamilyMatch, usual_preprocessing
from convscope.networks.keras.taps import (
    KerasTaps,
    called_once,
    early_patch,
    has_activation,
    in_bfloat16,
    without_nonlinearity,
)
from convscope.networks.ops import Axes, namespace
from convscope.networks.passes import PLAIN, Pass, Record, Reduction, Rule
from convscope.networks.preprocessing import Preprocessing, family_of
from convscope.networks.restoring import exclusively, restored
from convscope.networks.trace import Calls
from convscope.networks.traced import TracedNetwork, unless_enough

_NO_CHOICES = Choices()
HABITS = Habits(channels_first=False, returns_logits=False, leaves_out_calls=False)


def network_of(opened: OpenedModel, choices: Choices = _NO_CHOICES) -> KerasNetwork:
    """The network of a model that was opened, step by step.

    Raises:
        ModelError: the model takes no images or can't be run; UsageError: no such input, output or size.
    """
    runner = Runner(opened.model)
    match = _family_match(runner, opened)
    family = None if match is None else match.family
    entry = Entry(opened.model, runner.operations, choices, family)
    watched = WatchedModel(runner, entry, opened.source)

    def preprocessing() -> Preprocessing:
        return usual_preprocessing(match)

    def class_names(head: Head) -> tuple[str, ...] | None:
        if not opened.imagenet or match is None or head.classes != IMAGENET_CLASSES:
            return None
        return imagenet_names(download=match.certain)

    def network(found: Inspection) -> KerasNetwork:
        return KerasNetwork(watched, found)

    trace = watched.trace(watched.inputs.size)
    return inspected(watched, trace, choices, Steps(preprocessing, HABITS, class_names, network))


def _family_match(runner: Runner, opened: OpenedModel) -> FamilyMatch | None:
    """The family of a model: of the collection that it came from, or by its name or that of a model in it."""
    certain = opened.source.name.startswith("keras:")
    if opened.family is not None:
        return FamilyMatch(opened.family, opened.model.name, certain)
    names = [opened.model.name, *(op.name for _, op in runner.operations if kind_of(op) == "model")]
    found = [(family_of(name), name) for name in names]
    return next((FamilyMatch(family, name, certain) for family, name in found if family), None)


class KerasNetwork(TracedNetwork):
    """A Keras 3 model, opened; see `network_of`."""

    def __init__(self, watched: WatchedModel, found: Inspection) -> None:
        super().__init__(watched, found)
        self._model, self._runner, self._entry = watched, watched.runner, watched.entry.preparing(found.preprocessing)
        self.model = self._runner.model
        self.ops = namespace(keras.ops, _own_operations())
        self._backend = self._runner.backend
        self.framework = f"keras {keras.__version__}"
        self.backend = f"{self._backend.name} {self._backend.version}"
        left_out = [found.graph.calls[path][0].operation for path in found.head.left_out]
        self._head_patches = [without_nonlinearity(operation) for operation in left_out]
        self._hash: tuple[list[weakref.ref], str] | None = None
        self._folds: dict[tuple[int, int], list[Fold]] = {}

    # taps ------------------------------------------------------------------------------------------

    def compile(self, function: Callable) -> Callable:
        """See `Network.compile`. The weights are read anew at each call."""

        def traced(values: list[Tensor], *tensors: Tensor) -> Structure:
            def run(
                x: Tensor,
                request: Pass = PLAIN,
                rules: Mapping[str, Rule] | None = None,
                reductions: Mapping[str, Reduction] | None = None,
            ) -> Record:
                return self._run(values, x, request, rules or {}, reductions or {})

            return function(run, *tensors)

        compiled = self._backend.compile(traced)

        def call(*tensors: Tensor) -> Structure:
            # Tracing patches the model; two threads must not do that at once.
            return self._explaining(
                lambda: restored(self._runner.switch, lambda _: compiled(self._values(), *tensors), TRACING)
            )

        return call

    def _statistics(self, norm: Call) -> tuple[np.ndarray, np.ndarray] | None:
        """See `TracedNetwork._statistics`."""
        if not isinstance(norm.operation, keras.layers.BatchNormalization):
            return None
        mean, variance = norm.operation.moving_mean, norm.operation.moving_variance
        # Copies: on torch the arrays would share the memory of the variables, and the user may train on.
        return np.array(keras.ops.convert_to_numpy(mean.value)), np.array(keras.ops.convert_to_numpy(variance.value))

    def weights(self) -> list[np.ndarray]:
        """See `Network.weights`. The states of random generators are no weights: they differ at every opening."""
        return [keras.ops.convert_to_numpy(weight.value) for weight in self.model.weights]

    def _as_replacing(self, weights: Sequence[np.ndarray]) -> list[Tensor]:
        """See `Network._as_replacing`. They are arguments of each pass; the model's own variables are not touched."""
        values = self._runner.values()
        places = {id(variable): place for place, variable in enumerate(self._runner.variables)}
        for variable, weight in zip(self.model.weights, weights, strict=True):
            values[places[id(variable)]] = self._backend.tensor(weight)
        return values

    def _hashed(self) -> str:
        """JAX's arrays never change, so the same arrays have the same hash; elsewhere there is no sign to go by."""
        if self._backend.name != "jax":
            return super()._hashed()
        arrays = [weight.value for weight in self.model.weights]
        if self._hash is None or [id(ref()) for ref in self._hash[0]] != [id(array) for array in arrays]:
            self._hash = [weakref.ref(array) for array in arrays], super()._hashed()
        return self._hash[1]

    def _weight_places(self) -> dict[str, list[int]]:
        """See `Network._weight_places`."""
        numbers = {id(weight): number for number, weight in enumerate(self.model.weights)}
        return {
            path: [numbers[id(weight)] for weight in getattr(operation, "weights", ()) if id(weight) in numbers]
            for path, operation in self._runner.operations
            if kind_of(operation) != "model"
        }

    def _values(self) -> list[Tensor]:
        """The weights of a pass. Reading them takes a tenth of a small network's step."""
        replacing, block = self._replacing(), self._unchanging()
        if replacing is not None:
            return replacing
        if block is None:
            return self._runner.values()
        if block.values is None:
            block.values = self._runner.values()
        return block.values

    def _run(
        self,
        values: list[Tensor],
        x: Tensor,
        request: Pass,
        rules: Mapping[str, Rule],
        reductions: Mapping[str, Reduction],
    ) -> Record:
        """See `Run`; the weights are `values`."""
        size = (int(x.shape[1]), int(x.shape[2]))
        calls = self._calls_at(size)
        self._checked(request, rules, reductions, calls)
        taps = KerasTaps(calls, request, rules, reductions, x.shape[0])
        early = {path: rules[path] for path in request.replace_preactivations}
        folds = self._folds_at(size) if request.folded else []

        def switch(undo: ExitStack) -> None:
            scope = self._runner.enter_scope(undo, values, self._model.any_size(size))
            for change in self._head_patches if request.logits else ():
                patch(undo, *change)
            for path in request.preactivations:
                patch(undo, *without_nonlinearity(calls[path][0].operation))
            for path in request.replace_preactivations:
                patch(undo, *early_patch(path, calls[path][0], early))
            if request.precision == "bfloat16":
                in_bfloat16(undo, [self.model, *(op for _, op in self._runner.operations)])
            if request.folded:
                self._fold(undo, scope, folds, taps)
            taps.place(undo)

        returned = restored(switch, lambda _: unless_enough(lambda: self.model(self._entry.feed(x), training=False)))
        taps.check_fired(list(early))
        logits = None if returned is None else self._logits(self._runner.named_outputs(returned), x.shape[0])
        return Record(logits, taps.recorded)

    def _folds_at(self, size: tuple[int, int]) -> list[Fold]:
        """The norms that can be folded for images of a size."""
        if size not in self._folds:
            trace = self._graph_at(size).trace
            self._folds[size] = folds_of(trace.calls, trace.flow, list(trace.outputs.values()))
        return self._folds[size]

    def _fold(self, undo: ExitStack, scope: keras.StatelessScope, folds: Sequence[Fold], taps: KerasTaps) -> None:
        folds = [fold for fold in folds if id(fold.conv.operation) not in taps.operations]
        operations = [op for _, op in self._runner.operations]
        if self._backend.name == "tensorflow":
            first_in_blocks(undo, operations)
        norms_folded(undo, operations, folds, scope)

    def _can_leave_out(self, calls: Calls, path: str) -> bool:
        """See `TracedNetwork`. Patching an operation reaches all of its calls, so it must have only one."""
        operation = calls[path][0].operation

        def can() -> bool:
            return called_once(calls, operation) and (has_activation(operation) or kind_of(operation) == "activation")

        return exclusively(TRACING, can)  # another thread's pass may have patched it

    def _ends_in_nonlinearity(self, calls: Calls, path: str) -> bool:
        """See `TracedNetwork`."""
        operation = calls[path][0].operation
        # Another thread's pass may have patched it.
        return exclusively(TRACING, lambda: has_activation(operation) and called_once(calls, operation))

    def _can_compute_in(self, precision: str) -> bool:
        """See `TracedNetwork`."""
        return not any("float16" in name.replace("bfloat16", "") for name in self._policies())

    def _policies(self) -> set[str]:
        operations = [op for _, op in self._runner.operations]
        # Another thread's pass may compute in another precision.
        return exclusively(
            TRACING, lambda: {getattr(getattr(op, "_dtype_policy", None), "name", "float32") for op in operations}
        )

    @property
    def folds_norms(self) -> bool:
        """See `Network.folds_norms`."""
        return True

    def precision_for_ascent(self) -> str:
        """See `Network.precision_for_ascent`. A model with a policy of its own keeps it."""
        depthwise = any(
            "Depthwise" in type(op).__name__ or "Separable" in type(op).__name__ for _, op in self._runner.operations
        )
        return "bfloat16" if self._policies() <= {"float32"} and self._backend.bfloat16_pays(depthwise) else "float32"


def _own_operations() -> dict[str, object]:
    """The differences of `keras.ops` from NumPy on one of its backends."""
    kept = {name: _kept(getattr(keras.ops, name)) for name in ("sum", "max", "min", "prod")}
    return {**kept, "count_nonzero": _count_nonzero}


def _kept(reduction: Callable) -> Callable:
    """Keras on torch ignores `keepdims` where all axes are reduced."""

    def reduced(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
        everything = axis is None and keepdims
        return reduction(x, axis=tuple(range(len(x.shape))) if everything else axis, keepdims=keepdims)

    return reduced


def _count_nonzero(x: Tensor, axis: Axes = None) -> Tensor:
    """Keras' own turns axes round on torch."""
    return keras.ops.sum(keras.ops.cast(keras.ops.not_equal(x, 0), "int32"), axis=axis)
