"""From a migrated config to a model with fresh weights: Keras' own layers and those of the registry, no others."""

from __future__ import annotations

from convscope.errors import ModelError
from convscope.networks.foreign import KerasModel
from convscope.networks.formats.keras import config as keras_config
from convscope.networks.formats.keras.legacy_h5.migrations.arguments import hard_sigmoid_of_keras_2
from convscope.networks.formats.keras.legacy_h5.nodes import MODELS, Node, config_of, layers_of
from convscope.networks.formats.keras.legacy_h5.stored import Stored


def refuse_unknown(stored: Stored) -> None:
    """Give each layer the address where Keras 3 looks it up.

    Layers come from `keras.layers` or from the registry of the user, from nowhere else: a module path in the
    file is not followed. Layers of Keras 3 are left as they are, its own loader looks at the same two places.

    Raises:
        ModelError: Keras has no such layer.
    """
    unknown: dict[str, str] = {}
    for layer in list(layers_of(stored.config)):
        name = str(config_of(layer).get("name") or layer.get("name") or "?")
        if not _address(layer, old=stored.major < 3):
            unknown.setdefault(layer["class_name"], name)
        unknown |= dict.fromkeys(_unknown_activations(layer), name)
    if unknown:
        classes = ", ".join(f"{name!r} (in the layer {layer!r})" for name, layer in unknown.items())
        raise ModelError(
            f"{stored.path.name}: expected layers of Keras 3, found {classes}, unknown to it. If they "
            "are your own, register them with keras.saving.register_keras_serializable before the file is "
            "opened, or open the model in Python and hand it over.",
            code="layer-class-unknown",
            path=stored.path.name,
            names=list(unknown),
        )


def _unknown_activations(layer: Node) -> list[str]:
    """Activations that Keras does not know by name; those that the user registered get their address."""
    from keras import activations

    config, unknown = config_of(layer), []
    for key in ("activation", "recurrent_activation"):
        name = config.get(key)
        if isinstance(name, dict) and name.get("class_name") == "function":
            name = name.get("config")
        known = (*dir(activations), hard_sigmoid_of_keras_2.__name__)
        if not isinstance(name, str) or name in known:
            continue
        registered = registered_key(name)
        if registered:
            function = {"module": "builtins", "class_name": "function", "registered_name": registered}
            config[key] = {**function, "config": registered}
        else:
            unknown.append(name)
    return unknown


def _address(layer: Node, old: bool) -> bool:
    name = layer["class_name"]
    registered = registered_key(layer.get("registered_name")) or (not is_builtin(name) and registered_key(name))
    if old or registered:
        for key in ("build_config", "compile_config", "shared_object_id"):
            layer.pop(key, None)
        module = "keras" if name in MODELS else "keras.layers"
        layer.update(module=module, registered_name=None, class_name=_exported(name))
    if registered:
        layer.update(module=None, registered_name=registered, class_name=registered)
    return bool(registered) or is_builtin(name)


def _exported(name: str) -> str:
    """Keras exports functional models as Model."""
    return "Model" if name == "Functional" else name


def is_builtin(name: str) -> bool:
    """True for the classes of Keras' own layers and models."""
    import keras

    found = getattr(keras.layers, name, None)
    return name in MODELS or (isinstance(found, type) and issubclass(found, keras.layers.Layer))


def registered_key(name: object) -> str | None:
    """The key of a registered object: "Mine" also finds "package>Mine", as old files leave it out."""
    from keras import saving

    known = saving.get_custom_objects()
    if not isinstance(name, str) or not name:
        return None
    return next((key for key in known if key == name or key.endswith(f">{name}")), None)


def model_of(stored: Stored, trust: bool) -> KerasModel:
    """The model with fresh weights.

    Raises:
        ModelError: Keras refuses the config.
    """
    import keras

    custom = {hard_sigmoid_of_keras_2.__name__: hard_sigmoid_of_keras_2}
    name = _exported(stored.config["class_name"])
    root = {"module": "keras", "registered_name": None, **stored.config, "class_name": name}
    if not trust:
        own = hard_sigmoid_of_keras_2.__name__
        root = keras_config.checked(root, lambda key: own if key == own else registered_key(key), stored.path.name)
    try:
        with keras_config.building(stored.size, stored.path.name):
            model = keras.saving.deserialize_keras_object(root, custom_objects=custom, safe_mode=not trust)
    except ModelError:
        raise
    except Exception as error:  # Keras raises what its layers raise
        reason = " ".join(str(error).rsplit("Exception encountered:", 1)[-1].split())[:300]
        expected = f"expected a config that Keras {keras.__version__} can build"
        raise ModelError(
            f"{stored.path.name}: {expected}, found: {reason}.",
            code="config-invalid",
            path=stored.path.name,
            reason=reason,
        ) from error
    if not isinstance(model, keras.Model) or not model.built:
        raise ModelError(
            f"{stored.path.name}: expected a model with an input shape, found one without.",
            code="input-shape-missing",
            path=stored.path.name,
        )
    keras_config.check_outputs(model, stored.path.name)
    return model
