"""Model files and `keras:NAME`: from a name to a Keras model, by the content of the file."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import keras
import numpy as np

from convscope.errors import BackendError, ConvscopeError, ModelError, UsageError, nearest, one_line, option
from convscope.networks import preprocessing as pp
from convscope.networks.foreign import KerasModel, Structure, Tensor
from convscope.networks.formats import hdf5
from convscope.networks.formats.code import literal
from convscope.networks.formats.files import KINDS, ModelFile, kind_of_file
from convscope.networks.formats.hdf5 import Contents, Dataset
from convscope.networks.formats.keras import archive as keras_archive
from convscope.networks.formats.keras import config as keras_config
from convscope.networks.formats.keras import lambdas, tfjs
from convscope.networks.formats.keras.archive import Archive
from convscope.networks.formats.keras.legacy_h5 import files as legacy_h5
from convscope.networks.formats.keras.legacy_h5.building import registered_key
from convscope.networks.formats.keras.legacy_h5.code import code_layers
from convscope.networks.formats.saved_model import program as saved_model
from convscope.networks.formats.saved_model.program import Program
from convscope.networks.keras.imagenet import models_folder
from convscope.networks.keras.models import OpenedModel
from convscope.networks.network import Source


def read(file: ModelFile, trust: bool = False) -> OpenedModel:
    """The model in a `.keras` archive or an HDF5 file.

    Raises:
        ModelError: it can't be opened, with the reason.
    """
    if file.kind == "hdf5":
        opened = legacy_h5.read(file, trust)
        return OpenedModel(opened.model, file.source(f"HDF5 of Keras {opened.version}", *opened.translated))
    model, notes = _read_zip(file.path, trust)
    return OpenedModel(model, file.source(*notes))


def _read_zip(path: Path, trust: bool) -> tuple[KerasModel, tuple[str, ...]]:
    archive = keras_archive.read(path)
    config, decided = lambdas.resolved(archive.config, path.name, registered_key(lambdas.NAME) is not None)
    archive = replace(archive, config=config)
    code = dict.fromkeys(f"{kind} layer {name!r}" for kind, name, _ in code_layers(archive.config, ""))
    if code and not trust:
        raise ModelError(
            f"{path} holds Python code in the {', '.join(code)}; expected none. "
            f"If you trust the file, give {option('trust=True')} to run it.",
            code="needs-trust",
            path=str(path),
            names=list(code),
        )
    if archive.version.startswith(("2.", "1.")):
        weights = _weights_of(archive, path)
        model, said = legacy_h5.build(path, archive.version, archive.config, weights.size, trust)
        _fill_by_keras(model, weights, path.name)
        return model, (f"archive of Keras {archive.version}", *decided, *said)
    return _load_zip(archive, path, trust), (f"archive of Keras {archive.version}", *decided)


def _weights_of(archive: Archive, path: Path) -> Contents:
    if archive.weights is None:
        raise ModelError(
            f"the archive {path} holds no {keras_archive.WEIGHTS}. Copy or download it again.",
            code="file-damaged",
            path=str(path),
            name=keras_archive.WEIGHTS,
        )
    return archive.weights


def load_weights(
    model: KerasModel, path: Path, name: str | None = None, size: tuple[int, int] | None = None
) -> tuple[str, ...]:
    """Give a model the weights in a file, each by its path and shape.

    Args:
        model: a `keras.Model`; it is as it was where the weights don't fit.
        path: weights of Keras 1 to 3 (`.h5`, `.weights.h5`), or a whole model, whose weights alone are read.
        name: of the file, for messages.
        size: of an image `(h, w)`, to build a model that was never called.

    Returns:
        what had to be decided for that.

    Raises:
        ModelError: it holds no weights, or a weight is missing, has another shape, or is left over; UsageError: the
        model is not built, and there is no size or it can't be built by it.
    """
    name = name or path.name
    if not model.built and size is None:
        raise UsageError(
            "the model that the code makes is not built; give it an Input, call it on an image there, or give the size "
            f"of one with {option('open_model.size')}.",
            code="not-built",
        )
    kind = kind_of_file(path)
    if kind == "tfjs":
        arrays = tfjs.read_weights(path)
        said = () if model.built or size is None else _built(model, (*size, _channels(arrays.values())))
        return (*said, *tfjs.fill(model, path, arrays))
    if kind not in ("keras", "hdf5"):
        raise ModelError(
            f"expected weights of Keras (.h5, .weights.h5, .keras or TensorFlow.js' model.json) in {path}, found "
            f"{KINDS[kind]}.",
            code="file-of-another-kind",
            path=str(path),
            found=kind,
        )
    archived = kind == "keras"
    read = _weights_of(keras_archive.read(path), path) if archived else hdf5.read(path, but=keras_archive.BESIDE)
    said = () if model.built or size is None else _built(model, (*size, _channels(read.datasets.values())))
    if not archived and legacy_h5.holds_layers(read):
        return (*said, *legacy_h5.fill(model, path, read))
    _fill_by_keras(model, read, name)
    return said


def _channels(weights: Iterable[np.ndarray | Dataset]) -> int:
    """The channels of an image, by the kernels `(h, w, channels, filters)` of a file: colours where one takes them."""
    taken = {item.shape[2] for item in weights if len(item.shape) == 4}
    return 1 if 1 in taken and 3 not in taken else 3


def _built(model: KerasModel, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Build a model for images of a shape `(h, w, c)`."""
    try:
        if isinstance(model, keras.Sequential):
            model.build((None, *shape))
        else:
            model(np.zeros((1, *shape), np.float32), training=False)
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"the model that the code makes is not built, and can't be called on an image of {shape[0]}x{shape[1]} "
            f"pixels with {shape[2]} channels ({one_line(error)[:200]}). Give it an Input there.",
            code="not-built",
            reason=one_line(error)[:200],
        ) from error
    return (f"built for images of {shape[0]}x{shape[1]} with {shape[2]} channels, since it was never called",)


def _fill_by_keras(model: KerasModel, weights: Contents, name: str) -> None:
    """Weights in the layout of Keras 2.12 and later: its own loader finds them by path, in a clean file of ours."""
    before = [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in model.variables]
    try:
        _filled(model, weights, name)
    except BaseException:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
        raise


def _filled(model: KerasModel, weights: Contents, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / keras_archive.WEIGHTS
        hdf5.write(path, weights)
        try:
            model.load_weights(path)
        except Exception as error:  # Keras raises what its layers raise
            raise ModelError(
                f"the weights in {name} do not fit the architecture: {one_line(error)[:300]}.",
                code="weights-misfit",
                path=name,
                reason=one_line(error)[:300],
            ) from error
    left = _left_over(model, weights)
    if left:
        shown = ", ".join(left[:4]) + (", …" if len(left) > 4 else "")
        raise ModelError(
            f"the weights in {name} do not fit the architecture: it has no place for {shown}.",
            code="weights-misfit",
            path=name,
            names=left,
        )


def _left_over(model: KerasModel, weights: Contents) -> list[str]:
    """Datasets of a file whose values are in no variable of the model: Keras' loader does not ask for them."""
    placed = Counter(_mark(keras.ops.convert_to_numpy(variable.value)) for variable in model.variables)
    left: list[str] = []
    for path, item in weights.datasets.items():
        if item.values is None or "seed_generator" in path:
            continue
        mark = _mark(item.array)
        if placed[mark]:
            placed[mark] -= 1
        else:
            left.append(path)
    return left


def _mark(values: np.ndarray) -> str:
    plain = np.ascontiguousarray(values, np.float32)
    return f"{plain.shape}{hashlib.sha256(plain.tobytes()).hexdigest()}"


def _load_zip(archive: Archive, path: Path, trust: bool) -> KerasModel:
    if not trust:
        config = keras_config.checked(archive.config, registered_key, path.name)
        archive = replace(archive, config=config, assets={})
    weights = _weights_of(archive, path)
    try:
        with keras_archive.clean(archive) as named, keras_config.building(weights.size, path.name):
            model = keras.saving.load_model(named, compile=False, safe_mode=not trust)
    except ConvscopeError:
        raise
    except Exception as error:
        raise _cant_load(path, error) from error
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"{path} describes a {type(model).__name__}; expected a model.",
            code="not-a-model",
            path=str(path),
            found=type(model).__name__,
        )
    keras_config.check_outputs(model, path.name)
    return model


def _cant_load(path: Path, error: Exception) -> ModelError:
    unknown = re.search(r"Could not locate (?:class|function) '([^']*)'", str(error))
    if unknown:
        return ModelError(
            f"{path} uses {unknown[1]!r}, a class of its author's own that Keras {keras.__version__} does not know: "
            "open it in Python where that class is registered (keras.saving.register_keras_serializable) and hand the "
            "model over in memory.",
            code="layer-class-unknown",
            path=str(path),
            names=[unknown[1]],
        )
    reason = one_line(error).rstrip(".")
    return ModelError(
        f"Keras {keras.__version__} can't load {path}: {reason}. It may be damaged, or from a Keras that this one does "
        "not read: copy or download it again, or save it anew.",
        code="config-invalid",
        path=str(path),
        reason=reason,
    )


# -- SavedModel folders ----------------------------------------------------------------------------------


class SavedModelBlock(keras.layers.Layer):
    """A SavedModel's function as a layer; its variables are the layer's weights, which stay as they are."""

    def __init__(self, program: Program, **options: object) -> None:
        super().__init__(trainable=False, **options)
        variables = {name: self._weight(value) for name, value in program.variables.items()}
        self._run = saved_model.function(program, variables)

    def _weight(self, value: np.ndarray) -> object:
        made = self.add_weight(shape=value.shape, dtype=value.dtype.name, initializer="zeros", trainable=False)
        made.assign(value)
        return made.value

    def call(self, image: Tensor) -> Structure:
        """Outputs by name."""
        return self._run(image)


def read_saved_model(file: ModelFile, trust: bool = False) -> OpenedModel:
    """A SavedModel folder as a model of one layer: TensorFlow runs it, and nothing inside can be seen.

    Args:
        file: the folder with `saved_model.pb`.
        trust: let TensorFlow load and run a graph whose operations could do more than compute.

    Raises:
        BackendError: Keras does not run on TensorFlow; ModelError: the folder has no signature for images, or its
        graph reads files or calls Python.
    """
    if keras.backend.backend() != "tensorflow":
        raise BackendError(
            f"a SavedModel is a program of TensorFlow's, and Keras runs on {keras.backend.backend()}. "
            f"Choose tensorflow with {option('backend')} or KERAS_BACKEND.",
            code="backend-in-use",
            expected="tensorflow",
            found=keras.backend.backend(),
        )
    folder = file.path
    saved_model.check_files(folder, trust)
    try:
        program = saved_model.read(folder)
    except ModelError:
        if not trust:
            raise
        layer, endpoint, shape, dtype = _trusted(folder)
    else:
        endpoint, shape, dtype = program.signature, program.shape, program.dtype
        layer = SavedModelBlock(program, name="saved_model")
    image = keras.Input(shape[1:], name="picture", dtype=dtype)
    model = keras.Model(image, layer(image), name=folder.name or "saved_model")
    notes = (
        f"SavedModel, run by TensorFlow through its signature {endpoint!r}",
        "its inside is one block: activations and filters of the output only, no heatmaps",
    )
    variables = [path.relative_to(folder).as_posix() for path in saved_model.parts(folder)]
    return OpenedModel(model, file.source(*notes, beside=variables))


def _trusted(folder: Path) -> tuple[KerasModel, str, tuple[int | None, ...], str]:
    """A layer that runs the folder's program as it is, with its signature, and the shape and type of its input.

    TensorFlow's loader comes first; where it can't restore the objects around the signature, the signature alone does.
    """
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(folder))
    except Exception:  # TensorFlow raises what its reader raises
        program = saved_model.read(folder, trust=True)
        layer = SavedModelBlock(program, name="saved_model")
        return layer, program.signature, program.shape, program.dtype
    endpoint, shape, dtype = _endpoint(folder, loaded)
    return keras.layers.TFSMLayer(str(folder), call_endpoint=endpoint, name="saved_model"), endpoint, shape, dtype


def _endpoint(folder: Path, loaded: KerasModel) -> tuple[str, tuple[int | None, ...], str]:
    """The signature that takes one image: its name, the shape of its input and its type."""
    taking = {}
    for name, signature in loaded.signatures.items():
        specs = list(signature.structured_input_signature[1].values())
        if len(specs) == 1 and specs[0].shape.rank == 4:
            taking[name] = (tuple(specs[0].shape), specs[0].dtype.name)
    name = saved_model.chosen_signature(folder, taking, list(loaded.signatures))
    return name, *taking[name]


# -- keras.applications ----------------------------------------------------------------------------------


def open_application(name: str) -> OpenedModel:
    """A network of `keras.applications`, by `keras:NAME` with its arguments as a query.

    Raises:
        UsageError: no such application or argument; ModelError: its weights can't be downloaded.
    """
    function_name, _, query = name.removeprefix("keras:").partition("?")
    function = _application_function(function_name)
    arguments = {"weights": "imagenet"} | {key: literal(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    unknown = [key for key in arguments if key not in inspect.signature(function).parameters]
    if unknown:
        raise UsageError(
            f"{function_name} takes no argument {unknown[0]!r}; "
            f"{nearest(unknown[0], inspect.signature(function).parameters)}",
            code="function-arguments",
            name=function_name,
        )
    with _seeded():
        model = _build(function, function_name, arguments)
    drawn = arguments["weights"] is None
    note = "random weights, drawn with seed 0" if drawn else f"weights={arguments['weights']}"
    return OpenedModel(model, Source(name, notes=(note,)), pp.family_of(function_name), imagenet=not drawn)


def _application_function(name: str) -> Callable:
    available = {
        key: value for key, value in vars(keras.applications).items() if inspect.isfunction(value) and key[:1].isupper()
    }
    if name not in available:
        raise UsageError(
            f"keras.applications has no {name!r}; {nearest(name, available)}", code="network-unknown", name=name
        )
    return available[name]


def _build(function: Callable, name: str, arguments: dict[str, object]) -> object:
    try:
        return function(**arguments)
    except Exception as error:
        text = str(error)
        if "URL fetch failure" in text or isinstance(error, OSError):
            raise ModelError(_no_weights(name, text), code="weights-not-fetched", name=name) from error
        raise UsageError(
            f"keras.applications.{name} refuses these arguments: {one_line(error)}",
            code="function-arguments",
            name=name,
        ) from error


def _no_weights(name: str, text: str) -> str:
    url = text.partition("URL fetch failure on ")[2].split(": ")[0]
    return (
        f"the ImageNet weights of {name} can't be downloaded{f' from {url}' if url else ''}, and {models_folder()} "
        "does not hold them. Expected a network connection or the downloaded file: try again online, put the file in "
        f"that folder, or use 'keras:{name}?weights=FILE' or 'keras:{name}?weights=none' (random weights)."
    )


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
