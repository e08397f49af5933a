"""Migrations of classes and arguments of Keras 1."""

from __future__ import annotations

from convscope.networks.formats.keras.legacy_h5.building import is_builtin
from convscope.networks.formats.keras.legacy_h5.nodes import MODELS, Node, config_of, set_value
from convscope.networks.formats.keras.legacy_h5.stored import Stored
from convscope.schema import Json

KERAS_1_CLASSES = {
    "Convolution1D": "Conv1D",
    "AtrousConvolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "AtrousConvolution2D": "Conv2D",
    "SeparableConvolution2D": "SeparableConv2D",
    "Convolution3D": "Conv3D",
    "TimeDistributedDense": "Dense",
}


def keras_1_class(layer: Node, stored: Stored) -> bool:
    """Keras 1: layers of another name. Not Deconvolution2D: its output_shape can't be given any more."""
    new = KERAS_1_CLASSES.get(layer["class_name"]) if stored.major < 2 else None
    layer["class_name"] = new or layer["class_name"]
    return new is not None


_KERNEL = {
    "init": "kernel_initializer",
    "W_regularizer": "kernel_regularizer",
    "W_constraint": "kernel_constraint",
}
_BIAS = {"bias": "use_bias", "b_regularizer": "bias_regularizer", "b_constraint": "bias_constraint"}
_LAYOUT = {"dim_ordering": "data_format"}
_POOLING = {"border_mode": "padding", **_LAYOUT}
_CONVOLUTION = {"nb_filter": "filters", "subsample": "strides", "atrous_rate": "dilation_rate", **_POOLING, **_BIAS}
_SERIES = {"border_mode": "padding", "pool_length": "pool_size", "stride": "strides"}
_RECURRENT = {
    "output_dim": "units",
    "inner_init": "recurrent_initializer",
    "inner_activation": "recurrent_activation",
    "U_regularizer": "recurrent_regularizer",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "b_regularizer": "bias_regularizer",
    **_KERNEL,
}
_EMBEDDING = {key: new.replace("kernel", "embeddings") for key, new in _KERNEL.items()}
# Arguments of Keras 1 and their names today, by today's class. Layers that are not here kept their arguments, or are
# the user's own, or are gone: Highway, MaxoutDense, ParametricSoftplus, SReLU, LocallyConnected, Deconvolution2D.
KERAS_1_ARGUMENTS: dict[str, dict[str, str]] = {
    "Dense": {"output_dim": "units", **_KERNEL, **_BIAS},
    "Conv1D": {**_CONVOLUTION, **_KERNEL, "filter_length": "kernel_size", "subsample_length": "strides"},
    "Conv2D": {**_CONVOLUTION, **_KERNEL},
    "Conv3D": {**_CONVOLUTION, **_KERNEL},
    "SeparableConv2D": {**_CONVOLUTION, **_KERNEL},
    "MaxPooling1D": _SERIES,
    "AveragePooling1D": _SERIES,
    "MaxPooling2D": _POOLING,
    "AveragePooling2D": _POOLING,
    "MaxPooling3D": _POOLING,
    "AveragePooling3D": _POOLING,
    "GlobalMaxPooling2D": _LAYOUT,
    "GlobalAveragePooling2D": _LAYOUT,
    "GlobalMaxPooling3D": _LAYOUT,
    "GlobalAveragePooling3D": _LAYOUT,
    "UpSampling1D": {"length": "size"},
    "UpSampling2D": _LAYOUT,
    "UpSampling3D": _LAYOUT,
    "ZeroPadding2D": _LAYOUT,
    "ZeroPadding3D": _LAYOUT,
    "Cropping2D": _LAYOUT,
    "Cropping3D": _LAYOUT,
    "Dropout": {"p": "rate"},
    "SpatialDropout1D": {"p": "rate"},
    "SpatialDropout2D": {"p": "rate", **_LAYOUT},
    "SpatialDropout3D": {"p": "rate", **_LAYOUT},
    "GaussianDropout": {"p": "rate"},
    "GaussianNoise": {"sigma": "stddev"},
    "Embedding": _EMBEDDING,
    "BatchNormalization": {"gamma_init": "gamma_initializer", "beta_init": "beta_initializer"},
    "PReLU": {"init": "alpha_initializer"},
    "SimpleRNN": _RECURRENT,
    "GRU": _RECURRENT,
    "LSTM": {**_RECURRENT, "forget_bias_init": "unit_forget_bias"},
    "ConvLSTM2D": {**_CONVOLUTION, **_RECURRENT, "forget_bias_init": "unit_forget_bias"},
}
KERAS_1_LAYOUTS = {"tf": "channels_last", "th": "channels_first"}
KERAS_1_INITIALIZERS = {"zero": "zeros", "one": "ones", "uniform": "random_uniform", "normal": "random_normal"}
# Said by the input or by the layer before, or without meaning outside training.
KERAS_1_DROPPED = ("input_dim", "input_length", "input_dtype", "consume_less")


def keras_1_arguments(layer: Node, stored: Stored) -> bool:
    """Keras 1: arguments of another name and values of another spelling, as each class of layers has them."""
    config, name = config_of(layer), layer["class_name"]
    if stored.major >= 2 or name in ("InputLayer", *MODELS):
        return False
    before, names = dict(config), KERAS_1_ARGUMENTS.get(name, {})
    for old in [key for key in config if key in names]:
        config[names[old]] = _keras_1_value(names[old], config.pop(old))
    for key in KERAS_1_DROPPED if is_builtin(name) else ():
        if (name, key) != ("Embedding", "input_dim"):
            config.pop(key, None)
    if name == "Embedding":
        config.pop("dropout", None)
    return config != before


def _keras_1_value(key: str, value: Json) -> object:
    if key == "unit_forget_bias":
        return value == "one"
    if key == "data_format" and isinstance(value, str):
        return KERAS_1_LAYOUTS.get(value, value)
    initial = key.endswith("_initializer") and isinstance(value, str)
    return KERAS_1_INITIALIZERS.get(value, value) if initial else value


KERAS_1_SIZES = (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3"))


def keras_1_kernel(layer: Node, stored: Stored) -> bool:
    """Keras 1: a kernel's size is `nb_row` and `nb_col`; one `init` is for both parts of a separable one."""
    config = config_of(layer)
    sizes = next((keys for keys in KERAS_1_SIZES if keys[0] in config), None)
    if stored.major >= 2 or sizes is None or not is_builtin(layer["class_name"]):
        return False
    config["kernel_size"] = [config.pop(key, None) for key in sizes]
    if layer["class_name"] == "SeparableConv2D":
        init = config.pop("kernel_initializer", "glorot_uniform")
        config.update(depthwise_initializer=init, pointwise_initializer=init)
    return True


def keras_1_layout(layer: Node, stored: Stored) -> bool:
    """Keras 1: padding, cropping, upsampling and flattening do not say the layout; it is that of the others.

    Flatten ignored it: it kept the order of the values in memory, which Keras 3 calls channels_last.
    """
    without = ("ZeroPadding2D", "Cropping2D", "UpSampling2D", "ZeroPadding3D", "Cropping3D", "UpSampling3D", "Flatten")
    if stored.major >= 2 or layer["class_name"] not in without or "data_format" in config_of(layer):
        return False
    first = stored.channels_first and layer["class_name"] != "Flatten"
    return set_value(layer["config"], "data_format", "channels_first" if first else "channels_last")


def keras_1_padding(layer: Node, stored: Stored) -> bool:
    """Keras 1: ZeroPadding2D takes four numbers in a row, or a dict of them."""
    padding: Json = config_of(layer).get("padding")
    if layer["class_name"] != "ZeroPadding2D" or stored.major >= 2:
        return False
    if isinstance(padding, dict):
        padding = [padding.get(f"{side}_pad", 0) for side in ("top", "bottom", "left", "right")]
    return len(padding) == 4 and set_value(layer["config"], "padding", [padding[:2], padding[2:]])


def keras_1_penalty(layer: Node, stored: Stored) -> bool:
    """Keras 1: regularizers and constraints have their class under "name". They act in training alone."""
    config = config_of(layer)
    penalties = [key for key in config if key.endswith(("_regularizer", "_constraint"))]
    old = [key for key in penalties if isinstance(config[key], dict) and "class_name" not in config[key]]
    for key in old:
        config[key] = None
    return bool(old)


def keras_1_batch_norm(layer: Node, stored: Stored) -> bool:
    """Keras 1: the `mode` of BatchNormalization; modes other than 0 are gone, and Keras refuses them."""
    if layer["class_name"] != "BatchNormalization" or config_of(layer).get("mode") != 0:
        return False
    del layer["config"]["mode"]
    return True


KERAS_1_MERGES = {
    "sum": "Add",
    "mul": "Multiply",
    "ave": "Average",
    "max": "Maximum",
    "concat": "Concatenate",
}


def keras_1_merge(layer: Node, stored: Stored) -> bool:
    """Keras 1: Merge with a mode; now there is a layer for each. Dot products stay, and are unknown."""
    config = config_of(layer)
    mode = config.get("mode")
    if layer["class_name"] != "Merge" or not isinstance(mode, str) or mode not in KERAS_1_MERGES:
        return False
    layer["class_name"] = KERAS_1_MERGES[mode]
    layer["config"] = {"name": config.get("name")}
    if mode == "concat":
        layer["config"]["axis"] = config.get("concat_axis", -1)
    return True


def keras_1_input(layer: Node, stored: Stored) -> bool:
    """Keras 1: the dtype of an InputLayer is its `input_dtype`."""
    if layer["class_name"] != "InputLayer" or "input_dtype" not in config_of(layer):
        return False
    layer["config"]["dtype"] = layer["config"].pop("input_dtype")
    return True
