"""Reading images: files are written here, by Pillow or by hand, and what they must read as is in pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import expecting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from convscope import isolation, limits
from convscope.errors import ImageError, UsageError
from convscope.images import decode, upright
from convscope.images.decode import read_image, read_images
from convscope.images.image import InputImage, fit, fit_batch

pytestmark = pytest.mark.without_keras

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int = 12, width: int = 9, *depth: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, *depth), dtype=np.uint8)


def saved(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file written by hand, so that its header may say anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- what is read ----------------------------------------------------------------------------------------


def test_a_file_keeps_its_pixels_name_source_and_hash(tmp_path):
    pixels = noise(12, 9, 3)
    path = saved(tmp_path / "my cat.v2.png", pixels)
    image = read_image(str(path))
    np.testing.assert_array_equal(image.pixels, pixels)
    assert (image.name, image.source, image.notes) == ("my cat.v2", str(path), ())
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(read_image(path).pixels, pixels)


def test_a_image_comes_back_as_it_is_and_cannot_be_changed():
    image = read_image(noise(4, 4, 3))
    assert read_image(image) is image
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        image.name = "other"


@pytest.mark.parametrize("depth", [(), (1,), (3,), (4,)])
def test_arrays(depth):
    array = noise(5, 7, *depth)
    if depth == (4,):
        array[..., 3] = 255
    expected = array[..., :3] if depth in ((3,), (4,)) else np.stack([array.reshape(5, 7)] * 3, axis=-1)
    image = read_image(array)
    np.testing.assert_array_equal(image.pixels, expected)
    assert (image.name, image.source, image.sha256, image.notes) == ("image", None, None, ())
    array[:] = 0
    np.testing.assert_array_equal(image.pixels, read_image(image).pixels)
    assert image.pixels.any()


def test_an_array_in_another_memory_order():
    array = noise(5, 7, 3)
    np.testing.assert_array_equal(read_image(array[::-1, ::2]).pixels, array[::-1, ::2])


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 4, 3), np.complex64), "complex64"),
        (np.zeros((4, 4), object), "object"),
        (np.zeros((40, 40, 17), np.uint8), "(40, 40, 17)"),
        (np.zeros((20, 40, 40), np.uint8), "(20, 40, 40)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "(2, 4, 4, 3)"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), "(1, 1, 4, 4, 3)"),
        (np.zeros((), np.uint8), "()"),
        (np.zeros((4,), np.uint8), "(4,)"),
        (np.zeros((0, 4, 3), np.uint8), "(0, 4, 3)"),
    ],
)
def test_other_arrays_are_refused(array, found):
    with pytest.raises(UsageError) as error:
        read_image(array)
    assert "uint8 0..255" in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize("source", [None, 3, [[1, 2], [3, 4]], {"a": 1}, object(), Image, len])
def test_other_kinds_of_source_are_refused(source):
    with pytest.raises(UsageError, match=type(source).__name__):
        read_image(source)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.array([[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]], np.uint8)
    image = read_image(saved(tmp_path / "a.png", rgba))
    np.testing.assert_array_equal(image.pixels, [[RED, WHITE, (204, 204, 204)]])
    assert image.notes == ("transparency laid over white",)


def test_grey_with_alpha(tmp_path):
    grey = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.fromarray(np.array([[255, 0]], np.uint8))])
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", grey)).pixels, [[(100, 100, 100), WHITE]])


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    return image


def test_palettes_with_and_without_transparency(tmp_path):
    plain = read_image(saved(tmp_path / "plain.png", palette_image()))
    np.testing.assert_array_equal(plain.pixels, [[RED, GREEN, BLUE]])
    assert plain.notes == ()
    clear = read_image(saved(tmp_path / "clear.png", palette_image(), transparency=1))
    np.testing.assert_array_equal(clear.pixels, [[RED, WHITE, BLUE]])
    assert clear.notes == ("transparency laid over white",)


def test_one_bit(tmp_path):
    bits = Image.fromarray(np.array([[255, 0]], np.uint8)).convert("1")
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", bits)).pixels, [[WHITE, (0, 0, 0)]])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_range(tmp_path, suffix):
    values = np.array([[0, 257, 30000, 65535]], np.uint16)
    image = read_image(saved(tmp_path / f"a.{suffix}", values))
    assert image.pixels[0, :, 0].tolist() == [0, 1, 117, 255]
    assert image.notes == ("16-bit grey scaled from 0..65535, not rounded to 8 bits",)


def test_16_bit_grey_in_the_other_byte_order(tmp_path):
    image = read_image(saved(tmp_path / "a.tiff", np.array([[0, 514, 65535]], ">u2")))
    assert image.pixels[0, :, 1].tolist() == [0, 2, 255]


def test_16_bit_rgb(tmp_path):
    row = np.array([65535, 0, 30000], ">u2").tobytes()
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, b"\0" + row))
    assert read_image(tmp_path / "a.png").pixels.tolist() == [[[255, 0, 117]]]


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        (np.array([[-10, 0, 90]], np.int32), [0, 26, 255], "stretched from -10..90"),
        (np.array([[0, 514, 65535]], np.int32), [0, 2, 255], "16-bit"),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255], "kept as it is"),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255], "0..1"),
        (np.array([[0, 99.6, 200]], np.float32), [0, 100, 200], "kept as it is"),
        (np.array([[-1, np.nan, 1]], np.float32), [0, 128, 255], "stretched from -1..1"),
        (np.array([[-5, -5, -5]], np.float32), [0, 0, 0], "stretched from -5..-5"),
        (np.array([[np.inf, 0, 0.2]], np.float32), [0, 0, 51], "0..1"),
    ],
)
def test_wide_grey(tmp_path, values, expected, note):
    image = read_image(saved(tmp_path / "a.tiff", values))
    assert image.pixels[0, :, 2].tolist() == expected
    assert note in image.notes[0]


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)  # red ink
    image = read_image(path)
    assert np.abs(image.pixels.astype(int) - RED).max() < 12
    assert image.notes == ("CMYK converted to RGB",)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **lossless)
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, np.broadcast_to(RED, (6, 8, 3)))
    assert image.notes == ("first of 3 frames",)


def test_an_animation_with_a_damaged_later_frame(tmp_path):
    frames = [Image.fromarray(noise(20, 20 + n)[:, :20]) for n in range(12)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    whole = read_image(path).pixels
    data = path.read_bytes()
    for length in range(len(data) - 400, len(data) - 2, 23):
        path.write_bytes(data[:length])
        image = read_image(path)
        np.testing.assert_array_equal(image.pixels, whole)
        assert image.notes[0].startswith("first of")


def upright_oracle(stored: np.ndarray, orientation: int) -> np.ndarray:
    """From the EXIF standard: where row 0 and column 0 of the stored image lie when it is seen upright."""
    row_side, column_side = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    height, width = stored.shape[:2]
    lying = row_side in ("left", "right")
    out = np.zeros((width, height, 3) if lying else (height, width, 3), np.uint8)
    for r in range(height):
        for c in range(width):
            from_row = r if row_side in ("top", "left") else height - 1 - r
            from_column = c if column_side in ("top", "left") else width - 1 - c
            out[(from_column, from_row) if lying else (from_row, from_column)] = stored[r, c]
    return out


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    stored = noise(4, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    image = read_image(saved(tmp_path / f"a.{suffix}", stored, exif=exif, **lossless))
    np.testing.assert_array_equal(image.pixels, upright_oracle(stored, orientation))
    assert image.notes == (("turned upright by its EXIF orientation",) if orientation > 1 else ())


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path):
    path = saved(tmp_path / "a.jpg", noise(16, 16, 3), exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    assert read_image(path).pixels.shape == (16, 16, 3)


def test_pillow_images(tmp_path):
    pixels = noise(6, 5, 3)
    image = read_image(Image.fromarray(pixels))
    np.testing.assert_array_equal(image.pixels, pixels)
    assert (image.name, image.source, image.sha256) == ("image", None, None)
    with Image.open(saved(tmp_path / "a.png", pixels)) as lazy:
        np.testing.assert_array_equal(read_image(lazy).pixels, pixels)


# --- what is refused -------------------------------------------------------------------------------------


def refusal(source: object) -> str:
    """The one message; nothing else may come out, not even a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as error:
            read_image(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_and_what_may_be_meant(tmp_path):
    saved(tmp_path / "elephant.jpg", noise(8, 8, 3))
    assert "did you mean 'elephant.jpg'" in refusal(tmp_path / "elefant.jpg")
    assert "'elephant.jpg'" in refusal(tmp_path / "zzz.png")
    assert "does not exist either" in refusal(tmp_path / "nowhere" / "a.jpg")
    (tmp_path / "none").mkdir()
    assert "holds no images" in refusal(tmp_path / "none" / "a.jpg")
    assert "does not download" in refusal("https://example.org/cat.jpg")
    assert "can't be read" in refusal("a\0b.jpg")
    assert "can't be read" in refusal("a" * 5000)


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_links_that_lead_nowhere_do_not_cost_a_folder(tmp_path):
    saved(tmp_path / "good.png", noise(4, 4, 3))
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    (tmp_path / "long.png").symlink_to("x" * 300)
    (tmp_path / "long").symlink_to("x" * 300)
    (tmp_path / "longer.npy").symlink_to("x/" * 2000)
    assert [image.name for image in read_images(tmp_path)] == ["good"]
    (tmp_path / "good.png").unlink()
    with expecting.raises(ImageError, "no-images"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".png", "x" * 5000 + "/a.png", "a/" * 3000, "a\0b/c.png", "x" * 300 + ".csv"]
)
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(ImageError, match=r"can't be read|does not exist"):
        read_images(name)
    (tmp_path / "list.csv").write_text(f"path\n{name}\n".replace("\0", ""))
    with pytest.raises(ImageError):
        read_images(tmp_path / "list.csv")


@pytest.mark.parametrize("name", ["it's.png", 'a "b".png', 'it\'s "c".png', "'.png", "tab\t.png"])
def test_an_error_has_the_path_as_it_was_given(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(png(9, 9, 8, 2, b"\0"))
    with expecting.raises(ImageError, "file-damaged", path=str(path)):
        read_image(path)


def test_a_folder(tmp_path):
    assert "it is a folder" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert "pipe" in refusal(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = saved(tmp_path / "a.png", noise(4, 4, 3))
    path.chmod(stat.S_IWUSR)
    assert "permission" in refusal(path).lower()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "empty (0 bytes)"),
        (b"Dear diary,\n", "it is text"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"%PDF-1.7\n\xff", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (bytes(range(256)), "another format"),
    ],
)
def test_files_that_are_no_images(tmp_path, data, found):
    (tmp_path / "cat.jpg").write_bytes(data)
    message = refusal(tmp_path / "cat.jpg")
    assert "cat.jpg" in message
    assert found in message


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp", "jp2", "ppm"])
def test_truncated_files(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", noise(64, 64, 3))
    data = path.read_bytes()
    for part in (0.03, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        assert "a." + suffix in refusal(path)


@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM"]), st.data())
def test_garbage_is_read_or_refused_but_nothing_else(tmp_path_factory, garbage, kind, data):
    buffer = io.BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(buffer, kind)
    whole = buffer.getvalue()
    start = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("garbage") / "a.png"
    path.write_bytes(whole[:start] + garbage + whole[start + len(garbage) :])
    try:
        with limits.using(pixels=1_000_000):  # a damaged header may say anything
            image = read_image(path)
    except ImageError:
        return
    assert image.pixels.dtype == np.uint8
    assert image.pixels.shape[2:] == (3,)


@pytest.mark.parametrize("side", [13_343, 15_000, 60_000])  # just above our limit, above Pillow's, far above
@pytest.mark.parametrize("pillow_limit", [None, 1000, 89_478_485])
def test_a_bomb_is_refused_before_decoding(tmp_path, monkeypatch, side, pillow_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 8, 2, b""))
    assert "178 million pixels" in refusal(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="178 million pixels"):  # as the reader does it
        decode.decode_file(str(path), str(path))


def test_what_the_user_sets_in_pillow_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = saved(tmp_path / "a.png", noise(12, 12, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).pixels.shape == (12, 12, 3)


def test_the_limit_of_pixels_can_be_raised_and_lowered(tmp_path):
    path = saved(tmp_path / "a.png", noise(12, 12, 3))
    with limits.using(pixels=143):
        assert "CONVSCOPE_LIMITS=pixels=715" in refusal(path)
        with pytest.raises(ImageError, match="at most 143 pixels"):
            read_image(noise(12, 12, 3))
    with limits.using(pixels=144):
        assert read_image(path).pixels.shape == (12, 12, 3)


# Decodes a file once for each limit, in a child process whose address space may grow by that many bytes, and prints
# what happened: the hash of the pixels, the code of the error where it is the memory's, or what else came out.
OUT_OF_MEMORY = """
import hashlib, json, os, resource, sys
from PIL import Image
from convscope.errors import ConvscopeError
from convscope.images import decode

Image.init()

def outcome(path, most):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + most, -1))
    try:
        found = decode.decode_file(path, path)["pixels"]
        error = None
    except BaseException as caught:
        error = caught
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if error is None:
        return hashlib.sha256(found.tobytes()).hexdigest()
    if isinstance(error, ConvscopeError):
        return error.code if "does not fit in the memory" in str(error) else str(error)
    return repr(error)

def alone(path, most):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, outcome(path, most).encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as answer:
        found = answer.read()
    ended = os.waitpid(child, 0)[1]
    return f"ended by {ended}" if ended else found

print(json.dumps([alone(sys.argv[1], most) for most in (*range(0, 22 * 2**20, 2**19), 2**31)]))
"""
IN_MEMORY = {
    "png": {},
    "jpg": {},
    "progressive.jpg": {"progressive": True},
    "lzw.tiff": {"compression": "tiff_lzw"},
    "plain.tiff": {},
    "webp": {},
    "lossless.webp": {"lossless": True},
    "gif": {},
    "bmp": {},
    "jp2": {},
    "avif": {},
    "ppm": {},
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux alone")
@pytest.mark.parametrize("kind", IN_MEMORY)
def test_a_decoder_out_of_memory(tmp_path, kind):
    """At whatever allocation the memory runs out, the file is not called damaged."""
    y, x = np.mgrid[:700, :800]
    image = Image.fromarray(np.stack([x % 256, y % 256, x * y % 256], axis=-1).astype(np.uint8))
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = saved(tmp_path / f"a.{kind}", image, **IN_MEMORY[kind])
    ran = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, path], capture_output=True, text=True, check=True)
    outcomes = json.loads(ran.stdout)
    whole = hashlib.sha256(read_image(path).pixels.tobytes()).hexdigest()
    assert set(outcomes) == {"out-of-memory", whole}
    assert (outcomes[0], outcomes[-1]) == ("out-of-memory", whole)


@pytest.mark.parametrize("what", ["file", "bytes", "Pillow's"])
def test_memory_that_runs_out_is_no_matter_of_the_limit_of_pixels(tmp_path, monkeypatch, what):
    """Raising the limit would not help."""
    path = saved(tmp_path / "a.png", noise(12, 12, 3))

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(decode, "upright", full)
    read = {
        "file": lambda: decode.decode_file(str(path), "a.png"),
        "bytes": lambda: decode.decode_bytes(path.read_bytes(), "a.png"),
        "Pillow's": lambda: read_image(Image.new("RGB", (4, 4))),
    }
    with expecting.raises(ImageError, "out-of-memory", match="smaller copy, or free memory") as caught:
        read[what]()
    assert "pixels" not in str(caught.value)
    assert "limit" not in caught.value.data


def test_a_damaged_file_is_called_damaged_where_the_memory_suffices(tmp_path):
    path = saved(tmp_path / "a.png", noise(200, 200, 3))
    path.write_bytes(path.read_bytes()[:9000])
    with expecting.raises(ImageError, "file-damaged", path=str(path)):
        read_image(path)


def webp_of(chunk: bytes, data: bytes) -> bytes:
    body = b"WEBP" + chunk + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body + bytes(100)


@pytest.mark.parametrize(
    "data",
    [
        webp_of(b"VP8X", bytes(4) + (15_999).to_bytes(3, "little") * 2),
        webp_of(b"VP8L", b"\x2f" + (15_999 | 15_999 << 14).to_bytes(4, "little") + bytes(5)),
        webp_of(b"VP8 ", b"\x30\x01\0\x9d\x01\x2a" + struct.pack("<HH", 16_000, 16_000)),
    ],
    ids=["extended", "lossless", "lossy"],
)
def test_a_large_webp_is_refused_before_its_decoder_takes_memory(tmp_path, monkeypatch, data):
    """The decoder makes its canvases when a file is opened."""
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    (tmp_path / "a.webp").write_bytes(data)
    with expecting.raises(ImageError, "input-too-large", limit="pixels", match="16000 x 16000"):
        decode.decode_file(str(tmp_path / "a.webp"), "a.webp")


def test_a_large_webp_within_the_limit_is_read(tmp_path):
    path = saved(tmp_path / "a.webp", Image.new("RGB", (7000, 7000), RED), lossless=True, method=0)
    image = read_image(path)
    assert image.pixels.shape == (7000, 7000, 3)
    assert (image.pixels[::700, ::700] == RED).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp"])
def test_the_limit_that_the_user_set_in_pillow_stays(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 17)
    path = saved(tmp_path / f"a.{suffix}", noise(12, 12, 3))
    assert decode.decode_file(str(path), "a")["pixels"].shape == (12, 12, 3)
    assert Image.MAX_IMAGE_PIXELS == 17
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImageError):
        decode.decode_file(str(path), "a")
    assert Image.MAX_IMAGE_PIXELS == 17


def test_closed_and_empty_pillow_images():
    assert "0 x 3" in refusal(Image.new("RGB", (0, 3)))
    image = Image.new("RGB", (3, 3))
    image.close()
    assert "this Pillow image" in refusal(image)


# --- what could take for ever, or all the memory ----------------------------------------------------------


def jpeg_of_scans(count: int, **options: object) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(buffer, "JPEG", progressive=True, **options)
    data = buffer.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_many_scans(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_of_scans(1000))
    assert "at most 100 are decoded" in refusal(path)
    path.write_bytes(jpeg_of_scans(100))
    assert read_image(path).pixels.shape == (32, 32, 3)


def test_scans_of_what_follows_a_jpeg_do_not_count(tmp_path):
    """Phones put films and other images behind the photo, and small ones before it."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_of_scans(8) + b"\xff\xda\0\2" * 1000)
    assert read_image(path).pixels.shape == (32, 32, 3)
    path.write_bytes(jpeg_of_scans(8, exif=b"Exif\0\0" + b"\xff\xda\0\2" * 1000))
    assert read_image(path).pixels.shape == (32, 32, 3)


def test_bytes_that_look_like_a_marker_take_linear_time(tmp_path):
    """A run of bytes 0xff that ends in no marker, and enough that looks like scans for the file to be searched."""
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    (tmp_path / "whole.jpg").write_bytes(whole)
    for number, filler in enumerate((b"\xff" * 3_000_000 + b"\0", b"\xff\0" * 1_000_000, b"\xff\xd0" * 1_000_000)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(whole[:-2] + filler + whole[-2:] + b"\xff\xda" * 101)
        with limits.using(seconds=20):
            np.testing.assert_array_equal(read_image(path).pixels, read_image(tmp_path / "whole.jpg").pixels)


def tiff_of_directories(count: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    (first,) = struct.unpack_from("<L", data, 4)
    end = first + 2 + 12 * struct.unpack_from("<H", data, first)[0]
    directory, start = bytes(data[first:end]), len(data)
    struct.pack_into("<L", data, end, start)
    for number in range(2, count + 1):
        following = start + (number - 1) * (len(directory) + 4) if number < count else 0
        data += directory + struct.pack("<L", following)
    return bytes(data)


@pytest.mark.parametrize(("count", "note"), [(2, "2 frames"), (500, "500 frames"), (200_000, "more than 10000 frames")])
def test_a_tiff_of_many_directories(tmp_path, count, note):
    (tmp_path / "a.tiff").write_bytes(tiff_of_directories(count))
    assert read_image(tmp_path / "a.tiff").notes[0] == f"first of {note}"


def test_a_tiff_whose_directories_go_round(tmp_path):
    data = bytearray(tiff_of_directories(3))
    data[-4:] = data[4:8]
    (tmp_path / "a.tiff").write_bytes(data)
    assert read_image(tmp_path / "a.tiff").notes[0] == "first of 3 frames"


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_frames_are_counted_as_pillow_counts_them(tmp_path, kind, count):
    frames = [Image.fromarray(noise(9, 8 + n)[:, :8]).convert("P") for n in range(count)]
    for number, options in enumerate(({}, {"big_tiff": True}, {"compression": "tiff_lzw"}, {"disposal": 2})):
        path = tmp_path / f"{number}.{kind.lower()}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            expected = image.n_frames
        assert read_image(path).notes == ((f"first of {expected} frames",) if expected > 1 else ())


def test_a_gif_of_many_frames(tmp_path):
    frame = b"\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    (tmp_path / "a.gif").write_bytes(b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * 500_000 + b";")
    assert read_image(tmp_path / "a.gif").notes == ("first of more than 10000 frames",)


def test_a_decoder_that_takes_too_long(tmp_path):
    path = saved(tmp_path / "a.jp2", noise(500, 500, 3))
    with limits.using(seconds=0.02):
        assert "CONVSCOPE_LIMITS=seconds=0.1" in refusal(path)
    read_image(saved(tmp_path / "a.png", noise(4, 4, 3)))


@pytest.mark.parametrize("kind", ["time", "memory", "crash", "error"])
def test_whatever_happens_to_the_reader_is_one_message(tmp_path, monkeypatch, kind):
    path = saved(tmp_path / "a.png", noise(4, 4, 3))
    error = isolation.ReaderError(kind, "reading it went wrong")
    monkeypatch.setattr(isolation, "each", lambda *_: [error])
    message = refusal(path)
    assert message.startswith(f"{str(path)!r} should be a whole image, but ")
    assert "save it anew as PNG" in message


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["F.tiff", "I;16.png", "RGBA.png", "P.png", "CMYK.tiff", "RGB.jpg"])
def test_memory_is_a_small_multiple_of_the_decoded_size(tmp_path, kind):
    """Four times the 8-bit size, and a constant: what a 64-bit copy of the whole would not fit into."""
    mode, suffix = kind.split(".")
    height, width = 2000, 3000
    image = Image.new(
        mode, (width, height), (1, 2, 3, 4) if mode in ("RGBA", "CMYK") else (1, 2, 3) if mode == "RGB" else 7
    )
    path = saved(tmp_path / f"a.{suffix}", image, **({"transparency": 7} if mode == "P" else {}))
    isolation.SHARED_READER.stop()
    read_image(saved(tmp_path / "small.png", noise(4, 4, 3)))

    def peak() -> int:
        return isolation.call("builtins:eval", "__import__('resource').getrusage(0).ru_maxrss") * 1024

    before = peak()
    read_image(path)
    assert peak() - before < 4 * height * width * 3 + 2**25


def test_large_images_are_converted_in_strips_as_in_one_piece(tmp_path, monkeypatch):
    rgba = noise(70, 50, 4)
    rgba[:40, :, 3] = 255  # the first strips have no transparency
    images = {
        "rgb.png": Image.fromarray(rgba[..., :3]),
        "rgba.png": Image.fromarray(rgba),
        "palette.png": Image.fromarray(rgba[..., :3]).quantize(40),
        "grey.tiff": Image.fromarray(noise(70, 50).astype(np.float32) * 3 - 100),
        "cmyk.tiff": Image.fromarray(rgba[..., :3]).convert("CMYK"),
    }
    for turn in range(1, 9):
        for name, image in images.items():
            exif = Image.Exif()
            exif[0x0112] = turn
            path = saved(tmp_path / f"{turn}-{name}", image, exif=exif)
            whole = decode.decode_file(str(path), "a")
            with monkeypatch.context() as patch:
                patch.setattr(upright, "STRIP", 333)
                strips = decode.decode_file(str(path), "a")
            np.testing.assert_array_equal(strips["pixels"], whole["pixels"])
            assert (strips["notes"], strips["sha256"]) == (whole["notes"], whole["sha256"])


# --- files that are none ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_links_to_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for number, target in enumerate((tmp_path / "fifo", "/dev/zero", "/dev/stdin", "/dev/tty")):
        (tmp_path / f"{number}.png").symlink_to(target)
        message = refusal(tmp_path / f"{number}.png")
        assert "device or a pipe" in message or "can't be read" in message


def test_a_file_that_is_too_large(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(2**40)
    assert "CONVSCOPE_LIMITS=file=5GiB" in refusal(tmp_path / "a.png")


def test_relative_paths_follow_the_working_directory(tmp_path, monkeypatch):
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name / "x.png", np.full((2, 2, 3), number, np.uint8))
    for number, name in enumerate("ab"):
        monkeypatch.chdir(tmp_path / name)
        assert read_image("x.png").pixels.max() == number
        assert "'x.png'" in refusal("y.png")


def test_messages_of_libraries_do_not_reach_the_terminal(tmp_path, capfd):
    path = saved(tmp_path / "a.tiff", noise(64, 64, 3), compression="tiff_lzw")
    data = path.read_bytes()
    for start in range(8, 2000, 50):
        path.write_bytes(data[:start] + b"\xff\0\x7f" * 10 + data[start + 30 :])
        with contextlib.suppress(ImageError):
            read_image(path)
    assert capfd.readouterr() == ("", "")


# --- many images ---------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_images(tmp_path):
    for index, name in enumerate(["b.PNG", "A.png", "c.jpeg", "._A.png", "notes.txt"]):
        target = tmp_path / name
        saved(target, np.full((4, 4, 3), index, np.uint8), format="PNG")
    (tmp_path / "inner.png").mkdir()
    images = read_images([tmp_path, np.zeros((2, 2), np.uint8)])
    assert [image.name for image in images] == ["A", "b", "c", "image"]
    assert [int(image.pixels[0, 0, 0]) for image in images] == [1, 0, 2, 0]
    assert [image.name for image in read_images(str(tmp_path))] == ["A", "b", "c"]


def test_one_source_and_a_batch(tmp_path):
    pixels = noise(4, 4, 3)
    path = saved(tmp_path / "a.png", pixels)
    for source in (path, str(path), pixels, Image.fromarray(pixels), read_image(path)):
        (image,) = read_images(source)
        np.testing.assert_array_equal(image.pixels, pixels)
    several = read_images(np.stack([pixels, pixels // 2]))
    assert [image.name for image in several] == ["image", "image-2"]
    np.testing.assert_array_equal(several[1].pixels, pixels // 2)


def test_every_failure_is_listed(tmp_path):
    saved(tmp_path / "good.png", noise(4, 4, 3))
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty").mkdir()
    sources = [tmp_path, "missing.png", np.full((2, 2), -1.0), tmp_path / "empty"]
    with pytest.raises(ImageError) as error:
        read_images(sources)
    message = str(error.value)
    assert message.startswith("4 of 5 images can't be read:")
    for reason in ("text.jpg", "missing.png", "-1..-1", "holds none"):
        assert reason in message
    assert message.count("\n  - ") == 4


def test_a_single_failure_speaks_for_itself(tmp_path):
    with pytest.raises(ImageError, match=r"^there is no image at"):
        read_images([tmp_path / "nowhere.png"])
    with pytest.raises(ImageError, match="holds none"):
        read_images(tmp_path)
    with pytest.raises(UsageError, match="-1"):
        read_images(np.full((4, 4), -1, np.float32))
    with pytest.raises(UsageError, match="none was given"):
        read_images([])
    with pytest.raises(UsageError, match="NoneType"):
        read_images(None)


def test_names_are_made_unique(tmp_path):
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    names = ["a/cat.png", "b/Cat.png", "c/cat-2.png", "d/CAT.png"]
    paths = [saved(tmp_path / name, noise(2, 2, 3)) for name in names]
    assert [image.name for image in read_images(paths)] == ["cat", "Cat-3", "cat-2", "CAT-4"]
    assert read_images(paths)[1].source == str(paths[1])


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a-2-2", "A-3", "b", "ß", "SS"]), max_size=12))
def test_unique_names_keep_first_comers(names):
    pixels = np.zeros((1, 1, 3), np.uint8)
    if not names:
        return
    result = [image.name for image in read_images([InputImage(name, pixels) for name in names])]
    assert len({name.casefold() for name in result}) == len(names)
    seen = set()
    for old, new in zip(names, result, strict=True):
        assert new.startswith(old)
        assert (new == old) == (old.casefold() not in seen)
        seen.add(old.casefold())


# --- fitting ---------------------------------------------------------------------------------------------


def test_fit_at_the_same_size_changes_nothing():
    pixels = noise(6, 5, 3)
    out = fit(read_image(pixels), 6, 5, 3)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, pixels)


def test_fit_stretches_the_whole_image():
    pixels = np.zeros((2, 8, 3), np.uint8)
    pixels[:, :4] = RED
    pixels[:, 4:] = BLUE
    out = fit(read_image(pixels), 4, 2, 3)
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1], out.shape))
    assert out[0, 0, 0] > 200
    assert out[0, 1, 2] > 200
    assert out.shape == (4, 2, 3)


def bilinear_oracle(row: np.ndarray, size: int) -> np.ndarray:
    """Resampling by a triangle as wide as a pixel of the smaller of the two images, in a plain loop."""
    scale = len(row) / size
    reach = max(scale, 1.0)
    out = []
    for index in range(size):
        centre = (index + 0.5) * scale
        weights = [max(0.0, 1 - abs(at + 0.5 - centre) / reach) for at in range(len(row))]
        out.append(sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights))
    return np.array(out)


@given(st.integers(1, 40), st.integers(1, 40))
def test_fit_is_bilinear_with_antialiasing(before, after):
    row = np.random.default_rng(before).integers(0, 256, before, dtype=np.uint8)
    out = fit(read_image(row[None]), 1, after, 1)
    np.testing.assert_allclose(out[0, :, 0], bilinear_oracle(row.astype(float), after), atol=0.51)


def test_one_channel_is_luma():
    pixels = noise(5, 4, 3)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(fit(read_image(pixels), 5, 4, 1)[..., 0], luma, atol=0.51)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channel_counts_are_refused(channels):
    with pytest.raises(UsageError, match=f"takes {channels}"):
        fit(read_image(noise(4, 4, 3)), 4, 4, channels)


def test_no_size_is_refused():
    with pytest.raises(UsageError, match="0 x 4"):
        fit(read_image(noise(4, 4, 3)), 0, 4, 3)


def test_batch_is_fit_for_each():
    images = [read_image(noise(4 + n, 9, 3)) for n in range(3)]
    out = fit_batch(images, 5, 6, 1)
    assert out.dtype == np.float32
    assert out.shape == (3, 5, 6, 1)
    for row, image in zip(out, images, strict=True):
        np.testing.assert_array_equal(row, fit(image, 5, 6, 1))
    assert fit_batch([], 5, 6, 3).shape == (0, 5, 6, 3)
