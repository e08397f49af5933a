"""The commands on PyTorch and ONNX where there is no Keras at all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

HERE = Path(__file__).parent
NO_KERAS = (
    "import sys; sys.modules.update(keras=None, tensorflow=None, jax=None); from convscope.cli import main; main()"
)


def run(*arguments):
    command = [sys.executable, "-c", NO_KERAS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a state dict for the tutorial's network and a photo."""
    folder = tmp_path_factory.mktemp("desk")
    sys.path.insert(0, str(HERE))
    import torch_models

    torch.manual_seed(0)
    torch.save({"state_dict": torch_models.tutorial().state_dict()}, folder / "net.pth")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(image).save(folder / "photo.png")
    return folder


@pytest.fixture
def model(desk):
    return (f"{HERE / 'torch_models.py'}:tutorial", "--weights", desk / "net.pth")


@pytest.mark.slow(reason="a process that imports PyTorch")
def test_layers(desk, model):
    done = run("layers", *model, "--json")
    assert done.returncode == 0, done.stderr
    layers = {layer["path"]: layer for layer in json.loads(done.stdout)["layers"]}
    # kernels and biases, counted by hand
    assert layers["conv2"]["parameters"] == 16 * 6 * 25 + 16
    assert (layers["conv1"]["shape"], layers["fc3"]["shape"]) == ([28, 28, 6], [10])
    assert "taken from 'state_dict'" in done.stderr


@pytest.mark.slow(reason="each command starts a process that imports PyTorch")
def test_the_three_techniques_and_the_report(desk, model, tmp_path):
    photo = desk / "photo.png"
    for command in (
        ("activations", *model, photo, "--out", tmp_path / "a"),
        ("filters", *model, "--layer", "conv2", "--channels", "0-3", "--steps", "3", "--out", tmp_path / "f"),
        ("heatmap", *model, photo, "--class", "3", "--method", "layercam", "--out", tmp_path / "h"),
        ("report", *model, photo, "-o", tmp_path / "report.html", "--channels", "2"),
        ("doctor", *model, photo),
    ):
        done = run(*command)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "a" / "photo" / "conv2.png").exists()
    assert len(json.loads((tmp_path / "f" / "filters.json").read_text())["filters"]) == 4
    assert np.load(tmp_path / "h" / "photo.npy").shape[:2] == (5, 5)  # of the last pooling
    found = json.loads((tmp_path / "h" / "heatmaps.json").read_text())
    assert found["provenance"]["network"]["framework"].startswith("torch")
    assert "tutorial" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow(reason="a process that imports PyTorch")
def test_an_onnx_file(desk, tmp_path):
    pytest.importorskip("onnx")
    import torch_models

    image = torch.zeros(1, 3, 32, 32)
    torch.onnx.export(torch_models.tutorial().eval(), (image,), tmp_path / "net.onnx", dynamo=False, opset_version=17)
    done = run("heatmap", tmp_path / "net.onnx", desk / "photo.png", "--out", tmp_path / "h", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["heatmaps"][0]["layer"] == "/pool_1/MaxPool"


@pytest.mark.skipif(importlib.util.find_spec("keras") is not None, reason="Keras is installed")
def test_a_keras_model_says_what_to_install():
    command = [sys.executable, "-m", "convscope", "layers", "keras:MobileNet?weights=none"]
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "a Keras model needs Keras, which is not installed" in done.stderr
    assert "pip install 'convscope[tensorflow]'" in done.stderr


@pytest.mark.slow(reason="each command starts a process that imports PyTorch")
def test_the_commands_at_a_block_of_a_transformer(desk, tmp_path):
    vit = (f"{HERE / 'transformers_torch.py'}:vit", "--input-size", "32")
    listed = run("layers", *vit, "--json")
    rows = {row["path"]: row for row in json.loads(listed.stdout)["layers"]}
    assert (rows["blocks.1"]["shape"], rows["blocks.1"]["tokens"]) == ([4, 4, 12], {"front": 1, "behind": 0})
    assert "tokens" not in rows["patch_embed"]
    assert "4×4×12 and 1 other token" in run("layers", *vit).stdout
    commands = (
        ("activations", *vit, desk / "photo.png", "--layers", "blocks.1"),
        ("heatmap", *vit, desk / "photo.png", "--layer", "blocks.1", "--class", "2"),
        ("filters", *vit, "--layer", "blocks.1", "--channels", "0-1", "--steps", "2"),
    )
    for command in commands:
        done = run(*command, "--out", tmp_path / command[0], "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["files"]
