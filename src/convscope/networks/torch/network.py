"""Native PyTorch modules: taps are forward hooks, and everything is left as it was.

Every pass runs in evaluation mode, with no parameter asking for a gradient, on the weights where they lie. Layers are
modules, and the operations between them that are none (`graph.py`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from convscope.errors import BackendError, ModelError, UsageError, one_line
from convscope.networks.backends import TorchBackend
from convscope.networks.choices import Choices
from convscope.networks.foreign import Structure
from convscope.networks.graph import Call, shape_of
from convscope.networks.heads import Habits
from convscope.networks.inspection import Inspection, Steps, inspected
from convscope.networks.passes import PLAIN, Pass, Record, Reduction, Rule
from convscope.networks.preprocessing import Preprocessing
from convscope.networks.restoring import exclusively, restored
from convscope.networks.torch import ops as torch_ops
from convscope.networks.torch import quantized
from convscope.networks.torch.graph import class_name, unwrapped
from convscope.networks.torch.inputs import Asked, Entry
from convscope.networks.torch.lazy import materialised
from convscope.networks.torch.modules import OpenedModule
from convscope.networks.torch.runner import ONE_AT_A_TIME, PRECISIONS, Runner, WatchedModule, version_of
from convscope.networks.torch.scaling import usual_preprocessing
from convscope.networks.torch.taps import TorchTaps
from convscope.networks.trace import Trace
from convscope.networks.traced import TracedNetwork, unless_enough

_NO_CHOICES = Choices()
HABITS = Habits(channels_first=True, returns_logits=True, leaves_out_calls=True)


def network_of(
    opened: OpenedModule, choices: Choices = _NO_CHOICES, device: str | None = None, precision: str = "float32"
) -> TorchNetwork:
    """The network of a module that was opened, step by step.

    Args:
        opened: the module, which takes images `(n, c, h, w)`, and its known properties.
        choices: the user's options for it.
        device: where a module that is not the user's own object is moved.
        precision: "float32", or "bfloat16" and "float16" for autocast.

    Raises:
        ModelError: the module takes no images or can't be run; UsageError: no such input, output or size, or a module
            in memory lies on another device; BackendError: the device is not there.
    """
    opened = _ready(opened, choices, device, precision)
    names = opened.class_names if choices.class_names is None else choices.class_names
    choices = replace(choices, class_names=names, preprocess=choices.preprocess or opened.preprocessing)
    runner = Runner(opened.module, precision)
    watched, trace = _watched(runner, opened, choices)
    runner.know_buffers()

    def preprocessing() -> Preprocessing:
        return usual_preprocessing(watched.inputs.channels)

    def network(found: Inspection) -> TorchNetwork:
        return TorchNetwork(watched, found)

    return inspected(watched, trace, choices, Steps(preprocessing, HABITS, lambda _: None, network))


def _ready(opened: OpenedModule, choices: Choices, device: str | None, precision: str) -> OpenedModule:
    """The module without its wrappers, on its device, with a name and with weights."""
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is not known; expected one of {', '.join(PRECISIONS)}.",
            code="precision-unknown",
            name=precision,
        )
    module = opened.module if device is None else _moved(opened.module, device, stays=opened.in_memory)
    module = unwrapped(module)
    name = opened.name or class_name(module)
    opened = materialised(replace(opened, module=module, name=name), name, choices.size or opened.size)
    _refuse_inference_tensors(opened.module, name)
    note = quantized.note(map(class_name, opened.module.modules()))
    if note is not None:
        opened = replace(opened, source=replace(opened.source, notes=(*opened.source.notes, note)))
    return opened


def _refuse_inference_tensors(module: nn.Module, name: str) -> None:
    if any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{name} has weights that were made under torch.inference_mode(), and PyTorch computes no "
            "gradients with those. Make or load the module outside of it.",
            code="inference-tensors",
            name=name,
        )


def _watched(runner: Runner, opened: OpenedModule, choices: Choices) -> tuple[WatchedModule, Trace]:
    """The module with its inputs, and its first trace: that tells of modules which are made for small images."""
    input = opened.input if choices.input is None else choices.input
    asked = Asked(opened.input_shape, input, choices.size, opened.size, choices.feed, opened.channels_last_input)
    entry = runner.as_it_was(lambda: Entry(runner.module, runner.called, asked, runner.dtype, runner.device))
    inputs, name = entry.inputs, opened.name or ""
    watched = WatchedModule(runner, entry, name, opened.source, inputs)
    trace = watched.trace(inputs.size)
    if choices.size is not None or opened.size is not None or not inputs.free:
        return watched, trace
    smaller = _small_images(trace.calls, inputs.size)
    if smaller is None:
        return watched, trace
    note = f"a guess: it halves images {smaller[1]} times only; give the input size if it is another"
    inputs = replace(inputs, size=(smaller[0], smaller[0]), note=note)
    watched = WatchedModule(runner, entry, name, opened.source, inputs)
    return watched, watched.trace(inputs.size)


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


class TorchNetwork(TracedNetwork):
    """A `torch.nn.Module`, opened; see `network_of`."""

    def __init__(self, watched: WatchedModule, found: Inspection) -> None:
        super().__init__(watched, found)
        self._runner, self._entry = watched.runner, watched.entry.preparing(found.preprocessing)
        self.module, self.device = self._runner.module, self._runner.device
        self.ops = torch_ops.on(self.device)
        self._backend = TorchBackend(self.device)
        self.framework = f"torch {torch.__version__}"
        precision = self._runner.precision
        self.backend = str(self.device) + ("" if precision == "float32" else f", {precision}")
        self._hash: tuple[object, str] | None = None

    # taps ------------------------------------------------------------------------------------------

    def compile(self, function: Callable) -> Callable:
        """See `Network.compile`. Eager; the weights are those of the moment of each call."""

        def call(*tensors: Tensor) -> Structure:
            return self._explaining(
                lambda: self._runner.as_it_was(lambda: function(self._run, *tensors), self._replacing())
            )

        return call

    def _weight_places(self) -> dict[str, list[int]]:
        """See `Network._weight_places`."""
        numbers = {id(tensor): number for number, tensor in enumerate(self._runner.tensors())}
        return {
            path: [
                numbers[id(tensor)]
                for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False))
                if id(tensor) in numbers
            ]
            for child, path in self._runner.paths.items()
        }

    def tensor(self, array: np.ndarray) -> Tensor:
        """See `Network.tensor`."""
        with torch.inference_mode(False):  # a tensor made inside the user's could not be differentiated
            return self._backend.tensor(array)

    def count_nonzero(self, x: Tensor, axis: tuple[int, ...]) -> Tensor:
        """See `Network.count_nonzero`."""
        return torch_ops.counts_of_nonzero(x, axis)

    def _statistics(self, norm: Call) -> tuple[np.ndarray, np.ndarray] | None:
        """See `TracedNetwork._statistics`."""
        mean, variance = (getattr(norm.operation, name, None) for name in ("running_mean", "running_var"))
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            return None
        # Copies: the user may train on. Not while another thread's pass has the tensors point elsewhere.
        kept = exclusively(ONE_AT_A_TIME, lambda: [_array(one).astype(np.float32) for one in (mean, variance)])
        return kept[0], kept[1]

    def weights(self) -> list[np.ndarray]:
        """See `Network.weights`. Not while another thread's pass has them point to the memory of others."""
        return exclusively(ONE_AT_A_TIME, lambda: [_array(tensor) for tensor in self._runner.tensors()])

    def _hashed(self) -> str:
        """Made anew where a tensor lies elsewhere, was written to, or has another checksum.

        A change through `.data` shows in the checksum alone, which costs a fifth of the hash.
        """
        return exclusively(ONE_AT_A_TIME, self._hashed_now)

    def _hashed_now(self) -> str:
        tensors, arrays = self._runner.tensors(), self.weights()
        mark = [
            (tensor.data_ptr(), version_of(tensor), zlib.crc32(np.ascontiguousarray(array).data))
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
        """See `Network.precision_for_ascent`. A precision chosen at opening, or that of the weights, is kept.

        Layers that are quantized take float32 alone.
        """
        plain = self._runner.precision == "float32" and self._runner.dtype == torch.float32
        plain = plain and not quantized.kinds(map(class_name, self._runner.paths))
        pays = plain and self.device.type in ("cpu", "cuda") and self._backend.bfloat16_pays()
        return "bfloat16" if pays else "float32"

    def _can_compute_in(self, precision: str) -> bool:
        """See `TracedNetwork`. A precision chosen at opening is kept."""
        return self._runner.precision in ("float32", precision)

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
        taps = TorchTaps(calls, self._runner.paths, request, (rules, reductions), self._left_out(request), len(x))
        arguments = self._entry.arguments(x)  # before the taps are there: they count the calls of the module alone
        returned = restored(
            taps.place,
            lambda _: unless_enough(lambda: self._runner.called(*arguments, precision=request.precision)),
        )
        taps.check_fired()
        logits = None if returned is None else self._logits(self._runner.named_outputs(returned), len(x))
        return Record(logits, taps.recorded)

    def _left_out(self, request: Pass) -> set[str]:
        """Paths whose non-linearity is left out: the head's too, unless the run stops before it."""
        left_out = self.head.left_out
        reached = request.logits and (not request.stop or not request.taps.isdisjoint(left_out))
        return {*request.preactivations, *(left_out if reached else ())}

    def _as_replacing(self, weights: Sequence[np.ndarray]) -> list[Tensor]:
        """See `Network._as_replacing`."""
        with torch.inference_mode(False):
            return [
                torch.as_tensor(np.array(weight)).to(tensor.device, tensor.dtype)
                for tensor, weight in zip(self._runner.tensors(), weights, strict=True)
            ]


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor's values; NumPy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def _small_images(calls: Sequence[Call], size: tuple[int, int]) -> tuple[int, int] | None:
    """The side of the images that a network is likely made for, and how often it halves them; None for the usual.

    Networks bring images down to maps of about 4 to 16 cells a side; one that leaves 28 or more of 224 was made for
    smaller ones.
    """
    shapes = [shape_of(call, index) for call in calls for index in range(len(call.outputs))]
    sides = [min(shape[:2]) for shape in shapes if len(shape) == 3 and min(shape[:2]) > 1]
    if not sides or any(call.kind == "resize" for call in calls):
        return None
    halvings = round(np.log2(min(size) / min(sides)))
    return (64 if halvings == 3 else 32, halvings) if 1 <= halvings <= 3 else None
