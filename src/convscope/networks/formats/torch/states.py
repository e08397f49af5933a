"""The state dicts in a checkpoint: where they lie, and which of them has the weights of a module.

Checkpoints keep weights under any keys, several networks side by side, and names behind any prefix that a wrapper has
put before them. Nothing here goes by the usual words for these: a state dict belongs to a module where every name and
every shape agrees.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import accumulate, pairwise, takewhile

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
            prefix = self.taken_off
            notes.append(
                f"only the tensors under {prefix!r} are used; {left} other tensors of the file are not in the network"
            )
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
    return _states(value, kind, "", _Visited())


_LONGEST_PLACE = 500  # characters of the keys that lead to a state dict: each one below repeats them
_MOST_SHARED = 1000  # state dicts that get another place: objects within objects could double them at each level


@dataclass
class _Visited:
    """What was found below objects that were met before, and how many state dicts may still get another place.

    Attributes:
        found: by the id of an object its first place and the state dicts there; none of an object that holds itself.
    """

    found: dict[int, tuple[str, list[State]]] = field(default_factory=dict)
    left: int = _MOST_SHARED

    def at(self, identity: int, place: str) -> list[State]:
        """The state dicts of an object at one more place."""
        first, states = self.found[identity]
        if len(states) > self.left:
            return []
        self.left -= len(states)
        return [replace(state, place=f"{place}{state.place[len(first) :]}".removeprefix(".")) for state in states]


def _states(value: Structure, kind: type, place: str, visited: _Visited) -> list[State]:
    identity = id(value)
    if identity in visited.found:
        return visited.at(identity, place)
    if isinstance(value, nn.Module):  # in a file that was trusted
        value = value.state_dict()
    if not isinstance(value, Mapping | list | tuple) or _is_optimizer(value) or len(place) > _LONGEST_PLACE:
        return []
    visited.found[identity] = (place, [])
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    found = [state for key, part in items for state in _states(part, kind, _joined(place, key), visited)]
    tensors = {key: part for key, part in items if isinstance(part, kind)} if isinstance(value, Mapping) else {}
    if _are_weights(tensors, len(items), bool(found)):
        found = [State(place, tensors), *found]
    visited.found[identity] = (place, found)
    return found


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
    goals = [_Goal.of(put_on, target) for put_on in _shared_prefixes(target)]
    found = [fit for state in states for fit in _fits(state, goals)]
    found = found or [fit for state in _together(states, len(target)) for fit in _fits(state, goals)]
    different: dict[object, Fit] = {}
    for fit in found:
        different.setdefault(_values(fit) if len(found) > 1 else None, fit)
    return list(different.values())


def _values(fit: Fit) -> frozenset[tuple[str, object]]:
    return frozenset((name, _value(tensor)) for name, tensor in fit.tensors.items())


def _value(tensor: Tensor) -> object:
    """The same for tensors of the same values, to be compared with few of very many."""
    if isinstance(tensor, Declared):
        return replace(tensor, is_parameter=False)
    if tensor.is_sparse or tensor.is_quantized:
        return id(tensor)
    plain = tensor.detach().cpu().contiguous()
    return plain.dtype, plain.shape, sha256(plain.reshape(-1).view(torch.uint8).numpy().data).digest()


@dataclass(frozen=True)
class _Goal:
    """The names and shapes of a module behind a prefix that all of them share.

    Attributes:
        put_on: that prefix.
        wanted: shapes by the names behind it.
        last: the longest name that a file can't lack; "" if there is none.
    """

    put_on: str
    wanted: Shapes
    last: str

    @classmethod
    def of(cls, put_on: str, target: Shapes) -> _Goal:
        """The goal of a target."""
        wanted = {name.removeprefix(put_on): shape for name, shape in target.items()}
        return cls(put_on, wanted, max((name for name in wanted if not may_lack(name)), key=len, default=""))

    def may_have(self, count: int) -> bool:
        """False for a count of tensors that is too far from that of the names: a file may have very many prefixes."""
        return len(self.wanted) / 2 <= count <= len(self.wanted)


def _fits(state: State, goals: Sequence[_Goal]) -> Iterator[Fit]:
    if len(state.tensors) < len(goals[0].wanted) / 2:  # a file may have very many small state dicts
        return
    names = sorted(name for name in state.tensors if isinstance(name, str))
    for goal in goals:
        spans = [(prefix, slice(*_span(names, prefix))) for prefix in _prefixes(names, goal.last)]
        found = [fit for prefix, span in spans for fit in _fit(state, names[span], prefix, goal)]
        # A module of one part would else be filled from a part of another network.
        found = [fit for fit in found if not goal.put_on or len(fit.tensors) == len(state.tensors)]
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


def _prefixes(names: Sequence[str], last: str) -> list[str]:
    """What stands before a name."""
    starts = (name[: -len(last)] for name in names if last and name.endswith(last))
    return [start for start in starts if not start or start.endswith(".")]


def _span(names: Sequence[str], prefix: str) -> tuple[int, int]:
    """Where the names under a prefix begin and end; they are sorted, and "/" follows "." in the order of characters."""
    return (bisect_left(names, prefix), bisect_left(names, prefix[:-1] + "/")) if prefix else (0, len(names))


def _fit(state: State, names: Sequence[str], prefix: str, goal: _Goal) -> Iterator[Fit]:
    """The names under a prefix, if they are the wanted ones with their shapes."""
    wanted = goal.wanted
    if not goal.may_have(len(names)):
        return
    inside = {name[len(prefix) :]: state.tensors[name] for name in names}
    missing = [name for name in wanted.keys() - inside.keys() if not may_lack(name)]
    if not missing and all(name in wanted and wanted[name] in (None, _shape(x)) for name, x in inside.items()):
        yield Fit(state, prefix, goal.put_on, {goal.put_on + name: tensor for name, tensor in inside.items()})


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _together(states: Sequence[State], most: int) -> Iterator[State]:
    """The state dicts below each key as one, their keys before their names.

    Of keys with the same state dicts below them only the innermost counts. What has more tensors than `most` is left
    out, since a part of it that belongs together lies below a key of its own; so is what has less than half of it.
    """
    ordered = sorted(states, key=_below)
    places = [_below(state) for state in ordered]
    counts = [0, *accumulate(len(state.tensors) for state in ordered)]
    own: Counter[str] = Counter()
    for state in states:
        own[_below(state)] += len(state.tensors)
    for start in dict.fromkeys(_shared(one, other) for one, other in pairwise(places)):
        first, end = _span(places, start)
        if most / 2 <= counts[end] - counts[first] - own[start or "."] <= most:
            inside = [state for state in ordered[first:end] if _below(state) != (start or ".")]
            yield State(start[:-1], _named_from(len(start), inside))


def _below(state: State) -> str:
    return f"{state.place}."


def _shared(one: str, other: str) -> str:
    """The first parts that two places have in common."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    return "".join(f"{part}." for part, _ in pairs)


def _named_from(start: int, states: Sequence[State]) -> dict[str, Tensor]:
    """The tensors of several state dicts, with the rests of their places before their names."""
    return {_joined(state.place[start:], name): x for state in states for name, x in state.tensors.items()}


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
