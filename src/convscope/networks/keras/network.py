"""Keras 3 models on TensorFlow, JAX or torch: the tap mechanism, and what a look at a model tells.

A tap wraps an operation's `call` for the length of one pass. It reaches layers inside nested models, which graph
surgery does not, and leaves the user's model as it was. Every pass runs with `training=False` inside a
`keras.StatelessScope`, with the weights as arguments of the compiled function: constants would go stale, and a
layer that draws random numbers would leak its tracer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import keras
import numpy as np

from convscope.errors import ModelError, UsageError, nearest
from convscope.networks import preprocessing as pp
from convscope.networks.backends import Tensor, backend_named
from convscope.networks.failing import failing_layer, said
from convscope.networks.graph import (
    Call,
    Flow,
    Value,
    bends_at,
    flat_outputs,
    layers_of,
    linear_by_graph,
    mark_layouts,
    paths_of,
    undoable_head,
)
from convscope.networks.head import Head, HeadActivation, HeadChoice
from convscope.networks.inputs import Inputs
from convscope.networks.keras.folds import Fold, first_in_blocks, folds_of, norms_folded
from convscope.networks.keras.graph import (
    Observer,
    call_method,
    first_norm,
    is_wrapped,
    kind_of,
    named_operations,
    patch,
    python_call,
)
from convscope.networks.keras.inputs import Entry
from convscope.networks.keras.state import keep_state
from convscope.networks.layers import Layer
from convscope.networks.network import Network, Source
from convscope.networks.ops import namespace
from convscope.networks.passes import Record, Recording, Rule, as_recording
from convscope.networks.restoring import checkpoint, restored


class _Enough(BaseException):
    """Every tap has spoken: the rest of the network need not run. Not an Exception, so that no layer catches it."""


# Tracing patches layers, and two models may share a layer: one pass at a time in the whole process.
TRACING = threading.RLock()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one traced pass showed: its calls, what the model was given (the picture among it) and returned."""

    calls: list[Call]
    flow: Flow
    given: list[Value]
    picture: Value
    outputs: dict[str, Value]


class KerasNetwork(Network):
    """A Keras 3 model, opened.

    Args:
        model: any `keras.Model`; it stays as it is.
        source: where it came from.
        input: name of the input that gets the picture, where there are several.
        output: name of the output that is explained, where there are several.
        size: `(h, w)` to bring pictures to, for a model of free size; needed for one never built.
        feed: values for the other inputs, by name: `(1, ...)` arrays; zeros where nothing is given.
        preprocess: None to find out, or a `Preprocessing`.
        class_names: one for each class.
        family: what is known of where the model came from (`keras:NAME`).
        head: "linear", "softmax" or "sigmoid" if the outputs are so and convscope could not find it out.

    Raises:
        ModelError: the model takes no pictures or can't be run; UsageError: no such input, output or size.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        *,
        input: str | None = None,
        output: str | None = None,
        size: tuple[int, int] | None = None,
        feed: Mapping[str, np.ndarray] | None = None,
        preprocess: pp.Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        family: pp.Family | None = None,
        head: HeadChoice | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = model.name
        self.source = source
        self.ops = namespace(keras.ops, _own_operations())
        self._backend = backend_named(keras.backend.backend())
        self.framework = f"keras {keras.__version__}"
        self.backend = f"{self._backend.name} {self._backend.version}"
        self.output, self.outputs = output or "", ()
        self._operations = named_operations(model)
        self._wrapped = [op for op in [model, *(op for _, op in self._operations)] if is_wrapped(op)]
        known: tuple[pp.Family | None, str] = (family, model.name) if family else self._family_by_name()
        self.family, self.family_name = known
        self._entry = Entry(model, input, size, feed or {}, self.family)
        self.inputs = self._entry.inputs
        self._head_patch: tuple[Any, str, Any] | None = None
        self._variables: list[Any] | None = None
        self._hash: tuple[list[weakref.ref], str] | None = None
        self._calls: dict[tuple[int, int], dict[str, tuple[Call, int]]] = {}
        self._folds: dict[tuple[int, int], list[Fold]] = {}
        self._observations: dict[tuple[int, int], tuple[Layer, ...]] = {}
        first = self._look()
        self.preprocessing = preprocess or self._find_preprocessing(first)
        self.head = self._find_head(first, head)
        self.class_names = None if class_names is None else self.checked_names(class_names)

    # taps ------------------------------------------------------------------------------------------

    def compile(self, function: Callable) -> Callable:
        """See `Network.compile`. The weights are read anew at each call."""

        def traced(values: list[Tensor], *tensors: Tensor) -> Any:
            def run(x: Tensor, **options: Any) -> Record:
                return self._run(values, x, **options)

            return function(run, *tensors)

        compiled = self._backend.compile(traced)

        def call(*tensors: Tensor) -> Any:
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
        return failing_layer(error, paths, _OWN)

    def _switch(self, undo: ExitStack) -> None:
        """What Keras and the backend remember of calls is put back, also where one is left in the middle."""
        keep_state(undo)
        self._backend.keep_state(undo)

    def value_and_grad(self, function: Callable) -> Callable:
        """See `Network.value_and_grad`."""
        return self._backend.value_and_grad(function)

    def positive_gradient(self, x: Tensor) -> Tensor:
        """See `Network.positive_gradient`."""
        return self._backend.positive_gradient(x)

    def tensor(self, array: np.ndarray) -> Tensor:
        """See `Network.tensor`."""
        return self._backend.tensor(array)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """See `Network.numpy`."""
        return self._backend.numpy(tensor)

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
        """What a pass computes with. Reading the weights takes a tenth of a small network's step."""
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
        record: Recording = (),
        rules: Mapping[str, Rule] | None = None,
        outputs: bool = True,
        undone: bool = True,
        linear: Sequence[str] = (),
        before: Mapping[str, Rule] | None = None,
        precision: str = "float32",
        folded: bool = False,
    ) -> Record:
        """One pass of pictures `x` `(n, h, w, c)` with taps; see `Network.compile`."""
        size = (int(x.shape[1]), int(x.shape[2]))
        calls = self._taps_at(size)
        taps = _Taps(calls, record, rules or {}, stop=not outputs)
        early = dict(before or {})

        def switch(undo: ExitStack) -> None:
            scope = self._enter_scope(undo, values, size)
            if undone and self._head_patch is not None:
                patch(undo, *self._head_patch)
            for path in linear:
                patch(undo, *_linear_patch(calls[path][0].operation))
            for path in tuple(early):
                patch(undo, *_early_patch(path, calls[path][0], early))
            if precision == "bfloat16":
                _in_bfloat16(undo, [self.model, *(op for _, op in self._operations)])
            if folded:
                self._fold(undo, scope, size, taps)
            taps.place(undo)

        returned = restored(switch, lambda _: self._unless_enough(x))
        taps.check_fired(early)
        logits = None if returned is None else self._logits(returned)
        return Record(logits, taps.recorded)

    def _unless_enough(self, x: Tensor) -> Any:
        """What the model returns, None where every tap spoke before its end."""
        try:
            return self.model(self._entry.feed(x), training=False)
        except _Enough:
            return None

    def _fold(self, undo: ExitStack, scope: keras.StatelessScope, size: tuple[int, int], taps: _Taps) -> None:
        folds = [fold for fold in self._folds[size] if id(fold.conv.operation) not in taps.operations]
        operations = [op for _, op in self._operations]
        if self._backend.name == "tensorflow":
            first_in_blocks(undo, operations)
        norms_folded(undo, operations, folds, scope)

    def _enter_scope(self, undo: ExitStack, values: list[Tensor], size: tuple[int, int]) -> keras.StatelessScope:
        """The weights stand for `values`; where `size` is not the model's own, its check of the size is silent."""
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

    def _taps_at(self, size: tuple[int, int]) -> dict[str, tuple[Call, int]]:
        self.layers_at(size)
        return self._calls[size]

    def _logits(self, returned: Any) -> Tensor:
        outputs = keras.ops.cast(_named_outputs(self.model, returned)[self.output], "float32")
        return self.head.logits(self.ops, keras.ops.reshape(outputs, (-1, int(np.prod(outputs.shape[1:])))))

    # a first look ----------------------------------------------------------------------------------

    def _look(self) -> _Seen:
        """Trace the model once: its outputs, its layers, and whether it runs at all."""
        seen = self._observe(self.inputs.size)
        self.outputs = tuple(seen.outputs)
        self.output = self._chosen_output(seen)
        self.layers = self._remember(self.inputs.size, seen)
        return seen

    def _chosen_output(self, seen: _Seen) -> str:
        """The output that was asked for, else the first that ends in softmax or sigmoid, else the first."""
        if self.output:
            if self.output not in seen.outputs:
                raise UsageError(f"no output {self.output!r}; {nearest(self.output, seen.outputs)}")
            return self.output
        heads = [name for name, output in seen.outputs.items() if undoable_head(seen.flow, output)]
        return [*heads, *seen.outputs][0]

    def _observe(self, size: tuple[int, int]) -> _Seen:
        """The calls of one pass at `size`."""
        x = np.zeros((1, *size, self.inputs.channels), np.float32)
        observer = Observer(self._operations)
        given: list[Value] = []
        outputs: dict[str, Value] = {}

        def pass_through(values: list[Tensor], x: Tensor) -> Any:
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
                raise ModelError(_cant_run(self.name, size, self.inputs, reason)) from error
        # JAX runs a picture that is too small all the same, on maps without a cell.
        observer.forget()
        empty = [call.path for call in observer.calls for _, value in call.outputs if 0 in value.shape[1:]]
        if empty and size == self.inputs.size:
            raise ModelError(_cant_run(self.name, size, self.inputs, f"nothing is left of it at {empty[0]}"))
        mark_layouts(observer.calls, self._entry.channels_first)
        return _Seen(observer.calls, Flow(observer.calls), given, given[self._entry.position], outputs)

    def _remember(self, size: tuple[int, int], seen: _Seen) -> tuple[Layer, ...]:
        """Keep the layers of a pass and the calls that taps are placed at."""
        paths = paths_of(seen.calls)
        output = seen.outputs.get(self.output)
        on_path = None if output is None else seen.flow.between(seen.given, seen.picture, output)
        self._calls[size] = paths
        self._folds[size] = folds_of(seen.calls, seen.flow, list(seen.outputs.values()))
        self._observations[size] = layers_of(paths, seen.flow, on_path)  # last: it says that all is there
        return self._observations[size]

    def _find_head(self, seen: _Seen, asked: HeadChoice | None) -> Head:
        """What the graph tells of the output, else what its values do; as the user says, where they say."""
        output = seen.outputs[self.output]
        units = int(np.prod(output.shape[1:]))
        if int(np.prod(output.shape[1:-1])) != 1:
            return Head(units, spatial=True)
        found = self._undoable_head(seen, output)
        if found is not None and asked != "linear":
            activation, call = found
            self._head_patch = _linear_patch(call.operation)
            return Head(units, activation, undone=call.path)
        if asked is not None:
            return Head(units, None if asked == "linear" else asked)
        if linear_by_graph(seen.flow, output):
            return Head(units)
        return Head(units, self._activation_by_values(units), guess=True)

    def _undoable_head(self, seen: _Seen, output: Value) -> tuple[HeadActivation, Call] | None:
        """The head that can be undone: patching an operation reaches all of its calls, so it must have only one."""
        found = undoable_head(seen.flow, output)
        once = found is not None and sum(call.operation is found[1].operation for call in seen.calls) == 1
        return found if once else None

    def linearisable(self, path: str) -> tuple[str, ...]:
        """See `Network.linearisable`. Patching an operation reaches all of its calls, so it must have only one."""
        calls = self._taps_at(self.inputs.size)
        bends = bends_at(calls, path)
        return tuple(bends) if all(self._can_linearise(bend, calls) for bend in bends) else ()

    def _can_linearise(self, path: str, calls: dict[str, tuple[Call, int]]) -> bool:
        operation = calls[path][0].operation
        once = sum(call.operation is operation for call in {id(call): call for call, _ in calls.values()}.values()) == 1
        return once and (_has_activation(operation) or (kind_of(operation) == "activation"))

    def precision_for_ascent(self) -> str:
        """See `Network.precision_for_ascent`. A model with a policy of its own keeps it."""
        policies = {getattr(getattr(op, "_dtype_policy", None), "name", "float32") for _, op in self._operations}
        depthwise = any(
            "Depthwise" in type(op).__name__ or "Separable" in type(op).__name__ for _, op in self._operations
        )
        return "bfloat16" if policies <= {"float32"} and self._backend.bfloat16_pays(depthwise) else "float32"

    def layers_at(self, size: tuple[int, int]) -> tuple[Layer, ...]:
        """See `Network.layers_at`."""
        if size not in self._observations:
            seen = self._observe(size)
            self._remember(size, seen)
        return self._observations[size]

    def _activation_by_values(self, units: int) -> HeadActivation | None:
        """Whether outputs that no known layer made are probabilities, from what noise, black and white give."""
        shape = (*self.inputs.size, self.inputs.channels)
        noise = np.random.default_rng(0).uniform(0, 255, (4, *shape))
        pixels = np.concatenate([noise, np.zeros((1, *shape)), np.full((1, *shape), 255)])
        self.head = Head(units)
        values = self.forward(self.preprocessing.apply(pixels.astype(np.float32)))[0]
        self._programs.clear()  # that program knew no head
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            return None
        sums_to_one = units > 1 and np.abs(values.sum(axis=-1) - 1).max() < 1e-3
        return "softmax" if sums_to_one else "sigmoid"

    def _find_preprocessing(self, seen: _Seen) -> pp.Preprocessing:
        """What the model tells of the pixels it was trained on, else a guess that says it is one."""
        inside = _scaling_inside([step.operation for step in seen.flow.first_steps(seen.picture)])
        if inside is not None:
            return inside
        if self.family is not None and self.source.name.startswith("keras:"):
            return pp.PRESETS[self.family.preset].because(pp.FOUND, "as keras.applications does for this model")
        if self.family is not None:
            reason = f"as keras.applications does for {self.family_name!r}, which this model has by its name"
            return pp.PRESETS[self.family.preset].because(pp.GUESS, reason)
        reason = "most networks trained from scratch take 0..1; set --preprocess if yours does not"
        norm = first_norm(seen.calls, seen.flow)
        told = _told_by_statistics(*norm) if norm else None
        return told or pp.PRESETS["0..1"].because(pp.GUESS, reason)

    def _family_by_name(self) -> tuple[pp.Family | None, str]:
        names = [self.model.name] + [op.name for _, op in self._operations if kind_of(op) == "model"]
        return next(((pp.family_of(name), name) for name in names if pp.family_of(name)), (None, ""))


class _Taps:
    """Wraps the calls of the tapped operations for one pass: records outputs and applies rules."""

    def __init__(
        self,
        paths: dict[str, tuple[Call, int]],
        record: Recording,
        rules: Mapping[str, Rule],
        stop: bool,
    ) -> None:
        self._record, self._rules = as_recording(record), dict(rules)
        self._at = {path: paths[path] for path in {*self._record, *self._rules}}
        self.operations = {id(call.operation) for call, _ in self._at.values()}
        self._left = set(self._at)
        self._stop = stop
        self.recorded: dict[str, Any] = {}

    def place(self, undo: ExitStack) -> None:
        """Tap, until `undo` is run."""
        by_operation: dict[int, list[tuple[str, Call, int]]] = {}
        for path, (call, index) in self._at.items():
            by_operation.setdefault(id(call.operation), []).append((path, call, index))
        for taps in by_operation.values():
            operation = taps[0][1].operation
            method = call_method(operation)
            patch(undo, operation, method, self._tapped(operation, method, taps))

    def check_fired(self, early: Iterable[str] = ()) -> None:
        """A tap that did not fire would show an old picture or none: say so loudly. `early` are rules that are left."""
        left = {*self._left, *early}
        if left:
            raise ModelError(
                f"the layer{'s' if len(left) > 1 else ''} {', '.join(sorted(left))} did not run when the "
                "model was called, so there is nothing to show. Expected the calls seen when the model was opened; "
                "a model whose path depends on its input can't be tapped there."
            )

    def _tapped(self, operation: Any, method: str, taps: list[tuple[str, Call, int]]) -> Callable:
        original, calls = python_call(operation, method), 0

        def tapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            checkpoint()
            result = original(*args, **kwargs)
            for path, call, index in taps:
                if call.nth == calls:
                    result = self._touch(path, call, index, result)
            calls += 1
            if self._stop and not self._left:
                raise _Enough
            return result

        return tapped

    def _touch(self, path: str, call: Call, index: int, result: Any) -> Any:
        (_, tensor), self._left = flat_outputs(result)[index], self._left - {path}
        activation = _channels_last(tensor, bool(call.channels_first))
        if path in self._rules:
            activation = self._rules[path](activation)
            replaced = keras.ops.cast(_channels_back(activation, bool(call.channels_first)), tensor.dtype)
            result = keras.tree.map_structure(lambda item: replaced if item is tensor else item, result)
        if path in self._record:
            self.recorded[path] = self._record[path](activation)
        return result


def _own_operations() -> dict[str, Any]:
    """What is not NumPy's in `keras.ops` on one of its backends."""
    kept = {name: _kept(getattr(keras.ops, name)) for name in ("sum", "max", "min", "prod")}
    return {**kept, "count_nonzero": _count_nonzero}


def _kept(reduction: Any) -> Any:
    """Keras on torch ignores `keepdims` where all axes are reduced."""

    def reduced(x: Tensor, axis: Any = None, keepdims: bool = False) -> Tensor:
        everything = axis is None and keepdims
        return reduction(x, axis=tuple(range(len(x.shape))) if everything else axis, keepdims=keepdims)

    return reduced


def _count_nonzero(x: Tensor, axis: Any = None) -> Tensor:
    """Keras' own turns axes round on torch."""
    return keras.ops.sum(keras.ops.cast(keras.ops.not_equal(x, 0), "int32"), axis=axis)


def _channels_last(tensor: Tensor, channels_first: bool) -> Tensor:
    """A map with its channels last, float32."""
    if channels_first and len(tensor.shape) == 4:
        tensor = keras.ops.transpose(tensor, (0, 2, 3, 1))
    return keras.ops.cast(tensor, "float32")


def _channels_back(tensor: Tensor, channels_first: bool) -> Tensor:
    return keras.ops.transpose(tensor, (0, 3, 1, 2)) if channels_first and len(tensor.shape) == 4 else tensor


def _has_activation(operation: Any) -> bool:
    activation = getattr(operation, "activation", None)
    return callable(activation) and activation is not keras.activations.linear


def _linear_patch(operation: Any) -> tuple[Any, str, Any]:
    """What to patch so that an operation has no non-linearity: its activation, or its whole call."""
    if callable(getattr(operation, "activation", None)):
        return operation, "activation", keras.activations.linear
    return operation, call_method(operation), lambda x, *_, **__: x


def _early_patch(path: str, call: Call, early: dict[str, Rule]) -> tuple[Any, str, Any]:
    """What to patch so that an operation's activation is given what its rule makes of its argument; it fires once."""
    original, first = call.operation.activation, bool(call.channels_first)

    def activation(x: Tensor) -> Tensor:
        changed = _by_rule(early.pop(path), x, first)
        return original(keras.ops.cast(_channels_back(changed, first), x.dtype))

    return call.operation, "activation", activation


def _by_rule(rule: Rule, x: Tensor, channels_first: bool) -> Tensor:
    return rule(_channels_last(x, channels_first))


# Functions that layers call while they are tapped.
_OWN = {function.__code__ for function in (_Taps._touch, _by_rule, Observer._call)}


def _in_bfloat16(undo: ExitStack, operations: Sequence[Any]) -> None:
    """Layers that compute in float32 compute in bfloat16; their weights stay as they are."""
    policy = keras.DTypePolicy("mixed_bfloat16")
    for operation in operations:
        if getattr(getattr(operation, "_dtype_policy", None), "name", None) == "float32":
            patch(undo, operation, "_dtype_policy", policy)


def _named_outputs(model: Any, returned: Any) -> dict[str, Tensor]:
    """What the model returned, by the names that a user would choose from."""
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
    advice = "If that is too small for it, give a larger size (--input-size). " if inputs.free else ""
    return (
        f"{name} can't be run on a picture of {size[0]}x{size[1]} pixels with {channels} ({reason}). "
        f"{advice}--debug shows the whole story."
    )


# -- preprocessing that the model itself tells of --------------------------------------------------------

_ARITHMETIC = ("TrueDivide", "Divide", "Multiply", "Subtract", "Add")


def _scaling_inside(steps: list[Any]) -> pp.Preprocessing | None:
    """What the first operations tell of the pixels that they take: 0..255, or 0..1; None if they scale nothing."""
    known = [step for step in steps if type(step).__name__ in ("Rescaling", "Normalization")]
    other = [step for step in steps if type(step).__name__ in _ARITHMETIC]
    if known and not other:
        factor = float(np.prod([_factor(step) for step in known]))
        name = pp.range_before_scaling(factor)
        return pp.PRESETS[name].because(pp.FOUND, f"the model scales its own input in {known[0].name}")
    if known or other:
        reason = f"the model does arithmetic on its own input in {(other or known)[0].name}"
        return pp.PRESETS["none"].because(pp.GUESS, reason)
    return None


def _factor(step: Any) -> float:
    """What a `Rescaling` or `Normalization` layer multiplies its input by, the mean over channels."""
    if hasattr(step, "scale"):
        return float(np.mean(step.scale))
    deviation = np.sqrt(keras.ops.convert_to_numpy(step.variance))
    return float(np.mean(deviation if step.invert else 1 / np.maximum(deviation, 1e-12)))


def _told_by_statistics(conv: Any, norm: Any) -> pp.Preprocessing | None:
    """What the running statistics of a batch norm right after the first convolution tell."""
    kernel, mean, variance = map(keras.ops.convert_to_numpy, (conv.kernel, norm.moving_mean, norm.moving_variance))
    bias = keras.ops.convert_to_numpy(conv.bias) if conv.use_bias else np.zeros_like(mean)
    seen = pp.seen_by_batch_norm(kernel, bias, mean, variance)
    return pp.guess_from_statistics(*seen) if seen else None
