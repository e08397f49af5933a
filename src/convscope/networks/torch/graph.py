"""The parts of a PyTorch module, and the record of one watched pass through it.

Modules are seen by forward hooks; operations that are no modules (`F.relu`, `x + y`, `torch.flatten`) by a
`TorchFunctionMode`. Inside a leaf, a module of `torch.nn` without children, nothing more is watched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from convscope.networks.foreign import Structure
from convscope.networks.graph import Call, Fact, Value, flat_outputs
from convscope.networks.layers import PASSING
from convscope.networks.restoring import checkpoint
from convscope.networks.torch import quantized
from convscope.networks.torch.modules import Described

# -- the parts of the module -----------------------------------------------------------------------------

_MODULES = (
    ("conv", r"(Lazy)?Conv(Transpose)?[123]d|DeformConv2d"),
    ("pool", r"((Adaptive)?(Max|Avg)|LP|FractionalMax)Pool[123]d"),
    ("dense", r"(Lazy)?Linear|Bilinear|NonDynamicallyQuantizableLinear"),
    ("norm", r"(Lazy)?(Batch|Instance|Group|Layer|RMS|SyncBatch|LocalResponse)Norm([123]d)?|CrossMapLRN2d"),
    ("dropout", r"(Alpha|FeatureAlpha)?Dropout([123]d)?"),
    ("identity", r"Identity"),
    ("reshape", r"Flatten|Unflatten"),
    ("padding", r"(Zero|Reflection|Replication|Constant|Circular)Pad[123]d"),
    ("resize", r"Upsample|Upsampling(Nearest|Bilinear)2d|Pixel(Un)?[sS]huffle"),
    (
        "activation",
        r"C?ELU|SELU|GLU|GELU|Hard(shrink|sigmoid|swish|tanh)|LeakyReLU|LogSigmoid|(Log)?Softmax(2d)?|Softmin|Mish|PReLU"
        r"|ReLU6?|RReLU|SiLU|Sigmoid|Soft(plus|shrink|sign)|Tanh(shrink)?|Threshold",
    ),
)
_FUNCTIONS = (
    ("conv", r"conv(_transpose)?[123]d|_?convolution"),
    ("pool", r"(adaptive_)?(max|avg)_pool[123]d(_with_indices)?|lp_pool[12]d"),
    ("dense", r"linear|addmm|matmul|mm|bmm|einsum"),
    ("norm", r"(native_)?(batch|instance|group|layer|rms|local_response)_norm|normalize"),
    ("dropout", r"(alpha_|feature_)?dropout([123]d)?"),
    ("identity", r"to|float|half|double|type|type_as|contiguous|clone|detach|alias"),
    (
        "reshape",
        r"flatten|unflatten|view|reshape|squeeze|unsqueeze|permute|transpose|expand|chunk|split|unbind|movedim|t",
    ),
    ("padding", r"pad|constant_pad_nd"),
    ("resize", r"interpolate|upsample\w*|pixel_(un)?shuffle"),
    ("merge", r"add|sub|mul|div|true_divide|cat|concat|concatenate|stack|maximum|minimum"),
    (
        "activation",
        r"c?elu|selu|g?elu|glu|hard(shrink|sigmoid|swish|tanh)|leaky_relu|logsigmoid|(log_)?softmax|mish|r?relu6?|prelu"
        r"|silu|sigmoid|soft(plus|shrink|sign)|tanh(shrink)?|threshold",
    ),
)
# A call of one of these takes and returns maps (n, c, h, w); later calls keep the layout of their input.
_CHANNELS_FIRST = ("conv", "pool", "resize")


def _kind(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((kind for kind, pattern in table if re.fullmatch(pattern, name)), None)


def described(module: nn.Module) -> Described | None:
    """The original class of a module, where its own class does not show it."""
    found = vars(module).get("described")
    return found if isinstance(found, Described) else None


def class_name(module: nn.Module) -> str:
    """The name of a module's class, or of the class or operator that it stands for."""
    found = described(module)
    return found.class_name if found else quantized.class_name(module) or type(module).__name__


def module_kind(module: nn.Module) -> str:
    """The kind of a module: of the first class of `torch.nn` that it derives from; "model" for any container."""
    found = described(module)
    if found is not None and found.kind is not None:
        return found.kind
    if quantized.is_quantized(module):
        return quantized_kind(type(module).__name__)
    if any(name != "parametrizations" for name, _ in module.named_children()):
        return "model"
    if found is not None:
        return _kind(found.class_name, _MODULES) or "model"
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules") and cls is not nn.Module:
            return _kind(cls.__name__, _MODULES) or ("model" if "container" in cls.__module__ else "other")
    return "model"


def quantized_kind(name: str) -> str:
    """The kind of a quantized module, from the name of its class; what it is made of is no part of the network."""
    return _kind(quantized.plain_name(name), _MODULES) or "other"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `DataParallel`, `DistributedDataParallel` and the result of `torch.compile`."""
    while type(module).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        module = getattr(module, "_orig_mod", None) or getattr(module, "module")  # noqa: B009
    return module


def named_modules(module: nn.Module) -> dict[nn.Module, str]:
    """Every module below `module` with its path; one that is reached twice keeps its first path."""
    paths: dict[nn.Module, str] = {}
    for name, child in module.named_modules():
        found = described(child)
        path = found.path if found is not None and found.path else re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name)
        if child is not module and type(child).__name__ != "OptimizedModule":
            paths[child] = path
    return paths


# -- functions -------------------------------------------------------------------------------------------


def function_name(function: Callable) -> str:
    """The plain name of an operation: "relu" of `F.relu`, `x.relu_()` and `aten.relu.default`, "add" of `x += y`."""
    name = getattr(function, "__name__", type(function).__name__).partition(".")[0].strip("_")
    arithmetic = re.fullmatch(r"[ir]?(add|sub|mul|truediv|matmul)", name)
    return {"truediv": "div"}.get(arithmetic[1], arithmetic[1]) if arithmetic else name


def function_kind(name: str, result: object) -> str:
    """The kind of an operation that is no module, from its name and, for means over maps, from its output."""
    if name in ("mean", "amax", "max", "sum") and isinstance(result, torch.Tensor):
        pooled = result.dim() == 2 or (result.dim() == 4 and result.shape[2] * result.shape[3] == 1)
        return "global_pool" if pooled else "other"
    return _kind(name, _FUNCTIONS) or "other"


def activation_of(kind: str, name: str) -> str | None:
    """The name of a non-linearity, lower case; None for a call of another kind. A logarithm changes no order."""
    if kind != "activation":
        return None
    plain = name.lower()
    return "softmax" if re.fullmatch(r"(log_?)?softmax(2d)?", plain) else plain


# -- the record of one pass ------------------------------------------------------------------------------


def tensors_of(structure: Structure) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(structure, torch.Tensor):
        return [structure]
    if is_dataclass(structure) and not isinstance(structure, type):
        structure = [getattr(structure, item.name) for item in fields(structure)]
    items = structure.values() if isinstance(structure, Mapping) else structure
    if isinstance(structure, Mapping | list | tuple):
        return [tensor for item in items for tensor in tensors_of(item)]
    return []


class Places:
    """Where in the module a pass is: the path of the innermost module, and whether that is a leaf."""

    def __init__(self, modules: Mapping[nn.Module, str]) -> None:
        self._modules = modules
        self._leaves = {module for module in modules if module_kind(module) != "model"}
        self._stack: list[nn.Module] = []
        self._taken = set(modules.values())

    def follow(self, undo: ExitStack) -> None:
        """Follow the pass, until `undo` is run."""
        for module in self._modules:
            undo.callback(module.register_forward_pre_hook(self._enter).remove)
            undo.callback(module.register_forward_hook(self._leave, prepend=True).remove)

    @property
    def in_leaf(self) -> bool:
        """True while a leaf is running: its inner calls are not watched."""
        return any(module in self._leaves for module in self._stack)

    def path_of(self, name: str) -> str:
        """The path of an operation that is no module, called here."""
        inside = self._modules[self._stack[-1]] if self._stack else ""
        path, again = f"{inside}.{name}" if inside else name, 1
        while path in self._taken:
            again += 1
            path = f"{inside}.{name}~{again}" if inside else f"{name}~{again}"
        return path

    def _enter(self, module: nn.Module, _: object) -> None:
        self._stack.append(module)

    def _leave(self, module: nn.Module, *_: object) -> None:
        while self._stack and self._stack.pop() is not module:
            pass


class FunctionMode(TorchFunctionMode):
    """Hands every operation that is no module, and lies in no leaf, to `seen(path, name, args, kwargs, result)`.

    The return value of `seen` replaces the result.
    """

    def __init__(self, places: Places, seen: Callable[..., object]) -> None:
        super().__init__()
        self._places, self._seen = places, seen

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        name = function_name(func)
        if name in _UNSEEN or self._places.in_leaf:
            return func(*args, **kwargs)
        return self._seen(self._places.path_of(name), name, args, kwargs, lambda: func(*args, **kwargs))


# Properties, and functions that inspect a tensor without making one.
_UNSEEN = frozenset({"get", "set", "size", "dim", "numel", "is_floating_point", "requires_grad", "shape", "data_ptr"})


class Watch:
    """Writes down every call of every module and of the operations that are none, in the order of execution.

    The image has to require a gradient: a tensor belongs to its flow if it requires one too (what is computed from
    weights alone is no layer).
    """

    def __init__(self, modules: Mapping[nn.Module, str]) -> None:
        self.calls: list[Call] = []
        self._modules = modules
        self._places = Places(modules)
        self._given: dict[nn.Module, list[list[Value]]] = {}
        self._made: list[tuple[Call, int, torch.Tensor, int]] = []
        self._count: dict[object, int] = {}
        self._alive: list[torch.Tensor] = []
        self._flowing: set[object] = set()
        self._changes: dict[int, int] = {}

    def place(self, undo: ExitStack) -> None:
        """Watch, until `undo` is run."""
        for module in self._modules:
            undo.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(self._after, with_kwargs=True).remove)
        self._places.follow(undo)
        undo.enter_context(FunctionMode(self._places, self._function))

    def finish(self) -> None:
        """Note which values were changed in place (by a ReLU that works so): they have to be copied when recorded."""
        for call, index, tensor, version in self._made:
            if self._version(tensor) != version:
                call.facts.setdefault("overwritten", set()).add(index)
        self._made.clear()
        self._alive.clear()

    def value(self, tensor: torch.Tensor) -> Value:
        """The identity of a tensor at this moment: a change in place makes another value of it."""
        self._alive.append(tensor)
        return Value((id(tensor), self._version(tensor)), tuple(tensor.shape))

    def _version(self, tensor: torch.Tensor) -> int:
        """A number that grows when a tensor is changed in place; under `inference_mode` torch does not count."""
        return self._changes.get(id(tensor), 0) if tensor.is_inference() else tensor._version

    def begin(self, tensor: torch.Tensor) -> Value:
        """The value of an input of the network."""
        value = self.value(tensor)
        self._flowing.add(value.key)
        return value

    def _values(self, structure: object) -> list[Value]:
        values = [(tensor, self.value(tensor)) for tensor in tensors_of(structure)]
        return [value for tensor, value in values if tensor.requires_grad or value.key in self._flowing]

    def _before(self, module: nn.Module, args: object, kwargs: object) -> None:
        checkpoint()
        self._given.setdefault(module, []).append(self._values((args, kwargs)))

    def _after(self, module: nn.Module, args: object, kwargs: object, result: object) -> None:
        nth, inputs = self._nth(module), self._given[module].pop()
        if not inputs:
            return  # modules that compute weights from weights, as parametrisations do
        name = class_name(module)
        kind = _pooling(module_kind(module), "Adaptive" in name, result)
        parameters = 0 if kind == "model" else sum(parameter.numel() for parameter in module.parameters())
        call = Call(self._modules[module], kind, name, module, nth, inputs, [], parameters=parameters)
        call.activation = activation_of(kind, name.partition(" ")[0])
        call.channels_first = _layout(kind, module, result)
        call.facts |= {"axes": _axes(getattr(module, "dim", None)), **getattr(module, "facts", {})}
        call.facts["scalars"] = [number for value in getattr(module, "constants", ()) for number in _numbers(value)]
        self._finish(call, result)

    def _function(self, path: str, name: str, args: tuple, kwargs: dict, run: Callable) -> Structure:
        inputs = self._values((args, kwargs))
        result = run()
        if not any(tensor.dim() > 0 for tensor in tensors_of(result)):
            return result
        nth = self._nth(path)  # taps count every call, whether the image has a part in it or not
        if not inputs:
            return result
        kind = _pooling(function_kind(name, result), name.startswith("adaptive"), result)
        call = Call(path, kind, name, path, nth, inputs, [], activation=activation_of(kind, name))
        call.channels_first = _permuted(name, args, kwargs) if name == "permute" else _layout(kind, None, result)
        flowing = {value.key for value in inputs}
        constants = [arg for arg in args if not (isinstance(arg, torch.Tensor) and self.value(arg).key in flowing)]
        call.facts["scalars"] = [number for arg in constants for number in _numbers(arg)]
        call.facts |= _facts_of(name, args, kwargs)
        self._finish(call, result)
        return result

    def _nth(self, operation: object) -> int:
        self._count[operation] = self._count.get(operation, -1) + 1
        return self._count[operation]

    def _finish(self, call: Call, result: object) -> None:
        if not any(tensor.is_floating_point() or tensor.is_quantized for tensor in tensors_of(result)):
            return  # a shape or a mask is no layer
        taken = {value.key[0] for value in call.inputs if isinstance(value.key, tuple)}
        for index, (mark, tensor) in enumerate(flat_outputs(result)):
            if tensor.is_inference() and id(tensor) in taken and call.kind not in PASSING | {"model"}:
                self._changes[id(tensor)] = self._changes.get(id(tensor), 0) + 1
            value = self.value(tensor)
            self._flowing.add(value.key)
            call.outputs.append((mark, value))
            self._made.append((call, index, tensor, self._version(tensor)))
        self.calls.append(call)


def _facts_of(name: str, args: tuple, kwargs: dict) -> dict[str, Fact]:
    """What `Call.facts` holds of a function: the axes of a softmax, the bounds of a clip."""
    if "softmax" in name:
        return {"axes": _axes(kwargs.get("dim", args[1] if len(args) > 1 else None))}
    if name in ("clamp", "clip", "clamp_min"):
        low, high, *_ = (*args[1:], None, None)
        return {"bounds": (_bound(kwargs.get("min", low)), _bound(kwargs.get("max", high)))}
    return {}


def _bound(value: object) -> float | None:
    """One end of a clip; a bound for each value counts as one that clips everything."""
    if value is None:
        return None
    numbers = _numbers(value)
    return numbers[0] if len(numbers) == 1 else float("nan")


def _axes(dim: object) -> slice | None:
    """The axes of a softmax over `dim`; None where it is not said."""
    return slice(dim, dim + 1 or None) if isinstance(dim, int) else None


MOST_NUMBERS = 4  # one for each channel of an image


def _numbers(value: object) -> list[float]:
    """A number, or the few of a small tensor, such as a mean for each channel."""
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, torch.Tensor) and value.numel() <= MOST_NUMBERS and value.is_floating_point():
        return [float(number) for number in value.detach().reshape(-1).tolist()]
    return []


def _pooling(kind: str, adaptive: bool, result: object) -> str:
    """The kind of a call, "global_pool" where an adaptive pooling leaves one cell."""
    points = all(side == 1 for tensor in tensors_of(result) for side in tensor.shape[2:])
    return "global_pool" if kind == "pool" and adaptive and points else kind


def _layout(kind: str, module: nn.Module | None, result: object) -> bool | None:
    """Whether a call declares that its maps have the channels first."""
    rank = result.dim() if isinstance(result, torch.Tensor) else 0
    if rank != 4:
        return None
    if kind == "dense" or (type(module) is nn.LayerNorm and len(module.normalized_shape) == 1):
        return False  # both work on the last axis
    if kind in _CHANNELS_FIRST or (kind == "norm" and module is not None and not isinstance(module, nn.LayerNorm)):
        return True
    return None


def _permuted(name: str, args: tuple, kwargs: dict) -> bool | None:
    dims = kwargs.get("dims", args[1] if len(args) == 2 else args[1:])
    return {(0, 2, 3, 1): False, (0, 3, 1, 2): True}.get(tuple(dim % 4 for dim in dims) if len(dims) == 4 else ())
