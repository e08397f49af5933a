"""Make the images of the README from the shipped network and images: `python docs/make_images.py`.

The screenshot of the report needs Playwright and a chromium; without one it stays as it is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from PIL import Image

import convscope
from convscope import demo, render
from convscope.files import write_file
from convscope.render.encode import encode_webp
from convscope.techniques.filters import first_with_gradient

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Write every image."""
    network = convscope.open_model(demo.MODEL, classes=demo.CLASSES)
    cat, mosaic = demo.PHOTOS[0], demo.PHOTOS[-1]
    write("activations", render.activations.sheet(convscope.activations(network, cat, "block2_conv"), "block2_conv"))
    write("depth", _plotted(convscope.activations(network, cat)))
    climbing, _, _ = first_with_gradient(network, "block3_conv", 24)
    write("filters", render.filters.sheet(convscope.filters(network, "block3_conv", climbing, size=128)))
    heatmaps = convscope.heatmap(network, [cat, mosaic, mosaic], ["cat", "cat", "brick"])
    write("heatmap", render.heatmaps.panel(heatmaps, 0))
    write("mosaic", np.vstack([render.heatmaps.panel(heatmaps, index) for index in (1, 2)]))
    screenshot(network, [cat, mosaic])


def write(name: str, image: np.ndarray) -> None:
    """As WebP: small enough for a repository."""
    write_file(IMAGES / f"{name}.webp", encode_webp(image, quality=80))


def _plotted(result: convscope.results.Activations) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        convscope.save(result, folder, raw=False)
        return np.asarray(Image.open(next(Path(folder).rglob("depth.png"))).convert("RGB"))


def screenshot(network: convscope.networks.Network, photos: list[Path]) -> None:
    """The heatmaps of a report, as a browser shows them."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no chromium: the screenshot stays as it is")
        return
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file, shot = Path(folder) / "report.html", Path(folder) / "report.png"
        convscope.report(network, photos, page_file)
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport={"width": 1180, "height": 900})
        page.goto(page_file.as_uri())
        heading = page.get_by_text("Regions that support each class").nth(1)
        heading.evaluate("element => window.scrollTo(0, element.getBoundingClientRect().top + window.scrollY - 400)")
        page.screenshot(path=shot)
        opened.close()
        write("report", np.asarray(Image.open(shot).convert("RGB")))


if __name__ == "__main__":
    main()
