"""What a result's provenance says is enough to make the result again, bit for bit, in another process."""

import pytest
import reproducing

pytest.importorskip("keras")

import convscope
from convscope.demo import CLASSES, MODEL, PHOTOS
from convscope.techniques.filters import RECIPES
from convscope.techniques.heatmaps import (
    RISE,
    IntegratedGradients,
    Occlusion,
    ScoreCAM,
    SmoothGrad,
    similarity_target,
)

CAT, COFFEE = map(str, PHOTOS[:2])
LAYER = "block4_conv"


def of_recipe(name):
    recipe = RECIPES[name]
    channels = [0, 7] if recipe.raises == "channels" else None
    photo = CAT if recipe.needs_image else None
    return lambda network: convscope.filters(
        network, LAYER, channels, recipe=name, steps=2, size=64, seed=3, image=photo
    )


def heatmap(*arguments, **options):
    return lambda network: convscope.heatmap(network, [CAT, COFFEE], *arguments, **options)


CASES = {
    "activations": lambda network: convscope.activations(network, [CAT, COFFEE], ["block3_conv", LAYER]),
    "activations on disk": lambda network: convscope.activations(network, [CAT, COFFEE], LAYER, memory=400_000),
    "concepts": lambda network: convscope.concepts(network, [CAT, COFFEE], count=3),
    **{f"filters {name}": of_recipe(name) for name in RECIPES},
    "filters of objectives": lambda network: convscope.filters(
        network, objectives=["block4_conv:7 - 0.5*cat", "cat - 0.1*tv(input)"], steps=2, size=64
    ),
    "filters with variants and photos": lambda network: convscope.filters(
        network, LAYER, [7], steps=2, size=64, variants=2, natural_images=[CAT, COFFEE], frames=1
    ),
    "heatmap of the best class": heatmap(),
    "heatmap of a difference": heatmap("cat", against="coffee", method=["grad-cam", "finer-cam"]),
    "heatmap of an objective": heatmap("block4_conv:7 - 0.5*cat", "block3_conv"),
    "heatmap of several layers": heatmap("cat", ["block3_conv", LAYER]),
    "heatmap of likeness": lambda network: convscope.heatmap(network, CAT, similarity_target(network, COFFEE)),
    "heatmap with a budget": heatmap(1, against=3, method="rise", budget=9, seed=3),
    "heatmap by sampling": heatmap(
        "cat",
        method=[
            RISE(masks=8, resolution=4),
            SmoothGrad(noise=0.3, copies=3),
            IntegratedGradients(baseline="mean", steps=3),
            Occlusion(patch=112),
            ScoreCAM(channels=6),
        ],
        seed=5,
    ),
}


slow = pytest.mark.slow(reason="the framework starts in two processes, each of which compiles every recipe")


@pytest.fixture(scope="module")
def found():
    """For each case what this process made, and what another one made of its provenance: one process for all."""
    network = convscope.open_model(MODEL, classes=CLASSES)
    results = [make(network) for make in CASES.values()]
    again = reproducing.made_again(results)
    return dict(zip(CASES, zip(map(reproducing.values_of, results), again, strict=True), strict=True))


@slow
@pytest.mark.parametrize("case", CASES)
def test_a_result_is_made_again_from_its_provenance(found, case):
    here, there = found[case]
    assert there == here


@slow
def test_the_results_differ(found):
    """The comparison could fail: no two cases have the same values."""
    assert len({here for here, _ in found.values()}) == len(CASES)
