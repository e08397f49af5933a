"""HDF5 files as plain values: read in the reader process, with limits, and never by libhdf5 in the user's process.

A file is untrusted: B-trees that lead back to themselves make libhdf5 loop in C, data sets can lie in other
files (external storage, virtual data sets, links), and a few bytes can declare terabytes. So `read` lets the reader
walk the file, and gets `Contents` back: groups with the attributes that Keras writes, and arrays.
`write` makes a clean file of them, for a loader that needs a file.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from convscope import isolation, limits
from convscope.errors import BackendError, ModelError
from convscope.isolation import Sent
from convscope.networks.formats.damage import check_unpacked
from convscope.schema import Json

_MIB = 2**20
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LAST_USER_BLOCK = 1 << 20  # HDF5 may begin after a block of the user's own, of 512, 1024, 2048, ... bytes


def is_hdf5(path: Path | str) -> bool:
    """True if the file at `path` is HDF5, whatever its name."""
    path = Path(path)
    if not os.path.isfile(path):
        return False
    with path.open("rb") as file:
        offset, size = 0, path.stat().st_size
        while offset < min(size, _LAST_USER_BLOCK + 1):
            file.seek(offset)
            if file.read(len(_SIGNATURE)) == _SIGNATURE:
                return True
            offset = offset * 2 or 512
    return False


Item = Any  # a group or a dataset of h5py


@dataclass(frozen=True)
class Dataset:
    """A data set of a file.

    Attributes:
        shape: as the file declares it.
        dtype: as NumPy calls it; in words where it is none of numbers.
        values: None where they were not requested, or where they are no numbers.
        bfloat16: the two bytes of each value are those of a bfloat16.
    """

    shape: tuple[int, ...]
    dtype: str
    values: np.ndarray | None
    bfloat16: bool = False

    @property
    def array(self) -> np.ndarray:
        """The values as numbers."""
        assert self.values is not None
        if not self.bfloat16:
            return self.values
        import ml_dtypes

        return self.values.view(ml_dtypes.bfloat16)

    @property
    def numbers(self) -> bool:
        """True for integers, floats and booleans."""
        return _is_numbers(self.dtype, self.bfloat16)


@dataclass(frozen=True)
class Contents:
    """The content of an HDF5 file: attributes by the path of their group ("" is the root), and data sets by path.

    Links to elsewhere are not in it, whatever they lead to. Paths are in the order of their names.
    """

    groups: Mapping[str, Mapping[str, Json]]
    datasets: Mapping[str, Dataset]

    def children(self, group: str) -> list[str]:
        """Names of the direct members of a group."""
        inside = group + "/" if group else ""
        paths = [path.removeprefix(inside) for path in (*self.groups, *self.datasets) if path.startswith(inside)]
        return sorted({path for path in paths if path and "/" not in path})

    @property
    def size(self) -> int:
        """How many numbers were read."""
        return sum(item.values.size for item in self.datasets.values() if item.values is not None)


def read(path: Path, but: str = "") -> Contents:
    """The content of the file at `path`.

    Args:
        path: the file.
        but: a regular expression for the paths of data sets whose values are not needed.

    Raises:
        ModelError: it is damaged, refers to other files, or is larger than the limits; BackendError: no h5py.
    """
    check_installed(path)
    size = path.stat().st_size
    found = in_reader(path, "convscope.networks.formats.hdf5:contents_of_file", path, but, memory=memory_for(size))
    return unpacked(found)


def check_installed(path: Path) -> None:
    """Say so where h5py is missing.

    Raises:
        BackendError: h5py is not installed.
    """
    if importlib.util.find_spec("h5py") is None:
        message = f"{path.name} is HDF5: expected h5py to read it, found it not installed. pip install h5py"
        raise BackendError(message, code="backend-missing", name="h5py")


def memory_for(size: int) -> int:
    """Bytes that reading a file of `size` bytes may take in the reader."""
    return 1024 * _MIB + 2 * limits.most_unpacked(size)


def in_reader(path: Path, function: str, *arguments: object, memory: int) -> Sent:
    """Call a function in the reader; a failure there is a fault of the file.

    Raises:
        ModelError: it took too long or too much memory, or the file made the library crash or fail.
    """
    try:
        return isolation.call(function, *arguments, memory=memory)
    except ModelError as error:
        found = {"path": str(path), **error.data}
        raise ModelError(f"{path.name}: {error.message}", code=error.code, **found) from error
    except isolation.ReaderError as error:
        raise ModelError(_broken(path, error), code=error.code, path=str(path), reason=str(error)) from error


def _broken(path: Path, error: isolation.ReaderError) -> str:
    found = {
        "time": f"one that can't be read: {error}",
        "memory": f"one that can't be read: {error}",
        "crash": "one so damaged that the library which reads it crashes",
    }.get(error.kind, f"it truncated or damaged ({' '.join(str(error).split())[:200]})")
    return f"{path.name}: expected a whole HDF5 file, found {found}. Fetch it anew."


def unpacked(found: dict[str, Json]) -> Contents:
    """`Contents` of the return value of `contents_of_file`."""
    datasets = {
        path: Dataset(tuple(item["shape"]), item["dtype"], item["values"], item["bfloat16"])
        for path, item in found["datasets"].items()
    }
    return Contents(found["groups"], datasets)


def _is_numbers(dtype: str, bfloat16: bool) -> bool:
    try:
        return bfloat16 or np.dtype(dtype).kind in "fiub"
    except TypeError:
        return False


def write(path: Path, contents: Contents) -> None:
    """Write a clean HDF5 file: contiguous data sets, and the attributes that `read` keeps."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, attributes in contents.groups.items():
            group = file.require_group(name) if name else file
            for key, value in attributes.items():
                group.attrs[key] = value
        for name, item in contents.datasets.items():
            if item.values is not None:
                made = file.create_dataset(name, data=item.values)
                if item.bfloat16:
                    made.attrs["dtype"] = "bfloat16"


# -- the reader's side -----------------------------------------------------------------------------------

# What Keras writes and convscope or Keras' loader reads.
_ATTRIBUTES = re.compile(r"(layer_names|weight_names)\d*|model_config|keras_version|backend|name")
# HDF5's own filters and h5py's: deflate, shuffle, fletcher32, szip, nbit, scaleoffset, lzf. Others are plugins.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}


def contents_of_file(path: str, but: str) -> dict[str, object]:
    """Plain values of what `read` makes `Contents` of. Runs in the reader."""
    return _contents(path, but, path, Path(path).stat().st_size)


def contents_of_bytes(data: bytes, but: str, path: str) -> dict[str, object]:
    """The same for a file that lies in the archive at `path`."""
    return _contents(io.BytesIO(data), but, path, len(data))


def _contents(source: object, but: str, path_of_file: str, size: int) -> dict[str, Json]:
    import h5py

    with h5py.File(source, "r") as file:
        groups: dict[str, Json] = {}
        found: dict[str, Json] = {}
        for path, item in _walk(file):
            (found if isinstance(item, h5py.Dataset) else groups)[path] = item
        wanted = {path for path in found if not (but and re.match(but, path))}
        about = {path: _about(path, item) for path, item in found.items()}
        check_unpacked(path_of_file, sum(_bytes(about[path]) for path in wanted), size)
        for path in wanted:
            if _is_numbers(about[path]["dtype"], about[path]["bfloat16"]):
                about[path]["values"] = _values(path, found[path])
        return {"groups": {path: _attributes(item) for path, item in groups.items()}, "datasets": about}


def _walk(file: object) -> Iterator[tuple[str, Item]]:
    """Groups and data sets by path, in the order of names. Links are not followed: they could lead to other files."""
    import h5py

    limit = limits.current()
    waiting, count = [("", file, 0)], 0
    while waiting:
        path, item, depth = waiting.pop()
        yield path, item
        if not isinstance(item, h5py.Group):
            continue
        if depth > limit.depth:
            raise ModelError(
                f"expected a model in HDF5, found groups too deep ({limits.how_to_raise('depth')}).",
                code="input-too-large",
                limit="depth",
            )
        names = [name for name in item if isinstance(item.get(name, getlink=True), h5py.HardLink)]
        count += len(names)
        if count > limit.entries:
            raise ModelError(
                f"expected a model in HDF5, found too many entries ({limits.how_to_raise('entries')}).",
                code="input-too-large",
                limit="entries",
            )
        children = [(f"{path}/{name}" if path else name, item[name], depth + 1) for name in reversed(names)]
        waiting += [child for child in children if isinstance(child[1], h5py.Group | h5py.Dataset)]


def _attributes(group: Item) -> dict[str, Json]:
    return {name: _attribute(group, name) for name in group.attrs if _ATTRIBUTES.fullmatch(name)}


def _attribute(group: Item, name: str) -> object:
    """A text, or a list of texts."""
    about = group.attrs.get_id(name)
    if prod(about.shape) > limits.current().entries or prod(about.shape) * about.dtype.itemsize > limits.current().text:
        raise ModelError(
            f"expected names in the attribute {name}, found one that is too large.", code="input-too-large", name=name
        )
    value = group.attrs[name]
    return [_text(item) for item in np.ravel(value)] if isinstance(value, np.ndarray) else _text(value)


def _text(value: object) -> str:
    text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    if len(text) > limits.current().text:
        raise ModelError(
            f"expected a short text, found one that is too long ({limits.how_to_raise('text')}).",
            code="input-too-large",
            limit="text",
        )
    return text


def _about(path: str, item: Item) -> dict[str, Json]:
    """Shape and type of a data set.

    Raises:
        ValueError: its values lie elsewhere.
    """
    import h5py

    plan = item.id.get_create_plist()
    if plan.get_external_count() or plan.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(f"{path} lies in another file")
    marked = "dtype" in item.attrs and _attribute(item, "dtype") == "bfloat16"
    return {
        "shape": [] if item.shape is None else list(item.shape),
        "dtype": _dtype(item),
        "values": None,
        "bfloat16": marked and _dtype(item) == "|V2",
    }


def _dtype(item: Item) -> str:
    try:
        return "nothing" if item.shape is None else item.dtype.str
    except TypeError:  # a type that NumPy doesn't have
        return "a type that NumPy does not have"


def _bytes(about: dict[str, Json]) -> int:
    numbers = _is_numbers(about["dtype"], about["bfloat16"])
    return prod(about["shape"]) * np.dtype(about["dtype"]).itemsize if numbers else 0


def _values(path: str, item: Item) -> np.ndarray:
    plan = item.id.get_create_plist()
    filters = {plan.get_filter(index)[0] for index in range(plan.get_nfilters())}
    if filters - _FILTERS:
        raise ValueError(f"{path} is compressed in a way that needs a plugin")
    return np.asarray(item[()])
