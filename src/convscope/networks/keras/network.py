"""Keras 3 models on TensorFlow, JAX or torch: the tap mechanism, and the inspection of a model.

A tap wraps an operation's `call` for the length of one pass. It reaches layers inside nested models, which graph
surgery does not, and leaves the user's model as it was. Every pass runs with `training=False` inside a
`keras.StatelessScope`, with the weights as arguments of the compiled function: constants would go stale, and a
layer that draws random numbers would leak its tracer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from textwrap import shorten

import keras
import numpy as np

from convscope.errors import ModelError, UsageError, option
from convscope.networks import preprocessing as pp
from convscope.networks.backends import backend_named
from convscope.networks.choices import Choices
from convscope.networks.failing import failing_layer, said
from convscope.networks.foreign import KerasLayer, KerasModel, Structure, Tensor
from convscope.networks.graph import Flow, Value, flat_outputs, mark_layouts
from convscope.networks.head import Head, HeadActivation, HeadChoice
from convscope.networks.heads import Habits, activation_by_values, head_of
from convscope.networks.inputs import Inputs
from convscope.networks.keras.folds import Fold, first_in_blocks, folds_of, norms_folded
from convscope.networks.keras.graph import (
    Observer,
    call_method,
    is_wrapped,
    kind_of,
    named_operations,
    patch,
    python_call,
)
from convscope.networks.keras.inputs import Entry
from convscope.networks.keras.scaling import Kinship, preprocessing_of
from convscope.networks.keras.state import keep_state
from convscope.networks.keras.taps import (
    OWN_CODE,
    KerasTaps,
    called_once,
    early_patch,
    has_activation,
    in_bfloat16,
    without_nonlinearity,
)
from convscope.networks.network import Source
from convscope.networks.ops import Axes, namespace
from convscope.networks.passes import PLAIN, Pass, Record, Reduction, Rule
from convscope.networks.restoring import restored
from convscope.networks.trace import Calls, Graph, Trace
from convscope.networks.traced import Enough, TracedNetwork

# Tracing patches layers, and two models may share a layer: one pass at a time in the whole process.
TRACING = threading.RLock()
_NO_CHOICES = Choices()
HABITS = Habits(channels_first=False, returns_logits=False, leaves_out_calls=False)


class KerasNetwork(TracedNetwork):
    """A Keras 3 model, opened.

    Args:
        model: any `keras.Model`; it stays as it is.
        source: where it came from.
        choices: the user's options for it.
        family: the collection that the model came from (`keras:NAME`), if known.

    Raises:
        ModelError: the model takes no images or can't be run; UsageError: no such input, output or size.
    """

    def __init__(
        self,
        model: KerasModel,
        source: Source,
        choices: Choices = _NO_CHOICES,
        family: pp.Family | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = model.name
        self.source = source
        self.ops = namespace(keras.ops, _own_operations())
        self._backend = backend_named(keras.backend.backend())
        self.framework = f"keras {keras.__version__}"
        self.backend = f"{self._backend.name} {self._backend.version}"
        self.output, self.outputs = choices.output or "", ()
        self._operations = named_operations(model)
        with TRACING:  # another network that shares layers may be patching them
            self._wrapped = [op for op in [model, *(op for _, op in self._operations)] if is_wrapped(op)]
        kinship = Kinship(family, model.name, source.name.startswith("keras:")) if family else self._by_name()
        self.family = None if kinship is None else kinship.family
        self._entry = Entry(model, choices.input, choices.size, choices.feed, self.family)
        self.inputs = self._entry.inputs
        self._head_patch: tuple[KerasLayer, str, object] | None = None
        self._variables: list[object] | None = None
        self._hash: tuple[list[weakref.ref], str] | None = None
        self._folds: dict[tuple[int, int], list[Fold]] = {}
        first = self._take(self._trace(self.inputs.size))
        self.preprocessing = choices.preprocess or preprocessing_of(first, kinship)
        self.head = self._find_head(first, choices.head)
        self.class_names = None if choices.class_names is None else self.checked_names(choices.class_names)

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
            try:
                return restored(self._switch, lambda _: compiled(self._values(), *tensors), TRACING)
            except Exception as error:
                problem = self.explained(error)
                if problem is None:
                    raise
                raise problem from error

        return call

    def _failing_layer(self, error: BaseException) -> str | None:
        paths = {id(self.model): "", **{id(operation): path for path, operation in self._operations}}
        return failing_layer(error, paths, OWN_CODE)

    def _switch(self, undo: ExitStack) -> None:
        """Restore the state of calls in Keras and the backend, also where a call is left in the middle."""
        keep_state(undo)
        self._backend.keep_state(undo)

    def weights(self) -> list[np.ndarray]:
        """See `Network.weights`. The states of random generators are no weights: they differ at every opening."""
        return [keras.ops.convert_to_numpy(weight.value) for weight in self.model.weights]

    def _as_replacing(self, weights: Sequence[np.ndarray]) -> list[Tensor]:
        """See `Network._as_replacing`. They are arguments of each pass; the model's own variables are not touched."""
        values = self._read()
        places = {id(variable): place for place, variable in enumerate(self._variables or [])}
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
            for path, operation in self._operations
            if kind_of(operation) != "model"
        }

    def _values(self) -> list[Tensor]:
        """The weights of a pass. Reading them takes a tenth of a small network's step."""
        replacing, block = self._replacing(), self._unchanging()
        if replacing is not None:
            return replacing
        if block is None:
            return self._read()
        if block.values is None:
            block.values = self._read()
        return block.values

    def _read(self) -> list[Tensor]:
        if self._variables is None:
            self._variables = list(self.model.variables)
        return [self._backend.value(variable) for variable in self._variables]

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

        def switch(undo: ExitStack) -> None:
            scope = self._enter_scope(undo, values, size)
            if request.logits and self._head_patch is not None:
                patch(undo, *self._head_patch)
            for path in request.preactivations:
                patch(undo, *without_nonlinearity(calls[path][0].operation))
            for path in request.replace_preactivations:
                patch(undo, *early_patch(path, calls[path][0], early))
            if request.precision == "bfloat16":
                in_bfloat16(undo, [self.model, *(op for _, op in self._operations)])
            if request.folded:
                self._fold(undo, scope, size, taps)
            taps.place(undo)

        returned = restored(switch, lambda _: self._unless_enough(x))
        taps.check_fired(list(early))
        logits = None if returned is None else self._logits(returned, x.shape[0])
        return Record(logits, taps.recorded)

    def _unless_enough(self, x: Tensor) -> Structure:
        """The model's output, None where every tap fired before its end."""
        try:
            return self.model(self._entry.feed(x), training=False)
        except Enough:
            return None

    def _fold(self, undo: ExitStack, scope: keras.StatelessScope, size: tuple[int, int], taps: KerasTaps) -> None:
        folds = [fold for fold in self._folds[size] if id(fold.conv.operation) not in taps.operations]
        operations = [op for _, op in self._operations]
        if self._backend.name == "tensorflow":
            first_in_blocks(undo, operations)
        norms_folded(undo, operations, folds, scope)

    def _enter_scope(self, undo: ExitStack, values: list[Tensor], size: tuple[int, int]) -> keras.StatelessScope:
        """The weights are replaced by `values`; where `size` is not the model's own, its check of the size is off."""
        state = list(zip(self._variables or [], values, strict=True))
        scope = undo.enter_context(keras.StatelessScope(state_mapping=state))
        if size != self.inputs.size and not self.inputs.free:
            models = [op for _, op in self._operations if hasattr(op, "operations")]
            for model in [self.model, getattr(self.model, "_functional", None), *models]:
                if model is not None:
                    patch(undo, model, "_assert_input_compatibility", lambda *_: None)
        for operation in self._wrapped:
            method = call_method(operation)
            patch(undo, operation, method, python_call(operation, method))
        return scope

    def _logits(self, returned: Structure, images: int | None) -> Tensor:
        outputs = keras.ops.cast(_named_outputs(self.model, returned)[self.output], "float32")
        self._check_output(outputs.shape, images)
        return self.head.logits(self.ops, keras.ops.reshape(outputs, (-1, int(np.prod(outputs.shape[1:])))))

    # inspection ------------------------------------------------------------------------------------

    def _trace(self, size: tuple[int, int]) -> Trace:
        """See `TracedNetwork._trace`."""
        x = np.zeros((1, *size, self.inputs.channels), np.float32)
        observer = Observer(self._operations)
        given: list[Value] = []
        outputs: dict[str, Value] = {}

        def pass_through(values: list[Tensor], x: Tensor) -> object:
            observer.calls.clear()
            fed = self._entry.feed(x)
            given[:] = map(observer.value, keras.tree.flatten(fed))

            def switch(undo: ExitStack) -> None:
                self._enter_scope(undo, values, size)
                observer.place(undo)

            returned = _named_outputs(self.model, restored(switch, lambda _: self.model(fed, training=False)))
            outputs.update({name: observer.value(output) for name, output in returned.items()})
            return [keras.ops.sum(output) for output in returned.values()]

        try:
            restored(self._switch, lambda _: self._entry.build(self.model, x), TRACING)
            restored(self._switch, lambda _: self._backend.observe(pass_through, self._values(), x), TRACING)
        except UsageError:
            raise
        except Exception as error:
            # At a size that is not the model's own, the layers before a dense one run all the same.
            if size == self.inputs.size or not observer.calls:
                reason = said(error, self._failing_layer(error))
                raise ModelError(_cant_run(self.name, size, self.inputs, reason), code="model-not-runnable") from error
        # JAX runs an image that is too small all the same, on maps without a cell.
        observer.forget()
        empty = [call.path for call in observer.calls for _, value in call.outputs if 0 in value.shape[1:]]
        if empty and size == self.inputs.size:
            raise ModelError(
                _cant_run(self.name, size, self.inputs, f"nothing is left of it at {empty[0]}"),
                code="model-not-runnable",
            )
        mark_layouts(observer.calls, self._entry.channels_first)
        return Trace(observer.calls, Flow(observer.calls), given, given[self._entry.position], outputs)

    def _remember(self, size: tuple[int, int], trace: Trace) -> Graph:
        """See `TracedNetwork._remember`; the norms that can be folded are kept too."""
        self._folds[size] = folds_of(trace.calls, trace.flow, list(trace.outputs.values()))
        return super()._remember(size, trace)

    def _find_head(self, graph: Graph, asked: HeadChoice | None) -> Head:
        """The head from the user's options, else from the graph, else from the output's values."""
        head = head_of(graph, asked, HABITS)
        if head is None:
            units = int(np.prod(graph.value.shape[1:]))
            head = Head(units, self._activation_by_values(units), guess=True)
        if head.undone is not None:
            self._head_patch = without_nonlinearity(graph.calls[head.undone][0].operation)
        return head

    def _can_leave_out(self, calls: Calls, path: str) -> bool:
        """See `TracedNetwork`. Patching an operation reaches all of its calls, so it must have only one."""
        operation = calls[path][0].operation
        with TRACING:  # another thread's pass may have patched it
            return called_once(calls, operation) and (has_activation(operation) or kind_of(operation) == "activation")

    def _ends_in_nonlinearity(self, calls: Calls, path: str) -> bool:
        """See `TracedNetwork`."""
        operation = calls[path][0].operation
        with TRACING:  # another thread's pass may have patched it
            return has_activation(operation) and called_once(calls, operation)

    def _can_compute_in(self, precision: str) -> bool:
        """See `TracedNetwork`."""
        return not any("float16" in name.replace("bfloat16", "") for name in self._policies())

    def _policies(self) -> set[str]:
        with TRACING:  # another thread's pass may compute in another precision
            return {getattr(getattr(op, "_dtype_policy", None), "name", "float32") for _, op in self._operations}

    @property
    def folds_norms(self) -> bool:
        """See `Network.folds_norms`."""
        return True

    def precision_for_ascent(self) -> str:
        """See `Network.precision_for_ascent`. A model with a policy of its own keeps it."""
        depthwise = any(
            "Depthwise" in type(op).__name__ or "Separable" in type(op).__name__ for _, op in self._operations
        )
        return "bfloat16" if self._policies() <= {"float32"} and self._backend.bfloat16_pays(depthwise) else "float32"

    def _activation_by_values(self, units: int) -> HeadActivation | None:
        """Whether outputs that no known layer made are probabilities, from the outputs for noise, black and white."""
        shape = (*self.inputs.size, self.inputs.channels)
        noise = np.random.default_rng(0).uniform(0, 255, (4, *shape))
        pixels = np.concatenate([noise, np.zeros((1, *shape)), np.full((1, *shape), 255)])
        self.head = Head(units)
        values = self.forward(self.preprocessing.apply(pixels.astype(np.float32)))[0]
        self._programs.clear()  # that program knew no head
        return activation_by_values(values)

    def _by_name(self) -> Kinship | None:
        names = [self.model.name] + [op.name for _, op in self._operations if kind_of(op) == "model"]
        certain = self.source.name.startswith("keras:")
        found = [(pp.family_of(name), name) for name in names]
        return next((Kinship(family, name, certain) for family, name in found if family), None)


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


def _named_outputs(model: KerasModel, returned: Structure) -> dict[str, Tensor]:
    """The model's outputs, by the names that a user can choose from."""
    if isinstance(returned, Mapping):
        return dict(returned)
    tensors = [tensor for _, tensor in flat_outputs(returned)]
    names = list(getattr(model, "output_names", None) or [])
    if len(names) != len(tensors) or len(set(names)) != len(names):
        names = [f"output_{index}" for index in range(len(tensors))]
    return dict(zip(names, tensors, strict=True))


def _cant_run(name: str, size: tuple[int, int], inputs: Inputs, reason: str) -> str:
    channels = "1 channel" if inputs.channels == 1 else f"{inputs.channels} channels"
    reason = shorten(reason, 160, placeholder=" …").rstrip(".")
    advice = (
        f"If that is too small for it, give a larger size with {option('open_model.size')}. " if inputs.free else ""
    )
    return (
        f"{name} can't be run on an image of {size[0]}x{size[1]} pixels with {channels} ({reason}). "
        f"{advice}Call it yourself on an array of that shape to see the whole error."
    )
