"""The command line: its contract with programs, its ways out, and what it says to bad input."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import click
import models
import numpy as np
import pytest
from assets import ASSETS, needs_assets
from models import keras, layers
from PIL import Image

import convscope
from convscope import cli
from convscope.cli import leaving
from convscope.cli.shell import Shell
from convscope.events import Advanced
from convscope.networks import BACKENDS
from convscope.results import Heatmap

ENVIRONMENT = {**os.environ, "KERAS_BACKEND": keras.backend.backend(), "COLUMNS": "100"}
OTHER_BACKEND = next(name for name in ("jax", "torch") if name != keras.backend.backend())


class Ran:
    """How a command left, what it printed, and its JSON."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def error(self):
        """The message, which has to be the one line that begins with "Error: " or "Internal error: "."""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith(("Error: ", "Internal error: "))]
        return line


def run(*arguments):
    """Run the command line here, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as left:
            code = left.code
    for stream in (out, err):
        stream.flush()
    return Ran(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def apart(*arguments, code="from convscope.cli import main; main()", **options):
    """Start the command line as a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen(command, **{**streams, **options})


# -- files to work on ------------------------------------------------------------------------------------


def image(seed=0, size=(30, 40, 3)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with photos (two of one stem), class names and model files."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "other").mkdir()
    image(0).save(folder / "cat.png")
    image(1).save(folder / "other" / "Cat.jpg")
    (folder / "names.txt").write_text("cat\nsea lion\ndog\n")
    models.nested().save(folder / "nested.keras")
    free().save(folder / "free.keras")
    return folder


def free():
    """A model that takes images of any size, but not too small ones: three convolutions and poolings."""
    x = image_in = layers.Input((None, None, 3))
    for number in range(3):
        x = layers.Conv2D(3 + number, 3, activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    x = layers.Dense(2, activation="softmax", name="out")(layers.GlobalAveragePooling2D()(x))
    return models.seeded(keras.Model(image_in, x, name="free"))


def saved(model, path):
    model.save(path)
    return path


# -- the contract ----------------------------------------------------------------------------------------


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_report(data, folder, name):
    """What every JSON has: provenance, and the files that were written, all of them and no other."""
    assert json.loads((folder / name).read_text(encoding="utf-8")) == data
    assert set(data["files"]) == files_in(folder)
    assert len(data["files"]) == len(set(data["files"]))
    network = data["provenance"]["network"]
    assert network["backend"].startswith(keras.backend.backend())
    assert network["preprocessing"]["certainty"] in ("found", "guess", "set")
    assert {"technique", "parameters", "network", "pictures", "versions"} <= set(data["provenance"])


def test_layers(desk):
    ran = run("layers", desk / "nested.keras", "--json")
    model = keras.saving.load_model(desk / "nested.keras", compile=False)
    rows = {row["path"]: row for row in ran.json["layers"]}
    assert ran.code == 0
    assert rows["middle/inner/deep"] == {
        "path": "middle/inner/deep",
        "kind": "conv",
        "shape": [14, 14, 5],
        "parameters": 4 * 5 * 9 + 5,
        "class": "Conv2D",
    }
    assert ran.json["parameters"] == model.count_params()
    assert ran.json["files"] == []
    digest = hashlib.sha256((desk / "nested.keras").read_bytes()).hexdigest()
    assert ran.json["provenance"]["network"]["sha256"] == digest


def test_the_table_of_layers_is_on_stdout_and_the_rest_is_not(desk):
    table, quiet = run("layers", desk / "nested.keras"), run("layers", desk / "nested.keras", "--quiet")
    assert table.out == quiet.out
    assert quiet.err == ""
    for word in ("middle/inner/deep", "14×14×5", "185"):
        assert word in table.out
    assert "preprocessing" in table.err
    assert "preprocessing" not in table.out


@pytest.fixture(scope="module")
def looked(desk, tmp_path_factory):
    out = tmp_path_factory.mktemp("activations")
    photos = (desk / "cat.png", desk / "other" / "Cat.jpg")
    options = ("--layers", "conv|dense", "--raw", "--json", "--preprocess", "none")
    return run("activations", desk / "nested.keras", *photos, "--out", out, *options), out


def test_activations(looked):
    ran, out = looked
    check_report(ran.json, out, "activations.json")
    entries = ran.json["activations"]
    assert [(entry["image"], entry["layer"]) for entry in entries] == [
        (image, layer) for image in ("cat", "Cat-2") for layer in ("middle/first", "middle/inner/deep", "out")
    ]
    for entry in entries:
        assert {"image", "layer", "shape", "mean", "max", "zeros", "empty_channels"} <= set(entry)
        assert entry["file"] == f"{entry['image']}/{entry['layer'].replace('/', '.')}.png"
        Image.open(out / entry["file"]).load()
    assert entries[1]["shape"] == [14, 14, 5]


def test_the_numbers_of_activations_are_those_of_the_raw_arrays(looked):
    ran, out = looked
    result = convscope.load(out)
    for entry in ran.json["activations"]:
        values = result[entry["layer"]][["cat", "Cat-2"].index(entry["image"])]
        assert entry["mean"] == pytest.approx(float(values.mean()), rel=1e-5)
        assert entry["max"] == pytest.approx(float(values.max()))
        if entry["layer"] == "middle/inner/deep":
            assert entry["zeros"] == pytest.approx(float((values == 0).mean()))
            assert entry["empty_channels"] == int((values == 0).all(axis=(0, 1)).sum())


def test_one_channel_is_drawn_where_there_is_one(desk, tmp_path):
    options = ("--layers", "conv", "--channel", 4, "--memory", "1kB")
    ran = run("activations", desk / "nested.keras", desk / "cat.png", "--out", tmp_path, *options)
    assert ran.code == 0
    assert "middle/first" in next(line for line in ran.err.splitlines() if "channel 4" in line)
    assert {name for name in files_in(tmp_path) if name.endswith(".png")} == {
        "cat/middle.inner.deep.channel-4.png",
        "cat/depth.png",
    }


@pytest.fixture(scope="module")
def climbed(desk, tmp_path_factory):
    def climb(seed):
        out = tmp_path_factory.mktemp("filters")
        options = ("--channels", "3,0-1", "--steps", 2, "--seed", seed, "--batch", 2, "--json")
        return run("filters", desk / "nested.keras", "--layer", "deep", "--out", out, *options), out

    return climb


def test_filters(climbed):
    ran, out = climbed(1)
    check_report(ran.json, out, "filters.json")
    assert [entry["channel"] for entry in ran.json["filters"]] == [3, 0, 1]
    for entry in ran.json["filters"]:
        assert {"channel", "activation", "activations", "status", "reason"} <= set(entry)
        assert len(entry["activations"]) == 2
        assert entry["status"] in ("alive", "weak", "dead")
        assert entry["reason"]
    assert {"sheet.png", "0.png", "1.png", "3.png"} <= files_in(out)
    assert ran.json["provenance"]["parameters"]["layer"] == "middle/inner/deep"
    assert ran.json["provenance"]["parameters"]["seed"] == 1


@pytest.mark.slow(reason="the command makes filters three times")
def test_the_same_seed_gives_the_same_bytes(climbed):
    (_, first), (_, again), (_, other) = climbed(1), climbed(1), climbed(2)
    assert files_in(first) == files_in(again)
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files_in(first))
    assert (first / "filters.npy").read_bytes() != (other / "filters.npy").read_bytes()


@pytest.fixture(scope="module")
def explained(desk, tmp_path_factory):
    out = tmp_path_factory.mktemp("heatmaps")
    photos = (desk / "cat.png", desk / "other" / "Cat.jpg")
    options = ("--class", "Sea_Lion", "--classes", desk / "names.txt", "--layer", "middle/first", "--json")
    return run("heatmap", desk / "nested.keras", *photos, "--out", out, *options), out


def test_heatmap(explained):
    ran, out = explained
    check_report(ran.json, out, "heatmaps.json")
    assert [entry["image"] for entry in ran.json["heatmaps"]] == ["cat", "Cat-2"]
    for entry in ran.json["heatmaps"]:
        assert {"image", "class", "score", "layer", "method", "status", "reason"} <= set(entry)
        assert (entry["class"], entry["class_name"]) == (1, "sea lion")
        assert (entry["layer"], entry["method"]) == ("middle/first", "grad-cam")
        assert entry["status"] == ("blank" if entry["reason"] else "ok")
        raw = np.load(out / f"{entry['image']}.npy")
        assert (raw.dtype, raw.shape) == (np.float32, (16, 16))
        Image.open(out / f"{entry['image']}.png").load()


def test_what_was_saved_can_be_loaded(explained):
    ran, out = explained
    result = convscope.load(out)
    assert isinstance(result, Heatmap)
    assert [row.image for row in result.rows] == ["cat", "Cat-2"]
    assert result.rows[0].score == ran.json["heatmaps"][0]["score"]


def test_nothing_is_overwritten_within_a_run(explained):
    _, out = explained
    photos = [Image.open(out / "photos" / name).tobytes() for name in ("cat.png", "Cat-2.png")]
    assert photos[0] == image(0).tobytes()
    assert photos[0] != photos[1]


def test_two_layers_whose_files_would_have_one_name(desk, tmp_path):
    stack = [layers.Conv2D(3, 3, name="c"), layers.Conv2D(2, 3, name="C"), layers.Flatten(), layers.Dense(2)]
    path = saved(keras.Sequential([layers.Input((8, 8, 3)), *stack]), tmp_path / "twins.keras")
    out = tmp_path / "out"
    ran = run("activations", path, desk / "cat.png", "--out", out, "--raw", "--json", "--layers", "conv")
    check_report(ran.json, out, "activations.json")
    assert [entry["file"] for entry in ran.json["activations"]] == ["cat/c.png", "cat/C-2.png"]
    assert ran.json["arrays"] == {"c": "arrays/c.npy", "C": "arrays/C-2.npy"}
    assert [convscope.load(out)[layer].shape[-1] for layer in ("c", "C")] == [3, 2]


def test_an_earlier_run_is_replaced(desk, tmp_path):
    """Two runs into one folder: the second takes the names of the first."""
    arguments = ("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path)
    assert run(*arguments).code == 0
    before = files_in(tmp_path)
    assert run(*arguments).code == 0
    assert files_in(tmp_path) == before


def test_names_that_no_file_can_have(desk, tmp_path):
    ran = run("heatmap", desk / "nested.keras", "x" * 5000, "--out", tmp_path)
    assert (ran.code, "check the path" in ran.error) == (1, True)
    assert run("layers", "x" * 5000).error.startswith("Error: no model file")
    for name in ("x" * 300, "x" * 5000):
        ran = run("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path / name)
        assert (ran.code, "Choose another place" in ran.error) == (2, True)
        assert len(ran.err) < 3000


def test_the_text_of_an_error_of_the_system_is_cut(capsys):
    with pytest.raises(SystemExit):
        leaving.explain(OSError(36, "File name too long", "x" * 10**6), False)
    assert len(capsys.readouterr().err) < 1100
    with pytest.raises(SystemExit):
        leaving.explain(MemoryError("x" * 10**6), False)
    assert len(capsys.readouterr().err) < 1100


def test_quiet_says_nothing(desk, tmp_path):
    ran = run("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


@pytest.mark.parametrize("command", sorted(cli.app.commands))
def test_every_command_takes_the_common_options(command):
    names = {option for parameter in cli.app.commands[command].params for option in parameter.opts}
    assert {"--backend", "--preprocess", "--classes", "--quiet", "--json", "--debug"} <= names


def test_what_other_code_prints_does_not_mix_with_json(desk, monkeypatch):
    opened = convscope.open_model

    def chatty(*args, **options):
        print("Downloading data from somewhere")
        return opened(*args, **options)

    monkeypatch.setattr("convscope.networks.open_model", chatty)
    ran = run("layers", desk / "nested.keras", "--json")
    assert ran.json["layers"]
    assert "Downloading" in ran.err


def test_help_of_each_command_loads_no_framework():
    code = (
        "import sys; from convscope.cli import app\n"
        "for name in app.commands: print(app.main([name, '--help'], standalone_mode=False))\n"
        "print(*sorted({'keras', 'tensorflow', 'jax', 'torch', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    out, err = apart(code=code).communicate(timeout=60)
    assert err == ""
    assert out.count("Usage: ") == len(cli.app.commands)
    assert out.splitlines()[-1] == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("colour", [True, False])
def test_progress_is_on_stderr_and_no_colour_is_respected(monkeypatch, colour):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Shell(quiet=False, as_json=True).progress() as progress:
        progress(Advanced(3, 9, "step"))
    assert "step" in sys.stderr.getvalue()
    assert sys.stdout.getvalue() == ""
    assert bool(re.search(r"\x1b\[[\d;]*3\d", sys.stderr.getvalue())) == colour


def test_odd_images_are_read_and_what_was_changed_is_said(desk, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65536, (20, 30)).astype(np.uint16)).save(tmp_path / "sixteen.png")
    image().convert("CMYK").save(tmp_path / "cmyk.jpg")
    image().convert("P").save(tmp_path / "palette.png")
    image(size=(30, 40, 4)).save(tmp_path / "alpha.png")
    image().save(tmp_path / "animated.gif", save_all=True, append_images=[image(1)])
    turned = Image.Exif()
    turned[0x0112] = 6
    image().save(tmp_path / "turned.jpg", exif=turned)
    out = tmp_path / "out"
    ran = run("heatmap", desk / "nested.keras", tmp_path, "--out", out, "--json")
    notes = {photo["name"]: " ".join(photo["notes"]) for photo in ran.json["provenance"]["pictures"]}
    assert sorted(notes) == ["alpha", "animated", "cmyk", "palette", "sixteen", "turned"]
    said = {"sixteen": "16-bit", "cmyk": "CMYK", "alpha": "transparency", "animated": "first of", "turned": "upright"}
    for name, word in said.items():
        assert word in notes[name]
        assert word in ran.err
    assert Image.open(out / "photos" / "turned.png").size == (30, 40)


def test_names_that_are_no_text_or_look_like_a_formula(desk, tmp_path):
    name = os.fsdecode(b"\xff$\\frac$.png") if sys.platform == "linux" else "$\\frac$.png"
    image().save(tmp_path / name)
    out = tmp_path / "out"
    ran = run("activations", desk / "nested.keras", tmp_path / name, "--out", out, "--layers", "deep", "--json")
    assert ran.code == 0
    check_report(ran.json, out, "activations.json")


# -- bad images ----------------------------------------------------------------------------------------


def png_of(width, height):
    """A PNG of a few bytes whose header promises `width` x `height` pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(kind):
    buffer = io.BytesIO()
    image(size=(300, 400, 3)).save(buffer, kind)
    return buffer.getvalue()


BAD_IMAGES = {
    "empty.png": (b"", "empty (0 bytes)", "download it again"),
    "text.jpg": (b"this is no image\n", "should be an image", "text"),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "web page", "download it again"),
    "head.png": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "half.jpg": (encoded("JPEG")[:20000], "cut short", "download it again"),
    "half.png": (encoded("PNG")[:20000], "cut short", "download it again"),
    "bomb.png": (png_of(60_000, 60_000), "too large", "178 million pixels", "smaller copy"),
    "zip.webp": (b"PK\x03\x04" + bytes(100), "ZIP archive", "unpack it"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("command", ["activations", "heatmap"])
def test_bad_images(desk, tmp_path, command, name):
    content, *words = BAD_IMAGES[name]
    (tmp_path / name).write_bytes(content)
    ran = run(command, desk / "nested.keras", desk / "cat.png", tmp_path / name, "--out", tmp_path / "out")
    assert ran.code == 1
    assert ran.out == ""
    assert all(word in ran.err for word in [name, *words])
    assert ran.error
    assert not (tmp_path / "out").exists()


def test_every_bad_image_is_named_at_once(desk, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    ran = run("heatmap", desk / "nested.keras", tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out")
    assert ran.code == 1
    assert "2 of 2 images" in ran.error
    assert "a.png" in ran.err
    assert "b.png" in ran.err


def test_a_missing_image_and_an_empty_folder(desk, tmp_path):
    ran = run("heatmap", desk / "nested.keras", desk / "cap.png", "--out", tmp_path)
    assert ran.code == 1
    assert "did you mean 'cat.png'?" in ran.error
    ran = run("heatmap", desk / "nested.keras", tmp_path, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "should hold images" in ran.error


# -- bad models ------------------------------------------------------------------------------------------


def zipped(**parts):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return buffer.getvalue()


def spoiled(archive, part):
    """An archive with some bytes of one part turned over."""
    where = zipfile.ZipFile(io.BytesIO(archive)).getinfo(part).header_offset + 60
    return archive[:where] + bytes(byte ^ 0x5A for byte in archive[where : where + 50]) + archive[where + 50 :]


def empty_hdf5():
    import h5py

    buffer = io.BytesIO()
    h5py.File(buffer, "w").close()
    return buffer.getvalue()


EMPTY_HDF5 = empty_hdf5()
SAFETENSORS = struct.pack("<Q", 64) + json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
CONFIG = json.dumps({"class_name": "Sequential", "config": {"name": "m", "layers": []}, "module": "keras"})
SYSTEM = json.dumps({"module": "os", "class_name": "mkdir", "config": {"path": "ran"}, "registered_name": None})
LONG_CONFIG = json.dumps({"class_name": "Sequential", "config": {str(n): str(n * n) for n in range(500)}})

TORCH = importlib.util.find_spec("torch") is not None

BAD_MODELS = {
    "empty.keras": (b"", "empty (0 bytes)", "download it again"),
    "text.keras": (b"this is no model\n", "it is text", "Expected a .keras"),
    "picture.h5": (encoded("PNG"), "it is an image", "Expected a .keras"),
    "pickle.h5": (b"\x80\x04K\x01.", "pickle", "never loaded"),
    "mnist.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "weights.safetensors": (SAFETENSORS, "can't be read whole" if TORCH else "needs torch"),
    "other.keras": (zipped(readme_txt="hello"), "another zip archive", "readme.txt", "Expected a .keras"),
    "torch.pt": (zipped(model__data_pkl=b"\x80\x02K\x01."), "expected a state dict" if TORCH else "needs torch"),
    "json.keras": (zipped(config_json="{no json"), "expected a config in JSON", "damaged"),
    "list.keras": (
        zipped(config_json="[1, 2]", model_weights_h5=EMPTY_HDF5),
        "can't load",
        "copy or download it again",
    ),
    "bare.keras": (zipped(config_json=CONFIG), "no model.weights.h5", "download it again"),
    "spoiled.keras": (spoiled(zipped(config_json=LONG_CONFIG), "config.json"), "can't be read whole"),
    "module.keras": (zipped(config_json=SYSTEM, model_weights_h5=EMPTY_HDF5), "'mkdir'", "only compute"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_files(tmp_path, monkeypatch, name):
    content, *words = BAD_MODELS[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    ran = run("layers", name)
    assert ran.code == 1
    assert ran.out == ""
    assert all(word in ran.error for word in [name, *words])
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_half_a_model_file(desk, tmp_path, suffix):
    whole = saved(models.plain(), tmp_path / f"whole{suffix}").read_bytes()
    half = tmp_path / f"half{suffix}"
    half.write_bytes(whole[: len(whole) // 2])
    ran = run("layers", half)
    assert ran.code == 1
    assert half.name in ran.error
    assert "cut off" in ran.error or "truncated" in ran.error


@needs_assets
@pytest.mark.skipif(not TORCH, reason="torch is not installed")
def test_real_files_of_other_frameworks(tmp_path):
    ran = run(
        "heatmap", ASSETS / "torch" / "digits_torchscript.pt", ASSETS / "photos" / "digits" / "7", "--out", tmp_path
    )
    assert ran.code == 0
    assert "class 7" in ran.out
    ran = run("layers", ASSETS / "torch" / "resnet20_cifar10.th")
    assert ran.code == 1
    assert "--weights" in ran.error


@pytest.mark.skipif(not TORCH, reason="torch is not installed")
def test_code_with_weights(tmp_path):
    import torch

    code = "from torch import nn\n\ndef make(width=3):\n    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())\n"
    (tmp_path / "net.py").write_text(code)
    torch.save({"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.zeros(4)}, tmp_path / "w.pt")
    ran = run("layers", f"{tmp_path / 'net.py'}:make?width=4", "--weights", tmp_path / "w.pt", "--json")
    assert ran.code == 0
    assert [row["path"] for row in json.loads(ran.out)["layers"]] == ["0", "1"]
    ran = run("layers", f"{tmp_path / 'net.py'}:make", "--weights", tmp_path / "w.pt")
    assert ran.code == 1
    assert "0.weight is (4, 3, 3, 3), not (3, 3, 3, 3)" in ran.error
    assert run("layers", f"{tmp_path / 'net.py'}:mak").code == 2


# -- doctor ----------------------------------------------------------------------------------------------


@pytest.mark.slow(reason="the doctor makes filters of several layers")
def test_doctor_says_what_it_found(desk):
    ran = run("doctor", desk / "nested.keras")
    assert ran.code == 0
    for words in ("a .keras archive", "archive of Keras", "found: the model scales its own input", "softmax over 3"):
        assert words in ran.out
    found = json.loads(run("doctor", desk / "nested.keras", "--json").out)
    assert found["ok"] is True
    assert [trial["name"] for trial in found["trials"]] == ["open", "activations", "filters", "heatmap"]
    assert found["file"]["bytes"] == (desk / "nested.keras").stat().st_size
    assert found["layers"]["heatmap"] == "middle/inner/deep"
    assert all(trial["seconds"] > 0 for trial in found["trials"])


def test_doctor_says_what_does_not_work(tmp_path):
    maps = models.keras.Sequential([models.layers.Input((16, 16, 3)), models.layers.Conv2D(4, 3, name="conv")])
    ran = run("doctor", saved(maps, tmp_path / "maps.keras"))
    assert ran.code == 1
    assert "does not work: heatmap: expected class scores" in ran.out
    found = json.loads(run("doctor", tmp_path / "maps.keras", "--json").out)
    assert found["ok"] is False
    assert [trial["ok"] for trial in found["trials"]] == [True, True, True, False]


def test_doctor_of_what_can_not_be_opened(tmp_path):
    code = models.keras.Sequential([models.layers.Input((8, 8, 3)), models.layers.Lambda(lambda x: x, name="evil")])
    ran = run("doctor", saved(code, tmp_path / "code.keras"))
    assert ran.code == 1
    assert "does not work" in ran.out
    assert "Lambda layer 'evil'" in ran.out
    assert "not sure" not in ran.out


def test_doctor_names_its_doubts(desk):
    assert "not sure: preprocessing: " in run("doctor", desk / "free.keras").out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nestet.keras", ["no model file", "did you mean 'nested.keras'"]),
        ("nowhere/model.keras", ["no model file", "no folder"]),
        (".", ["expected a model file, found a folder"]),
        ("https://example.org/model.keras", ["no model file", "does not download"]),
    ],
)
def test_a_model_that_is_not_there(desk, monkeypatch, name, words):
    monkeypatch.chdir(desk)
    ran = run("layers", name)
    assert ran.code == 1
    assert all(word in ran.error for word in words)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_model_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    ran = run("layers", tmp_path / "pipe")
    assert ran.code == 1
    assert "a device or a pipe" in ran.error


def test_code_in_a_model_runs_with_trust_only(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    monkeypatch.setenv("CONVSCOPE_TEST_MARKER", str(marker))
    leave_a_mark = lambda x: (open(__import__("os").environ["CONVSCOPE_TEST_MARKER"], "w").close(), x)[1]  # noqa: E731
    code = layers.Lambda(leave_a_mark, name="code")
    stack = [layers.Input((8, 8, 3)), layers.Conv2D(2, 3), code, layers.GlobalAveragePooling2D(), layers.Dense(2)]
    path = saved(keras.Sequential(stack), tmp_path / "code.keras")
    marker.unlink()  # building the model ran it
    ran = run("layers", path)
    assert ran.code == 1
    assert all(word in ran.error for word in ["Lambda", "'code'", "--trust"])
    assert not marker.exists()
    assert run("layers", path, "--trust", "--quiet").code == 0
    assert marker.exists()


def test_a_class_of_the_authors_own(tmp_path):
    own = type("Own", (layers.Layer,), {"call": lambda self, x: x})
    path = saved(keras.Sequential([layers.Input((8, 8, 3)), own()]), tmp_path / "own.keras")
    ran = run("layers", path)
    assert ran.code == 1
    assert all(word in ran.error for word in ["'Own'", "register_keras_serializable"])


def test_weights_that_are_no_numbers(tmp_path, desk):
    model = models.plain()
    model.get_layer("out").bias.assign(np.full(5, np.nan))
    path = saved(model, tmp_path / "nan.keras")
    ran = run("heatmap", path, desk / "cat.png", "--out", tmp_path / "out")
    assert ran.code == 1
    assert all(word in ran.error for word in ["not finite", "damaged", "layer 'out'"])  # no scaling could mend that
    assert not (tmp_path / "out").exists()


def test_weights_that_can_not_be_downloaded(monkeypatch):
    def offline(name, origin, **_):
        raise Exception(f"URL fetch failure on {origin}: None -- [Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", offline)
    ran = run("layers", "keras:MobileNet?alpha=0.25")
    assert ran.code == 1
    for word in ("can't be downloaded", "https://", "try again online", "weights=none"):
        assert word in ran.error


@pytest.mark.slow(reason="a process that imports a framework")
def test_files_beside_a_model_do_not_stand_for_libraries(desk, tmp_path):
    shutil.copy(desk / "free.keras", tmp_path / "free.keras")
    for name in ("h5py", "PIL", "keras", "numpy", "tensorflow", "jax", "torch", "rich"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ImportError")
    command = [sys.executable, "-m", "convscope", "layers", "free.keras"]
    ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, (tmp_path / "ran").exists()) == (0, False), ran.stderr


# -- what does not exist or does not fit -----------------------------------------------------------------

MISFITS = {
    # command and options: what the message says
    "heatmap --class 3": ["class 3 is out of range", "from 0 to 2"],
    "heatmap --class -1": ["class -1 is out of range", "from 0 to 2"],
    "heatmap --class cat": ["have no names", "--classes FILE"],
    "heatmap --class cab --classes names.txt": ["no class is named 'cab'", "did you mean 'cat'"],
    "heatmap --layer middle/inner/depe": ["no layer 'middle/inner/depe'", "did you mean 'middle/inner/deep'"],
    "heatmap --layer out": ["has no map", "'middle/inner/deep'"],
    "heatmap --method gradcam": ["no heatmap method 'gradcam'", "'grad-cam'"],
    "heatmap --method rise --option masks=0": ["'masks' of method 'rise'", "at least 2", "found 0"],
    "heatmap --method rise --option mask=9": ["no option 'mask'", "did you mean 'masks'", "resolution=7"],
    "heatmap --method rise --option masks": ["--option", "NAME=VALUE"],
    "heatmap --method all --option masks=9": ["none of these methods has an option 'masks'"],
    "heatmap --method rise --option masks=9 --budget 9": ["--budget and --option masks", "one of them"],
    "heatmap --opacity 2": ["--opacity", "0<=x<=1"],
    "heatmap --input-size 40": ["16x16", "40x40"],
    "heatmap --input-size big": ["--input-size 'big'", "224"],
    "activations --layers cnv": ["'cnv'", "did you mean 'conv'"],
    "activations --layers :0": ["':0'", "none of the"],
    "activations --channel 5": ["channel 5 is out of range", "0 to 4"],
    "activations --channel 0 --layers dense": ["no channel to draw"],
    "activations --memory lots": ["'lots'", "500MB"],
    "activations --preprocess half": ["'half'", "0..1", "MEAN,STD"],
    "activations --classes none.txt": ["none.txt", "No such file"],
    "activations --classes cat.png": ["cat.png", "not UTF-8 text"],
    "activations --classes two.txt": ["expected 3 class names", "found 2"],
    "activations --classes bad.json": ["bad.json", "not understood", '["cat", "dog"]'],
    "activations --output nose": ["no output 'nose'"],
    "activations --input nose": ["no input 'nose'", "'picture'"],
    "activations --feed nose=x.npy": ["no input 'nose' to feed"],
    "activations --feed image=empty.npy": ["--feed", "NAME=FILE"],
    "activations --feed image": ["--feed", "NAME=FILE.npy"],
    "activations --backend caffe": ["'caffe'", "tensorflow, torch, jax"],
    "filters --layer depp": ["no layer 'depp'", "did you mean 'middle/inner/deep'"],
    "filters --layer deep --channels 5": ["channel 5 is out of range", "5 channels", "0 to 4"],
    "filters --layer deep --channels 2-1": ["'2-1'", "0-63"],
    "filters --layer deep --channels a": ["'a'", "0-63,70"],
    "filters --layer deep --recipe clasic": ["no recipe 'clasic'", "'classic'"],
    "filters --layer deep --steps 0": ["--steps", "x>=1"],
    "filters --layer deep --size 2": ["2x2", "leave --size out", "16"],
    "filters": ["Missing option '--layer'"],
    "heatmaps": ["No such command 'heatmaps'"],
}


@pytest.mark.parametrize("line", MISFITS)
def test_misfits(desk, tmp_path, monkeypatch, line):
    monkeypatch.chdir(desk)
    Path("two.txt").write_text("cat\ndog\n")
    Path("bad.json").write_text('{"0": "cat", "2": "dog"}')
    Path("empty.npy").write_bytes(b"")
    np.save("x.npy", np.zeros((1, 4)))
    command, *options = line.split()
    photos = () if command == "filters" else ("cat.png",)
    ran = run(command, "nested.keras", *photos, *options, "--out", tmp_path / "out")
    assert ran.code == 2
    assert ran.out == ""
    assert all(word in ran.error for word in MISFITS[line])
    assert not (tmp_path / "out").exists()


def test_a_image_too_small_for_the_model(desk, tmp_path):
    ran = run("heatmap", desk / "free.keras", desk / "cat.png", "--input-size", 8, "--out", tmp_path / "out")
    assert ran.code == 1
    for word in ("8x8 pixels", "too small", "--input-size"):
        assert word in ran.error
    ran = run("filters", desk / "free.keras", "--layer", "conv2", "--size", 8, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "8x8 pixels" in ran.error


def test_a_number_of_channels_that_no_image_has(desk, tmp_path):
    path = saved(models.plain(channels=5), tmp_path / "five.keras")
    ran = run("heatmap", path, desk / "cat.png", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "takes 5" in ran.error


@pytest.mark.parametrize(("place", "word"), [("cat.png", "is a file"), ("cat.png/sub", "is a file")])
def test_out_that_can_not_be_a_folder_is_said_before_the_work(desk, place, word):
    ran = run("heatmap", desk / "free.keras", desk / "cat.png", "--out", desk / place)
    assert ran.code == 2
    assert word in ran.error
    assert "preprocessing" not in ran.err  # nothing was opened yet


def test_out_without_permission_is_said_before_the_work(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    ran = run("heatmap", desk / "free.keras", desk / "cat.png", "--out", tmp_path / "a" / "b")
    assert ran.code == 2
    assert "no permission" in ran.error


def test_a_full_disk_leaves_no_half_file(desk, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ran = run("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path)
    assert ran.code == 1
    assert "free some space" in ran.error
    assert files_in(tmp_path) == set()


# -- backends --------------------------------------------------------------------------------------------

IN_USE = os.environ["KERAS_BACKEND"]


def without(*missing):
    """The command line on a machine where some packages are not installed."""
    return (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {missing} else real(name, *rest)\n"
        "from convscope.cli import main; main()"
    )


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (without("jax"), ["--backend", "jax"], ["needs jax", "not installed", "pip install 'convscope[jax]'"]),
        (without("torch"), ["--backend", "torch"], ["needs torch", "pip install 'convscope[keras-torch]'"]),
        (without("keras"), ["--backend", IN_USE], ["needs keras", f"pip install 'convscope[{BACKENDS[IN_USE]}]'"]),
        (without("tensorflow", "jax", "torch"), [], ["no backend", "pip install 'convscope[tensorflow]'"]),
    ],
)
def test_a_backend_that_is_not_installed(desk, code, arguments, words):
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "KERAS_BACKEND"}
    process = apart("layers", desk / "free.keras", *arguments, code=code, env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert all(word in Ran(process.returncode, out, err).error for word in words)


@pytest.mark.parametrize("name", ["caffe", "numpy"])
def test_a_backend_of_keras_that_does_not_do(desk, name):
    process = apart("layers", desk / "free.keras", env={**ENVIRONMENT, "KERAS_BACKEND": name})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert all(word in Ran(1, out, err).error for word in [repr(name), "tensorflow, torch, jax", "--backend"])


def test_a_backend_beside_the_one_in_use(desk):
    ran = run("layers", desk / "free.keras", "--backend", OTHER_BACKEND)
    assert ran.code == 1
    for word in (repr(OTHER_BACKEND), repr(keras.backend.backend()), f"KERAS_BACKEND={OTHER_BACKEND}"):
        assert word in ran.error


# -- the ways out ----------------------------------------------------------------------------------------


def leave_with(monkeypatch, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("convscope.networks.open_model", failing)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError("surprise\nin two lines"),
            ["Internal error: ValueError: surprise in two lines.", "Re-run with --debug for a traceback."],
        ),
        (EOFError("no more input"), ["Internal error: EOFError"]),
        (MemoryError("Unable to allocate 9 TiB"), ["memory", "9 TiB", "--batch"]),
        (PermissionError(13, "Permission denied", "model.keras"), ["Permission denied", "model.keras"]),
    ],
)
def test_whatever_goes_wrong_is_one_line(desk, monkeypatch, error, words):
    leave_with(monkeypatch, error)
    ran = run("layers", desk / "free.keras")
    assert ran.code == 1
    assert all(word in ran.error for word in words)


@pytest.mark.parametrize(("error", "code"), [(ValueError("surprise"), 1), (convscope.errors.UsageError("no"), 2)])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(desk, monkeypatch, error, code):
    leave_with(monkeypatch, error)
    ran = run("layers", desk / "free.keras", "--debug")
    assert ran.code == code
    assert "Traceback" in ran.err
    assert "leave_with" in ran.err or "failing" in ran.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_130(desk, monkeypatch, error):
    leave_with(monkeypatch, error)
    ran = run("layers", desk / "free.keras")
    assert ran.code == 130
    assert ran.err.strip() == "interrupted; files already written are whole"


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.slow(reason="a process that imports a framework and is interrupted in its work")
def test_what_was_written_before_an_interrupt_is_whole(desk, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(150):
        image(number).save(photos / f"{number}.png")
    out = tmp_path / "out"
    process = apart("activations", desk / "nested.keras", photos, "--out", out, "--memory", "100kB")
    deadline = time.monotonic() + 60
    while not list(out.rglob("*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "interrupted; files already written are whole"
    assert "Traceback" not in err
    left = files_in(out)
    assert left
    assert {Path(name).suffix for name in left} == {".png"}  # no half file, no scratch file, no JSON of a whole run
    for name in left:
        Image.open(out / name).load()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
@pytest.mark.slow(reason="a process that imports a framework")
def test_a_reader_that_goes_away_is_no_fault(desk):
    process = apart("layers", desk / "free.keras", "--json")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert "Error" not in err
    assert "Traceback" not in err


# -- a folder of photos ----------------------------------------------------------------------------------


def test_heatmaps_of_a_folder_leave_out_what_is_no_image_and_say_so(desk, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        image(number, (20 + number, 30, 3)).save(folder / f"photo{number}.png")
    (folder / "torn.jpg").write_bytes((desk / "other" / "Cat.jpg").read_bytes()[:200])
    ran = run("heatmap", desk / "nested.keras", folder, "--out", tmp_path / "out", "--json")
    assert ran.code == 1  # what could be done was done, and not all could
    assert "1 of 4 images" in ran.err
    assert "torn.jpg" in ran.err
    assert [row["image"] for row in json.loads(ran.out)["heatmaps"]] == ["photo0", "photo1", "photo2"]


@pytest.mark.slow(reason="every method on one photo, those that pass thousands of changed copies among them")
def test_heatmaps_by_several_methods(desk, tmp_path):
    ran = run("heatmap", desk / "free.keras", desk / "cat.png", "--method", "all", "--out", tmp_path / "all", "--json")
    assert ran.code == 0
    data = json.loads(ran.out)
    assert {"grad-cam", "hirescam", "layercam", "eigen-cam"} <= {row["method"] for row in data["heatmaps"]}
    check_report(data, tmp_path / "all", "heatmaps.json")
    assert "cat.methods.png" in data["files"]
    few = run(
        "heatmap",
        desk / "free.keras",
        desk / "cat.png",
        "--method",
        "layercam, ablation-cam",
        "--out",
        tmp_path / "few",
    )
    assert few.code == 0
    assert "ablation-cam" in few.out
    options = ("--method", "rise,occlusion,grad-cam", "--option", "masks=9", "--option", "patch=12", "--json")
    chosen = run("heatmap", desk / "free.keras", desk / "cat.png", *options, "--out", tmp_path / "chosen")
    methods = chosen.json["provenance"]["parameters"]["methods"]
    assert [one["name"] for one in methods] == ["rise", "occlusion", "grad-cam"]
    assert (methods[0]["options"]["masks"], methods[1]["options"]) == (9, {"patch": 12, "stride": None})
    wrong = run("heatmap", desk / "free.keras", desk / "cat.png", "--method", "grad-cma", "--out", tmp_path / "wrong")
    assert (wrong.code, "grad-cam" in wrong.err) == (2, True)


@pytest.mark.slow(reason="the checks pass each photo many times")
def test_heatmaps_of_other_targets_with_their_checks(desk, tmp_path):
    arguments = ("heatmap", desk / "nested.keras", desk / "cat.png", "--json")
    found = run(*arguments, "--class", "top2", "--check", "--out", tmp_path / "checked")
    assert found.code == 0
    assert [row["check"]["badge"] in ("pass", "doubtful", "fail") for row in found.json["heatmaps"]] == [True, True]
    check_report(found.json, tmp_path / "checked", "heatmaps.json")
    like = run(*arguments, "--like", desk / "cat.png", "--layer", "best", "--out", tmp_path / "like")
    assert like.code == 0
    assert like.json["heatmaps"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert "the best of" in like.json["provenance"]["parameters"]["layer_rule"]
    unit = run(*arguments, "--class", "deep:2@3,4", "--signed", "--contours", "--out", tmp_path / "unit")
    assert (unit.code, unit.json["heatmaps"][0]["class"]) == (0, None)
    rise = run(*arguments, "--method", "rise", "--budget", 20, "--fast", "--smooth", "--out", tmp_path / "rise")
    assert (rise.code, rise.json["heatmaps"][0]["method"]) == (0, "rise")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--class", "deep:99"), "out of range"),
        (("--class", "top0"), "top1"),
        (("--like", "nowhere.png"), "nowhere.png"),
        (("--like", "cat.png", "--against", "rival"), "for classes only"),
        (("--layer", "best,gone"), "no layer 'best'"),
        (("--method", "finer-cam", "--class", "deep:1"), "finer-cam"),
    ],
)
def test_targets_that_can_not_be_are_one_line(desk, tmp_path, options, said):
    options = [desk / one if one == "cat.png" else one for one in options]
    ran = run("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path, *options)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_concepts(desk, tmp_path):
    ran = run("concepts", desk / "nested.keras", desk / "cat.png", "--count", 2, "--out", tmp_path, "--json")
    assert ran.code == 0
    check_report(ran.json, tmp_path, "concepts.json")
    assert [row["number"] for row in ran.json["concepts"]] == [0, 1]
    assert len(ran.json["concepts"][0]["predictions"]) == 3
    wrong = run("concepts", desk / "nested.keras", desk / "cat.png", "--count", 99, "--out", tmp_path / "wrong")
    assert (wrong.code, "1 to" in wrong.err) == (2, True)


# -- a terminal that nothing from a file can steer -------------------------------------------------------


HOSTILE = "\x1b[2J\x07\x9b31m\u202ecod\u2066.\u200f\u2028\u200b\ud800[red]:cat:"


def steers(text):
    """What could move the cursor, turn the line round, or not be seen: anything but what is printed, and line ends."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # of our own: bold titles
    return sorted({one for one in text if one != "\n" and not (one.isprintable() or one == "\u3000")})


@pytest.mark.slow(reason="every character of Unicode is written in several ways")
def test_what_passes_to_the_terminal():
    from convscope.terminal import safe, safe_json

    harmless = "conv2d_1/kernel:0 · 14×14×5 é 고양이 猫 кот ₂ ½ ☺ “x” – €\u3000"
    assert safe(harmless) == harmless
    every = "".join(map(chr, range(0x110000)))
    assert steers(safe(every)) == []
    assert safe("a\tb\n") == r"a\tb\n"
    assert safe("a\tb\n\r", lines=True) == "a\tb\n\\r"
    assert safe("\x1b\u202e\U000e0041") == r"\x1b\u202e\U000e0041"
    value = {"a": re.sub("[\ud800-\udfff]", "", every) + "\ud800"}  # two halves would make a whole
    text = json.dumps(value, ensure_ascii=False)
    assert steers(safe_json(text)) == []
    assert json.loads(safe_json(text)) == value


def test_text_of_other_code_passes_the_guard():
    from convscope.terminal import Guarded

    out = io.StringIO()
    with contextlib.redirect_stderr(Guarded(out)):
        print(HOSTILE, file=sys.stderr)
        sys.stderr.write("\r 10 %")
        assert not sys.stderr.isatty()
    assert steers(out.getvalue().replace("\r", "", 1)) == []
    assert out.getvalue().endswith("\n\r 10 %")


@pytest.fixture(scope="module")
def hostile(desk, tmp_path_factory):
    """A model with a layer, and class names, that would steer a terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    name = HOSTILE.replace("\ud800", "").replace(".", "")  # what Keras refuses
    x = image_in = layers.Input((8, 8, 3))
    x = layers.Flatten()(layers.Conv2D(3, 3, name="conv" + name)(x))
    model = models.seeded(keras.Model(image_in, layers.Dense(2, name="out")(x), name="m" + name))
    model.save(folder / "model.keras")
    (folder / "names.json").write_text(json.dumps([HOSTILE, "two\nlines"]))
    image().save(folder / "cat.png")
    return folder


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("command", ["layers", "doctor", "heatmap", "activations"])
def test_names_from_files_do_not_reach_the_terminal_raw(hostile, tmp_path, command, options):
    images = () if command in ("layers", "doctor") else (hostile / "cat.png", "--out", tmp_path / "out")
    ran = run(command, hostile / "model.keras", *images, "--classes", hostile / "names.json", *options)
    assert steers(ran.out) == steers(ran.err) == []
    if keras.backend.backend() == "tensorflow":
        # TensorFlow runs no layers of such names: that is said, and does not steer either.
        assert ran.code == 1
        return
    assert ran.code == 0, ran.err
    assert "[red]:cat" in "".join(ran.out.split())  # cells are folded


def test_names_do_not_steer_by_errors(hostile, tmp_path):
    name = "\x1b[2J\u202e\nError: no such luck.png"
    (tmp_path / name).write_bytes(b"no image")
    for arguments in (
        ("heatmap", hostile / "model.keras", tmp_path / name, "--out", tmp_path / "out"),
        ("heatmap", hostile / "model.keras", tmp_path / name, hostile / "cat.png", "--out", tmp_path / "out"),
        ("heatmap", hostile / "model.keras", hostile / "cat.png", "--out", tmp_path / "out", "--layer", name),
        ("heatmap", hostile / "model.keras", hostile / "cat.png", "--out", tmp_path / "out", "--class", name),
        ("layers", tmp_path / name),
        ("layers", hostile / "model.keras", "--classes", tmp_path / (name + "x")),
        ("layers", hostile / "model.keras", "--debug", "--feed", f"x={name}"),
        ("layers", hostile / "model.keras", "--" + name),
        (name,),
    ):
        ran = run(*arguments)
        assert ran.code in (1, 2)
        assert steers(ran.out) == steers(ran.err) == []
        assert [line for line in ran.err.splitlines() if line.startswith("Error: no such luck")] == []


@pytest.mark.parametrize("colour", [True, False])
def test_progress_does_not_interpret_names(monkeypatch, colour):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Shell(quiet=False, as_json=True).progress() as progress:
        progress(Advanced(3, 9, HOSTILE))
        print(HOSTILE, file=sys.stderr)
        print(HOSTILE)
    printed = sys.stderr.getvalue() + sys.stdout.getvalue()
    assert not set(printed) & set("\x07\x9b\u202e\u2066\u200f\u2028\u200b\ud800")
    assert "\x1b[2J" not in printed
    assert "[red]" in printed


# -- streams that are closed or full ---------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full and a shell")
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 1, "stdout is closed"),
        (">/dev/full", 1, "can't be printed on stdout"),
        ("--json >&-", 1, "stdout is closed"),
        ("--json >/dev/full", 1, "can't be printed on stdout"),
        (">/dev/null 2>&-", 0, ""),
        (">/dev/null 2>/dev/full", 0, ""),
        ("<&- >&- 2>&-", 1, ""),
        ("--nonsense 2>/dev/full", 2, ""),
    ],
)
@pytest.mark.slow(reason="a process that imports a framework for each stream")
def test_streams_that_are_closed_or_full(desk, redirection, code, said):
    program = f"{sys.executable} -m convscope layers {desk / 'nested.keras'} {redirection}"
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True, env=ENVIRONMENT, timeout=100)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert said in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.slow(reason="a process that imports a framework")
def test_results_are_written_where_nobody_listens(desk, tmp_path):
    program = f"{sys.executable} -m convscope heatmap {desk / 'nested.keras'} {desk / 'cat.png'} -o {tmp_path / 'out'}"
    done = subprocess.run(["sh", "-c", f"{program} >&- 2>&-"], env=ENVIRONMENT, timeout=100)
    assert done.returncode == 0
    assert (tmp_path / "out" / "heatmaps.json").exists()


# -- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(cli.app.commands))
def test_every_command_takes_limits(command):
    ran = run(command, "--help")
    assert "--limit" in ran.out
    assert "seconds" in ran.out


def test_limits_hold_for_the_command(desk, tmp_path):
    ran = run("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path / "out", "--limit", "pixels=100")
    assert ran.code == 1
    assert "40 x 30" in ran.error
    assert "--limit pixels=500" in ran.error
    ran = run("heatmap", desk / "nested.keras", desk / "cat.png", "--out", tmp_path / "out", "--limit", "pixels=6K")
    assert ran.code == 0
    ran = run("layers", desk / "nested.keras", "--limit", "size=3")
    assert (ran.code, "no limit 'size'" in ran.error) == (2, True)


def test_commands_take_folders_of_classes_and_tables(desk, tmp_path):
    data = tmp_path / "data"
    for number, name in enumerate(("set/cat/1.png", "set/dog/1.png", "set/dog/deeper/2.png")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        image(number).save(data / name)
    (data / "list.csv").write_text("path,label\nset/dog/1.png,dog\nset/cat/1.png,cat\n")
    for given, names in ((data / "set", ["cat/1", "dog/1"]), (data / "list.csv", ["set/dog/1", "set/cat/1"])):
        ran = run("heatmap", desk / "nested.keras", given, "--out", tmp_path / "maps", "--json")
        assert ran.code == 0, ran.err
        assert [row["image"] for row in json.loads(ran.out)["heatmaps"]] == names
    ran = run("activations", desk / "nested.keras", data / "set", "--out", tmp_path / "layers", "--layers", ":2")
    assert ran.code == 0, ran.err
    assert "dog/deeper" in ran.err
    ran = run("heatmap", desk / "nested.keras", data, "--out", tmp_path / "maps")
    assert (ran.code, "3 images" in ran.err) == (1, True), ran.err


def test_an_image_is_fed_to_another_input(desk, tmp_path):
    left, right = (layers.Input((12, 12, 3), name=name) for name in ("left", "right"))
    conv, pool = layers.Conv2D(4, 3, name="conv"), layers.GlobalAveragePooling2D(name="pool")
    score = layers.Dot(axes=1, name="score")([pool(conv(left)), pool(conv(right))])
    model = saved(models.seeded(keras.Model([left, right], score)), tmp_path / "siamese.keras")
    other = desk / "other" / "Cat.jpg"
    ran = run("heatmap", model, desk / "cat.png", "--feed", f"left={other}", "--out", tmp_path / "out", "--class", "0")
    assert ran.code == 0, ran.err
    assert "'left' is fed the image 'Cat'" in ran.err
    ran = run("layers", model, "--feed", f"left={other}")
    assert "of input" in ran.out
    ran = run("layers", model, "--feed", "left")
    assert (ran.code, "NAME=FILE.npy" in ran.err) == (2, True)


def test_what_is_fed_is_read_with_care(desk, tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "huge.npy").write_bytes(
        b"\x93NUMPY\1\0\x50\0" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (8589934592,)}".ljust(80)
    )
    for name, reason in (("two.npz", "2 arrays"), ("objects.npy", "objects"), ("huge.npy", "32GiB"), ("no", "No such")):
        ran = run("layers", desk / "nested.keras", "--feed", f"x={tmp_path / name}")
        assert (ran.code, reason in ran.error) == (2, True), ran.error
