"""The arguments of `open_model` as a value that can be sent, `ModelSpec`; and `open_model` itself.

A spec is frozen, hashable and picklable, and `spec.open()` gives the same network in another process. `describe()`
makes plain JSON values of it, which every result keeps, and `ModelSpec.from_json` reads them back.

A spec never trusts a file by itself (`spec.open(trust=True)` is needed each time), and one that was
read from JSON, which may come from anybody, runs no code that it names and raises no limit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from convscope import limits
from convscope.errors import ModelError, UsageError
from convscope.images.image import InputImage
from convscope.networks import opening
from convscope.networks import preprocessing as pp
from convscope.networks.choices import Choices
from convscope.networks.class_names import read_class_names
from convscope.networks.feeding import Feed, read_feed
from convscope.networks.formats import code
from convscope.networks.head import HeadChoice
from convscope.networks.network import Network
from convscope.schema import Json, Misfit

_TEXTS = (
    *(
        "source",
        "kind",
        "sha256",
        "beside_sha256",
        "weights",
        "weights_file_sha256",
        "input",
        "output",
        "head",
        "classes_file",
    ),
    *("backend", "device", "precision"),
)
_HEADS: tuple[HeadChoice, ...] = ("linear", "softmax", "sigmoid")


@dataclass(frozen=True, eq=False)
class Fed:
    """What an input gets that does not get the image. Equal ones have the same name, shape, type and values."""

    name: str
    value: Feed

    @property
    def _identity(self) -> tuple[str, tuple[int, ...], str, bytes]:
        arrays = self.value.arrays if isinstance(self.value, InputImage) else (np.asarray(self.value),)
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        kind = "image" if isinstance(self.value, InputImage) else str(arrays[0].dtype)
        return self.name, arrays[0].shape, kind, data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fed) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def describe(self) -> dict[str, Json]:
        """Plain JSON values: the values themselves are left out, their hash is there."""
        name, shape, dtype, data = self._identity
        return {"name": name, "shape": list(shape), "dtype": dtype, "sha256": hashlib.sha256(data).hexdigest()}


@dataclass(frozen=True)
class Options:
    """The user's options for the model: see `open_model`.

    Attributes:
        input, output, size, preprocess, head: as there; a size is `(height, width)`.
        feed: an array or an image for each further input.
        class_names: in the order of the outputs.
        classes_file: the file that they were read from.
    """

    input: str | None = None
    output: str | None = None
    size: tuple[int, int] | None = None
    feed: tuple[Fed, ...] | None = None
    preprocess: pp.Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    head: str | None = None
    classes_file: str | None = None

    def choices(self) -> Choices:
        """As every subclass of `Network` takes them."""
        return Choices(
            self.input,
            self.output,
            self.size,
            {fed.name: fed.value for fed in self.feed or ()},
            self.preprocess,
            self.class_names,
            next((known for known in _HEADS if known == self.head), None),
        )

    def describe(self) -> dict[str, Json]:
        """Plain JSON values."""
        given = self.class_names if self.classes_file is None else None
        return {
            "input": self.input,
            "output": self.output,
            "size": None if self.size is None else list(self.size),
            "feed": None if self.feed is None else [fed.describe() for fed in self.feed],
            "preprocess": None if self.preprocess is None else self.preprocess.describe(),
            "classes": given and list(given),
            "classes_file": self.classes_file,
            "head": self.head,
        }


@dataclass(frozen=True)
class Runtime:
    """The runtime: the backend of Keras; the device and the precision of PyTorch."""

    backend: str | None = None
    device: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Origin:
    """The origin of a spec, and the hashes of its files.

    Attributes:
        kind: "file", "code", "collection" or "memory".
        folder: that relative names start from; compared and written nowhere.
        sha256: of the model file, or of the Python file that makes the model.
        beside_sha256: of the other files that hold the model's weights: an ONNX file's external data, a SavedModel's
            variables, the files that a TensorFlow.js `model.json` names. It is the hash of what `sha256sum` prints of
            them, in the order of their names.
        weights_sha256: of the file of weights.
        trusted: the network was opened with `trust`; `ModelSpec.open` never goes by it.
        from_json: read from JSON, which may come from anybody.
    """

    kind: str = "file"
    folder: str = field(default="", compare=False)
    sha256: str | None = None
    beside_sha256: str | None = None
    weights_sha256: str | None = None
    trusted: bool = False
    from_json: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of `open_model`.

    Attributes:
        source: a file, code or the name of a collection's network, as it was given; a description of a model in memory.
        weights: a file of weights for a model that code makes.
        options: the user's options for the model.
        runtime: the backend, device and precision.
        limits: those that were in force.
        origin: its origin, and the hashes of its files.

    Example:
        >>> spec = open_model("model.keras").spec
        >>> spec.open().weights_sha256() == open_model("model.keras").weights_sha256()
        True
    """

    source: str
    weights: str | None = None
    options: Options = Options()
    runtime: Runtime = Runtime()
    limits: limits.Limits = field(default_factory=limits.Limits)
    origin: Origin = Origin()

    def open(self, trust: bool = False) -> Network:
        """The network that was opened, also in another process or folder.

        Args:
            trust: run code in the file; see `open_model`. A spec never includes it.

        Raises:
            ModelError: a file has changed since, or can't be opened; UsageError: the model was one in memory, or the
            spec comes from JSON and names code, and `trust` is not given.
        """
        if self.origin.kind == "memory":
            raise UsageError(
                f"expected a model that can be opened again, found {self.source}, which is in the memory of one "
                "process. Save it, and open the file.",
                code="spec-in-memory",
                name=self.source,
            )
        if self.origin.from_json:
            return opening.opened(self, trust)
        with limits.using(**asdict(self.limits)):
            return opening.opened(self, trust)

    def located(self, name: str) -> str:
        """The name of a file or of code as this process finds it, whatever its working folder is."""
        folder = self.origin.folder
        bare = self.origin.kind == "collection" or (name == self.source and _is_module(name))
        if bare or not folder or folder == os.getcwd() or os.path.isabs(name):
            return name
        return os.path.join(folder, name)

    def describe(self) -> dict[str, Json]:
        """Plain JSON values for provenance: no arrays, and no folders that were not given."""
        standard = asdict(limits.Limits())
        return {
            "source": self.source,
            "kind": self.origin.kind,
            "sha256": self.origin.sha256,
            "beside_sha256": self.origin.beside_sha256,
            "weights": self.weights,
            "weights_file_sha256": self.origin.weights_sha256,
            "trusted": self.origin.trusted,
            **self.options.describe(),
            **asdict(self.runtime),
            "limits": {name: value for name, value in asdict(self.limits).items() if value != standard[name]},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Json], folder: str | os.PathLike | None = None) -> ModelSpec:
        """The spec that `describe` wrote, as `result.provenance["network"]["spec"]` has it.

        Args:
            data: plain JSON values.
            folder: that relative names start from; the working folder where None.

        Returns:
            a spec without trust and with the limits in force here, independent of `data`.

        Raises:
            ModelError: it is no spec; UsageError: it needs arrays for further inputs, which JSON does not keep.
        """
        if data.get("feed"):
            names = ", ".join(str(fed.get("name")) for fed in data["feed"] if isinstance(fed, Mapping))
            raise UsageError(
                f"expected a spec without arrays, found some for the inputs {names}, of which JSON keeps the hash "
                "only. Open the model with open_model(..., feed=...).",
                code="feed-not-in-spec",
                names=names,
            )
        wrong = [name for name in _TEXTS if not isinstance(data.get(name), str | None)]
        if (
            wrong
            or not data.get("source")
            or data.get("kind") not in opening.ORIGINS
            or data.get("head") not in (None, *_HEADS)
        ):
            odd = ", ".join(wrong) or "source, kind or head"
            raise ModelError(
                f"expected a model spec as convscope writes it, found an invalid value for {odd}.",
                code="spec-invalid",
                name=odd,
            )
        home = os.path.abspath(folder or os.getcwd())
        source: str = data["source"]
        file: str | None = data.get("classes_file")
        options = Options(
            data.get("input"),
            data.get("output"),
            _size(data.get("size")),
            None,
            _preprocessing(data.get("preprocess")),
            read_class_names(os.path.join(home, file) if file else data.get("classes")),
            data.get("head"),
            file,
        )
        # A JSON's file may be code by its name: the interpretation at opening counts.
        kind = "memory" if data["kind"] == "memory" else opening.origin_of(source)
        origin = Origin(
            kind,
            home,
            data.get("sha256"),
            data.get("beside_sha256"),
            data.get("weights_file_sha256"),
            from_json=True,
        )
        runtime = Runtime(*(data.get(one.name) for one in fields(Runtime)))
        return cls(source, data.get("weights"), options, runtime, limits.current(), origin)


def _is_module(name: str) -> bool:
    return ".py:" not in name and code.is_code(name)


def _size(given: Json) -> tuple[int, int] | None:
    if given is None:
        return None
    if not (isinstance(given, list) and len(given) == 2 and all(type(side) is int and side > 0 for side in given)):
        raise ModelError(
            f"expected the size in a spec to be two numbers, found {given!r:.60}.",
            code="spec-invalid",
            found=repr(given)[:60],
        )
    return given[0], given[1]


def _preprocessing(given: Json) -> pp.Preprocessing | None:
    if given is None:
        return None
    try:
        return pp.read(given, "preprocess")
    except Misfit as error:
        raise ModelError(
            f"expected the preprocessing in a spec as convscope writes it: {error}.",
            code="spec-invalid",
            name=error.where,
            found=error.found,
        ) from error


def open_model(
    model: object,
    *,
    weights: str | os.PathLike | None = None,
    backend: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    preprocess: str | Sequence[float] | pp.Preprocessing | None = None,
    classes: str | os.PathLike | Sequence[str] | None = None,
    input: str | None = None,
    output: str | None = None,
    size: int | tuple[int, int] | None = None,
    feed: Mapping[str, object] | None = None,
    head: str | None = None,
    trust: bool = False,
) -> Network:
    """Open a trained model, whatever it comes as.

    Args:
        model: a `keras.Model` or `torch.nn.Module` in memory; the path of a model file, whose content decides and not
            its name (`.keras`, `.h5` of any age, a SavedModel folder, a TensorFlow.js `model.json`, `.onnx`,
            TorchScript, `.pt2`); code, `"file.py:function"` or `"package.module:function"`, that returns a model;
            `"keras:ResNet50V2"`,
            `"torchvision:resnet50"` or `"timm:convnext_tiny"`, with arguments as a query
            (`"keras:VGG16?weights=none&classes=10"`); a `ModelSpec`, which is
            opened again; or a `Network`, which is returned unchanged.
        weights: a file of weights for a model that code makes; `FILE::KEY` where a PyTorch checkpoint holds several.
        backend: that of Keras: "tensorflow", "jax" or "torch"; by default `KERAS_BACKEND`, else the imported one, else
            an installed one.
        device: for PyTorch: "cpu", "cuda", "cuda:1", "mps"; a module in memory stays where it is.
        precision: for PyTorch: "float32", or "bfloat16" or "float16" for autocast.
        preprocess: "none", "0..1", "-0.5..0.5", "-1..1", "caffe", "torch", or numbers MEAN,STD in pixel units (one of
            each, or the means of all channels and then their deviations); found out, measured or guessed where None.
        classes: names in the order of the outputs, or a file of them (a line each, or JSON).
        input, output: names, where the model has several; the first that fits where None.
        size: pixels `(height, width)` to bring images to, where the model takes any size.
        feed: for the inputs that don't get the image, by their names: arrays `(1, ...)` or `.npy` files of them, taken
            as they are; or images (paths, Pillow images), which are prepared like the image. Zeros where nothing is
            given.
        head: "softmax" or "sigmoid": the meaning of outputs that are logits; or "linear", to take any outputs as they
            are. A softmax or sigmoid that the network's graph shows comes before it.
        trust: run code in the file (Lambda layers, pickled modules).

    Raises:
        ModelError: the file is missing, damaged, of another kind, or has code; BackendError: the backend is not
        installed or not the one in use; UsageError: an option does not fit the model.

    Example:
        >>> network = convscope.open_model(MODEL, classes=CLASSES)
        >>> network.head.classes, network.inputs.size
        (13, (224, 224))
    """
    given = (weights, device, precision, preprocess, classes, input, output, size, feed, head)
    if isinstance(model, Network):
        if any(option is not None for option in given):
            raise UsageError("this network is open already; give options where it is opened.", code="already-open")
        return model
    if isinstance(model, ModelSpec):
        if any(option is not None for option in (backend, *given)):
            raise UsageError(
                "a spec says how its model is opened; give other options with the file or the name.",
                code="already-open",
            )
        return model.open(trust)
    if head not in (None, *_HEADS):
        raise UsageError(
            f"head {head!r} is not known; expected linear, softmax or sigmoid.", code="head-unknown", name=head
        )
    options = Options(
        input,
        output,
        (size, size) if isinstance(size, int) else size,
        None if feed is None else tuple(Fed(name, value) for name, value in read_feed(feed).items()),
        preprocess if preprocess is None or isinstance(preprocess, pp.Preprocessing) else pp.parse(preprocess),
        read_class_names(classes),
        head,
        os.fspath(classes) if isinstance(classes, str | os.PathLike) else None,
    )
    runtime = Runtime(backend, device, precision)
    file = None if weights is None else os.fspath(weights)
    if isinstance(model, opening.Named | str | os.PathLike):
        named = model if isinstance(model, opening.Named) else opening.Named(os.fspath(model))
        origin = Origin(opening.origin_of(named.name), os.getcwd(), trusted=trust)
        return opening.opened(ModelSpec(named.name, file, options, runtime, limits.current(), origin), trust, named)
    spec = ModelSpec(opening.described(model), file, options, runtime, limits.current(), Origin("memory"))
    return opening.of_memory(model, spec, trust)
