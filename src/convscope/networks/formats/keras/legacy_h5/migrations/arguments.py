"""Migrations of classes, arguments, activations and operations of Keras 2."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

from convscope.networks.foreign import Tensor
from convscope.networks.formats.keras.legacy_h5.nodes import MODELS, Node, config_of, is_node, references, set_value
from convscope.networks.formats.keras.legacy_h5.stored import Stored
from convscope.schema import Json


def axis_list(layer: Node, stored: Stored) -> bool:
    """tf.keras: the one axis of a normalisation is a list.

    Keras 3 mends this where the layer has no module, not inside wrappers.
    """
    axis = config_of(layer).get("axis")
    if layer["class_name"] != "BatchNormalization" or not (isinstance(axis, list) and len(axis) == 1):
        return False
    return set_value(layer["config"], "axis", axis[0])


def dtype_policy(layer: Node, stored: Stored) -> bool:
    """tf.keras 2.1 to 2.15: a mixed-precision `Policy` is today's `DTypePolicy`."""
    policy: Json = config_of(layer).get("dtype")
    if not is_node(policy) or policy["class_name"] not in ("Policy", "PolicyV1"):
        return False
    name = config_of(policy).get("name")
    known = name in ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float32", "float64")
    config = {"name": name if known else "float32"}
    today = {"module": "keras", "class_name": "DTypePolicy", "registered_name": None}
    layer["config"]["dtype"] = {**today, "config": config}
    return True


RENAMED_CLASSES = {
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
    "ThresholdedReLU": "ReLU",
    # Outside training they return their input.
    "RandomHeight": "Identity",
    "RandomWidth": "Identity",
}


def renamed_class(layer: Node, stored: Stored) -> bool:
    """Keras 2: layers that live on under another name."""
    new = RENAMED_CLASSES.get(layer["class_name"])
    if new == "Identity":
        layer["config"] = {"name": config_of(layer).get("name")}
    if new == "ReLU":
        layer["config"]["threshold"] = layer["config"].pop("theta", 1.0)
    layer["class_name"] = new or layer["class_name"]
    return new is not None


ANYTHING = object()
# (layers, argument, value that changes nothing outside training): other values stay, and Keras refuses them.
DROPPED = (
    (r"DepthwiseConv[12]D|SeparableConv[12]D|Conv[123]DTranspose", "groups", 1),
    (r"SeparableConv[12]D", "kernel_initializer", ANYTHING),
    (r"SeparableConv[12]D", "kernel_regularizer", ANYTHING),
    (r"SeparableConv[12]D", "kernel_constraint", ANYTHING),
    (r"SpatialDropout[123]D", "noise_shape|trainable", ANYTHING),
    (r"Random.*", "rng_type", ANYTHING),
    (r"LSTM|GRU|SimpleRNN|RNN|ConvLSTM[123]D", "time_major", False),
    (r"MultiHeadAttention", "(query|key|value)_shape", ANYTHING),
    (r"MultiHeadAttention", "softmax_robust_masking", False),
    (r"Attention|AdditiveAttention", "causal", False),
)


def dropped_argument(layer: Node, stored: Stored) -> bool:
    """tf.keras 2: arguments that Keras 3 does not take any more and that change nothing."""
    config = config_of(layer)
    gone = [
        key
        for classes, argument, value in DROPPED
        if re.fullmatch(classes, layer["class_name"])
        for key in config
        if re.fullmatch(argument, key) and (value is ANYTHING or config[key] == value)
    ]
    for key in gone:
        del config[key]
    return bool(gone)


def leaky_slope(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: the slope of LeakyReLU is `alpha`."""
    if layer["class_name"] != "LeakyReLU" or "alpha" not in config_of(layer):
        return False
    layer["config"]["negative_slope"] = layer["config"].pop("alpha")
    return True


def initializer_arguments(layer: Node, stored: Stored) -> bool:
    """tf.keras 1.13 to 1.15: initializers have a `dtype`."""
    arguments = [value for key, value in config_of(layer).items() if key.endswith("_initializer")]
    gone = [config_of(item).pop("dtype", None) for item in arguments if is_node(item)]
    return any(item is not None for item in gone)


def gru_bias(layer: Node, stored: Stored) -> bool:
    """Keras 1 to 2.1: a GRU without `reset_after` has one bias; the default is two since."""
    old = layer["class_name"] == "GRU" and stored.major < 3 and "reset_after" not in config_of(layer)
    return old and set_value(layer["config"], "reset_after", False)


ACTIVATIONS = {
    "softmax_v2": "softmax",  # TensorFlow's own name of tf.nn.softmax, 2.0 to 2.3
    "hard_sigmoid": {
        "module": "builtins", "class_name": "function", "config": "hard_sigmoid_of_keras_2",
        "registered_name": "hard_sigmoid_of_keras_2",
    },
}  # fmt: skip


def activation_name(layer: Node, stored: Stored) -> bool:
    """Keras 1 and 2: activations of another name; a hard_sigmoid of slope 0.2 where Keras 3 has 1/6."""
    config = config_of(layer)
    keys = [key for key in ("activation", "recurrent_activation") if isinstance(config.get(key), str)]
    old = [key for key in keys if config[key] in ACTIVATIONS and stored.major < 3]
    for key in old:
        config[key] = copy.deepcopy(ACTIVATIONS[config[key]])
    return bool(old)


def hard_sigmoid_of_keras_2(x: Tensor) -> Tensor:
    """Keras 1 and 2: 0.2 x + 0.5 between 0 and 1."""
    from keras import ops

    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


RESCALING: dict[str, Callable[[float], tuple[float, float]]] = {
    "math.truediv": lambda y: (1 / y, 0.0),
    "math.divide": lambda y: (1 / y, 0.0),
    "math.multiply": lambda y: (y, 0.0),
    "math.add": lambda y: (1.0, y),
    "__operators__.add": lambda y: (1.0, y),
    "math.subtract": lambda y: (1.0, -y),
}


def tensorflow_operation(layer: Node, stored: Stored) -> bool:
    """tf.keras 2.4 to 2.15: `x / 127.5 - 1` in a functional model is a TFOpLambda for each operation.

    With a number this is Rescaling; `tf.nn.relu` is an Activation. Others stay, and are unknown to Keras 3.
    """
    if layer["class_name"] != "TFOpLambda":
        return False
    function, nodes = config_of(layer).get("function"), layer.get("inbound_nodes", [])
    arguments = _as_layer(function, nodes)
    if arguments is None:
        return False
    layer["class_name"], extra = arguments
    layer["config"] = {"name": layer["config"].get("name"), **extra}
    layer["inbound_nodes"] = [[[*node[:3], {}]] for node in (_only_reference(item) for item in nodes)]
    return True


def _as_layer(function: object, nodes: list[object]) -> tuple[str, Node] | None:
    """The layer that does what the TensorFlow function does in all its calls, or None where there is none."""
    calls = [_only_reference(node)[3:] for node in nodes]
    options = [{key: value for key, value in call[0].items() if value is not None} for call in calls if call]
    if not options or len(options) != len(calls) or any(option != options[0] for option in options):
        return None
    given, constant = options[0], options[0].get("y")
    if function in RESCALING and set(given) == {"y"} and isinstance(constant, (int, float)):
        scale, offset = RESCALING[function](constant)
        return "Rescaling", {"scale": scale, "offset": offset}
    if function in ("nn.relu", "nn.relu6", "nn.softmax", "math.sigmoid", "math.tanh") and not given:
        return "Activation", {"activation": function.split(".")[1]}
    return None


def _only_reference(node: object) -> list[Json]:
    """The one reference of a node that has one, else an empty list."""
    found = list(references(node))
    return found[0] if len(found) == 1 else []


OLD_PACKAGES = (
    "keras.src.",
    "keras.engine",
    "keras.layers.",
    "tf_keras",
    "tensorflow.python.keras",
    "tensorflow.keras",
)


def module_path(layer: Node, stored: Stored) -> bool:
    """tf.keras 2.12 to 2.15: a layer's module is a path inside of a Keras that is gone; Keras 3 has `keras.layers`."""
    if stored.major >= 3 or not str(layer.get("module") or "").startswith(OLD_PACKAGES):
        return False
    layer["module"] = "keras" if layer["class_name"] in MODELS else "keras.layers"
    return True
