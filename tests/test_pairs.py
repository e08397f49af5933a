"""Two classes under one softmax: their difference is explained, on each runtime, against its closed form."""

import importlib.util
import json

import numpy as np
import pytest
from spellings import OF_KERAS, OF_TORCH, opened, prepared, runtimes

import convscope
from convscope.binding import Binder
from convscope.errors import UsageError
from convscope.objectives import class_score, logit, parse
from convscope.techniques.heatmaps import FinerCAM

SIDE, CHANNELS = 18, 6
NAMES = ("cat", "dog")
HAS_KERAS = importlib.util.find_spec("keras") is not None


def weights(classes=2):
    """By Keras' shapes. Both classes like the same channels, so that one logit's map says little of the difference."""
    rng = np.random.default_rng(3)
    drawn = [rng.normal(0, 0.3, (5, 5, 3, CHANNELS)), rng.normal(0, 0.1, CHANNELS)]
    common = rng.normal(0, 1, (CHANNELS, 1))
    drawn += [common + rng.normal(0, 0.3, (CHANNELS, classes)), rng.normal(0, 0.1, classes)]
    return [array.astype(np.float32) for array in drawn]


def of_keras(classes=2, end="softmax"):
    import keras

    keras_layers = keras.layers
    stack = [
        keras_layers.Input((SIDE, SIDE, 3)),
        keras_layers.Conv2D(CHANNELS, 5, activation="relu", name="conv"),
        keras_layers.GlobalAveragePooling2D(name="gap"),
        keras_layers.Dense(classes, activation=end, name="out"),
    ]
    model = keras.Sequential(stack)
    model.set_weights(weights(classes))
    return model


def of_torch(classes=2, end="softmax"):
    import torch
    from torch import nn

    drawn = [torch.from_numpy(array) for array in weights(classes)]
    last = [nn.Softmax(dim=1)] if end else []
    module = nn.Sequential(
        *(nn.Conv2d(3, CHANNELS, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, classes)),
        *last,
    ).eval()
    with torch.no_grad():
        module[0].weight.copy_(drawn[0].permute(3, 2, 0, 1))
        module[0].bias.copy_(drawn[1])
        module[4].weight.copy_(drawn[2].T)
        module[4].bias.copy_(drawn[3])
    return module


def made(runtime, folder, classes=2, end="softmax", **options):
    build = of_keras if runtime in OF_KERAS else of_torch
    return opened(runtime, build(classes, end), folder, SIDE, classes=NAMES[:classes], **options)


def truth(x):
    """Maps of the convolution after its ReLU `(n, h, w, c)`, and logits `(n, 2)`, by slow loops in float64."""
    kernel, bias, dense, last = (array.astype(np.float64) for array in weights())
    size = x.shape[1] - 4
    maps = np.zeros((len(x), size, size, CHANNELS))
    for row, column in np.ndindex(size, size):
        maps[:, row, column] = np.einsum("nijc,ijck->nk", x[:, row : row + 5, column : column + 5], kernel) + bias
    maps = np.maximum(maps, 0)
    return maps, maps.mean(axis=(1, 2)) @ dense + last


def layer_of(runtime, network):
    """The layer after the ReLU."""
    if runtime == "keras":
        return "conv"
    return "1" if runtime == "torch" else next(layer.path for layer in network.layers if layer.activation)


@pytest.mark.parametrize("runtime", runtimes("keras", *OF_TORCH))
def test_the_difference_is_explained_unless_one_logit_is_asked_for(runtime, photo, tmp_path):
    network = made(runtime, tmp_path)
    assert network.head.paired
    x = prepared(network, [photo])
    (maps,), (logits,) = truth(x)
    dense = weights()[2]
    layer, size = layer_of(runtime, network), maps.shape[0] * maps.shape[1]
    for number, name in enumerate(NAMES):
        found = convscope.heatmap(network, photo, number, layer)
        np.testing.assert_allclose(found.maps[0], maps @ (dense[:, number] - dense[:, 1 - number]) / size, atol=1e-5)
        (row,) = found.rows
        assert row.score == pytest.approx(logits[number] - logits[1 - number], abs=1e-4)
        assert (row.class_name, row.against, found.parameters.against_choice) == (name, NAMES[1 - number], "pair")
        assert row.probability == pytest.approx(1 / (1 + np.exp(-row.score)), rel=1e-4)
        same = convscope.heatmap(network, photo, name, layer, against="rival")
        np.testing.assert_array_equal(same.maps, found.maps)
        assert same.parameters.against_choice == "given"
        for spelling in (f"logit:{name}", f"logit:{number}", logit(name)):
            alone = convscope.heatmap(network, photo, spelling, layer)
            np.testing.assert_allclose(alone.maps[0], maps @ dense[:, number] / size, atol=1e-5)
            assert alone.rows[0].score == pytest.approx(logits[number], abs=1e-4)
            assert (alone.rows[0].against, alone.parameters.against_choice) == (None, "none")
    assert np.corrcoef(alone.maps[0].ravel(), found.maps[0].ravel())[0, 1] < 0.9, "the two could not be told apart"


@pytest.mark.parametrize("runtime", runtimes("keras", *OF_TORCH))
def test_each_way_to_name_a_class_means_the_difference(runtime, photo, tmp_path):
    network = made(runtime, tmp_path)
    logits = network.predict(prepared(network, [photo]))[0].astype(np.float64)
    score = {0: logits[0] - logits[1], 1: logits[1] - logits[0]}
    best = int(logits.argmax())
    for target in ("top", "top1", best, NAMES[best], f"class:{NAMES[best]}", class_score(best)):
        row = convscope.heatmap(network, photo, target).rows[0]
        assert (row.class_index, row.score) == (best, pytest.approx(score[best], abs=1e-5))
    both = convscope.heatmap(network, photo, "top2").rows
    assert [row.score for row in both] == [pytest.approx(score[row.class_index], abs=1e-5) for row in both]
    written = convscope.heatmap(network, photo, "cat - dog").rows[0]
    assert written.score == pytest.approx(score[0], abs=1e-5)
    twice = convscope.heatmap(network, photo, "2*cat").rows[0]
    assert twice.score == pytest.approx(2 * score[0], abs=1e-5)
    as_written = convscope.heatmap(network, photo, "2*cat - dog").rows[0]
    assert as_written.score == pytest.approx(2 * logits[0] - logits[1], abs=1e-5)


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_what_is_explained_is_said_and_typed(runtime, photo, tmp_path):
    network = made(runtime, tmp_path)
    assert "the difference of the two logits is explained" in network.head.text
    found = convscope.heatmap(network, photo)
    assert "difference" in found.parameters.explained
    convscope.save(found, tmp_path / "out")
    again = convscope.load(tmp_path / "out")
    assert again.parameters.against_choice == "pair"
    assert again.rows[0].against == found.rows[0].against is not None
    saved = json.loads((tmp_path / "out" / "heatmaps.json").read_text())
    assert saved["heatmaps"][0]["against"] == found.rows[0].against
    alone = convscope.heatmap(network, photo, "logit:cat")
    assert "alone" in alone.parameters.explained


@pytest.mark.parametrize("runtime", runtimes("torch"))
def test_logits_of_two_classes_are_a_pair_too(runtime, photo, tmp_path):
    """A network that ends in two logits, where the head says that a softmax belongs to them."""
    network = made(runtime, tmp_path, end=None, head="softmax")
    logits = network.predict(prepared(network, [photo]))[0]
    np.testing.assert_allclose(logits, truth(prepared(network, [photo]))[1][0], atol=1e-4)
    row = convscope.heatmap(network, photo, "dog").rows[0]
    assert row.score == pytest.approx(logits[1] - logits[0], abs=1e-5)
    assert "whose difference is explained" in network.head.text


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_two_values_are_no_pair(runtime, photo, tmp_path):
    network = made(runtime, tmp_path, end=None, head="linear")
    row = convscope.heatmap(network, photo, 1).rows[0]
    assert row.score == pytest.approx(network.predict(prepared(network, [photo]))[0, 1], abs=1e-5)
    assert row.against is None


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_the_map_is_checked_by_what_it_explains(runtime, photo, tmp_path):
    """The score of one logit alone is that logit, and not the probability, which the other one decides as well."""
    network = made(runtime, tmp_path)
    for method in ("grad-cam", FinerCAM()):
        found = convscope.heatmap(network, photo, "cat", method=method, check=True)
        given = convscope.heatmap(network, photo, "cat", method=method, check=True, against="dog")
        assert found.rows[0].check == given.rows[0].check
        assert 0 <= found.rows[0].check.deletion <= 1
    np.testing.assert_array_equal(found.maps, convscope.heatmap(network, photo, "cat").maps)
    alone = convscope.heatmap(network, photo, "logit:cat", method="finer-cam", check=True).rows[0].check
    assert alone.deletion != found.rows[0].check.deletion


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_a_filter_of_a_class_raises_the_difference(runtime, tmp_path):
    network = made(runtime, tmp_path)
    bind = Binder(network, (SIDE, SIDE)).bind
    for text, expected in (
        ("cat", [1, -1]), ("class:dog", [-1, 1]), ("logit:dog", [0, 1]), ("0.5*cat", [0.5, -0.5])
    ):  # fmt: skip
        (vector,) = bind(parse(text)).vectors
        np.testing.assert_array_equal(vector, expected)
    first, second = bind(parse("cat - dog")).vectors
    np.testing.assert_array_equal(first + second, [1, -1])
    found = convscope.filters(network, objectives=["cat", "logit:cat"], steps=3, size=SIDE)
    assert [row.name for row in found.rows] == ["class:0", "logit:0"]
    logits = network.predict(found.values)
    for row, one in zip(found.rows, (logits[0, 0] - logits[0, 1], logits[1, 0]), strict=True):
        assert row.activation == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("runtime", runtimes("keras", "torch"))
def test_a_class_of_many_is_its_own_logit(runtime, photo, tmp_path):
    build = of_keras if runtime == "keras" else of_torch
    network = opened(runtime, build(4), tmp_path, SIDE)
    one, alone = (convscope.heatmap(network, photo, target) for target in ("class:2", "logit:2"))
    np.testing.assert_array_equal(one.maps, alone.maps)
    assert one.rows == alone.rows


@pytest.mark.parametrize(
    "text", ["logit:cat", 'logit:"a + b"', "logit:3", "2*logit:cat - class:cat", "logit:a - logit:b"]
)
def test_the_text_of_a_logit_reads_as_itself(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


def test_a_report_explains_classes(tmp_path, photo):
    runtime = "keras" if HAS_KERAS else "torch"
    network = made(runtime, tmp_path)
    data = convscope.report(network, photo, tmp_path / "page.html", channels=0)
    assert data["heatmaps"][0]["against"] is not None
    assert "difference of the logits" in (tmp_path / "page.html").read_text()
    with pytest.raises(UsageError) as error:
        convscope.report(network, photo, tmp_path / "page.html", target="logit:cat", channels=0)
    assert error.value.code == "not-a-class"


def output_of(capsys, *arguments):
    """What a command prints that ends well."""
    from convscope.cli import main

    main([str(argument) for argument in arguments])
    return "".join(capsys.readouterr())


def test_the_command_says_it_and_its_advice_works(tmp_path, photo, capsys):
    from PIL import Image

    if HAS_KERAS:
        of_keras().save(tmp_path / "net.keras")
        model = [tmp_path / "net.keras"]
    else:
        import torch

        torch.jit.trace(of_torch(), torch.zeros(1, 3, SIDE, SIDE)).save(tmp_path / "net.pt")
        model = [tmp_path / "net.pt", "--input-size", SIDE]
    Image.fromarray(photo).save(tmp_path / "disc.png")
    arguments = ["heatmap", *model, tmp_path / "disc.png", "--out", tmp_path / "out"]
    said = output_of(capsys, *arguments)
    assert "the difference of the two logits is explained" in said
    advice = said.partition('--class "')[2].partition('"')[0]
    assert advice.startswith("logit:")
    assert "explains one logit alone" not in output_of(capsys, *arguments, "--class", advice)
    saved = json.loads((tmp_path / "out" / "heatmaps.json").read_text())
    assert saved["heatmaps"][0]["against"] is None
