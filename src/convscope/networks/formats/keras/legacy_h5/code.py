"""Layers of a config that hold code, in an old Keras file or in an archive."""

from __future__ import annotations

from collections.abc import Iterator

from convscope.errors import ModelError, option
from convscope.networks.formats.keras.config import is_harmless
from convscope.networks.formats.keras.legacy_h5.building import registered_key
from convscope.networks.formats.keras.legacy_h5.stored import Stored

# Layers whose config is code, or names a file that holds code.
CODE = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")


def refuse_code(stored: Stored, trust: bool) -> None:
    """Raise ModelError if building the model would run code that the file carries."""
    found = list(code_layers(stored.config, ""))
    if not found:
        return
    names = ", ".join(dict.fromkeys(f"{class_name} layer {layer!r}" for class_name, layer, _ in found))
    head = f"{stored.path.name}: expected no code in the file, found Python code in the {names}"
    if stored.major < 3 or any(bytecode for _, _, bytecode in found):
        raise ModelError(
            f"{head}. Keras {stored.version} kept it as bytecode or by name alone, which no other Python can "
            f"run, not even with {option('trust=True')}. Write the architecture as a function, and open "
            f"file.py:function with the weights of this file alone ({option('weights')}).",
            code="code-in-file",
            path=stored.path.name,
            names=[layer for _, layer, _ in found],
        )
    if not trust:
        raise ModelError(
            f"{head}. If you trust the file, give {option('trust=True')} to run it.",
            code="needs-trust",
            path=stored.path.name,
            names=[layer for _, layer, _ in found],
        )


def code_layers(item: object, layer: str) -> Iterator[tuple[str, str, bool]]:
    """Class and name of the layers that hold code, and whether it is bytecode as Keras 1 and 2 wrote it."""
    if isinstance(item, dict):
        config, class_name = item.get("config"), item.get("class_name")
        if isinstance(config, dict) and isinstance(config.get("name"), str):
            layer = config["name"]
        if class_name == "__lambda__":  # the code itself: inside a Lambda, or an activation
            yield "Lambda", layer, False
        elif class_name == "Lambda" and is_harmless(config, registered_key):
            pass
        elif class_name in CODE or (class_name == "Merge" and _is_bytecode(config)):
            yield class_name, layer, _is_bytecode(config)
    if isinstance(item, (dict, list)):
        for child in item.values() if isinstance(item, dict) else item:
            yield from code_layers(child, layer)


def _is_bytecode(config: object) -> bool:
    """True if an argument is the list `[code, defaults, closure]` that Keras 1 and 2 made of a lambda."""
    if not isinstance(config, dict):
        return False
    values = [config.get(key) for key in ("function", "output_shape", "mask", "mode")]
    return any(isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) for value in values)
