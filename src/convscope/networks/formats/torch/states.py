"""The state dicts in a checkpoint: where they lie, and which of them has the weights of a module.

Checkpoints keep weights under any keys, several networks side by side, and names behind any prefix that a wrapper has
put before them. Nothing here goes by the usual words for these: a state dict belongs to a module where every name and
every shape agrees.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from convscope.networks.foreign import Structure, Tensor
from convscope.networks.formats.torch.pickles import Declared

Shapes = Mapping[str, tuple[int, ...] | None]  # by the names of a module's tensors; None where any will do


@dataclass(frozen=True)
class State:
    """A state dict in a file.

    Attributes:
        place: the keys that lead to it, joined by "."; "" for the whole file.
        tensors: by name, as the file has them: `Declared` or `torch.Tensor`.
    """

    place: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """A state dict, or the part of it under a prefix, with the names of a module.

    Attributes:
        state: where it was found.
        taken_off, put_on: the prefix of its names in the file, and the one that the module's names have besides.
        tensors: by the names of the module.
    """

    state: State
    taken_off: str
    put_on: str
    tensors: Mapping[str, Tensor]

    @property
    def key(self) -> str:
        """What picks it: the keys and the prefix, joined by "."."""
        return ".".join(part for part in (self.state.place, self.taken_off.rstrip(".")) if part)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken off and put on."""
        left = len(self.state.tensors) - len(self.tensors)
        notes = []
        if self.taken_off and left:
            notes.append(f"what lies under {self.taken_off!r}; {left} other tensors are none of the network's")
        elif self.taken_off:
            notes.append(f"the prefix {self.taken_off!r} taken off its names")
        if self.put_on:
            notes.append(f"the prefix {self.put_on!r} put before its names")
        return tuple(notes)


# -- where they lie ----------------------------------------------------------------------------------------


def states_in(value: Structure, kind: type) -> list[State]:
    """The state dicts in a checkpoint, the outer ones first; those of optimizers are none.

    Args:
        value: of the checkpoint.
        kind: of its tensors, `Declared` or `torch.Tensor`.
    """
    return _states(value, kind, "", set())


def _states(value: Structure, kind: type, place: str, seen: set[int]) -> list[State]:
    if isinstance(value, nn.Module):  # in a file that was trusted
        value = value.state_dict()
    if not isinstance(value, Mapping | list | tuple) or id(value) in seen or _is_optimizer(value):
        return []
    seen.add(id(value))
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    below = [state for key, part in items for state in _states(part, kind, _joined(place, key), seen)]
    tensors = {key: part for key, part in items if isinstance(part, kind)} if isinstance(value, Mapping) else {}
    return [State(place, tensors), *below] if _are_weights(tensors, len(items), bool(below)) else below


def _is_optimizer(value: object) -> bool:
    """Averages of gradients have the shapes of weights, and would be taken for some."""
    return isinstance(value, Mapping) and "param_groups" in value


def _joined(place: str, key: object) -> str:
    part = str(key) if isinstance(key, str | int) else "?"
    return f"{place}.{part}" if place else part


def _are_weights(tensors: Mapping[str, Tensor], items: int, more_below: bool) -> bool:
    """Beside the state dicts in it, and among numbers, a checkpoint may keep tensors that are none of a network's."""
    if any(len(tensor.shape) > 1 for tensor in tensors.values()):
        return True
    return bool(tensors) and not more_below and 2 * len(tensors) >= items


def narrowed(states: Sequence[State], key: str) -> list[State]:
    """The state dicts at a key, else those below it, else the parts of state dicts under it as a prefix."""
    at = [state for state in states if state.place == key]
    below = [state for state in states if state.place.startswith(f"{key}.")]
    inside = [State(_joined(state.place, rest), part) for state in states for rest, part in _under(state, key)]
    return at or below or inside


def _under(state: State, key: str) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The part of a state dict under a prefix, which may stand behind the place of the state dict."""
    for rest in dict.fromkeys((key.removeprefix(f"{state.place}."), key)):
        start = f"{rest}."
        part = {
            name.removeprefix(start): tensor
            for name, tensor in state.tensors.items()
            if isinstance(name, str) and name.startswith(start)
        }
        if part:
            yield rest, part
            return


def keys(states: Sequence[State]) -> list[str]:
    """The keys that pick one: places, or the first parts of names where the whole file is one state dict."""
    if any(state.place for state in states):
        return [state.place for state in states]
    firsts = [name.partition(".")[0] for state in states for name in state.tensors if isinstance(name, str)]
    return list(dict.fromkeys(firsts))


# -- which one is a module's -------------------------------------------------------------------------------


def shapes_of(module: nn.Module) -> Shapes:
    """The names of a module's tensors and their shapes; None for those that are created when it is called."""
    tensors = module.state_dict(keep_vars=True)
    return {name: None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape) for name, tensor in tensors.items()}


def may_lack(name: str) -> bool:
    """True for the count of a norm's training steps: files from before it was counted lack it; it changes nothing."""
    return name.endswith("num_batches_tracked")


def fits(states: Sequence[State], target: Shapes) -> list[Fit]:
    """All that has the names and shapes of a module, each once.

    Where no state dict has them alone, several together may: those of parts that were saved beside each other.
    """
    found = [fit for state in states for fit in _fits(state, target)]
    found = found or [fit for state in _together(states) for fit in _fits(state, target)]
    different: list[Fit] = []
    for fit in found:
        if not any(_same(fit, other) for other in different):
            different.append(fit)
    return different


def _same(one: Fit, other: Fit) -> bool:
    pairs = ((one.tensors.get(name), tensor) for name, tensor in other.tensors.items())
    return one.tensors.keys() == other.tensors.keys() and all(_same_values(*pair) for pair in pairs)


def _same_values(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Declared) or isinstance(other, Declared):
        return isinstance(one, Declared) and isinstance(other, Declared) and _bare(one) == _bare(other)
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _bare(tensor: Declared) -> Declared:
    return replace(tensor, is_parameter=False)


def _fits(state: State, target: Shapes) -> Iterator[Fit]:
    names = sorted(name for name in state.tensors if isinstance(name, str))
    for put_on in _shared_prefixes(target):
        wanted = {name.removeprefix(put_on): shape for name, shape in target.items()}
        needed = {name for name in wanted if not may_lack(name)}
        spans = [(prefix, slice(*_span(names, prefix))) for prefix in _prefixes(names, needed)]
        found = [fit for prefix, span in spans for fit in _fit(state, names[span], prefix, put_on, wanted)]
        # A module of one part would else be filled from a part of another network.
        found = [fit for fit in found if not put_on or len(fit.tensors) == len(state.tensors)]
        if found:
            yield from found
            return


def _shared_prefixes(names: Iterable[str]) -> Iterator[str]:
    """ "", "module.", "module.net.", ...: what all names of a module begin with."""
    shared, names = "", list(names)
    while True:
        yield shared
        first = names[0][len(shared) :].partition(".") if names else ("", "", "")
        shared += first[0] + first[1]
        if not first[1] or not all(name.startswith(shared) for name in names):
            return


def _prefixes(names: Sequence[str], needed: set[str]) -> list[str]:
    """What stands before the longest needed name."""
    last = max(needed, key=len, default="")
    starts = (name[: -len(last)] for name in names if last and name.endswith(last))
    return [start for start in starts if not start or start.endswith(".")]


def _span(names: Sequence[str], prefix: str) -> tuple[int, int]:
    """Where the names under a prefix begin and end; they are sorted, and "/" follows "." in the order of characters."""
    return (bisect_left(names, prefix), bisect_left(names, prefix[:-1] + "/")) if prefix else (0, len(names))


def _fit(state: State, names: Sequence[str], prefix: str, put_on: str, wanted: Shapes) -> Iterator[Fit]:
    """The names under a prefix, if they are the wanted ones with their shapes."""
    if not len(wanted) / 2 <= len(names) <= len(wanted):  # a file may have very many prefixes
        return
    inside = {name[len(prefix) :]: state.tensors[name] for name in names}
    missing = [name for name in wanted.keys() - inside.keys() if not may_lack(name)]
    if not missing and all(name in wanted and wanted[name] in (None, _shape(x)) for name, x in inside.items()):
        yield Fit(state, prefix, put_on, {put_on + name: tensor for name, tensor in inside.items()})


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _together(states: Sequence[State]) -> Iterator[State]:
    """The state dicts below each key as one, their keys before their names."""
    places = [state.place.split(".") for state in states]
    above = Counter(".".join(parts[:count]) for parts in places for count in range(len(parts)))
    for place, count in above.items():
        if count > 1:
            start = f"{place}." if place else ""
            inside = [state for state in states if state.place.startswith(start) and state.place != place]
            yield State(
                place, {_joined(s.place[len(start) :], name): x for s in inside for name, x in s.tensors.items()}
            )


_MOST_PARTS = 100  # of a name: as deep as modules are nested


def nearest_fit(states: Sequence[State], target: Shapes) -> Fit:
    """The state dict, or part of one, that has the most names of a module: for the message that tells what misfits."""
    votes: Counter[tuple[int, str]] = Counter()
    for number, state in enumerate(states):
        for name in state.tensors:
            if isinstance(name, str) and name.count(".") < _MOST_PARTS:
                votes.update((number, name[:place]) for place in _starts(name) if name[place:] in target)
    largest = max(range(len(states)), key=lambda number: len(states[number].tensors))
    number, prefix = max(votes, key=lambda vote: votes[vote]) if votes else (largest, "")
    state = states[number]
    inside = {name[len(prefix) :]: x for name, x in state.tensors.items() if not prefix or str(name).startswith(prefix)}
    return Fit(state, prefix, "", inside)


def _starts(name: str) -> list[int]:
    return [0, *(place + 1 for place, mark in enumerate(name) if mark == ".")]
