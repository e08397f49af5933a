"""A PyTorch module as passes run it, with everything restored after; and the record of a watched run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from convscope.errors import ModelError, option
from convscope.networks.attributes import is_of, keep_attributes
from convscope.networks.failing import cant_run, failing_layer, said
from convscope.networks.foreign import Structure
from convscope.networks.graph import Flow, Value, flat_outputs, mark_layouts
from convscope.networks.inputs import Inputs
from convscope.networks.network import Source
from convscope.networks.restoring import checkpoint, restored
from convscope.networks.torch.graph import Watch, named_modules
from convscope.networks.torch.inputs import Entry
from convscope.networks.torch.quantized import dequantized
from convscope.networks.torch.taps import OWN_CODE
from convscope.networks.trace import Trace

Tensor = torch.Tensor
Result = TypeVar("Result")
_OF_TORCH = frozenset(vars(nn.Module()))  # attributes that each module has
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A pass turns the switches of a module that other threads may share: one at a time in the whole process.
ONE_AT_A_TIME = threading.RLock()


class Runner:
    """Runs a module in evaluation mode, with no parameter asking for a gradient; afterwards all is as before.

    Args:
        module: it stays as it is, with its mode, its hooks and its parameters.
        precision: one of `PRECISIONS`, for autocast.
    """

    def __init__(self, module: nn.Module, precision: str = "float32") -> None:
        self.module, self.precision = module, precision
        self.paths = named_modules(module)
        weight = next((tensor for tensor in self.tensors() if tensor.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = weight.device, weight.dtype
        self._all_copied, self._changing = True, set[tuple[nn.Module, str]]()

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    def called(self, *arguments: Tensor, precision: str = "float32") -> Structure:
        """The module's output, in another precision where it was opened in float32."""
        own = self.precision != "float32"  # a precision chosen at opening is kept
        kind = PRECISIONS[self.precision if own else precision]
        if kind is None:
            checkpoint()
            return self.module(*arguments)
        autocast = torch.autocast(self.device.type, kind)
        return restored(lambda undo: undo.enter_context(autocast), lambda _: self.module(*arguments))

    def named_outputs(self, returned: object) -> dict[str, Tensor]:
        """The module's outputs, by the names that a user can choose from."""
        flat = [(mark, dequantized(tensor)) for mark, tensor in flat_outputs(returned)]
        names = list(getattr(self.module, "output_names", None) or [])
        if len(names) != len(flat):
            names = [mark.strip("[]") for mark, _ in flat]
            names = [name if name and not name.isdigit() else f"output_{index}" for index, name in enumerate(names)]
        return {name: tensor for name, (_, tensor) in zip(names, flat, strict=True) if tensor.is_floating_point()}

    def as_it_was(self, body: Callable[[], Result], weights: Sequence[Tensor] | None = None) -> Result:
        """Run `body` in evaluation mode, no parameter asking for a gradient, no graph; afterwards all is as before.

        One at a time in the process: what is turned here belongs to modules that other threads may share.

        Args:
            body: what is run.
            weights: in the order of `tensors`, for the length of the run.
        """
        return restored(lambda undo: self._switch(undo, weights), lambda _: body(), ONE_AT_A_TIME)

    def _switch(self, undo: ExitStack, weights: Sequence[Tensor] | None) -> None:
        undo.enter_context(_generators_kept(self.device))
        self._keep_buffers(undo)
        authored = [module for module in self.module.modules() if not is_of(module, "torch", "convscope")]
        keep_attributes(undo, authored, _OF_TORCH)
        self._keep_switches(undo)
        self._replace_weights(undo, weights)
        for mode in (torch.inference_mode(False), torch.no_grad(), _eagerly()):
            undo.enter_context(mode)

    def _keep_switches(self, undo: ExitStack) -> None:
        training = [module for module in self.module.modules() if module.training]
        asking = [item for item in self.module.parameters() if item.requires_grad and item.is_leaf]
        fast = torch.backends.mha.get_fastpath_enabled()
        undo.callback(_turn, training, asking, True)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fast)
        _turn(training, asking, False)
        torch.backends.mha.set_fastpath_enabled(False)  # it takes other steps where no gradient is wanted

    def _replace_weights(self, undo: ExitStack, weights: Sequence[Tensor] | None) -> None:
        """The tensors point to other memory for the length of a pass; their own values are not written."""
        if weights is not None:
            own = [(tensor, tensor.data) for tensor in self.tensors()]
            undo.callback(_point, own)
            _point([(tensor, other) for (tensor, _), other in zip(own, weights, strict=True)])

    def _keep_buffers(self, undo: ExitStack) -> None:
        """Leave buffers that a pass changes (a counter, an observer's ranges) as they were.

        Which ones change shows in the first passes, when all are copied; later only those are.
        """
        held = [
            _Buffer(module, name, tensor, version_of(tensor), self._copied(module, name, tensor))
            for module in self.module.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]
        undo.callback(self._put_back, held)

    def _copied(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
        return tensor.clone() if self._all_copied or (module, name) in self._changing else None

    def _put_back(self, held: Sequence[_Buffer]) -> None:
        for buffer in held:
            if buffer.changed:
                self._changing.add((buffer.module, buffer.name))
                if buffer.copy is not None:
                    with torch.no_grad():
                        buffer.tensor.copy_(buffer.copy)
            buffer.module._buffers[buffer.name] = buffer.tensor  # it may have been put in another's place

    def know_buffers(self) -> None:
        """From now on only the buffers are copied that a pass has changed up to here."""
        self._all_copied = False


class WatchedModule:
    """A module with its inputs, ready to be watched: see `inspection.Watched`."""

    def __init__(self, runner: Runner, entry: Entry, name: str, source: Source, inputs: Inputs) -> None:
        self.runner, self.entry = runner, entry
        self.name, self.source, self.inputs = name, source, inputs

    def failing_layer(self, error: BaseException) -> str | None:
        """See `inspection.Watched.failing_layer`."""
        modules = {id(module): path for module, path in self.runner.paths.items()}
        return failing_layer(error, {id(self.runner.module): "", **modules}, OWN_CODE)

    def trace(self, size: tuple[int, int]) -> Trace:
        """See `inspection.Watched.trace`."""
        runner = self.runner
        watch = Watch(runner.paths)
        outputs: dict[str, Value] = {}
        given: list[Value] = []

        def look() -> None:
            leaf = torch.zeros((1, *size, self.inputs.channels), device=runner.device, requires_grad=True)
            arguments = self.entry.arguments(leaf)
            given.extend(map(watch.begin, arguments))
            try:
                returned = runner.named_outputs(restored(watch.place, lambda _: runner.called(*arguments)))
            except Exception as error:
                # At a size that is not the module's own, the layers before a dense one run all the same.
                if size == self.inputs.size or not watch.calls:
                    reason = said(error, self.failing_layer(error))
                    advice = f"Give another size with {option('open_model.size')}."
                    raise cant_run(self.name, size, [self.inputs.channels], reason, advice) from error
            else:
                outputs.update({name: watch.value(output) for name, output in returned.items()})
            watch.finish()

        runner.as_it_was(lambda: restored(_recording, lambda _: look()))
        if not outputs and size == self.inputs.size:
            raise ModelError(
                f"{self.name} returned no tensor; expected class scores (n, classes) or maps.",
                code="no-output",
                name=self.name,
            )
        mark_layouts(watch.calls, True)
        names = tuple(self.entry.names)
        return Trace(watch.calls, Flow(watch.calls), given, given[self.entry.position], outputs, names)


def version_of(tensor: Tensor) -> int:
    """A number that grows when a tensor's values are changed."""
    return tensor._version


@dataclass(frozen=True, eq=False)
class _Buffer:
    """A buffer of a module before a pass, and a copy of its values where it is known to change."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None

    @property
    def changed(self) -> bool:
        """True if its values are others now; `.data` can be written without a trace, so a copy is compared."""
        if version_of(self.tensor) != self.version:
            return True
        return self.copy is not None and self.copy.device.type != "meta" and not torch.equal(self.tensor, self.copy)


def _turn(training: Sequence[nn.Module], asking: Sequence[nn.Parameter], on: bool) -> None:
    """The switches of modules and parameters; not train(): a module may do more in there."""
    for parameter in asking:
        parameter.requires_grad_(on)
    for module in training:
        module.training = on


def _point(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Have tensors use the memory of others."""
    for tensor, other in pairs:
        tensor.data = other


def _generators_kept(device: torch.device) -> AbstractContextManager[None]:
    """Leave torch's random generators where they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _recording(undo: ExitStack) -> None:
    undo.enter_context(torch.enable_grad())


def _eagerly() -> AbstractContextManager[object]:
    """Hooks don't fire inside the result of `torch.compile`: run the original."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
