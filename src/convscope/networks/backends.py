"""The functions that convscope needs from TensorFlow, JAX and torch: compile, differentiate, convert to NumPy.

One small class each, for Keras' backends and for native PyTorch. Nothing is imported on a guess: the class is chosen by
the name of the backend that Keras already runs on, and imports its framework then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convscope.errors import ModelError, one_line
from convscope.networks.foreign import KerasVariable, Tensor

Compiled = Any  # a function as a framework compiles it


class Backend(Protocol):
    """The operations that differ between frameworks."""

    name: str
    version: str

    def bfloat16_pays(self, depthwise: bool = False) -> bool:
        """True if convolutions are faster in bfloat16 than in float32 here; `depthwise` ones among them."""

    def compile(self, function: Callable) -> Callable:
        """`function` of tensors, ready to be called many times; compiled once for each set of shapes."""

    def observe(self, function: Callable, values: list[Tensor], *arrays: np.ndarray) -> None:
        """Run the Python of `function(values, *tensors)` once, as cheaply as the framework can (no results)."""

    def value_and_grad(self, function: Callable) -> Callable:
        """From `f(x) -> (scalar, aux)` the function `x -> ((scalar, aux), d scalar / d x)`; zeros where unconnected.

        `x` is a tensor or a tuple of them, and so is the gradient.
        """

    def positive_gradient(self, x: Tensor) -> Tensor:
        """`x`, through which only the positive part of a gradient passes back."""

    def keep_state(self, undo: ExitStack) -> None:
        """Leave the framework's modes of this thread as they are until `undo` is run."""

    def value(self, variable: KerasVariable) -> Tensor:
        """The present value of a Keras variable, detached from any graph."""

    def tensor(self, array: np.ndarray) -> Tensor:
        """A NumPy array as a tensor of the framework."""

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """A tensor of the framework as a NumPy array."""


def processor_has_bfloat16() -> bool:
    """True if the processor multiplies in bfloat16 (as far as the system reports it)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class TensorFlowBackend:
    """Graphs of `tf.function`, gradients of `tf.GradientTape`."""

    name = "tensorflow"

    def __init__(self) -> None:
        self._tf = importlib.import_module("tensorflow")
        self.version = self._tf.__version__

    def bfloat16_pays(self, depthwise: bool = False) -> bool:
        """On a processor a MobileNet takes a third longer in it: moving its maps decides, not multiplying."""
        return bool(self._tf.config.list_physical_devices("GPU")) or (processor_has_bfloat16() and not depthwise)

    def compile(self, function: Callable) -> Callable:
        """Trace once for each set of shapes; autograph is off since the Python here has no tensor conditions.

        Raises (the function that is returned):
            ModelError: the name of a layer is none that a graph may have, such as one with a backslash at its end.
        """
        traced = self._traced(function)

        def call(*arguments: object) -> object:
            try:
                return traced(*arguments)
            except self._tf.errors.InvalidArgumentError as error:
                if "Node name contains invalid characters" not in str(error):
                    raise
                raise ModelError(
                    f"TensorFlow refuses the name of a layer ({one_line(error)[:160]}). Rename that layer.",
                    code="layer-name-invalid",
                    reason=one_line(error)[:160],
                ) from error

        return call

    def _traced(self, function: Callable) -> Compiled:
        # TensorFlow counts the traces of a code, which all programs share, and would warn; a partial is counted alone.
        return self._tf.function(partial(function), autograph=False)

    def observe(self, function: Callable, values: list[Tensor], *arrays: np.ndarray) -> None:
        """Trace into a graph that is thrown away: nothing is computed."""
        traced = self._traced(function)
        traced.get_concrete_function(values, *map(self.tensor, arrays))

    def value_and_grad(self, function: Callable) -> Callable:
        """See `Backend.value_and_grad`."""
        tf = self._tf

        def differentiated(x: Tensor) -> tuple:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                value, aux = function(x)
            return (value, aux), tape.gradient(value, x, unconnected_gradients="zero")

        return differentiated

    def positive_gradient(self, x: Tensor) -> Tensor:
        """See `Backend.positive_gradient`."""
        gated = self._tf.custom_gradient(lambda x: (self._tf.identity(x), self._tf.nn.relu))
        return gated(x)

    def keep_state(self, undo: ExitStack) -> None:
        """Its modes are those of the block of a program; they need no help."""

    def value(self, variable: KerasVariable) -> Tensor:
        """Reading shares the variable's buffer; nothing is copied."""
        return self._tf.convert_to_tensor(variable.value)

    def tensor(self, array: np.ndarray) -> Tensor:
        """See `Backend.tensor`."""
        return self._tf.convert_to_tensor(array)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """See `Backend.numpy`."""
        return tensor.numpy()


class JaxBackend:
    """`jax.jit` and `jax.value_and_grad`."""

    name = "jax"

    def __init__(self) -> None:
        self._jax = importlib.import_module("jax")
        self.version = self._jax.__version__

    def bfloat16_pays(self, depthwise: bool = False) -> bool:
        """On a processor XLA's convolutions take twice as long in it."""
        return self._jax.default_backend() != "cpu"

    def compile(self, function: Callable) -> Callable:
        """See `Backend.compile`."""
        return self._jax.jit(function)

    def observe(self, function: Callable, values: list[Tensor], *arrays: np.ndarray) -> None:
        """Abstract evaluation: shapes only."""
        self._jax.eval_shape(function, values, *arrays)

    def value_and_grad(self, function: Callable) -> Callable:
        """See `Backend.value_and_grad`."""
        return self._jax.value_and_grad(function, has_aux=True)

    def positive_gradient(self, x: Tensor) -> Tensor:
        """See `Backend.positive_gradient`."""
        return self._jax.custom_gradient(lambda x: (x, self._jax.nn.relu))(x)

    def keep_state(self, undo: ExitStack) -> None:
        """Its modes are those of the block of a program; they need no help."""

    def value(self, variable: KerasVariable) -> Tensor:
        """See `Backend.value`."""
        return variable.value

    def tensor(self, array: np.ndarray) -> Tensor:
        """See `Backend.tensor`."""
        return self._jax.numpy.asarray(array)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """See `Backend.numpy`."""
        return np.asarray(tensor)


class TorchBackend:
    """Eager torch: nothing is compiled, gradients are recorded only where `value_and_grad` asks for them.

    Args:
        device: where tensors are put; where Keras computes if None.
    """

    name = "torch"

    def __init__(self, device: object = None) -> None:
        self._torch = importlib.import_module("torch")
        self._device = device
        self.version = self._torch.__version__

    def bfloat16_pays(self, depthwise: bool = False) -> bool:
        """See `Backend.bfloat16_pays`."""
        if self._torch.cuda.is_available():
            return self._torch.cuda.is_bf16_supported()
        return processor_has_bfloat16()

    def compile(self, function: Callable) -> Callable:
        """Eager."""
        return function

    def observe(self, function: Callable, values: list[Tensor], *arrays: np.ndarray) -> None:
        """Eager torch has no cheaper way than to run it."""
        self.compile(function)(values, *map(self.tensor, arrays))

    def value_and_grad(self, function: Callable) -> Callable:
        """See `Backend.value_and_grad`. Inside of another one the gradient can be differentiated too."""
        torch = self._torch

        def differentiated(x: Tensor) -> tuple:
            given = x if isinstance(x, tuple) else (x,)
            found: tuple = (None,) * len(given)
            inside = torch.is_grad_enabled() and all(tensor.requires_grad for tensor in given)
            with torch.enable_grad():
                if not inside:
                    given = tuple(tensor.detach().requires_grad_() for tensor in given)
                value, aux = function(given if isinstance(x, tuple) else given[0])
                if value.requires_grad:
                    found = torch.autograd.grad(value, given, allow_unused=True, create_graph=inside)
            gradients = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(given, found, strict=True))
            if inside:
                return (value, aux), gradients if isinstance(x, tuple) else gradients[0]
            # What is handed out must not hold the graph, or a loop that keeps its scores keeps every step's.
            return _detached((value, aux)), gradients if isinstance(x, tuple) else gradients[0]

        return differentiated

    def positive_gradient(self, x: Tensor) -> Tensor:
        """See `Backend.positive_gradient`."""
        x = x.view_as(x)  # the tensor itself may be needed elsewhere, with its whole gradient
        if x.requires_grad:
            x.register_hook(self._torch.relu)
        return x

    def keep_state(self, undo: ExitStack) -> None:
        """No graph to the weights, and afterwards the mode of before."""
        undo.enter_context(self._torch.no_grad())

    def value(self, variable: KerasVariable) -> Tensor:
        """Detached: a parameter would keep a graph alive."""
        return variable.value.detach()

    def tensor(self, array: np.ndarray) -> Tensor:
        """A copy, since NumPy's memory may be read-only; in C order, since torch refuses an axis that is reversed."""
        if self._device is None:
            from keras.src.backend.torch.core import get_device

            self._device = get_device()
        return self._torch.tensor(np.asarray(array, order="C"), device=self._device)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """See `Backend.numpy`."""
        return tensor.detach().cpu().numpy()


def _detached(structure: object) -> object:
    """Tuples, lists and dicts of tensors without their graph."""
    if isinstance(structure, dict):
        return {key: _detached(value) for key, value in structure.items()}
    if isinstance(structure, tuple | list):
        return type(structure)(_detached(value) for value in structure)
    return structure.detach() if hasattr(structure, "detach") else structure


_BACKENDS: dict[str, type] = {"tensorflow": TensorFlowBackend, "jax": JaxBackend, "torch": TorchBackend}


def backend_named(name: str) -> Backend:
    """The adapter of Keras' backend `name`: "tensorflow", "jax" or "torch"."""
    return _BACKENDS[name]()
