"""Advice in messages leads somewhere: each suggestion is followed in the situation that produces it.

A message names a parameter with `option(...)`. The last test finds every error of the package that does, so that a new
one needs a case here, or the name of a test elsewhere that follows it.
"""

import ast
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from expecting import raises

torch = pytest.importorskip("torch")

import convscope  # noqa: E402
from convscope import render  # noqa: E402
from convscope.cli import main  # noqa: E402
from convscope.demo import PHOTOS  # noqa: E402
from convscope.errors import ConvscopeError  # noqa: E402
from convscope.images.decode import read_image  # noqa: E402

SOURCE = Path(convscope.__file__).parent
TESTS = Path(__file__).parent
PHOTO = str(PHOTOS[0])
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


class Classifier(torch.nn.Module):
    """Two convolutions and four logits; with `flat`, of images of one size only."""

    def __init__(self, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 5, 3, padding=1)
        self.pool = torch.nn.MaxPool2d(4)
        self.head = torch.nn.Linear(5 * 16 if flat else 5, 4)
        self.flat = flat

    def forward(self, x):
        x = self.pool(torch.relu(self.second(torch.relu(self.first(x)))))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


class Sum(torch.nn.Module):
    """Two inputs, of which the second one is a vector or an image."""

    def __init__(self, sides=2):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.sides = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3), sides

    def forward(self, image, extra):
        spread = extra if self.sides == 2 else extra.mean((2, 3))
        return self.head(torch.relu(self.conv(image)).mean((2, 3)) + spread.mean(1, keepdim=True))


class Mapped(Classifier):
    """An output with rows and columns, and under another name a row of scores."""

    def forward(self, x):
        maps = self.second(torch.relu(self.first(x)))
        return {"maps": maps.flatten(2), "scores": self.head(maps.mean((2, 3)))}


class Depth(torch.nn.Module):
    """An output `(n, 1, 1, h, w)`, in which no side is one of classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(torch.relu(self.stem(x)))).mean(1)[:, None, None]


class Losing(Classifier):
    """A number that is one for all images, and a row of scores for each."""

    def forward(self, x):
        scores = super().forward(x)
        return {"loss": scores.mean(), "scores": scores}


class Cropped(Classifier):
    """Six cells are cut off on each side."""

    def forward(self, x):
        return super().forward(torch.constant_pad_nd(self.first(x), (-6,) * 4).repeat(1, 1, 4, 4)[:, :3])


class Logarithm(Classifier):
    """NaN for pixels below 0."""

    def forward(self, x):
        return super().forward(torch.log(x + 0.1))


def opened(module=None, **options):
    """A network of 16x16 pixels."""
    options = {"size": 16, "preprocess": "0..1", **options}
    return convscope.open_model((module or Classifier()).eval(), **options)


@dataclass(frozen=True)
class Case:
    """Advice, and what follows it.

    Attributes:
        code: of the error.
        wrong: raises it.
        right: for each parameter that the message names, a call that follows the advice.
    """

    code: str
    wrong: Callable[[], object]
    right: dict[str, Callable[[], object]] = field(default_factory=dict)


def reduced(**options):
    """Filters of one channel, fast."""
    return {"channels": [0], "recipe": "classic", "steps": 2, "precision": "float32", **options}


CASES = [
    Case(
        "size-not-taken",
        lambda: convscope.filters(opened(Classifier(flat=True)), "head", **reduced(size=24)),
        {"size=": lambda: convscope.filters(opened(Classifier(flat=True)), "head", **reduced(size=16))},
    ),
    Case(
        "feed-invalid",
        lambda: opened(Sum(), feed={"extra": "no such file.npy"}, input="image"),
        {"feed=": lambda: opened(Sum(), feed={"extra": np.ones((1, 4), np.float32)}, input="image")},
    ),
    Case(
        "feed-is-image",
        lambda: opened(Sum(4), feed={"image": PHOTO, "extra": PHOTO}),
        {
            "feed=": lambda: opened(Sum(4), feed={"extra": PHOTO}),
            "input=": lambda: opened(Sum(4), feed={"image": PHOTO}, input="extra"),
        },
    ),
    Case(
        "feed-missing",
        lambda: opened(Sum()),
        {
            "feed=": lambda: opened(Sum(), feed={"extra": np.ones((1, 4), np.float32)}),
            "input=": lambda: opened(Sum(4), feed={"image": PHOTO}, input="extra"),
        },
    ),
    Case(
        "classes-unnamed",
        lambda: convscope.heatmap(opened(), IMAGE, target="cat"),
        {
            "classes=": lambda: convscope.heatmap(opened(classes=["cat", "dog", "owl", "fox"]), IMAGE, target="cat"),
            "0 to 3": lambda: convscope.heatmap(opened(), IMAGE, target=3),
        },
    ),
    Case(
        "output-not-finite",
        lambda: convscope.heatmap(opened(Logarithm(), preprocess="-1..1"), IMAGE),
        {"preprocess=": lambda: convscope.heatmap(opened(Logarithm(), preprocess="0..1"), IMAGE)},
    ),
    Case(
        "image-too-small",
        lambda: convscope.filters(opened(Cropped()), "constant_pad_nd", **reduced(size=12)),
        {"size=": lambda: convscope.filters(opened(Cropped()), "constant_pad_nd", **reduced(size=20))},
    ),
    Case(
        "not-per-image",
        lambda: convscope.heatmap(opened(Losing(), output="loss"), IMAGE),
        {"output=": lambda: convscope.heatmap(opened(Losing(), output="scores"), IMAGE)},
    ),
    Case(
        "preprocessing-misfit",
        lambda: opened(preprocess="0,0,1,1"),
        {
            "one mean and one deviation": lambda: opened(preprocess="0,255"),
            "3 means and then 3 deviations": lambda: opened(preprocess="0,0,0,255,255,255"),
        },
    ),
    Case("option-misfit", lambda: opened(backend="jax"), {"backend=": lambda: opened(backend="torch")}),
    Case(
        "no-class-scores",
        lambda: convscope.heatmap(opened(Mapped()), IMAGE),
        {
            "target=": lambda: convscope.heatmap(opened(Mapped()), IMAGE, target="second:1"),
            "output=": lambda: convscope.heatmap(opened(Mapped(), output="scores"), IMAGE),
        },
    ),
    Case(
        "no-map-of-classes",
        lambda: convscope.heatmap(opened(Depth()), IMAGE, target=0),
        {"target=": lambda: convscope.heatmap(opened(Depth()), IMAGE, target="conv:1")},
    ),
    Case(
        "no-frames",
        lambda: render.filters.animation_of(convscope.filters(opened(), "second", **reduced())),
        {"frames=": lambda: render.filters.animation_of(convscope.filters(opened(), "second", **reduced(frames=2)))},
    ),
    Case(
        "image-missing",
        lambda: convscope.filters(opened(), "second", **reduced(recipe="accentuation")),
        {"image=": lambda: convscope.filters(opened(), "second", **reduced(recipe="accentuation", image=IMAGE))},
    ),
    Case(
        "layer-unknown",
        lambda: convscope.activations(opened(), IMAGE, layers=["first"]).layer("second"),
        {"layers=": lambda: convscope.activations(opened(), IMAGE, layers=["first", "second"]).layer("second")},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.code)
def test_advice_leads_somewhere(case):
    with raises(ConvscopeError, case.code) as caught:
        case.wrong()
    for words, follow in case.right.items():
        assert words in str(caught.value)
        follow()


def test_arrays_are_there_when_they_were_asked_for(tmp_path):
    result = convscope.activations(opened(), IMAGE)
    convscope.save(result, tmp_path / "without", raw=False)
    with raises(ConvscopeError, "no-raw-arrays", match="raw="):
        convscope.load(tmp_path / "without")
    convscope.save(result, tmp_path / "with", raw=True)
    np.testing.assert_array_equal(convscope.load(tmp_path / "with")["first"], result["first"])


def test_weights_go_with_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())\n"
    )
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    torch.save(module.state_dict(), "net.pth")
    with raises(ConvscopeError, "weights-alone", match="weights="):
        convscope.open_model("net.pth", size=16)
    network = convscope.open_model("net.py:make", weights="net.pth", size=16, preprocess="0..1", head="linear")
    np.testing.assert_array_equal(network.weights()[0], module[0].weight.detach().numpy())


def test_a_pickled_module_opens_as_weights_with_code_or_with_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    torch.save(module, "net.pth")
    with raises(ConvscopeError, "needs-trust", match=r"state_dict(.|\n)*weights=(.|\n)*trust=True"):
        convscope.open_model("net.pth", size=16)
    assert convscope.open_model("net.pth", size=16, preprocess="0..1", trust=True).layers


def test_code_of_an_old_file_is_given_as_code(tmp_path, monkeypatch):
    pytest.importorskip("keras")
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    source = (
        "import keras\n"
        "def make():\n"
        "    layers = keras.layers\n"
        "    return keras.Sequential([keras.Input((16, 16, 3)), layers.Conv2D(4, 3, name='conv'),\n"
        "        layers.Lambda(lambda x: 2 * x, name='twice'), layers.GlobalAveragePooling2D(), layers.Dense(3)])\n"
    )
    Path("net.py").write_text(source)
    names = {}
    exec(source, names)
    model = names["make"]()
    model.save("old.h5")
    with h5py.File("old.h5", "a") as file:  # in this form Keras 2 kept bytecode
        file.attrs["keras_version"] = file["model_weights"].attrs["keras_version"] = "2.4.0"
    with raises(ConvscopeError, "code-in-file", match="file.py:function(.|\n)*weights="):
        convscope.open_model("old.h5", trust=True)
    network = convscope.open_model("net.py:make", weights="old.h5", preprocess="0..1", head="linear")
    x = network.prepare([read_image(IMAGE)])
    np.testing.assert_allclose(network.predict(x), names["keras"].ops.convert_to_numpy(model(x)), atol=1e-5)


def test_one_of_several_state_dicts_is_chosen_by_its_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())\n"
    )
    modules = {name: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()) for name in ("plain", "average")}
    torch.save({name: module.state_dict() for name, module in modules.items()}, "net.pth")
    options = {"size": 16, "preprocess": "0..1", "head": "linear"}
    with raises(ConvscopeError, "weights-ambiguous", match="plain(.|\n)*weights=") as several:
        convscope.open_model("net.py:make", weights="net.pth", **options)
    with raises(ConvscopeError, "weights-key-unknown", match="plain(.|\n)*weights=") as unknown:
        convscope.open_model("net.py:make", weights="net.pth::other", **options)
    for key in {*several.value.data["names"], *unknown.value.data["names"]} & modules.keys():
        network = convscope.open_model("net.py:make", weights=f"net.pth::{key}", **options)
        np.testing.assert_array_equal(network.weights()[0], modules[key][0].weight.detach().numpy())


def test_a_model_that_was_never_called_gets_a_size(tmp_path, monkeypatch):
    keras = pytest.importorskip("keras")
    monkeypatch.chdir(tmp_path)
    source = (
        "import keras\n"
        "def make():\n"
        "    layers = keras.layers\n"
        "    return keras.Sequential([layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(3)])\n"
    )
    Path("net.py").write_text(source)
    names = {}
    exec(source, names)
    model = names["make"]()
    model.build((None, 16, 16, 3))
    model.save_weights("net.weights.h5")
    with raises(ConvscopeError, "not-built", match="size="):
        convscope.open_model("net.py:make", weights="net.weights.h5", preprocess="0..1", head="linear")
    options = {"weights": "net.weights.h5", "preprocess": "0..1", "head": "linear"}
    network = convscope.open_model("net.py:make", size=16, **options)
    x = network.prepare([read_image(IMAGE)])
    np.testing.assert_allclose(network.predict(x), keras.ops.convert_to_numpy(model(x)), atol=1e-5)


def test_weights_of_a_collection_are_given_as_a_file(tmp_path, monkeypatch):
    timm = types.ModuleType("timm")

    def create_model(name, pretrained=False, **arguments):
        if pretrained:
            raise RuntimeError("offline")
        return Classifier()

    timm.is_model, timm.list_models = lambda name: name == "far", lambda: ["far"]
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    trained = Classifier()
    torch.nn.init.constant_(trained.first.weight, 0.5)
    torch.save(trained.state_dict(), tmp_path / "far.pth")
    with raises(ConvscopeError, "weights-not-fetched", match="weights=(.|\n)*pretrained=false"):
        convscope.open_model("timm:far", size=16)
    network = convscope.open_model("timm:far", weights=tmp_path / "far.pth", size=16, preprocess="0..1")
    np.testing.assert_array_equal(network.weights()[0], trained.first.weight.detach().numpy())
    assert convscope.open_model("timm:far?pretrained=false", size=16, preprocess="0..1").head.units == 4


def test_another_input_takes_the_image():
    keras = pytest.importorskip("keras")
    image, age = keras.Input((16, 16, 3), name="image"), keras.Input((2,), name="age")
    maps = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(image))
    model = keras.Model([age, image], keras.layers.Dense(2)(keras.layers.Concatenate()([maps, age])))
    with raises(ConvscopeError, "input-shape", match="input="):
        convscope.open_model(model, input="age", preprocess="0..1")
    assert convscope.open_model(model, input="image", preprocess="0..1").inputs.channels == 3


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with code of a network and an image."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "net.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), "
        "torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()\n"
    )
    return folder


@pytest.mark.parametrize(
    ("wrong", "words", "right"),
    [
        (["activations", "--layers", "4", "--channel", "1"], "leave --channel", ["activations", "--layers", "4"]),
        (["heatmap", "--class", "1", "--like", PHOTO], "give one of them", ["heatmap", "--like", PHOTO]),
        (
            ["heatmap", "--method", "rise", "--budget", "20", "--option", "masks=20"],
            "give one of them",
            ["heatmap", "--method", "rise", "--budget", "20"],
        ),
    ],
)
def test_advice_of_the_command_line(desk, monkeypatch, capsys, wrong, words, right):
    monkeypatch.chdir(desk)
    common = ["net.py:make", PHOTO, "--input-size", "16", "--preprocess", "0..1", "--out", "out"]
    assert run(*wrong[:1], *common, *wrong[1:]) != 0
    assert words in capsys.readouterr().err
    assert run(*right[:1], *common, *right[1:]) == 0


def run(*arguments):
    """The exit code of a command."""
    try:
        main(list(arguments))
    except SystemExit as end:
        return end.code or 0
    return 0


# Codes whose advice a test elsewhere follows, for each format or situation that has it.
ELSEWHERE = {
    "backend-in-use": "test_cli.py::test_a_backend_beside_the_one_in_use",
    "backend-unknown": "test_cli.py::test_a_backend_of_keras_that_does_not_do",
}


def advised():
    """Codes of the errors in the source whose message names a parameter."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            codes = [word.value for word in getattr(call, "keywords", []) if word.arg == "code"]
            if codes and isinstance(codes[0], ast.Constant) and "option(" in ast.unparse(call):
                found.add(codes[0].value)
    return found


def test_every_advice_is_followed_by_a_test():
    here = set(re.findall(r'raises\(ConvscopeError, "([\w-]+)"', Path(__file__).read_text(encoding="utf-8")))
    known = {case.code for case in CASES} | here | {"no-map-layer", "two-targets", "two-budgets"}
    assert advised() - known == set(ELSEWHERE)
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), place
