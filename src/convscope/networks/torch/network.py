"""Native PyTorch modules: taps are forward hooks, and everything is left as it was.

Every pass runs in evaluation mode, with no parameter asking for a gradient, on the weights where they lie. Layers are
modules, and the operations between them that are none (`graph.py`).
"""

from __future__ import annotations

import copy
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from textwrap import shorten

import numpy as np
import torch
from torch import nn

from convscope.errors import BackendError, ModelError, UsageError, one_line, option
from convscope.networks.backends import TorchBackend
from convscope.networks.choices import Choices
from convscope.networks.failing import failing_layer, said
from convscope.networks.foreign import Structure
from convscope.networks.graph import (
    Flow,
    Value,
    flat_outputs,
    layers_of,
    mark_layouts,
    paths_of,
)
from convscope.networks.heads import Habits, head_of
from convscope.networks.layers import Layer
from convscope.networks.passes import PLAIN, Pass, Record, Reduction, Rule
from convscope.networks.restoring import checkpoint, restored
from convscope.networks.torch import ops as torch_ops
from convscope.networks.torch.graph import Watch, class_name, named_modules, unwrapped
from convscope.networks.torch.inputs import Asked, Entry
from convscope.networks.torch.modules import OpenedModule
from convscope.networks.torch.scaling import preprocessing_of
from convscope.networks.torch.taps import OWN_CODE, TorchTaps
from convscope.networks.trace import Graph, Trace
from convscope.networks.traced import Enough, TracedNetwork

Tensor = torch.Tensor
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_CHOICES = Choices()
HABITS = Habits(channels_first=True, returns_logits=True, leaves_out_calls=True)


def network_of(
    opened: OpenedModule, choices: Choices = _NO_CHOICES, device: str | None = None, precision: str = "float32"
) -> TorchNetwork:
    """The network of a module that was opened; its arguments are those of `TorchNetwork`.

    Raises:
        BackendError: the device is not there; UsageError: a module in memory lies on another device.
    """
    module = opened.module
    if device is not None:
        module = _moved(module, device, stays=opened.in_memory)
    names = opened.class_names if choices.class_names is None else choices.class_names
    input = opened.input if choices.input is None else choices.input
    return TorchNetwork(replace(opened, module=module), replace(choices, input=input, class_names=names), precision)


def _moved(module: nn.Module, device: str, stays: bool) -> nn.Module:
    try:
        wanted = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"the device {device!r} can't be used ({one_line(error)}); expected cpu, cuda or mps.",
            code="device-unusable",
            name=device,
        ) from error
    present = next((tensor.device for tensor in module.parameters()), wanted)
    if stays and present != wanted:
        raise UsageError(
            f"the module lies on {present}; move it yourself, module.to({device!r}), and open it then.",
            code="device-misfit",
            expected=device,
            found=str(present),
        )
    return module if stays else module.to(wanted)


# A pass turns the switches of a module that other threads may share: one at a time in the whole process.
_ONE_AT_A_TIME = threading.RLock()


class TorchNetwork(TracedNetwork):
    """A `torch.nn.Module`, opened; it stays as it is, with its mode, its hooks and its parameters.

    Args:
        opened: the module, which takes images `(n, c, h, w)`, and its known properties.
        choices: the user's options for it.
        precision: "float32", or "bfloat16" and "float16" for autocast.

    Raises:
        ModelError: the module takes no images or can't be run; UsageError: no such input, output or size.
    """

    def __init__(
        self,
        opened: OpenedModule,
        choices: Choices = _NO_CHOICES,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise UsageError(
                f"precision {precision!r} is not known; expected one of {', '.join(PRECISIONS)}.",
                code="precision-unknown",
                name=precision,
            )
        self.module = unwrapped(opened.module)
        self.source = opened.source
        self.name = opened.name or class_name(self.module)
        self.output, self.outputs = choices.output or "", ()
        weight = next((tensor for tensor in self._tensors() if tensor.is_floating_point()), torch.zeros(()))
        self.device, self._dtype, self._precision = weight.device, weight.dtype, precision
        self.ops = torch_ops.on(self.device)
        self._backend = TorchBackend(self.device)
        self.framework = f"torch {torch.__version__}"
        self.backend = str(self.device) + ("" if precision == "float32" else f", {precision}")
        self._materialise(choices.size or opened.size)
        self._refuse_inference_tensors()
        self._paths = named_modules(self.module)
        self._opening, self._changing = True, set[tuple[nn.Module, str]]()
        asked = Asked(
            opened.input_shape, choices.input, choices.size, opened.size, choices.feed, opened.channels_last_input
        )
        self._entry = self._as_it_was(lambda: Entry(self.module, self._called, asked, self._dtype, self.device))
        self.inputs = self._entry.inputs
        self._hash: tuple[object, str] | None = None
        graph = self._look(guess_size=choices.size is None and opened.size is None)
        self._opening = False
        head = head_of(graph, choices.head, HABITS)
        assert head is not None
        self.head = head
        self.preprocessing = choices.preprocess or opened.preprocessing or preprocessing_of(graph, self.inputs.channels)
        self.class_names = None if choices.class_names is None else self.checked_names(choices.class_names)

    # taps ------------------------------------------------------------------------------------------

    def compile(self, function: Callable) -> Callable:
        """See `Network.compile`. Eager; the weights are those of the moment of each call."""

        def call(*tensors: Tensor) -> Structure:
            try:
                return self._as_it_was(lambda: function(self._run, *tensors))
            except Exception as error:
                problem = self.explained(error)
                if problem is None:
                    raise
                raise problem from error

        return call

    def _failing_layer(self, error: BaseException) -> str | None:
        paths = {id(self.module): "", **{id(module): path for module, path in self._paths.items()}}
        return failing_layer(error, paths, OWN_CODE)

    def _weight_places(self) -> dict[str, list[int]]:
        """See `Network._weight_places`."""
        numbers = {id(tensor): number for number, tensor in enumerate(self._tensors())}
        return {
            path: [
                numbers[id(tensor)]
                for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False))
                if id(tensor) in numbers
            ]
            for child, path in self._paths.items()
        }

    def tensor(self, array: np.ndarray) -> Tensor:
        """See `Network.tensor`."""
        with torch.inference_mode(False):  # a tensor made inside the user's could not be differentiated
            return self._backend.tensor(array)

    def count_nonzero(self, x: Tensor, axis: tuple[int, ...]) -> Tensor:
        """See `Network.count_nonzero`."""
        return torch_ops.counts_of_nonzero(x, axis)

    def weights(self) -> list[np.ndarray]:
        """See `Network.weights`. Not while another thread's pass has them point to the memory of others."""
        with _ONE_AT_A_TIME:
            return [
                (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
                for tensor in self._tensors()
            ]

    def _hashed(self) -> str:
        """Made anew where a tensor lies elsewhere, was written to, or has another checksum.

        A change through `.data` shows in the checksum alone, which costs a fifth of the hash.
        """
        with _ONE_AT_A_TIME:
            tensors, arrays = self._tensors(), self.weights()
            mark = [
                (tensor.data_ptr(), _version(tensor), zlib.crc32(np.ascontiguousarray(array).data))
                for tensor, array in zip(tensors, arrays, strict=True)
            ]
            if self._hash is None or self._hash[0] != mark:
                self._hash = (mark, super()._hashed())
            return self._hash[1]

    @property
    def parameters(self) -> int:
        """Number of weights; the running statistics of norms are buffers and don't count, as in PyTorch."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def precision_for_ascent(self) -> str:
        """See `Network.precision_for_ascent`. A precision chosen at opening, or that of the weights, is kept."""
        plain = self._precision == "float32" and self._dtype == torch.float32
        pays = plain and self.device.type in ("cpu", "cuda") and self._backend.bfloat16_pays()
        return "bfloat16" if pays else "float32"

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    def _can_compute_in(self, precision: str) -> bool:
        """See `TracedNetwork`. A precision chosen at opening is kept."""
        return self._precision in ("float32", precision)

    def _run(
        self,
        x: Tensor,
        request: Pass = PLAIN,
        rules: Mapping[str, Rule] | None = None,
        reductions: Mapping[str, Reduction] | None = None,
    ) -> Record:
        """See `Run`. No module ends in a non-linearity of its own, so `replace_preactivations` has to be empty."""
        calls = self._calls_at((int(x.shape[1]), int(x.shape[2])))
        rules, reductions = rules or {}, reductions or {}
        self._checked(request, rules, reductions, calls)
        taps = TorchTaps(calls, self._paths, request, (rules, reductions), self._left_out(request), len(x))
        returned = restored(
            taps.place, lambda _: self._unless_enough(*self._entry.arguments(x), precision=request.precision)
        )
        taps.check_fired()
        return Record(None if returned is None else self._logits(returned, len(x)), taps.recorded)

    def _left_out(self, request: Pass) -> set[str]:
        """Paths whose non-linearity is left out: the head's too, unless the run stops before it."""
        undone = self.head.undone
        left_out = undone is not None and request.logits and (not request.stop or undone in request.taps)
        return {*request.preactivations, *([undone] if undone and left_out else [])}

    def _unless_enough(self, *arguments: Tensor, precision: str) -> Structure:
        """The module's output, None where every tap fired before its end."""
        try:
            return self._called(*arguments, precision=precision)
        except Enough:
            return None

    def _called(self, *arguments: Tensor, precision: str = "float32") -> Structure:
        own = self._precision != "float32"  # a precision chosen at opening is kept
        kind = PRECISIONS[self._precision if own else precision]
        if kind is None:
            checkpoint()
            return self.module(*arguments)
        autocast = torch.autocast(self.device.type, kind)
        return restored(lambda undo: undo.enter_context(autocast), lambda _: self.module(*arguments))

    def _as_it_was(self, body: Callable[[], Structure]) -> Structure:
        """Run `body` in evaluation mode, no parameter asking for a gradient, no graph; afterwards all is as before.

        One at a time in the process: what is turned here belongs to modules that other threads may share.
        """
        return restored(self._switch, lambda _: body(), _ONE_AT_A_TIME)

    def _switch(self, undo: ExitStack) -> None:
        undo.enter_context(_generators_kept(self.device))
        self._keep_buffers(undo)
        self._keep_switches(undo)
        self._replace_weights(undo)
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

    def _replace_weights(self, undo: ExitStack) -> None:
        """The tensors point to other memory for the length of a pass; their own values are not written."""
        replacing = self._replacing()
        if replacing is not None:
            own = [(tensor, tensor.data) for tensor in self._tensors()]
            undo.callback(_point, own)
            _point([(tensor, other) for (tensor, _), other in zip(own, replacing, strict=True)])

    def _as_replacing(self, weights: Sequence[np.ndarray]) -> list[Tensor]:
        """See `Network._as_replacing`."""
        with torch.inference_mode(False):
            return [
                torch.as_tensor(np.array(weight)).to(tensor.device, tensor.dtype)
                for tensor, weight in zip(self._tensors(), weights, strict=True)
            ]

    def _keep_buffers(self, undo: ExitStack) -> None:
        """Leave buffers that a pass changes (a counter, an observer's ranges) as they were.

        Which ones change shows while the module is being opened, when all are copied; later only those are.
        """
        held = [
            _Buffer(module, name, tensor, _version(tensor), self._copied(module, name, tensor))
            for module in self.module.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]
        undo.callback(self._put_back, held)

    def _copied(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
        return tensor.clone() if self._opening or (module, name) in self._changing else None

    def _put_back(self, held: Sequence[_Buffer]) -> None:
        for buffer in held:
            if buffer.changed:
                self._changing.add((buffer.module, buffer.name))
                if buffer.copy is not None:
                    with torch.no_grad():
                        buffer.tensor.copy_(buffer.copy)
            buffer.module._buffers[buffer.name] = buffer.tensor  # it may have been put in another's place

    def _logits(self, returned: object, images: int) -> Tensor:
        outputs = _named_outputs(self.module, returned)[self.output].float()
        self._check_output(outputs.shape, images)
        return self.head.logits(self.ops, outputs.reshape(len(outputs), -1))

    # inspection ------------------------------------------------------------------------------------

    def _materialise(self, size: tuple[int, int] | None) -> None:
        """Give a module with lazily created weights, which the user has not called yet, a copy that has them."""
        if not any(nn.parameter.is_lazy(tensor) for tensor in self._tensors()):
            return
        self.module = copy.deepcopy(self.module)
        restored(_seeded, lambda _: self._create(size))
        note = "its lazily created layers have random weights, drawn with seed 0"
        self.source = replace(self.source, notes=(*self.source.notes, note))

    def _create(self, size: tuple[int, int] | None) -> None:
        """Call the module, so that its lazy layers make their weights."""
        errors = []
        for channels in (3, 1):
            try:
                self.module.eval()(torch.zeros((1, channels, *(size or (224, 224)))))
                return
            except Exception as error:  # whatever the user's code raises
                errors.append(error)
        raise ModelError(
            f"{self.name} has layers that are created when it is first called, and it can't be called on an "
            f"image ({one_line(errors[0])}). Call it once yourself, then open it.",
            code="model-lazy",
        ) from errors[0]

    def _refuse_inference_tensors(self) -> None:
        if any(tensor.is_inference() for tensor in self._tensors()):
            raise ModelError(
                f"{self.name} has weights that were made under torch.inference_mode(), and PyTorch computes no "
                "gradients with those. Make or load the module outside of it.",
                code="inference-tensors",
            )

    def _look(self, guess_size: bool) -> Graph:
        """Watch the module once: its outputs and its layers."""
        trace = self._trace(self.inputs.size)
        if guess_size and self.inputs.free:
            smaller = _small_images(layers_of(paths_of(trace.calls), trace.flow, None), self.inputs.size)
            if smaller is not None:
                note = f"a guess: it halves images {smaller[1]} times only; give the input size if it is another"
                self.inputs = replace(self.inputs, size=(smaller[0], smaller[0]), note=note)
                trace = self._trace(self.inputs.size)
        return self._take(trace)

    def _trace(self, size: tuple[int, int]) -> Trace:
        """See `TracedNetwork._trace`."""
        watch = Watch(self._paths)
        outputs: dict[str, Value] = {}
        given: list[Value] = []

        def look() -> None:
            leaf = torch.zeros((1, *size, self.inputs.channels), device=self.device, requires_grad=True)
            arguments = [argument.clone() for argument in self._entry.arguments(leaf)]
            given.extend(map(watch.begin, arguments))
            try:
                returned = _named_outputs(self.module, restored(watch.place, lambda _: self._called(*arguments)))
            except Exception as error:
                # At a size that is not the module's own, the layers before a dense one run all the same.
                if size == self.inputs.size or not watch.calls:
                    reason = said(error, self._failing_layer(error))
                    raise ModelError(
                        _cant_run(self.name, size, self.inputs.channels, reason), code="model-not-runnable"
                    ) from error
            else:
                outputs.update({name: watch.value(output) for name, output in returned.items()})
            watch.finish()

        self._as_it_was(lambda: restored(_recording, lambda _: look()))
        if not outputs and size == self.inputs.size:
            raise ModelError(
                f"{self.name} returned no tensor; expected class scores (n, classes) or maps.", code="no-output"
            )
        mark_layouts(watch.calls, True)
        return Trace(watch.calls, Flow(watch.calls), given, given[self._entry.position], outputs)


def _version(tensor: Tensor) -> int:
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
        if _version(self.tensor) != self.version:
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


def _seeded(undo: ExitStack) -> None:
    undo.enter_context(torch.random.fork_rng(devices=[]))
    undo.enter_context(torch.no_grad())
    torch.manual_seed(0)


def _recording(undo: ExitStack) -> None:
    undo.enter_context(torch.enable_grad())


def _eagerly() -> AbstractContextManager[object]:
    """Hooks don't fire inside the result of `torch.compile`: run the original."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _named_outputs(module: nn.Module, returned: object) -> dict[str, Tensor]:
    """The module's outputs, by the names that a user can choose from."""
    flat = flat_outputs(returned)
    names = list(getattr(module, "output_names", None) or [])
    if len(names) != len(flat):
        names = [mark.strip("[]") for mark, _ in flat]
        names = [name if name and not name.isdigit() else f"output_{index}" for index, name in enumerate(names)]
    return {name: tensor for name, (_, tensor) in zip(names, flat, strict=True) if tensor.is_floating_point()}


def _cant_run(name: str, size: tuple[int, int], channels: int, reason: str) -> str:
    reason = shorten(reason, 160, placeholder=" …").rstrip(".")
    return (
        f"{name} can't be run on an image of {size[0]}x{size[1]} pixels with "
        f"{channels} channel{'s' if channels > 1 else ''} ({reason}). Give another size with "
        f"{option('open_model.size')}."
    )


def _small_images(layers: Sequence[Layer], size: tuple[int, int]) -> tuple[int, int] | None:
    """The side of the images that a network is likely made for, and how often it halves them; None for the usual.

    Networks bring images down to maps of about 4 to 16 cells a side; one that leaves 28 or more of 224 was made for
    smaller ones.
    """
    sides = [min(layer.shape[:2]) for layer in layers if layer.spatial and min(layer.shape[:2]) > 1]
    if not sides or any(layer.resizes for layer in layers):
        return None
    halvings = round(np.log2(min(size) / min(sides)))
    return (64 if halvings == 3 else 32, halvings) if 1 <= halvings <= 3 else None
