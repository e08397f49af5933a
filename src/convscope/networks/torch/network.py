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
from dataclasses import dataclass, fields, is_dataclass, replace
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import nn

from convscope.errors import BackendError, ModelError, UsageError, nearest, one_line
from convscope.networks import preprocessing as pp
from convscope.networks.backends import TorchBackend
from convscope.networks.failing import failing_layer, said
from convscope.networks.graph import (
    Call,
    Flow,
    Value,
    bends_at,
    first_norm,
    flat_outputs,
    layers_of,
    linear_by_graph,
    mark_layouts,
    paths_of,
    undoable_head,
)
from convscope.networks.head import Head, HeadChoice
from convscope.networks.layers import Layer
from convscope.networks.network import Network, Source
from convscope.networks.passes import Record, Recording, Rule, as_recording
from convscope.networks.restoring import checkpoint, restored
from convscope.networks.torch import ops as torch_ops
from convscope.networks.torch.graph import FunctionMode, Places, Watch, class_name, named_modules, tensors_of, unwrapped
from convscope.networks.torch.inputs import Entry
from convscope.networks.torch.modules import OpenedModule

Tensor = torch.Tensor
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def network_of(opened: OpenedModule, *, device: str | None = None, **options: Any) -> TorchNetwork:
    """The network of a module that was opened; `options` are those of `TorchNetwork`.

    Raises:
        BackendError: the device is not there; UsageError: a module in memory lies on another device.
    """
    module = opened.module
    if device is not None:
        module = _moved(module, device, stays=opened.in_memory)
    if options.get("class_names") is None:
        options["class_names"] = opened.class_names
    if options.get("input") is None:
        options["input"] = opened.input
    return TorchNetwork(
        module,
        opened.source,
        input_shape=opened.input_shape,
        advised=opened.size,
        known=opened.preprocessing,
        **opened.options,
        **options,
    )


def _moved(module: nn.Module, device: str, stays: bool) -> nn.Module:
    try:
        wanted = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"the device {device!r} can't be used ({one_line(error)}); expected cpu, cuda or mps."
        ) from error
    present = next((tensor.device for tensor in module.parameters()), wanted)
    if stays and present != wanted:
        raise UsageError(f"the module lies on {present}; move it yourself, module.to({device!r}), and open it then.")
    return module if stays else module.to(wanted)


class _Enough(BaseException):
    """Every tap has spoken: the rest of the network need not run. Not an Exception, so that no module catches it."""


# A pass turns the switches of a module that other threads may share: one at a time in the whole process.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one watched pass showed."""

    calls: list[Call]
    flow: Flow
    given: list[Value]
    picture: Value
    outputs: dict[str, Value]


@dataclass(frozen=True, eq=False)
class _Shown:
    """What is kept of a watched pass: the calls that taps are placed at, and their public face."""

    calls: dict[str, tuple[Call, int]]
    layers: tuple[Layer, ...]


class TorchNetwork(Network):
    """A `torch.nn.Module`, opened; it stays as it is, with its mode, its hooks and its parameters.

    Args:
        module: takes pictures `(n, c, h, w)`.
        source: where it came from.
        input: name of the input that gets the picture, where there are several.
        output: name of the output that is explained, where there are several.
        size: `(h, w)` to bring pictures to.
        feed: values for the other inputs, by name: `(1, ...)` arrays.
        preprocess: None to find out, or a `Preprocessing`.
        class_names: one for each class.
        head: "linear", "softmax" or "sigmoid" if convscope can't find it out.
        precision: "float32", or "bfloat16" and "float16" for autocast.
        input_shape: `(n, c, h, w)` as a file declares it, None for what is free.
        advised: `(h, w)` that a data config recommends; known: the preprocessing that it tells of.
        channels_last_input: the module itself takes `(n, h, w, c)`.

    Raises:
        ModelError: the module takes no pictures or can't be run; UsageError: no such input, output or size.
    """

    def __init__(
        self,
        module: nn.Module,
        source: Source,
        *,
        input: str | None = None,
        output: str | None = None,
        size: tuple[int, int] | None = None,
        feed: Mapping[str, np.ndarray] | None = None,
        preprocess: pp.Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        head: HeadChoice | None = None,
        precision: str = "float32",
        name: str | None = None,
        input_shape: Sequence[int | None] | None = None,
        advised: tuple[int, int] | None = None,
        known: pp.Preprocessing | None = None,
        channels_last_input: bool = False,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise UsageError(f"precision {precision!r} is not known; expected one of {', '.join(PRECISIONS)}.")
        self.module = unwrapped(module)
        self.source = source
        self.name = name or class_name(self.module)
        self.output, self.outputs = output or "", ()
        weight = next((tensor for tensor in self._tensors() if tensor.is_floating_point()), torch.zeros(()))
        self.device, self._dtype, self._precision = weight.device, weight.dtype, precision
        self.ops = torch_ops.on(self.device)
        self._backend = TorchBackend(self.device)
        self.framework = f"torch {torch.__version__}"
        self.backend = str(self.device) + ("" if precision == "float32" else f", {precision}")
        self._materialise(size or advised)
        self._refuse_inference_tensors()
        self._paths = named_modules(self.module)
        self._opening, self._changing = True, set[tuple[nn.Module, str]]()
        self._entry = self._as_it_was(
            lambda: Entry(
                self.module,
                self._called,
                declared=input_shape,
                name=input,
                asked=size,
                advised=advised,
                feed=feed or {},
                channels_last=channels_last_input,
                dtype=self._dtype,
                device=self.device,
            )
        )
        self.inputs = self._entry.inputs
        self._undo: str | None = None
        self._hash: tuple[Any, str] | None = None
        self._shown: dict[tuple[int, int], _Shown] = {}
        seen = self._look(guess_size=size is None and advised is None)
        self._opening = False
        self.head = self._find_head(seen, head)
        self.preprocessing = preprocess or known or self._guess_preprocessing(seen)
        self.class_names = None if class_names is None else self.checked_names(class_names)

    # taps ------------------------------------------------------------------------------------------

    def compile(self, function: Callable) -> Callable:
        """See `Network.compile`. Eager; the weights are those of the moment of each call."""

        def call(*tensors: Tensor) -> Any:
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
        return failing_layer(error, paths, _OWN)

    def value_and_grad(self, function: Callable) -> Callable:
        """See `Network.value_and_grad`."""
        return self._backend.value_and_grad(function)

    def positive_gradient(self, x: Tensor) -> Tensor:
        """See `Network.positive_gradient`."""
        return self._backend.positive_gradient(x)

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

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """See `Network.numpy`."""
        return self._backend.numpy(tensor)

    def count_nonzero(self, x: Tensor, axis: tuple[int, ...]) -> Tensor:
        """See `Network.count_nonzero`."""
        return torch_ops.counts_of_nonzero(x, axis)

    def weights(self) -> list[np.ndarray]:
        """See `Network.weights`."""
        return [
            (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
            for tensor in self._tensors()
        ]

    def _hashed(self) -> str:
        """Made anew where a tensor lies elsewhere, was written to, or has another checksum.

        What is written through `.data` shows in the checksum alone, which costs a fifth of the hash.
        """
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

    def linearisable(self, path: str) -> tuple[str, ...]:
        """See `Network.linearisable`."""
        return tuple(bends_at(self._taps_at(self.inputs.size), path))

    def precision_for_ascent(self) -> str:
        """See `Network.precision_for_ascent`. What the network was opened with, or has weights in, it keeps."""
        plain = self._precision == "float32" and self._dtype == torch.float32
        pays = plain and self.device.type in ("cpu", "cuda") and self._backend.bfloat16_pays()
        return "bfloat16" if pays else "float32"

    def layers_at(self, size: tuple[int, int]) -> tuple[Layer, ...]:
        """See `Network.layers_at`."""
        if size not in self._shown:
            self._remember(size, self._observe(size))
        return self._shown[size].layers

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    def _run(
        self,
        x: Tensor,
        record: Recording = (),
        rules: Mapping[str, Rule] | None = None,
        outputs: bool = True,
        undone: bool = True,
        linear: Sequence[str] = (),
        before: Mapping[str, Rule] | None = None,
        precision: str | None = None,
        folded: bool = False,
    ) -> Record:
        """One pass of pictures `x` `(n, h, w, c)` with taps; see `Network.compile`.

        Batch norms stay as they are with `folded` too: PyTorch computes them in one step already. No layer has a
        non-linearity of its own, so `before` has to be empty.
        """
        if before:
            raise ModelError(
                f"{', '.join(before)}: no module ends in a non-linearity of its own, so nothing is before it."
            )
        size = (int(x.shape[1]), int(x.shape[2]))
        undo = {self._undo} if self._undo and undone and (outputs or self._undo in record) else set()
        taps = _Taps(self._taps_at(size), self._paths, record, rules or {}, undo | {*linear}, stop=not outputs)
        returned = restored(taps.place, lambda _: self._unless_enough(*self._entry.arguments(x), precision=precision))
        taps.check_fired()
        return Record(None if returned is None else self._logits(returned), taps.recorded)

    def _unless_enough(self, *arguments: Tensor, precision: str | None) -> Any:
        """What the module returns, None where every tap spoke before its end."""
        try:
            return self._called(*arguments, precision=precision)
        except _Enough:
            return None

    def _called(self, *arguments: Tensor, precision: str | None = None) -> Any:
        own = self._precision != "float32"  # what the network was opened with stays
        kind = PRECISIONS[self._precision if own or precision is None else precision]
        if kind is None:
            checkpoint()
            return self.module(*arguments)
        autocast = torch.autocast(self.device.type, kind)
        return restored(lambda undo: undo.enter_context(autocast), lambda _: self.module(*arguments))

    def _as_it_was(self, body: Callable[[], Any]) -> Any:
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

    def _taps_at(self, size: tuple[int, int]) -> dict[str, tuple[Call, int]]:
        self.layers_at(size)
        return self._shown[size].calls

    def _logits(self, returned: Any) -> Tensor:
        outputs = _named_outputs(self.module, returned)[self.output].float()
        return self.head.logits(self.ops, outputs.reshape(len(outputs), -1))

    # a first look ----------------------------------------------------------------------------------

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
            f"{self.name} has layers that are created when it is first called, and it can't be called on a "
            f"picture ({one_line(errors[0])}). Call it once yourself, then open it."
        ) from errors[0]

    def _refuse_inference_tensors(self) -> None:
        if any(tensor.is_inference() for tensor in self._tensors()):
            raise ModelError(
                f"{self.name} has weights that were made under torch.inference_mode(), and PyTorch computes no "
                "gradients with those. Make or load the module outside of it."
            )

    def _look(self, guess_size: bool) -> _Seen:
        """Watch the module once: its outputs and its layers."""
        seen = self._observe(self.inputs.size)
        if guess_size and self.inputs.free:
            smaller = _small_pictures(layers_of(paths_of(seen.calls), seen.flow, None), self.inputs.size)
            if smaller is not None:
                note = f"a guess: it halves pictures {smaller[1]} times only; --input-size sets another"
                self.inputs = replace(self.inputs, size=(smaller[0], smaller[0]), note=note)
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
                    raise ModelError(_cant_run(self.name, size, self.inputs.channels, reason)) from error
            else:
                outputs.update({name: watch.value(output) for name, output in returned.items()})
            watch.finish()

        self._as_it_was(lambda: restored(_recording, lambda _: look()))
        if not outputs and size == self.inputs.size:
            raise ModelError(f"{self.name} returned no tensor; expected class scores (n, classes) or maps.")
        mark_layouts(watch.calls, True)
        return _Seen(watch.calls, Flow(watch.calls), given, given[self._entry.position], outputs)

    def _remember(self, size: tuple[int, int], seen: _Seen) -> tuple[Layer, ...]:
        """Keep the layers of a pass and the calls that taps are placed at."""
        paths = paths_of(seen.calls)
        output = seen.outputs.get(self.output)
        on_path = None if output is None else seen.flow.between(seen.given, seen.picture, output)
        self._shown[size] = _Shown(paths, layers_of(paths, seen.flow, on_path))
        return self._shown[size].layers

    def _find_head(self, seen: _Seen, asked: HeadChoice | None) -> Head:
        """What the graph tells of the output: a softmax or sigmoid to undo, else logits, as is usual in PyTorch."""
        output = seen.outputs[self.output]
        units = int(np.prod(output.shape[1:]))
        if int(np.prod(output.shape[2:])) != 1 and len(output.shape) > 1 and output.shape[-1] != units:
            return Head(units, spatial=True)
        found = undoable_head(seen.flow, output)
        if found is not None and asked != "linear":
            activation, call = found
            self._undo = next(path for path, (other, _) in self._shown[self.inputs.size].calls.items() if other is call)
            return Head(units, activation, undone=self._undo)
        if asked is not None:
            return Head(units) if asked == "linear" else Head(units, asked, returns_logits=True)
        if units == 1 or not linear_by_graph(seen.flow, output):
            return Head(units, guess=True)
        return Head(units, "softmax", returns_logits=True, guess=True)

    def _guess_preprocessing(self, seen: _Seen) -> pp.Preprocessing:
        """What the module tells of the pixels it was trained on, else a guess that says it is one."""
        inside = _scaling_inside(seen.flow.first_steps(seen.picture))
        if inside is not None:
            return inside
        told = _told_by_statistics(first_norm(seen.calls, seen.flow))
        if told is not None:
            return told
        if self.inputs.channels != 3:
            reason = "most networks for such pictures take 0..1; set --preprocess if yours does not"
            return pp.PRESETS["0..1"].because(pp.GUESS, reason)
        reason = "most networks made with PyTorch take it; set --preprocess if yours does not"
        return pp.PRESETS["torch"].because(pp.GUESS, reason)


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


def _eagerly() -> AbstractContextManager[Any]:
    """Hooks don't fire inside what `torch.compile` made: run the original."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Taps:
    """Hooks for one pass: they record outputs, apply rules, undo the head, and stop the pass."""

    def __init__(
        self,
        calls: Mapping[str, tuple[Call, int]],
        modules: Mapping[nn.Module, str],
        record: Recording,
        rules: Mapping[str, Rule],
        undo: set[str],
        stop: bool,
    ) -> None:
        self._record, self._rules, self._undo, self._stop = as_recording(record), dict(rules), undo, stop
        self._modules = modules
        self._at = {path: calls[path] for path in {*self._record, *self._rules, *undo}}
        self._left = {*self._record, *self._rules}
        self._count: dict[Any, int] = {}
        self._busy = False
        self.recorded: dict[str, Any] = {}

    def place(self, undo: ExitStack) -> None:
        """Tap; `undo` takes the taps away."""
        taps: dict[Any, list[tuple[str, Call, int]]] = {}
        for path, (call, index) in self._at.items():
            taps.setdefault(call.operation, []).append((path, call, index))
        functions = {key: at for key, at in taps.items() if isinstance(key, str)}
        for module, at in taps.items():
            if module not in functions:
                if any(path in self._undo for path, _, _ in at):
                    _not_in_place(module, undo)
                undo.callback(module.register_forward_hook(self._hook(module, at), with_kwargs=True).remove)
        if functions:
            places = Places(self._modules)
            places.follow(undo)
            undo.enter_context(FunctionMode(places, self._mode(functions)))

    def check_fired(self) -> None:
        """A tap that did not fire would show an old picture or none: say so loudly."""
        if self._left:
            raise ModelError(
                f"the layer{'s' if len(self._left) > 1 else ''} {', '.join(sorted(self._left))} did not run when the "
                "model was called, so there is nothing to show. Expected the calls seen when the model was opened; "
                "a model whose path depends on its input can't be tapped there."
            )

    def _hook(self, module: nn.Module, at: list[tuple[str, Call, int]]) -> Callable:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            return self._touched(module, at, (args, kwargs), result)

        return hook

    def _mode(self, functions: Mapping[str, list[tuple[str, Call, int]]]) -> Callable:
        undone = {self._at[path][0].operation for path in self._undo}

        def seen(path: str, name: str, args: Any, kwargs: Any, run: Callable) -> Any:
            if path in undone:  # it may work in place, and what it is given is wanted
                given = [tensor.clone() for tensor in tensors_of((args, kwargs))[:1]]
                result = run()
                args, kwargs = (*given,), {}
            else:
                result = run()
            if self._busy:
                return result
            tensors = tensors_of(result)
            if path not in functions or not any(tensor.dim() > 0 for tensor in tensors):
                return result
            return self._touched(path, functions[path], (args, kwargs), result)

        return seen

    def _touched(self, operation: Any, at: list[tuple[str, Call, int]], given: Any, result: Any) -> Any:
        checkpoint()
        nth = self._count[operation] = self._count.get(operation, -1) + 1
        self._busy = True  # what a rule computes is no part of the network
        for path, call, index in at:
            if call.nth == nth:
                result = self._touch(path, call, index, given, result)
        self._busy = False
        if self._stop and not self._left:
            raise _Enough
        return result

    def _touch(self, path: str, call: Call, index: int, given: Any, result: Any) -> Any:
        tensor = flat_outputs(result)[index][1]
        if path in self._undo:
            before = tensors_of(given)[0]
            result, tensor = _replaced(result, tensor, before), before
        self._left.discard(path)
        if path in self._rules:
            activation = self._rules[path](_channels_last(tensor, call))
            changed = _channels_back(activation, call).to(tensor.dtype)
            result, tensor = _replaced(result, tensor, changed), changed
        if path in self._record:
            activation = _channels_last(tensor, call)
            kept = self._record[path](activation)
            overwritten = index in call.facts.get("overwritten", ()) and not self._stops_here()
            self.recorded[path] = _replaced(kept, activation, activation.clone()) if overwritten else kept
        return result

    def _stops_here(self) -> bool:
        return self._stop and not self._left


def _not_in_place(module: nn.Module, undo: ExitStack) -> None:
    """What a module is given is wanted afterwards, so it must not write over it."""
    if getattr(module, "inplace", False):
        undo.callback(setattr, module, "inplace", True)
        module.inplace = False  # type: ignore[assignment]


# Functions that modules call while they are watched and tapped.
_OWN = {function.__code__ for function in (_Taps._touched, Watch._before, Watch._after)}


def _channels_last(tensor: Tensor, call: Call) -> Tensor:
    """A map with its channels last, float32."""
    tensor = tensor.permute(0, 2, 3, 1) if call.channels_first and tensor.dim() == 4 else tensor
    return tensor.float()


def _channels_back(tensor: Tensor, call: Call) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if call.channels_first and tensor.dim() == 4 else tensor


def _replaced(structure: Any, old: Tensor, new: Tensor) -> Any:
    """Nested outputs with one tensor in another's place."""
    if structure is old:
        return new
    if is_dataclass(structure) and not isinstance(structure, type):
        same = copy.copy(structure)
        for item in fields(structure):
            object.__setattr__(same, item.name, _replaced(getattr(structure, item.name), old, new))
        return same
    if isinstance(structure, Mapping):
        changed = copy.copy(structure)
        for key, value in structure.items():
            changed[key] = _replaced(value, old, new)  # type: ignore[index]
        return changed
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_replaced(value, old, new) for value in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(_replaced(value, old, new) for value in structure)
    return structure


def _named_outputs(module: nn.Module, returned: Any) -> dict[str, Tensor]:
    """What the module returned, by the names that a user would choose from."""
    flat = flat_outputs(returned)
    names = list(getattr(module, "output_names", None) or [])
    if len(names) != len(flat):
        names = [mark.strip("[]") for mark, _ in flat]
        names = [name if name and not name.isdigit() else f"output_{index}" for index, name in enumerate(names)]
    return {name: tensor for name, (_, tensor) in zip(names, flat, strict=True) if tensor.is_floating_point()}


def _cant_run(name: str, size: tuple[int, int], channels: int, reason: str) -> str:
    reason = shorten(reason, 160, placeholder=" …").rstrip(".")
    return (
        f"{name} can't be run on a picture of {size[0]}x{size[1]} pixels with "
        f"{channels} channel{'s' if channels > 1 else ''} ({reason}). Give another size (--input-size). --debug shows "
        "the whole story."
    )


def _small_pictures(layers: Sequence[Layer], size: tuple[int, int]) -> tuple[int, int] | None:
    """The side of the pictures that a network is likely made for, and how often it halves them; None for the usual.

    Networks bring pictures down to maps of about 4 to 16 cells a side; one that leaves 28 or more of 224 was made for
    smaller ones.
    """
    sides = [min(layer.shape[:2]) for layer in layers if layer.spatial and min(layer.shape[:2]) > 1]
    if not sides or any(layer.resizes for layer in layers):
        return None
    halvings = round(np.log2(min(size) / min(sides)))
    return (64 if halvings == 3 else 32, halvings) if 1 <= halvings <= 3 else None


# -- preprocessing that the module itself tells of -------------------------------------------------------


def _scaling_inside(steps: Sequence[Call]) -> pp.Preprocessing | None:
    """What the first operations tell of the pixels that they take, where they divide or multiply by constants."""
    for step in steps:
        name = step.class_name.lower()
        numbers = [abs(number) for number in step.facts.get("scalars", ()) if number]
        if name in ("div", "mul") and numbers:
            factors = [1 / number if name == "div" else number for number in numbers]
            taken = pp.range_before_scaling(float(np.mean(factors)))
            return pp.PRESETS[taken].because(pp.FOUND, f"the model scales its own input in {step.path}")
    return None


def _told_by_statistics(pair: tuple[Call, Call] | None) -> pp.Preprocessing | None:
    """What the running statistics of a batch norm right after the first convolution tell."""
    if pair is None:
        return None
    conv, norm = (call.operation for call in pair)
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    kernel = getattr(conv, "weight", None)
    if mean is None or variance is None or kernel is None or kernel.dim() != 4 or getattr(conv, "groups", 1) != 1:
        return None
    bias = getattr(conv, "bias", None)
    arrays = [tensor.detach().float().cpu().numpy() for tensor in (kernel, mean, variance)]
    shift = np.zeros_like(arrays[1]) if bias is None else bias.detach().float().cpu().numpy()
    seen = pp.seen_by_batch_norm(arrays[0].transpose(2, 3, 1, 0), shift, arrays[1], arrays[2])
    return pp.guess_from_statistics(*seen) if seen else None
