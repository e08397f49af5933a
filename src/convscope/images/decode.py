"""Reading images: every supported input becomes upright 8-bit RGB, or one error message with the reason.

Decoding is careful: only a few image formats are tried (never PostScript, which would run a program), the
size is judged from the header before a pixel is decoded, and everything that decoding changes is noted.
Colour profiles are not applied, as the loaders that networks are trained with don't apply them either.

A file is decoded in the reader process (`isolation`), with limits on time and memory that its declared size gives, and
by Pillow's own decoders: plugins that the user has registered are not used there. A Pillow image that the user hands
over is decoded in the user's process, where no limit on time can be set.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from convscope import isolation, limits, reading
from convscope.errors import ConvscopeError, ImageError, Unreadable, UsageError, nearest

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
_LYING = (5, 6, 7, 8)  # the stored rows are the columns of the upright image
_FROM_THE_END = (3, 4, 6, 7)  # its first stored row is the last one of these


@dataclass(frozen=True, eq=False)
class InputImage:
    """A decoded image.

    Attributes:
        name: the file's name without its suffix; "picture" where there is no file.
        pixels: (h, w, 3) uint8, RGB, upright, read-only.
        source: the path as it was given, None where there is no file.
        notes: descriptions of the changes by decoding, such as "transparency laid over white".
        sha256: of the file's bytes, in hexadecimal; None where there is no file.
        label: the class that it is known to show; None where that is not known.

    Example:
        >>> image = read_image(PHOTOS[0])
        >>> image.name, image.pixels.dtype.name, image.pixels.ndim
        ('cat', 'uint8', 3)
    """

    name: str
    pixels: np.ndarray
    source: str | None = None
    notes: tuple[str, ...] = ()
    sha256: str | None = None
    label: str | None = None


Shape = tuple[int, int, int]
Source = str | os.PathLike[str] | np.ndarray | Image.Image | InputImage


def read_image(source: Source) -> InputImage:
    """Read one image.

    Args:
        source: a path, a Pillow image, a uint8 array of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), or a
            `InputImage`, which comes back as it is. Of an animation the first frame is read (of a Pillow image
            the frame that it stands at).

    Raises:
        ImageError: the file is missing, not an image, damaged, or larger than the limits allow.
        UsageError: `source` is of another kind, or an array of another dtype or shape.

    Example:
        >>> read_image(np.zeros((8, 6, 3), np.uint8)).pixels.shape
        (8, 6, 3)
    """
    match source:
        case InputImage():
            return source
        case np.ndarray():
            return _from_array(source)
        case Image.Image():
            return _from_image(source)
        case str() | os.PathLike():
            (image,) = _from_files([os.fsdecode(source)])
            if isinstance(image, ConvscopeError):
                raise image
            return image
    raise UsageError(
        "an image has to be a path, a NumPy array (h, w, 3) of uint8 or a Pillow image, "
        f"but this is a {type(source).__name__}: turn it into one of them",
        code="image-kind",
        found=type(source).__name__,
    )


def read_images(sources: Source | Iterable[Source]) -> list[InputImage]:
    """Read every source, a folder standing for the images in it (in the order of their names).

    One source alone may be given without a list, and an array (n, h, w, c) stands for n images. Where two
    images have the same name, letter case aside, the later one is called `name-2`, then `name-3`.

    Raises:
        ImageError: some can't be read (the message lists each with its reason), or a folder holds none.
        UsageError: there is no source, or the only source is of a wrong kind.

    Example:
        >>> [image.name for image in read_images(PHOTOS[:2])]
        ['cat', 'coffee']
    """
    results = list(_attempts(listed(sources)))
    failures = [result for result in results if isinstance(result, ConvscopeError)]
    if len(results) == len(failures) == 1:
        raise failures[0]
    if failures:
        reasons = "".join(f"\n  - {failure.message}" for failure in failures)
        raise ImageError(
            f"{len(failures)} of {len(results)} images can't be read:{reasons}",
            code="images-unreadable",
            count=len(failures),
        )
    if not results:
        raise UsageError("at least one image is needed, but none was given: name a file or a folder", code="no-images")
    return _named_apart([result for result in results if isinstance(result, InputImage)])


def read_readable_images(sources: Source | Iterable[Source]) -> tuple[list[InputImage], list[ConvscopeError]]:
    """The images that `read_images` reads, and the reasons why the others can't be read.

    Raises:
        ImageError: none can be read, with each one's reason.
    """
    results = list(_attempts(listed(sources)))
    failures = [result for result in results if isinstance(result, ConvscopeError)]
    if len(failures) == len(results):
        return read_images(sources), []  # which raises
    return _named_apart([result for result in results if isinstance(result, InputImage)]), failures


def fit(image: InputImage, height: int, width: int, channels: int) -> np.ndarray:
    """The whole image as a network takes it: (height, width, channels) float32, values 0..255.

    The image is stretched to the size, not cropped, so its aspect may change: bilinear, averaged over
    whole pixels where it shrinks. One channel is the luma of ITU-R BT.601.

    Raises:
        UsageError: `channels` is neither 1 nor 3, or the size is not positive.

    Example:
        >>> fit(read_image(PHOTOS[0]), 32, 48, channels=1).shape
        (32, 48, 1)
    """
    if channels not in (1, 3):
        raise UsageError(
            f"an image gives 1 channel (grey) or 3 (RGB), but the model takes {channels}: "
            "prepare an array of its shape yourself",
            code="channels-misfit",
            found=channels,
        )
    if height < 1 or width < 1:
        raise UsageError(
            f"an image needs a size of at least 1 x 1, not {height} x {width}: give a larger one",
            code="image-empty",
            size=[height, width],
        )
    return _fitted(image.pixels, height, width, channels).astype(np.float32).reshape(height, width, channels)


def _fitted(pixels: np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
    """Pixels `(h, w, 3)` uint8 resized to `(height, width)` of grey, or `(height, width, 3)`; uint8."""
    decoded = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    return np.asarray(decoded.resize((width, height), Image.Resampling.BILINEAR))


def fit_batch(images: Sequence[InputImage], height: int, width: int, channels: int) -> np.ndarray:
    """`fit` for each image: (n, height, width, channels) float32, values 0..255."""
    out = np.empty((len(images), height, width, channels), np.float32)
    for row, image in zip(out, images, strict=True):
        row[:] = fit(image, height, width, channels)
    return out


# --- the kinds of source ---------------------------------------------------------------------------------


def _from_array(array: np.ndarray) -> InputImage:
    wanted = "an array has to be uint8 0..255 of shape (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)"
    if array.dtype != np.uint8:
        raise UsageError(
            f"{wanted}, but this one is {array.dtype}: scale it to 0..255 and convert it with astype('uint8')",
            code="image-kind",
            found=str(array.dtype),
        )
    if array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise UsageError(
            f"{wanted}, but this one is {array.shape}: give one image, channels last",
            code="image-kind",
            found=list(array.shape),
        )
    flat = array[..., 0] if array.shape[2:] == (1,) else array
    return _from_image(Image.fromarray(np.ascontiguousarray(flat)))


def _from_image(image: Image.Image) -> InputImage:
    with _one_message("this Pillow image"):
        pixels, notes = _decode(image, "this Pillow image")
    return InputImage("picture", pixels, notes=notes)


def decode_files(
    paths: Sequence[str], shape: Shape | None, reader: isolation.Reader
) -> list[InputImage | ConvscopeError]:
    """Each file's image, or why it can't be read.

    Args:
        paths: of files; not of folders.
        shape: `(height, width, channels)` that the network takes, to which the images are shrunk or enlarged as they
            are decoded (see `decode_file`); their own size where None.
        reader: the process that decodes.
    """
    return list(_from_files(paths, shape, reader.each))


def _from_files(
    paths: Sequence[str], shape: Shape | None = None, each: Callable[..., list[object]] | None = None
) -> Iterator[InputImage | ConvscopeError]:
    asked = [(reading.real(path), path, *(() if shape is None else (list(shape),))) for path in paths]
    answers = (each or isolation.each)("convscope.images.decode:decode_file", asked)
    return (_decoded(path, answer) for path, answer in zip(paths, answers, strict=True))


def _decoded(path: str, answer: isolation.Sent) -> InputImage | ConvscopeError:
    if isinstance(answer, isolation.ReaderError):
        return _not_decoded(path, answer)
    if isinstance(answer, ConvscopeError):
        return answer
    answer["pixels"].setflags(write=False)
    # The name goes into texts, and a file's name may hold bytes that are none.
    name = Path(path).stem.encode("utf-8", "replace").decode()
    return InputImage(name, answer["pixels"], path, tuple(answer["notes"]), answer["sha256"])


def _not_decoded(path: str, error: isolation.ReaderError) -> ImageError:
    if error.kind == "time":
        share = limits.how_to_raise("seconds")
        found = f"decoding it takes longer than an image of its size may (a share of {share}): save it anew as PNG"
    elif error.kind == "memory":
        found = "decoding it takes more memory than an image of its size should: save it anew as PNG"
    else:
        found = f"it is damaged so badly that its decoder fails ({error}): copy it again, or save it anew as PNG"
    return ImageError(f"{path!r} should be a whole image, but {found}", code=error.code, path=path)


# --- in the reader ---------------------------------------------------------------------------------------

MAX_SCANS = 100  # of a JPEG: files that people make have about ten, and each takes as long as a whole image
MAX_FRAMES = 10_000  # that are counted
_HEADER_MEMORY = 256 * 2**20  # limit of opening a file and of decoding a small one
_PIXEL_MEMORY = 32  # bytes: openjpeg, which takes most, has needed 22 for RGB; the other decoders need 6 to 18


DRAFT = 2  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is this many times the wanted size a side


def decode_file(where: str, path: str, shape: Sequence[int] | None = None) -> dict[str, object]:
    """Pixels, notes and hash of an image file, read once. Runs in the reader.

    With a `shape` the pixels are what `fit` makes of the image, as uint8. Of a JPEG that is much larger, the decoder
    makes a smaller image at once (libjpeg's scaling of the DCT), which is then resized: close to `fit`, not equal.

    Args:
        where: its absolute path.
        path: as it was given, for messages.
        shape: `(height, width, channels)` that the network takes; the image keeps its size where None.

    Raises:
        ImageError: the file is missing, not an image, damaged, or larger than the limits allow.
    """
    data = _bytes(where, path)
    with _one_message(repr(path)), isolation.bounded(_HEADER_MEMORY), _identify(data, path) as image:
        _check_size(image, repr(path))
        _check_scans(image, data, path)
        Image.MAX_IMAGE_PIXELS = (limits.current().pixels + 1) // 2  # twice as many are refused, also while decoding
        stored = image.size
        with _enough_for(image):
            if shape is not None:
                _draft(image, shape)
            pixels, notes = _decode(image, repr(path))
            if shape is not None:
                pixels, notes = _shrunk(pixels, shape), (*notes, _size_note(stored, shape))
        notes = _frame_notes(image, data) + notes
    return {"pixels": pixels, "notes": notes, "sha256": hashlib.sha256(data).hexdigest()}


def _draft(image: Image.Image, shape: Sequence[int]) -> None:
    if image.format in ("JPEG", "MPO"):
        height, width = (DRAFT * side for side in shape[:2])
        image.draft(image.mode, (height, width) if _orientation(image) in _LYING else (width, height))


def _shrunk(pixels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    fitted = _fitted(pixels, *shape)
    return fitted if fitted.ndim == 3 else np.stack([fitted] * 3, axis=-1)


def _size_note(stored: tuple[int, int], shape: Sequence[int]) -> str:
    return f"resized to {shape[0]} x {shape[1]} as it was decoded, from {stored[1]} x {stored[0]}"


def _bytes(where: str, path: str) -> bytes:
    try:
        return reading.bytes_of(where, "file")
    except Unreadable as error:
        if error.code == "file-missing":
            raise ImageError(
                f"there is no image at {path!r}: {_missing_hint(path, where)}", code="file-missing", path=path
            ) from None
        if error.code == "is-folder":
            raise ImageError(
                f"{path!r} should be one image, but it is a folder: name a file in it", code="is-folder", path=path
            ) from None
        if error.code == "no-regular-file":
            raise ImageError(
                f"{path!r} should be an image file, but it is a device or a pipe: save it as a file",
                code="no-regular-file",
                path=path,
            ) from None
        raise ImageError(
            f"{path!r} can't be read ({error.message}): check the path and its permissions",
            code=error.code,
            path=path,
            **error.data,
        ) from None


def _missing_hint(path: str, where: str) -> str:
    if "://" in path:
        return "convscope does not download, so fetch it first and give the file"
    folder = Path(where).parent
    if not folder.is_dir():
        return f"the folder {str(Path(path).parent)!r} does not exist either, so check the path"
    try:
        return nearest(Path(path).name, (file.name for file in images_in(folder)))
    except ImageError:
        return "its folder holds no images, so check the path"


@contextmanager
def _enough_for(image: Image.Image) -> Iterator[None]:
    """Time and memory for the pixels that the header declares: half of the time, and a share of the other half.

    The slowest format needs 0.3 s for a million pixels (JPEG 2000), so half a minute is enough for any image, also
    where the machine has other work, and only the largest images need more.
    """
    pixels, limit = image.width * image.height, limits.current()
    more = pixels * _PIXEL_MEMORY
    seconds = limit.seconds * (0.5 + 0.5 * pixels / limit.pixels)
    with isolation.bounded(_HEADER_MEMORY + more if more > _HEADER_MEMORY / 4 else None, seconds):
        yield


@cache
def _plugins() -> tuple[str, ...]:
    """The formats that are there. Only their decoders are loaded."""
    for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP", "Avif", "Jpeg2K"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{name}ImagePlugin")
    with contextlib.suppress(ImportError, AttributeError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 4  # each takes address space, of which there is a limit
    return tuple(known for known in FORMATS if known in Image.OPEN)


def _identify(data: bytes, path: str) -> Image.Image:
    formats = _plugins()
    if data[4:8] == b"ftyp" and importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
        formats = FORMATS
    Image.MAX_IMAGE_PIXELS = None  # `_check_size` is stricter, and has a better message
    try:
        return Image.open(BytesIO(data), formats=[known for known in formats if known in Image.OPEN])
    except UnidentifiedImageError:
        raise ImageError(
            f"{path!r} should be an image (JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF), but it is {_kind(data[:512])}",
            code="not-an-image",
            path=path,
        ) from None


def _kind(head: bytes) -> str:
    """The probable kind of a file that is no image, from its first bytes, and the remedy."""
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
        return "a HEIC image, an AVIF or a film that can't be decoded here: convert it to JPEG or PNG"
    if head.isascii() and b"\0" not in head:
        return "text: give the image itself"
    return "in another format, or damaged from its start on: convert it to JPEG or PNG, or copy it again"


@contextmanager
def _one_message(what: str) -> Iterator[None]:
    """Turn whatever a decoder throws into one ImageError; its warnings are of no use to the reader."""
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
        raise ImageError(
            f"{what} should be a whole image, but it is damaged or cut short (Pillow says: {error}): "
            "copy or download it again, or save it anew as PNG",
            code="file-damaged",
            path=what.strip("'"),
            reason=str(error),
        ) from error


def _too_large(what: str, found: str) -> ImageError:
    most = limits.current().pixels
    limit = f"at most {most // 1_000_000} million" if most >= 1_000_000 else f"at most {most}"
    return ImageError(
        f"{what} is too large to decode safely, {limit} pixels are read ({found}; {limits.how_to_raise('pixels')}): "
        "make a smaller copy",
        code="input-too-large",
        limit="pixels",
    )


# --- from a Pillow image to upright RGB ------------------------------------------------------------------

STRIP = 2**20  # pixels that are converted at a time: the memory for it does not grow with the image


def _check_size(image: Image.Image, what: str) -> None:
    width, height = image.size
    if width * height > limits.current().pixels:
        raise _too_large(what, f"its header says {width} x {height}")
    if not width * height:
        raise ImageError(
            f"{what} should hold pixels, but it is {width} x {height}: make it anew",
            code="image-empty",
            size=[height, width],
        )


def _decode(image: Image.Image, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    _check_size(image, what)
    before = _orientation(image)
    image.load()
    after = _orientation(image)  # PNG has it only now, and TIFF has been turned by now
    to_rgb, notes = _converter(image)
    pixels = _upright(image, to_rgb, after)
    if before in _TURNS or after in _TURNS:
        notes.append("turned upright by its EXIF orientation")
    pixels.setflags(write=False)
    return pixels, tuple(notes)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged note is no reason to refuse the pixels
        return 1


def _upright(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image], orientation: int) -> np.ndarray:
    """All strips converted, each turned and put where it belongs."""
    turn, height = _TURNS.get(orientation), image.height
    if image.width * height <= STRIP:  # no copy
        rgb = to_rgb(image)
        return np.asarray(rgb if turn is None else rgb.transpose(turn))
    out = np.empty((image.width, height, 3) if orientation in _LYING else (height, image.width, 3), np.uint8)
    for start, strip in _strips(image):
        rgb = to_rgb(strip)
        stop = start + rgb.height
        rows = slice(height - stop, height - start) if orientation in _FROM_THE_END else slice(start, stop)
        place = out[:, rows] if orientation in _LYING else out[rows]
        place[:] = np.asarray(rgb if turn is None else rgb.transpose(turn))
    return out


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of full width from top to bottom, with their first rows."""
    rows = max(1, STRIP // image.width)
    for start in range(0, image.height, rows):
        yield start, image.crop((0, start, image.width, min(start + rows, image.height)))


def _converter(image: Image.Image) -> tuple[Callable[[Image.Image], Image.Image], list[str]]:
    """A function from a strip of this image to RGB, and its notes; the list is complete when all strips are done."""
    if image.mode == "F" or image.mode.startswith("I"):
        scale, note = _grey_levels(image)
        return scale, [note]
    notes: list[str] = []
    if image.has_transparency_data:
        return lambda strip: _over_white(strip.convert("RGBA"), notes), notes
    if image.mode not in ("RGB", "RGBX", "L", "P", "1"):
        notes.append(f"{image.mode} converted to RGB")
    return lambda strip: strip if strip.mode == "RGB" else strip.convert("RGB"), notes


def _over_white(rgba: Image.Image, notes: list[str]) -> Image.Image:
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    if not notes:
        notes.append("transparency laid over white")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_levels(image: Image.Image) -> tuple[Callable[[Image.Image], Image.Image], str]:
    """How grey of more than 8 bits becomes 8 bits, with a note for the user.

    The range is the smallest usual one that holds all values, so that images of one kind stay comparable;
    where none does, the values are stretched from their minimum to their maximum.
    """
    usual = (1, 255) if image.mode == "F" else (255, 65535)
    ends = [(values.min(), values.max()) for values in (_wide(strip) for _, strip in _strips(image))]
    low, high = float(min(end[0] for end in ends)), float(max(end[1] for end in ends))
    ceiling = next((top for top in usual if low >= 0 and high <= top), None)
    note = {
        1: "floating-point grey scaled from 0..1 to 8 bits",
        255: "grey of more than 8 bits kept as it is, for its values fit 0..255",
        65535: "16-bit grey scaled to 8 bits",
    }.get(ceiling or 0, f"grey stretched from {low:g}..{high:g} to 8 bits")
    low, high = (low, high) if ceiling is None else (0, ceiling)
    factor = 255 / ((high - low) or 1)

    def scaled(strip: Image.Image) -> Image.Image:
        levels = np.rint((_wide(strip) - low) * factor).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")

    return scaled, note


def _wide(strip: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(strip).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


# --- sizes that are checked before decoding --------------------------------------------------------------


def _check_scans(image: Image.Image, data: bytes, path: str) -> None:
    """A JPEG of many scans takes the time of as many images."""
    if image.format not in ("JPEG", "MPO") or data.count(b"\xff\xda") <= MAX_SCANS:
        return  # the common case in the time that finding two bytes takes
    if (scans := _scans(data)) > MAX_SCANS:
        raise ImageError(
            f"{path!r} should be an image, but it is a JPEG of {scans} scans or more, and at most {MAX_SCANS} are "
            "decoded: save it anew as PNG",
            code="input-too-large",
            found=scans,
            expected=MAX_SCANS,
        )


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


def _scans(data: bytes) -> int:
    """How many scans the first image of a JPEG file has, counted to one more than `MAX_SCANS`."""
    at, count = 2, 0
    while count <= MAX_SCANS and (found := _MARKER.search(data, at)):
        kind, at = found[1][0], found.end()
        if kind == 0xD9:
            break
        if len(data) < at + 2:
            break
        count += kind == 0xDA
        at += 0 if kind == 0x01 else struct.unpack_from(">H", data, at)[0]
    return count


def _frame_notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """Pillow counts the frames of a GIF and the directories of a TIFF by reading each: there is a shorter way."""
    counted = {"TIFF": _tiff_frames, "GIF": _gif_frames}.get(image.format or "")
    try:
        frames = counted(data) if counted else getattr(image, "n_frames", 1)
    except (Exception, struct.error):  # one of the later frames is damaged
        return ("first of several frames",)
    if frames > MAX_FRAMES:
        return (f"first of more than {MAX_FRAMES} frames",)
    return (f"first of {frames} frames",) if frames > 1 else ()


def _tiff_frames(data: bytes) -> int:
    """The directories of a TIFF, each of which names the place of the next; counted to one more than `MAX_FRAMES`."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    place, count, entry = ("Q", "Q", 20) if big else ("L", "H", 12)
    (at,) = struct.unpack_from(order + place, data, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen and len(seen) <= MAX_FRAMES:
        seen.add(at)
        (entries,) = struct.unpack_from(order + count, data, at)
        (at,) = struct.unpack_from(order + place, data, at + struct.calcsize(order + count) + entries * entry)
    return len(seen)


def _gif_frames(data: bytes) -> int:
    """The frames of a GIF; counted to one more than `MAX_FRAMES`."""
    at, frames = 13 + _table(data[10]), 0
    while frames <= MAX_FRAMES and at < len(data) and data[at : at + 1] != b";":
        kind = data[at : at + 1]
        if kind == b"!":
            at = _after_blocks(data, at + 2)
        elif kind == b",":
            frames += 1
            at = _after_blocks(data, at + 11 + _table(data[at + 9]))
        else:
            at += 1
    return frames


def _table(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while length := data[at]:
        at += length + 1
    return at + 1


# --- many images ---------------------------------------------------------------------------------------


def listed(sources: Source | Iterable[Source]) -> Iterable[Source]:
    """The sources one by one: one alone stands for a list of it, and an array `(n, h, w, c)` for n images."""
    if isinstance(sources, np.ndarray) and sources.ndim == 4:
        return list(sources)
    if isinstance(sources, (str, os.PathLike, np.ndarray)) or not isinstance(sources, Iterable):
        return [sources]
    return sources


def _attempts(sources: Iterable[Source]) -> Iterator[InputImage | ConvscopeError]:
    listed = [member for source in sources for member in _members(source)]
    files = _from_files([os.fsdecode(member) for member in listed if isinstance(member, str | os.PathLike)])
    for member in listed:
        yield next(files) if isinstance(member, str | os.PathLike) else _attempt(member)


def _attempt(source: Source | ConvscopeError) -> InputImage | ConvscopeError:
    try:
        return source if isinstance(source, ConvscopeError) else read_image(source)
    except (ImageError, UsageError) as error:
        return error


def _members(source: Source) -> Sequence[Source | ConvscopeError]:
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return [source]
    try:
        return images_in(Path(source))
    except ImageError as error:
        return [error]


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
    return path.suffix.lower() in SUFFIXES and path.is_file()


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder, as `files_in` lists them.

    Raises:
        ImageError: there is none, or the folder can't be read.
    """
    files = list(filter(is_image_file, files_in(folder)))
    if not files:
        raise ImageError(
            f"the folder {str(folder)!r} should hold images (.jpg, .png, .webp, ...), but it holds none; "
            "folders inside it are not searched: name a folder that holds images",
            code="no-images",
            path=str(folder),
        )
    return files


def different(names: Sequence[str]) -> list[str]:
    """Names that differ without regard to case: a name that was there before gets a number.

    >>> different(["cat", "dog", "Cat", "cat-2"])
    ['cat', 'dog', 'Cat-3', 'cat-2']
    """
    taken, seen = {name.casefold() for name in names}, set[str]()
    numbers: dict[str, int] = {}
    found = []
    for name in names:
        free = name
        while free.casefold() in (taken if free != name else seen):
            numbers[name] = numbers.get(name, 1) + 1
            free = f"{name}-{numbers[name]}"
        taken.add(free.casefold())
        seen.add(free.casefold())
        found.append(free)
    return found


def _named_apart(images: Sequence[InputImage]) -> list[InputImage]:
    names = different([image.name for image in images])
    return [
        image if name == image.name else replace(image, name=name) for image, name in zip(images, names, strict=True)
    ]
