"""PyTorch's files: weights into the right places, and no code in a file is run without a request."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import nn

from convscope import limits
from convscope.errors import BackendError, ModelError, UsageError, nearest, one_line, option
from convscope.networks import preprocessing as pp
from convscope.networks.foreign import Structure
from convscope.networks.formats import pickles
from convscope.networks.formats.code import literal
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.files import KINDS, ModelFile, kind_of_file, sha256
from convscope.networks.formats.torch import pickles as torch_pickles
from convscope.networks.network import Source
from convscope.networks.torch.modules import OpenedModule
from convscope.schema import Json

HOW_TO_GIVE_CODE = f"Give the code that makes the network, file.py:function, and this file as {option('weights')}"


def read(file: ModelFile, trust: bool = False) -> OpenedModule:
    """A checkpoint or `.safetensors` file that is opened by itself: a pickled module, if trusted.

    Raises:
        ModelError: the file holds weights only, is damaged, or would have to run code.
    """
    if file.kind != "safetensors" and trust and foreign_globals(file.path):
        return _pickled_module(file)
    state, _ = load_state_dict(file, trust=False)
    raise ModelError(_weights_only(file.path, state), code="weights-alone", path=str(file.path))


# -- weights ---------------------------------------------------------------------------------------------

# What checkpoints keep their weights under, the first that is there; averaged weights are asked for by name.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "generator"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
# Prefixes that wrappers of modules put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")


def load_state_dict(file: ModelFile, trust: bool = False) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The weights of a `.safetensors` file or a PyTorch checkpoint by name, and the wrappers removed for them.

    Args:
        file: one of these.
        trust: let what lies beside the weights in a checkpoint run its author's code.

    Raises:
        ModelError: the file holds no weights, is damaged, or would have to run code.
    """
    path = file.path
    if file.kind == "safetensors":
        return _safetensors(path), ()
    if file.kind != "torch":
        raise ModelError(
            f"expected a state dict of tensors by name in {path}, found {KINDS[file.kind]}. Open it by itself.",
            code="file-of-another-kind",
            path=str(path),
            found=file.kind,
        )
    try:
        with torch_pickles.opened(path) as checkpoint:
            found, notes = _unwrapped(path, checkpoint.value, torch_pickles.Declared)
            held: dict[object, bytearray] = {}
            return {name: checkpoint.tensor(declared, held) for name, declared in found.items()}, notes
    except pickles.ForeignName as error:
        if trust:
            return _unwrapped(path, _unpickled(path), torch.Tensor)
        raise ModelError(
            _would_run_code(path, foreign_globals(path) or [error.name]),
            code="needs-trust",
            path=str(path),
            names=foreign_globals(path) or [error.name],
        ) from error


def _unwrapped(path: Path, found: object, kind: type) -> tuple[dict[str, Structure], tuple[str, ...]]:
    """What is of a `kind` of tensors in the state dict of a checkpoint, by its name."""
    notes: list[str] = []
    while isinstance(found, Mapping) and not _is_state(found, kind):
        key = next((key for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if key is None:
            break
        beside = [other for other in _WRAPPERS if other != key and isinstance(found.get(other), Mapping)]
        notes.append(f"taken from {key!r}" + (f" (beside it: {', '.join(beside)})" if beside else ""))
        found = found[key]
    if not isinstance(found, Mapping) or not found or not _is_state(found, kind):
        what = "an empty one" if isinstance(found, Mapping) and not found else _contents(found)
        raise _no_state(path, what)
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, kind)}
    try:
        _check_names(tensors)
    except ValueError as error:
        raise ModelError(
            f"expected a state dict of tensors by name in {path}, but {error}.",
            code="file-invalid",
            path=str(path),
            reason=str(error),
        ) from error
    return tensors, tuple(notes)


def _no_state(path: Path, found: str) -> ModelError:
    return ModelError(
        f"expected a state dict of tensors by name in {path}, found {found}.",
        code="no-weights",
        path=str(path),
        found=found,
    )


def _is_state(found: Mapping, kind: type) -> bool:
    """True if names lead to tensors; a few numbers beside them do no harm."""
    tensors = sum(isinstance(value, kind) for value in found.values())
    return tensors > 0 and tensors >= len(found) / 2


def _contents(found: object) -> str:
    if isinstance(found, Mapping):
        return f"{', '.join(ascii(key)[:60] for key in list(found)[:4])}, …"
    if isinstance(found, torch_pickles.Beside):
        return f"a {found.name}"
    return "a tensor" if isinstance(found, torch_pickles.Declared) else f"a {type(found).__name__}"


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise BackendError(
            f"{path} needs safetensors, which is not installed. Run: pip install 'convscope[torch]'",
            code="backend-missing",
            name="safetensors",
        ) from error
    _check_header(path)
    try:
        state = load_file(path)
    except Exception as error:  # the library's own error class is no ValueError
        raise damaged(path, error, " whole") from error
    if not state:
        raise _no_state(path, "an empty one")
    return state


def _check_header(path: Path) -> None:
    """Hold the header of a `.safetensors` file to the file's own size and to the limits, before any of it is read."""
    size, limit = path.stat().st_size, limits.current()
    if size > limit.weights:
        raise ModelError(
            f"{path} has {limits.shown('weights', size)} ({limits.how_to_raise('weights')}).",
            code="input-too-large",
            limit="weights",
        )
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, limit.text):
            raise ModelError(
                f"{path} can't be read whole: it says that its header has {length} bytes, and has {size} in all "
                f"({limits.how_to_raise('text')}). Copy or download it again.",
                code="input-too-large",
                limit="text",
            )
        try:
            header = file.read(length)
            _check_count(header.count(b",") + header.count(b"[") + header.count(b"{"))
            tensors = json.loads(header, object_pairs_hook=_each_once)
            _check_places({name: told for name, told in tensors.items() if name != "__metadata__"}, size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, error, " whole") from error


_MARKS = 20  # commas and brackets that describe one tensor: 9 at most with 4 sides, and a reserve for metadata


def _check_count(marks: int) -> None:
    """JSON takes far more memory as values than as text: its size is estimated before it is parsed."""
    if marks > _MARKS * limits.current().entries:
        raise ValueError(f"its header describes too much ({limits.how_to_raise('entries')})")


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("its header names something twice")
    return dict(pairs)


def _check_places(tensors: Mapping[str, Json], size: int) -> None:
    """Tensors lie one after another, and none overlaps another or the file's end."""
    if len(tensors) > limits.current().entries:
        raise ValueError(f"it has {len(tensors)} tensors ({limits.how_to_raise('entries')})")
    _check_names(tensors)
    end = 0
    for name, (first, last) in sorted(((n, t["data_offsets"]) for n, t in tensors.items()), key=lambda pair: pair[1]):
        if not (type(first) is type(last) is int) or not end == first <= last <= size:
            raise ValueError(f"its tensor {name!r} overlaps another or the end of the file")
        end = last


def _check_names(tensors: Iterable[object]) -> None:
    for name in tensors:  # a key may be None too
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"a tensor has the name {ascii(name)[:80]}")


def fill(module: nn.Module, path: Path, trust: bool = False) -> tuple[str, ...]:
    """Load the weights in a file into a module: each by its name and shape, none left over, none missing.

    Returns:
        what had to be unwrapped or taken off for that.

    Raises:
        ModelError: names or shapes don't match, with the nearest names.
    """
    state, notes = load_state_dict(ModelFile(path, kind_of_file(path)), trust)
    target = _targets(module)
    state, taken_off = _without_prefix(state, target)
    _check(path, state, target)
    lazy = any(nn.parameter.is_lazy(tensor) for tensor in target.values())
    try:
        module.load_state_dict(state, strict=False, assign=False)
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {path} can't be loaded: {one_line(error)[:200]}.",
            code="weights-misfit",
            path=str(path),
            reason=one_line(error)[:200],
        ) from error
    return (*notes, *taken_off, *(("its lazily created layers took their shapes from the file",) if lazy else ()))


def _targets(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict(keep_vars=True))


def _without_prefix(
    state: dict[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The state under the names of the module: what wrappers put before every name is taken off, or put on."""
    notes: list[str] = []
    while not _matching(state, target):
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        notes.append(f"the prefix {prefix!r} taken off its names")
    if not _matching(state, target):
        for prefix in _PREFIXES:
            # A trainer's checkpoint holds the network beside its losses; a module may be wrapped where its file is not.
            inside = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
            outside = {prefix + name: tensor for name, tensor in state.items()}
            if _matching(inside, target) == len(target):
                left = len(state) - len(inside)
                return inside, (*notes, f"what lies under {prefix!r}; {left} other tensors are none of the network's")
            if _matching(outside, target) == len(target):
                return outside, (*notes, f"the prefix {prefix!r} put before its names")
    return state, tuple(notes)


def _matching(state: Mapping[str, object], target: Mapping[str, object]) -> int:
    return len(state.keys() & target.keys())


def _check(path: Path, state: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    # Counts how often a norm was trained; files from before it was counted lack it, and it changes nothing.
    missing = [name for name in target if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in target]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(target[name].shape)}"
        for name in state
        if name in target and not nn.parameter.is_lazy(target[name]) and state[name].shape != target[name].shape
    ]
    if not (missing or unexpected or wrong):
        return
    said = []
    if missing:
        said.append(f"{len(missing)} missing ({_some(missing)}; {nearest(missing[0], unexpected or list(state))})")
    if unexpected:
        said.append(f"{len(unexpected)} that the network has no place for ({_some(unexpected)})")
    if wrong:
        said.append(f"{len(wrong)} of another shape ({_some(wrong)})")
    raise ModelError(
        f"the weights in {path} are not this network's: of its {len(target)} tensors {' and '.join(said)}. "
        "Give the file that belongs to the code, or the code's right arguments (file.py:function?classes=10).",
        code="weights-misfit",
        path=str(path),
        missing=missing,
        unexpected=unexpected,
        reasons=wrong,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _weights_only(path: Path, state: Mapping[str, torch.Tensor]) -> str:
    named = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:3])
    return f"{path} holds weights only ({len(state)} tensors: {named}, …), and no architecture. {HOW_TO_GIVE_CODE}."


# -- pickles ---------------------------------------------------------------------------------------------


def foreign_globals(path: Path) -> list[str]:
    """Classes and functions that unpickling a file would call, beside those of tensors; nothing is unpickled here.

    Raises:
        ModelError: the file is damaged.
    """
    wanted = [name for found, _ in torch_pickles.names(path) for name in found]
    return [name for name in dict.fromkeys(wanted) if torch_pickles.table(name) is None]


def _would_run_code(path: Path, wanted: list[str]) -> str:
    return (
        f"{path} is a pickle that would run code of its author's: it asks for {_some(wanted)}. Expected weights alone: "
        "save them with torch.save(model.state_dict(), FILE), and give the code, file.py:function, and that file as "
        f"{option('weights')}. If you trust the file and have that code installed, give {option('trust=True')} to run "
        "it."
    )


def _unpickled(path: Path) -> Structure:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever the author's code raises
        raise ModelError(
            f"{path} can't be unpickled ({type(error).__name__}: {one_line(error)[:200]}); "
            "the code that it names has to be importable here.",
            code="unpickling-failed",
            path=str(path),
            reason=one_line(error)[:200],
        ) from error


def _pickled_module(file: ModelFile) -> OpenedModule:
    path = file.path
    found = _unpickled(path)
    if isinstance(found, Mapping):
        found = next((value for value in found.values() if isinstance(value, nn.Module)), found)
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"expected a torch.nn.Module in {path}, found {_contents(found)}.",
            code="not-a-model",
            path=str(path),
            found=_contents(found),
        )
    return OpenedModule(found, file.source("a pickled module, run because it was trusted"))


# -- collections of networks -----------------------------------------------------------------------------


def open_zoo(name: str, weights: Path | None = None) -> OpenedModule:
    """A network of torchvision or timm: `torchvision:resnet50?weights=none`, `timm:convnext_tiny`.

    Args:
        name: collection, function, and its arguments as a query; pretrained weights unless they say otherwise.
        weights: a file to take the weights from.

    Raises:
        BackendError: the collection is not installed; UsageError: it has no such network or argument; ModelError: the
        weights can't be downloaded.
    """
    collection, _, rest = name.partition(":")
    function, _, query = rest.partition("?")
    arguments = {key: literal(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    library = _library(collection)
    make = {"torchvision": _from_torchvision, "timm": _from_timm}[collection]
    with _seeded():
        opened = make(library, name, function, arguments, weights is not None)
    if weights is None:
        return opened
    notes = fill(opened.module, weights)
    source = Source(name, str(weights), sha256(weights), (f"weights of {weights.name}", *notes))
    return OpenedModule(opened.module, source, size=opened.size, preprocessing=opened.preprocessing)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise BackendError(
                f"{name} can't be imported ({one_line(error)}). Run: pip install {name}",
                code="backend-broken",
                name=name,
            ) from error
        raise BackendError(
            f"{name} is not installed. Run: pip install {name}", code="backend-missing", name=name
        ) from None
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
        raise BackendError(
            f"{name} is installed but can't be imported ({type(error).__name__}: {one_line(error)}); "
            f"it has to be built for this torch ({torch.__version__}).",
            code="backend-broken",
            name=name,
        ) from error


def _from_torchvision(
    library: ModuleType, name: str, function: str, arguments: dict[str, object], bare: bool
) -> OpenedModule:
    models = importlib.import_module("torchvision.models")
    if function not in models.list_models():
        raise UsageError(
            f"torchvision has no network {function!r}; {nearest(function, models.list_models())}",
            code="network-unknown",
            name=function,
        )
    asked = arguments.pop("weights", None if bare else "DEFAULT")
    chosen = None if asked is None else _torchvision_weights(models.get_model_weights(function), name, str(asked))
    module = _made(lambda: models.get_model(function, weights=chosen, **arguments), name)
    if chosen is None:
        return OpenedModule(module, Source(name, notes=(_DRAWN,)))
    transforms = chosen.transforms()  # those of detectors have neither
    crop = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    known = None
    if hasattr(transforms, "mean"):
        known = _preprocessing(transforms.mean, transforms.std, f"as torchvision's {chosen} were trained")
    categories = tuple(chosen.meta["categories"]) if "categories" in chosen.meta else None
    return OpenedModule(
        module,
        Source(name, notes=(f"weights={chosen}",)),
        preprocessing=known,
        size=(crop[0], crop[0]) if crop else None,
        class_names=None if arguments else categories,
    )


Weights = Any  # of torchvision: a member of a model's enumeration, with its transforms and its metadata


def _torchvision_weights(there: Mapping[str, Weights], name: str, asked: str) -> Weights:
    try:
        return there[asked]
    except KeyError:
        names = [str(key) for key in getattr(there, "__members__", there)]
        raise UsageError(
            f"{name}: no weights {asked!r}; {nearest(asked, names)}", code="weights-unknown", name=str(asked)
        ) from None


def _from_timm(library: ModuleType, name: str, function: str, arguments: dict[str, object], bare: bool) -> OpenedModule:
    base = function.partition(".")[0]
    if not library.is_model(base):
        raise UsageError(
            f"timm has no network {function!r}; {nearest(base, library.list_models())}",
            code="network-unknown",
            name=function,
        )
    arguments = {"pretrained": not bare, **arguments}
    module = _made(lambda: library.create_model(function, **arguments), name)
    config = dict(getattr(module, "pretrained_cfg", None) or {})
    known = None
    if "mean" in config and "std" in config:
        known = _preprocessing(config["mean"], config["std"], "as its timm configuration says")
    size = tuple(config["input_size"][1:]) if "input_size" in config else None
    note = f"pretrained ({config.get('tag') or 'default'})" if arguments["pretrained"] else _DRAWN
    return OpenedModule(module, Source(name, notes=(note,)), preprocessing=known, size=size)


_DRAWN = "random weights, drawn with seed 0"


def _made(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return make()
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{name} refuses these arguments: {one_line(error)}", code="function-arguments", name=name
        ) from error
    except Exception as error:  # each hub has its own errors for a network that is not there
        raise ModelError(
            f"the pretrained weights of {name} can't be had ({type(error).__name__}: {one_line(error)[:160]}). "
            f"Try again online, give a file as {option('weights')}, or take random weights: {name.partition('?')[0]}?"
            + ("weights=none" if name.startswith("torchvision") else "pretrained=false"),
            code="weights-not-fetched",
            name=name,
        ) from error


def _preprocessing(mean: Iterable[float], std: Iterable[float], reason: str) -> pp.Preprocessing:
    """Means and deviations on 0..1, as data configs give them."""
    means, deviations = (tuple(255 * float(value) for value in values) for values in (mean, std))
    for preset in pp.PRESETS.values():
        if (
            not preset.bgr
            and np.allclose(preset.mean, means, atol=0.1)
            and np.allclose(preset.std, deviations, atol=0.1)
        ):
            return preset.because(pp.FOUND, reason)
    return pp.Preprocessing("mean,std", means, deviations, certainty=pp.FOUND, reason=reason)


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw initial weights from seed 0, and leave torch's generator where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
