"""Damage: to bytes, to trees of JSON, to zip archives, to pickles, to protocol buffers."""

from __future__ import annotations

import copy
import functools
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trials.outcomes import Place

# -- bytes -----------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**63, 2**64 - 1)


def damaged(data: bytes, rng: random.Random, times: int | None = None) -> bytes:
    """Bytes with one to a few damages; never the same object, perhaps (rarely) the same bytes."""
    out = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(_DAMAGES)(out, rng)
    return bytes(out)


def _at(out: bytearray, rng: random.Random) -> int:
    """A place; half the time near the start, where headers are."""
    if not out:
        return 0
    return rng.randrange(min(len(out), 512)) if rng.random() < 0.5 else rng.randrange(len(out))


def _flip(out: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 4, 40))):
        if out:
            out[_at(out, rng)] ^= 1 << rng.randrange(8)


def _run(out: bytearray, rng: random.Random) -> None:
    place, length = _at(out, rng), rng.choice((1, 2, 4, 8, 64, 1024))
    length = min(length, len(out) - place)
    out[place : place + length] = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))


def _cut(out: bytearray, rng: random.Random) -> None:
    if rng.random() < 0.4:
        del out[rng.randrange(len(out) + 1) :]
    else:
        place = _at(out, rng)
        del out[place : place + rng.choice((1, 2, 16, 512))]


def _insert(out: bytearray, rng: random.Random) -> None:
    place = _at(out, rng)
    out[place:place] = rng.randbytes(rng.choice((1, 2, 16, 512)))


def _number(out: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_NUMBERS) & (256**size - 1)
    place = _at(out, rng)
    if place + size <= len(out):
        out[place : place + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _repeat(out: bytearray, rng: random.Random) -> None:
    place, length = _at(out, rng), rng.choice((4, 64, 1024))
    part = bytes(out[place : place + length])
    out[place:place] = part * rng.choice((1, 2, 16))


def _move(out: bytearray, rng: random.Random) -> None:
    length = rng.choice((4, 64, 1024))
    source, target = _at(out, rng), _at(out, rng)
    part = out[source : source + length]
    out[target : target + len(part)] = part


_DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip,
    _run,
    _cut,
    _insert,
    _number,
    _number,
    _repeat,
    _move,
)


def spliced(first: bytes, second: bytes, rng: random.Random) -> bytes:
    """The start of one file and the end of another."""
    return first[: rng.randrange(len(first) + 1)] + second[rng.randrange(len(second) + 1) :]


# -- values and trees ------------------------------------------------------------------------------------


def odd_text(place: Place) -> str:
    """A text that no one writes."""
    rng = place.rng
    return rng.choice(
        (
            *(
                "",
                " ",
                ".",
                "..",
                "/",
                "\\",
                "\0",
                "a\0b",
                "\x1b[31mred\x1b[0m",
                "\u202egnp.exe",
                "\r\nError: fake",
                "é" * 300,
            ),
            *(
                "../outside/secret.txt",
                "../../outside/weights.bin",
                str(place.outside / "secret.txt"),
                str(place.outside / "pipe"),
            ),
            *(
                "a" * 300,
                "a/b/c",
                "x" * 10**5,
                "__class__",
                "__init__.__globals__",
                "planted_module",
                "antigravity",
                "os.system",
            ),
            *(
                "nan",
                "-1",
                "1e999",
                "null",
                "{}",
                "None",
                "\ud800",
                "float32",
                "complex128",
                "object",
                "{0.__class__}",
                "%s%n",
            ),
        )
    )


def odd_number(rng: random.Random) -> int | float:
    """A number that no one writes."""
    return rng.choice(
        (
            0,
            -1,
            1,
            2,
            3,
            7,
            255,
            2**15,
            2**16 + 1,
            2**20,
            2**31 - 1,
            2**31,
            2**32,
            2**40,
            2**62,
            2**63 - 1,
            2**63,
            2**64,
            10**30,
            -(2**31),
            -(2**63),
            0.5,
            -0.0,
            1e-320,
            1e308,
            float("nan"),
            float("inf"),
            True,
        )
    )


def odd_value(place: Place) -> Any:
    """Any JSON value that no one writes there."""
    rng = place.rng
    return rng.choice(
        (
            lambda: odd_number(rng),
            lambda: odd_text(place),
            lambda: None,
            lambda: [],
            lambda: {},
            lambda: [odd_number(rng)] * rng.choice((1, 2, 5, 40)),
            lambda: {odd_text(place): odd_number(rng)},
            lambda: nested(rng.choice((3, 50, 120, 3000))),
            lambda: {
                "class_name": odd_text(place),
                "config": {},
                "module": odd_text(place),
                "registered_name": odd_text(place),
            },
            lambda: [[]] * 3,
        )
    )()


@dataclass(frozen=True)
class Deep:
    """Nesting that is too deep to be held as lists by a writer of JSON: written as text by `dumped`."""

    levels: int


def nested(levels: int) -> Any:
    """Lists in lists."""
    return Deep(levels)


def dumped(value: Any, **options: Any) -> bytes:
    """JSON, with `Deep` in it, and surrogates as they are escaped."""
    deep: list[Deep] = []

    def other(item: Any) -> Any:
        if isinstance(item, Deep):
            deep.append(item)
            return f"@deep{len(deep) - 1}@"
        raise TypeError(type(item))

    text = json.dumps(value, default=other, **options)
    for number, item in enumerate(deep):
        text = text.replace(f'"@deep{number}@"', "[" * item.levels + "]" * item.levels)
    return text.encode()


def mutated(value: Any, place: Place, times: int | None = None) -> Any:
    """A tree of dicts, lists and plain values with one to a few nodes changed."""
    out = copy.deepcopy(value)
    for _ in range(times or place.rng.choice((1, 1, 1, 2, 4))):
        holders = list(holders_in(out))
        if not holders:
            return odd_value(place)
        holder = place.rng.choice(holders)
        _change(holder, place)
    return out


def holders_in(value: Any) -> list[Any]:
    """Every dict and list in a tree that is not empty."""
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        inner = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else ()
        if inner:
            found.append(item)
            waiting.extend(inner)
    return found


def _change(holder: Any, place: Place) -> None:
    rng = place.rng
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return
    key, what = rng.choice(keys), rng.randrange(8)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[odd_text(place)] = holder.pop(key)
    elif what == 1:
        holder.insert(key, copy.deepcopy(rng.choice(holder)))
    elif what == 2:
        holder[key] = [holder[key]]
    elif what == 3:
        holder[key] = copy.deepcopy(holder[rng.choice(keys)])
    elif what == 4 and isinstance(holder[key], str):
        holder[key] = rng.choice(
            (holder[key] + odd_text(place), holder[key][:-1], holder[key].upper(), holder[key] * 3)
        )
    elif what == 5 and isinstance(holder[key], int | float):
        holder[key] = rng.choice(
            (-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key]), float(holder[key]))
        )
    elif what == 6 and isinstance(holder, list) and len(holder) > 1:
        rng.shuffle(holder)
    else:
        holder[key] = odd_value(place)


# -- zip archives, with lies -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A member as it stands in the archive; what it says of itself may be a lie.

    Attributes:
        raw: the bytes as stored; the rest are fields of its headers.
    """

    name: bytes
    raw: bytes
    crc: int
    size: int
    method: int = 0
    flags: int = 0
    packed: int | None = None
    attributes: int = 0


def stored(name: str | bytes, data: bytes, deflated: bool = False) -> Entry:
    """An honest member."""
    raw = zlib.compress(data, 1, -15) if deflated else data
    whole = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return Entry(whole, raw, zlib.crc32(data), len(data), 8 if deflated else 0, 0 if whole.isascii() else 0x800)


@functools.lru_cache(4)
def bomb(size: int) -> tuple[bytes, int]:
    """Zeros, deflated a thousandfold, and their CRC; `size` is in MiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(2**20)
    start = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(size):
        crc = zlib.crc32(zeros, crc)
    return start + block * (size - 1) + packer.flush(zlib.Z_FINISH), crc


def bomb_entry(name: str | bytes, mebibytes: int) -> Entry:
    """A member that unpacks to so many MiB of zeros."""
    raw, crc = bomb(mebibytes)
    return replace(stored(name, b""), raw=raw, crc=crc, size=mebibytes << 20, method=8)


_LONGEST_NAME = 2**16 - 1  # an archive can't hold more


def zipped(entries: Sequence[Entry], align: int = 0) -> bytes:
    """An archive of members as they are, none checked; PyTorch wants the data of members `align`ed."""
    out, central = bytearray(), bytearray()
    for entry in (replace(entry, name=entry.name[:_LONGEST_NAME]) for entry in entries):
        packed = len(entry.raw) if entry.packed is None else entry.packed
        extra = _padding(len(out) + 30 + len(entry.name), align)
        fields = (
            entry.flags,
            entry.method,
            0,
            33,
            entry.crc & 0xFFFFFFFF,
            packed & 0xFFFFFFFF,
            entry.size & 0xFFFFFFFF,
        )
        where = len(out)
        out += (
            struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, *fields, len(entry.name), len(extra))
            + entry.name
            + extra
            + entry.raw
        )
        central += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 0x314, 20, *fields, len(entry.name), 0, 0, 0, 0, entry.attributes, where
        )
        central += entry.name
    end = struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, len(entries) & 0xFFFF, len(entries) & 0xFFFF, len(central), len(out), 0
    )
    return bytes(out + central + end)


def _padding(start: int, align: int) -> bytes:
    if not align:
        return b""
    length = -(start + 4) % align
    return struct.pack("<HH", 0x4246, length) + b"Z" * length


def members(path: Path) -> dict[str, bytes]:
    """The members of an archive, in order."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(contents: Mapping[str, bytes], place: Place, align: int = 0) -> bytes:
    """The archive of what it holds, honest for the most part, and sometimes with damages that only archives have."""
    rng = place.rng
    entries = [stored(name, data, deflated=align == 0 and rng.random() < 0.3) for name, data in contents.items()]
    return zipped(entries, align)


def damaged_zip(contents: Mapping[str, bytes], place: Place, align: int = 0) -> tuple[bytes, str]:
    """An archive with damages of its own kind, and their name."""
    rng = place.rng
    entries = [stored(name, data) for name, data in contents.items()]
    number = rng.randrange(len(entries))
    entry = entries[number]
    choices: dict[str, Callable[[], list[Entry]]] = {
        "wrong crc": lambda: [replace(entry, crc=rng.getrandbits(32))],
        "size lies": lambda: [replace(entry, size=rng.choice((0, 1, 2**31, 2**32 - 2, entry.size * 2)))],
        "packed size lies": lambda: [replace(entry, packed=rng.choice((0, 1, 2**31, 2**32 - 2)))],
        "unknown method": lambda: [replace(entry, method=rng.choice((1, 6, 9, 12, 14, 93, 95, 98, 99, 65535)))],
        "encrypted": lambda: [replace(entry, flags=rng.choice((1, 0x41, 0x2001, 0x21)))],
        "no deflate data": lambda: [replace(entry, method=8)],
        "bad name": lambda: [
            replace(
                entry, name=rng.choice((b"\xff\xfe\x80", b"", b"../" + entry.name, b"/" + entry.name, entry.name * 50))
            )
        ],
        "odd name": lambda: [stored(odd_text(place).encode("utf-8", "surrogatepass"), entry.raw)],
        "twice": lambda: [entry, stored(entry.name, damaged(entry.raw, rng))],
        "missing": lambda: [],
        "empty": lambda: [stored(entry.name, b"")],
        "outside names": lambda: [
            entry,
            stored("../outside/written.txt", b"x"),
            stored(str(place.outside / "marker"), b"x"),
        ],
        "symlink": lambda: [
            replace(stored(entry.name, str(place.outside / "weights.bin").encode()), attributes=0o120777 << 16)
        ],
        "bomb": lambda: [bomb_entry(entry.name, rng.choice((64, 512, 3000)))],
        "bomb beside": lambda: [entry, bomb_entry("more/" + entry.name.decode("utf-8", "replace"), 3000)],
        "many": lambda: [entry, *(stored(f"extra/{i}", b"") for i in range(rng.choice((1000, 65000))))],
        "folder": lambda: [replace(entry, name=entry.name + b"/")],
        "other name": lambda: [replace(entry, name=rng.choice(entries).name)],
    }
    what = rng.choice(list(choices))
    return zipped([*entries[:number], *choices[what](), *entries[number + 1 :]], align), what


# -- pickles ---------------------------------------------------------------------------------------------


def opcodes(data: bytes) -> list[bytes]:
    """A pickle, taken apart into its opcodes with their arguments."""
    places = [position for _, _, position in pickletools.genops(data) if position is not None]
    stop = places[-1] + 1
    return [data[start:end] for start, end in zip(places, [*places[1:], stop], strict=True)]


def short(text: str) -> bytes:
    """A text on the stack of a pickle of protocol 2."""
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def code_pickle(place: Place) -> bytes:
    """Opcodes that call a function with the marker, and leave what it returns on the stack."""
    rng, marker = place.rng, str(place.marker)
    call = rng.choice(
        (
            b"cos\nsystem\n" + short(f"touch {marker}") + b"\x85R",
            b"cposix\nsystem\n" + short(f"touch {marker}") + b"\x85R",
            b"cbuiltins\nexec\n" + short(f"open({marker!r}, 'w')") + b"\x85R",
            b"c__builtin__\neval\n" + short(f"open({marker!r}, 'w')") + b"\x85R",
            b"cbuiltins\nopen\n" + short(marker) + short("w") + b"\x86R",
            b"(" + short(f"touch {marker}") + b"ios\nsystem\n",
            b"(cos\nsystem\n" + short(f"touch {marker}") + b"o",
            short("os") + short("system") + b"\x93" + short(f"touch {marker}") + b"\x85R",
            b"csubprocess\nPopen\n" + short(f"touch {marker}") + b"\x85" + b"R",
            b"cpathlib\nPath\n" + short(marker) + b"\x85R",
            b"cpathlib\nPosixPath.touch\n" + short(marker) + b"\x85R",
            b"cimportlib\nimport_module\n" + short("planted_module") + b"\x85R",
            b"cplanted_module\nthing\n",
            b"cantigravity\nfly\n",
            b"cnumpy\nload\n" + short(str(place.outside / "weights.bin")) + b"\x85R",
            b"cnumpy\nsave\n" + short(marker) + b"K\x01\x86R",
            b"ctorch\nload\n" + short(str(place.outside / "weights.bin")) + b"\x85R",
            b"ctorch\nsave\n" + b"K\x01" + short(marker) + b"\x86R",
            b"ctorch.hub\nload\n" + short("planted/planted") + b"\x85R",
            b"ctorch.serialization\nload\n" + short(str(place.outside / "secret.txt")) + b"\x85R",
            b"ctorch.storage\n_load_from_bytes\n" + b"B\x04\x00\x00\x00cos\n" + b"\x85R",
            b"ctorch.UntypedStorage\nfrom_file\n" + short(str(place.outside / "weights.bin")) + b"\x88K\x40\x87R",
            b"ctorch\nFloatStorage.from_file\n" + short(str(place.outside / "weights.bin")) + b"\x85R",
            b"ctorch._utils\n_rebuild_tensor\n" + b"N(tR",
            b"ctorch.jit\nload\n" + short(str(place.outside / "weights.bin")) + b"\x85R",
            b"ctorch.ops\nload_library\n" + short(str(place.outside / "weights.bin")) + b"\x85R",
        )
    )
    return call


def mutated_pickle(data: bytes, place: Place) -> bytes:
    """A pickle with opcodes deleted, doubled, exchanged, given other arguments, or with strange ones put in."""
    rng, parts = place.rng, opcodes(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        number, what = rng.randrange(len(parts)), rng.randrange(7)
        if what == 0:
            del parts[number]
        elif what == 1:
            parts.insert(number, parts[rng.randrange(len(parts))])
        elif what == 2:
            other = rng.randrange(len(parts))
            parts[number], parts[other] = parts[other], parts[number]
        elif what == 3:
            parts[number] = rng.choice(
                (
                    b"N",
                    b"K\x00",
                    b"J\xff\xff\xff\x7f",
                    b"\x8a\x09" + b"\xff" * 8 + b"\0",
                    b"]",
                    b"}",
                    b")",
                    b"\x88",
                    b"G\x7f\xf0\0\0\0\0\0\0",
                )
            )
        elif what == 4:
            parts[number] = short(odd_text(place))
        elif what == 5:
            parts.insert(
                number,
                rng.choice(
                    (
                        b"(",
                        b"0",
                        b"1",
                        b"2",
                        b"t",
                        b"u",
                        b"b",
                        b"Q",
                        b"R",
                        b"\x81",
                        b"e",
                        b".",
                        b"r\xff\xff\xff\x7f",
                        b"X\xff\xff\xff\x7f",
                        b"\x80\x05",
                    )
                ),
            )
        else:
            numbers = [i for i, part in enumerate(parts) if part[:1] in b"KMJ"]
            if numbers:
                parts[rng.choice(numbers)] = rng.choice(
                    (
                        b"J" + struct.pack("<i", rng.choice((-1, 0, 2**31 - 1, 2**20, 7))),
                        b"\x8a\x08" + struct.pack("<q", rng.choice((2**40, 2**62, -(2**63)))),
                    )
                )
        if not parts:
            break
    return b"".join(parts)


def planted_pickle(data: bytes, place: Place) -> bytes:
    """A pickle in which a call that would run code stands in some place where a value may stand."""
    parts = opcodes(data)
    places = [
        i
        for i, part in enumerate(parts)
        if part[:1] in (b"X", b"K", b"M", b"J", b"N", b"\x88", b"\x89", b"h", b"q", b")", b"}")
    ]
    number = place.rng.choice(places or [len(parts) - 1])
    call = code_pickle(place)
    if place.rng.random() < 0.5:  # called, thrown away, and the rest as before
        return b"".join((*parts[:1], call, b"0", *parts[1:]))
    return b"".join((*parts[:number], call, *parts[number + 1 :]))


# -- protocol buffers ------------------------------------------------------------------------------------


def mutated_message(message: Any, place: Place, times: int | None = None) -> None:
    """Change one to a few fields somewhere in a message, in place."""
    for _ in range(times or place.rng.choice((1, 1, 2, 4))):
        holders = list(messages_in(message))
        holder = place.rng.choice(holders)
        fields = holder.ListFields()
        if fields:
            _change_field(holder, *place.rng.choice(fields), place)


def messages_in(message: Any, most: int = 5000) -> list[Any]:
    """A message and those inside it."""
    found, waiting = [], [message]
    while waiting and len(found) < most:
        item = waiting.pop()
        found.append(item)
        for field, value in item.ListFields():
            if field.message_type is None:
                continue
            if not repeated(field):
                waiting.append(value)
            elif field.message_type.GetOptions().map_entry:
                waiting.extend(inner for inner in value.values() if hasattr(inner, "ListFields"))
            else:
                waiting.extend(value)
    return found


def repeated(field: Any) -> bool:
    """True for a repeated field; newer versions of protobuf have another attribute for it."""
    known = getattr(field, "is_repeated", None)
    return bool(field.label == field.LABEL_REPEATED if known is None else known() if callable(known) else known)


def _change_field(holder: Any, field: Any, value: Any, place: Place) -> None:
    rng, name = place.rng, field.name
    try:
        if repeated(field):
            _change_repeated(getattr(holder, name), field, place)
        elif field.message_type is not None or rng.random() < 0.2:
            holder.ClearField(name)
        else:
            setattr(holder, name, _odd_of(field, value, place))
    except (TypeError, ValueError, OverflowError, UnicodeError, AttributeError, KeyError):
        holder.ClearField(name)


def _change_repeated(values: Any, field: Any, place: Place) -> None:
    rng = place.rng
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        del values[rng.choice(list(values))]
        return
    number, what = rng.randrange(len(values)), rng.randrange(4)
    if what == 0:
        del values[number]
    elif field.message_type is not None and what == 1:
        values.add().CopyFrom(values[number])
    elif field.message_type is not None:
        kept = [type(value).FromString(value.SerializeToString()) for value in values]
        rng.shuffle(kept)
        del values[:]
        values.extend(kept)
    elif what == 1:
        values.append(values[number])
    else:
        values[number] = _odd_of(field, values[number], place)


def _odd_of(field: Any, value: Any, place: Place) -> Any:
    if isinstance(value, bytes):
        return place.rng.choice(
            (b"", damaged(value, place.rng), odd_text(place).encode("utf-8", "replace"), b"\xff\xfe")
        )
    if isinstance(value, str):
        return odd_text(place).encode("utf-8", "replace").decode()
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return place.rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    return place.rng.choice((0, 1, -1, 2, 3, value + 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)))
