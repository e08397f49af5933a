"""The preprocessing measured from batch norms whose statistics are known: planted from textures that no part of
convscope has seen, with natural spectra and colours.
"""

import importlib.util
import json
import threading

import numpy as np
import pytest
from PIL import Image

import convscope
from convscope.images.natural import natural_images
from convscope.networks import measured as measuring
from convscope.networks.measured import Fit, Measurement, Moments, StoredNorm
from convscope.networks.preprocessing import PRESETS

SIDE = 24
COLOURS = [[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]]  # ImageNet's, of three independent axes
MEAN = [0.485, 0.456, 0.406]
GREY = ("none", "0..1", "-0.5..0.5", "-1..1")


def textures(count, channels, seed=5, contrast=1.0):
    """Random images `(n, h, w, c)` whose amplitudes fall with the frequency; values 0..255."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 0.5 / SIDE
    shape = (count, 3, *frequency.shape)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency**1.1
    maps = np.fft.irfft2(spectrum, s=(SIDE, SIDE)).transpose(0, 2, 3, 1)
    maps /= maps.std(axis=(0, 1, 2))
    pixels = 255 * np.clip(contrast * maps @ np.array(COLOURS).T + MEAN, 0, 1)
    return pixels if channels == 3 else pixels @ np.array([[0.299], [0.587], [0.114]])


def convolved(x, kernel):
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nhwcij,ijck->nhwk", windows, kernel)


def kernels(channels, seed=0):
    """Two kernels `(3, 3, c, 8)` with smoothing filters beside edge detectors, as trained first layers have them."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 0.3, (3, 3, channels, 8)), rng.normal(0, 0.2, (3, 3, 8, 8))
    first[..., :3] = np.abs(first[..., :3])
    return first, second


def planted(preset, channels=3, contrast=1.0):
    """Kernels and, for each of two norms, mean and variance of what enters it, computed in NumPy."""
    first, second = kernels(channels)
    one = convolved(PRESETS[preset].apply(textures(48, channels, contrast=contrast)).astype(np.float64), first)
    statistics = [(one.mean(axis=(0, 1, 2)), one.var(axis=(0, 1, 2)))]
    mean, variance = statistics[0]
    two = convolved(np.maximum((one - mean) / np.sqrt(variance + 1e-3), 0), second)
    return first, second, [*statistics, (two.mean(axis=(0, 1, 2)), two.var(axis=(0, 1, 2)))]


def keras_model(first, second, statistics, name="planted"):
    keras = pytest.importorskip("keras")
    layers, channels = keras.layers, first.shape[2]
    model = keras.Sequential(
        [
            layers.Input((SIDE, SIDE, channels)),
            *(layers.Conv2D(8, 3, use_bias=False, name="a"), layers.BatchNormalization(name="norm_a"), layers.ReLU()),
            *(layers.Conv2D(8, 3, use_bias=False, name="b"), layers.BatchNormalization(name="norm_b"), layers.ReLU()),
            *(layers.GlobalAveragePooling2D(), layers.Dense(3, activation="softmax")),
        ],
        name=name,
    )
    for letter, kernel, (mean, variance) in zip("ab", (first, second), statistics, strict=True):
        model.get_layer(letter).kernel.assign(kernel)
        model.get_layer(f"norm_{letter}").moving_mean.assign(mean)
        model.get_layer(f"norm_{letter}").moving_variance.assign(variance)
    return model


def torch_model(first, second, statistics):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(first.shape[2], 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ).eval()
    with torch.no_grad():
        for place, kernel, (mean, variance) in zip((0, 3), (first, second), statistics, strict=True):
            model[place].weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1)))
            model[place + 1].running_mean.copy_(torch.tensor(mean))
            model[place + 1].running_var.copy_(torch.tensor(variance))
    return model


def onnx_file(folder, first, second, statistics, batch=1):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("torch")
    helper, weights, nodes, before = onnx.helper, {}, [], "image"
    for letter, kernel, (mean, variance) in zip("ab", (first, second), statistics, strict=True):
        weights |= {f"kernel_{letter}": kernel.transpose(3, 2, 0, 1), f"mean_{letter}": mean}
        weights |= {f"variance_{letter}": variance, f"scale_{letter}": np.ones(8), f"shift_{letter}": np.zeros(8)}
        norm = [f"conv_{letter}", *(f"{part}_{letter}" for part in ("scale", "shift", "mean", "variance"))]
        nodes += [
            helper.make_node("Conv", [before, f"kernel_{letter}"], [f"conv_{letter}"], name=f"conv_{letter}"),
            helper.make_node("BatchNormalization", norm, [f"norm_{letter}"], name=f"norm_{letter}", epsilon=1e-3),
            helper.make_node("Relu", [f"norm_{letter}"], [f"relu_{letter}"], name=f"relu_{letter}"),
        ]
        before = f"relu_{letter}"
    nodes += [
        helper.make_node("GlobalAveragePool", [before], ["pooled"], name="pooled"),
        helper.make_node("Flatten", ["pooled"], ["scores"], name="scores"),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("image", kind, (batch, first.shape[2], SIDE, SIDE))],
        [helper.make_tensor_value_info("scores", kind, (batch, 8))],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "planted.onnx")
    return str(folder / "planted.onnx")


RUNTIMES = [name for name in ("keras", "torch", "onnx") if importlib.util.find_spec(name)]


def opened(runtime, folder, parts, **options):
    if runtime == "keras":
        return convscope.open_model(keras_model(*parts), **options)
    if runtime == "torch":
        return convscope.open_model(torch_model(*parts), size=SIDE, **options)
    return convscope.open_model(onnx_file(folder, *parts), **options)


@pytest.mark.without_keras
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_preprocessing_of_the_training_is_measured(runtime, preset, tmp_path):
    network = opened(runtime, tmp_path, planted(preset))
    assert (network.preprocessing.name, network.preprocessing.certainty) == (preset, "measured")
    assert network.preprocessing.bgr == PRESETS[preset].bgr
    assert network.measurement.clear
    assert network.measurement.best.name == preset
    assert len(network.measurement.norms) == 2
    assert network.contradiction == ""


@pytest.mark.without_keras
@pytest.mark.parametrize("preset", GREY)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_that_of_a_grey_network_too(runtime, preset, tmp_path):
    network = opened(runtime, tmp_path, planted(preset, channels=1))
    assert (network.preprocessing.name, network.preprocessing.certainty) == (preset, "measured")
    assert {fit.name for fit in network.measurement.fits} == set(GREY)


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_numbers_are_in_the_text_and_in_the_json(runtime, tmp_path):
    network = opened(runtime, tmp_path, planted("none"))
    best, following = network.measurement.best, network.measurement.next
    for part in (best.text, following.text, following.name):
        assert part in network.preprocessing.text
    data = json.loads(json.dumps(network.describe()))["preprocessing"]
    assert (data["name"], data["certainty"]) == ("none", "measured")
    assert data["measured"]["kl"] == {fit.name: fit.kl for fit in network.measurement.fits}
    assert data["measured"]["clear"] is True
    assert data == network.describe()["preprocessing"]


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_measuring_again_gives_the_same_numbers(runtime, tmp_path):
    parts = planted("torch")
    network = opened(runtime, tmp_path, parts)
    assert measuring.measured(network) == network.measurement == opened(runtime, tmp_path, parts).measurement


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name != "onnx"])
def test_statistics_that_were_read_stay_as_they_were_when_training_goes_on(runtime):
    parts = planted("none")
    if runtime == "keras":
        model = keras_model(*parts)
        change, network = model.get_layer("norm_a").moving_mean.assign, convscope.open_model(model)
    else:
        model = torch_model(*parts)
        change, network = model[1].running_mean.fill_, convscope.open_model(model, size=SIDE)
    norm = network.stored_norms(1)[0]
    change(np.full(8, 7.0, np.float32) if runtime == "keras" else 7.0)
    np.testing.assert_allclose(norm.mean, parts[2][0][0], rtol=1e-5)
    np.testing.assert_array_equal(network.stored_norms(1)[0].mean, np.full(8, 7.0))


@pytest.mark.without_keras
def test_statistics_are_not_those_of_another_threads_pass_with_other_weights():
    parts = planted("none")
    model = torch_model(*parts)
    network = convscope.open_model(model, size=SIDE)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        assert go_on.wait(20)

    def run():
        with network.replaced([2 * array for array in network.weights()]):
            network.predict(np.zeros((1, SIDE, SIDE, 3), np.float32))

    model[0].register_forward_pre_hook(wait)
    threads = [threading.Thread(target=run), threading.Thread(target=lambda: found.extend(network.stored_norms(1)))]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    go_on.set()
    for thread in threads:
        thread.join(20)
    np.testing.assert_allclose(found[0].mean, parts[2][0][0], rtol=1e-5)


@pytest.mark.without_keras
def test_a_network_that_takes_one_image_at_a_time_is_given_several_only_once():
    torch = pytest.importorskip("torch")
    refused = []

    class OneAtATime(torch.nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            if len(x) != 1:
                refused.append(len(x))
                raise ValueError("one image at a time")
            return self.body(x)

    parts = planted("-1..1")
    network = convscope.open_model(OneAtATime(torch_model(*parts)).eval(), size=SIDE)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("-1..1", "measured")
    assert refused == [5]
    expected = convscope.open_model(torch_model(*parts), size=SIDE).measurement
    assert [fit.kl for fit in network.measurement.fits] == pytest.approx([fit.kl for fit in expected.fits], rel=1e-3)


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_more_images_need_no_other_program(runtime, tmp_path, monkeypatch):
    network = opened(runtime, tmp_path, planted("0..1"))
    made, original = [], type(network).compile
    monkeypatch.setattr(type(network), "compile", lambda self, function: made.append(1) or original(self, function))
    image = convscope.images.decode.read_image(textures(1, 3, seed=11)[0].astype(np.uint8))
    found = [measuring.resemblances(network, [image])[0].kl for _ in range(3)]
    assert found == [found[0]] * 3
    assert len(made) == 1


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_the_user_gives_wins_and_a_contradiction_is_said(runtime, tmp_path):
    parts = planted("none")
    network = opened(runtime, tmp_path, parts, preprocess="0..1")
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("0..1", "set")
    assert "none fits better than 0..1, which was given" in network.contradiction
    assert network.describe()["preprocessing"]["contradiction"] == network.contradiction
    assert opened(runtime, tmp_path, parts, preprocess="none").contradiction == ""


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_numbers_that_the_user_gives_are_measured_as_well(runtime, tmp_path):
    parts = planted("torch")
    near = opened(runtime, tmp_path, parts, preprocess="125.3,123,113.9,63,62.1,66.7")  # of CIFAR-10
    assert near.measurement.other.name == "mean,std"
    assert near.contradiction == ""
    assert "mean,std" in opened(runtime, tmp_path, parts, preprocess="0,1").contradiction


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_given_is_not_measured_at_opening(runtime, tmp_path, monkeypatch):
    def refused(network):
        raise AssertionError("measured")

    parts = planted("none")
    for module in ("inspection", "network"):
        monkeypatch.setattr(f"convscope.networks.{module}.measured", refused)
    network = opened(runtime, tmp_path, parts, preprocess="0..1")
    assert network.preprocessing.certainty == "set"
    monkeypatch.undo()
    assert network.measurement.best.name == "none"


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_other_weights_for_a_while_are_not_measured(runtime, tmp_path):
    parts = planted("-1..1")
    network = opened(runtime, tmp_path, parts, preprocess="-1..1")
    with network.scrambled(network.stages()):
        inside = network.measurement
    assert inside == opened(runtime, tmp_path, parts).measurement


def test_a_measurement_wins_over_a_guess_by_name():
    parts = planted("none")
    network = convscope.open_model(keras_model(*parts, name="mobilenet"))
    chosen = network.preprocessing
    assert (chosen.name, chosen.certainty, chosen.instead_of) == ("none", "measured", "-1..1")
    assert "contradicts the guess of -1..1" in chosen.text
    assert "mobilenet" in chosen.text


def test_what_a_model_states_wins_and_a_contradiction_is_said():
    """A model that divides by 255 itself, in front of layers that saw 0..255."""
    keras = pytest.importorskip("keras")
    inner = keras_model(*planted("none"))
    image = keras.layers.Input((SIDE, SIDE, 3))
    network = convscope.open_model(keras.Model(image, inner(keras.layers.Rescaling(1 / 255)(image)), name="outer"))
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")
    assert network.contradiction == ""  # none of the candidates fits

    right = keras_model(*planted("0..1"))
    image = keras.layers.Input((SIDE, SIDE, 3))
    network = convscope.open_model(keras.Model(image, right(keras.layers.Rescaling(1 / 255)(image)), name="outer"))
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")
    assert network.measurement.best.name == "none"
    assert network.contradiction == ""


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_networks_without_trained_norms_stay_as_they_were(runtime, tmp_path):
    first, second, _ = planted("none")
    usual = "0..1" if runtime == "keras" else "torch"
    untrained = [(np.zeros(8), np.ones(8))] * 2
    network = opened(runtime, tmp_path, (first, second, untrained))
    assert network.measurement is None
    assert (network.preprocessing.name, network.preprocessing.certainty) == (usual, "guess")
    assert "measure" not in network.preprocessing.text
    assert network.describe()["preprocessing"]["measured"] is None


def test_networks_without_norms_stay_as_they_were():
    models = pytest.importorskip("models")
    network = convscope.open_model(models.shared())
    assert network.measurement is None
    assert network.preprocessing.text == (
        "pixels scaled to 0..1 (a guess: most networks trained from scratch take 0..1; give the preprocessing if yours "
        "differs)"
    )


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_statistics_that_natural_images_do_not_fit_leave_a_guess(runtime, tmp_path):
    first, second, _ = planted("none")
    rng = np.random.default_rng(3)
    odd = [(rng.normal(0, 30, 8), rng.uniform(0.01, 0.1, 8)) for _ in range(2)]
    network = opened(runtime, tmp_path, (first, second, odd))
    assert network.preprocessing.certainty == "guess"
    assert not network.measurement.clear
    assert f"KL {network.measurement.best.text}" in network.preprocessing.text
    assert "natural images don't fit" in network.preprocessing.text


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_close_one_stays_a_guess(runtime, tmp_path):
    """Images of about half the usual contrast on -1..1 lie between that and -0.5..0.5."""
    network = opened(runtime, tmp_path, planted("-1..1", contrast=0.55))
    found = network.measurement
    assert {found.best.name, found.next.name} == {"-1..1", "-0.5..0.5"}
    assert not found.clear
    assert network.preprocessing.certainty == "guess"
    assert found.next.text in network.preprocessing.text


def test_a_norm_on_the_image_itself():
    keras = pytest.importorskip("keras")
    pixels = PRESETS["none"].apply(textures(48, 3))
    image = keras.layers.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.BatchNormalization(name="norm")(image))
    model = keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    model.get_layer("norm").moving_mean.assign(pixels.mean(axis=(0, 1, 2)))
    model.get_layer("norm").moving_variance.assign(pixels.var(axis=(0, 1, 2)))
    network = convscope.open_model(model)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "measured")
    assert network.measurement.norms == ("norm",)


@pytest.mark.without_keras
def test_the_distance_of_a_channel_is_the_integral():
    """KL of two normal distributions, by a sum over a fine grid."""
    x = np.linspace(-60, 60, 400_001)

    def normal(mean, variance):
        return np.exp(-np.square(x - mean) / (2 * variance)) / np.sqrt(2 * np.pi * variance)

    stored = StoredNorm("norm", None, np.array([0.5, -3.0]), np.array([4.0, 9.0]))
    seen = Moments(np.array([1.0, 2.0]), np.array([2.0, 25.0]))
    for channel in range(2):
        p = normal(seen.mean[channel], seen.variance[channel])
        q = normal(stored.mean[channel], stored.variance[channel])
        integral = np.trapezoid(p * (np.log(p + 1e-300) - np.log(q + 1e-300)), x)
        assert stored.distances(seen)[channel] == pytest.approx(integral, rel=1e-4)


@pytest.mark.without_keras
def test_moments_of_several_images_are_those_of_all_their_pixels():
    x = np.random.default_rng(1).normal(size=(7, 5, 6, 3)) * [1, 2, 3] + np.arange(7).reshape(7, 1, 1, 1)
    together = Moments(x.mean(axis=(1, 2)), x.var(axis=(1, 2))).together
    np.testing.assert_allclose(together.mean, x.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(together.variance, x.var(axis=(0, 1, 2)))


@pytest.mark.without_keras
@pytest.mark.parametrize(
    ("kl", "following", "clear"),
    [(0.02, 0.2, True), (0.15, 0.45, True), (0.16, 5.0, False), (0.1, 0.29, False), (np.inf, np.inf, False)],
)
def test_what_is_clear(kl, following, clear):
    assert Measurement((Fit("0..1", kl), Fit("torch", following)), ("norm",), 15).clear is clear


@pytest.mark.without_keras
def test_the_images_that_are_measured_on_have_natural_colours():
    pixels = natural_images(64, 64, 3).reshape(-1, 3) / 255
    np.testing.assert_allclose(pixels.mean(axis=0), MEAN, atol=0.04)
    np.testing.assert_allclose(np.cov(pixels.T), np.array(COLOURS) @ np.transpose(COLOURS), atol=0.03)
    assert natural_images(64, 64, 1).shape == (15, 64, 64, 1)
    assert natural_images(600, 700, 3).shape == (5, 600, 700, 3)


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_image_that_the_network_was_not_trained_on_lies_farther(runtime, tmp_path):
    network = opened(runtime, tmp_path, planted("0..1"))
    natural = textures(3, 3, seed=11).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 2, (SIDE, SIDE, 3)).astype(np.uint8) * 255
    images = [convscope.images.decode.read_image(one) for one in (*natural, noise)]
    *near, far = measuring.resemblances(network, images)
    assert far.farther
    assert far.kl > 2 * max(one.kl for one in near)
    assert not any(one.farther for one in near)
    assert [one.kl for one in measuring.resemblances(network, images[-1:])] == pytest.approx([far.kl], rel=1e-3)


@pytest.mark.without_keras
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_doctor_and_the_report_say_it(runtime, tmp_path):
    network = opened(runtime, tmp_path, planted("none"), preprocess="0..1")
    Image.fromarray(textures(1, 3)[0].astype(np.uint8)).save(tmp_path / "image.png")
    found = convscope.doctor(network, image=tmp_path / "image.png")
    assert any(network.contradiction in doubt for doubt in found.doubts)
    assert found.to_json()["resemblance"]["kl"] == pytest.approx(found.resemblance.kl)
    assert convscope.doctor(network).resemblance is None
    pytest.importorskip("jinja2")
    data = convscope.report(network, [tmp_path / "image.png"], tmp_path / "page.html", channels=0)
    assert data["resemblance"][0]["image"] == "image"
    assert data["resemblance"][0]["kl"] == pytest.approx(found.resemblance.kl, rel=1e-3)
    assert data["provenance"]["network"]["preprocessing"]["contradiction"] == network.contradiction
    assert network.contradiction in (tmp_path / "page.html").read_text(encoding="utf-8").replace("&#39;", "'")
