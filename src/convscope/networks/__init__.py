"""Opening models: whatever a user has becomes a `Network`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convscope.errors import BackendError, ModelError, UsageError, nearest, one_line
from convscope.networks import preprocessing as pp
from convscope.networks.network import Head, Inputs, Layer, Network, Prediction, Record, Source

__all__ = ["Head", "Inputs", "Layer", "Network", "Prediction", "Record", "Source", "open_model"]

# Keras' backends in the order in which they are tried, the fastest on a processor first (docs/benchmarks.md),
# with the extra of this package that brings each.
BACKENDS = {"tensorflow": "tensorflow", "torch": "keras-torch", "jax": "jax"}


def open_model(
    model: Any,
    *,
    backend: str | None = None,
    preprocess: str | pp.Preprocessing | None = None,
    classes: str | os.PathLike | Sequence[str] | None = None,
    input: str | None = None,
    output: str | None = None,
    size: int | tuple[int, int] | None = None,
    feed: Mapping[str, np.ndarray] | None = None,
    head: str | None = None,
    trust: bool = False,
) -> Network:
    """Open a trained model, whatever it comes as.

    Args:
        model: a `keras.Model` in memory; the path of a `.keras`, `.h5` or `.hdf5` whole model, of any age that
            `networks/legacy_h5.py` knows (the content decides, not the name); `"keras:ResNet50V2"`, any function
            of `keras.applications`, with its arguments as a query (`"keras:VGG16?weights=none&classes=10"`); or a
            `Network`, which comes back as it is.
        backend: "tensorflow", "jax" or "torch"; else `KERAS_BACKEND`, else what is imported, else what is installed.
        preprocess: "none", "0..1", "-1..1", "caffe", "torch" or "MEAN,STD"; found out or guessed where None.
        classes: names in the order of the outputs, or a file that holds them (a line each, or JSON).
        input, output: names, where the model has several; the first that fits where None.
        size: pixels `(height, width)` to bring pictures to, where the model takes any size.
        feed: arrays `(1, ...)` for the inputs that don't get the picture; zeros where nothing is given.
        head: "linear", "softmax" or "sigmoid", where what convscope finds out about the outputs is wrong.
        trust: run code that the file holds (Lambda layers).

    Raises:
        ModelError: the file is missing, damaged, of another kind, or holds code; BackendError: the backend is not
        installed or not the one in use; UsageError: an option does not fit the model.
    """
    if isinstance(model, Network):
        if any(option is not None for option in (preprocess, classes, input, output, size, feed, head)):
            raise UsageError("this network is open already; give options where it is opened.")
        return model
    if head not in (None, "linear", "softmax", "sigmoid"):
        raise UsageError(f"head {head!r} is not known; expected linear, softmax or sigmoid.")
    options: dict[str, Any] = {
        "input": input,
        "output": output,
        "size": (size, size) if isinstance(size, int) else size,
        "feed": feed,
        "preprocess": pp.parse(preprocess) if isinstance(preprocess, str) else preprocess,
        "class_names": read_class_names(classes),
        "head": head,
    }
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        if not name.startswith("keras:"):
            check_file(Path(name))
        choose_backend(backend)
        from convscope.networks import keras_files

        opened = keras_files.open_named(name, trust=trust)
        return opened.network(**options)
    return _in_memory(model, backend, options)


def _in_memory(model: Any, backend: str | None, options: dict[str, Any]) -> Network:
    # Under Keras' torch backend a Keras model is a torch module too: ask "is it Keras?" first.
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, keras.Model):
        choose_backend(backend)
        from convscope.networks.keras import KerasNetwork

        return KerasNetwork(model, Source(f"keras.Model {model.name!r} in memory"), **options)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        raise ModelError("expected a Keras model, found a native PyTorch module; those can't be opened yet.")
    module = type(model).__module__
    if module.startswith(("tf_keras", "keras.src.engine", "tensorflow.python.keras")):
        raise ModelError(
            f"expected a Keras 3 model, found one of Keras 2 ({module}). "
            "Save it with model.save('model.h5') and open that file."
        )
    raise ModelError(
        f"expected a keras.Model, the path of a model file or 'keras:NAME', found {module}.{type(model).__qualname__}."
    )


def choose_backend(requested: str | None) -> str:
    """Make sure that Keras runs on the backend that is asked for; import nothing else.

    Raises:
        BackendError: it is unknown or not installed, or Keras already runs on another one in this process.
    """
    if requested is not None and requested not in BACKENDS:
        raise UsageError(f"backend {requested!r} is not known; expected one of {', '.join(BACKENDS)}.")
    if "keras" in sys.modules:
        current = _keras().config.backend()
        if requested not in (None, current):
            raise BackendError(
                f"asked for the backend {requested!r}, but Keras already runs on {current!r} in this process, "
                f"and a process has one backend. Set KERAS_BACKEND={requested} before Keras is imported."
            )
        return _supported(current)
    name = requested or os.environ.get("KERAS_BACKEND") or _at_hand()
    _supported(name)
    for needed in (name, "keras"):
        if importlib.util.find_spec(needed) is None:
            raise BackendError(f"the backend {name!r} needs {needed}, which is not installed. Run: {_pip(name)}")
    os.environ["KERAS_BACKEND"] = name
    try:
        _keras()
    except ImportError as error:
        raise BackendError(
            f"the backend {name!r} is installed but can't be imported ({one_line(error)}). "
            f"Run: {_pip(name)} --force-reinstall"
        ) from error
    return name


def _keras() -> Any:
    """Keras, which has to be of version 3."""
    keras = importlib.import_module("keras")
    if not hasattr(keras, "config"):
        version = getattr(keras, "__version__", "of unknown version")
        raise BackendError(f"expected Keras 3, found Keras {version}. Run: pip install --upgrade keras")
    return keras


def _pip(name: str) -> str:
    return f"pip install 'convscope[{BACKENDS[name]}]'"


def _supported(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(
            f"Keras is set to the backend {name!r}; convscope needs gradients and knows {', '.join(BACKENDS)}. "
            "Choose one with --backend or KERAS_BACKEND."
        )
    return name


def _at_hand() -> str:
    """The first backend that is imported already, else the first that is installed."""
    imported = [name for name in BACKENDS if name in sys.modules]
    installed = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
    if imported or installed:
        return (imported + installed)[0]
    raise BackendError("no backend for Keras models is installed. Run one of: " + ", ".join(map(_pip, BACKENDS)))


def check_file(path: Path) -> None:
    """Say what is wrong with a model file before any framework is imported.

    Raises:
        ModelError: it is missing, a folder, empty, or can't be read.
    """
    if path.is_dir():
        found = "a SavedModel folder" if (path / "saved_model.pb").exists() else "a folder"
        raise ModelError(f"expected a model file, found {found}: {path}. Save the model as one .keras or .h5 file.")
    if not path.exists():
        raise ModelError(f"no model file at {path}; {_missing_hint(path)}")
    if not path.is_file():
        raise ModelError(
            f"expected a model file, found a device or a pipe: {path}. Save the model as one .keras or .h5 file."
        )
    if path.stat().st_size == 0:
        raise ModelError(f"the model file {path} is empty (0 bytes); copy or download it again.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelError(f"the model file {path} can't be read ({error.strerror}); check its permissions.") from error


def _missing_hint(path: Path) -> str:
    if re.match(r"\w+:/", path.as_posix()):  # Path makes one "/" of the two
        return "convscope does not download models, so fetch it first and give the file."
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either, so check the path."
    return nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))


def read_class_names(classes: str | os.PathLike | Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names in the order of the outputs.

    Args:
        classes: the names themselves, or a file: a line each; or JSON: a list, `{"0": "cat"}`,
            `{"0": ["n02123045", "tabby"]}` as Keras ships it, or `{"cat": 0}` as Keras' generators give it.

    Raises:
        UsageError: the file is missing, or not one of these.
    """
    if classes is None:
        return None
    if not isinstance(classes, str | os.PathLike):
        return tuple(str(name) for name in classes)
    try:
        text = Path(classes).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            f"the class names at {classes} can't be read: {reason}. Expected text, a name a line, or JSON."
        ) from None
    if text.lstrip()[:1] not in ("[", "{"):
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        return _names_from_json(json.loads(text))
    except (ValueError, TypeError, IndexError, KeyError):
        raise UsageError(
            f'the class names at {classes} are not understood. Expected JSON such as ["cat", "dog"], '
            '{"0": "cat", "1": "dog"} or {"cat": 0, "dog": 1}, with every number from 0 on.'
        ) from None


def _names_from_json(data: Any) -> tuple[str, ...]:
    if isinstance(data, dict) and all(isinstance(value, int) for value in data.values()):
        if sorted(data.values()) != list(range(len(data))):
            raise ValueError("a number is missing, or there twice")
        data = sorted(data, key=lambda name: data[name])
    names = data if isinstance(data, list) else [data[str(number)] for number in range(len(data))]
    return tuple(str(name[-1]) if isinstance(name, list) else str(name) for name in names)
