"""Lists of images: folders, folders of classes, tables, batches and lists of all these become entries with names."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from convscope import limits, reading
from convscope.errors import ConvscopeError, ImageError, Unreadable, UsageError, one_line
from convscope.images import memory
from convscope.images.image import InputImage
from convscope.images.kinds import address_of
from convscope.reading import as_text

if TYPE_CHECKING:
    from convscope.images.decode import Source

SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
ARRAYS = ".npy"  # listed where a folder holds no other images
SHOWN = 3  # folders that a message names
_MOST_FOLDERS = 10_000  # that are searched for a message
_MOST_NAMES = 2000  # of a folder, to which a message compares the name of a missing file


@dataclass(frozen=True, eq=False)
class Entry:
    """One image of an `ImageList`.

    Attributes:
        source: a path, or another argument of `read_image`.
        name: the image's id, different from all others of its list.
        label: its class; None where that is not known.

    Example:
        >>> Entry("cats/tom.jpg", "cats/tom", label="cats").label
        'cats'
    """

    source: Source
    name: str
    label: str | None = None

    @property
    def path(self) -> str | None:
        """Its path; None where it is no file."""
        return os.fsdecode(self.source) if isinstance(self.source, str | os.PathLike) else None


def listed(sources: Source | Iterable[Source]) -> Iterator[Source]:
    """The sources one by one: one alone stands for a list of it, and a batch `(n, h, w, c)` for n images.

    Raises:
        UsageError: it is a list of numbers, or a dictionary.
    """
    if isinstance(sources, str | os.PathLike | Image.Image) or memory.is_encoded(sources):
        yield sources
        return
    if isinstance(sources, Mapping):
        raise UsageError(
            "images have to be a list, a folder or an array, but this is a dictionary: give its values as a list",
            code="image-kind",
        )
    array = memory.array_of(sources)
    if array is not None:
        yield from memory.images_of(array, sources)  # type: ignore[misc]
    elif not isinstance(sources, Iterable):
        yield sources
    else:
        yield from _of_list(sources)  # type: ignore[arg-type]


def _of_list(sources: Iterable[Source]) -> Iterator[Source]:
    if isinstance(sources, Sequence) and len(sources) and _is_of_numbers(sources[0]):
        raise UsageError(
            "images have to be a list of paths or arrays, but this is a list of numbers: make an array of it",
            code="image-kind",
        )
    for source in sources:
        array = None if isinstance(source, str | os.PathLike | Image.Image) else memory.array_of(source)
        if array is None or array.ndim != 4:
            yield source
        else:
            yield from memory.images_of(array, source)  # type: ignore[misc]


def _is_of_numbers(item: object) -> bool:
    """True for a number, and for lists in which one comes first."""
    while isinstance(item, list | tuple) and item:
        item = item[0]
    return isinstance(item, int | float | complex)


def entries_of(source: Source) -> list[Entry]:
    """The entries of one source: of a folder or a table those in it.

    Raises:
        ImageError: a folder or a table can't be read, or holds no image.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        if os.path.isdir(path):  # a text that is no path has no folder
            return _of_folder(path)
        if path.suffix.lower() == ".csv" and address_of(os.fsdecode(source)) is None:
            return _of_table(path)
        return [Entry(os.fsdecode(source), as_text(path.stem))]
    if isinstance(source, InputImage):
        return [Entry(source, source.name, source.label)]
    return [Entry(source, memory.name_of(source))]


def all_entries(sources: Source | Iterable[Source]) -> Iterator[Entry | ConvscopeError]:
    """The entries of all sources, or why one of them has none."""
    for source in listed(sources):
        try:
            yield from entries_of(source)
        except ConvscopeError as error:
            yield error


def different(names: Sequence[str]) -> list[str]:
    """Names that differ without regard to case: a name that was there before gets a number.

    >>> different(["cat", "dog", "Cat", "cat-2"])
    ['cat', 'dog', 'Cat-3', 'cat-2']
    """
    taken, seen = {name.casefold() for name in names}, set[str]()
    last: dict[str, int] = {}  # the number that was given last, so that no number is tried twice
    found = []
    for name in names:
        folded, end = name.casefold(), ""
        while folded + end in (taken if end else seen):
            last[folded] = last.get(folded, 1) + 1
            end = f"-{last[folded]}"
        taken.add(folded + end)
        seen.add(folded + end)
        found.append(name + end)
    return found


def no_images() -> UsageError:
    """The message where no image is given at all."""
    return UsageError("at least one image is needed, but none was given: name a file or a folder", code="no-images")


# -- folders ---------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    """What is in a folder, in the order of the names without regard to case; hidden files are left out.

    Raises:
        ImageError: the folder can't be read.
    """
    try:
        inside = list(folder.iterdir())
    except OSError as error:
        raise ImageError(
            f"the folder {str(folder)!r} can't be read ({error.strerror}): check its permissions",
            code="folder-unreadable",
            path=str(folder),
        ) from error
    # macOS leaves ._cat.jpg beside cat.jpg
    return sorted(
        (path for path in inside if not path.name.startswith(".")), key=lambda path: (path.name.lower(), path.name)
    )


def is_image_file(path: Path) -> bool:
    """True for a file with the suffix of an image."""
    return path.suffix.lower() in SUFFIXES and os.path.isfile(path)


def _images_among(inside: Iterable[Path]) -> list[Path]:
    """The image files; where there are none, the arrays."""
    inside = list(inside)
    images = list(filter(is_image_file, inside))
    return images or [path for path in inside if path.suffix.lower() == ARRAYS and os.path.isfile(path)]


def some_images_in(folder: Path) -> list[str]:
    """Names in a folder that are those of images, sorted, for a message: of the first `_MOST_NAMES` that it lists.

    A table may name many files that are missing, and each of them gets a message.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as inside:
        some = [entry.name for entry in itertools.islice(inside, _MOST_NAMES)]
        return sorted(name for name in some if os.path.splitext(name)[1].lower() in SUFFIXES)
    return []


def _of_folder(folder: Path) -> list[Entry]:
    """The images in a folder, or else those in its subfolders, whose names are the labels."""
    inside = files_in(folder)
    files = _images_among(inside)
    if files:
        _say_deeper(folder, deeper(folder))
        return [Entry(str(path), as_text(path.stem)) for path in files]
    classes = {one: _class_files(one) for one in inside if os.path.isdir(one)}
    found = [
        Entry(str(path), f"{as_text(one.name)}/{as_text(path.stem)}", as_text(one.name))
        for one, files in classes.items()
        for path in files
    ]
    if not found:
        raise _without_images(folder)
    _say_deeper(folder, {path: count for path, count in deeper(folder).items() if not classes.get(path)})
    return found


def _class_files(folder: Path) -> list[Path]:
    try:
        return _images_among(files_in(folder))
    except ImageError:  # a folder that can't be read is no class
        return []


def deeper(folder: Path) -> dict[Path, int]:
    """How many images each folder below this one holds; links are not followed."""
    found: dict[Path, int] = {}
    for number, (place, folders, _) in enumerate(os.walk(folder)):
        if number == _MOST_FOLDERS:
            break
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        count = len(_class_files(Path(place))) if number else 0
        if count:
            found[Path(place)] = count
    return found


def _text_of(folder: Path, below: Mapping[Path, int]) -> str:
    """How many images lie deeper, and where."""
    total = sum(below.values())
    names = [f"{as_text(str(path.relative_to(folder)))!r} ({count:,})" for path, count in list(below.items())[:SHOWN]]
    more = f" and {len(below) - SHOWN} more folders" if len(below) > SHOWN else ""
    return f"{total:,} image{'' if total == 1 else 's'} in {', '.join(names)}{more}"


def _say_deeper(folder: Path, below: Mapping[Path, int]) -> None:
    """A warning where a folder is read and those inside it are not."""
    if below:
        text = f"of the folder {str(folder)!r}, {_text_of(folder, below)} are not read: name these folders, too"
        warnings.warn(str(ConvscopeError(text, code="images-deeper", path=str(folder))), stacklevel=2)


def _without_images(folder: Path) -> ImageError:
    below = deeper(folder)
    if below:
        parents: dict[Path, int] = {}
        for path, count in below.items():
            parents[path.parent] = parents.get(path.parent, 0) + count
        best = max(parents, key=lambda path: parents[path])
        reason = f"it holds none; {_text_of(folder, below)} lie deeper: name the folder {str(best)!r}, or one of these"
    else:
        reason = "it holds none, and neither do the folders inside it: name a folder that holds images"
    return ImageError(
        f"the folder {str(folder)!r} should hold images (.jpg, .png, .webp, ...), but {reason}",
        code="no-images",
        path=str(folder),
        deeper=sum(below.values()),
    )


# -- tables ----------------------------------------------------------------------------------------------------


def _of_table(path: Path) -> list[Entry]:
    try:
        cells = list(_cells(reading.text_of(reading.real(str(path)))))
    except (Unreadable, csv.Error) as error:
        large = isinstance(error, Unreadable) and error.code == "input-too-large"
        raise ImageError(
            f"the table {str(path)!r} can't be read ({one_line(error)}): check the path, and save it as CSV",
            code="input-too-large" if large else "table-unreadable",
            path=str(path),
        ) from error
    if not cells or not all(file for file, _ in cells):
        raise ImageError(
            f"the table {str(path)!r} should have a first line with one column path and at most one column label, and "
            "a path in each line after it: give it these",
            code="table-invalid",
            path=str(path),
        )
    return [Entry(_beside(path, file), as_text(os.path.splitext(file)[0]), label or None) for file, label in cells]


def _cells(text: str) -> Iterator[tuple[str, str]]:
    """Path and label of each line of a table that is not empty, "" where there is none; nothing without the columns.

    No row is made as wide as the first line: a short text of many lines and columns would fill the memory.

    Raises:
        Unreadable: it has more lines than the limit. csv.Error: it is no CSV.
    """
    rows, most = csv.reader(io.StringIO(text, newline="")), limits.current().entries
    names = next(rows, [])
    if names.count("path") != 1 or names.count("label") > 1:
        return
    places = [names.index(name) for name in ("path", "label") if name in names]
    for number, row in enumerate(filter(None, rows)):
        if number == most:
            raise reading.too_large(f"it has more than {most} lines", "entries")
        file, label, *_ = *(row[place] if place < len(row) else "" for place in places), ""
        yield file, label


def _beside(table: Path, file: str) -> str:
    """A path of a table, from the table's own folder; an address stays as it is, to be refused as one."""
    return file if address_of(file) is not None else str(table.parent / file)
