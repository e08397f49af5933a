"""Folders that results were saved in, read with care: they may come from anybody.

Names in a folder's JSON are plain names of regular files inside of it. Sizes are held against the limits before
anything is read as a whole, and every value is held against a schema, so that whatever is wrong gives one clear error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from convscope import imaging, limits, schema
from convscope.arrays import NotAnArray, open_regular, read_npy
from convscope.errors import ConvscopeError, UsageError, nearest
from convscope.images.decode import InputImage, read_image
from convscope.reading import is_deeper
from convscope.schema import Misfit

ADVICE = "It is damaged, or was changed after it was saved: save the result again."
VALUES_PER_ENTRY = 20  # of JSON, for each entry that the limits allow: a curve has many numbers


# -- finding ---------------------------------------------------------------------------------------------


def found(folder: str | PathLike, kinds: Iterable[str]) -> list[Path]:
    """The JSON files of the results in a folder: `heatmaps.json`, `heatmaps-2.json`, ..., in this order.

    Raises:
        ConvscopeError: there is no such folder, or it can't be read.
    """
    order = {kind: place for place, kind in enumerate(kinds)}
    named = re.compile(rf"(?P<kind>{'|'.join(map(re.escape, order))})(?:-(?P<number>[1-9]\d{{0,5}}))?\.json")
    try:
        matches = [match for match in map(named.fullmatch, os.listdir(folder)) if match]
    except OSError as error:
        raise ConvscopeError(
            f"expected a folder with a saved result at {os.fspath(folder)!r}, but it can't be read ({error.strerror})."
        ) from None
    matches.sort(key=lambda match: (order[match["kind"]], int(match["number"] or 1)))
    return [Path(folder) / match[0] for match in matches]


def chosen(path: str | PathLike, kinds: Sequence[str], kind: str | None) -> Path:
    """The JSON file of the one result that is meant.

    Args:
        path: of a folder, or of the JSON file itself.
        kinds: of results that there are.
        kind: that is wanted, where a folder holds several.

    Raises:
        UsageError: there is no such kind, or several results could be meant. ConvscopeError: there is none.
    """
    if kind is not None and kind not in kinds:
        raise UsageError(f"no kind of result {kind!r}; {nearest(kind, kinds)}")
    real = Path(os.path.realpath(path))  # a link that the user names is the user's; those inside are not followed
    if not real.is_dir() and real.suffix.lower() == ".json":
        return real
    there = found(path, kinds)
    fitting = [file for file in there if kind is None or re.match(rf"{kind}(-|\.)", file.name)]
    if len(fitting) == 1:
        return real / fitting[0].name
    if fitting:
        raise UsageError(_several(fitting, kind))
    names = ", ".join(file.name for file in there) or "no result"
    wanted = " or ".join(f"{one}.json" for one in ([kind] if kind else kinds))
    raise ConvscopeError(f"expected a folder with {wanted}, found {names} in {os.fspath(path)!r}.")


def _several(fitting: Sequence[Path], kind: str | None) -> str:
    names = [file.name for file in fitting]
    how = f"give the path of one of them, such as load({str(fitting[-1])!r})"
    stems = {re.split(r"[-.]", name)[0] for name in names}
    if kind is None and len(stems) > 1:
        how = f'say which with kind="{sorted(stems)[0]}", or {how}'
    return f"{str(fitting[0].parent)!r} holds {len(names)} results ({', '.join(names)}): {how}."


# -- reading ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, its size and depth held against the limits.

    Raises:
        ConvscopeError: it can't be read, or is too large. Misfit: it is no JSON object.
    """
    allowed = limits.current()
    try:
        with open_regular(path) as file:
            data = file.read(allowed.text + 1)
    except OSError as error:
        raise ConvscopeError(f"{str(path)!r} can't be read ({error.strerror}).") from None
    except NotAnArray as kind:
        raise ConvscopeError(f"expected a regular file at {str(path)!r}, found {kind}.") from None
    _check_size("text", len(data), allowed.text, "bytes", path)
    _check_size("entries", data.count(b"{") + data.count(b"["), allowed.entries, "objects and lists", path)
    _check_size("entries", data.count(b","), VALUES_PER_ENTRY * allowed.entries, "values", path)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise Misfit("the top", f"at most {allowed.depth} levels", "more") from None
    except ValueError as error:
        raise Misfit("the top", "JSON", str(error)[:200]) from None
    if is_deeper(value, allowed.depth):
        raise Misfit("the top", f"at most {allowed.depth} levels", f"more ({limits.how_to_raise('depth')})")
    return schema.table(value, "the top")


def _check_size(name: str, size: int, most: int, what: str, path: Path) -> None:
    if size > most:
        raise ConvscopeError(
            f"{str(path)!r} holds more than {most} {what}, which is more than is read ({limits.how_to_raise(name)})."
        )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def is_plain(name: str, suffix: str) -> bool:
    """True for the name of a file as `imaging.safe_name` makes them: no folder, nothing hidden, no device."""
    return name.endswith(suffix) and imaging.is_safe_name(name)


@dataclass
class Shelf:
    """The files beside one JSON file.

    Attributes:
        root: their folder.
        left: bytes that may still be read.
    """

    root: Path
    left: int = field(default_factory=lambda: limits.current().weights)
    _photos: dict[str, np.ndarray] = field(default_factory=dict)

    def path(self, name: Any, where: str, suffix: str, inside: str = "") -> Path:
        """The file that an entry of the JSON names: plainly, or as `inside/NAME`.

        Raises:
            Misfit: it is not such a name.
        """
        wanted = f"{inside}/NAME{suffix}" if inside else f"NAME{suffix}"
        folder, _, file = schema.text(name, where).rpartition("/")
        if folder != inside or not is_plain(file, suffix):
            raise Misfit(where, f"the plain name of a file ({wanted})", schema.shown(name))
        if inside and not _is_folder(self.root / inside):
            raise Misfit(where, f"a folder {inside} beside the JSON file", "none, or a link")
        return self.root / name

    def array(self, name: Any, where: str, inside: str = "", *, mapped: bool = False) -> np.ndarray:
        """The float32 array in a `.npy` file.

        Raises:
            Misfit: there is none. ConvscopeError: it is larger than the limits allow.
        """
        path = self.path(name, where, ".npy", inside)
        try:
            values = read_npy(path, mapped=mapped, room=self.left)
        except OSError as error:
            raise Misfit(where, f"an array in {name}", error.strerror or str(error)) from None
        except (NotAnArray, ValueError) as reason:
            raise Misfit(where, f"an array in {name}", str(reason)) from None
        if values.dtype != np.float32:
            raise Misfit(where, f"float32 in {name}", str(values.dtype))
        self.left -= 0 if mapped else values.nbytes
        return values

    def photos(self, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> tuple[InputImage, ...]:
        """The photos that a result was made from, each file read once.

        Raises:
            Misfit: one is missing, or another than the result was made from. ImageError: one can't be decoded.
        """
        digests = {row.get("name"): row.get("pixels_sha256") for row in provenance.get("pictures", [])}
        found = []
        for index, row in enumerate(rows):
            where = f"photos[{index}].file"
            pixels = self._pixels(row["file"], where)
            digest = digests.get(row["name"])
            if digest and digest != hashlib.sha256(pixels.tobytes()).hexdigest():
                raise Misfit(where, f"in {row['file']} the image that the result was made from", "another one")
            found.append(InputImage(row["name"], pixels, row["source"], row["notes"], row["sha256"]))
        return tuple(found)

    def _pixels(self, name: Any, where: str) -> np.ndarray:
        path = self.path(name, where, ".png", "photos")
        if name not in self._photos:
            try:
                open_regular(path).close()
            except (OSError, NotAnArray) as reason:
                found = reason.strerror if isinstance(reason, OSError) else str(reason)
                raise Misfit(where, f"an image in {name}", found or "") from None
            self._photos[name] = read_image(path).pixels
            self.left -= self._photos[name].nbytes
            if self.left < 0:
                raise ConvscopeError(
                    f"the images in {str(self.root)!r} take too much ({limits.how_to_raise('weights')})"
                )
        return self._photos[name]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def check(holds: bool, where: str, expected: str, found: Any) -> None:
    """Two entries have to fit each other.

    Raises:
        Misfit: they do not.
    """
    if not holds:
        raise Misfit(where, expected, str(found))


def checked(path: Path, make: Callable[[Path], Any]) -> Any:
    """What `make` makes of the JSON file at `path`, whatever is wrong with it being one clear error.

    Raises:
        ConvscopeError: expected, found, and what to do.
    """
    try:
        return make(path)
    except Misfit as misfit:
        raise ConvscopeError(f"{str(path)!r}: {misfit}. {ADVICE}") from None
    except MemoryError:
        raise ConvscopeError(f"the memory does not suffice for the result at {str(path)!r}.") from None


# What all results share.

_ANY_TEXT = schema.optional(lambda value, where: value if isinstance(value, str) else schema.text(value, where))
PHOTO = schema.entries({
    "name": schema.text,
    "source": _ANY_TEXT,  # a file's name may hold bytes that are no text
    "notes": schema.sequence(schema.text),
    "sha256": schema.optional(schema.text),
    "file": schema.text,
})  # fmt: skip


def _kept(reader: schema.Reader) -> schema.Reader:
    """Held against `reader`, and left as it is."""

    def read(value: Any, where: str) -> Any:
        reader(value, where)
        return value

    return read


_SIDE = schema.whole(1, 65536)
_NETWORK = schema.entries(
    {"name": schema.text, "input": schema.entries({"height": _SIDE, "width": _SIDE})},
)
_PICTURE = schema.entries({"name": schema.text}, {"pixels_sha256": schema.optional(schema.text)})
PROVENANCE = _kept(
    schema.entries({"network": _NETWORK, "parameters": schema.table}, {"pictures": schema.sequence(_PICTURE)})
)
