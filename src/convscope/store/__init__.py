"""Results on disk: `save` writes a result and its manifest, `load` reads one, `load_all` every one of a folder.

A manifest is the JSON file of a result (`heatmaps.json`): the version of its schema, its numbers, its provenance and
the names of its files. It is written last, and every file is written whole or not at all.

>>> import tempfile, numpy as np
>>> from convscope.results import Concept, Concepts
>>> from convscope.images.image import InputImage
>>> found = load_all(tempfile.mkdtemp())
>>> len(found)
0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import singledispatch
from os import PathLike
from pathlib import Path

from convscope.errors import UsageError
from convscope.results import Activations, Concepts, Filters, Heatmap, Result
from convscope.store import activations, concepts, filters, heatmaps, manifest
from convscope.store.folder import NEEDS, SCHEMA, Folder
from convscope.store.shelf import Shelf, check, read_json

__all__ = ["NEEDS", "SCHEMA", "Folder", "found", "load", "load_all", "save"]

_READERS: dict[str, Callable[[Mapping[str, object], Shelf], Result]] = {
    "activations": activations.read,
    "filters": filters.read,
    "heatmaps": heatmaps.read,
    "concepts": concepts.read,
}


@singledispatch
def save(result: Result, directory: str | PathLike | Folder, **options: object) -> list[str]:
    """Write a result: renderings, raw arrays, images, and the manifest that names them.

    Args:
        result: the result of a technique.
        directory: where to; a `Folder` keeps several results of one run apart.
        options: of the kind: `store.activations.write`, `store.filters.write`, `store.heatmaps.write`.

    Returns:
        the names of the files in the folder, the manifest last.

    Raises:
        ConvscopeError: a file can't be written.

    Example:
        >>> files = convscope.save(convscope.heatmap(network, PHOTOS[0]), "out")
        >>> files[-1]
        'heatmaps.json'
    """
    raise TypeError(f"nothing saves a {type(result).__name__}; register a function with store.save.register")


save.register(Activations, activations.write)
save.register(Filters, filters.write)
save.register(Heatmap, heatmaps.write)
save.register(Concepts, concepts.write)


def found(folder: str | PathLike) -> list[Path]:
    """The manifests of all results in a folder, each of which `load` takes: `heatmaps.json`, `heatmaps-2.json`, ...

    Raises:
        ConvscopeError: there is no such folder.

    Example:
        >>> convscope.save(convscope.heatmap(network, PHOTOS[0]), "manifests")[-1]
        'heatmaps.json'
        >>> [path.name for path in found("manifests")]
        ['heatmaps.json']
    """
    return manifest.found(folder, _READERS)


def load(path: str | PathLike, kind: str | None = None) -> Result:
    """Load the one result that is meant.

    The folder may come from anybody: only regular files inside of it are read, and their sizes are held against the
    limits (see `convscope.limits`).

    Args:
        path: a folder with one result, or the JSON file of a result, such as "out/heatmaps-2.json".
        kind: "activations", "filters", "heatmaps" or "concepts", where a folder holds several results.

    Raises:
        UsageError: the folder holds several results, or there is no such kind.
        ConvscopeError: there is no result, it is damaged, or it needs a newer version of convscope.

    Example:
        >>> made = convscope.heatmap(network, PHOTOS[0])
        >>> files = convscope.save(made, "one-result")
        >>> np.array_equal(convscope.load("one-result").maps, made.maps)
        True
    """
    return _read(manifest.chosen(path, tuple(_READERS), kind), kind)


def load_all(folder: str | PathLike, kind: str | None = None) -> tuple[Result, ...]:
    """Load every result in a folder, or every one of a kind, in the order of `found`; none where there is none.

    Raises:
        UsageError: there is no such kind. ConvscopeError: there is no such folder, or a result can't be loaded.

    Example:
        >>> folder = Folder("two-results")
        >>> for photo in PHOTOS[:2]:
        ...     files = convscope.save(convscope.heatmap(network, photo), folder)
        >>> [one.rows[0].image for one in convscope.load_all("two-results", kind="heatmaps")]
        ['cat', 'coffee']
    """
    manifest.check_kind(kind, tuple(_READERS))
    there = manifest.found(folder, _READERS if kind is None else (kind,))
    return tuple(_read(Path(file), kind) for file in there)


def _read(file: Path, kind: str | None) -> Result:
    return manifest.checked(file, lambda path: _loaded(path, kind))


def _loaded(file: Path, kind: str | None) -> Result:
    report = read_json(file)
    manifest.check_schema(report, file)
    kinds = [one for one in _READERS if one in report]
    check(len(kinds) == 1, "the top", f"one entry of {', '.join(_READERS)}", ", ".join(kinds) or "none of them")
    if kind not in (None, *kinds):
        raise UsageError(
            f"{str(file)!r} holds {kinds[0]}, not {kind}: leave kind out, or give another file.",
            code="result-of-another-kind",
            path=str(file),
            found=kinds[0],
            expected=kind,
        )
    return _READERS[kinds[0]](report, Shelf(file.parent))
