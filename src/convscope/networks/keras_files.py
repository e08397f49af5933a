"""Model files and `keras:NAME`: from a name to a Keras model, by the content of the file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import keras
import numpy as np

from convscope.errors import ConvscopeError, ModelError, UsageError, nearest, one_line
from convscope.networks import legacy_h5
from convscope.networks import preprocessing as pp
from convscope.networks.keras import KerasNetwork
from convscope.networks.network import Source


@dataclass(frozen=True)
class OpenedModel:
    """A Keras model with what is known of where it came from; `random` if its weights are drawn, not trained."""

    model: Any
    source: Source
    family: pp.Family | None = None
    random: bool = False

    def network(self, **options: Any) -> KerasNetwork:
        """The model as a `Network`; `options` are those of `KerasNetwork`."""
        network = KerasNetwork(self.model, self.source, family=self.family, **options)
        imagenet = network.head.classes == 1000 and network.family is not None and not self.random
        if network.class_names is None and imagenet:
            network.class_names = imagenet_names(download=self.source.name.startswith("keras:"))
        return network


def open_named(name: str, trust: bool = False) -> OpenedModel:
    """The model in the file `name`, or of `keras.applications` for `keras:NAME`.

    Raises:
        ModelError: it can't be opened, with the reason; UsageError: no such application or argument.
    """
    return _application(name) if name.startswith("keras:") else _file(Path(name), trust)


# -- files -----------------------------------------------------------------------------------------------


def _file(path: Path, trust: bool) -> OpenedModel:
    digest = _sha256(path)
    if legacy_h5.is_hdf5(path):
        opened = legacy_h5.read(path, trust)
        notes = (f"HDF5 of Keras {opened.version}", *opened.translated)
        return OpenedModel(opened.model, Source(path.name, str(path), digest, notes))
    if zipfile.is_zipfile(path):
        model, version = _read_zip(path, trust)
        return OpenedModel(model, Source(path.name, str(path), digest, (f"archive of Keras {version}",)))
    raise ModelError(
        f"{path} is not a Keras model: {_what_it_is(path)}. Expected a .keras archive or a .h5 file of a whole model."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _what_it_is(path: Path) -> str:
    """What the first bytes of a file that is not Keras' say."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        return "it begins like a zip archive but has no end; it may have been cut off while copying"
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "it looks like a Python pickle, which is never loaded"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")):
        return "it is a picture"
    if (head.startswith(b"\x08") and b"onnx" in head.lower()) or path.suffix.lower() == ".onnx":
        return "it looks like an ONNX model"
    if path.suffix.lower() in (".pt", ".pth", ".safetensors"):
        return f"it looks like a PyTorch file ({path.suffix})"
    if head and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"it is text, beginning with {head[:24].decode()!r}"
    return f"it begins with the bytes {head[:8].hex(' ')}"


def _read_zip(path: Path, trust: bool) -> tuple[Any, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "config.json" not in names:
                raise ModelError(_other_zip(path, names))
            config = json.loads(archive.read("config.json"))
            metadata = json.loads(archive.read("metadata.json")) if "metadata.json" in names else {}
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError) as error:
        raise ModelError(
            f"the archive {path} can't be read whole: {one_line(error)}. Copy or download it again."
        ) from error
    if damaged is not None:
        raise ModelError(f"the archive {path} is damaged: its part {damaged} can't be read. Copy or download it again.")
    code = dict.fromkeys(f"{kind} layer {name!r}" for kind, name, _ in legacy_h5.code_layers(config, ""))
    if code and not trust:
        raise ModelError(
            f"{path} holds Python code in the {', '.join(code)}; expected none. "
            "If you trust the file, give --trust (trust=True) to run it."
        )
    return _load_zip(path, trust), str(metadata.get("keras_version", "of unknown version"))


def _other_zip(path: Path, names: list[str]) -> str:
    what = "a PyTorch file" if any(name.endswith("data.pkl") for name in names) else "another zip archive"
    return (
        f"{path} is {what} (it holds {', '.join(names[:3])}, …), not a Keras model. "
        "Expected a .keras archive with a config.json, or a .h5 file of a whole model."
    )


def _load_zip(path: Path, trust: bool) -> Any:
    with _under_keras_name(path) as named:
        try:
            return keras.saving.load_model(named, compile=False, safe_mode=not trust)
        except ConvscopeError:
            raise
        except Exception as error:
            raise ModelError(_cant_load(path, error)) from error


@contextmanager
def _under_keras_name(path: Path) -> Iterator[Path]:
    """Keras goes by the file's name: lend it one that ends in .keras."""
    if path.suffix == ".keras":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "model.keras"
        try:
            named.symlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, named)
        yield named


def _cant_load(path: Path, error: Exception) -> str:
    unknown = re.search(r"Could not locate (?:class|function) '([^']*)'", str(error))
    if unknown:
        return (
            f"{path} uses {unknown[1]!r}, a class of its author's own that Keras {keras.__version__} does not know: "
            "open it in Python where that class is registered (keras.saving.register_keras_serializable) and hand the "
            "model over in memory."
        )
    reason = one_line(error).rstrip(".")
    return (
        f"Keras {keras.__version__} can't load {path}: {reason}. It may be damaged, or from a Keras that this one does "
        "not read: copy or download it again, or save it anew."
    )


# -- keras.applications ----------------------------------------------------------------------------------


def _application(name: str) -> OpenedModel:
    function_name, _, query = name.removeprefix("keras:").partition("?")
    function = _application_function(function_name)
    arguments = {"weights": "imagenet"} | {
        key: _literal(text) for key, text in parse_qsl(query, keep_blank_values=True)
    }
    unknown = [key for key in arguments if key not in inspect.signature(function).parameters]
    if unknown:
        raise UsageError(
            f"{function_name} takes no argument {unknown[0]!r}; "
            f"{nearest(unknown[0], inspect.signature(function).parameters)}"
        )
    with _seeded():
        model = _build(function, function_name, arguments)
    drawn = arguments["weights"] is None
    note = "random weights, drawn with seed 0" if drawn else f"weights={arguments['weights']}"
    return OpenedModel(model, Source(name, notes=(note,)), pp.family_of(function_name), drawn)


def _application_function(name: str) -> Callable:
    available = {
        key: value for key, value in vars(keras.applications).items() if inspect.isfunction(value) and key[:1].isupper()
    }
    if name not in available:
        raise UsageError(f"keras.applications has no {name!r}; {nearest(name, available)}")
    return available[name]


def _literal(text: str) -> Any:
    """An argument of a query: `false`, `none`, `10`, `(64,64,3)`, else text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _build(function: Callable, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        text = str(error)
        if "URL fetch failure" in text or isinstance(error, OSError):
            raise ModelError(_no_weights(name, text)) from error
        raise UsageError(f"keras.applications.{name} refuses these arguments: {one_line(error)}") from error


def _no_weights(name: str, text: str) -> str:
    url = text.partition("URL fetch failure on ")[2].split(": ")[0]
    return (
        f"the ImageNet weights of {name} can't be downloaded{f' from {url}' if url else ''}, and {_models_folder()} "
        "does not hold them. Expected a network connection or the downloaded file: try again online, put the file in "
        f"that folder, or use 'keras:{name}?weights=FILE' or 'keras:{name}?weights=none' (random weights)."
    )


def _models_folder() -> Path:
    """Where Keras keeps what it has downloaded."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw initial weights from seed 0; Python's, NumPy's and torch's generators are left where they were.

    TensorFlow's and Keras' own global seeds are set to 0: they can't be read back.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = torch.get_rng_state() if torch else None
    try:
        keras.utils.set_random_seed(0)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        if torch is not None:
            torch.set_rng_state(torch_state)


def imagenet_names(download: bool) -> tuple[str, ...] | None:
    """ImageNet's class names as Keras decodes them; None where its list is neither at hand nor to be had."""
    if not (_models_folder() / "imagenet_class_index.json").exists() and not download:
        return None
    try:
        decoded = keras.applications.imagenet_utils.decode_predictions(np.eye(1000, dtype=np.float32), top=1)
    except Exception:  # offline: Keras raises a bare Exception; numbers will do
        return None
    return tuple(name for ((_, name, _),) in decoded)
