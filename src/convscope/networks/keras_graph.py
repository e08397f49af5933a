"""What a Keras model consists of, and what one watched pass through it shows.

Nothing here computes: the operations by path, who made which tensor, what kind of thing each layer is, and where the
head and the first batch norm are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import keras

from convscope.networks.network import PASSING, Layer

CHANNELS_FIRST = "channels_first"


@contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give `target` an instance attribute for the length of a block, past any tracking `__setattr__`."""
    had, before = name in vars(target), vars(target).get(name)
    object.__setattr__(target, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(target, name, before)
        else:
            object.__delattr__(target, name)


# -- what the model consists of --------------------------------------------------------------------------


def _children(operation: Any) -> list[Any]:
    """The operations directly inside `operation`, without input placeholders."""
    if isinstance(operation, keras.Sequential):
        inside = operation.layers
    elif hasattr(operation, "operations"):
        inside = operation.operations
    elif isinstance(operation, keras.layers.Layer):
        inside = operation._flatten_layers(include_self=False, recursive=False)
    else:
        inside = []
    return [child for child in inside if not isinstance(child, keras.layers.InputLayer)]


def named_operations(model: Any) -> list[tuple[str, Any]]:
    """Every operation below `model` with its path; one that is reached twice keeps its first path."""
    named: list[tuple[str, Any]] = []
    seen: set[int] = {id(model)}
    taken: set[str] = set()

    def walk(operation: Any, prefix: str) -> None:
        for child in _children(operation):
            if id(child) in seen:
                continue
            seen.add(id(child))
            path, again = prefix + child.name, 1
            while path in taken:  # subclassed models may hold two layers of one name
                again += 1
                path = f"{prefix}{child.name}~{again}"
            taken.add(path)
            named.append((path, child))
            walk(child, path + "/")

    walk(model, "")
    return named


_KINDS = (
    ("global_pool", ("GlobalMaxPooling", "GlobalAveragePooling")),
    (
        "pool",
        (
            "MaxPooling",
            "AveragePooling",
            "AdaptiveMaxPooling",
            "AdaptiveAveragePooling",
            "MaxPool",
            "AveragePool",
        ),
    ),
    ("conv", ("Conv1D", "Conv2D", "Conv3D", "DepthwiseConv", "SeparableConv", "Conv", "BaseConv")),
    ("dense", ("Dense", "EinsumDense")),
    (
        "norm",
        ("BatchNormalization", "LayerNormalization", "GroupNormalization", "UnitNormalization", "RMSNorm"),
    ),
    ("rescaling", ("Rescaling", "Normalization")),
    (
        "augmentation",
        ("Random", "AutoContrast", "CutMix", "MixUp", "AugMix", "RandAugment", "BaseImagePreprocessing"),
    ),
    (
        "dropout",
        ("Dropout", "SpatialDropout", "GaussianDropout", "GaussianNoise", "AlphaDropout", "ActivityReg"),
    ),
    ("identity", ("Identity",)),
    ("reshape", ("Flatten", "Reshape", "Permute", "RepeatVector", "ExpandDims", "Squeeze", "Transpose")),
    ("padding", ("ZeroPadding", "Cropping", "Pad")),
    ("resize", ("UpSampling", "Resizing", "Resize", "CenterCrop")),
    ("merge", ("Add", "Concatenate", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Dot")),
    (
        "activation",
        (
            *(
                "Activation",
                "ReLU",
                "Relu",
                "Relu6",
                "LeakyReLU",
                "LeakyRelu",
                "PReLU",
                "ELU",
                "Elu",
                "Softmax",
            ),
            *(
                "Sigmoid",
                "Silu",
                "Gelu",
                "HardSigmoid",
                "HardSilu",
                "HardSwish",
                "Tanh",
                "Selu",
                "Softplus",
                "Mish",
            ),
        ),
    ),
)


def kind_of(operation: Any) -> str:
    """The kind of an operation, from the names of its class and of the classes it derives from."""
    if _children(operation) and not type(operation).__module__.startswith("keras."):
        return "model"  # a block of the user's own, whatever it is called
    for cls in type(operation).__mro__:
        for kind, prefixes in _KINDS:
            if any(_is_named(cls.__name__, prefix) for prefix in prefixes):
                return kind
    return "model" if _children(operation) else "other"


def _is_named(name: str, prefix: str) -> bool:
    """`MaxPooling2D` is named `MaxPooling`; `ConvLSTM` is not `Conv`, `Additive` not `Add`."""
    rest = name.removeprefix(prefix)
    if prefix in ("Random", "Dropout", "ActivityReg"):
        return name.startswith(prefix)
    return name.startswith(prefix) and rest in (
        "",
        "1D",
        "2D",
        "3D",
        "Transpose",
        "1DTranspose",
        "2DTranspose",
        "3DTranspose",
    )


_LINEAR = ("linear",)


def activation_name(operation: Any) -> str | None:
    """The name of the non-linearity that an operation ends in; None if it has none."""
    function = getattr(operation, "activation", None)
    if function is None or not callable(function):
        name = type(operation).__name__.lower()
        return name if kind_of(operation) == "activation" else None
    name = getattr(function, "__name__", None) or type(function).__name__
    return None if name in _LINEAR else name.lower()


# -- what one pass shows ---------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of one operation, as seen while the model was traced."""

    path: str
    operation: Any
    nth: int
    inputs: list[Any]
    outputs: list[tuple[str, Any]]
    channels_first: bool = False


def flat_outputs(structure: Any) -> list[tuple[str, Any]]:
    """Tensors of a layer's output with the text that tells them apart ("" for a single one)."""
    if isinstance(structure, Mapping):
        return [(f"[{key}]", structure[key]) for key in structure if hasattr(structure[key], "shape")]
    if isinstance(structure, list | tuple):
        tensors = [(index, item) for index, item in enumerate(structure) if hasattr(item, "shape")]
        return [("" if len(tensors) == 1 else f"[{index}]", item) for index, item in tensors]
    return [("", structure)] if hasattr(structure, "shape") else []


def call_method(operation: Any) -> str:
    """The method that `Operation.__call__` dispatches to."""
    return "quantized_call" if getattr(operation, "quantization_mode", None) else "call"


def python_call(operation: Any, method: str) -> Callable:
    """The operation's `call`; the Python inside where it is wrapped in `tf.function`, whose tensors can't leave it."""
    wrapped = inspect.getattr_static(operation, method, None)
    python = getattr(wrapped, "python_function", None)
    return getattr(operation, method) if python is None else python.__get__(operation)


def is_wrapped(operation: Any) -> bool:
    """True if the operation's `call` is compiled on its own, by `tf.function`."""
    return hasattr(inspect.getattr_static(operation, call_method(operation), None), "python_function")


class Observer:
    """Writes down every call of every operation, in the order of execution, with its tensors."""

    def __init__(self, operations: list[tuple[str, Any]]) -> None:
        self.calls: list[Call] = []
        self.output: Any = None
        self._operations = operations

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of a block."""
        with ExitStack() as stack:
            for path, operation in self._operations:
                method = call_method(operation)
                stack.enter_context(patched(operation, method, self._watched(path, operation, method)))
            yield

    def _watched(self, path: str, operation: Any, method: str) -> Callable:
        call = python_call(operation, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            nth = sum(seen.operation is operation for seen in self.calls)
            inputs = [tensor for _, tensor in flat_outputs(keras.tree.flatten((args, kwargs)))]
            self.calls.append(Call(path, operation, nth, inputs, flat_outputs(result)))
            return result

        return watched


def mark_layouts(calls: list[Call], given: bool) -> None:
    """Say of each call whether its maps have the channels first: as its `data_format` says, else as its input's."""
    layout: dict[int, bool] = {}
    for call in calls:
        own = getattr(call.operation, "data_format", None)
        inherited = next((layout[id(tensor)] for tensor in call.inputs if id(tensor) in layout), given)
        call.channels_first = inherited if own is None else own == CHANNELS_FIRST
        for _, tensor in call.outputs:
            layout.setdefault(id(tensor), call.channels_first)


class Flow:
    """Who made a tensor, and who took it: the flow of data between the calls of leaf operations."""

    def __init__(self, calls: list[Call]) -> None:
        # A call that hands its input on (Dropout, when nothing is trained) neither makes nor takes anything.
        leaves = [call for call in calls if kind_of(call.operation) != "model" and not _hands_on(call)]
        self._leaves = leaves
        self._maker: dict[int, Call] = {}
        self._takers: dict[int, list[Call]] = {}
        for call in leaves:
            for _, tensor in call.outputs:
                self._maker.setdefault(id(tensor), call)
            for tensor in call.inputs:
                self._takers.setdefault(id(tensor), []).append(call)

    def maker(self, tensor: Any) -> Call | None:
        """The call that made `tensor`; None for an input of the network."""
        return self._maker.get(id(tensor))

    def before(self, call: Call) -> Call | None:
        """The call that made the first input of `call`."""
        return next((made for made in map(self.maker, call.inputs) if made is not None), None)

    def only_taker(self, call: Call) -> Call | None:
        """The one call that takes what `call` made, None if there are more or none."""
        takers = [taker for _, tensor in call.outputs for taker in self._takers.get(id(tensor), [])]
        return takers[0] if len(takers) == 1 else None

    def between(self, given: list[Any], picture: Any, output: Any) -> set[int] | None:
        """Ids of the calls through which `picture` reaches `output`; None where some step between calls is not seen.

        Args:
            given: the tensors that the model was called with; `picture` is one of them.
            picture, output: the ends of the way.
        """
        known = set(self._maker) | {id(tensor) for tensor in given}
        used = {id(tensor): tensor for call in self._leaves for tensor in call.inputs if len(tensor.shape) > 1}
        if not used.keys() <= known or id(picture) not in used or id(output) not in self._maker:
            return None
        after: set[int] = set()
        reached = {id(picture)}
        for call in self._leaves:  # in the order of execution, so one sweep does
            if any(id(tensor) in reached for tensor in call.inputs):
                after.add(id(call))
                reached.update(id(tensor) for _, tensor in call.outputs)
        before: set[int] = set()
        needed = {id(output)}
        for call in reversed(self._leaves):
            if any(id(tensor) in needed for _, tensor in call.outputs):
                before.add(id(call))
                needed.update(id(tensor) for tensor in call.inputs)
        return after & before

    def first_steps(self, picture: Any) -> list[Any]:
        """The operations that the picture passes one after the other, up to the first convolution or dense layer."""
        steps: list[Any] = []
        tensor = picture
        while True:
            takers = self._takers.get(id(tensor), [])
            if len(takers) != 1 or kind_of(takers[0].operation) in ("conv", "dense", "norm", "pool"):
                return steps
            steps.append(takers[0].operation)
            if len(takers[0].outputs) != 1:
                return steps
            tensor = takers[0].outputs[0][1]

    def rectified(self, call: Call) -> Call | None:
        """The call after whose non-linearity the zeros of `call` are counted (FIELD.md §1), None if there is none."""
        kind = kind_of(call.operation)
        if activation_name(call.operation) is not None:
            return call
        if kind in ("pool", "global_pool", "dropout", "padding"):
            source = self.before(call)
            while source is not None and activation_name(source.operation) is None:
                if kind_of(source.operation) not in (
                    "pool",
                    "dropout",
                    "identity",
                    "padding",
                    "reshape",
                    "resize",
                ):
                    source = None
                else:
                    source = self.before(source)
            if source is not None:
                return call
        after = self.only_taker(call)
        while after is not None and activation_name(after.operation) is None:
            after = self.only_taker(after) if kind_of(after.operation) in PASSING | {"norm"} else None
        return after


def _hands_on(call: Call) -> bool:
    given = {id(tensor) for tensor in call.inputs}
    return any(id(tensor) in given for _, tensor in call.outputs)


def paths_of(calls: list[Call]) -> dict[str, tuple[Call, int]]:
    """Every output of every call by its full path."""
    total: dict[str, int] = {}
    for call in calls:
        total[call.path] = total.get(call.path, 0) + 1
    return {
        call.path + (f"#{call.nth}" if total[call.path] > 1 else "") + mark: (call, index)
        for call in calls
        for index, (mark, _) in enumerate(call.outputs)
    }


def shape_of(tensor: Any, channels_first: bool) -> tuple[int, ...]:
    """Shape for one picture, channels last."""
    shape = tuple(int(side) if side is not None else 0 for side in tensor.shape)[1:]
    return (*shape[1:], shape[0]) if channels_first and len(shape) == 3 else shape


def undoable_head(calls: list[Call], flow: Flow, output: Any) -> tuple[str, Call] | None:
    """The softmax or sigmoid that made the network's output, and which kind it is; None if there is none."""
    call = flow.maker(output)
    while call is not None:
        name = activation_name(call.operation)
        if name is not None:
            kind = "softmax" if "softmax" in name else "sigmoid" if name == "sigmoid" else None
            once = sum(other.operation is call.operation for other in calls) == 1
            return (kind, call) if kind and once else None
        if kind_of(call.operation) not in PASSING | {"reshape", "activation"}:
            return None
        call = flow.before(call)
    return None


def linear_by_graph(flow: Flow, output: Any) -> bool:
    """True if the graph shows a layer without a softmax or sigmoid as the maker of the network's output."""
    made = flow.maker(output)
    if made is None or activation_name(made.operation) is not None:
        return False
    return kind_of(made.operation) in ("dense", "conv", "norm", "merge", "global_pool")


def first_norm(calls: list[Call], flow: Flow) -> tuple[Any, Any] | None:
    """The first convolution and the batch norm right after it, if the network begins that way."""
    first = next((call for call in calls if kind_of(call.operation) in ("conv", "dense")), None)
    after = flow.only_taker(first) if first else None
    if first is None or after is None or not isinstance(after.operation, keras.layers.BatchNormalization):
        return None
    conv = first.operation
    plain = isinstance(conv, keras.layers.Conv2D) and conv.groups == 1 and activation_name(conv) is None
    return (conv, after.operation) if plain else None


def layer_of(
    path: str, at: tuple[Call, int], flow: Flow, paths: dict[str, tuple[Call, int]], on_path: set[int] | None
) -> Layer:
    """The public face of one output of one call."""
    call, index = at
    operation, rectified = call.operation, flow.rectified(call)
    where = None
    if rectified is not None:
        where = next(name for name, (other, _) in paths.items() if other is rectified)
    counted = call.nth == 0 and index == 0 and hasattr(operation, "count_params")
    return Layer(
        path=path,
        kind=kind_of(operation),
        class_name=type(operation).__name__,
        shape=shape_of(call.outputs[index][1], call.channels_first),
        parameters=int(operation.count_params()) if counted else 0,
        rectified=where if kind_of(operation) in ("conv", "pool", "norm", "activation", "merge", "dense") else None,
        on_path=on_path is None or id(call) in on_path,
    )
