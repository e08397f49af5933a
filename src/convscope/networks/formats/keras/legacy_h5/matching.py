"""Which dataset of a group belongs to which variable: by layer path, name and shape, and only if that is certain."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from convscope.networks.foreign import KerasLayer, KerasVariable
from convscope.networks.formats.keras.legacy_h5.nodes import Scope
from convscope.networks.formats.keras.legacy_h5.stored import Weight

# (class, name in the file): name today.
RENAMED_WEIGHTS = {
    ("DepthwiseConv1D", "depthwise_kernel"): "kernel",
    ("DepthwiseConv2D", "depthwise_kernel"): "kernel",
    ("Embedding", "kernel"): "embeddings",
}


@dataclass(frozen=True)
class Slot:
    """A variable of the model and the way to it: the layers around it, outermost first."""

    scope: Scope
    owner: KerasLayer
    variable: KerasVariable

    @property
    def path(self) -> str:
        """For messages."""
        return "/".join((*self.scope, self.variable.name))


@dataclass(frozen=True)
class Matched:
    """The match of datasets in one group, those left over on either side, and the notes."""

    pairs: list[tuple[Weight, Slot]]
    weights: list[Weight]
    slots: list[Slot]
    said: str = ""


Same = Callable[[str, str], bool]
Alike = Callable[[Scope, Scope], bool]


def _equal(written: str, name: str) -> bool:
    return written == name


def _numbered(written: str, name: str) -> bool:
    """TensorFlow numbers a scope that is taken: conv2d_1 is written conv2d_1_1."""
    return written == name or re.fullmatch(re.escape(name) + r"_\d+", written) is not None


def _stems(written: str, name: str) -> bool:
    """Cells and the like are not in the config and are numbered anew: lstm_cell_3 is lstm_cell_1."""
    return re.sub(r"(_\d+)+$", "", written) == re.sub(r"(_\d+)+$", "", name)


def _along(same: Same) -> Alike:
    """Scopes alike if one is the other with some layers left out: wrappers, cells, the model around."""

    def within(short: Scope, long: Scope, compare: Same) -> bool:
        rest = iter(long)
        return all(any(compare(name, other) for other in rest) for name in short)

    def alike(written: Scope, scope: Scope) -> bool:
        return within(written, scope, same) or within(scope, written, lambda name, other: same(other, name))

    return alike


def _joined(written: Scope, scope: Scope) -> bool:
    """Alike if the file wrote layers with "/" in their names: conv1/bn is the layer conv1_bn."""
    return any(_numbered("_".join(written), "_".join(scope[start:])) for start in range(len(scope)))


def _innermost(written: Scope, scope: Scope) -> bool:
    return written[-1:] == scope[-1:] and _along(_equal)(written, scope)


# From strict to loose. A way counts only if under it there is exactly one way to put everything in its place.
WAYS: tuple[Alike, ...] = (
    _innermost,
    _along(_equal),
    _joined,
    _along(_numbered),
    _along(_stems),
    lambda written, scope: len(scope) == 1,  # a layer without layers inside: the names of its weights suffice
)


def match(weights: list[Weight], slots: list[Slot]) -> Matched:
    """Match a group of weights with the variables of its layer by name."""
    best = Matched([], weights, slots)
    for alike in WAYS:
        matched = _matched(weights, slots, _forced(weights, slots, alike))
        if not matched.weights and not matched.slots:
            return matched
        best = max(best, matched, key=lambda item: len(item.pairs))
    return _in_order(weights, slots) or best


def _matched(weights: list[Weight], slots: list[Slot], places: dict[int, int]) -> Matched:
    return Matched(
        [(weights[index], slots[place]) for index, place in places.items()],
        [weight for index, weight in enumerate(weights) if index not in places],
        [slot for place, slot in enumerate(slots) if place not in places.values()],
    )


def _forced(weights: list[Weight], slots: list[Slot], alike: Alike) -> dict[int, int]:
    """Places that follow: again and again, a dataset with one place left or a place with one dataset left.

    This finds the one-to-one match if there is exactly one, and leaves out what names do not decide.
    """
    options = {
        index: {place for place, slot in enumerate(slots) if _fits(weight, slot, alike)}
        for index, weight in enumerate(weights)
    }
    forced: dict[int, int] = {}
    while True:
        wanted: dict[int, list[int]] = {}
        for index, places in options.items():
            for place in places:
                wanted.setdefault(place, []).append(index)
        found = {indices[0]: place for place, indices in wanted.items() if len(indices) == 1}
        found |= {index: next(iter(places)) for index, places in options.items() if len(places) == 1}
        takers = Counter(found.values())
        found = {index: place for index, place in found.items() if takers[place] == 1}
        if not found:
            return forced
        forced |= found
        gone = set(found.values())
        options = {index: places - gone for index, places in options.items() if index not in found}


def _fits(weight: Weight, slot: Slot, alike: Alike) -> bool:
    name = RENAMED_WEIGHTS.get((type(slot.owner).__name__, weight.name), weight.name)
    return name == slot.variable.name and alike(weight.scope, slot.scope)


def _in_order(weights: list[Weight], slots: list[Slot]) -> Matched | None:
    """Where names differ in nothing but numbers the file's order decides, as for the Keras that wrote it.

    Only within one nested model, and only if names without numbers and shapes agree from first to last and
    no name suggests another place.
    """
    pairs = list(zip(weights, slots, strict=False))
    agree = [
        _fits(weight, slot, _along(_stems)) and weight.shape == tuple(slot.variable.shape) for weight, slot in pairs
    ]
    against = [
        not _fits(weight, slot, _innermost) and any(_fits(weight, other, _innermost) for other in slots)
        for weight, slot in pairs
    ]
    if len(weights) != len(slots) or not all(agree) or any(against):
        return None
    said = "its names differ from the model's in numbers alone, so the order in the file decided"
    return Matched(pairs, [], [], said)
