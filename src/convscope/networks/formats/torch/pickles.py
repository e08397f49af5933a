"""PyTorch's checkpoints: a pickle's descriptions of tensors, and the tensors made of the file's bytes.

Nothing here unpickles: `pickles.load` walks the pickle, and each name that it may ask for is in the tables below. A
tensor is a description until it is needed; sizes, strides and offsets are checked against the bytes of its storage.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from convscope import limits
from convscope.errors import ModelError
from convscope.networks.formats import archives, pickles
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.pickles import Made, Value

_MAGIC = 0x1950A86A20F9469CFC6C  # what files from before the zip archives begin with


@dataclass(frozen=True)
class Storage:
    """Bytes in a file: under which key, of which type, and how many values."""

    key: str
    dtype: torch.dtype | None
    count: int
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes the values take."""
        return self.count * (self.dtype.itemsize if self.dtype is not None else 1)


@dataclass(frozen=True)
class Declared:
    """A tensor as a pickle describes it.

    Attributes:
        dtype: of its values; that of the storage where it has one.
        quantizer: ("affine", scale, zero point) and the like, for quantized ones.
        is_parameter: of a `torch.nn.Parameter`.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    quantizer: tuple | None = None
    is_parameter: bool = False

    @property
    def end(self) -> int:
        """The number of values that its storage has to have."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((s - 1) * step for s, step in zip(self.shape, self.strides, strict=True))


# -- the table -------------------------------------------------------------------------------------------

_STORAGES: Mapping[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": None,
}
# The values that checkpoints hold beside the weights (NumPy numbers, arguments); stubs stand for them. NumPy's own
# constructors are not called: given the wrong bytes they read memory that is none of theirs.
_BESIDE = (
    r"numpy\.(dtype|ndarray|dtypes\.\w+|_?core\.multiarray\.(scalar|_reconstruct))|argparse\.Namespace|_codecs\.encode"
    r"|torch\.(device|Size|torch_version\.TorchVersion|serialization\._get_layout)|collections\.Counter"
    r"|(__builtin__|builtins)\.(set|frozenset|complex|bytearray)"
)
_FACTORIES = re.compile(r"(__builtin__|builtins)\.(list|dict|int|float|set|str|bool|tuple)")
_HANDED_ON = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_AFFINE = "torch.per_tensor_affine"


def table(name: str) -> Made | None:
    """What is made of a name in a checkpoint, or None for one that is none of a tensor's."""
    if name in _REBUILDERS:
        return Made(_REBUILDERS[name])
    if name == "collections.OrderedDict":
        return Made(_ordered, takes_state=True)
    if name == "collections.defaultdict":
        return Made(lambda *_: {}, takes_state=True)
    if re.fullmatch(_BESIDE, name):
        return pickles.stub(name)
    if (
        name in (*_HANDED_ON, _AFFINE)
        or _FACTORIES.fullmatch(name)
        or _dtype_named(name)
        or _storage_dtype(name) is not _NONE
    ):
        return Made(None)
    return None


def lenient(name: str) -> Made:
    """The same, and a stub for each name that is none of a tensor's: what it would make is left out, never run."""
    return table(name) or pickles.stub(name)


_NONE: Value = object()


def _storage_dtype(name: str) -> Value:
    home, _, kind = name.rpartition(".")
    return _STORAGES.get(kind, _NONE) if home in ("torch", "torch.storage", "torch.cuda") else _NONE


def _dtype_named(name: str) -> torch.dtype | None:
    home, _, kind = name.rpartition(".")
    found = getattr(torch, kind, None) if home == "torch" and re.fullmatch(r"[a-z]\w*", kind) else None
    return found if isinstance(found, torch.dtype) else None


def _ordered(pairs: Iterable[Value] = ()) -> dict:
    return dict(_pair(pair) for pair in pairs)


def _pair(pair: Value) -> tuple[str, object]:
    key, value = pair
    pickles.check_key(key)
    return key, value


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> Declared:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise TypeError("a tensor without a storage")
    return _declared(storage, (offset, shape, strides), storage.dtype)


def _tensor_of_type(storage: object, *arguments: object) -> Declared:
    offset, shape, strides, _, _, dtype, *_ = arguments
    found = _dtype_named(dtype.name) if isinstance(dtype, pickles.Named) else None
    if not isinstance(storage, Storage) or found is None:
        raise TypeError("a tensor without a storage or a type")
    return _declared(storage, (offset, shape, strides), found)


def _quantized(
    storage: object, offset: object, shape: object, strides: object, quantizer: object, *_: object
) -> Declared:
    made = _tensor(storage, offset, shape, strides)
    if not isinstance(quantizer, tuple) or len(quantizer) not in (3, 4):
        raise TypeError("a quantized tensor without a scale")
    if math.prod(made.shape) > made.storage.count:  # it is copied value by value when it is made
        raise ValueError(f"a quantized tensor of shape {made.shape} repeats its {made.storage.count} values")
    return replace(made, quantizer=quantizer)


def _declared(storage: Storage, place: tuple[Value, Value, Value], dtype: torch.dtype) -> Declared:
    offset, shape, strides = place
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(shape) != len(strides):
        raise ValueError("a tensor's shape is no list of sizes with a stride each")
    if len(shape) > 64:
        raise ValueError(f"a tensor has {len(shape)} axes")
    made = Declared(storage, offset, tuple(shape), tuple(strides), dtype)
    if made.end * dtype.itemsize > storage.nbytes:
        raise ValueError(f"a tensor of shape {made.shape} needs more values than its storage of {storage.count}")
    values = 1
    for side in made.shape:
        values *= side
    if values * dtype.itemsize > limits.current().weights:
        raise ModelError(
            f"a tensor in the file has the shape {made.shape} ({limits.how_to_raise('weights')}).",
            code="input-too-large",
            limit="weights",
        )
    return made


def _parameter(tensor: object, *_: object) -> Declared | pickles.Stub:
    if isinstance(tensor, pickles.Stub):
        return tensor
    if not isinstance(tensor, Declared):
        raise TypeError("a parameter that is no tensor")
    return replace(tensor, is_parameter=True)


def _of_type(function: object, _: object, arguments: Iterable[object], *__: object) -> object:
    if isinstance(function, pickles.Named) and table(function.name) is None:
        return pickles.Stub(function.name)
    if not isinstance(function, pickles.Named) or function.name not in _REBUILDERS or function.name == _OF_TYPE:
        raise TypeError("a tensor that is made by what makes no tensors")
    return _REBUILDERS[function.name](*arguments)


_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_REBUILDERS: Mapping[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    _OF_TYPE: _of_type,
}


def stored(told: object) -> Storage:
    """A pickle's description of a storage: ("storage", type, key, location, count).

    Raises:
        ValueError, TypeError: it is something else.
    """
    if not isinstance(told, tuple) or len(told) not in (5, 6) or told[0] not in ("storage", b"storage"):
        raise ValueError("it refers to something that is no storage")
    _, kind, key, _, count = told[:5]
    dtype = _storage_dtype(kind.name) if isinstance(kind, pickles.Named) else _NONE
    if dtype is _NONE or type(count) is not int or not 0 <= count < 2**62 or not isinstance(key, str | int):
        raise ValueError("a storage of an unknown type")
    offset = 0
    if len(told) == 6 and told[5] is not None:
        _, offset, count = told[5]
        if not all(type(number) is int and 0 <= number < 2**62 for number in (offset, count)):
            raise ValueError("a storage that is no part of another")
    return Storage(str(key), dtype, count, offset)


# -- files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open.

    Attributes:
        value: with a `Declared` for each tensor, and a `Stub` for each object of another class.
        bytes_of: the bytes of a storage.
        storages: all that the pickle refers to, also from within objects that are stubs now.
    """

    value: Value
    bytes_of: Callable[[Storage], bytearray]
    storages: frozenset[Storage]

    def tensor(self, declared: Declared, held: dict[object, bytearray]) -> torch.Tensor:
        """A tensor of the file; `held` keeps the storages that others share."""
        storage = declared.storage
        if storage not in held:
            held[storage] = self.bytes_of(storage)
        return _made(declared, held[storage])


def _made(declared: Declared, data: bytearray) -> torch.Tensor:
    plain = _UNQUANTIZED.get(declared.dtype, declared.dtype)
    flat = torch.frombuffer(data, dtype=plain) if data else torch.empty(0, dtype=plain)
    tensor = torch.as_strided(flat, declared.shape, declared.strides, declared.offset)
    if declared.quantizer is None:
        if plain is not declared.dtype:
            raise ValueError("a quantized tensor without a scale")
        return tensor
    return _with_scale(tensor, declared)


_UNQUANTIZED = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


def _with_scale(tensor: torch.Tensor, declared: Declared) -> torch.Tensor:
    scheme, scale, zero, *axis = declared.quantizer or ()
    affine = isinstance(scheme, pickles.Named) and scheme.name == _AFFINE
    if not affine or axis or declared.dtype not in _UNQUANTIZED or type(scale) is not float or type(zero) is not int:
        raise ValueError("it is quantized in a way that is not read from a checkpoint")
    return torch._make_per_tensor_quantized_tensor(tensor.contiguous(), scale, zero)


@contextmanager
def opened(
    path: Path, inner: bytes | bytearray | None = None, known: Callable[[str], Made | None] = table
) -> Iterator[Checkpoint]:
    """A checkpoint, of today's kind or from before the zip archives.

    Args:
        path: the file.
        inner: the bytes of a checkpoint that is a member of it, to open that.
        known: `table`, or `lenient` where objects of other classes may lie beside the tensors.

    Raises:
        ModelError: it is damaged, or larger than the limits.
        pickles.ForeignName: it asks for what is not `known`.
    """
    try:
        if inner is not None or is_archive(path):
            with archives.opened(path, inner) as archive:
                yield _of_archive(archive, known)
        else:
            with path.open("rb") as file:
                yield _of_pickles(file, known)
    except pickles.UnknownOpcode as error:
        raise _unreadable(path, error) from error
    except (*pickles.DAMAGE, EOFError, OSError, RuntimeError) as error:
        raise damaged(path, error) from error


def is_archive(path: Path) -> bool:
    """True for a zip archive, False for the format before it."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _unreadable(path: Path, error: Exception) -> ModelError:
    protocol = max((protocol for _, protocol in names(path)), default=2)
    if protocol > 2:
        return ModelError(
            f"{path} was saved with pickle protocol {protocol}, of which convscope reads a part. "
            "Save it anew with torch.save(model.state_dict(), FILE), without pickle_protocol.",
            code="version-unsupported",
            path=str(path),
            found=protocol,
            expected=2,
        )
    return damaged(path, error)


def _of_archive(archive: archives.Archive, known: Callable[[str], Made | None]) -> Checkpoint:
    if "byteorder" in archive.members and archive.text("byteorder") != b"little":
        raise ModelError(
            f"{archive.path} was written on a machine of another byte order, which is not read here.",
            code="byte-order",
            path=str(archive.path),
        )
    asked: set[Storage] = set()

    def persistent(told: object) -> Storage:
        asked.add(storage := in_archive(archive, "data", stored(told)))
        return storage

    value = pickles.load(archive.text("data.pkl"), known, persistent)
    return Checkpoint(value, lambda storage: archive.read(f"data/{storage.key}"), frozenset(asked))


def in_archive(archive: archives.Archive, folder: str, storage: Storage) -> Storage:
    """A storage that the archive holds, all of it.

    Raises:
        ValueError: it has another number of bytes than the pickle declares, or none.
    """
    entry = archive.members.get(f"{folder}/{storage.key}")
    if storage.offset or entry is None or entry.file_size != storage.nbytes:
        held = "none" if entry is None else str(entry.file_size)
        raise ValueError(f"the storage {storage.key!r} has to have {storage.nbytes} bytes, and has {held}")
    return storage


def _of_pickles(file: IO[bytes], known: Callable[[str], Made | None]) -> Checkpoint:
    """Before the zip archives: five pickles after each other, then the storages' bytes."""
    magic = pickles.load(file, table)
    if magic != _MAGIC:
        raise ValueError("it is a pickle, but none that torch.save has written")
    pickles.load(file, table)  # the version of the format
    system = pickles.load(file, table)
    if not isinstance(system, dict) or system.get("little_endian") is False:
        raise ValueError("it was written on a machine of another byte order")
    asked: dict[str, Storage] = {}

    def persistent(told: object) -> object:
        if isinstance(told, tuple) and len(told) == 4 and told[0] == "module":  # a class, beside the text of its code
            return told[1]
        storage = stored(told)
        asked[storage.key] = storage
        if len(asked) > limits.current().entries:
            raise ModelError(
                f"it refers to too many storages ({limits.how_to_raise('entries')}).",
                code="input-too-large",
                limit="entries",
            )
        return storage

    value = pickles.load(file, known, persistent)
    keys = pickles.load(file, table)
    if not isinstance(keys, list):
        raise ValueError("it has no list of storages")
    places = _places(file, [str(key) for key in keys], asked)
    return Checkpoint(value, lambda storage: _bytes_at(file, places, storage), frozenset(asked.values()))


def _places(file: IO[bytes], keys: list[str], asked: Mapping[str, Storage]) -> dict[str, tuple[int, int]]:
    """Where the bytes of each storage begin, and how many there are; all of them have to be there."""
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        storage = asked.get(key)
        if storage is None or key in places:
            raise ValueError(f"the storage {key!r} is there and nothing refers to it")
        length = count * (storage.dtype.itemsize if storage.dtype is not None else 1)
        if length > size - start - 8:
            raise ValueError(f"the storage {key!r} of {length} bytes is cut off")
        places[key] = (start + 8, length)
        start += 8 + length
    if sum(length for _, length in places.values()) > limits.current().weights:
        raise ModelError(
            f"its tensors are too large ({limits.how_to_raise('weights')}).", code="input-too-large", limit="weights"
        )
    return places


def _bytes_at(file: IO[bytes], places: Mapping[str, tuple[int, int]], storage: Storage) -> bytearray:
    start, length = places[storage.key]
    first = storage.offset * (storage.dtype.itemsize if storage.dtype is not None else 1)
    if first + storage.nbytes > length:
        raise ValueError(f"the storage {storage.key!r} has {length} bytes, fewer than the pickle says")
    file.seek(start + first)
    data = bytearray(storage.nbytes)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise EOFError("it is cut off")
    return data


def names(path: Path) -> list[tuple[list[str], int]]:
    """The classes and functions that each pickle of a file names, and its protocol; nothing is made of them.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        if is_archive(path):
            with archives.opened(path) as archive:
                return [pickles.names(archive.text(name)) for name in archive.members if name.endswith("data.pkl")]
        found = []
        with path.open("rb") as file:
            for number in range(5):
                try:
                    found.append(pickles.names(file))
                except pickles.DAMAGE:
                    if not number:
                        raise
                    break  # after a single pickle comes anything
        return found
    except pickles.DAMAGE as error:
        raise damaged(path, error) from error
