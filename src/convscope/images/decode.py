"""Reading images: every supported input becomes an upright image, or one error message with the reason.

Decoding is careful: only a few image formats are tried (never PostScript, which would run a program), the
size is judged from the header before a pixel is decoded, and everything that decoding changes is noted.
Colour profiles are not applied, as the loaders that networks are trained with don't apply them either.

A file is decoded in the reader process (`isolation`), with limits on time and memory that its declared size gives, and
by Pillow's own decoders: plugins that the user has registered are not used there. The bytes of a file are decoded like
the file. A Pillow image that the user hands over is decoded in the user's process, where no limit on time can be set.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from convscope import arrays, isolation, limits, reading
from convscope.errors import ConvscopeError, ImageError, Unreadable, UsageError, bulleted, nearest
from convscope.images import guards, memory, scans, tiff
from convscope.images.image import InputImage, Shape, fit, fitted
from convscope.images.kinds import Kind, address_of, is_raw_suffix, kind_of, raw_photo
from convscope.images.listing import Entry, all_entries, different, no_images, some_images_in
from convscope.images.upright import LYING, TURNED, TURNS, orientation_of, turned_upright, upright
from convscope.images.values import Decoded, Meaning, of_channels, range_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "HEIF")
READ = "JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or .npy"

Source = str | os.PathLike[str] | memory.ArrayLike | memory.Encoded | Image.Image | InputImage


def read_image(source: Source) -> InputImage:
    """Read one image.

    Args:
        source: a path; the bytes of a file, or an open file; a Pillow image; an array or a tensor of any library, of
            shape (h, w), (h, w, c) or (c, h, w) with up to 16 channels, of uint8, of whole numbers of more bits, of
            floats 0..1 (or 0..255), or boolean; or an `InputImage`, which comes back as it is. Four channels of an
            array are RGB with opacity. Of an animation the first frame is read (of a Pillow image the frame that it
            stands at).

    Raises:
        ImageError: the file is missing, not an image, damaged, or larger than the limits allow.
        UsageError: `source` is of another kind, or an array of another shape or range.

    Example:
        >>> read_image(np.zeros((8, 6, 3), np.uint8)).pixels.shape
        (8, 6, 3)
    """
    if isinstance(source, InputImage):
        return source
    if isinstance(source, str | os.PathLike):
        (image,) = decoded_files([os.fsdecode(source)])
        if isinstance(image, ConvscopeError):
            raise image
        return image
    if isinstance(source, Image.Image):
        return _in_memory(memory.NAME, _from_pillow(source))
    if memory.is_encoded(source):
        return _from_bytes(memory.encoded(source), memory.name_of(source))
    found = memory.decoded(source)
    if found is not None:
        guards.check_size(found.pixels.shape[1], found.pixels.shape[0], "this array")
        return _in_memory(memory.NAME, found)
    raise UsageError(
        "an image has to be a path, an array (h, w, 3), a Pillow image or the bytes of a file, "
        f"but this is a {type(source).__name__}: turn it into one of them",
        code="image-kind",
        found=type(source).__name__,
    )


def read_images(sources: Source | Iterable[Source]) -> list[InputImage]:
    """Read every source.

    A folder stands for the images in it (in the order of their names), or for those of its subfolders, which are their
    classes; a `.csv` file for the images of its column `path`. One source alone may be given without a list, and a
    batch (n, h, w, c) stands for n images. Where two images have the same name, letter case aside, the later one is
    called `name-2`, then `name-3`.

    Raises:
        ImageError: some can't be read (the message lists the first with their reasons), or a folder holds none.
        UsageError: there is no source, or the only source is of a wrong kind.

    Example:
        >>> [image.name for image in read_images(PHOTOS[:2])]
        ['cat', 'coffee']
    """
    found, failures = _read(sources)
    if failures and not found and len(failures) == 1:
        raise failures[0]
    if failures:
        shown = bulleted([failure.message for failure in failures], MOST_SHOWN)
        raise ImageError(
            f"{len(failures)} of {len(failures) + len(found)} images can't be read:{shown}",
            code="images-unreadable",
            count=len(failures),
        )
    if not found:
        raise no_images()
    return found


def read_readable_images(sources: Source | Iterable[Source]) -> tuple[list[InputImage], list[ConvscopeError]]:
    """The images that `read_images` reads, and the reasons why the others can't be read.

    Raises:
        ImageError: none can be read, with each one's reason.
    """
    found, failures = _read(sources)
    return (found, failures) if found else (read_images(sources), [])  # which raises


MOST_SHOWN = 10  # failures that a message names


def _read(sources: Source | Iterable[Source]) -> tuple[list[InputImage], list[ConvscopeError]]:
    found: list[InputImage] = []
    failures: list[ConvscopeError] = []
    for image in read_entries(list(all_entries(sources))):
        if isinstance(image, ConvscopeError):
            failures.append(image)
        else:
            found.append(image)
    names = different([image.name for image in found])
    return [
        image if name == image.name else replace(image, name=name) for image, name in zip(found, names, strict=True)
    ], failures


def read_entries(
    entries: Sequence[Entry | ConvscopeError], shape: Shape | None = None, reader: isolation.Reader | None = None
) -> Iterator[InputImage | ConvscopeError]:
    """The images of entries with their names and labels, or why they can't be read.

    Args:
        entries: of a list; what is none any more is passed on.
        shape: `(height, width, channels)` that the network takes, to which the images are shrunk or enlarged as they
            are decoded (see `decode_file`); their own size where None.
        reader: the process that decodes files; the one that all share where None.
    """
    paths = [entry.path for entry in entries if isinstance(entry, Entry) and entry.path is not None]
    files = decoded_files(paths, shape, reader) if paths else iter(())
    for entry in entries:
        if isinstance(entry, ConvscopeError):
            yield entry
            continue
        image = next(files) if entry.path is not None else _attempt(entry.source)
        yield image if isinstance(image, ConvscopeError) else _named(image, entry)


def _named(image: InputImage, entry: Entry) -> InputImage:
    same = image.name == entry.name and image.label == entry.label
    return image if same else replace(image, name=entry.name, label=entry.label)


def _attempt(source: Source) -> InputImage | ConvscopeError:
    try:
        return read_image(source)
    except (ImageError, UsageError) as error:
        return error


# --- the kinds of source ---------------------------------------------------------------------------------


def _in_memory(name: str, found: Decoded, sha256: str | None = None) -> InputImage:
    for array in (found.pixels, *found.values):
        array.setflags(write=False)
    return InputImage(name, found.pixels, None, found.notes, sha256, None, found.values, found.colour)


def _from_pillow(image: Image.Image) -> Decoded:
    with guards.one_message("this Pillow image"):
        guards.check_size(*image.size, "this Pillow image")
        with guards.room(image.width * image.height * guards.PIXEL_MEMORY):
            return upright(image)


def _from_bytes(data: bytes, name: str) -> InputImage:
    try:
        answer: object = isolation.call("convscope.images.decode:decode_bytes", data, name)
    except isolation.ReaderError as error:
        raise _not_decoded(name, error) from error
    image = _of_answer(answer, name, None)
    return image


def decoded_files(
    paths: Sequence[str], shape: Shape | None = None, reader: isolation.Reader | None = None
) -> Iterator[InputImage | ConvscopeError]:
    """Each file's image, or why it can't be read; see `read_entries`."""
    each: Callable[..., list[object]] = isolation.each if reader is None else reader.each
    asked = [(reading.real(path), path, *(() if shape is None else (list(shape),))) for path in paths]
    answers = each("convscope.images.decode:decode_file", asked)
    return (_decoded(path, answer) for path, answer in zip(paths, answers, strict=True))


def _decoded(path: str, answer: isolation.Sent) -> InputImage | ConvscopeError:
    if isinstance(answer, isolation.ReaderError):
        return _not_decoded(path, answer)
    if isinstance(answer, ConvscopeError):
        return answer
    return _of_answer(answer, reading.as_text(Path(path).stem), path)


def _of_answer(answer: isolation.Sent, name: str, path: str | None) -> InputImage:
    for array in (answer["pixels"], *answer["values"]):
        array.setflags(write=False)
    return InputImage(
        name,
        answer["pixels"],
        path,
        tuple(answer["notes"]),
        answer["sha256"],
        None,
        tuple(answer["values"]),
        answer["colour"],
    )


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

DRAFT = 2  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is this many times the wanted size a side


def decode_file(where: str, path: str, shape: Sequence[int] | None = None) -> dict[str, object]:
    """Pixels, values, notes and hash of an image file, read once. Runs in the reader.

    With a `shape` the pixels are what `fit` makes of the image, as uint8. Of a JPEG that is much larger, the decoder
    makes a smaller image at once (libjpeg's scaling of the DCT), which is then resized: close to `fit`, not equal.

    Args:
        where: its absolute path.
        path: as it was given, for messages.
        shape: `(height, width, channels)` that the network takes; the image keeps its size where None.

    Raises:
        ImageError: the file is missing, not an image, damaged, or larger than the limits allow.
        UsageError: it has another number of channels than `shape`.
    """
    with guards.one_message(repr(path), path):
        data = _bytes(where, path)
    return _answer(data, path, repr(path), shape)


def decode_bytes(data: bytes, name: str) -> dict[str, object]:
    """`decode_file` of the bytes of a file.

    Args:
        data: all of them.
        name: for messages.
    """
    return _answer(data, name, f"the image {name!r} in memory", None)


def _answer(data: bytes, path: str, what: str, shape: Sequence[int] | None) -> dict[str, object]:
    file = _File(data, path, what, shape)
    with guards.one_message(what, path):
        formats = _plugins()  # whose import takes memory that is not the file's
        with isolation.bounded(guards.HEADER_MEMORY), guards.room(guards.HEADER_MEMORY / 2):
            found = _decoded_array(file) or _decoded_tiff(file) or _by_pillow(file, formats)
    return {
        "pixels": found.pixels,
        "values": list(found.values),
        "colour": found.colour,
        "notes": found.notes,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


@dataclass(frozen=True, eq=False)
class _File:
    """A file to decode: its bytes, its path, its name in messages, and the shape that the network takes."""

    data: bytes
    path: str
    what: str
    shape: Sequence[int] | None

    def finished(self, found: Decoded, stored: tuple[int, int] | None = None) -> Decoded:
        """An image at the size that was asked for; `stored` is its width and height, where it was made smaller."""
        return found if self.shape is None else _shrunk(found, self.shape, Path(self.path).stem, stored)


def _decoded_array(file: _File) -> Decoded | None:
    """The image of a `.npy` file; None of another one."""
    if file.data[:6] != b"\x93NUMPY":
        return None
    try:
        header = arrays.header(BytesIO(file.data), len(file.data))
    except arrays.NotAnArray as error:
        raise ImageError(
            f"{file.what} should be an image, but it is a damaged array or one of objects ({error}): save it anew with "
            "numpy.save",
            code="file-damaged",
            path=file.path,
            reason=str(error),
        ) from None
    height, width = (1, 1, *sorted(header.shape))[-2:]
    guards.check_size(width, height, file.what)
    with guards.enough_for(math.prod(header.shape), guards.CHANNEL_MEMORY):
        values = np.frombuffer(file.data, header.dtype, offset=header.start)
        found = memory.decoded(values.reshape(header.shape, order=header.order))
        assert found is not None
        return file.finished(found)


def _decoded_tiff(file: _File) -> Decoded | None:
    """The image of a TIFF that is beyond Pillow; None of another file."""
    data, path = file.data, file.path
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    suffix = path.rpartition(".")[2].lower()
    try:
        places = tiff.places(data, 1)
        tags = tiff.directory(data, places[0]) if places else {}
    except struct.error:
        return None  # Pillow has its own message
    if is_raw_suffix(path) or data[8:10] == b"CR" or tiff.holds_sensor_values(tags):
        raise _no_image(file, raw_photo(suffix))
    page = tiff.page_of(data, tags)
    if page is None or not tiff.is_beyond_pillow(page):
        return None
    guards.check_size(page.width, page.height, file.what)
    guards.check_bytes(page.size, file.what)
    with guards.enough_for(page.count, guards.CHANNEL_MEMORY):
        found = _of_page(page, data)
        return file.finished(replace(found, notes=(*scans.frame_notes("TIFF", data), *found.notes)))


def _of_page(page: tiff.Page, data: bytes) -> Decoded:
    orientation = page.first(tiff.ORIENTATION, 1)
    values = turned_upright(tiff.values_of(page, data), orientation)
    what = "RGB" if page.colour and page.samples == 3 else f"image of {page.samples} channels"
    meaning = Meaning(page.colour, page.opacity)
    return _of_values(values, what, meaning, orientation, page.bits if page.bits < 16 else None)


def _of_values(values: np.ndarray, what: str, meaning: Meaning, orientation: int, bits: int | None) -> Decoded:
    """An image of upright values `(h, w, c)`, as a file holds them, of 8 bits or more."""
    if values.dtype == np.uint8:
        found = of_channels(values, lambda channel: channel, "", meaning)
    else:
        scale = range_of([values], bits, what)
        found = of_channels(values, scale.scaled, scale.note, meaning)
    turned = (TURNED,) if orientation in TURNS else ()
    return replace(found, notes=(*found.notes, *turned))


def _by_pillow(file: _File, formats: Sequence[str]) -> Decoded:
    with guards.pillow_limit(None), _identify(file, formats) as image:
        guards.check_size(*image.size, file.what)  # stricter than Pillow's own check, and with a better message
        scans.check_scans(image, file.data, file.what)
        with guards.pillow_limit((limits.current().pixels + 1) // 2):  # twice as many are refused while decoding
            return _by_its_plugin(file, image)


def _by_its_plugin(file: _File, image: ImageFile.ImageFile) -> Decoded:
    notes = scans.frame_notes(image.format or "", file.data, image)
    wide, stored = _wide_png(image), image.size
    pages = _pages(file.data, image) if notes else []
    each = (guards.WIDE_MEMORY if wide else guards.PIXEL_MEMORY) + guards.CHANNEL_MEMORY * len(pages)
    with guards.enough_for(image.width * image.height, each):
        if file.shape is not None:
            _draft(image, file.shape)
        found = _from_wide_png(image, file.data, wide) if wide else upright(image, _declared_bits(image))
        found = _with_pages(pages, file.data, found) if pages else found
        return file.finished(replace(found, notes=(*notes, *found.notes)), stored)


_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}  # Pillow's names of the layouts with their first byte last


def _wide_png(image: ImageFile.ImageFile) -> str:
    """The layout of a PNG of several channels of 16 bits, of which Pillow keeps the high bytes alone; else ""."""
    layout = image.tile[0][3] if image.format == "PNG" and image.tile else ""
    return layout if layout in _LOW_BYTES else ""


def _from_wide_png(image: Image.Image, data: bytes, layout: str) -> Decoded:
    high = np.asarray(image).astype(np.uint16) << 8
    orientation = orientation_of(image)
    with Image.open(BytesIO(data), formats=["PNG"]) as again:
        (kind, box, at, _) = again.tile[0]
        again.tile = [type(again.tile[0])(kind, box, at, _LOW_BYTES[layout])]
        high |= np.asarray(again)
    return _of_values(turned_upright(high, orientation), "RGB", Meaning(), orientation, None)


def _declared_bits(image: Image.Image) -> int | None:
    """Bits of a value of a TIFF that are fewer than those of Pillow's image."""
    bits = image.tag_v2.get(tiff.BITS, (0,))[0] if image.format == "TIFF" else 0  # type: ignore[attr-defined]
    return bits if 8 < bits < 16 else None


def _pages(data: bytes, image: Image.Image) -> list[tiff.Page]:
    """The pages of a TIFF that may be the channels of one image."""
    if image.format != "TIFF":
        return []
    try:
        pages = tiff.as_channels(tiff.pages(data))
    except (struct.error, guards.Damaged):
        return []
    most = limits.current().pixels
    few = image.width * image.height * len(pages) <= most
    return pages if few and sum(page.size for page in pages) <= guards.BYTES_OF_A_PIXEL * most else []


def _with_pages(pages: Sequence[tiff.Page], data: bytes, first: Decoded) -> Decoded:
    """The first page, which is shown, with all pages as the channels of one image."""
    orientation = pages[0].first(tiff.ORIENTATION, 1)
    try:
        with guards.room(guards.CHANNEL_MEMORY * sum(page.count for page in pages)):
            stored = np.concatenate([tiff.values_of(page, data) for page in pages], axis=-1)
    except (OSError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return first  # a damaged page: the first one is whole
    made = _of_values(turned_upright(stored, orientation), "pages", Meaning(colour=False), 1, None)
    note = f"its {len(pages)} pages are the channels for a network that takes {len(pages)}"
    grey = first.values or (first.pixels[..., :1],)
    return replace(first, values=(*grey, *made.values), notes=(*first.notes, note))


def _draft(image: Image.Image, shape: Sequence[int]) -> None:
    if image.format in ("JPEG", "MPO"):
        height, width = (DRAFT * side for side in shape[:2])
        image.draft(image.mode, (height, width) if orientation_of(image) in LYING else (width, height))


def _shrunk(found: Decoded, shape: Sequence[int], name: str, stored: tuple[int, int] | None) -> Decoded:
    height, width, channels = shape
    before = found.pixels.shape[1::-1] if stored is None else stored
    note = f"resized to {height} x {width} as it was decoded, from {before[1]} x {before[0]}"
    values: tuple[np.ndarray, ...] = ()
    if found.values:
        values = (fit(_in_memory(name, found), height, width, channels),)
    grey = channels == 1 and not values
    pixels = fitted(found.pixels, height, width, 1 if grey else 3)
    pixels = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
    return Decoded(pixels, (*found.notes, note), values, found.colour)


def _bytes(where: str, path: str) -> bytes:
    try:
        return reading.bytes_of(where, "file")
    except Unreadable as error:
        address = address_of(path)
        if address is not None and error.code != "input-too-large":
            raise ImageError(
                f"{path!r} should be the path of an image, but it is {address.text}", code="image-is-address", path=path
            ) from None
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
    folder = Path(where).parent
    if not os.path.isdir(folder):
        return f"the folder {str(Path(path).parent)!r} does not exist either, so check the path"
    names = some_images_in(folder)
    return nearest(Path(path).name, names) if names else "its folder holds no images, so check the path"


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


def _identify(file: _File, formats: Sequence[str]) -> ImageFile.ImageFile:
    data = file.data
    if data[4:8] == b"ftyp" and importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
        formats = FORMATS
    try:
        with _opening_memory(file):
            return Image.open(BytesIO(data), formats=[known for known in formats if known in Image.OPEN])
    except UnidentifiedImageError:
        raise _no_image(file, kind_of(data, file.path)) from None


@contextlib.contextmanager
def _opening_memory(file: _File) -> Iterator[None]:
    """Memory for opening a file, of which some decoders take that for the pixels already."""
    width, height = scans.size_of_webp(file.data) or (0, 0)
    if width * height:
        guards.check_size(width, height, file.what)
    more = width * height * guards.CANVAS_MEMORY
    with isolation.bounded(guards.HEADER_MEMORY + more), guards.room(guards.HEADER_MEMORY / 2 + more):
        yield


def _no_image(file: _File, found: Kind) -> ImageError:
    return ImageError(
        f"{file.what} should be an image ({READ}), but it is {found.text}",
        code="not-an-image",
        path=file.path,
        kind=found.name,
    )
