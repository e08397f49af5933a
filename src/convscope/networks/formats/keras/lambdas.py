"""`preprocess_input` of `keras.applications` in a `Lambda` layer: the functions are known, so no trust is needed.

There are four functions of that name. Keras 2 stores the module of a function beside its name; Keras 3 (up to 3.15)
writes "builtins" there, for the user's own functions, too. The module that a file names is compared with a list and
never imported; a function of another module is not one of these, and stays as the file has it. Where the file names no
module, the arguments, or a model in the file that is named after a network of `keras.applications`, decide; where they
do not, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator

from convscope.errors import ModelError
from convscope.networks.preprocessing import family_of
from convscope.schema import Json

NAME = "preprocess_input"
# One module for each thing that `preprocess_input` does, by the name of the preprocessing.
_HOMES = {
    "-1..1": "keras.applications.mobilenet",
    "caffe": "keras.applications.vgg16",
    "torch": "keras.applications.densenet",
    "none": "keras.applications.efficientnet",
}
_GENERAL = "keras.applications.imagenet_utils"  # takes the mode as an argument
_DOES = {
    "-1..1": "inception_resnet_v2 inception_v3 mobilenet mobilenet_v2 nasnet resnet_v2 xception",
    "caffe": "resnet resnet50 vgg16 vgg19",
    "torch": "densenet",
    "none": "convnext efficientnet efficientnet_v2 mobilenet_v3 regnet resnet_rs",
}
_PACKAGES = (
    *("keras.applications", "keras.src.applications", "keras_applications", "tensorflow.keras.applications"),
    *("tensorflow.python.keras.applications", "tensorflow_core.python.keras.applications", "keras.api.applications"),
    *("tf_keras.applications", "tf_keras.src.applications"),
)
_BY_MODULE = {
    **{
        f"{package}.{module}": _HOMES[does] for does in _DOES for module in _DOES[does].split() for package in _PACKAGES
    },
    **{f"{package}.imagenet_utils": _GENERAL for package in _PACKAGES},
}
_NOT_TOLD = "builtins"  # as Keras 3 writes it for functions of any module
_MODELS = ("Functional", "Model", "Sequential")


def is_application(node: object) -> bool:
    """True for the config of a function of `keras.applications`, as `resolved` writes it."""
    return isinstance(node, dict) and any(node == _function(home) for home in (*_HOMES.values(), _GENERAL))


def _function(home: str) -> dict[str, Json]:
    return {"module": home, "class_name": "function", "config": NAME, "registered_name": None}


def resolved(config: dict[str, Json], name: str, registered: bool) -> tuple[dict[str, Json], tuple[str, ...]]:
    """A config with the address of each `preprocess_input` that a `Lambda` in it calls, and what decided.

    Args:
        config: of a model; it stays as it is.
        name: of the file, for messages.
        registered: the user registered a function of this name, which is then the one that is meant.

    Raises:
        ModelError: which of the functions is meant is not known.
    """
    if registered:
        return config, ()
    notes: dict[str, None] = {}
    return _walked(config, list(_families(config)), name, notes), tuple(notes)


def _families(item: object) -> Iterator[tuple[str, str]]:
    """The preprocessing and the name of each model that is named after a network of `keras.applications`."""
    if isinstance(item, dict):
        config = item.get("config")
        called = config.get("name") if isinstance(config, dict) and item.get("class_name") in _MODELS else None
        family = family_of(called) if isinstance(called, str) else None
        if family is not None:
            yield family.preset, str(called)
    if isinstance(item, dict | list):
        for child in item.values() if isinstance(item, dict) else item:
            yield from _families(child)


def _walked(item: Json, families: list[tuple[str, str]], name: str, notes: dict[str, None]) -> Json:
    if isinstance(item, list):
        return [_walked(child, families, name, notes) for child in item]
    if not isinstance(item, dict):
        return item
    found = {key: _walked(child, families, name, notes) for key, child in item.items()}
    config = found.get("config")
    if found.get("class_name") != "Lambda" or not isinstance(config, dict) or _called(config) != NAME:
        return found
    module = _module(config)
    if isinstance(module, str) and module not in (_NOT_TOLD, *_BY_MODULE):
        return found  # the user's own function of this name
    home, because = _home(config, families, name)
    notes[f"{NAME} in the Lambda layer {config.get('name')!r} is that of {home}, {because}"] = None
    kept = {key: value for key, value in config.items() if not key.startswith(_OF_KERAS_2)}
    return {**found, "config": {**kept, "function": _function(home)}}


_OF_KERAS_2 = ("function", "output_shape", "module")  # with `function_type`, `output_shape_module` and the like


def _called(config: dict[str, Json]) -> object:
    """The name of the function that a `Lambda` calls; None for code."""
    function = config.get("function")
    if isinstance(function, dict):
        return function.get("config") if function.get("class_name") == "function" else None
    return function if isinstance(function, str) and config.get("function_type") == "function" else None


def _module(config: dict[str, Json]) -> Json:
    """The module of the function, as the file has it."""
    function = config.get("function")
    return function.get("module") if isinstance(function, dict) else config.get("module")


def _home(config: dict[str, Json], families: list[tuple[str, str]], name: str) -> tuple[str, str]:
    """The module of the function that is meant, and what tells."""
    module = _module(config)
    if isinstance(module, str) and module in _BY_MODULE:
        return _BY_MODULE[module], "as the file says"
    if isinstance(config.get("arguments"), dict) and "mode" in config["arguments"]:
        return _GENERAL, "the only one that takes a mode"
    if len({preset for preset, _ in families}) == 1:
        preset, called = families[0]
        return _HOMES[preset], f"as {called!r}, a model in the file, takes its images"
    layer = config.get("name")
    raise ModelError(
        f"{name}: the Lambda layer {layer!r} calls {NAME}, and the file does not show which of the {len(_HOMES)} "
        f"functions of that name in keras.applications it is. Register the right one before you open the file: "
        f"keras.saving.get_custom_objects()[{NAME!r}] = ...",
        code="function-ambiguous",
        path=name,
        names=[layer],
    )
