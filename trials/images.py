"""Images of every format and mode, whole and damaged."""

from __future__ import annotations

import functools
import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from trials import mutations
from trials.outcomes import IMAGE_CONSTANT, IMAGE_TIMES, MIB, Case, Place

_SIZES = ((1, 1), (1, 300), (7, 5), (64, 48), (200, 150))
Variant = tuple[str, str, dict[str, Any]]


def may_take(path: Path) -> int:
    """Bytes that reading this image may take: computed only after more than the constant was taken."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return IMAGE_CONSTANT + IMAGE_TIMES * 3 * min(image.width * image.height, 178_000_000)
    except Exception:
        return IMAGE_CONSTANT


# -- whole files of every mode ---------------------------------------------------------------------------

_VARIANTS: dict[str, list[Variant]] = {
    "png": [
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")),
        ("PNG", "P", {"bits": 2}),
        ("PNG", "RGB", {"transparency": (3, 3, 3)}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "RGB", {"frames": 4}),
        ("PNG", "RGB", {"exif": True, "icc": True}),
        ("PNG", "L", {"compress_level": 0}),
    ],
    "jpeg": [
        *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
        *(("JPEG", "RGB", {"progressive": True, "subsampling": sub}) for sub in (0, 1, 2)),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "RGB", {"exif": True, "icc": True, "comment": b"x" * 100}),
        ("JPEG", "RGB", {"restart_marker_blocks": 1}),
        ("JPEG", "RGB", {"quality": 1, "optimize": True}),
        ("MPO", "RGB", {"frames": 2}),
    ],
    "webp": [
        *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA", "L") for lossless in (False, True)),
        ("WEBP", "RGBA", {"frames": 4}),
        ("WEBP", "RGB", {"exif": True, "icc": True, "xmp": b"<x/>"}),
    ],
    "gif": [
        *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        ("GIF", "P", {"frames": 5}),
        ("GIF", "P", {"interlace": 1, "transparency": 2, "comment": b"hello"}),
    ],
    "tiff": [
        *(
            ("TIFF", mode, {})
            for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F")
        ),
        *(
            ("TIFF", "RGB", {"compression": name})
            for name in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma", "webp")
        ),
        *(("TIFF", "1", {"compression": name}) for name in ("group3", "group4", "tiff_ccitt", "packbits")),
        *(("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("L", "I;16", "F", "P", "CMYK")),
        *(("TIFF", mode, {"frames": 3}) for mode in ("RGB", "L")),
        ("TIFF", "RGB", {"exif": True, "icc": True}),
        ("TIFF", "RGB", {"big_tiff": True}),
        ("TIFF", "RGB", {"planar": True}),
        ("TIFF", "L", {"tiled": True}),
        ("TIFF", "F", {"double": True}),
    ],
    "bmp": [
        *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("DIB", mode, {}) for mode in ("L", "RGB")),
        ("ICO", "RGBA", {}),
        ("BMP", "rle", {}),
    ],
    "avif": [
        *(("AVIF", mode, {"speed": 10}) for mode in ("RGB", "RGBA", "L")),
        ("AVIF", "RGB", {"frames": 2, "speed": 10}),
    ],
    "jpeg2000": [
        *(("JPEG2000", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "I;16")),
        ("JPEG2000", "RGB", {"irreversible": True, "quality_layers": [20, 5]}),
        ("JPEG2000", "RGB", {"no_jp2": True, "tile_size": (32, 32)}),
    ],
    "ppm": [
        *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I", "I;16", "F")),
        ("TGA", "RGB", {}),
        ("PCX", "RGB", {}),
        ("SGI", "RGB", {}),
        ("QOI", "RGB", {}),
        ("DDS", "RGB", {}),
        ("IM", "RGB", {}),
    ],
}


@functools.lru_cache(2000)
def whole(format: str, number: int, size: int) -> bytes:
    """A valid file: of a format of ours, the variant's number, and the number of its size."""
    kind, mode, options = _VARIANTS[format][number]
    if mode == "rle":
        return _rle_bmp()
    options = dict(options)
    width, height = _SIZES[size]
    frames = [_drawn(mode, width, height, frame) for frame in range(options.pop("frames", 1))]
    if options.pop("planar", False):
        return _tiff(width, height, planar=True)
    if options.pop("tiled", False):
        return _tiff(width, height, tiled=True)
    if options.pop("double", False):
        return _tiff(width, height, double=True)
    if options.pop("exif", False):
        exif = Image.Exif()
        exif[274] = 6
        exif[270] = "a description"
        options["exif"] = exif
    if options.pop("icc", False):
        options["icc_profile"] = _profile()
    if len(frames) > 1:
        options |= {"save_all": True, "append_images": frames[1:]}
    out = io.BytesIO()
    frames[0].save(out, kind, **options)
    return out.getvalue()


def _profile() -> bytes:
    try:
        from PIL import ImageCms

        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    except ImportError:
        return b"\0\0\0\x80" + bytes(124)


def _drawn(mode: str, width: int, height: int, frame: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    ramp = (3 * x + 5 * y + 40 * frame) % 256
    if mode in ("I;16", "I;16B"):
        return (
            Image.fromarray((ramp * 257).astype(np.uint16))
            if mode == "I;16"
            else Image.frombytes("I;16B", (width, height), (ramp * 257).astype(">u2").tobytes())
        )
    if mode == "I":
        return Image.fromarray((ramp * 257).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    colour = Image.fromarray(np.stack([ramp, 255 - ramp, (ramp * 7) % 256, 128 + ramp // 2], -1).astype(np.uint8))
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), np.asarray(colour)[..., :3].tobytes())
    return colour if mode == "RGBA" else colour.convert("RGB").convert(mode) if mode != "LA" else colour.convert("LA")


def _rle_bmp() -> bytes:
    data = b"\x08\x01\x00\x00" * 8 + b"\x00\x01"
    head = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(data), 2835, 2835, 256, 0)
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    offset = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + head + palette + data


def _tiff(width: int, height: int, planar: bool = False, tiled: bool = False, double: bool = False) -> bytes:
    """TIFFs that Pillow reads and does not write."""
    samples, bits, form = (3, 8, 1) if planar else (1, 64, 3) if double else (1, 8, 1)
    tags: list[tuple[int, int, list[int]]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * samples),
        (259, 3, [1]),
    ]
    tags += [
        (262, 3, [2 if planar else 1]),
        (277, 3, [samples]),
        (284, 3, [2 if planar else 1]),
        (339, 3, [form] * samples),
    ]
    if tiled:
        count, each = -(-width // 16) * -(-height // 16), 256
        tags += [(322, 3, [16]), (323, 3, [16]), (324, 4, [0] * count), (325, 4, [each] * count)]
    else:
        count, each = samples, width * height * bits // 8
        tags += [(273, 4, [0] * count), (278, 4, [height]), (279, 4, [each] * count)]
    return tiff_of(tags, bytes(count * each), each)


def tiff_of(tags: list[tuple[int, int, list[int]]], data: bytes, each: int = 0, next_one: int = 0) -> bytes:
    """A TIFF of one directory; the offsets of strips or tiles are filled in."""
    tags = sorted(tags)
    start = 8 + 2 + 12 * len(tags) + 4
    sizes = {3: 2, 4: 4}
    more = sum(len(values) * sizes[kind] for _, kind, values in tags if len(values) * sizes[kind] > 4)
    first = start + more
    entries, extra = b"", b""
    for tag, kind, values in tags:
        if tag in (273, 324) and each:
            values = [first + i * each for i in range(len(values))]
        packed = struct.pack(
            f"<{len(values)}{'H' if kind == 3 else 'I'}",
            *(value & 0xFFFFFFFF if kind == 4 else value & 0xFFFF for value in values),
        )
        if len(packed) <= 4:
            entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
        else:
            entries += struct.pack("<HHII", tag, kind, len(values), start + len(extra))
            extra += packed
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", next_one)
        + extra
        + data
    )


# -- damaged ones ----------------------------------------------------------------------------------------


def _available(format: str) -> bool:
    return format != "avif" or features.check("avif")


def _any_whole(format: str, rng: random.Random) -> tuple[bytes, str]:
    """A valid file of a format; a variant that this Pillow can't write is left out."""
    for _ in range(20):
        number, size = rng.randrange(len(_VARIANTS[format])), rng.choice((0, 1, 2, 3, 3, 3, 4))
        try:
            kind, mode, options = _VARIANTS[format][number]
            return whole(format, number, size), f"{kind} {mode} {options or ''} {_SIZES[size]}"
        except (OSError, ValueError, KeyError, SystemError, RuntimeError, struct.error):
            continue
    return whole("png", 4, 3), "PNG instead"


def _case(place: Place, name: str, data: bytes, what: str) -> Case:
    path = place.folder / name
    path.write_bytes(data)
    return Case("image", path, what, IMAGE_CONSTANT)


def _generated(place: Place, format: str, own: dict[str, Callable[[bytes, Place], bytes]]) -> Case:
    """Whole, damaged anywhere, spliced with another, or damaged where this format can be."""
    rng = place.rng
    data, what = _any_whole(format, rng)
    chance = rng.random()
    if own and chance < 0.35:
        name = rng.choice(list(own))
        try:
            return _case(place, f"image.{format}", own[name](data, place), f"{what}, {name}")
        except (struct.error, IndexError, ValueError):
            pass
    if chance < 0.42:
        return _case(place, f"image.{format}", data, what)
    if chance < 0.52:
        other, more = _any_whole(rng.choice(list(_VARIANTS)) if rng.random() < 0.3 else format, rng)
        return _case(place, f"image.{format}", mutations.spliced(data, other, rng), f"{what} spliced with {more}")
    return _case(place, f"image.{format}", mutations.damaged(data, rng), f"{what}, damaged bytes")


def _sides(rng: random.Random) -> tuple[int, int]:
    """Declared sides: bombs over and just under the limits, and odd ones."""
    if rng.random() < 0.03:  # these may be decoded, which takes seconds
        return rng.choice(((20000, 8900), (1, 170_000_000), (16000, 11000), (4000, 4000)))
    large = 2**31 - 1
    return rng.choice(
        ((0, 0), (1, 0), (65535, 65535), (100000, 100000), (large, 1), (1, large), (large, large), (300, 200))
    )


# PNG: chunks with a right CRC


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    out = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        out += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))]
    return b"".join(out)


def _png_header(data: bytes, place: Place) -> bytes:
    rng, chunks = place.rng, _chunks(data)
    width, height = _sides(rng)
    depth, colour = rng.choice(((1, 0), (8, 2), (16, 0), (16, 6), (8, 3), (4, 3), (3, 1), (255, 255)))
    chunks[0] = (
        b"IHDR",
        struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height, depth, colour, 0, 0, rng.choice((0, 1, 2))),
    )
    return _png(chunks)


def _png_chunks(data: bytes, place: Place) -> bytes:
    rng, chunks = place.rng, _chunks(data)
    number = rng.randrange(len(chunks))
    name, content = chunks[number]
    what = rng.randrange(6)
    if what == 0:
        del chunks[number]
    elif what == 1:
        chunks.insert(number, chunks[rng.randrange(len(chunks))])
    elif what == 2:
        chunks[number] = (name, mutations.damaged(content, rng))
    elif what == 3:
        kind = rng.choice(
            (
                b"zTXt",
                b"iTXt",
                b"tEXt",
                b"iCCP",
                b"PLTE",
                b"tRNS",
                b"eXIf",
                b"acTL",
                b"fcTL",
                b"fdAT",
                b"gAMA",
                b"pHYs",
                b"sBIT",
            )
        )
        chunks.insert(1, (kind, rng.randbytes(rng.choice((0, 1, 4, 13, 26, 800)))))
    elif what == 4:
        packed = zlib.compress(bytes(rng.choice((2, 80)) * MIB), 9)
        chunks.insert(
            1,
            rng.choice(
                ((b"zTXt", b"a\0\0" + packed), (b"iCCP", b"a\0\0" + packed), (b"iTXt", b"a\0\1\0\0\0" + packed))
            ),
        )
    else:
        chunks[-1:-1] = [chunks[min(1, len(chunks) - 1)]] * rng.choice((3, 3000))
    return _png(chunks)


def _png_frames(data: bytes, place: Place) -> bytes:
    """An animation that declares, or has, very many frames."""
    count = place.rng.choice((2**31 - 1, 100, 3000))
    chunks = _chunks(data)
    control = struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 0, 0)
    frames = [(b"fcTL", control)] * min(count, 3000)
    return _png([*chunks[:1], (b"acTL", struct.pack(">II", count, 0)), *chunks[1:-1], *frames, *chunks[-1:]])


def _png_bomb(data: bytes, place: Place) -> bytes:
    """Rows that are all there, of a large image that packs well."""
    width, height, depth, colour = place.rng.choice(
        ((6000, 4000, 8, 2), (6000, 4000, 16, 0), (12000, 9000, 1, 0), (5000, 3000, 16, 6), (8000, 8000, 8, 3))
    )
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row = 1 + (width * depth * channels + 7) // 8
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(row)) for _ in range(height)) + packer.flush()
    palette = [(b"PLTE", bytes(768))] if colour == 3 else []
    return _png(
        [
            (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
            *palette,
            (b"IDAT", packed),
            (b"IEND", b""),
        ]
    )


# JPEG: segments


def _jpeg_size(data: bytes, place: Place) -> bytes:
    out = bytearray(data)
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        found = out.find(marker)
        if found > 0:
            width, height = (min(side, 65535) for side in _sides(place.rng))
            out[found + 5 : found + 9] = struct.pack(">HH", height, width)
    return bytes(out)


def _jpeg_scans(data: bytes, place: Place) -> bytes:
    """A progressive image with its scans over and over, at its own or a large size."""
    number = next(
        i for i, (_, mode, options) in enumerate(_VARIANTS["jpeg"]) if options.get("progressive") and mode == "L"
    )
    data = whole("jpeg", number, 3)
    start, end = data.find(b"\xff\xda"), data.rfind(b"\xff\xd9")
    scan = data[start:end]
    many = data[:start] + scan * place.rng.choice((5, 100, 400)) + data[end:]
    return _jpeg_size(many, place) if place.rng.random() < 0.5 else many


def _jpeg_segments(data: bytes, place: Place) -> bytes:
    rng = place.rng
    kind = rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xDB, 0xC4, 0xDD, 0xFE, 0xC8, 0xCC, 0xDC))
    content = rng.choice(
        (
            rng.randbytes(rng.choice((0, 2, 64, 4000))),
            b"Exif\0\0" + rng.randbytes(60),
            b"ICC_PROFILE\0\x01\x01" + rng.randbytes(200),
            b"MPF\0" + rng.randbytes(80),
        )
    )
    length = rng.choice((len(content) + 2, len(content) + 2, 0, 1, 65535))
    segment = bytes((0xFF, kind)) + struct.pack(">H", length) + content
    return data[:2] + segment * rng.choice((1, 1, 300)) + data[2:]


# TIFF: directories


def _tiff_entry(data: bytes, place: Place) -> bytes:
    """One field of a directory's entry, or where the directory is."""
    rng, out = place.rng, bytearray(data)
    end = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(end + "I", data, 4)
    (count,) = struct.unpack_from(end + "H", data, start)
    entry = start + 2 + 12 * rng.randrange(max(count, 1))
    value = rng.choice((0, 1, 2, 3, 8, start, len(data), len(data) - 1, 2**31, 2**32 - 1, 65535, 256, 100000))
    what = rng.randrange(6)
    if what == 0:
        struct.pack_into(
            end + "H",
            out,
            entry,
            rng.choice(
                (256, 257, 258, 259, 262, 273, 277, 279, 284, 317, 320, 322, 330, 338, 339, 34665, 34675, 700, 0, 65535)
            ),
        )
    elif what == 1:
        struct.pack_into(end + "H", out, entry + 2, rng.choice((0, 1, 2, 3, 4, 5, 7, 12, 13, 16, 18, 255)))
    elif what == 2:
        struct.pack_into(end + "I", out, entry + 4, value)
    elif what == 3:
        struct.pack_into(end + "I", out, entry + 8, value)
    elif what == 4:
        struct.pack_into(end + "I", out, start + 2 + 12 * count, rng.choice((start, 8, value)))
    else:
        struct.pack_into(end + "H", out, start, rng.choice((0, 1, 65535, count + 1)))
    return bytes(out)


def _tiff_directories(data: bytes, place: Place) -> bytes:
    """A chain of very many directories, or one in a ring."""
    count = place.rng.choice((100, 5000, 100_000))
    first = tiff_of(
        [
            (256, 4, [8]),
            (257, 4, [8]),
            (258, 3, [8]),
            (259, 3, [1]),
            (262, 3, [1]),
            (273, 4, [0]),
            (277, 3, [1]),
            (278, 4, [8]),
            (279, 4, [64]),
        ],
        bytes(64),
        64,
    )
    out = bytearray(first)
    struct.pack_into("<I", out, 8 + 2 + 12 * 9, len(first))
    place_of = len(first)
    entry = struct.pack("<HHHII", 1, 256, 4, 1, 8)
    for number in range(count):
        place_of += len(entry) + 4
        last = number == count - 1
        out += entry + struct.pack("<I", (8 if place.rng.random() < 0.5 else 0) if last else place_of)
    return bytes(out)


def _tiff_sides(data: bytes, place: Place) -> bytes:
    """Large declared sides in strips or tiles that are not there, of every depth and compression."""
    rng = place.rng
    width, height = _sides(rng)
    bits, form = rng.choice(((1, 1), (8, 1), (16, 1), (32, 1), (32, 3), (64, 3), (16, 3), (24, 1)))
    samples = rng.choice((1, 3, 4, 5, 65535))
    tags = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * min(samples, 6)),
        (259, 3, [rng.choice((1, 5, 7, 8, 32773, 34712, 50000, 50001, 2, 3, 4, 6, 34925))]),
    ]
    tags += [
        (262, 3, [rng.choice((0, 1, 2, 3, 5, 6, 8, 32803))]),
        (277, 3, [samples]),
        (284, 3, [rng.choice((1, 2))]),
        (339, 3, [form]),
    ]
    if rng.random() < 0.3:
        tags += [
            (322, 4, [rng.choice((16, 65536, 2**31))]),
            (323, 4, [rng.choice((16, 65536))]),
            (324, 4, [300]),
            (325, 4, [64]),
        ]
    else:
        tags += [
            (273, 4, [300]),
            (278, 4, [rng.choice((1, height, 2**32 - 1))]),
            (279, 4, [rng.choice((64, 2**32 - 1))]),
        ]
    return tiff_of(tags, rng.randbytes(400))


def _tiff_large(data: bytes, place: Place) -> bytes:
    """A large image that is all there and packs well: every depth takes only its due."""
    kind = place.rng.choice((np.float32, np.uint16, np.uint8, np.int32))
    out = io.BytesIO()
    image = Image.fromarray(np.zeros((3000, 4000), kind))
    image.save(out, "TIFF", compression="tiff_deflate")
    return out.getvalue()


# GIF, WebP, and others


def _gif_frames(data: bytes, place: Place) -> bytes:
    frame = b"\x2c\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0"
    return data[:-1] + frame * place.rng.choice((10, 3000, 60000)) + b";"


def _gif_screen(data: bytes, place: Place) -> bytes:
    width, height = (min(side, 65535) for side in _sides(place.rng))
    out = bytearray(data)
    struct.pack_into("<HH", out, 6, width, height)
    return bytes(out)


def _box(data: bytes, place: Place) -> bytes:
    """A size field of RIFF or of an ISO container set to an invalid value."""
    rng, out = place.rng, bytearray(data)
    names = (
        b"VP8 ",
        b"VP8L",
        b"VP8X",
        b"ANIM",
        b"ANMF",
        b"EXIF",
        b"ICCP",
        b"ALPH",
        b"ftyp",
        b"meta",
        b"iloc",
        b"iinf",
        b"iprp",
        b"ispe",
        b"mdat",
        b"av1C",
        b"moov",
        b"stsz",
        b"ihdr",
        b"jp2c",
        b"jp2h",
    )
    found = [(name, data.find(name)) for name in names if name in data]
    name, where = rng.choice(found)
    value = rng.choice((0, 1, 2, 8, 2**31, 2**32 - 1, 10**6))
    if data[:4] == b"RIFF":
        struct.pack_into("<I", out, where + 4, value)
    elif name == b"ispe" and rng.random() < 0.7:
        width, height = _sides(rng)
        struct.pack_into(">II", out, where + 8, width, height)
    else:
        struct.pack_into(">I", out, max(where - 4, 0), value)
    return bytes(out)


def _bmp_header(data: bytes, place: Place) -> bytes:
    out, rng = bytearray(data), place.rng
    width, height = _sides(rng)
    struct.pack_into("<ii", out, 18, width, rng.choice((height, -height)))
    struct.pack_into("<HI", out, 28, rng.choice((1, 4, 8, 16, 24, 32, 0, 64)), rng.choice((0, 1, 2, 3, 4, 6, 99)))
    struct.pack_into("<I", out, 46, rng.choice((0, 1, 256, 2**31, 2**32 - 1)))
    return bytes(out)


def _icon(data: bytes, place: Place) -> bytes:
    entries = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(data), 22) * place.rng.choice((1, 500))
    return struct.pack("<HHH", 0, 1, len(entries) // 16) + entries + data


def _ppm_header(data: bytes, place: Place) -> bytes:
    width, height = _sides(place.rng)
    kind, top = (
        place.rng.choice((b"P6", b"P5", b"P4", b"P3", b"P2", b"Pf", b"PF", b"P7")),
        place.rng.choice((b"255", b"65535", b"0", b"-1", b"1e9", b"99999999")),
    )
    return kind + b"\n%d %d\n" % (width, height) + top + b"\n" + data[-300:]


def _exif(data: bytes, place: Place) -> bytes:
    """Damage where the notes are."""
    found = max(data.find(b"Exif"), data.find(b"eXIf"), data.find(b"ICC"), 0)
    part = mutations.damaged(data[found : found + 200], place.rng)
    return data[:found] + part + data[found + 200 :]


def generate_png(place: Place) -> Case:
    """PNG and APNG."""
    return _generated(
        place,
        "png",
        {
            "header": _png_header,
            "chunks": _png_chunks,
            "chunks ": _png_chunks,
            "frames": _png_frames,
            **({"large": _png_bomb} if place.rng.random() < 0.1 else {}),
        },
    )


def generate_jpeg(place: Place) -> Case:
    """JPEG of every kind."""
    return _generated(
        place,
        "jpeg",
        {
            "size": _jpeg_size,
            "segments": _jpeg_segments,
            "exif": _exif,
            **({"scans": _jpeg_scans} if place.rng.random() < 0.3 else {}),
        },
    )


def generate_webp(place: Place) -> Case:
    """WebP."""
    return _generated(place, "webp", {"box": _box, "exif": _exif})


def generate_gif(place: Place) -> Case:
    """GIF."""
    return _generated(
        place, "gif", {"screen": _gif_screen, **({"frames": _gif_frames} if place.rng.random() < 0.3 else {})}
    )


def generate_tiff(place: Place) -> Case:
    """TIFF."""
    rare = {"directories": _tiff_directories, "large": _tiff_large} if place.rng.random() < 0.05 else {}
    return _generated(place, "tiff", {"entry": _tiff_entry, "entry ": _tiff_entry, "sides": _tiff_sides, **rare})


def generate_bmp(place: Place) -> Case:
    """BMP and icons."""
    return _generated(place, "bmp", {"header": _bmp_header, "icon": _icon})


def generate_avif(place: Place) -> Case:
    """AVIF, where this Pillow writes it."""
    return _generated(place, "avif" if _available("avif") else "webp", {"box": _box})


def generate_jpeg2000(place: Place) -> Case:
    """JPEG 2000."""
    return _generated(place, "jpeg2000", {"box": _box})


def generate_ppm(place: Place) -> Case:
    """PPM and other formats of Pillow's that are not everyday."""
    return _generated(place, "ppm", {"header": _ppm_header})


def generate_posing(place: Place) -> Case:
    """A file of another kind under an image's name."""
    rng = place.rng
    data = rng.choice(
        (
            *(
                b"",
                b"\0" * 1000,
                rng.randbytes(300),
                b"<html><body>404",
                b"%PDF-1.4\n1 0 obj",
                b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            ),
            *(
                b"version https://git-lfs.github.com/spec/v1\noid",
                b"hello\n" * 50,
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                b"GIF89a",
                b"\xff\xd8\xff",
                b"\x89PNG\r\n\x1a\n",
            ),
            *(
                mutations.zipped([mutations.stored("a.png", b"x")]),
                b"\x89HDF\r\n\x1a\n" + bytes(100),
                b"RIFF\xff\xff\xff\xffWEBP",
                b"\0\0\0\x20ftypheic" + bytes(80),
            ),
            *(
                b"\0\0\0\x20ftypavif" + bytes(80),
                b"/* XPM */\nstatic char",
                b"#define x_width 9999999\n#define x_height 9999999\n",
                b"8BPS\0\x01" + bytes(60),
                b"icns" + rng.randbytes(60),
            ),
        )
    )
    name = rng.choice(("image.png", "image.jpg", "image.tif", "image.webp", "\x1b[31m.png", "\u202egnp.jpg", "image"))
    if rng.random() < 0.05:
        return _unusual(place)
    return _case(place, name, data, f"{data[:12]!r} as {name!r}")


def _unusual(place: Place) -> Case:
    """A name that is no regular file."""
    path, what = place.folder / "image.png", place.rng.choice(("pipe", "folder", "dangling", "ring", "device"))
    if what == "pipe":
        __import__("os").mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling": "nowhere.png", "ring": "image.png", "device": "/dev/zero"}[what])
    return Case("image", path, f"a {what} as an image", IMAGE_CONSTANT)
