"""From the user's argument to a model, in steps; each returns a value that the next one takes.

`Named` (sniffed once, `named`) -> its reader, from a declared table -> `OpenedModel` or `OpenedModule` -> the network,
by `network_of` of its framework; `inspection` has the steps from there on.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar

from convscope.errors import ModelError, UsageError, option
from convscope.networks import installed
from convscope.networks.foreign import KerasModel
from convscope.networks.formats import code, files
from convscope.networks.keras.models import OpenedModel
from convscope.networks.network import Network, Source
from convscope.networks.torch.modules import OpenedModule

if TYPE_CHECKING:
    from convscope.networks.spec import ModelSpec

ORIGINS = ("file", "code", "collection", "memory")
_COLLECTIONS = ("keras", "torchvision", "timm")


Read = TypeVar("Read")


@dataclass(frozen=True)
class Reader(Generic[Read]):
    """Who reads one kind of file or one collection: a module that imports a framework, when it is needed.

    Its type has that of the result: an `OpenedModel`, an `OpenedModule`, or notes on weights that were filled in.

    Attributes:
        module: below `convscope.networks`.
        function: in it, that gives the result.
        framework: "keras" or "torch".
        extra: the extra of this package that installs the dependencies.
    """

    module: str
    function: str
    framework: str
    extra: str = "torch"

    def __call__(self, *arguments: object) -> Read:
        """Call the function; its module is imported now."""
        function: Callable[..., Read] = getattr(_module(self.module), self.function)
        return function(*arguments)


# By the kind of a file; a pickle has none.
READERS: Mapping[str, Reader[OpenedModel | OpenedModule]] = {
    "keras": Reader("formats.keras.files", "read", "keras"),
    "hdf5": Reader("formats.keras.files", "read", "keras"),
    "saved_model": Reader("formats.keras.files", "read_saved_model", "keras"),
    "tfjs": Reader("formats.keras.tfjs", "read", "keras"),
    "onnx": Reader("formats.onnx.model", "read", "torch", "onnx"),
    "torchscript": Reader("formats.torch.script", "read", "torch"),
    "exported": Reader("formats.torch.export", "read", "torch"),
    "safetensors": Reader("formats.torch.files", "read", "torch"),
    "torch": Reader("formats.torch.files", "read", "torch"),
}
_APPLICATION: Reader[OpenedModel] = Reader("formats.keras.files", "open_application", "keras")
_ZOO: Reader[OpenedModule] = Reader("formats.torch.zoo", "open_zoo", "torch")
_FILL: Mapping[str, Reader[Sequence[str]]] = {
    "keras": Reader("formats.keras.files", "load_weights", "keras"),
    "torch": Reader("formats.torch.files", "fill", "torch"),
}
_BESIDE: Reader[Sequence[str]] = Reader("formats.keras.tfjs", "files_of", "keras")
_SCRIPTED: Reader[OpenedModule] = Reader("formats.torch.script", "read_memory", "torch")
_CALL_ONCE: Reader[None] = Reader("torch.lazy", "called_once", "torch")


@dataclass(frozen=True)
class Named:
    """A user's name for a model: a file, code, or a network of a collection. A file is sniffed once, at first use."""

    name: str

    @property
    def origin(self) -> str:
        """ "file", "code" or "collection"."""
        return origin_of(self.name)

    @cached_property
    def file(self) -> files.ModelFile:
        """The file with its kind.

        Raises:
            ModelError: there is no such file, or it is no model.
        """
        return files.sniff(Path(self.name))

    @property
    def needs_keras(self) -> bool:
        """True if opening will need Keras, False if PyTorch or whatever the user's code imports.

        Raises:
            ModelError: there is no such file, or it is no model; no framework is imported to find out.
        """
        if self.origin == "file":
            return self.file.kind in READERS and READERS[self.file.kind].framework == "keras"
        return self.name.startswith("keras:")


def origin_of(name: str) -> str:
    """ "file", "code" or "collection": the interpretation of a name."""
    if name.partition(":")[0] in _COLLECTIONS:
        return "collection"
    return "code" if code.is_code(name) else "file"


def described(model: KerasModel) -> str:
    """A model in memory, for people."""
    if _is_scripted(model):
        return f"TorchScript {model.original_name} in memory"
    return f"keras.Model {model.name!r} in memory" if _is_keras(model) else f"{type(model).__name__} in memory"


def opened(spec: ModelSpec, trust: bool, named: Named | None = None) -> Network:
    """The network that a spec names, with its spec.

    Args:
        spec: of a file, of code or of a collection's network.
        trust: run code in the file.
        named: the name, if it was interpreted already.

    Raises:
        ModelError, BackendError, UsageError: see `open_model`.
    """
    named = named or Named(spec.located(spec.source))
    if spec.origin.from_json and not trust:
        _check_named_by_json(named)
    step = {"collection": _of_collection, "code": _of_code, "file": _of_file}[named.origin]
    network = step(named, spec, trust)
    made_by = Path(_python_file(named.name)) if named.origin == "code" else None
    own = network.source.sha256 if named.origin == "file" else _sha256_if_file(made_by)
    weights = network.source.sha256 if spec.weights is not None else None
    origin = replace(
        spec.origin,
        sha256=own,
        beside_sha256=network.source.beside_sha256,
        weights_sha256=weights,
        trusted=trust,
    )
    network.spec = replace(spec, origin=origin)
    return network


def of_memory(model: object, spec: ModelSpec, trust: bool = False) -> Network:
    """The network of a model in memory; a scripted one is checked as its file is, unless it is trusted."""
    _check_no_weights(spec, "a model in memory")
    network = _of_object(model, Source(spec.source), spec, in_memory=True, trust=trust)
    if network is None:
        raise ModelError(_not_a_model(model), code="not-a-model", found=type(model).__name__)
    network.spec = spec
    return network


# A collection's network without a file or a hub in its name or its arguments.
_PLAIN = re.compile(r"(keras|torchvision|timm):[\w.]+(\?(\w+=(\w*|\d+\.\d+)(&|$))*)?")


def _check_named_by_json(named: Named) -> None:
    """A JSON may come from anybody: code that it names is not run, and what a collection would fetch is checked.

    Raises:
        UsageError: it names code, or a collection's network with a file or a hub in its name or its arguments.
    """
    if named.origin == "code":
        raise UsageError(
            f"{named.name} is code that a JSON names; expected a model file. It is not run without trust: open it "
            "yourself with open_model, or call open(trust=True) if you trust who wrote the JSON.",
            code="needs-trust",
            name=named.name,
        )
    if named.origin == "collection" and not _PLAIN.fullmatch(named.name):
        raise UsageError(
            f"{named.name} names a file or a hub in a JSON; expected the plain name of a network. Open it yourself "
            "with open_model, or call open(trust=True) if you trust who wrote the JSON.",
            code="needs-trust",
            name=named.name,
        )


def _of_file(named: Named, spec: ModelSpec, trust: bool) -> Network:
    file = named.file
    _check_no_weights(spec, named.name)
    if file.kind not in READERS:
        raise ModelError(
            f"{file.path} is {files.KINDS[file.kind]}, which is never loaded: that runs code. Give {files.EXPECTED}.",
            code="kind-refused",
            found=file.kind,
        )
    _check_unchanged(file.path, spec.origin.sha256, lambda: file.sha256)
    reader = READERS[file.kind]
    _prepare(reader, spec, f"{file.path} is {files.KINDS[file.kind]}, which")
    fed = tuple(one.name for one in spec.options.feed or ())
    made = reader(file, spec.options.input, fed) if file.kind == "onnx" else reader(file, trust)
    beside = made.source.beside_sha256
    _check_unchanged(f"a file beside {file.path}", spec.origin.beside_sha256, lambda: beside)
    return _network(made, spec)


def _of_collection(named: Named, spec: ModelSpec, trust: bool) -> Network:
    if named.name.startswith("keras:"):
        _check_no_weights(spec, named.name)
        _prepare(_APPLICATION, spec, named.name)
        return _network(_APPLICATION(named.name), spec)
    weights = _weights_of(spec)
    _prepare(_ZOO, spec, named.name)
    return _network(_ZOO(named.name, weights, trust), spec)


def _of_code(named: Named, spec: ModelSpec, trust: bool) -> Network:
    """The model that a function of the user's returns, with the weights of a file."""
    weights = _weights_of(spec)
    python = Path(_python_file(named.name))
    _check_unchanged(python, spec.origin.sha256, lambda: _sha256_if_file(python))
    installed.name_backend_for_code(spec.runtime.backend)
    made = code.build(named.name)
    framework = "keras" if _is_keras(made) else "torch" if _is_torch(made) else None
    if framework is None:
        raise UsageError(
            f"expected {spec.source} to return a keras.Model or a torch.nn.Module, found {code.describe_type(made)}.",
            code="not-a-model",
            name=str(spec.source),
            found=code.describe_type(made),
        )
    if framework == "torch":
        _check_runtime(framework, spec)
        if spec.options.size is not None:
            _CALL_ONCE(made, spec.options.size)
    if weights is None:
        notes: Sequence[str] = _UNTRAINED
    elif framework == "keras":
        _check_no_key(weights)
        notes = _FILL[framework](made, weights.path, None, spec.options.size)
    else:
        notes = _FILL[framework](made, weights, trust)
    source = _source_of_code(spec, weights, notes)
    beside = source.beside_sha256
    _check_unchanged(f"a file beside {source.file}", spec.origin.beside_sha256, lambda: beside)
    network = _of_object(made, source, spec, in_memory=False, trust=trust)
    assert network is not None
    return network


_UNTRAINED = ("weights as the function left them: no file of weights was given",)


def _check_no_key(weights: files.WeightsFile) -> None:
    if weights.key is not None:
        raise UsageError(
            f"a key picks one of the state dicts in a PyTorch checkpoint; {weights.path} goes into a Keras model. Give "
            f"it as {option('weights')} without ::{weights.key}.",
            code="option-misfit",
            name="weights",
        )


def _source_of_code(spec: ModelSpec, weights: files.WeightsFile | None, notes: Sequence[str]) -> Source:
    name = spec.source
    if ".py:" in name:  # the name alone, as for a model file
        name, notes = os.path.basename(name), (f"made by {name}", *notes)
    if weights is None:
        return Source(name, notes=tuple(notes))
    path = weights.path
    named = _BESIDE(path) if files.kind_of_file(path) == "tfjs" else ()
    beside = files.sha256_of_several(path.parent, named)
    return Source(name, str(path), files.sha256(path), (f"weights of {path.name}", *notes), beside)


def _of_object(model: object, source: Source, spec: ModelSpec, *, in_memory: bool, trust: bool) -> Network | None:
    """The network of a `keras.Model` or a `torch.nn.Module`; None for anything else."""
    # Under Keras' torch backend a Keras model is a torch module too: ask "is it Keras?" first.
    if _is_keras(model):
        _check_runtime("keras", spec)
        installed.choose_backend(spec.runtime.backend)
        return _network(OpenedModel(model, source, imagenet=False), spec)
    if _is_torch(model):
        _check_runtime("torch", spec)
        if _is_scripted(model):
            return _network(replace(_SCRIPTED(model, source, trust), in_memory=in_memory), spec)
        return _network(OpenedModule(model, source, in_memory=in_memory), spec)
    return None


def _network(made: OpenedModel | OpenedModule, spec: ModelSpec) -> Network:
    """The network of a reader's result."""
    choices = spec.options.choices()
    if isinstance(made, OpenedModel):
        return _module("keras.network").network_of(made, choices)
    device, precision = spec.runtime.device, spec.runtime.precision or "float32"
    return _module("torch.network").network_of(made, choices, device, precision)


def _prepare(reader: Reader[Read], spec: ModelSpec, what: str) -> None:
    """Make sure that the framework is there before a reader imports it."""
    _check_runtime(reader.framework, spec)
    if reader.framework == "keras":
        installed.choose_backend(spec.runtime.backend)
        return
    if reader.extra != "torch":
        installed.check_installed(reader.extra, reader.extra, what)
    installed.check_installed("torch", reader.extra, what)


def _check_runtime(framework: str, spec: ModelSpec) -> None:
    backend, device, precision = spec.runtime.backend, spec.runtime.device, spec.runtime.precision
    if framework == "torch":
        if backend not in (None, "torch"):
            raise UsageError(
                f"{option('backend')} {backend!r} is for Keras models; this is not one, and runs on torch.",
                code="option-misfit",
                name="backend",
            )
        return
    if device is not None:
        raise UsageError(
            f"{option('device')} is for PyTorch and ONNX models; Keras computes where its backend does.",
            code="option-misfit",
            name="device",
        )
    if precision not in (None, "float32"):
        raise UsageError(
            f"{option('precision')} is for PyTorch and ONNX models; a Keras model has its own.",
            code="option-misfit",
            name="precision",
        )


def _check_no_weights(spec: ModelSpec, name: str) -> None:
    if spec.weights is not None:
        raise UsageError(
            f"{option('weights')} goes with code that makes the model (file.py:function), not with {name}.",
            code="option-misfit",
            name="weights",
        )


def _weights_of(spec: ModelSpec) -> files.WeightsFile | None:
    """The file of weights, checked to be there and to be unchanged.

    Raises:
        ModelError: there is none that can be read, or it is another one than a spec was made from.
    """
    if spec.weights is None:
        return None
    weights = files.weights_file(spec.located(spec.weights))
    path = weights.path
    files.check_file(path)
    if os.path.isfile(path):
        _check_unchanged(path, spec.origin.weights_sha256, lambda: files.sha256(path))
    return weights


def _check_unchanged(path: Path | str, expected: str | None, sha256: Callable[[], str | None]) -> None:
    """Refuse a file that is not the one that a spec was made from.

    Raises:
        ModelError: its hash is another one.
    """
    if expected is None:
        return
    found = sha256() or "no file"
    if found != expected:
        raise ModelError(
            f"{path} has changed since the spec was made: expected SHA-256 {expected}, found {found}. Give the "
            "unchanged file, or open this one with open_model.",
            code="file-changed",
            expected=expected,
            found=found,
            path=str(path),
        )


def _sha256_if_file(path: Path | None) -> str | None:
    return files.sha256(path) if path is not None and os.path.isfile(path) else None


def _python_file(name: str) -> str:
    """The file in `file.py:function?argument=value`."""
    return name.partition(".py:")[0] + ".py"


def _is_keras(model: object) -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(model, keras.Model)


def _is_torch(model: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _is_scripted(model: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.jit.ScriptModule)


def _not_a_model(model: object) -> str:
    module = type(model).__module__
    if module.startswith(("tf_keras", "keras.src.engine", "tensorflow.python.keras")):
        return (
            f"expected a Keras 3 model, found one of Keras 2 ({module}). "
            "Save it with model.save('model.h5') and open that file."
        )
    return (
        "expected a keras.Model, a torch.nn.Module, the path of a model file or a name such as 'keras:NAME', "
        f"found {module}.{type(model).__qualname__}."
    )


def _module(name: str) -> ModuleType:
    """A module that imports a framework, when it is needed."""
    return importlib.import_module(f"convscope.networks.{name}")
