"""Images of more than 8 bits, of 2 to 16 channels, and images that a program holds. Files are written by hand here."""

from __future__ import annotations

import io
import struct
import zlib

import expecting
import numpy as np
import pytest
from PIL import Image

from convscope import limits
from convscope.errors import ImageError, UsageError
from convscope.images.decode import decode_file, read_image, read_images
from convscope.images.image import InputImage, fit
from convscope.images.source import image_source, stream

pytestmark = pytest.mark.without_keras


def wide(height=7, width=5, channels=3, top=65535, seed=0):
    values = np.random.default_rng(seed).integers(0, top + 1, (height, width, channels)).astype(np.uint16)
    values.flat[0] = top
    return values


def fitted(image, channels):
    return fit(image, *image.pixels.shape[:2], channels)


# -- the range of whole numbers ---------------------------------------------------------------------------------


def grey_png(path, values):
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("top", "ceiling"), [(1023, 1023), (1000, 1023), (4095, 4095), (3000, 4095), (16383, 16383), (40000, 65535)]
)
def test_grey_of_10_12_14_and_16_bits_uses_its_range_and_keeps_its_steps(tmp_path, top, ceiling):
    values = wide(channels=1, top=top)[..., 0]
    for path in (grey_png(tmp_path / "a.png", values), grey_png(tmp_path / "a.tiff", values)):
        image = read_image(path)
        bits = int(ceiling).bit_length()
        assert f"{bits}-bit" in image.notes[0]
        assert "not rounded" in image.notes[0]
        expected = values * (255 / ceiling)
        np.testing.assert_allclose(fitted(image, 1)[..., 0], expected, atol=1e-4)
        np.testing.assert_allclose(fitted(image, 3), expected[..., None].repeat(3, -1), atol=1e-4)
        np.testing.assert_array_equal(image.pixels[..., 0], np.rint(expected))


def test_more_than_256_levels_reach_the_network(tmp_path):
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    image = read_image(grey_png(tmp_path / "ramp.png", ramp))
    assert len(np.unique(fitted(image, 1))) == 4096
    assert len(np.unique(image.pixels)) == 256


def test_a_small_range_in_a_wide_file_is_kept_as_it_is(tmp_path):
    values = wide(channels=1, top=200)[..., 0]
    np.testing.assert_array_equal(fitted(read_image(grey_png(tmp_path / "a.png", values)), 1)[..., 0], values)


def png16(values):
    """A PNG of 16 bits and 3 or 4 channels, filtered by Paeth and others so that undoing them matters."""
    height, width, channels = values.shape
    rows, before = b"", bytes(width * channels * 2)
    for number, row in enumerate(values.astype(">u2")):
        data, step = row.tobytes(), channels * 2
        left = bytes(step) + data[:-step]
        kind = (0, 1, 2)[number % 3]
        reference = (bytes(len(data)), left, before)[kind]
        rows += bytes([kind]) + bytes((a - b) % 256 for a, b in zip(data, reference, strict=True))
        before = data

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_rgb_of_16_bits_in_a_png_keeps_them(tmp_path):
    values = wide()
    (tmp_path / "a.png").write_bytes(png16(values))
    image = read_image(tmp_path / "a.png")
    np.testing.assert_allclose(fitted(image, 3), values * (255 / 65535), atol=1e-4)
    luma = (values * (255 / 65535)) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(fitted(image, 1)[..., 0], luma, atol=1e-3)
    assert image.notes == ("16-bit RGB scaled from 0..65535, not rounded to 8 bits",)


def test_rgb_with_opacity_of_16_bits_is_laid_over_white(tmp_path):
    values = wide(channels=4)
    (tmp_path / "a.png").write_bytes(png16(values))
    image = read_image(tmp_path / "a.png")
    units = values / 65535
    expected = 255 * (units[..., :3] * units[..., 3:] + 1 - units[..., 3:])
    np.testing.assert_allclose(fitted(image, 3), expected, atol=1e-3)
    np.testing.assert_allclose(fitted(image, 4), 255 * units, atol=1e-3)
    assert "transparency laid over white" in image.notes


# -- TIFF, written from the standard ----------------------------------------------------------------------------


def differences(values, size):
    """The horizontal predictor, value by value."""
    out = values.copy()
    for row in range(values.shape[0]):
        for column in range(values.shape[1] - 1, 0, -1):
            for channel in range(values.shape[2]):
                out[row, column, channel] = (
                    int(values[row, column, channel]) - int(values[row, column - 1, channel])
                ) % 256**size
    return out


def float_differences(values):
    """Adobe's predictor of floats: each row's bytes by their significance, then differences of bytes."""
    _, width, channels = values.shape
    rows = []
    for row in values.astype(">f4"):
        data = row.tobytes()
        sorted_bytes = [data[4 * number + place] for place in range(4) for number in range(width * channels)]
        rows.append(
            bytes((b - (sorted_bytes[i - channels] if i >= channels else 0)) % 256 for i, b in enumerate(sorted_bytes))
        )
    return rows


def packed_bits(values, bits):
    rows = []
    for row in values:
        text = "".join(format(int(value), f"0{bits}b") for value in row.reshape(-1))
        text += "0" * (-len(text) % 8)
        rows.append(bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8)))
    return rows


def pieces_of(values, order, tile, rows):
    """The strips or tiles of one plane `(h, w, c)`."""
    height, width, channels = values.shape
    if tile is None:
        return [values[at : at + rows] for at in range(0, height, rows)]
    found = []
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            piece = np.zeros((tile, tile, channels), values.dtype)
            part = values[top : top + tile, left : left + tile]
            piece[: part.shape[0], : part.shape[1]] = part
            found.append(piece)
    return found


def directory(order, entries, at):
    """A directory that begins at byte `at`, and what lies behind it."""
    table, beyond = b"", b""
    end = at + 2 + 12 * len(entries) + 4
    for tag, (form, numbers) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(numbers)}{ {3: 'H', 4: 'I'}[form] }", *numbers)
        if len(data) <= 4:
            table += struct.pack(f"{order}HHI", tag, form, len(numbers)) + data.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}HHII", tag, form, len(numbers), end + len(beyond))
            beyond += data
    return struct.pack(f"{order}H", len(entries)) + table, beyond


def tiff(
    pages,
    order="<",
    compression=1,
    predictor=1,
    planar=1,
    tile=None,
    rows=3,
    photometric=1,
    bits=None,
    extra=(),
    more=None,
):
    data = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    for values in pages:
        height, width, channels = values.shape
        size = values.dtype.itemsize
        planes = [values] if planar == 1 else [values[..., [number]] for number in range(channels)]
        offsets, counts = [], []
        for plane in planes:
            for piece in pieces_of(plane, order, tile, rows):
                if bits is not None:
                    raw = b"".join(packed_bits(piece, bits))
                elif predictor == 3:
                    raw = b"".join(float_differences(piece))
                else:
                    piece = differences(piece, size) if predictor == 2 else piece
                    raw = piece.astype(piece.dtype.newbyteorder(order)).tobytes()
                raw = zlib.compress(raw) if compression == 8 else raw
                offsets.append(len(data))
                counts.append(len(raw))
                data += raw + b"\0" * (len(raw) % 2)
        entries = {
            256: (3, [width]), 257: (3, [height]), 258: (3, [bits or 8 * size] * channels), 259: (3, [compression]),
            262: (3, [photometric]), 277: (3, [channels]), 284: (3, [planar]), 317: (3, [predictor]),
            339: (3, [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels),
        }  # fmt: skip
        if tile is None:
            entries |= {273: (4, offsets), 278: (3, [rows]), 279: (4, counts)}
        else:
            entries |= {322: (3, [tile]), 323: (3, [tile]), 324: (4, offsets), 325: (4, counts)}
        if extra:
            entries[338] = (3, list(extra))
        entries |= more or {}
        at = len(data)
        struct.pack_into(f"{order}I", data, link, at)
        table, beyond = directory(order, entries, at)
        link = at + len(table)
        data += table + b"\0\0\0\0" + beyond
        data += b"\0" * (len(data) % 2)
    return bytes(data)


FORMS = [
    {},
    {"order": ">"},
    {"compression": 8},
    {"compression": 8, "predictor": 2},
    {"compression": 8, "predictor": 2, "order": ">"},
    {"planar": 2},
    {"planar": 2, "compression": 8, "predictor": 2},
    {"tile": 16, "compression": 8},
    {"tile": 16, "compression": 8, "predictor": 2, "order": ">"},
    {"tile": 16, "planar": 2},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("channels", [2, 3, 6, 16])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_bands_of_a_tiff(tmp_path, form, channels, kind):
    values = (wide(21, 19, channels).astype(int) % (np.iinfo(kind).max + 1)).astype(kind)
    (tmp_path / "a.tif").write_bytes(tiff([values], **form))
    image = read_image(tmp_path / "a.tif")
    top = values.max() if kind == np.uint8 else 65535
    expected = values.astype(float) if kind == np.uint8 else values * (255 / top)
    np.testing.assert_allclose(fitted(image, channels), expected, atol=1e-4)
    assert image.colour == (channels == 3)


@pytest.mark.parametrize(
    "form",
    [{}, {"order": ">"}, {"compression": 8, "predictor": 3}, {"tile": 16, "compression": 8, "predictor": 3}],
    ids=str,
)
def test_floating_point_bands(tmp_path, form):
    values = np.random.default_rng(0).random((21, 19, 5), np.float32)
    (tmp_path / "a.tif").write_bytes(tiff([values], **form))
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_allclose(fitted(image, 5), 255 * values, atol=1e-4)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bands_have_the_range_of_their_bits(tmp_path, bits):
    values = wide(9, 7, 4, top=700)
    (tmp_path / "a.tif").write_bytes(tiff([values], bits=bits))
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_allclose(fitted(image, 4), values * (255 / (2**bits - 1)), atol=1e-4)
    assert f"{bits}-bit" in image.notes[0]


def test_grey_of_12_bits_that_the_file_declares(tmp_path):
    values = wide(9, 8, 1, top=700)
    (tmp_path / "a.tif").write_bytes(tiff([values], bits=12))
    np.testing.assert_allclose(fitted(read_image(tmp_path / "a.tif"), 1), values * (255 / 4095), atol=1e-4)


def test_colours_and_infrared_serve_networks_of_three_and_of_four_channels(tmp_path):
    values = wide(9, 7, 4)
    (tmp_path / "a.tif").write_bytes(tiff([values], photometric=2, extra=(0,)))
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_allclose(fitted(image, 3), values[..., :3] * (255 / 65535), atol=1e-4)
    np.testing.assert_allclose(fitted(image, 4), values * (255 / 65535), atol=1e-4)
    small = (values // 256).astype(np.uint8)
    (tmp_path / "b.tif").write_bytes(tiff([small], photometric=2, extra=(0,)))
    np.testing.assert_array_equal(fitted(read_image(tmp_path / "b.tif"), 3), small[..., :3])
    np.testing.assert_array_equal(fitted(read_image(tmp_path / "b.tif"), 4), small)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_pages_are_channels_for_a_network_that_takes_as_many(tmp_path, kind, count):
    values = (wide(9, 7, count).astype(int) % (np.iinfo(kind).max + 1)).astype(kind)
    (tmp_path / "a.tif").write_bytes(tiff([values[..., [number]] for number in range(count)]))
    image = read_image(tmp_path / "a.tif")
    unit = 1 if kind == np.uint8 else 255 / 65535
    np.testing.assert_allclose(fitted(image, count), values * unit, atol=1e-4)
    np.testing.assert_allclose(fitted(image, 1)[..., 0], values[..., 0] * unit, atol=1e-4)
    assert image.notes[0] == f"first of {count} frames"
    assert f"its {count} pages" in image.notes[-1]


def test_pages_of_other_sizes_or_too_many_are_no_channels(tmp_path):
    small, large = wide(4, 4, 1), wide(8, 8, 1)
    for number, pages in enumerate(([large, small], [small] * 17)):
        (tmp_path / f"{number}.tif").write_bytes(tiff(pages))
        image = read_image(tmp_path / f"{number}.tif")
        with pytest.raises(UsageError, match="takes 2"):
            fitted(image, 2)
        assert fitted(image, 1).shape == (*pages[0].shape[:2], 1)


def test_a_damaged_tiff_of_bands_is_one_message(tmp_path):
    whole = tiff([wide(21, 19, 6)], compression=8)
    for length in range(8, len(whole), 97):
        (tmp_path / "a.tif").write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"a\.tif"):
            read_image(tmp_path / "a.tif")


# -- what a TIFF of bands declares -------------------------------------------------------------------------------


def test_a_page_of_more_bytes_than_four_for_each_pixel_of_the_limit_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff([wide(21, 19, 6)]))  # 4788 bytes
    with limits.using(pixels=1197):
        assert read_image(tmp_path / "a.tif").values[0].shape == (21, 19, 6)
    with limits.using(pixels=1196), expecting.raises(ImageError, "input-too-large", limit="pixels"):
        read_image(tmp_path / "a.tif")


def test_a_small_page_in_large_tiles_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("unpacked"))
    data = tiff([wide(4, 4, 6)], tile=16, more={322: (4, [30_000]), 323: (4, [30_000])})
    (tmp_path / "a.tif").write_bytes(data)
    with expecting.raises(ImageError, "input-too-large", limit="pixels"):
        decode_file(str(tmp_path / "a.tif"), "a.tif")


@pytest.mark.parametrize("form", [{}, {"tile": 16, "compression": 8}, {"planar": 2}], ids=str)
@pytest.mark.parametrize("most", [None, 1, 100])
def test_bands_do_not_depend_on_what_the_user_set_in_pillow(tmp_path, monkeypatch, form, most):
    values = wide(21, 19, 6)
    (tmp_path / "a.tif").write_bytes(tiff([values], **form))
    (tmp_path / "b.tif").write_bytes(tiff([values[..., [number]] for number in range(6)], **{**form, "planar": 1}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    for name in ("a.tif", "b.tif"):
        found = decode_file(str(tmp_path / name), name)
        np.testing.assert_allclose(found["values"][-1], values * (255 / 65535), atol=1e-4)
    assert most == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("form", [{"rows": 1}, {"tile": 16}, {"rows": 1, "planar": 2}], ids=str)
def test_strips_that_overlap_are_refused(tmp_path, form):
    """Each of them is the whole file: together they are unpacked to many times its bytes."""
    values = wide(33, 33, 6)
    data = tiff([values], **form)
    pieces = {"rows": 33, "tile": 9}["tile" if "tile" in form else "rows"] * (6 if "planar" in form else 1)
    tags = (324, 325) if "tile" in form else (273, 279)
    more = {tags[0]: (4, [8] * pieces), tags[1]: (4, [len(data) - 8] * pieces)}
    (tmp_path / "a.tif").write_bytes(tiff([values], **form, more=more))
    with expecting.raises(ImageError, "file-damaged", match="more bytes together"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("tag", [256, 257, 258, 259, 262, 273, 277, 279, 284, 317, 339])
def test_a_tag_without_a_value_is_named(tmp_path, tag):
    (tmp_path / "a.tif").write_bytes(tiff([wide(9, 7, 6)], more={tag: (3, [])}))
    with expecting.raises(ImageError, "file-damaged", match=f"tag {tag} .* has no value"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(("other", "tag"), [(284, 256), (317, 277), (262, 258)])
def test_a_tag_that_is_there_twice_is_named(tmp_path, other, tag):
    """Pillow takes the last one, and libtiff the first: one would check what the other does not use."""
    data = tiff([wide(9, 7, 6)])
    at = struct.unpack_from("<I", data, 4)[0]
    place = next(
        at + 2 + 12 * number for number in range(20) if struct.unpack_from("<H", data, at + 2 + 12 * number)[0] == other
    )
    (tmp_path / "a.tif").write_bytes(data[:place] + struct.pack("<H", tag) + data[place + 2 :])
    with expecting.raises(ImageError, "file-damaged", match=f"tag {tag} .* is there twice"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("form", "more", "says"),
    [
        ({}, {273: (4, [8])}, "1 places and 7 sizes for 7 strips"),
        ({}, {279: (4, [8, 9])}, "7 places and 2 sizes for 7 strips"),
        ({"planar": 2}, {273: (4, [8] * 7), 279: (4, [9] * 7)}, "7 places and 7 sizes for 42 strips"),
        ({}, {278: (3, [0])}, "strips have no width or height"),
        ({"tile": 16}, {322: (3, [0])}, "tiles have no width or height"),
        ({"tile": 16}, {323: (3, [0])}, "tiles have no width or height"),
        ({"tile": 16}, {324: (4, [8])}, "1 places and 4 sizes for 4 tiles"),
    ],
)
def test_lists_of_strips_that_are_not_those_of_the_page(tmp_path, form, more, says):
    (tmp_path / "a.tif").write_bytes(tiff([wide(21, 19, 6)], **form, more=more))
    with expecting.raises(ImageError, "file-damaged", match=says):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("more", [{273: (4, [8])}, {259: (3, [8])}, {277: (3, [])}], ids=str)
def test_a_damaged_later_page_leaves_the_first_one(tmp_path, more):
    first, second = wide(9, 7, 1), wide(9, 7, 1, seed=1)
    whole, broken = tiff([first, second]), tiff([first, second], more=more)
    # The first directory is that of the whole file, which names the second one of the other.
    start = struct.unpack_from("<I", whole, 4)[0]
    link = start + 2 + 12 * struct.unpack_from("<H", whole, start)[0]
    data = bytearray(whole + broken)
    at = struct.unpack_from("<I", broken, 4)[0]
    again = at + 2 + 12 * struct.unpack_from("<H", broken, at)[0]
    later = bytearray(broken)
    following = struct.unpack_from("<I", later, again)[0]
    entries = struct.unpack_from("<H", later, following)[0]
    for number in range(entries):
        place = following + 2 + 12 * number
        tag, form, length, value = struct.unpack_from("<HHII", later, place)
        if tag == 273 or length * {3: 2, 4: 4}[form] > 4:
            struct.pack_into("<I", later, place + 8, value + len(whole))
    data[len(whole) :] = later
    struct.pack_into("<I", data, link, len(whole) + following)
    (tmp_path / "a.tif").write_bytes(data)
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_allclose(fitted(image, 1), first * (255 / 65535), atol=1e-4)


def test_the_orientation_of_bands(tmp_path):
    values = wide(4, 6, 5)
    (tmp_path / "a.tif").write_bytes(tiff([values], more={274: (3, [6])}))
    expected = np.rot90(values, -1) * (255 / 65535)
    np.testing.assert_allclose(fitted(read_image(tmp_path / "a.tif"), 5), expected, atol=1e-4)


# -- other numbers of channels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 5, 6, 10, 16])
def test_arrays_of_bands_as_file_and_in_memory(tmp_path, channels):
    values = wide(29, 27, channels)
    np.save(tmp_path / "a.npy", values)
    for image in (read_image(tmp_path / "a.npy"), read_image(values), read_image(np.moveaxis(values, -1, 0).copy())):
        np.testing.assert_allclose(fitted(image, channels), values * (255 / 65535), atol=1e-4)
        assert image.pixels.shape == (29, 27, 3)


def test_another_number_of_channels_is_named_with_what_helps(tmp_path):
    bands, photo = read_image(wide(9, 7, 6)), read_image(wide(9, 7, 3))
    with pytest.raises(UsageError, match="6 channels") as error:
        fitted(bands, 3)
    assert error.value.code == "channels-misfit"
    assert error.value.data == {"found": [6], "expected": 3}
    assert fitted(read_image(wide(9, 7, 6)[..., :3]), 3).shape == (9, 7, 3)  # the advice
    with pytest.raises(UsageError, match=r"array \(h, w, 6\)") as error:
        fitted(photo, 6)
    assert error.value.data == {"found": [3], "expected": 6}
    with pytest.raises(UsageError, match="1 to 16"):
        fitted(photo, 40)


def test_opacity_is_a_channel_for_a_network_of_four(tmp_path):
    rgba = (wide(9, 7, 4) // 256).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    for image in (read_image(tmp_path / "a.png"), read_image(rgba), read_image(Image.fromarray(rgba))):
        np.testing.assert_array_equal(fitted(image, 4), rgba)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_a_stream_shrinks_values_as_fit_does(tmp_path, channels):
    np.save(tmp_path / "a.npy", wide(40, 30, channels, top=4095))
    with stream(image_source(tmp_path / "a.npy"), 1, (16, 12, channels)) as batches:
        (batch,) = batches
    (image,) = batch.images
    assert image.pixels.shape == (16, 12, 3)
    np.testing.assert_allclose(
        fit(image, 16, 12, channels), fit(read_image(tmp_path / "a.npy"), 16, 12, channels), atol=1e-4
    )


def test_a_stream_names_the_images_of_another_number_of_channels(tmp_path):
    np.save(tmp_path / "a.npy", wide(9, 7, 6))
    with stream(image_source([tmp_path / "a.npy", wide(9, 7, 5)]), 2, (9, 7, 5)) as batches:
        kept = [image for batch in batches for image in batch.images]
    assert [image.pixels.shape for image in kept] == [(9, 7, 3)]
    assert [failure.error.code for failure in batches.failures] == ["channels-misfit"]


@pytest.mark.parametrize("content", [np.array([object()]), np.zeros(3, "c8")], ids=["objects", "complex"])
def test_arrays_in_files_that_are_no_images(tmp_path, content):
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises((ImageError, UsageError)) as error:
        read_image(tmp_path / "a.npy")
    assert len(str(error.value)) < 500


# -- what a program holds ---------------------------------------------------------------------------------------

GREY = np.random.default_rng(1).random((6, 5, 3), np.float32)
BYTES = (255 * GREY).astype(np.uint8)
ACCEPTED = {
    "uint8": (BYTES, BYTES),
    "uint16": (wide(6, 5), wide(6, 5) * (255 / 65535)),
    "int64": (BYTES.astype(np.int64), BYTES),
    "float 0..1": (GREY, 255 * GREY),
    "float64 0..1": (GREY.astype(float), 255 * GREY),
    "float16 0..1": (GREY.astype(np.float16), 255 * GREY.astype(np.float16).astype(float)),
    "float 0..255": (BYTES.astype(np.float32), BYTES),
    "float 0..255 with fractions": (GREY * 250, GREY * 250),
    "boolean": (GREY > 0.5, 255.0 * (GREY > 0.5)),
    "channels first": (BYTES.transpose(2, 0, 1), BYTES),
    "batch of one": (BYTES[None], BYTES),
    "batch of one, channels first": (BYTES.transpose(2, 0, 1)[None], BYTES),
    "grey": (GREY[..., 0], 255 * GREY[..., :1].repeat(3, -1)),
    "grey with its axis": (GREY[..., :1], 255 * GREY[..., :1].repeat(3, -1)),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_arrays_that_are_accepted(kind):
    array, expected = ACCEPTED[kind]
    for image in (read_image(array), read_images(array)[0], read_images([array])[0]):
        np.testing.assert_allclose(fit(image, 6, 5, 3), expected, atol=0.01)
        assert all(len(note) < 200 for note in image.notes)


REFUSED = {
    "normalised": (GREY * 4 - 2, "image-range"),
    "above 1": (GREY * 1.5, "image-range"),
    "above 255": (GREY * 1000, "image-range"),
    "not a number": (np.where(GREY > 0.9, np.nan, GREY), "image-not-finite"),
    "infinite": (np.where(GREY > 0.9, np.inf, GREY), "image-not-finite"),
    "negative": (BYTES.astype(np.int16) - 200, "image-range"),
    "large": (BYTES.astype(np.int64) * 1000, "image-range"),
    "complex": (GREY.astype(np.complex64), "image-kind"),
    "text": (np.full((4, 4), "a"), "image-kind"),
    "flat": (BYTES.ravel(), "image-kind"),
    "no pixels": (BYTES[:0], "image-kind"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_arrays_that_are_refused_as_one_thing(kind):
    array, code = REFUSED[kind]
    for read in (read_image, read_images):
        with pytest.raises(UsageError) as error:
            read(array)
        assert error.value.code == code
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


def test_the_advice_on_ranges_helps():
    assert read_image(np.clip(GREY * 1.5, 0, 1)).pixels.shape == (6, 5, 3)  # "clip it to 0..1"
    assert read_image(GREY * 1.5 / 1.5).pixels.shape == (6, 5, 3)  # "scale it to 0..1"
    assert read_image((GREY * 1000 / 1000).astype(np.float32)).pixels.shape == (6, 5, 3)


def test_batches_are_their_images():
    batch = np.stack([BYTES, BYTES // 2])
    for sources in (batch, [batch], (batch,), [batch[0], batch[1]], batch.transpose(0, 3, 1, 2)):
        images = read_images(sources)
        assert [image.name for image in images] == ["image", "image-2"]
        for image, expected in zip(images, batch, strict=True):
            np.testing.assert_array_equal(image.pixels, expected)
        assert len(image_source(sources)) == 2
    with pytest.raises(UsageError, match="batch of 2") as error:
        read_image(batch)
    assert error.value.code == "image-kind"


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(BYTES).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, io.BytesIO, lambda data: io.BufferedReader(io.BytesIO(data))]
)
def test_the_bytes_of_a_file(make):
    source = make(png_bytes())
    for image in (read_image(source), *read_images(source), *read_images([source]), *image_source(source).images()):
        np.testing.assert_array_equal(image.pixels, BYTES)
        assert image.name == "image"
        assert image.sha256 is not None


def test_an_open_file_has_its_name_and_stays_where_it_is(tmp_path):
    (tmp_path / "cat.png").write_bytes(png_bytes())
    with open(tmp_path / "cat.png", "rb") as file:
        file.seek(3)
        assert read_image(file).name == "cat"
        assert file.tell() == 3
    with pytest.raises(ImageError, match="keep it open"):
        read_image(file)
    with open(tmp_path / "cat.png", encoding="latin-1") as text, pytest.raises(UsageError, match="'rb'"):
        read_image(text)


@pytest.mark.parametrize("source", [b"\xff" * 8_000_000, b"", b"cat.jpg", bytearray(5), io.BytesIO(b"\0" * 1000)])
def test_bytes_that_are_no_image_are_one_short_message(source):
    for read in (read_image, read_images):
        with pytest.raises(ImageError) as error:
            read(source)
        assert error.value.code == "not-an-image"
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sources",
    [
        list(range(100_000)),
        [[0.5] * 1000] * 1000,
        ["missing.png"] * 5000,
        [None] * 5000,
        [["a.png"]] * 5000,
        {"a": BYTES},
    ],
    ids=["numbers", "lists of numbers", "paths", "None", "lists", "dictionary"],
)
def test_messages_on_many_things_stay_short(sources):
    with pytest.raises((ImageError, UsageError)) as error:
        read_images(sources)
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize("text", ["a" * 8_000_000, "iVBORw0KGgo" * 100_000, "data:image/png;base64," + "A" * 100_000])
def test_texts_that_are_no_paths_are_short_messages(text):
    with pytest.raises(ImageError) as error:
        read_images(text)
    assert len(str(error.value)) < 1500


class Tensor:
    """A tensor of no library."""

    def __array__(self, dtype=None, copy=None):
        return GREY


class Symbolic:
    """A tensor without values."""

    def __array__(self, dtype=None, copy=None):
        raise NotImplementedError("a symbolic tensor has no values")


def test_tensors_are_told_by_what_they_can_do():
    np.testing.assert_allclose(fit(read_image(Tensor()), 6, 5, 3), 255 * GREY, atol=0.01)
    with pytest.raises(UsageError, match="Symbolic") as error:
        read_image(Symbolic())
    assert error.value.code == "image-kind"


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    plain = torch.tensor(GREY)
    first = plain.permute(2, 0, 1)
    for tensor in (plain, first, first.clone().requires_grad_(), first[None], first.double()):
        (image,) = read_images(tensor)
        np.testing.assert_allclose(fit(image, 6, 5, 3), 255 * GREY, atol=0.01)
    assert len(read_images(torch.stack([first, first]))) == 2
    half = read_image(first.bfloat16())
    np.testing.assert_allclose(fit(half, 6, 5, 3), 255 * GREY, atol=2)
    small = torch.zeros(3, 3, 3, dtype=torch.uint8)
    small[0] = 200  # red: torch has channels first where both fit
    assert read_image(small).pixels[0, 0].tolist() == [200, 0, 0]


def test_an_image_of_ones_own_keeps_its_values():
    values = np.full((4, 4, 5), 7.5, np.float32)
    image = InputImage("x", np.zeros((4, 4, 3), np.uint8), values=(values,), colour=False)
    np.testing.assert_array_equal(fit(image, 4, 4, 5), values)


def test_a_large_image_of_four_wide_channels_is_read_in_pieces(tmp_path):
    """5000 x 3000 of 16 bits: its values as float64 at once went beyond the reader's memory."""
    height, width = 3000, 5000
    row = np.arange(width * 4, dtype=">u2").tobytes()
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(b"\0" + row) for _ in range(height)) + packer.flush()
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0), b"IDAT": packed, b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    image = read_image(str(tmp_path / "wide.png"))
    red, opacity = (np.arange(width) * 4 / 257, (np.arange(width) * 4 + 3) / (257 * 255))
    expected = np.rint(red * opacity + 255 * (1 - opacity))
    assert image.pixels.shape == (height, width, 3)
    assert np.abs(image.pixels[[0, 1499, 2999], :, 0] - expected).max() <= 1
