"""The demo: what it ships, and what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("keras")

from click.testing import CliRunner

from convscope import cli, demo
from convscope.images.decode import read_images
from convscope.networks import open_model
from convscope.techniques.heatmaps import heatmap

HERE = Path(demo.__file__).parent
TILES = {"cat": (0, 0), "gravel": (0, 1), "coffee": (1, 0), "brick": (1, 1)}  # of the mosaic: row, column


@pytest.fixture(scope="module")
def network():
    return open_model(demo.MODEL, classes=demo.CLASSES)


@pytest.fixture(scope="module")
def ran(network, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run(network, out, images=demo.PHOTOS[::4], channels=2)


def test_the_model_is_small_and_as_its_card_says(network):
    assert demo.MODEL.stat().st_size < 1_000_000
    assert sum(layer.parameters for layer in network.layers) == demo.FIGURES["parameters"]
    assert network.head.classes == len(demo.CLASSES)


def test_every_photo_is_shown_and_listed_with_its_licence():
    listed = (HERE / "photos" / "README.md").read_text(encoding="utf-8")
    shipped = sorted(path.name for path in (HERE / "photos").glob("*.jpg"))
    assert shipped == sorted(path.name for path in demo.PHOTOS)
    for name in shipped:
        row = next(line for line in listed.splitlines() if line.startswith(f"| `{name}`"))
        assert "CC0" in row.rsplit("|", 2)[1]


def test_predictions_on_the_shipped_photos_are_right(network):
    photos = read_images(list(demo.PHOTOS))
    logits = network.predict(network.prepare(photos))
    best = {photo.name: network.predictions(row)[0] for photo, row in zip(photos, logits, strict=True)}
    for name in ("cat", "coffee", "photographer", "retina"):
        assert best[name].name == name
        assert best[name].probability > 0.7
    assert best["mosaic"].name in TILES


def test_heatmaps_of_the_mosaic_lie_on_their_tiles(network):
    for name, place in TILES.items():
        raw = np.maximum(heatmap(network, demo.PHOTOS[-1], target=name).maps[0], 0)
        masses = raw.reshape(2, raw.shape[0] // 2, 2, -1).sum(axis=(1, 3)) / raw.sum()
        assert np.unravel_index(masses.argmax(), (2, 2)) == place
        assert masses[place] > 0.5


@pytest.mark.slow(reason="the whole demo runs, once for the module")
def test_the_files_it_names_are_the_files_there_are(ran):
    out, data = ran
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert sorted(data["files"]) == sorted(there)
    assert {"report.html", "heatmap/heatmaps.json", "activations/activations.json"} <= there
    assert {"filters/block1_conv/filters.json", "filters/block4_conv/sheet.png"} <= there
    assert data["provenance"]["network"]["name"] == demo.FIGURES["name"]


def test_the_report_and_the_folders_have_the_same_numbers(ran):
    out, data = ran
    saved = json.loads((out / "heatmap" / "heatmaps.json").read_text(encoding="utf-8"))["heatmaps"]
    shown = [row for row in data["heatmaps"] if row["class"] == row["predictions"][0]["index"]]
    assert [(row["image"], row["score"]) for row in shown] == [(row["image"], row["score"]) for row in saved]


def test_the_report_states_how_good_the_network_is(ran):
    page = (ran[0] / "report.html").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    accuracy = demo.FIGURES["accuracy"]
    shares = [accuracy[kind][which] for kind in ("colour", "grey", "other_light") for which in ("network", "baseline")]
    for share in [*shares, demo.FIGURES["mosaics"]["heatmap"]["share"]["mean"]]:
        assert f"{100 * share:.1f} %" in page
    assert ran[1]["figures"] == demo.FIGURES
    assert len(re.findall("<h2", page)) == 5  # the network, two photos, the filters, how it was made


@pytest.mark.parametrize("names", [None, "names.txt"])
def test_the_command_opens_it_with_its_class_names(names, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda network, out, **choices: seen.append((network, out)) or {"files": []})
    options = ["demo", "--out", str(tmp_path / "out"), "--quiet"]
    expected = demo.CLASSES
    if names:
        expected = tuple(f"thing {number}" for number in range(len(demo.CLASSES)))
        (tmp_path / names).write_text("\n".join(expected))
        options += ["--classes", str(tmp_path / names)]
    CliRunner().invoke(cli.app, options, catch_exceptions=False)
    ((network, out),) = seen
    assert out == str(tmp_path / "out")
    assert network.class_names == expected


def test_importing_it_loads_no_framework():
    code = "import sys, convscope.demo; sys.exit(bool({'keras', 'tensorflow', 'torch', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
