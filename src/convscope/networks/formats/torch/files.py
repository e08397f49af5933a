"""PyTorch's files: weights into the right places, and no code in a file is run without a request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from convscope import limits
from convscope.errors import BackendError, ModelError, UsageError, nearest, one_line, option, printable
from convscope.networks.foreign import Structure, Tensor
from convscope.networks.formats import pickles
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.files import KINDS, ModelFile, WeightsFile, kind_of_file
from convscope.networks.formats.torch import pickles as torch_pickles
from convscope.networks.formats.torch.states import (
    Fit,
    Shapes,
    State,
    fits,
    keys,
    may_lack,
    narrowed,
    nearest_fit,
    shapes_of,
    states_in,
)
from convscope.networks.torch.modules import OpenedModule
from convscope.schema import Json

HOW_TO_GIVE_CODE = f"Give the code that makes the network, file.py:function, and this file as {option('weights')}"


def read(file: ModelFile, trust: bool = False) -> OpenedModule:
    """A checkpoint or `.safetensors` file that is opened by itself: a pickled module, if trusted.

    Raises:
        ModelError: the file holds weights only, is damaged, or would have to run code.
    """
    if file.kind != "safetensors" and trust and foreign_globals(file.path):
        found = _unpickled(file.path)
        module = next((part for part in (found, *_values(found)) if isinstance(part, nn.Module)), None)
        if module is not None:
            return OpenedModule(module, file.source("a pickled module, run because it was trusted"))
    with _states_of(file, trust) as held:
        if held.hides_weights:
            raise _needs_trust(file.path, held.foreign)
        raise _weights_only(file.path, held.states)


def _values(found: object) -> list[object]:
    return list(found.values()) if isinstance(found, Mapping) else []


# -- weights ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointContent:
    """What a file of weights holds.

    Attributes:
        states: its state dicts, at least one.
        make: a tensor of one of them.
        foreign: the classes and functions that a pickle names beside tensors; they are not called.
        hides_weights: some of these make tensors, or more values lie within their objects than outside of them.
    """

    states: Sequence[State]
    make: Callable[[Tensor], torch.Tensor]
    foreign: Sequence[str] = ()
    hides_weights: bool = False


@contextmanager
def _states_of(file: ModelFile, trust: bool = False) -> Iterator[CheckpointContent]:
    """The state dicts of a `.safetensors` file or a PyTorch checkpoint, for the length of the block.

    Raises:
        ModelError: the file holds none, is damaged, or only its author's code could make them.
    """
    path = file.path
    if file.kind == "safetensors":
        yield CheckpointContent([State("", _safetensors(path))], lambda tensor: tensor)
        return
    if file.kind != "torch":
        raise ModelError(
            f"expected a state dict of tensors by name in {path}, found {KINDS[file.kind]}. Open it by itself.",
            code="file-of-another-kind",
            path=str(path),
            found=file.kind,
        )
    with _checkpoint(path) as checkpoint:
        states, foreign = states_in(checkpoint.value, torch_pickles.Declared), foreign_globals(path)
        hides = bool(foreign) and _hides_weights(checkpoint, foreign)
        if states and not (hides and trust):
            stored: dict[object, bytearray] = {}
            yield CheckpointContent(states, lambda declared: checkpoint.tensor(declared, stored), foreign, hides)
            return
        found = checkpoint.value
    if foreign and trust:
        found = _unpickled(path)
        states = states_in(found, torch.Tensor)
        if states:
            yield CheckpointContent(states, lambda tensor: tensor)
            return
    elif foreign:
        raise _needs_trust(path, foreign)
    raise _no_weights(path, found)


@contextmanager
def _checkpoint(path: Path) -> Iterator[torch_pickles.Checkpoint]:
    try:
        with torch_pickles.opened(path, known=torch_pickles.lenient) as checkpoint:
            yield checkpoint
    except pickles.ForeignName as error:  # before the tensors, where a checkpoint has a number
        raise _needs_trust(path, foreign_globals(path) or [error.name]) from error


def _hides_weights(checkpoint: torch_pickles.Checkpoint, foreign: Sequence[str]) -> bool:
    if any(name.startswith("torch._utils.") for name in foreign):  # sparse tensors and the like
        return True
    shown = {tensor.storage for tensor in pickles.parts_of(checkpoint.value, torch_pickles.Declared)}
    hidden = checkpoint.storages - shown
    return sum(storage.nbytes for storage in hidden) > sum(storage.nbytes for storage in shown)


def _no_weights(path: Path, found: object) -> ModelError:
    what = "an empty one" if isinstance(found, Mapping) and not found else _contents(found)
    return ModelError(
        f"expected a state dict of tensors by name in {path}, found {what}.",
        code="no-weights",
        path=str(path),
        found=what,
    )


def load_state_dict(
    file: ModelFile, trust: bool = False, key: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The weights of a `.safetensors` file or a PyTorch checkpoint by name, and where they lay.

    Args:
        file: one of these.
        trust: let a checkpoint that holds no state dict run its author's code.
        key: which of several state dicts.

    Raises:
        ModelError: the file holds no weights, is damaged, would have to run code, or holds several and no key was
            given; UsageError: it has nothing of that key.
    """
    with _states_of(file, trust) as held:
        states = _asked(file.path, held.states, key)
        different = {id(state.tensors): state for state in reversed(states)}  # one may have several places
        if len(different) > 1:
            raise _ambiguous(file.path, [state.place for state in states])
        (state,) = different.values()
        _check_plain(file.path, state)
        note = (f"taken from {state.place!r}",) if state.place else ()
        return {name: held.make(tensor) for name, tensor in state.tensors.items()}, note


def _asked(path: Path, states: Sequence[State], key: str | None) -> Sequence[State]:
    """The state dicts that a user's key names."""
    if key is None:
        return states
    found = narrowed(states, key)
    if not found:
        known = keys(states)
        raise UsageError(
            f"{path} has no state dict with the key {_shown(key)}; {nearest(key, known)} "
            f"Its keys are {_listed(known)}: give {path.name}::KEY as {option('weights')}.",
            code="weights-key-unknown",
            path=str(path),
            name=key,
            names=known,
        )
    return found


def _ambiguous(path: Path, found: Sequence[str]) -> ModelError:
    return ModelError(
        f"{path} holds several state dicts that fit: {_listed(found)}. Choose one by its key: give {path.name}::KEY as "
        f"{option('weights')}, such as {path.name}::{_shown(max(found))}.",
        code="weights-ambiguous",
        path=str(path),
        names=list(found),
    )


def _listed(found: Sequence[str]) -> str:
    most = 12
    return ", ".join(map(_shown, found[:most])) + (f", … ({len(found)} in all)" if len(found) > most else "")


def _shown(key: str) -> str:
    """A key from a file as a message may show it."""
    return printable(key)[:80] or "'' (the file itself)"


def _check_plain(path: Path, state: State) -> None:
    try:
        _check_names(state.tensors)
    except ValueError as error:
        raise ModelError(
            f"expected a state dict of tensors by name in {path}, but {error}.",
            code="file-invalid",
            path=str(path),
            reason=str(error),
        ) from error


def _contents(found: object) -> str:
    if isinstance(found, Mapping):
        return f"{', '.join(ascii(key)[:60] for key in list(found)[:4])}, …"
    if isinstance(found, pickles.Stub):
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
        raise _no_weights(path, {})
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


def fill(module: nn.Module, weights: WeightsFile | Path, trust: bool = False) -> tuple[str, ...]:
    """Load the weights in a file into a module: each by its name and shape, none left over, none missing.

    Args:
        module: it is as it was where the weights don't fit.
        weights: a checkpoint or a `.safetensors` file; with a key, that state dict of it or that part of one, else the
            one that fits.
        trust: let a checkpoint that holds no state dict run its author's code.

    Returns:
        what had to be unwrapped or taken off for that.

    Raises:
        ModelError: names or shapes don't match, with the nearest names, or several state dicts do; UsageError: the
            file has nothing of that key.
    """
    path, key = (weights.path, weights.key) if isinstance(weights, WeightsFile) else (weights, None)
    target = shapes_of(module)
    with _states_of(ModelFile(path, kind_of_file(path)), trust) as held:
        asked = _asked(path, held.states, key)
        fit = _fitting(path, held, asked, target)
        state = {name: held.make(tensor) for name, tensor in fit.tensors.items()}
    try:
        module.load_state_dict(state, strict=False, assign=False)
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {path} can't be loaded: {one_line(error)[:200]}.",
            code="weights-misfit",
            path=str(path),
            reason=one_line(error)[:200],
        ) from error
    lazy = ("its lazily created layers took their shapes from the file",) if None in target.values() else ()
    return (*_taken_from(fit.state, held.states), *fit.notes, *lazy)


def _fitting(path: Path, held: CheckpointContent, asked: Sequence[State], target: Shapes) -> Fit:
    """The one state dict that has the names and shapes of a module."""
    found = fits(asked, target)
    if len(found) == 1:
        _check_plain(path, found[0].state)
        return found[0]
    if found:
        raise _ambiguous(path, [fit.key for fit in found])
    if held.hides_weights:
        raise _needs_trust(path, held.foreign)
    best = nearest_fit(asked, target)
    _check_plain(path, best.state)
    raise _misfit(path, best, target, [state.place for state in asked if state.place])


def _taken_from(state: State, states: Sequence[State]) -> tuple[str, ...]:
    if not state.place:
        return ()
    beside = [other.place for other in states if other.place and other.place != state.place]
    return (f"taken from {_shown(state.place)!r}" + (f" (beside it: {_listed(beside)})" if beside else ""),)


def _misfit(path: Path, fit: Fit, target: Shapes, places: Sequence[str]) -> ModelError:
    """The error of weights that are another network's."""
    state = fit.tensors
    missing = [name for name in target if name not in state and not may_lack(name)]
    unexpected = [name for name in state if name not in target]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {target[name]}"
        for name in state
        if name in target and target[name] not in (None, tuple(state[name].shape))
    ]
    said = []
    if missing:
        said.append(f"{len(missing)} missing ({_some(missing)}; {nearest(missing[0], unexpected or list(state))})")
    if unexpected:
        said.append(f"{len(unexpected)} not in the network ({_some(unexpected)})")
    if wrong:
        said.append(f"{len(wrong)} of another shape ({_some(wrong)})")
    where = f" under {_shown(fit.key)!r}, the nearest of {_listed(places)}," if len(places) > 1 and fit.key else ""
    return ModelError(
        f"the weights in {path}{where} do not fit the network: expected {len(target)} tensors; {', '.join(said)}. "
        "Give the file that belongs to the code, or other arguments (file.py:function?classes=10).",
        code="weights-misfit",
        path=str(path),
        missing=missing,
        unexpected=unexpected,
        reasons=wrong,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _weights_only(path: Path, states: Sequence[State]) -> ModelError:
    for state in states:
        _check_plain(path, state)
    tensors = states[0].tensors
    named = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
    places = [state.place for state in states]
    held = f"{len(tensors)} tensors: {named}, …"
    held += f"; in all the state dicts {_listed(places)}" if len(states) > 1 else ""
    several = f", or one of its state dicts as {path.name}::KEY" if len(states) > 1 else ""
    return ModelError(
        f"{path} holds weights only ({held}), and no architecture. {HOW_TO_GIVE_CODE}{several}.",
        code="weights-alone",
        path=str(path),
        names=places,
    )


# -- pickles ---------------------------------------------------------------------------------------------


def foreign_globals(path: Path) -> list[str]:
    """Classes and functions that unpickling a file would call, beside those of tensors; nothing is unpickled here.

    Raises:
        ModelError: the file is damaged.
    """
    wanted = [name for found, _ in torch_pickles.names(path) for name in found]
    return [name for name in dict.fromkeys(wanted) if torch_pickles.table(name) is None]


def _needs_trust(path: Path, wanted: Sequence[str]) -> ModelError:
    return ModelError(
        f"{path} is a pickle that would run code of its author's: it asks for {_some(wanted)}. Expected weights alone: "
        "save them with torch.save(model.state_dict(), FILE), and give the code, file.py:function, and that file as "
        f"{option('weights')}. If you trust the file and have that code installed, give {option('trust=True')} to run "
        "it.",
        code="needs-trust",
        path=str(path),
        names=list(wanted),
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
