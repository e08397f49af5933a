"""The JSON files of results in a folder: listing them, choosing one, and checking that this version reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar

from convscope import schema
from convscope.errors import ConvscopeError, UsageError, nearest
from convscope.schema import Misfit
from convscope.store.folder import SCHEMA

ADVICE = "It is damaged, or was changed after it was saved: save the result again."
T = TypeVar("T")


def check_schema(manifest: Mapping[str, object], file: Path) -> None:
    """A manifest has to be of the schema that this version reads.

    Raises:
        ConvscopeError: it is newer (the message has the version of convscope that it needs), or from before the first
            release. Misfit: it is no number.
    """
    number = schema.whole(1)(manifest.get("schema", 1), "schema")
    if number == SCHEMA:
        return
    if number < SCHEMA:
        raise ConvscopeError(
            f"{str(file)!r}: expected a result of schema {SCHEMA}, found schema {number} of a development version: "
            "make the result again.",
            code="schema-older",
            path=str(file),
            found=number,
            expected=SCHEMA,
        )
    needs = manifest.get("needs")
    version = f"convscope {needs}" if isinstance(needs, str) and re.fullmatch(r"[0-9A-Za-z.+-]{1,40}", needs) else ""
    raise ConvscopeError(
        f"{str(file)!r}: expected a result of schema {SCHEMA}, found schema {number}: it needs "
        f"{version or 'a newer version of convscope'}{' or newer' if version else ''}.",
        code="schema-newer",
        path=str(file),
        found=number,
        expected=SCHEMA,
        needs=version,
    )


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
            f"expected a folder with a saved result at {os.fspath(folder)!r}, but it can't be read ({error.strerror}).",
            code="folder-unreadable",
            path=os.fspath(folder),
            reason=error.strerror,
        ) from None
    matches.sort(key=lambda match: (order[match["kind"]], int(match["number"] or 1)))
    return [Path(folder) / match[0] for match in matches]


def check_kind(kind: str | None, kinds: Sequence[str]) -> None:
    """A kind of results has to be one of those that there are.

    Raises:
        UsageError: it is not.
    """
    if kind is not None and kind not in kinds:
        raise UsageError(f"no kind of result {kind!r}; {nearest(kind, kinds)}", code="result-kind-unknown", name=kind)


def chosen(path: str | PathLike, kinds: Sequence[str], kind: str | None) -> Path:
    """The JSON file of the one result that is meant.

    Args:
        path: of a folder, or of the JSON file itself.
        kinds: of results that there are.
        kind: the kind to load, where a folder has several.

    Raises:
        UsageError: there is no such kind, or several results could be meant. ConvscopeError: there is none.
    """
    check_kind(kind, kinds)
    real = Path(os.path.realpath(path))  # a link that the user names is the user's; those inside are not followed
    if not os.path.isdir(real) and real.suffix.lower() == ".json":
        return real
    there = found(path, kinds)
    fitting = [file for file in there if kind is None or re.match(rf"{kind}(-|\.)", file.name)]
    if len(fitting) == 1:
        return real / fitting[0].name
    if fitting:
        raise UsageError(
            _several(fitting, kind), code="result-ambiguous", path=str(real), names=[file.name for file in fitting]
        )
    names = ", ".join(file.name for file in there) or "no result"
    wanted = " or ".join(f"{one}.json" for one in ([kind] if kind else kinds))
    raise ConvscopeError(
        f"expected a folder with {wanted}, found {names} in {os.fspath(path)!r}.",
        code="no-result",
        path=os.fspath(path),
        expected=[kind] if kind else list(kinds),
        found=[file.name for file in there],
    )


def _several(fitting: Sequence[Path], kind: str | None) -> str:
    names = [file.name for file in fitting]
    how = f"give the path of one of them, such as load({str(fitting[-1])!r})"
    stems = {re.split(r"[-.]", name)[0] for name in names}
    if kind is None and len(stems) > 1:
        how = f'say which with kind="{sorted(stems)[0]}", or {how}'
    return f"{str(fitting[0].parent)!r} holds {len(names)} results ({', '.join(names)}): {how}."


def checked(path: Path, make: Callable[[Path], T]) -> T:
    """The value that `make` makes of the JSON file at `path`; any fault of the file is one clear error.

    Raises:
        ConvscopeError: the file is not as expected.
    """
    try:
        return make(path)
    except Misfit as misfit:
        raise ConvscopeError(
            f"{str(path)!r}: {misfit}. {ADVICE}",
            code="result-invalid",
            path=str(path),
            where=misfit.where,
            expected=misfit.expected,
            found=misfit.found,
        ) from None
    except MemoryError:
        raise ConvscopeError(
            f"the memory does not suffice for the result at {str(path)!r}.", code="out-of-memory", path=str(path)
        ) from None
