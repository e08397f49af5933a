"""Reading pictures: whatever people hand over becomes upright 8-bit RGB, or one message that says why not.

Decoding is careful: only the formats of photos are tried (never PostScript, which would run a program), the
size is judged from the header before a pixel is decoded, and everything that decoding changes is noted.
Colour profiles are not applied, as the loaders that networks are trained with don't apply them either.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from convscope.errors import ConvscopeError, PictureError, UsageError, nearest

MAX_PIXELS = 178_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "HEIF")
SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture.

    Attributes:
        name: the file's name without its suffix; "picture" where there is no file.
        pixels: (h, w, 3) uint8, RGB, upright, read-only.
        source: the path as it was given, None where there is no file.
        notes: what decoding changed, in words, such as "transparency laid over white".
        sha256: of the file's bytes, in hexadecimal; None where there is no file.
    """

    name: str
    pixels: np.ndarray
    source: str | None = None
    notes: tuple[str, ...] = ()
    sha256: str | None = None


Source = str | os.PathLike[str] | np.ndarray | Image.Image | Picture


def read_picture(source: Source) -> Picture:
    """Read one picture.

    Args:
        source: a path, a Pillow image, a uint8 array of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), or a
            `Picture`, which comes back as it is. Of an animation the first frame is read (of a Pillow image
            the frame that it stands at).

    Raises:
        PictureError: the file is missing, not a picture, damaged, or larger than `MAX_PIXELS`.
        UsageError: `source` is of another kind, or an array of another dtype or shape.
    """
    match source:
        case Picture():
            return source
        case np.ndarray():
            return _from_array(source)
        case Image.Image():
            return _from_image(source)
        case str() | os.PathLike():
            return _from_file(os.fsdecode(source))
    raise UsageError(
        "a picture has to be a path, a NumPy array (h, w, 3) of uint8 or a Pillow image, "
        f"but this is a {type(source).__name__}: turn it into one of them"
    )


def read_pictures(sources: Source | Iterable[Source]) -> list[Picture]:
    """Read every source, a folder standing for the pictures in it (in the order of their names).

    One source alone may be given without a list, and an array (n, h, w, c) stands for n pictures. Where two
    pictures have the same name, letter case aside, the later one is called `name-2`, then `name-3`.

    Raises:
        PictureError: some can't be read (the message lists each with its reason), or a folder holds none.
        UsageError: there is no source, or the only source is of a wrong kind.
    """
    results = list(_attempts(_listed(sources)))
    failures = [result for result in results if isinstance(result, ConvscopeError)]
    if len(results) == len(failures) == 1:
        raise failures[0]
    if failures:
        reasons = "".join(f"\n  - {failure}" for failure in failures)
        raise PictureError(f"{len(failures)} of {len(results)} pictures can't be read:{reasons}")
    if not results:
        raise UsageError("at least one picture is needed, but none was given: name a file or a folder")
    return _named_apart([result for result in results if isinstance(result, Picture)])


def read_those_that_can_be(sources: Source | Iterable[Source]) -> tuple[list[Picture], list[ConvscopeError]]:
    """What `read_pictures` reads, and why the others can't be read.

    Raises:
        PictureError: none can be read, with each one's reason.
    """
    results = list(_attempts(_listed(sources)))
    failures = [result for result in results if isinstance(result, ConvscopeError)]
    if len(failures) == len(results):
        return read_pictures(sources), []  # which raises
    return _named_apart([result for result in results if isinstance(result, Picture)]), failures


def fit(picture: Picture, height: int, width: int, channels: int) -> np.ndarray:
    """The whole picture as a network takes it: (height, width, channels) float32, values 0..255.

    The picture is stretched to the size, not cropped, so its aspect may change: bilinear, averaged over
    whole pixels where it shrinks. One channel is the luma of ITU-R BT.601.

    Raises:
        UsageError: `channels` is neither 1 nor 3, or the size is not positive.
    """
    if channels not in (1, 3):
        raise UsageError(
            f"a picture gives 1 channel (grey) or 3 (RGB), but the model takes {channels}: "
            "prepare an array of its shape yourself"
        )
    if height < 1 or width < 1:
        raise UsageError(f"a picture needs a size of at least 1 x 1, not {height} x {width}: give a larger one")
    image = Image.fromarray(picture.pixels).convert("L" if channels == 1 else "RGB")
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32).reshape(height, width, channels)


def batch(pictures: Sequence[Picture], height: int, width: int, channels: int) -> np.ndarray:
    """`fit` for each picture: (n, height, width, channels) float32, values 0..255."""
    out = np.empty((len(pictures), height, width, channels), np.float32)
    for row, picture in zip(out, pictures, strict=True):
        row[:] = fit(picture, height, width, channels)
    return out


# --- the kinds of source ---------------------------------------------------------------------------------


def _from_array(array: np.ndarray) -> Picture:
    wanted = "an array has to be uint8 0..255 of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)"
    if array.dtype != np.uint8:
        raise UsageError(
            f"{wanted}, but this one is {array.dtype}: scale it to 0..255 and convert it with astype('uint8')"
        )
    if array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise UsageError(f"{wanted}, but this one is {array.shape}: give one picture, channels last")
    flat = array[..., 0] if array.shape[2:] == (1,) else array
    return _from_image(Image.fromarray(np.ascontiguousarray(flat)))


def _from_image(image: Image.Image) -> Picture:
    with _one_message("this Pillow image"):
        pixels, notes = _decode(image, "this Pillow image")
    return Picture("picture", pixels, notes=notes)


def _from_file(path: str) -> Picture:
    with _open_file(path) as file, _one_message(repr(path)):
        with _identify(file, path) as image:
            pixels, notes = _decode(image, repr(path))
            notes = _frame_notes(image) + notes
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # The name goes into texts, and a file's name may hold bytes that are none.
    return Picture(Path(path).stem.encode("utf-8", "replace").decode(), pixels, path, notes, digest)


def _open_file(path: str) -> BufferedReader:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # asked before opening: opening a pipe would wait for ever
            return open(path, "rb")
    except FileNotFoundError:
        raise PictureError(f"there is no picture at {path!r}: {_missing_hint(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{path!r} can't be read ({reason}): check the path and its permissions") from error
    if stat.S_ISDIR(mode):
        raise PictureError(f"{path!r} should be one picture, but it is a folder: name a file in it")
    raise PictureError(f"{path!r} should be a picture file, but it is a device or a pipe: save it as a file")


def _missing_hint(path: str) -> str:
    if "://" in path:
        return "convscope does not download, so fetch it first and give the file"
    folder = Path(path).parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist either, so check the path"
    try:
        return nearest(Path(path).name, (file.name for file in _pictures_in(folder)))
    except PictureError:
        return "its folder holds no pictures, so check the path"


def _identify(file: BufferedReader, path: str) -> Image.Image:
    Image.init()
    try:
        return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        raise PictureError(
            f"{path!r} should be a picture (JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF), but it is {_kind(file.read(512))}"
        ) from None


def _kind(head: bytes) -> str:
    """What a file that is no picture seems to be, and what to do about it, from its first bytes."""
    lowered = head.lower().lstrip()
    if not head:
        return "empty (0 bytes): copy or download it again"
    if lowered.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file itself: run `git lfs pull`"
    if lowered.startswith((b"<!doctype html", b"<html")):
        return "a web page, as a failed download leaves behind: download it again"
    if b"<svg" in lowered:
        return "an SVG drawing: export it as PNG"
    if lowered.startswith((b"%pdf", b"%!ps")):
        return "a PDF or PostScript document: export it as PNG"
    if head[4:8] == b"ftyp":
        return "a HEIC photo, an AVIF or a film that can't be decoded here: convert it to JPEG or PNG"
    if head.isascii() and b"\0" not in head:
        return "text: give the picture itself"
    return "in another format, or damaged from its start on: convert it to JPEG or PNG, or copy it again"


@contextmanager
def _one_message(what: str) -> Iterator[None]:
    """Turn whatever a decoder throws into one PictureError; its warnings are of no use to the reader."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ConvscopeError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(what, str(error)) from error
    except MemoryError as error:
        raise _too_large(what, "it does not fit in the memory") from error
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        raise PictureError(
            f"{what} should be a whole picture, but it is damaged or cut short (Pillow says: {error}): "
            "copy or download it again, or save it anew as PNG"
        ) from error


def _too_large(what: str, found: str) -> PictureError:
    limit = f"at most {MAX_PIXELS // 1_000_000} million pixels are read"
    return PictureError(f"{what} is too large to decode safely, {limit} ({found}): make a smaller copy")


# --- from a Pillow image to upright RGB ------------------------------------------------------------------


def _decode(image: Image.Image, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(what, f"its header says {width} x {height}")
    if not width * height:
        raise PictureError(f"{what} should hold pixels, but it is {width} x {height}: make it anew")
    before = _orientation(image)
    image.load()
    after = _orientation(image)  # PNG tells it only now, and TIFF has been turned by now
    rgb, notes = _to_rgb(image)
    if after in _TURNS:
        rgb = rgb.transpose(_TURNS[after])
    if before in _TURNS or after in _TURNS:
        notes = (*notes, "turned upright by its EXIF orientation")
    pixels = np.array(rgb)
    pixels.setflags(write=False)
    return pixels, notes


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged note is no reason to refuse the pixels
        return 1


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if image.mode == "F" or image.mode.startswith("I"):
        levels, note = _grey_levels(np.asarray(image))
        return Image.fromarray(levels).convert("RGB"), (note,)
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    same = image.mode in ("RGB", "RGBX", "L", "P", "1")
    return image.convert("RGB"), () if same else (f"{image.mode} converted to RGB",)


def _over_white(rgba: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB"), ()
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), ("transparency laid over white",)


def _grey_levels(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Grey of more than 8 bits as (h, w) uint8, and what was done.

    The range is the smallest usual one that holds all values, so that pictures of one kind stay comparable;
    where none does, the values are stretched from their minimum to their maximum.
    """
    usual = (255, 65535) if np.issubdtype(values.dtype, np.integer) else (1, 255)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    ceiling = next((top for top in usual if low >= 0 and high <= top), None)
    note = {
        1: "floating-point grey scaled from 0..1 to 8 bits",
        255: "grey of more than 8 bits kept as it is, for its values fit 0..255",
        65535: "16-bit grey scaled to 8 bits",
    }.get(ceiling or 0, f"grey stretched from {low:g}..{high:g} to 8 bits")
    low, high = (low, high) if ceiling is None else (0, ceiling)
    levels = (values - low) * (255 / ((high - low) or 1))
    return np.rint(levels).astype(np.uint8), note


def _frame_notes(image: Image.Image) -> tuple[str, ...]:
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # counting walks through the later frames, and one of them is damaged
        return ("first of several frames",)
    return (f"first of {frames} frames",) if frames > 1 else ()


# --- many pictures ---------------------------------------------------------------------------------------


def _listed(sources: Source | Iterable[Source]) -> Iterable[Source]:
    if isinstance(sources, np.ndarray) and sources.ndim == 4:
        return list(sources)
    if isinstance(sources, (str, os.PathLike, np.ndarray)) or not isinstance(sources, Iterable):
        return [sources]
    return sources


def _attempts(sources: Iterable[Source]) -> Iterator[Picture | ConvscopeError]:
    for source in sources:
        try:
            members = _members(source)
        except PictureError as error:
            yield error
            continue
        for member in members:
            try:
                yield read_picture(member)
            except (PictureError, UsageError) as error:
                yield error


def _members(source: Source) -> Sequence[Source]:
    is_folder = isinstance(source, (str, os.PathLike)) and os.path.isdir(source)
    return _pictures_in(Path(source)) if is_folder else [source]  # type: ignore[arg-type]


def _pictures_in(folder: Path) -> list[Path]:
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    except OSError as error:
        raise PictureError(
            f"the folder {str(folder)!r} can't be read ({error.strerror}): check its permissions"
        ) from error
    files = [path for path in files if not path.name.startswith(".")]  # macOS leaves ._cat.jpg beside cat.jpg
    if not files:
        raise PictureError(
            f"the folder {str(folder)!r} should hold pictures (.jpg, .png, .webp, ...), but it holds none; "
            "folders inside it are not searched: name a folder that holds pictures"
        )
    return sorted(files, key=lambda path: (path.name.lower(), path.name))


def _named_apart(pictures: Sequence[Picture]) -> list[Picture]:
    taken = {picture.name.casefold() for picture in pictures}
    seen: set[str] = set()
    out = []
    for picture in pictures:
        name, count = picture.name, 2
        if name.casefold() in seen:
            while (name := f"{picture.name}-{count}").casefold() in taken:
                count += 1
            taken.add(name.casefold())
        seen.add(name.casefold())
        out.append(picture if name == picture.name else replace(picture, name=name))
    return out
