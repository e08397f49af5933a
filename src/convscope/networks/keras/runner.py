"""A Keras model as passes run it, with everything restored after; and the record of a watched run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack

import keras
import numpy as np

from convscope.errors import ModelError, UsageError, option
from convscope.networks.attributes import is_of, keep_attributes
from convscope.networks.backends import backend_named
from convscope.networks.failing import cant_run, failing_layer, said
from convscope.networks.foreign import KerasModel, KerasVariable, Structure, Tensor
from convscope.networks.graph import Flow, Value, flat_outputs, mark_layouts
from convscope.networks.keras.graph import Observer, call_method, is_wrapped, named_operations, patch, python_call
from convscope.networks.keras.inputs import Entry
from convscope.networks.keras.state import OF_KERAS, keep_state
from convscope.networks.keras.taps import OWN_CODE
from convscope.networks.network import Source
from convscope.networks.restoring import exclusively, restored
from convscope.networks.trace import Trace

# Tracing patches layers, and two models may share a layer: one pass at a time in the whole process.
TRACING = threading.RLock()


class Runner:
    """Runs a model with given weights in a `keras.StatelessScope`.

    Args:
        model: any `keras.Model`; it stays as it is.
    """

    def __init__(self, model: KerasModel) -> None:
        self.model = model
        self.backend = backend_named(keras.backend.backend())
        self.operations = named_operations(model)
        every = [model, *(op for _, op in self.operations)]
        # Another network that shares layers may be patching them.
        self._wrapped = exclusively(TRACING, lambda: [op for op in every if is_wrapped(op)])
        self._read: list[KerasVariable] | None = None

    @property
    def variables(self) -> list[KerasVariable]:
        """All that passes read; a model that was never called has them after its first run only."""
        if self._read is None:
            self._read = list(self.model.variables)
        return self._read

    def values(self) -> list[Tensor]:
        """The present values of `variables`."""
        return [self.backend.value(variable) for variable in self.variables]

    def switch(self, undo: ExitStack) -> None:
        """Restore the state of calls in Keras and the backend, also where a call is left in the middle."""
        keep_state(undo)
        every = [self.model, *(operation for _, operation in self.operations)]
        keep_attributes(undo, [part for part in every if not is_of(part, "keras", "tensorflow", "convscope")], OF_KERAS)
        self.backend.keep_state(undo)

    def enter_scope(self, undo: ExitStack, values: list[Tensor], any_size: bool) -> keras.StatelessScope:
        """The weights are replaced by `values`; with `any_size` the model's check of the image's size is off."""
        state = list(zip(self.variables, values, strict=True))
        scope = undo.enter_context(keras.StatelessScope(state_mapping=state))
        if any_size:
            models = [op for _, op in self.operations if hasattr(op, "operations")]
            for model in [self.model, getattr(self.model, "_functional", None), *models]:
                if model is not None:
                    patch(undo, model, "_assert_input_compatibility", lambda *_: None)
        for operation in self._wrapped:
            method = call_method(operation)
            patch(undo, operation, method, python_call(operation, method))
        return scope

    def named_outputs(self, returned: Structure) -> dict[str, Tensor]:
        """The model's outputs, by the names that a user can choose from."""
        if isinstance(returned, Mapping):
            return dict(returned)
        tensors = [tensor for _, tensor in flat_outputs(returned)]
        names = list(getattr(self.model, "output_names", None) or [])
        if len(names) != len(tensors) or len(set(names)) != len(names):
            names = [f"output_{index}" for index in range(len(tensors))]
        return dict(zip(names, tensors, strict=True))


class WatchedModel:
    """A model with its inputs, ready to be watched: see `inspection.Watched`."""

    def __init__(self, runner: Runner, entry: Entry, source: Source) -> None:
        self.runner, self.entry, self.source = runner, entry, source
        self.name, self.inputs = runner.model.name, entry.inputs

    def failing_layer(self, error: BaseException) -> str | None:
        """See `inspection.Watched.failing_layer`."""
        operations = {id(operation): path for path, operation in self.runner.operations}
        return failing_layer(error, {id(self.runner.model): "", **operations}, OWN_CODE)

    def any_size(self, size: tuple[int, int]) -> bool:
        """True if the model checks the size of images, and would refuse `size`."""
        return size != self.inputs.size and not self.inputs.free

    def trace(self, size: tuple[int, int]) -> Trace:
        """See `inspection.Watched.trace`."""
        x = np.zeros((1, *size, self.inputs.channels), np.float32)
        runner, entry = self.runner, self.entry
        observer = Observer(runner.operations)
        given: list[Value] = []
        outputs: dict[str, Value] = {}

        def pass_through(values: list[Tensor], x: Tensor) -> object:
            observer.calls.clear()
            fed = entry.feed(x)
            flat = keras.tree.flatten(fed)
            given[:] = map(observer.value, flat)
            observer.begin(flat[entry.position])

            def switch(undo: ExitStack) -> None:
                runner.enter_scope(undo, values, self.any_size(size))
                observer.place(undo)

            returned = runner.named_outputs(restored(switch, lambda _: runner.model(fed, training=False)))
            outputs.update({name: observer.value(output) for name, output in returned.items()})
            return [keras.ops.sum(output) for output in returned.values()]

        try:
            restored(runner.switch, lambda _: entry.build(runner.model, x), TRACING)
            restored(runner.switch, lambda _: runner.backend.observe(pass_through, runner.values(), x), TRACING)
        except UsageError:
            raise
        except Exception as error:
            # At a size that is not the model's own, the layers before a dense one run all the same.
            if size == self.inputs.size or not observer.calls:
                reason = said(error, self.failing_layer(error))
                raise self._cant_run(size, reason) from error
        # JAX runs an image that is too small all the same, on maps without a cell.
        observer.finish()
        empty = [call.path for call in observer.calls for _, value in call.outputs if 0 in value.shape[1:]]
        if empty and size == self.inputs.size:
            raise self._cant_run(size, f"nothing is left of it at {empty[0]}")
        mark_layouts(observer.calls, entry.channels_first)
        return Trace(observer.calls, Flow(observer.calls), given, given[entry.position], outputs, entry.names)

    def _cant_run(self, size: tuple[int, int], reason: str) -> ModelError:
        larger = f"If that is too small for it, give a larger size with {option('open_model.size')}. "
        advice = "Call it yourself on an array of that shape to see the whole error."
        return cant_run(self.name, size, [self.inputs.channels], reason, (larger if self.inputs.free else "") + advice)
