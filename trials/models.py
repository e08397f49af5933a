"""Common functions of the generators of model files: writing one, and the three levels of damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trials import mutations
from trials.outcomes import MODEL_CONSTANT, MODEL_TIMES, Case, Place, size_of

# Ways to damage, from a place and an unpacked archive to an archive and what was done.
Hostile = Mapping[str, Callable[[dict[str, bytes], Place], "dict[str, bytes] | bytes"]]


def case(place: Place, name: str, data: bytes, what: str, action: str | None = None, **arguments: object) -> Case:
    """The file written, to be opened as a model: in one of five tries on the command line."""
    path = place.folder / name
    path.write_bytes(data)
    return tried(place, path, what, action, **arguments)


def tried(place: Place, path: Path, what: str, action: str | None = None, **arguments: object) -> Case:
    """A file or folder that is there, to be opened as a model. A module that must not be imported lies beside it."""
    (place.folder / "planted_module.py").write_text(
        f"open({str(place.marker)!r}, 'w').close()\nthing = {{'a': None}}\n"
    )
    action = action or ("command" if place.rng.random() < 0.2 else "open")
    return Case(action, path, what, MODEL_CONSTANT + MODEL_TIMES * size_of(path), dict(arguments))


def archive(place: Place, base: Path, name: str, hostile: Hostile, align: int = 0) -> tuple[bytes, str]:
    """An archive damaged at one of the levels: bytes, members of the archive, or what its format means."""
    rng, contents = place.rng, mutations.members(base)
    chance = rng.random()
    if chance < 0.04:
        return base.read_bytes(), f"{base.name} whole"
    if chance < 0.2:
        return mutations.damaged(base.read_bytes(), rng), f"{base.name}, damaged bytes"
    if chance < 0.4:
        data, what = mutations.damaged_zip(contents, place, align)
        return data, f"{base.name}, {what}"
    if chance < 0.5:
        key = rng.choice(list(contents))
        contents[key] = mutations.damaged(contents[key], rng)
        return mutations.rezipped(contents, place, align), f"{base.name}, damaged bytes of {key}"
    what = rng.choice(list(hostile))
    made = hostile[what](contents, place)
    data = made if isinstance(made, bytes) else mutations.rezipped(made, place, align)
    return data, f"{base.name}, {what}"


def member(contents: Mapping[str, bytes], *ends: str) -> str:
    """The first member whose name has one of these ends."""
    return next(name for end in ends for name in contents if name.endswith(end))
