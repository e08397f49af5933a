"""The parts of a Keras model, and the record of one watched pass through it.

Nothing here computes: the operations by path, the kind of each, and the calls of a pass for `graph.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack

import keras

from convscope.networks.foreign import KerasLayer, KerasModel, Tensor
from convscope.networks.graph import Call, Fact, Value, flat_outputs
from convscope.networks.restoring import checkpoint

CHANNELS_FIRST = "channels_first"


def patch(undo: ExitStack, target: object, name: str, value: object) -> None:
    """Give `target` an instance attribute until `undo` is run, past any tracking `__setattr__`."""
    if name in vars(target):
        undo.callback(object.__setattr__, target, name, vars(target)[name])
    else:
        undo.callback(_without, target, name)
    object.__setattr__(target, name, value)


def _without(target: object, name: str) -> None:
    vars(target).pop(name, None)


# -- the parts of the model ------------------------------------------------------------------------------


def is_recurrent(operation: KerasLayer) -> bool:
    """True for a layer that runs its cell over a sequence: no tensor may leave the loop that it does so in."""
    return isinstance(operation, keras.layers.RNN)


def _children(operation: KerasLayer) -> list[KerasLayer]:
    """The operations directly inside `operation`, without input placeholders and the cells of recurrent layers."""
    if is_recurrent(operation):
        return []
    if isinstance(operation, keras.Sequential):
        inside = operation.layers
    elif hasattr(operation, "operations"):
        inside = operation.operations
    elif isinstance(operation, keras.layers.Layer):
        inside = operation._flatten_layers(include_self=False, recursive=False)
    else:
        inside = []
    return [child for child in inside if not isinstance(child, keras.layers.InputLayer)]


def named_operations(model: KerasModel) -> list[tuple[str, KerasLayer]]:
    """Every operation below `model` with its path; one that is reached twice keeps its first path."""
    named: list[tuple[str, KerasLayer]] = []
    seen: set[int] = {id(model)}
    taken: set[str] = set()

    def walk(operation: KerasLayer, prefix: str) -> None:
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
    ("identity", ("Identity", "Cast")),
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


def kind_of(operation: KerasLayer) -> str:
    """The kind of an operation, from the names of its class and of the classes it derives from."""
    if is_recurrent(operation):
        return "recurrent"
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


def activation_name(operation: KerasLayer) -> str | None:
    """The name of the non-linearity that an operation ends in; None if it has none."""
    if is_recurrent(operation):
        return None  # it works inside the cell, and what the layer returns is a product
    function = getattr(operation, "activation", None)
    if function is None or not callable(function):
        name = type(operation).__name__.lower()
        return name if kind_of(operation) == "activation" else None
    name = getattr(function, "__name__", None) or type(function).__name__
    return None if name in _LINEAR else name.lower()


_LIBRARIES = {"keras", "tensorflow", "jax", "jaxlib", "torch"}
_RUN_ANYTHING = {"Lambda", "TFSMLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper"}


def facts_of(operation: KerasLayer) -> dict[str, Fact]:
    """What `Call.facts` holds of an operation, beside the numbers of a call.

    "opaque" where code of the user's own runs in it; "function", the name of the known function that a `Lambda` is;
    "axes" of a softmax; "bounds" of a clip.
    """
    function = getattr(operation, "activation", None)
    name = type(operation).__name__
    unknown = not _is_known(type(operation)) and kind_of(operation) == "other"
    facts: dict[str, Fact] = {"opaque": unknown or name in _RUN_ANYTHING}
    if callable(function):
        facts["opaque"] |= not _is_known(function)
    if name == "Lambda" and _is_known(operation.function):
        facts |= {"opaque": False, "function": getattr(operation.function, "__name__", None)}
    axis = getattr(function if isinstance(function, keras.layers.Layer) else operation, "axis", -1)
    axis = -1 if axis is None else axis
    facts["axes"] = slice(axis, axis + 1 or None) if isinstance(axis, int) else slice(0, 0)
    if name == "Clip":
        facts["bounds"] = (operation.x_min, operation.x_max)
    return facts


def _is_known(code: object) -> bool:
    """True for a class, a function or a layer of a library."""
    holder = code if isinstance(code, type) or inspect.isroutine(code) or hasattr(code, "__wrapped__") else type(code)
    module = getattr(holder, "__module__", None) or ""
    return module.partition(".")[0] in _LIBRARIES or inspect.isbuiltin(code)


def _scalars(given: object) -> list[float]:
    """The numbers that a call takes beside its tensors."""
    return [float(item) for item in keras.tree.flatten(given) if type(item) in (int, float)]


def _version(tensor: Tensor) -> int:
    """A number that grows when a tensor is changed in place, as torch's can be; 0 for others."""
    try:
        version = getattr(tensor, "_version", 0)
    except RuntimeError:  # a tensor made under torch.inference_mode() keeps none
        return 0
    return version if isinstance(version, int) else 0


# -- the record of one pass ------------------------------------------------------------------------------


def call_method(operation: KerasLayer) -> str:
    """The method that `Operation.__call__` dispatches to."""
    return "quantized_call" if getattr(operation, "quantization_mode", None) else "call"


def python_call(operation: KerasLayer, method: str) -> Callable:
    """The operation's `call`; the Python inside where it is wrapped in `tf.function`, whose tensors can't leave it."""
    wrapped = inspect.getattr_static(operation, method, None)
    python = getattr(wrapped, "python_function", None)
    return getattr(operation, method) if python is None else python.__get__(operation)


def is_wrapped(operation: KerasLayer) -> bool:
    """True if the operation's `call` is compiled on its own, by `tf.function`."""
    return hasattr(inspect.getattr_static(operation, call_method(operation), None), "python_function")


class Observer:
    """Writes down every call of every operation, in the order of execution, with its tensors."""

    def __init__(self, operations: list[tuple[str, object]]) -> None:
        self.calls: list[Call] = []
        self._operations = operations
        self._alive: list[object] = []
        self._made: list[tuple[Call, int, Tensor, int]] = []
        self._image: tuple[Tensor, Value] | None = None

    def place(self, undo: ExitStack) -> None:
        """Watch, until `undo` is run."""
        for path, operation in self._operations:
            method = call_method(operation)
            patch(undo, operation, method, self._watched(path, operation, method))

    def _watched(self, path: str, operation: KerasLayer, method: str) -> Callable:
        call = python_call(operation, method)

        def watched(*args: object, **kwargs: object) -> object:
            checkpoint()
            # Before the call: Keras' own preprocess_input changes its argument in place on torch.
            inputs = [self._taken(tensor) for _, tensor in flat_outputs(keras.tree.flatten((args, kwargs)))]
            result = call(*args, **kwargs)
            made = self._call(path, operation, ((args, kwargs), inputs), result)
            for index, (_, tensor) in enumerate(flat_outputs(result)):
                self._made.append((made, index, tensor, _version(tensor)))
            self.calls.append(made)
            return result

        return watched

    def begin(self, image: Tensor) -> None:
        """Note the image that the model is called with."""
        self._image = image, self.value(image)

    def _taken(self, tensor: Tensor) -> Value:
        """The identity of an argument; a cast of the image that Keras makes on its own is the image."""
        value = self.value(tensor)
        if self._image is None:
            return value
        image, known = self._image
        return known if value.shape == known.shape and tensor.dtype != image.dtype and self._is_new(value) else value

    def _is_new(self, value: Value) -> bool:
        return not any(value.key == made.key for call in self.calls for _, made in call.outputs)

    def _call(self, path: str, operation: KerasLayer, taken: tuple[object, list[Value]], result: object) -> Call:
        given, inputs = taken
        layout = getattr(operation, "data_format", None)
        return Call(
            path,
            kind_of(operation),
            type(operation).__name__,
            operation,
            nth=sum(seen.operation is operation for seen in self.calls),
            inputs=inputs,
            outputs=[(mark, self.value(tensor)) for mark, tensor in flat_outputs(result)],
            activation=activation_name(operation),
            parameters=int(operation.count_params()) if hasattr(operation, "count_params") else 0,
            channels_first=None if layout is None else layout == CHANNELS_FIRST,
            facts=facts_of(operation) | {"scalars": _scalars(given)},
        )

    def value(self, tensor: Tensor) -> Value:
        """The identity of a tensor of this pass; it is kept alive, so that no other takes its id."""
        self._alive.append(tensor)
        sides = [0 if side is None else int(side) for side in tensor.shape]
        if sides and tensor.shape[0] is None:
            sides[0] = 1  # the program of a SavedModel does not say how many rows it gives; a trace runs on one image
        return Value((id(tensor), _version(tensor)), tuple(sides))

    def finish(self) -> None:
        """Note which values were changed in place, as torch's can be, and let go of the tensors of the trace."""
        for call, index, tensor, version in self._made:
            if _version(tensor) != version:
                call.facts.setdefault("overwritten", set()).add(index)
        self._made.clear()
        self._alive.clear()
