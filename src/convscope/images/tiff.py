"""TIFF files of more than 8 bits, or of other channels than Pillow knows: bands and pages.

Pillow has no image of several channels of 16 bits, nor of 5 channels. So a page is given to its decoder as a grey image
of 8 bits whose rows are as long as the page's rows are in bytes; that undoes the compression. The rest (the predictor,
the order of bytes, the channels) is done here. Source: TIFF 6.0 and Adobe's supplements on predictors and deflate.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

from convscope.images.guards import Damaged, pillow_limit
from convscope.images.values import MOST_CHANNELS

Numbers = tuple[int, ...]
Directory = dict[int, Numbers]

(SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL, OFFSETS, ORIENTATION, SAMPLES, ROWS, COUNTS) = (
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279
)  # fmt: skip
(PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, EXTRA, FORMAT, DNG) = (
    284, 317, 322, 323, 324, 325, 338, 339, 50706
)  # fmt: skip
_READ = frozenset({
    SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL, OFFSETS, ORIENTATION, SAMPLES, ROWS, COUNTS,
    PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS, EXTRA, FORMAT, DNG,
})  # fmt: skip
_FORMS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # of whole numbers without a sign
_COMPRESSIONS = (1, 5, 8, 32773, 32946, 50000)  # none, LZW, deflate, PackBits, deflate of old, Zstandard
_SENSOR = (32803, 34892)  # photometric: values of a colour filter array, or linear raw ones
_PACKED = (10, 12, 14)
_KINDS: dict[int, Literal["u", "i", "f"]] = {1: "u", 2: "i", 3: "f"}


def places(data: bytes, most: int) -> list[int]:
    """Where the directories of a TIFF begin, each of which names the place of the next; at most `most`.

    Raises:
        struct.error: the file is cut short.
    """
    order, big = _form(data)
    place, count, entry = ("Q", "Q", 20) if big else ("L", "H", 12)
    (at,) = struct.unpack_from(order + place, data, 8 if big else 4)
    seen: dict[int, None] = {}
    while at and at not in seen and len(seen) < most:
        seen[at] = None
        (entries,) = struct.unpack_from(order + count, data, at)
        (at,) = struct.unpack_from(order + place, data, at + struct.calcsize(order + count) + entries * entry)
    return list(seen)


def _form(data: bytes) -> tuple[str, bool]:
    """The order of bytes, and whether it is a BigTIFF."""
    order = "<" if data[:2] == b"II" else ">"
    return order, struct.unpack_from(order + "H", data, 2)[0] == 43


def directory(data: bytes, at: int) -> Directory:
    """The whole numbers of a directory that are needed here, by tag.

    Raises:
        struct.error: the file is cut short.
        Damaged: one of them has no value, or is there twice: Pillow takes the last one then, and libtiff the first.
    """
    order, big = _form(data)
    head, entry, inline = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    (count,) = struct.unpack_from(order + head, data, at)
    start, size = at + struct.calcsize(order + head), struct.calcsize(order + entry) + inline
    if start + count * size > len(data):
        raise struct.error("the directory is cut short")
    found: Directory = {}
    for number in range(count):
        here = start + number * size
        tag, form, length = struct.unpack_from(order + entry, data, here)
        if tag not in _READ or form not in _FORMS:
            continue
        if tag in found or not length:
            raise Damaged(f"the tag {tag} of its TIFF directory {'is there twice' if length else 'has no value'}")
        values, there = f"{order}{length}{_FORMS[form]}", here + struct.calcsize(order + entry)
        if length * struct.calcsize(order + _FORMS[form]) > inline:
            (there,) = struct.unpack_from(order + ("Q" if big else "I"), data, there)
        if there + struct.calcsize(order + _FORMS[form]) * length > len(data):
            raise struct.error("a value is cut short")
        found[tag] = struct.unpack_from(values, data, there)
    return found


def holds_sensor_values(page: Directory) -> bool:
    """True for a RAW photo: its first directory is a preview, or the unprocessed values of a sensor."""
    return DNG in page or page.get(PHOTOMETRIC, (0,))[0] in _SENSOR


@dataclass(frozen=True)
class Page:
    """One page that can be read here.

    Attributes:
        width, height: in pixels.
        samples: channels of a pixel.
        bits: of a value; kind: "u", "i" or "f", as NumPy names it.
        order: of bytes, "<" or ">".
        tags: of its directory.
    """

    width: int
    height: int
    samples: int
    bits: int
    kind: Literal["u", "i", "f"]
    order: str
    tags: Directory = field(repr=False)

    def first(self, tag: int, default: int) -> int:
        """The first number of a tag."""
        return self.tags.get(tag, (default,))[0]

    @property
    def planes(self) -> int:
        """How many planes its channels lie in: one, or one for each."""
        return self.samples if self.first(PLANAR, 1) == 2 else 1

    @property
    def together(self) -> int:
        """Channels of one plane."""
        return self.samples // self.planes

    @property
    def tile(self) -> tuple[int, int] | None:
        """Width and height of its tiles; None where it is stored in strips."""
        if TILE_WIDTH not in self.tags:
            return None
        return self.first(TILE_WIDTH, 0), self.first(TILE_HEIGHT, 0)

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height in the file: whole tiles, whose rows a predictor needs whole."""
        wide, high = self.tile or (1, 1)
        return -(-self.width // wide) * wide, -(-self.height // high) * high

    @property
    def rows(self) -> int:
        """Rows of a strip."""
        return min(self.first(ROWS, self.height), self.height)

    @property
    def pieces(self) -> int:
        """Strips or tiles of a plane."""
        wide, high = self.tile or (self.width, self.rows)
        return -(-self.width // wide) * -(-self.height // high)

    @property
    def dtype(self) -> np.dtype:
        """Of a value in the file."""
        return np.dtype(f"{self.order}{self.kind}{self.bits // 8}" if self.bits > 8 else f"{self.kind}1")

    @property
    def colour(self) -> bool:
        """True if its first three channels are red, green and blue."""
        return self.first(PHOTOMETRIC, 1) == 2 or self.samples == 3

    @property
    def opacity(self) -> bool:
        """True if the channel after its colours is the opacity."""
        return self.first(EXTRA, 0) in (1, 2)

    @property
    def count(self) -> int:
        """Its values, with those that fill up its tiles."""
        width, height = self.stored
        return width * height * self.samples

    @property
    def size(self) -> int:
        """Bytes of its values, unpacked."""
        width, height = self.stored
        return self.planes * height * -(-width * self.together * self.bits // 8)


def page_of(data: bytes, tags: Directory) -> Page | None:
    """The page of a directory, where its values can be read here.

    Raises:
        Damaged: its strips or tiles have no rows or columns.
    """
    samples = tags.get(SAMPLES, (1,))[0]
    bits, kinds = set(tags.get(BITS, (1,))), set(tags.get(FORMAT, (1,)))
    if len(bits) != 1 or len(kinds) != 1 or not {WIDTH, HEIGHT} <= tags.keys() or not 1 <= samples <= MOST_CHANNELS:
        return None
    (depth,), (kind,) = bits, kinds
    page = Page(tags[WIDTH][0], tags[HEIGHT][0], samples, depth, _KINDS.get(kind, "u"), _form(data)[0], tags)
    if not _readable(page):
        return None
    if not all(page.tile or (page.rows,)):
        raise Damaged(f"its {'tiles' if page.tile else 'strips'} have no width or height")
    return page


def _readable(page: Page) -> bool:
    whole = page.bits in (8, 16, 32, 64) or (page.bits in _PACKED and TILE_WIDTH not in page.tags)
    floats = page.kind != "f" or page.bits in (32, 64)
    predictor = page.first(PREDICTOR, 1)
    predicted = predictor == 1 or (predictor == 2 and page.bits >= 8) or (predictor == 3 and page.kind == "f")
    packed = page.bits not in _PACKED or predictor == 1
    known = page.first(COMPRESSION, 1) in _COMPRESSIONS and page.first(PHOTOMETRIC, 1) in (0, 1, 2)
    return whole and floats and predicted and packed and known and page.width > 0 and page.height > 0


def is_beyond_pillow(page: Page) -> bool:
    """True if Pillow can't read a page, or reads 8 bits of more."""
    opacity = page.samples in (2, 4) and page.opacity
    usual = page.samples == 1 or page.first(PHOTOMETRIC, 1) == 2 or opacity
    fourth = page.samples == 4 and EXTRA in page.tags and not page.opacity  # which Pillow leaves out
    return page.bits == 64 or page.samples > 4 or not usual or fourth or (page.samples > 1 and page.bits > 8)


def pages(data: bytes, most: int = MOST_CHANNELS) -> list[Page | None]:
    """The pages of a file, up to one more than `most`; None for one that can't be read here.

    Raises:
        struct.error: the file is cut short.
        Damaged: see `directory` and `page_of`.
    """
    return [page_of(data, directory(data, at)) for at in places(data, most + 1)]


def as_channels(found: Sequence[Page | None]) -> list[Page]:
    """The pages, where they are grey ones of one size and kind, which may be the channels of one image; else none."""
    known = [page for page in found if page is not None]
    if not 2 <= len(found) <= MOST_CHANNELS or len(known) < len(found):
        return []
    forms = {(page.width, page.height, page.samples, page.bits, page.kind) for page in known}
    single = known[0].samples == 1 and not any(page.first(SUBFILE, 0) & 0b101 for page in known)
    return known if len(forms) == 1 and single else []


def values_of(page: Page, data: bytes) -> np.ndarray:
    """The values `(h, w, samples)` of a page, as they are stored.

    Raises:
        Damaged: its strips or tiles are not those of the page.
        Exception: it is damaged in another way; whatever Pillow or NumPy raises.
    """
    planes = [_plane(page, data, number) for number in range(page.planes)]
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


def _plane(page: Page, data: bytes, number: int) -> np.ndarray:
    rows = _unpacked(page, data, number)
    if page.bits in _PACKED:
        return _of_bits(rows, page)
    return np.concatenate([_of_bytes(part, page) for part in _columns(rows, page)], axis=1)[:, : page.width]


def _unpacked(page: Page, data: bytes, number: int) -> np.ndarray:
    """The bytes of a plane, `(h, bytes of a row)` uint8: Pillow takes them for an image of 8 bits."""
    wide = page.together * page.bits  # bits of a pixel
    tags: Directory = {
        WIDTH: (-(-page.stored[0] * wide // 8),),
        HEIGHT: (page.height,),
        BITS: (8,),
        COMPRESSION: (page.first(COMPRESSION, 1),),
        PHOTOMETRIC: (1,),
        FILL: (page.first(FILL, 1),),
        SAMPLES: (1,),
    }
    if page.tile:
        tags |= {TILE_WIDTH: (page.tile[0] * wide // 8,), TILE_HEIGHT: (page.tile[1],)}
    else:
        tags[ROWS] = (page.rows,)
    # The page was measured by its bytes, and not by the pixels that Pillow takes them for.
    with pillow_limit(None), Image.open(BytesIO(_written(tags, _parts(page, data, number))), formats=["TIFF"]) as image:
        return np.asarray(image)


def _parts(page: Page, data: bytes, number: int) -> list[bytes]:
    """The bytes of each strip or tile of a plane."""
    what, *tags = ("tiles", TILE_OFFSETS, TILE_COUNTS) if page.tile else ("strips", OFFSETS, COUNTS)
    offsets, counts = (page.tags.get(tag, ()) for tag in tags)
    each = page.pieces
    if min(len(offsets), len(counts)) < each * page.planes:
        raise Damaged(f"it has {len(offsets)} places and {len(counts)} sizes for {each * page.planes} {what}")
    # Strips that overlap could be unpacked to many times what the file holds.
    if sum(counts[: each * page.planes]) > len(data):
        raise Damaged(f"its {what} have more bytes together than the whole file")
    own = slice(number * each, (number + 1) * each)
    return [data[at : at + size] for at, size in zip(offsets[own], counts[own], strict=True)]


def _written(tags: Directory, parts: Sequence[bytes]) -> bytes:
    """A TIFF file of one page."""
    sizes = tuple(map(len, parts))
    at = tuple(itertools.accumulate(sizes[:-1], initial=8))
    places, counts = (TILE_OFFSETS, TILE_COUNTS) if TILE_WIDTH in tags else (OFFSETS, COUNTS)
    lists = {places: at, counts: sizes}
    body = b"".join(parts)
    after = 8 + len(body) + len(body) % 2
    entries, beyond = b"", b""
    table = sorted({**tags, **lists}.items())
    end = after + 2 + 12 * len(table) + 4
    for tag, numbers in table:
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) == 1:
            entries += struct.pack("<HHI", tag, 4, 1) + packed
        else:
            entries += struct.pack("<HHII", tag, 4, len(numbers), end + len(beyond))
            beyond += packed
    header = struct.pack("<2sHI", b"II", 42, after)
    return b"".join((header, body, b"\0" * (len(body) % 2), struct.pack("<H", len(table)), entries, b"\0" * 4, beyond))


def _columns(rows: np.ndarray, page: Page) -> list[np.ndarray]:
    """The parts of the rows that a predictor works on: those of a tile, or all of them."""
    if TILE_WIDTH not in page.tags or page.first(PREDICTOR, 1) == 1:
        return [rows]
    wide = page.first(TILE_WIDTH, 0) * page.together * page.bits // 8
    return [rows[:, start : start + wide] for start in range(0, rows.shape[1], wide)]


def _of_bytes(rows: np.ndarray, page: Page) -> np.ndarray:
    """Values `(h, w, samples)` of rows of bytes, with the predictor undone."""
    predictor = page.first(PREDICTOR, 1)
    if predictor == 3:
        return _of_float_bytes(rows, page)
    values = np.ascontiguousarray(rows).view(page.dtype).reshape(len(rows), -1, page.together)
    values = values.astype(values.dtype.newbyteorder("="))
    return values if predictor == 1 else np.cumsum(values, axis=1, dtype=values.dtype)


def _of_float_bytes(rows: np.ndarray, page: Page) -> np.ndarray:
    """Adobe's predictor of floats: differences of bytes, all first bytes of a row before all second ones."""
    size = page.bits // 8
    steps = rows.reshape(len(rows), -1, page.together)
    summed = np.cumsum(steps, axis=1, dtype=np.uint8).reshape(len(rows), size, -1)
    values = np.ascontiguousarray(summed.swapaxes(1, 2)).view(f">f{size}")
    return values.reshape(len(rows), -1, page.together).astype(f"f{size}")


def _of_bits(rows: np.ndarray, page: Page) -> np.ndarray:
    """Values `(h, w, samples)` of 10, 12 or 14 bits each, one after another."""
    count = page.width * page.together
    weights = (1 << np.arange(page.bits - 1, -1, -1)).astype(np.uint16)
    out = np.empty((len(rows), count), np.uint16)
    for number, row in enumerate(rows):
        bits = np.unpackbits(row)[: count * page.bits].reshape(count, page.bits)
        out[number] = bits @ weights
    return out.reshape(len(rows), page.width, page.together)
