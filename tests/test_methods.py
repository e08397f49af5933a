"""The options of heatmap methods against slow loops from their definitions, and methods of the user's own."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from expecting import raises
from PIL import Image

keras = pytest.importorskip("keras")
from test_heatmaps import gap_network, maps_and_head  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model, store  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.techniques.heatmaps import (  # noqa: E402
    METHODS,
    RISE,
    FinerCAM,
    HeatmapOptions,
    IntegratedGradients,
    Method,
    MethodResult,
    Occlusion,
    PerImageMethod,
    ScoreCAM,
    SmoothGrad,
    as_methods,
    iter_heatmaps,
    option,
    with_options,
)

ROOT = Path(__file__).parents[1]
CLASS = 2


@pytest.fixture(scope="module")
def network():
    """conv 5x5, stride 2 -> ReLU -> mean -> dense, of images of 20x24 pixels in -1..1."""
    return open_model(gap_network(), preprocess="-1..1")


def prepared(network, found):
    return network.prepare(found.images)


def gradient_by_hand(network, x):
    """The gradient of the logit at the pixels of one image `(h, w, c)`, place by place."""
    maps, head, _ = maps_and_head(network.model, x[None])
    kernel = keras.ops.convert_to_numpy(network.model.get_layer("conv").kernel)
    before = (maps[0] > 0) * head[:, CLASS] / maps[0, ..., 0].size
    found = np.zeros(x.shape)
    for row, column in np.ndindex(before.shape[:2]):
        found[2 * row : 2 * row + 5, 2 * column : 2 * column + 5] += kernel @ before[row, column]
    return found


# -- options against slow loops --------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "stride"), [(5, 3), (7, 7), (1, None)])
def test_occlusion_with_another_patch_and_stride(network, photo, patch, stride):
    found = convscope.heatmap(network, photo, CLASS, method=Occlusion(patch, stride))
    x = prepared(network, found)
    step = stride or max(1, patch // 2)
    total, times = np.zeros((20, 24)), np.zeros((20, 24))
    covered, corners = [], []
    for row in [*range(0, 20 - patch, step), 20 - patch]:
        for column in [*range(0, 24 - patch, step), 24 - patch]:
            one = x[0].copy()
            one[row : row + patch, column : column + patch] = x[0].mean(axis=(0, 1))
            covered.append(one)
            corners.append((row, column))
    losses = network.predict(x)[0, CLASS] - network.predict(np.stack(covered))[:, CLASS]
    for (row, column), loss in zip(corners, losses, strict=True):
        total[row : row + patch, column : column + patch] += loss
        times[row : row + patch, column : column + patch] += 1
    np.testing.assert_allclose(found.maps[0], total / times, rtol=1e-3, atol=1e-5)


def test_rise_with_another_resolution_share_and_number_of_masks(network, photo):
    """Equation 6 with masks as in section 3.2: random cells, enlarged by ceil(size / cells), randomly cropped."""
    found = convscope.heatmap(network, photo, CLASS, method=RISE(masks=9, resolution=3, visible=0.7), seed=5)
    x = prepared(network, found)
    masks = []
    for number in range(9):
        random = np.random.default_rng((5, number))
        cells = (random.random((4, 4)) < 0.7).astype(np.float32)
        large = np.asarray(Image.fromarray(cells).resize((4 * 8, 4 * 7), Image.Resampling.BILINEAR))
        row, column = random.integers(7), random.integers(8)
        masks.append(large[row : row + 20, column : column + 24])
    logits = network.predict(x * np.stack(masks)[..., None]).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = (powers / powers.sum(axis=1, keepdims=True))[:, CLASS]
    expected = sum((score - scores.mean()) * mask for score, mask in zip(scores, masks, strict=True)) / (9 * 0.7)
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-3, atol=1e-6)
    assert found.rows[0].note.startswith("9 masks")


def test_smoothgrad_with_other_noise_and_copies(network, photo):
    found = convscope.heatmap(network, photo, CLASS, method=SmoothGrad(noise=0.4, copies=5), seed=3)
    x = prepared(network, found)[0]
    scale = 0.4 * (x.max() - x.min())
    noisy = [x + scale * np.random.default_rng((3, copy)).normal(0, 1, x.shape) for copy in range(5)]
    mean = np.mean([gradient_by_hand(network, one.astype(np.float32)) for one in noisy], axis=0)
    np.testing.assert_allclose(found.maps[0], np.abs(mean).max(axis=-1), rtol=1e-3, atol=1e-6)


COLOURS = {"zero": 127.5, "black": 0, "white": 255}


@pytest.mark.parametrize("baseline", ["zero", "black", "white", "mean"])
def test_integrated_gradients_from_another_baseline(network, photo, baseline):
    """Three steps are the sum by hand; many fulfil completeness (axiom 3 of the paper, proposition 1)."""
    few, many = (
        convscope.heatmap(network, photo, CLASS, method=IntegratedGradients(baseline, steps)) for steps in (3, 400)
    )
    x = prepared(network, few)[0]
    start = np.full_like(x, COLOURS[baseline] / 127.5 - 1) if baseline in COLOURS else x * 0 + x.mean(axis=(0, 1))
    steps = [gradient_by_hand(network, start + (x - start) * np.float32((step + 0.5) / 3)) for step in range(3)]
    expected = ((x - start) * np.mean(steps, axis=0)).sum(axis=-1)
    np.testing.assert_allclose(few.maps[0], expected, rtol=1e-3, atol=1e-5)
    scores = network.predict(np.stack([x, start]))[:, CLASS]
    assert many.maps[0].sum() == pytest.approx(scores[0] - scores[1], rel=0.01, abs=1e-4)


@pytest.mark.parametrize(("alpha", "rivals"), [(1.0, 1), (0.3, 2), (0.0, 3), (0.6, 99)])
def test_finer_cam_with_another_alpha_and_number_of_rivals(network, photo, alpha, rivals):
    found = convscope.heatmap(network, photo, CLASS, method=FinerCAM(alpha, rivals))
    x = prepared(network, found)
    maps, head, _ = maps_and_head(network.model, x)
    logits = network.predict(x)[0].astype(np.float64)
    others = sorted((one for one in range(5) if one != CLASS), key=lambda one: abs(logits[one] - logits[CLASS]))
    near = others[:rivals]
    shares = np.exp(logits[near]) / np.exp(logits[near]).sum()
    weights = head[:, CLASS] - alpha * head[:, near] @ shares
    np.testing.assert_allclose(found.maps[0], maps[0] @ weights / maps[0, ..., 0].size, rtol=1e-3, atol=1e-6)


def test_the_defaults_are_those_of_the_papers_or_said():
    values = {name: method.values for name, method in METHODS.items() if method.options}
    assert values == {
        "finer-cam": {"alpha": 0.6, "rivals": 3},
        "score-cam": {"channels": None},
        "occlusion": {"patch": None, "stride": None},
        "rise": {"masks": 1000, "resolution": 7, "visible": 0.5},
        "smoothgrad": {"noise": 0.15, "copies": 32},
        "integrated-gradients": {"baseline": "zero", "steps": 64},
    }


def test_a_budget_is_the_option_that_says_how_many_passes_there_are(network, photo):
    pairs = [(RISE(masks=12), "rise"), (SmoothGrad(copies=12), "smoothgrad"), (ScoreCAM(channels=3), "score-cam")]
    for method, name in pairs:
        budget = method.values[METHODS[name].sampled]
        by_object = convscope.heatmap(network, photo, CLASS, method=method)
        by_budget = convscope.heatmap(network, photo, CLASS, method=name, budget=budget)
        np.testing.assert_array_equal(by_object.maps, by_budget.maps)
        assert by_object.parameters.methods == by_budget.parameters.methods
    assert METHODS["grad-cam"].with_budget(5) is METHODS["grad-cam"]


# -- values that an option can't have --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method", "name", "expected", "found"),
    [
        (lambda: SmoothGrad(noise=-1), "smoothgrad", "noise", "a number of at least 0", -1),
        (lambda: SmoothGrad(copies=2.5), "smoothgrad", "copies", "a whole number of at least 1", 2.5),
        (lambda: SmoothGrad(copies=True), "smoothgrad", "copies", "a whole number of at least 1", True),
        (
            lambda: IntegratedGradients("grey"),
            "integrated-gradients",
            "baseline",
            "zero, black, white or mean",
            "grey",
        ),
        (lambda: IntegratedGradients(steps=0), "integrated-gradients", "steps", "a whole number of at least 1", 0),
        (lambda: Occlusion(patch=0), "occlusion", "patch", "a whole number of at least 1, or auto", 0),
        (lambda: Occlusion(patch=4, stride=5), "occlusion", "stride", "at most the side of the patch, 4 pixels", 5),
        (lambda: RISE(resolution=300), "rise", "resolution", "a whole number from 1 to 256", 300),
        (lambda: RISE(masks=1), "rise", "masks", "a whole number of at least 2", 1),
        (lambda: FinerCAM(rivals="3"), "finer-cam", "rivals", "a whole number of at least 1", "3"),
        (lambda: ScoreCAM(channels=1), "score-cam", "channels", "a whole number of at least 2, or all", 1),
    ],
)
def test_a_value_that_an_option_cant_have_is_refused(make, method, name, expected, found):
    with raises(UsageError, "method-option-invalid", method=method, name=name, found=found) as refused:
        make()
    assert type(refused.value.data["found"]) is type(found)
    assert f"expected {expected}" in str(refused.value)
    assert f"found {found!r}" in str(refused.value)


def test_a_refused_option_that_is_no_number_and_one_that_is_not_there():
    with raises(UsageError, "method-option-invalid", match="found nan; the default is 0.15"):
        SmoothGrad(noise=float("nan"))
    with raises(UsageError, "method-option-unknown", method="rise", name="mask", match="did you mean 'masks'"):
        METHODS["rise"].with_values(mask=4)


@pytest.mark.parametrize(
    ("names", "given", "code", "said"),
    [
        (["rise"], {"maks": "5"}, "method-option-unknown", "did you mean 'masks'"),
        (["rise"], {"maks": "5"}, "method-option-unknown", "visible=0.5 (a number from 0.01 to 1)"),
        (["rise"], {"masks": "many"}, "method-option-invalid", "expected a whole number of at least 2, found 'many'"),
        (["rise"], {"masks": "2.0"}, "method-option-invalid", "found '2.0'"),
        (["grad-cam"], {"masks": "5"}, "method-option-unknown", "grad-cam has no options."),
        (
            ["grad-cam", "rise"],
            {"noise": "5"},
            "method-option-unknown",
            "none of these methods has an option 'noise'. rise has masks=1000",
        ),
        (["grad-cam", "cam"], {"noise": "5"}, "method-option-unknown", "They have no options."),
    ],
)
def test_a_text_that_stands_for_no_value_is_refused(names, given, code, said):
    with raises(UsageError, code) as refused:
        with_options(as_methods(names), given)
    assert said in str(refused.value)


def test_texts_go_to_every_method_that_has_the_option():
    found = with_options(as_methods(["grad-cam", "smoothgrad", "rise"]), {"noise": "0.5", "masks": " 20 "})
    assert found == [METHODS["grad-cam"], SmoothGrad(noise=0.5), RISE(masks=20)]
    (auto,) = with_options([Occlusion(patch=4, stride=2)], {"stride": "auto"})
    assert auto == Occlusion(patch=4)
    assert with_options([SmoothGrad()], {"noise": "1"})[0].values == {"noise": 1.0, "copies": 32}


def test_a_patch_larger_than_the_image_is_refused(network, photo):
    with raises(UsageError, "patch-too-large", method="occlusion", expected=20, found=21):
        convscope.heatmap(network, photo, CLASS, method=Occlusion(patch=21))
    with raises(
        UsageError,
        "method-option-invalid",
        method="occlusion",
        name="stride",
        found=3,
        match="at most the side of the patch, 2 pixels",
    ):
        convscope.heatmap(network, photo, CLASS, method=Occlusion(stride=3))


# -- methods of the user's own ---------------------------------------------------------------------------


def test_an_own_method_with_an_option(network, photo, tmp_path):
    @dataclass(frozen=True)
    class Power(Method):
        name = "power"
        exponent: float = option(2.0, "of the norm over channels", low=1)

        def explain(self, evidence):
            return list((np.abs(evidence.maps) ** self.exponent).sum(-1) ** (1 / self.exponent))

    found = convscope.heatmap(network, photo, CLASS, method=["grad-cam", Power(3)])
    maps, _, _ = maps_and_head(network.model, prepared(network, found))
    np.testing.assert_allclose(found.maps[1], np.cbrt((np.abs(maps[0]) ** 3).sum(-1)), rtol=1e-4)
    assert [row.method for row in found.rows] == ["grad-cam", "power"]
    details = found.provenance["parameters"]["method_details"]
    assert details[0] == {"kind": "built in"}
    assert details[1]["code"].endswith("Power")
    store.save(found, tmp_path)
    again = convscope.load(tmp_path).parameters.methods
    assert [(one.name, dict(one.options)) for one in again] == [("grad-cam", {}), ("power", {"exponent": 3.0})]
    with raises(
        UsageError,
        "method-option-invalid",
        method="power",
        name="exponent",
        found=0,
        match="expected a number of at least 1, found 0",
    ):
        Power(0)
    assert with_options([Power()], {"exponent": "4"}) == [Power(4)]


def test_an_object_that_is_no_method_of_convscope(network, photo):
    class Mean:
        name = "mean"

        def explain(self, evidence):
            return [one.mean(axis=-1) for one in evidence.maps]

    found = convscope.heatmap(network, photo, CLASS, method=Mean(), smooth=True, check=True)
    assert (found.rows[0].method, found.maps[0].shape) == ("mean", (20, 24))
    assert found.rows[0].check.badge in ("pass", "doubtful", "fail")


def test_an_own_method_that_passes_changed_images(network, photo):
    class Mirrored(PerImageMethod):
        name, at_image = "mirrored", True

        def explain_image(self, view):
            mirrored = view.scores_of_images(lambda numbers: view.x[numbers, :, ::-1], 1)
            return MethodResult(view.x[0].mean(axis=-1), f"{mirrored[0]:.3f}")

    found = convscope.heatmap(network, photo, CLASS, method=Mirrored())
    assert float(found.rows[0].note) == pytest.approx(
        network.predict(prepared(network, found)[:, :, ::-1])[0, CLASS], abs=1e-3
    )
    assert found.rows[0].layer == ""


class Nameless:
    def explain(self, evidence):
        return evidence.maps


class OfOneShape(Nameless):
    name = "wrong"


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (SmoothGrad, "method-invalid", "give an object of it, SmoothGrad()"),
        (3, "method-invalid", "an object with a name and a function explain, found 3"),
        (Nameless(), "method-invalid", "found Nameless without one"),
        (
            OfOneShape(),
            "maps-misfit",
            "expected a map (h, w) for each of 1 images from method 'wrong', found 1 of the shapes (8, 10, 6)",
        ),
        ([], "method-missing", "at least one method"),
    ],
)
def test_what_is_no_method_is_refused(network, photo, given, code, said):
    with raises(UsageError, code) as refused:
        convscope.heatmap(network, photo, CLASS, method=given)
    assert said in str(refused.value)


def test_two_sets_of_options_of_one_method_are_told_apart(network, photo, tmp_path):
    methods = [Occlusion(patch=4), Occlusion(patch=8, stride=2), "grad-cam"]
    found = convscope.heatmap(network, photo, CLASS, method=methods)
    assert [row.method for row in found.rows] == ["occlusion(patch=4)", "occlusion(patch=8, stride=2)", "grad-cam"]
    store.save(found, tmp_path)
    assert [row.method for row in convscope.load(tmp_path).rows] == [row.method for row in found.rows]


# -- finished items, one after another -------------------------------------------------------------------


def test_heatmaps_are_yielded_when_they_are_finished(network, photo, monkeypatch):
    images = [np.roll(photo, 5 * shift, axis=1) for shift in range(5)]
    whole = convscope.heatmap(network, images, CLASS, method=["grad-cam", "layercam"], batch=2)
    passed = []
    original = type(network).prepare
    monkeypatch.setattr(
        type(network),
        "prepare",
        lambda self, images, *more: passed.append(len(images)) or original(self, images, *more),
    )
    options = HeatmapOptions(method=["grad-cam", "layercam"], batch=2)
    items = iter_heatmaps(network, images, CLASS, options=options)
    first = next(items)
    assert passed == [2]  # the other images were not touched yet
    found = [first, *items]
    assert [item.number for item in found] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [item.row for item in found] == list(whole.rows)
    np.testing.assert_array_equal(np.stack([item.heat for item in found]), whole.maps)
    with raises(UsageError, "method-unknown", name="x"):
        iter_heatmaps(network, images, CLASS, options=HeatmapOptions(method="x"))  # before the first is asked for


# -- the documentation -----------------------------------------------------------------------------------


def test_the_table_of_options_in_the_docs_is_up_to_date(tmp_path):
    script = ROOT / "docs" / "make_methods.py"
    spec = importlib.util.spec_from_file_location("make_methods", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    page = (ROOT / "docs" / "heatmaps.md").read_text(encoding="utf-8")
    assert make.made(page) == page, "run python docs/make_methods.py"
    assert make.made(page.replace("| `1000` |", "| `999` |")) == page != page.replace("| `1000` |", "| `999` |")
    for name, method in METHODS.items():
        for one in method.options:
            assert f"| `{name}` | `{one.name}` |" in page


def test_help_of_the_option_lists_all_options():
    ran = subprocess.run(
        [sys.executable, "-m", "convscope", "heatmap", "--option", "help"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for method in METHODS.values():
        for one in method.options:
            assert one.name in ran.stdout
