"""Drawing, against plain loops and against the procedure of the notes as it was written."""

from __future__ import annotations

import base64
import errno
import io
import math
import os
import subprocess
import sys
import unicodedata
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from convscope.arrays import resize_map
from convscope.errors import ConvscopeError, UsageError
from convscope.files import safe_name, write_file
from convscope.render.channels import activation_sheet, sized
from convscope.render.colour import classic_tile, colour, filter_tile, shared_tiles
from convscope.render.encode import data_uri, encode_png, encode_webp
from convscope.render.grid import grid
from convscope.render.overlay import Paint, overlay, scaled_map
from convscope.render.text import beside, colour_bar, page, shortened, text_strip

pytestmark = pytest.mark.without_keras

settings.register_profile("unhurried", deadline=None)  # the first call may import matplotlib
settings.load_profile("unhurried")

MARGIN, GAP, WHITE = 12, 2, 255

any_maps = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint8, np.bool_]).flatmap(
    lambda dtype: arrays.arrays(dtype, st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)))
)


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- values to levels ------------------------------------------------------------------------------------


def notes_channel(channel: np.ndarray) -> np.ndarray:
    """The loop body of the notes."""
    channel = channel.copy()
    channel -= channel.mean()
    channel /= channel.std()
    channel *= 64
    channel += 128
    return np.clip(channel, 0, 255).astype("uint8")


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1, 1e4, 1e38])
@pytest.mark.parametrize("seed", range(5))
def test_classic_tile_is_the_notes_loop(seed, scale):
    channel = np.maximum(normal(9, 13, seed=seed), 0)
    np.testing.assert_array_equal(classic_tile(channel), notes_channel(channel))
    scaled = classic_tile((channel.astype(np.float64) * scale).astype(np.float32)).astype(int)
    assert np.abs(scaled - notes_channel(channel)).max() <= 1


@given(any_maps)
def test_classic_tile_of_anything(values):
    out = quietly(classic_tile, values[..., 0])
    assert out.dtype == np.uint8
    assert out.shape == values.shape[:2]


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e38, 1e-45, np.nan, np.inf])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (224, 224)])
def test_a_constant_channel_reads_as_empty(value, shape):
    assert not quietly(classic_tile, np.full(shape, value, np.float32)).any()


def test_classic_tile_leaves_its_argument_alone_and_counts_non_finite_values_as_zero():
    channel = np.array([[1.0, np.nan, 3.0], [np.inf, 2.0, -np.inf]], np.float32)
    before = channel.copy()
    zeroed = np.array([[1, 0, 3], [0, 2, 0]], np.float32)
    np.testing.assert_array_equal(classic_tile(channel), notes_channel(zeroed))
    np.testing.assert_array_equal(channel, before)


def test_shared_tiles_keep_magnitudes():
    activation = np.zeros((2, 2, 3), np.float32)
    activation[..., 1] = 2.0
    activation[0, 0, 2] = 10.0
    out = shared_tiles(activation)
    assert out[..., 0].max() == 0
    assert (out[..., 1] == 51).all()
    assert out[0, 0, 2] == 255
    assert (shared_tiles(np.full((2, 2, 1), 3.0)) == 255).all()
    assert shared_tiles(np.array([[[-1.0, 0.0, 3.0]]])).tolist() == [[[0, 64, 255]]]
    assert shared_tiles(np.array([[[-4.0, -2.0]]])).tolist() == [[[0, 255]]]


@given(any_maps)
def test_shared_tiles_of_anything(values):
    out = quietly(shared_tiles, values)
    assert out.dtype == np.uint8
    finite = [float(v) if math.isfinite(v) else 0.0 for v in values.ravel().tolist()]
    order = np.argsort(finite)
    assert (np.diff(out.ravel()[order].astype(int)) >= 0).all()
    if any(finite):
        assert out.ravel()[order[-1]] == 255 or max(finite) == min(min(finite), 0)


def notes_deprocess(img: np.ndarray, crop: int) -> np.ndarray:
    img = img.copy()
    img -= img.mean()
    img /= img.std() + 1e-5
    img *= 0.15
    img = img[crop:-crop, crop:-crop, :]
    img += 0.5
    img = np.clip(img, 0, 1)
    img *= 255
    return np.clip(img, 0, 255).astype("uint8")


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_filter_image_is_the_notes_function(scale):
    image = normal(60, 62, 3) * np.float32(scale)
    before = image.copy()
    np.testing.assert_array_equal(filter_tile(image, 25), notes_deprocess(image, 25))
    np.testing.assert_array_equal(image, before)


def test_filter_image_without_a_crop():
    assert filter_tile(normal(4, 5, 1), 0).shape == (4, 5, 1)
    assert (filter_tile(np.full((4, 4, 3), 7.0), 1) == 127).all()


@pytest.mark.parametrize("crop", [-1, 2, 3])
def test_filter_image_refuses_a_crop_of_everything(crop):
    with pytest.raises(UsageError, match=str(crop)):
        filter_tile(normal(4, 9, 3), crop)


@given(any_maps)
def test_filter_image_of_anything(values):
    assert quietly(filter_tile, values, 0).dtype == np.uint8


# --- levels to images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["viridis", "inferno", "twilight", "tab10"])
def test_colour_is_matplotlibs(name):
    from matplotlib import colormaps

    levels = np.arange(256, dtype=np.uint8).reshape(2, 128)
    expected = [[colormaps[name](level / 255, bytes=True)[:3] for level in row] for row in levels.tolist()]
    np.testing.assert_array_equal(colour(levels, name), np.array(expected))


def test_an_unknown_colour_map():
    with pytest.raises(UsageError, match="did you mean 'viridis'"):
        colour(np.zeros((1, 1), np.uint8), "virdis")


def grid_oracle(tiles: list[np.ndarray], columns: int, gap: int, fill: int) -> np.ndarray:
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    height, width = tiles[0].shape[:2]
    out = np.full((rows * height + (rows - 1) * gap, columns * width + (columns - 1) * gap, 3), fill)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            row, dy = divmod(y, height + gap)
            column, dx = divmod(x, width + gap)
            index = row * columns + column
            if dy < height and dx < width and index < len(tiles):
                out[y, x] = tiles[index][dy, dx]
    return out


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_grid_is_the_plain_loop(count, columns, gap, height, width):
    tiles = list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))
    out = grid(tiles, columns, gap, fill=9)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, grid_oracle(tiles, columns, gap, 9))


@pytest.mark.parametrize(("count", "columns"), [(0, 4), (3, 0)])
def test_grid_of_nothing(count, columns):
    with pytest.raises(UsageError):
        grid([np.zeros((2, 2, 3), np.uint8)] * count, columns, 1)


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.tuples(*[st.integers(1, 20)] * 4),
)
def test_resize_map_is_exact_on_constants(value, sizes):
    height, width, new_height, new_width = sizes
    out = resize_map(np.full((height, width), value), new_height, new_width)
    assert out.shape == (new_height, new_width)
    assert (out == np.float32(value)).all()


def resized_oracle(values: np.ndarray, size: int) -> np.ndarray:
    """Rows resampled by a triangle as wide as a cell of the coarser of the two."""
    scale = len(values) / size
    reach = max(scale, 1.0)
    out = []
    for index in range(size):
        centre = (index + 0.5) * scale
        weights = [max(0.0, 1 - abs(at + 0.5 - centre) / reach) for at in range(len(values))]
        out.append(sum(w * row for w, row in zip(weights, values, strict=True)) / sum(weights))
    return np.array(out)


@pytest.mark.parametrize("size", [(7, 7), (14, 21), (224, 200), (3, 2), (1, 1)])
def test_resize_map_is_bilinear(size):
    heatmap = normal(7, 7)
    expected = resized_oracle(resized_oracle(heatmap.astype(float), size[0]).T, size[1]).T
    np.testing.assert_allclose(resize_map(heatmap, *size), expected, atol=1e-5)


def overlay_oracle(photo: np.ndarray, heatmap: np.ndarray, opacity: float, colours: str) -> np.ndarray:
    """Pixel by pixel, for a heatmap of the photo's size (which no resizing changes)."""
    from matplotlib import colormaps

    out = np.zeros(photo.shape)
    for y in range(photo.shape[0]):
        for x in range(photo.shape[1]):
            relevance = max(heatmap[y, x], 0) / heatmap.max()
            tint = 255 * np.array(colormaps[colours](relevance)[:3])
            alpha = opacity * relevance
            out[y, x] = (1 - alpha) * photo[y, x] + alpha * tint
    return out


@pytest.mark.parametrize("colours", ["inferno", "viridis"])
@pytest.mark.parametrize("opacity", [0.0, 0.5, 1.0])
def test_overlay_is_the_plain_loop(opacity, colours):
    photo = np.random.default_rng(1).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    heatmap = normal(9, 8)
    out = overlay(photo, heatmap, Paint(opacity, colours=colours))
    assert out.dtype == np.uint8
    expected = overlay_oracle(photo, heatmap, opacity, colours)
    # A neighbour in the table of 256 colours is up to 4.2 away, and colour and alpha are rounded; a wrap is off by 255.
    np.testing.assert_allclose(out, expected, atol=6)
    np.testing.assert_array_equal(out[heatmap <= 0], photo[heatmap <= 0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_overlay_does_not_depend_on_the_heatmaps_scale(scale):
    photo = np.full((28, 28, 3), 255, np.uint8)
    heatmap = normal(7, 7)
    close = overlay(photo, heatmap).astype(int) - overlay(photo, heatmap * np.float32(scale))
    assert np.abs(close).max() <= 2


def test_overlay_lies_where_the_heatmap_is():
    photo = np.full((70, 70, 3), 128, np.uint8)
    heatmap = np.full((7, 7), -1.0)
    heatmap[1, 5] = 2.0
    changed = (overlay(photo, heatmap) != photo).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(14.5, abs=1)
    assert (columns.min() + columns.max()) / 2 == pytest.approx(54.5, abs=1)
    assert changed.sum() < 21 * 21


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_a_heatmap_that_says_nothing_leaves_the_photo(value):
    photo = np.random.default_rng(1).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    heatmap = np.full((3, 3), value)
    np.testing.assert_array_equal(quietly(overlay, photo, heatmap), photo)
    heatmap[0, 0] = -2
    np.testing.assert_array_equal(quietly(overlay, photo, heatmap), photo)


@given(arrays.arrays(np.float64, (3, 4)))
@example(np.array([[-4.5e15, 2.3e-308]]))
def test_overlay_of_anything(heatmap):
    photo = np.full((6, 5, 3), 200, np.uint8)
    out = quietly(overlay, photo, heatmap)
    assert out.dtype == np.uint8
    assert out.shape == photo.shape


def test_overlay_refuses_other_opacities():
    with pytest.raises(UsageError, match=r"1\.5"):
        overlay(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2)), 1.5)


def test_a_signed_map_has_two_colours_and_is_clear_at_zero():
    photo = np.full((30, 30, 3), 100, np.uint8)
    heatmap = np.zeros((3, 3))
    heatmap[0, 0], heatmap[2, 2] = 2.0, -1.0
    paint = Paint(1.0, signed=True)
    out = overlay(photo, heatmap, paint).astype(int)
    high, low = out[4, 4], out[25, 25]
    np.testing.assert_allclose(high, colour(np.array([255], np.uint8), "PuOr_r")[0], atol=2)  # 2 of 2
    half = colour(np.array([64], np.uint8), "PuOr_r")[0]  # -1 of 2, and half as opaque
    np.testing.assert_allclose(low, (half.astype(int) + 100) / 2, atol=3)
    np.testing.assert_array_equal(out[15, 15], [100, 100, 100])
    assert (overlay(photo, heatmap)[25, 25] == 100).all()  # without signs what is negative is not drawn
    assert paint.highest(heatmap) == 2


def test_a_peak_of_ones_own_makes_maps_comparable():
    photo = np.zeros((20, 20, 3), np.uint8)
    strong, weak = np.full((2, 2), 4.0), np.full((2, 2), 1.0)
    np.testing.assert_array_equal(overlay(photo, strong), overlay(photo, weak))
    paint = Paint(peak=4.0)
    assert overlay(photo, strong, paint).sum() > 4 * overlay(photo, weak, paint).sum()
    np.testing.assert_array_equal(overlay(photo, strong, paint), overlay(photo, strong))


def test_contours_run_where_the_map_crosses_quarters_of_its_peak():
    photo = np.full((64, 64, 3), 90, np.uint8)
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    out = overlay(photo, ramp, Paint(0.0, contours=True))
    white = np.flatnonzero((out[32] == 255).all(axis=-1))
    np.testing.assert_allclose(white, [15, 31, 46], atol=1)  # 63/4, 63/2, 63*3/4
    assert (out[32, 5] == 90).all()


def test_maps_are_scaled_as_other_tools_do():
    raw = np.array([[-2.0, 1.0], [3.0, 5.0]])
    ours = scaled_map(raw, 4, 4)
    assert (ours.min(), ours.max()) == (0, 1)
    theirs = scaled_map(raw + 4, 4, 4, "pytorch-grad-cam")  # less the lowest value, which here is 2
    large = resize_map((raw + 2) / 7, 4, 4)
    np.testing.assert_allclose(theirs, (large - large.min()) / np.ptp(large), atol=1e-6)
    corners = scaled_map(raw + 4, 5, 5, "tf-keras-vis")
    np.testing.assert_allclose(corners[::4, ::4], (raw + 2) / 7, atol=1e-6)
    assert corners[0, 2] == pytest.approx((corners[0, 0] + corners[0, 4]) / 2)
    np.testing.assert_array_equal(scaled_map(raw, 4, 4, "captum"), np.kron(raw, np.ones((2, 2))))
    with pytest.raises(UsageError, match="captum"):
        scaled_map(raw, 4, 4, "captm")


# --- text and bars ---------------------------------------------------------------------------------------


def ink(image: np.ndarray) -> np.ndarray:
    return (image != WHITE).any(axis=-1)


def test_short_text_does_not_depend_on_the_width():
    narrow, wide = text_strip("conv2d_1", 100), text_strip("conv2d_1", 400)
    np.testing.assert_array_equal(narrow, wide[:, :100])
    assert ink(narrow).any()
    assert not ink(wide[:, 100:]).any()
    assert not ink(text_strip("", 50)).any()


@pytest.mark.parametrize("width", [40, 90, 200])
def test_long_text_keeps_both_ends_and_loses_its_middle(width):
    text = "first/" + "x" * 20_000 + "/last"
    shown = shortened(text, width, 14)
    head, tail = shown.split("…")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
    strip = text_strip(text, width)
    assert strip.shape[1] == width
    assert not ink(text_strip(shown, width + 100)[:, width:]).any()
    assert ink(strip[:, width * 2 // 3 :]).any()


def test_colour_bar_runs_from_low_at_the_bottom_to_high_at_the_top():
    bar = colour_bar(100, "-1.5", "12", "inferno")
    assert len(bar) == 100
    np.testing.assert_array_equal(bar[0, 0], colour(np.uint8(255), "inferno"))
    np.testing.assert_array_equal(bar[-1, 0], colour(np.uint8(0), "inferno"))
    brightness = bar[:, 0].astype(int) @ [299, 587, 114]
    assert (np.diff(brightness) <= 0).all()
    labels = ink(bar[:, 16:]).any(axis=1)
    assert labels[:20].any()
    assert labels[-20:].any()
    assert not labels[20:-20].any()


def test_images_stand_beside_each_other_on_a_page():
    tall, wide = np.full((30, 5, 3), 10, np.uint8), np.full((8, 900, 3), 20, np.uint8)
    expected = np.full((30, 5 + MARGIN + 900, 3), WHITE)
    expected[:, :5], expected[:8, 5 + MARGIN :] = 10, 20
    row = beside([tall, wide])
    np.testing.assert_array_equal(row, expected)
    whole = page(row, "title", "subtitle")
    np.testing.assert_array_equal(whole[-MARGIN - 30 : -MARGIN, MARGIN:-MARGIN], expected)
    assert len(whole) > len(page(row, "title")) > 30 + 2 * MARGIN


# --- the activation sheet --------------------------------------------------------------------------------


def tiles_of(sheet: np.ndarray, count: int, side: int, columns: int, right: int = 0) -> list[np.ndarray]:
    """The tiles cut out of a sheet whose grid ends at its lower right corner (less `right` pixels)."""
    columns = min(columns, count)
    rows = -(-count // columns)
    top = len(sheet) - MARGIN - rows * (side + GAP) + GAP
    left = sheet.shape[1] - MARGIN - right - columns * (side + GAP) + GAP
    return [
        sheet[
            top + row * (side + GAP) : top + row * (side + GAP) + side,
            left + column * (side + GAP) : left + column * (side + GAP) + side,
        ]
        for row, column in (divmod(index, columns) for index in range(count))
    ]


@pytest.mark.parametrize("channels", [17, 64, 100])
def test_the_sheet_shows_every_channel_in_the_classic_scale(channels):
    activation = normal(7, 7, channels)
    activation[..., 5] = 0
    sheet = activation_sheet(activation, None, "conv3")
    for index, tile in enumerate(tiles_of(sheet, channels, 77, 16)):
        levels = notes_channel(activation[..., index].copy()) if index != 5 else np.zeros((7, 7), np.uint8)
        for y, x in np.ndindex(7, 7):
            cell = tile[y * 11 : y * 11 + 11, x * 11 : x * 11 + 11]
            difference = cell.astype(int) - colour(levels[y, x])
            assert np.abs(difference).max() <= 4  # a level more or less, from the order of summing


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 2048])
def test_a_dense_layer_is_drawn_in_one_scale(channels):
    values = np.linspace(0, 5, channels) if channels > 1 else np.array([5.0])
    sheet = activation_sheet(values, None, "")
    np.testing.assert_array_equal(sheet, activation_sheet(values.reshape(1, 1, -1), None, "", shared=True))
    from_bar = colour_bar(100, "0", "5").shape[1] + MARGIN
    lines = -(-channels // 16) * 34 - 2
    below = max(40 - lines, 0)  # a bar is 40 high at least
    tiles = tiles_of(sheet[: len(sheet) - below], channels, 32, 16, right=from_bar)
    for value, tile in zip(values, tiles, strict=True):
        np.testing.assert_array_equal(tile, np.broadcast_to(colour(np.uint8(round(value * 51))), (32, 32, 3)))


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((7, 7), (77, 77)),
        ((14, 14), (84, 84)),
        ((28, 28), (84, 84)),
        ((80, 80), (80, 80)),
        ((112, 112), (112, 112)),
        ((150, 150), (96, 96)),
        ((224, 224), (96, 96)),
        ((448, 224), (96, 48)),
        ((20, 10), (80, 40)),
        ((1, 40), (12, 80)),
        ((500, 1), (96, 12)),
        ((1, 1), (32, 32)),
    ],
)
def test_maps_of_every_size_become_tiles_of_about_the_same(size, shown):
    assert sized(np.zeros(size, np.uint8), 80).shape == shown


@given(st.integers(2, 600))
def test_no_tile_is_tiny_or_huge(side):
    assert 55 <= sized(np.zeros((side, side), np.uint8), 80).shape[0] <= 116


def test_large_maps_are_averaged_and_small_ones_keep_their_cells():
    checks = np.indices((192, 192)).sum(axis=0).astype(np.uint8) % 2 * 200
    assert (sized(checks, 80) == 100).all()
    small = np.arange(4, dtype=np.uint8).reshape(2, 2)
    expected = [[small[y // 40, x // 40] for x in range(80)] for y in range(80)]
    np.testing.assert_array_equal(sized(small, 80), expected)


def test_few_channels_leave_no_blank_columns():
    one, three = (activation_sheet(normal(40, 40, count), None, "") for count in (1, 3))
    assert three.shape[1] - one.shape[1] == 2 * (200 + GAP)
    assert ink(three[-MARGIN - 100, -MARGIN - 600 : -MARGIN]).mean() > 0.99


def test_the_photo_stands_at_the_left_and_the_title_above():
    photo = np.full((30, 60, 3), (200, 30, 60), np.uint8)
    sheet = activation_sheet(normal(7, 7, 20), photo, "block1_conv1", "7 x 7, 20 channels")
    rows, columns = np.nonzero((sheet == (200, 30, 60)).all(axis=-1))
    assert (columns.min(), columns.max()) == (MARGIN, MARGIN + 199)
    assert rows.max() - rows.min() == 99
    assert ink(sheet[MARGIN : rows.min()]).any()
    assert not ink(sheet[:MARGIN]).any()
    assert not ink(sheet[-MARGIN:]).any()


def test_each_row_is_numbered():
    sheet = activation_sheet(normal(7, 7, 40), None, "")
    left = sheet.shape[1] - MARGIN - 16 * (77 + GAP) + GAP
    top = len(sheet) - MARGIN - 3 * (77 + GAP) + GAP
    gutters = [sheet[top + row * 79 : top + row * 79 + 77, MARGIN:left] for row in range(3)]
    assert all(ink(gutter[25:52]).any() for gutter in gutters)
    assert not any(ink(gutter[:25]).any() or ink(gutter[52:]).any() for gutter in gutters)
    assert len({gutter.tobytes() for gutter in gutters}) == 3


def test_a_long_title_widens_a_narrow_sheet_but_not_without_end():
    narrow = activation_sheet(normal(7, 7, 1), None, "a")
    wide = activation_sheet(normal(7, 7, 1), None, "a/" * 2000)
    assert wide.shape[1] == 720 + 2 * MARGIN > narrow.shape[1]


def test_the_shared_sheet_carries_its_range():
    activation = np.abs(normal(7, 7, 40))
    plain = activation_sheet(activation, None, "x")
    shared = activation_sheet(activation, None, "x", shared=True)
    assert shared.shape[1] > plain.shape[1]
    bar = shared[:, -MARGIN - (shared.shape[1] - plain.shape[1]) + MARGIN :]
    assert (bar == colour(np.uint8(255))).all(axis=-1).any()


@pytest.mark.parametrize("shape", [(2, 2), (1, 7, 7, 3), (0, 4, 3), (4, 4, 0), (0,)])
def test_other_activations_are_refused(shape):
    with pytest.raises(UsageError, match="pick one image"):
        activation_sheet(np.zeros(shape), None, "x")


@given(any_maps, st.booleans())
def test_a_sheet_of_anything(values, shared):
    photo = np.zeros((3, 500, 3), np.uint8)
    sheet = quietly(activation_sheet, values, photo, "t\nitle", "", shared)
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3


# --- files -----------------------------------------------------------------------------------------------


def test_encoding_and_addresses():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    png = encode_png(image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), image)
    assert data_uri(png, "image/png").startswith("data:image/png;base64,iVBOR")
    assert base64.b64decode(data_uri(b"\0\xff", "x/y").split(",")[1]) == b"\0\xff"


def test_webp_keeps_the_values():
    given = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], 64, axis=1).repeat(3, axis=2)
    coarse, fine = encode_webp(given, 5), encode_webp(given, 95)
    assert len(coarse) <= len(fine)
    image = Image.open(io.BytesIO(fine))
    assert image.format == "WEBP"
    assert np.abs(np.asarray(image).astype(int) - given).mean() < 3
    with pytest.raises(UsageError, match="use PNG"):
        encode_webp(np.zeros((16384, 1, 3), np.uint8), 80)


def test_write_file_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_file(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_file(str(path), b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(path.parent) == ["c.txt"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


def test_write_file_follows_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_file(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("step", ["rename", "write"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted(*_: object) -> None:
        raise failure

    def half(file) -> None:
        file.write(b"half")
        raise failure

    if step == "rename":
        monkeypatch.setattr("os.replace", interrupted)
    expected = ConvscopeError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        write_file(path, "new" if step == "rename" else half)
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"
    if expected is ConvscopeError:
        assert "free some space" in str(error.value)


def test_write_file_says_what_to_do(tmp_path):
    with pytest.raises(ConvscopeError, match="give a file name"):
        write_file(tmp_path, "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvscopeError, match="a part of the path is a file"):
        write_file(tmp_path / "file" / "x.txt", "x")
    with pytest.raises(ConvscopeError, match="choose a shorter name"):
        write_file(tmp_path / ("x" * 300), "x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("resnet50v2/conv3_block4_out", "resnet50v2.conv3_block4_out"),
        ("layer#1", "layer_1"),
        ("a b:c*?", "a_b_c__"),
        ("", "_"),
        (".", "_"),
        ("../..", "_"),
        ("/etc/passwd", "etc.passwd"),
        (".hidden", "hidden"),
        ("trailing. ", "trailing._"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        ("고양이", "고양이"),
        ("e\u0301", "\u00e9"),
        ("\ud800x", "_x"),
        ("a\\b\n\0", "a_b__"),
    ],
)
def test_safe_name(text, name):
    assert safe_name(text) == name


@given(st.text(st.characters(codec=None), max_size=400))
def test_safe_names_are_safe(tmp_path_factory, text):
    name = safe_name(text)
    assert 0 < len(name.encode()) <= 150
    assert name.strip(".") == name
    assert not set(name) & set('<>:"/\\|?*#% ')
    assert name.isprintable()
    assert unicodedata.normalize("NFC", name) == name
    assert safe_name(name) == name


def test_long_names_stay_apart():
    first, second = (safe_name("block/" * 60 + end) for end in ("conv1", "conv2"))
    assert first != second
    assert first[:100] == second[:100]


def test_importing_does_not_import_matplotlib():
    code = "import sys, convscope.render, convscope.images.decode; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
