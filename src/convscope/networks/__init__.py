"""Opening models: whatever a user has becomes a `Network`."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from convscope import limits, reading
from convscope.errors import BackendError, ModelError, Unreadable, UsageError, one_line
from convscope.networks import preprocessing as pp
from convscope.networks.head import Head, Prediction
from convscope.networks.inputs import Inputs
from convscope.networks.layers import Layer
from convscope.networks.network import Network, Source
from convscope.networks.passes import Pass, Record, Run
from convscope.networks.torch.modules import OpenedModule

__all__ = ["Head", "Inputs", "Layer", "Network", "Pass", "Prediction", "Record", "Run", "Source", "open_model"]

# Keras' backends in the order in which they are tried, the fastest on a processor first (docs/benchmarks.md),
# with the extra of this package that brings each.
BACKENDS = {"tensorflow": "tensorflow", "torch": "keras-torch", "jax": "jax"}


def open_model(
    model: Any,
    *,
    weights: str | os.PathLike | None = None,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
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
        model: a `keras.Model` or `torch.nn.Module` in memory; the path of a model file, whose content decides and not
            its name (`.keras`, `.h5` of any age, a SavedModel folder, `.onnx`, TorchScript, `.pt2`); code,
            `"file.py:function"` or `"package.module:function"`, that returns a model; `"keras:ResNet50V2"`,
            `"torchvision:resnet50"` or `"timm:convnext_tiny"`, with arguments as a query
            (`"keras:VGG16?weights=none&classes=10"`); or a `Network`, which comes back as it is.
        weights: a file of weights for a model that code makes.
        backend: of Keras: "tensorflow", "jax" or "torch"; else `KERAS_BACKEND`, else what is imported, else installed.
        device: for PyTorch: "cpu", "cuda", "cuda:1", "mps"; a module in memory stays where it is.
        precision: for PyTorch: "float32", or "bfloat16" or "float16" for autocast.
        preprocess: "none", "0..1", "-1..1", "caffe", "torch" or "MEAN,STD"; found out or guessed where None.
        classes: names in the order of the outputs, or a file that holds them (a line each, or JSON).
        input, output: names, where the model has several; the first that fits where None.
        size: pixels `(height, width)` to bring pictures to, where the model takes any size.
        feed: arrays `(1, ...)` for the inputs that don't get the picture; zeros where nothing is given.
        head: "linear", "softmax" or "sigmoid", where what convscope finds out about the outputs is wrong.
        trust: run code that the file holds (Lambda layers, pickled modules).

    Raises:
        ModelError: the file is missing, damaged, of another kind, or holds code; BackendError: the backend is not
        installed or not the one in use; UsageError: an option does not fit the model.
    """
    if isinstance(model, Network):
        options = (weights, device, precision, preprocess, classes, input, output, size, feed, head)
        if any(option is not None for option in options):
            raise UsageError("this network is open already; give options where it is opened.")
        return model
    if head not in (None, "linear", "softmax", "sigmoid"):
        raise UsageError(f"head {head!r} is not known; expected linear, softmax or sigmoid.")
    opening = _Opening(
        {
            "input": input,
            "output": output,
            "size": (size, size) if isinstance(size, int) else size,
            "feed": feed,
            "preprocess": pp.parse(preprocess) if isinstance(preprocess, str) else preprocess,
            "class_names": read_class_names(classes),
            "head": head,
        },
        None if weights is None else Path(weights),
        backend,
        device,
        precision,
        trust,
    )
    if not isinstance(model, str | os.PathLike):
        return opening.in_memory(model)
    return opening.named(os.fspath(model))


_OF_KERAS = ("keras", "hdf5", "saved_model")


def is_for_keras(name: str) -> bool:
    """True if `open_model(name)` will need Keras, False if PyTorch or whatever the user's code imports.

    Raises:
        ModelError: there is no such file, or it is no model; no framework is imported to find out.
    """
    from convscope.networks.formats import code, files

    collection = name.partition(":")[0]
    if collection in ("keras", "torchvision", "timm") or code.is_code(name):
        return collection == "keras"
    files.check_file(Path(name))
    return files.kind_of_file(Path(name)) in _OF_KERAS


@dataclass(frozen=True)
class _Opening:
    """What was asked for, on its way to the framework's file that will open it."""

    options: dict[str, Any]
    weights: Path | None
    backend: str | None
    device: str | None
    precision: str | None
    trust: bool

    def named(self, name: str) -> Network:
        """A file, code, or a name from a collection of models."""
        from convscope.networks.formats import code, files

        collection = name.partition(":")[0]
        if collection == "keras":
            self._no_weights(name)
            return self._keras(lambda: _room("formats.keras.files").open_named(name))
        if collection in ("torchvision", "timm"):
            return self._torch(lambda: _room("formats.torch.files").open_zoo(name, self.weights), name)
        if code.is_code(name):
            return self._from_code(name)
        path = Path(name)
        files.check_file(path)
        kind = files.kind_of_file(path)
        self._no_weights(name)
        if kind == "saved_model":
            return self._keras(lambda: _room("formats.keras.files").read_saved_model(path, self.trust))
        if kind in ("keras", "hdf5"):
            return self._keras(lambda: _room("formats.keras.files").open_named(name, trust=self.trust))
        if kind == "pickle":
            raise ModelError(
                f"{path} is a Python pickle, which is never loaded: that runs code. Give {files.EXPECTED}."
            )
        what = f"{path} is {files.KINDS[kind]}, which"
        if kind == "onnx":
            _needed("onnx", "onnx", what)
            return self._torch(lambda: _room("formats.onnx.model").read(path, self.options["input"]), what, "onnx")
        return self._torch(lambda: _room("formats.torch.files").open_file(path, trust=self.trust), what)

    def in_memory(self, model: Any) -> Network:
        """A model that the user holds."""
        self._no_weights("a model in memory")
        # Under Keras' torch backend a Keras model is a torch module too: ask "is it Keras?" first.
        if _is_keras(model):
            return self._keras_in_memory(model, Source(f"keras.Model {model.name!r} in memory"))
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(model, torch.nn.Module):
            return self._torch(lambda: OpenedModule(model, Source(f"{type(model).__name__} in memory"), in_memory=True))
        module = type(model).__module__
        if module.startswith(("tf_keras", "keras.src.engine", "tensorflow.python.keras")):
            raise ModelError(
                f"expected a Keras 3 model, found one of Keras 2 ({module}). "
                "Save it with model.save('model.h5') and open that file."
            )
        raise ModelError(
            "expected a keras.Model, a torch.nn.Module, the path of a model file or a name such as 'keras:NAME', "
            f"found {module}.{type(model).__qualname__}."
        )

    def _from_code(self, name: str) -> Network:
        """What a function of the user's returns, with the weights of a file."""
        from convscope.networks.formats import code, files

        if self.weights is not None:
            files.check_file(self.weights)
        # The code may import Keras, which takes its backend from here.
        if self.backend is not None and "keras" not in sys.modules:
            os.environ["KERAS_BACKEND"] = self.backend
        elif "KERAS_BACKEND" not in os.environ and "keras" not in sys.modules and _installed():
            os.environ["KERAS_BACKEND"] = _at_hand()
        made = code.build(name)
        if _is_keras(made):
            notes = (
                _room("formats.keras.files").load_weights(made, self.weights)
                if self.weights is not None
                else _UNTRAINED
            )
            return self._keras_in_memory(made, self._source(name, notes))
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(made, torch.nn.Module):
            return self._torch(lambda: self._filled(made, name))
        raise UsageError(
            f"expected {name} to return a keras.Model or a torch.nn.Module, found {code.describe_type(made)}."
        )

    def _filled(self, made: Any, name: str) -> OpenedModule:
        notes = (
            _room("formats.torch.files").fill(made, self.weights, self.trust)
            if self.weights is not None
            else _UNTRAINED
        )
        return OpenedModule(made, self._source(name, notes))

    def _source(self, name: str, notes: Sequence[str]) -> Source:
        from convscope.networks.formats import files

        if ".py:" in name:  # the name alone, as for a model file
            name, notes = os.path.basename(name), (f"made by {name}", *notes)
        if self.weights is None:
            return Source(name, notes=tuple(notes))
        return Source(name, str(self.weights), files.sha256(self.weights), (f"weights of {self.weights.name}", *notes))

    def _keras(self, opened: Callable[[], Any]) -> Network:
        self._only_torch()
        choose_backend(self.backend)
        return opened().network(**self.options)

    def _keras_in_memory(self, model: Any, source: Source) -> Network:
        self._only_torch()
        choose_backend(self.backend)
        from convscope.networks.keras.network import KerasNetwork

        return KerasNetwork(model, source, **self.options)

    def _torch(self, opened: Callable[[], OpenedModule], what: str = "this", extra: str = "torch") -> Network:
        if self.backend not in (None, "torch"):
            raise UsageError(f"--backend {self.backend} is for Keras models; this is not one, and runs on torch.")
        _needed("torch", extra, what)
        return _room("torch.network").network_of(
            opened(), device=self.device, precision=self.precision or "float32", **self.options
        )

    def _only_torch(self) -> None:
        if self.device is not None:
            raise UsageError("--device is for PyTorch and ONNX models; Keras computes where its backend does.")
        if self.precision not in (None, "float32"):
            raise UsageError("--precision is for PyTorch and ONNX models; a Keras model has its own.")

    def _no_weights(self, name: str) -> None:
        if self.weights is not None:
            raise UsageError(f"--weights goes with code that makes the model (file.py:function), not with {name}.")


_UNTRAINED = ("weights as the function left them: no --weights were given",)


def _is_keras(model: Any) -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(model, keras.Model)


def _room(name: str) -> Any:
    """A file of this folder that imports a framework."""
    return importlib.import_module(f"convscope.networks.{name}")


def _needed(module: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise BackendError(f"{what} needs {module}, which is not installed. Run: pip install 'convscope[{extra}]'")


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
    name = requested or os.environ.get("KERAS_BACKEND")
    if name is None and importlib.util.find_spec("keras") is None:
        raise BackendError("a Keras model needs Keras, which is not installed. Run: " + _pip("tensorflow"))
    name = name or _at_hand()
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


def _installed() -> list[str]:
    return [name for name in BACKENDS if importlib.util.find_spec(name) is not None]


def _at_hand() -> str:
    """The first backend that is imported already, else the first that is installed."""
    imported = [name for name in BACKENDS if name in sys.modules]
    if imported or _installed():
        return (imported + _installed())[0]
    raise BackendError("no backend for Keras models is installed. Run one of: " + ", ".join(map(_pip, BACKENDS)))


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
        return _names_given(classes)
    path = os.fsdecode(classes)
    try:
        text = reading.text_of(path)
    except Unreadable as error:
        raise UsageError(
            f"the class names at {path} can't be read: {error}. Expected text in UTF-8, a name a line, or JSON."
        ) from None
    try:
        if text.lstrip()[:1] not in ("[", "{"):
            return _names_from_lines(text)
        return _names_from_json(reading.json_of(_of_few_entries(text)))
    except (Unreadable, ValueError) as error:
        raise UsageError(
            f"the class names at {path} are not understood: {error}. Expected a name a line, or JSON such as "
            '["cat", "dog"], {"0": "cat", "1": "dog"} or {"cat": 0, "dog": 1}, with every number from 0 on.'
        ) from None


def _names_given(classes: Any) -> tuple[str, ...]:
    """Names that the caller holds."""
    try:
        return (
            _names_from_json(dict(classes))
            if isinstance(classes, Mapping)
            else tuple(_writable(str(name)) for name in classes)
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"the class names are not understood: {error}. Expected a list of names.") from None


def _of_few_entries(text: str) -> str:
    """The text, if it can't hold more values than the limit allows: each but the first has one of these before it."""
    if sum(map(text.count, "[{,")) > limits.current().entries:
        raise Unreadable(f"it holds too many entries ({limits.how_to_raise('entries')})")
    return text


def _names_from_lines(text: str) -> tuple[str, ...]:
    most = limits.current().entries
    names = tuple(islice(filter(None, map(str.strip, io.StringIO(text, newline=None))), most + 1))
    if not names:
        raise Unreadable("it is empty")
    if len(names) > most:
        raise Unreadable(f"it holds too many names ({limits.how_to_raise('entries')})")
    return names


def _names_from_json(data: Any) -> tuple[str, ...]:
    if isinstance(data, dict) and data and all(type(value) is int for value in data.values()):
        if sorted(data.values()) != list(range(len(data))):
            raise ValueError("a number is missing, or there twice")
        data = sorted(data, key=lambda name: data[name])
    if isinstance(data, dict):
        data = [data[str(number)] if str(number) in data else data[number] for number in _from_zero(data)]
    if not data:
        raise ValueError("there are none")
    return tuple(map(_name, data))


def _from_zero(data: dict[Any, Any]) -> range:
    missing = {str(number) for number in range(len(data))} - set(map(str, data))
    if missing:
        raise ValueError(f"there is no number {min(missing, key=int)}")
    return range(len(data))


def _name(entry: Any) -> str:
    """A name from a list: text, the last text of a pair (id, name), or a number, which some data sets have."""
    if isinstance(entry, list) and entry:
        entry = entry[-1]
    if not isinstance(entry, str) and type(entry) is not int:
        raise ValueError(f"a name has to be text, but this is {str(entry)[:40]!r}")
    return _writable(str(entry))


def _writable(name: str) -> str:
    """JSON can hold halves of surrogates, which no file that a result is written to can."""
    return name.encode("utf-8", "replace").decode()
