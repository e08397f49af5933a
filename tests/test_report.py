"""The report: its numbers against the techniques' own, what it says where one can't be, and the page in a browser."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
import shutil
from html import unescape

import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import keras, layers
from PIL import Image

from convscope.errors import ConvscopeError, UsageError
from convscope.files import dump
from convscope.images.image import InputImage
from convscope.networks import open_model
from convscope.render import heatmaps as views
from convscope.render.channels import channel_grid
from convscope.render.colour import classic_tile, colour
from convscope.render.encode import data_uri, encode_png, small_data_uri
from convscope.render.overlay import overlay, tint
from convscope.reports import page as page_module
from convscope.reports import report, studies
from convscope.techniques.activations import activations
from convscope.techniques.filters import filters
from convscope.techniques.heatmaps import heatmap

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
KOREAN = "고양이 사진"
CLASSES = ("cat", "강아지", "<b>fox</b>", "قطة", "a_class_with_quite_a_long_name_that_has_to_wrap_somewhere_on_a_phone")


def two_photos(photo):
    return [
        InputImage(KOREAN, photo, notes=("transparency laid over white",)),
        InputImage(HOSTILE, photo[:, ::-1].copy()),
    ]


def page_of(path):
    return path.read_text(encoding="utf-8")


def data_of(html):
    found = re.search(r'<script type="application/json" id="results">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of two photos with names that try things, and what it returned."""
    y, x = np.mgrid[:48, :64]
    photo = np.stack([4 * x, 5 * y, 128 + 0 * x], axis=-1).astype(np.uint8)
    photo[(y - 20) ** 2 + (x - 40) ** 2 < 100] = (250, 240, 60)
    network = open_model(models.plain(), classes=CLASSES)
    path = tmp_path_factory.mktemp("report") / "page.html"
    photos = two_photos(photo)
    return network, photos, path, report(network, photos, path, channels=3, seed=7)


@pytest.mark.slow(reason="every filter of two layers is made again")
def test_the_numbers_are_those_of_the_techniques(made):
    network, photos, _, data = made
    first = heatmap(network, photos)
    shown = [row for row in data["heatmaps"] if row["class"] == row["predictions"][0]["index"]]
    assert json.loads(dump(shown)) == json.loads(dump(first.to_json()["heatmaps"]))
    assert data["activations"] == activations(network, photos).to_json()["activations"]
    for section in data["filters"]:
        shown = [row["channel"] for row in section["filters"]]
        alone = filters(network, section["layer"], shown, seed=7, natural_images=photos)
        assert section["filters"] == alone.to_json()["filters"]
        every = filters(network, section["layer"], "all", seed=7, steps=1).rows
        climb = [row.channel for row in every if row.tries == 1]  # those that needed no other start
        assert shown == climb[:3]
        assert section["stuck"] == sum(row.tries > 1 for row in every[: section["looked_at"]])
    assert [section["layer"] for section in data["filters"]] == ["conv_a", "conv_b"]


def test_the_page_holds_the_same_numbers(made):
    _, photos, path, data = made
    html = page_of(path)
    assert data_of(html) == json.loads(dump(data))
    assert data["files"] == [str(path)]
    assert data["provenance"]["technique"] == "report"
    assert [row["name"] for row in data["provenance"]["pictures"]] == [photo.name for photo in photos]
    for row in data["heatmaps"]:
        assert f"logit {row['score']:.3g}".replace("-", "−") in html
        assert f"{100 * row['probability']:.1f}\N{NO-BREAK SPACE}%" in html
    for row in data["activations"]:
        if row["zeros"] is not None:
            assert f"{100 * row['zeros']:.1f}\N{NO-BREAK SPACE}% zeros, {row['empty_channels']} of" in html


def test_the_next_best_classes_are_explained_beside_the_one_asked_for(made, photo):
    network, _, path, _ = made
    probabilities = network.head.probabilities(network.predict(network.prepare([InputImage("p", photo)])))[0]
    best = [int(index) for index in np.argsort(-probabilities)]
    data = report(network, photo, path.with_name("worst.html"), target=best[-1], channels=0)
    assert [row["class"] for row in data["heatmaps"]][:2] == [best[-1], best[0]]
    assert all(probabilities[row["class"]] >= 0.05 for row in data["heatmaps"][2:])
    assert data["filters"] == []
    assert 'id="filters"' not in page_of(path.with_name("worst.html"))


def test_the_page_asks_for_nothing(made):
    html = page_of(made[2])
    addresses = re.findall(r'(?:src|href|action|data)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert addresses
    assert not [address for address in addresses if not address.startswith(("data:", "#"))]
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_names_are_text_and_nothing_else(made):
    html = page_of(made[2])
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "<b>fox</b>" not in html
    assert KOREAN in html


# --- what can't be shown ---------------------------------------------------------------------------------


def test_a_blank_heatmap_says_why(photo, tmp_path):
    model = models.plain()
    model.get_layer("out").kernel.assign(np.zeros((6, 5), np.float32))
    data = report(open_model(model), photo, tmp_path / "page.html", channels=0)
    assert {row["status"] for row in data["heatmaps"]} == {"blank"}
    html = page_of(tmp_path / "page.html")
    assert f"Blank: {data['heatmaps'][0]['reason']}." in unescape(html)
    assert 'class="tint" data-method="grad-cam"' not in html
    assert 'class="tint" data-method="eigen-cam"' in html  # which does not ask for a class
    assert 'type="range"' not in html


@pytest.fixture(scope="module")
def flat():
    """A network without a map: no heatmap, no filters of convolutions."""
    model = models.seeded(
        keras.Sequential(
            [
                layers.Input((6, 6, 3)),
                layers.Flatten(name="flat"),
                layers.Dense(4, activation="relu", name="hidden"),
                layers.Dense(3, name="out"),
            ]
        )
    )
    return open_model(model)


def test_a_network_without_maps_still_has_a_page(flat, photo, tmp_path):
    data = report(flat, photo, tmp_path / "page.html")
    assert set(data["missing"]) == {"heatmaps", "filters"}
    html = page_of(tmp_path / "page.html")
    assert "There is no heatmap: a heatmap needs a layer with a map" in html
    assert data["missing"]["filters"] in html
    logits = flat.predict(flat.prepare([InputImage("p", photo)]))[0]
    assert [row["logit"] for row in data["predictions"][0]["predictions"]] == sorted(map(float, logits), reverse=True)
    assert 'class="bar negative"' in html or (logits >= 0).all()


def test_what_does_not_exist_is_an_error_and_leaves_no_page(flat, made, photo, tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(UsageError, match="out of range"):
        report(flat, photo, path, target=9)
    with pytest.raises(UsageError, match="conv_a"):
        report(made[0], photo, path, filter_layers=["conv_aa"])
    with pytest.raises(UsageError, match="no class"):
        report(made[0], photo, path, target="wolf")
    assert not path.exists()
    with pytest.raises(ConvscopeError, match="written"):
        report(made[0], photo, tmp_path, channels=0)


def test_one_output_has_one_heatmap(photo, tmp_path):
    model = models.plain(classes=1, head=None)
    model.get_layer("out").bias.assign(np.full(1, 50, np.float32))
    data = report(open_model(model), photo, tmp_path / "page.html", channels=0)
    assert len(data["heatmaps"]) == 1
    assert "They are no probabilities" in page_of(tmp_path / "page.html")


def test_a_sigmoid_unit_has_both_classes(photo, tmp_path):
    network = open_model(models.plain(classes=1, head="sigmoid"), classes=("cat", "dog"))
    data = report(network, photo, tmp_path / "page.html", channels=0)
    assert sorted(row["class_name"] for row in data["heatmaps"]) == ["cat", "dog"]
    scores = [row["score"] for row in data["heatmaps"]]
    assert scores[0] == pytest.approx(-scores[1])


@pytest.mark.slow(reason="a whole report")
def test_grey_networks_and_tiny_photos(tmp_path):
    data = report(
        open_model(models.plain(channels=1)), np.eye(5, dtype=np.uint8) * 255, tmp_path / "page.html", channels=1
    )
    assert (tmp_path / "page.html").stat().st_size > 1000
    assert data["filters"][0]["layer"] == "conv_a"


# --- what is shown ---------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(2, 9))
def test_a_choice_over_the_depth_goes_from_the_first_to_the_last(length, count):
    items = list(range(length))
    chosen = studies.evenly_chosen(items, count)
    assert len(chosen) == min(length, count)
    assert chosen == sorted(set(chosen))
    if items:
        assert (chosen[0], chosen[-1]) == (0, length - 1)


@pytest.fixture(scope="module")
def deep():
    stack = [layers.Conv2D(2, 3, padding="same", activation="relu", name=f"conv_{number}") for number in range(12)]
    head = [layers.GlobalAveragePooling2D(name="gap"), layers.Dense(2, activation="softmax", name="out")]
    return open_model(models.seeded(keras.Sequential([layers.Input((8, 8, 3)), *stack, *head])))


def test_a_deep_network_shows_some_layers_and_says_so(deep, photo, tmp_path):
    data = report(deep, photo, tmp_path / "page.html", channels=0)
    html = page_of(tmp_path / "page.html")
    assert len(data["activations"]) == 12
    assert html.count('class="sheet"') == studies.SHEETS
    assert f"{studies.SHEETS} of 12 layers are drawn" in html
    assert data["provenance"]["parameters"]["sheets"][::7] == ["conv_0", "conv_11"]


def test_layers_that_are_asked_for_are_shown(deep, photo, tmp_path):
    data = report(deep, photo, tmp_path / "page.html", layers="conv:10", filter_layers=["conv_4"], channels=1)
    assert page_of(tmp_path / "page.html").count('class="sheet"') == 10
    assert [section["layer"] for section in data["filters"]] == ["conv_4"]


@pytest.mark.slow(reason="filters get new starts until they count as dead")
def test_a_dead_filter_has_its_reason_in_place_of_a_image(photo, tmp_path):
    model = models.plain()
    model.get_layer("conv_b").bias.assign(np.full(6, -1000, np.float32))
    data = report(open_model(model), photo, tmp_path / "page.html", filter_layers=["conv_b"], channels=2)
    rows = data["filters"][0]["filters"]
    assert [row["status"] for row in rows] == ["dead", "dead"]
    html = page_of(tmp_path / "page.html")
    assert html.count('class="gone"') == 2
    assert f"dead: {rows[0]['reason']}" in html


def test_a_guess_is_called_a_guess(made, photo, tmp_path):
    assert "Not certain:" in page_of(made[2])
    report(open_model(models.plain(), preprocess="0..1"), photo, tmp_path / "page.html", channels=0)
    assert "Not certain:" not in page_of(tmp_path / "page.html")


@pytest.mark.slow(reason="a whole report")
def test_progress_speaks_of_each_part(made, photo, tmp_path):
    said = []
    report(made[0], photo, tmp_path / "page.html", channels=1, progress=lambda event: said.append(event.label))
    assert {text.split(":")[0] for text in said} == {"heatmaps", "layers", "filters of conv_a", "filters of conv_b"}


@pytest.mark.slow(reason="several reports")
def test_a_report_makes_heatmaps_where_it_is_told_and_says_why_there(photo, tmp_path):
    network = open_model(models.plain())
    data = report(network, photo, tmp_path / "page.html", heatmap_layer="best", channels=0, check=True)
    parameters = data["provenance"]["parameters"]["heatmaps"]
    assert "by insertion less deletion" in parameters[0]["layer_rule"]
    assert {one["layer"] for one in parameters} == {data["heatmaps"][0]["layer"]}
    assert parameters[0]["layer_rule"] in page_of(tmp_path / "page.html")
    path = network.layers[0].path
    given = report(network, photo, tmp_path / "other.html", heatmap_layer=path, channels=0, check=True)
    assert {one["layer"] for one in given["heatmaps"]} == {path}
    with pytest.raises(UsageError, match="no layer 'nowhere'"):
        report(network, photo, tmp_path / "none.html", heatmap_layer="nowhere", channels=0)


def test_a_checked_report_has_a_badge_of_the_first_map(photo, tmp_path):
    data = report(open_model(models.plain()), photo, tmp_path / "page.html", channels=0, check=True)
    found = data["heatmaps"][0]["check"]
    html = page_of(tmp_path / "page.html")
    assert f'class="check {found["badge"]}"' in html
    assert html.count('class="check ') == 1


@pytest.mark.parametrize("target", ["top3", "conv_a:1", "conv_a:1@2,2", "0 - 1", "2 + 0.5*conv_a:1"])
def test_a_report_explains_classes_alone(made, photo, tmp_path, target):
    with pytest.raises(UsageError) as caught:
        report(made[0], photo, tmp_path / "page.html", target=target)
    assert (caught.value.code, caught.value.data) == ("not-a-class", {"target": target})


def test_a_class_may_be_named_as_an_objective_names_it(made, photo, tmp_path):
    name = made[0].class_names[1]
    data = report(made[0], photo, tmp_path / "page.html", target=f"class:{name}", channels=0)
    assert data["heatmaps"][0]["class_name"] == name


# --- images --------------------------------------------------------------------------------------------


def test_the_tint_over_the_photo_is_the_overlay(photo):
    raw = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    laid_on = tint(raw, *photo.shape[:2])
    for opacity in (0.3, 1.0):
        mask = Image.fromarray(np.rint(opacity * laid_on[..., 3]).astype(np.uint8))
        expected = Image.composite(Image.fromarray(laid_on[..., :3]), Image.fromarray(photo), mask)
        found = overlay(photo, raw, opacity).astype(int)
        assert np.abs(found - np.asarray(expected)).max() <= 2  # the mask of Pillow has 8 bits
        assert np.abs(found - photo).max() > 20
    assert tint(raw, 5, 7)[..., 3].max() == 255
    assert not tint(-np.abs(raw), 4, 4).any()


def test_the_slider_starts_where_overlays_are_drawn():
    assert 100 * inspect.signature(views.overlaid).parameters["paint"].default == page_module.OPACITY


@pytest.mark.parametrize("channels", [1, 3, 17])
def test_a_channel_grid_is_the_tiles_and_clear_between(channels):
    values = np.random.default_rng(0).normal(size=(6, 6, channels)).astype(np.float32)
    drawn = channel_grid(values, 12, 8)
    for channel in range(channels):
        top, left = channel // 8 * 14, channel % 8 * 14
        tile = colour(classic_tile(values[..., channel])).repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(drawn[top : top + 12, left : left + 12, :3], tile)
    assert (drawn[..., 3] > 0).sum() == channels * 12 * 12


def test_a_small_address_is_the_image():
    flat = np.full((40, 40, 4), (10, 20, 30, 0), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert small_data_uri(flat).startswith("data:image/")
    assert small_data_uri(noise).startswith("data:image/webp")
    assert len(small_data_uri(noise)) < len(data_uri(encode_png(noise), "image/png"))


def test_photos_are_brought_to_the_pages_size():
    assert page_module.fitted_to_page(np.zeros((2000, 1000, 3), np.uint8)).shape == (720, 360, 3)
    assert page_module.fitted_to_page(np.zeros((300, 400, 3), np.uint8)).shape == (300, 400, 3)
    small = np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(page_module.fitted_to_page(small)[::9, ::9], small)


# --- in a browser ----------------------------------------------------------------------------------------

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=QUIET)
        yield opened
        opened.close()


@dataclasses.dataclass
class Watched:
    """A page with what it asked for and complained of."""

    page: object
    requests: list
    complaints: list


@pytest.fixture
def watch(browser, made):
    contexts = []

    def open_it(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        seen = Watched(context.new_page(), [], [])
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
        seen.page.goto(made[2].as_uri())
        return seen

    yield open_it
    for context in contexts:
        context.close()


@pytest.mark.slow(reason="a browser starts")
def test_opening_the_page_makes_no_request(watch, made):
    seen = watch()
    seen.page.wait_for_timeout(300)
    assert [url for url in seen.requests if not url.startswith("data:")] == [made[2].as_uri()]
    assert seen.complaints == []


def test_every_image_is_decoded_and_has_a_text(watch):
    page = watch().page
    images = page.evaluate("[...document.images].map(i => [i.alt.trim(), i.complete && i.naturalWidth > 0])")
    assert images
    assert all(alt and decoded for alt, decoded in images)
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label'))")


def test_a_hostile_name_is_shown_as_it_is(watch):
    seen = watch()
    assert seen.page.locator("#photo-2-title").text_content() == HOSTILE
    assert seen.page.locator("#photo-1-title").text_content() == KOREAN
    assert seen.complaints == []


def opacity(page, photo):
    return page.locator(f"#photo-{photo} .tint").first.evaluate("tint => Number(getComputedStyle(tint).opacity)")


def test_the_slider_works_by_keyboard(watch):
    page = watch().page
    slider = page.get_by_label("Opacity of the heatmap").first
    slider.focus()
    assert opacity(page, 1) == pytest.approx(0.7)
    for key, expected in [("ArrowRight", 0.75), ("End", 1), ("Home", 0), ("ArrowUp", 0.05)]:
        page.keyboard.press(key)
        assert opacity(page, 1) == pytest.approx(expected)
        assert page.locator("#photo-1 .choices output").text_content() == f"{round(100 * expected)} %"
    assert opacity(page, 2) == pytest.approx(0.7)


def test_the_menu_shows_the_maps_of_one_method_at_a_time(watch):
    page = watch().page
    parts = page.locator("#photo-1 .stack [data-method]")
    shown = lambda: {part for part in parts.all() if part.is_visible()}  # noqa: E731
    methods = lambda: {part.get_attribute("data-method") for part in shown()}  # noqa: E731
    assert methods() == {"grad-cam"}
    page.get_by_label("Method").first.select_option("eigen-cam")
    assert methods() == {"eigen-cam"}
    assert "no class plays a part" in page.locator("#photo-1 [data-method=eigen-cam] .small").first.text_content()
    other = page.locator("#photo-2 .stack [data-method=grad-cam]").first
    assert other.is_visible()


def test_everything_can_be_reached_by_keyboard(watch):
    page = watch().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.id")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if name.startswith("BODY"):
            break
        assert outline != "none", name
        reached.add(name)
    assert {"INPUT photo-1-opacity", "INPUT photo-2-opacity", "SELECT photo-1-method", "SUMMARY "} <= reached


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(watch, width):
    page = watch(viewport={"width": width, "height": 844}).page
    for unfolded in (False, True):
        page.evaluate("open => document.querySelectorAll('details').forEach(d => d.open = open)", unfolded)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_headings_are_in_order(watch):
    levels = watch().page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert watch().page.evaluate("document.documentElement.lang") == "en"


def test_without_scripts_the_page_is_whole_and_has_no_dead_control(watch):
    page = watch(java_script_enabled=False).page
    assert not page.locator(".choices").first.is_visible()
    assert page.locator("#photo-1 .tint").first.is_visible()
    details = page.locator("details").first
    details.locator("summary").click()
    assert details.locator("table").is_visible()


# Every element that has text of its own, with its colour and the first background behind it.
COLOURS = """
() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = numbers(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  document.querySelectorAll('details').forEach((details) => { details.open = true; });
  return [...document.body.querySelectorAll('*')]
    .filter((e) => !['SCRIPT', 'title'].includes(e.tagName))
    .filter((e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((e) => {
      const style = getComputedStyle(e);
      const ink = numbers(e.closest('svg') ? style.fill : style.color).slice(0, 3);
      return [e.tagName + ' ' + e.textContent.trim().slice(0, 30), ink, behind(e)];
    });
}
"""


def contrast(one, other):
    """WCAG 2's ratio of two sRGB colours."""

    def luminance(colour):
        linear = [c / 3294.6 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_the_one_of_wcag():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


def test_text_is_legible_in_light_and_dark(watch):
    backgrounds = {}
    for scheme in ("light", "dark"):
        rows = watch(color_scheme=scheme).page.evaluate(COLOURS)
        assert len(rows) > 100
        faint = [(text, round(contrast(ink, paper), 2)) for text, ink, paper in rows if contrast(ink, paper) < 4.5]
        assert faint == []
        backgrounds[scheme] = tuple(rows[0][2])
    assert sum(backgrounds["light"]) > 700
    assert sum(backgrounds["dark"]) < 150


def test_the_printed_page_has_paper_and_no_controls(watch):
    page = watch(color_scheme="dark").page
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".choices").first.is_visible()
    assert page.locator("#photo-1 .tint").first.is_visible()


def test_pointing_at_a_tile_tells_its_channel(watch):
    page = watch().page
    sheet = page.locator("#photo-1 .sheet").first
    image = sheet.locator("img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 5.5 / 8, box["y"] + box["height"] / 2)
    assert sheet.locator(".which").text_content() == "channel 5"


def test_a_heatmap_lies_exactly_on_its_photo(watch):
    page = watch().page
    photo, tint = (page.locator("#photo-1 .stack").first.locator("img").nth(number).bounding_box() for number in (0, 1))
    assert tint == pytest.approx(photo, abs=0.5)


def test_what_the_browser_shows_is_the_overlay(made, tmp_path, browser):
    """The blend of two images in the browser against `render.heatmaps.overlaid`, but for the photo's compression."""
    network = made[0]
    photo = np.full((300, 300, 3), 128, np.uint8)
    photo[:150] = 60
    path = tmp_path / "page.html"
    report(network, photo, path, channels=0)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(path.as_uri())
    shot = tmp_path / "shot.png"
    page.locator(".stack").first.screenshot(path=shot)
    page.close()
    seen = np.asarray(Image.open(shot).convert("RGB")).astype(float)
    drawn = Image.fromarray(views.overlaid(heatmap(network, photo)))
    expected = drawn.resize(seen.shape[1::-1], Image.Resampling.BILINEAR)
    inside = np.s_[20:-20, 20:-20]  # corners are round
    assert np.abs(seen - np.asarray(expected))[inside].mean() < 3
