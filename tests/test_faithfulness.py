"""How far to trust a heatmap: measures against known curves, and controls that have to fail."""

from contextlib import suppress

import models
import numpy as np
import pytest

keras = pytest.importorskip("keras")
from test_heatmaps import gap_network  # noqa: E402
from test_pixels import linear_network  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.techniques.heatmaps import faithfulness as faith  # noqa: E402
from convscope.techniques.heatmaps.evidence import TraceSpec, trace  # noqa: E402
from convscope.techniques.heatmaps.ranks import rank_correlation  # noqa: E402
from convscope.techniques.heatmaps.targets import goal_of  # noqa: E402


def single_of(network, image, target=1, layer=None):
    x = network.prepare(convscope.images.decode.read_images([image]))
    goal = goal_of(network, target, None, 1, lambda: None)
    return next(trace(TraceSpec(network, layer, goal.target), x, goal.arguments).views())


def random_image(side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_curves_of_a_weighted_sum_are_running_sums():
    """f(x) = sum(w x): what is left of it while pixels give way to the mean colour, over what the whole has more."""
    network = linear_network((8, 8))
    weights = np.repeat(np.arange(64.0).reshape(8, 8, 1), 3, axis=2)
    kernel = np.stack([np.zeros_like(weights), weights], axis=-1)
    network.model.get_layer("out").set_weights([kernel.reshape(-1, 2), np.zeros(2)])
    single = single_of(network, random_image())
    x = single.x[0].astype(np.float64)
    grey = np.broadcast_to(x.mean(axis=(0, 1)), x.shape)
    heat = np.random.default_rng(1).permutation(64).reshape(8, 8)
    curve = faith.score_curve(single, faith.ranked(heat, (8, 8), np.random.default_rng(0)), single.x[0], grey)
    order = np.argsort(-heat.ravel())
    for step in range(16):
        mixed = x.reshape(64, 3).copy()
        mixed[order[: round(step / 15 * 64)]] = grey.reshape(64, 3)[0]
        left = (mixed.reshape(x.shape) * weights).sum()
        none, whole = (grey * weights).sum(), (x * weights).sum()
        assert curve[step] == pytest.approx((left - none) / abs(whole - none), rel=1e-3, abs=1e-3)


def test_deletion_and_insertion_know_what_counts():
    """Only the left half counts; a map of it loses everything at once, a map of the other half only in the end."""
    network = linear_network((8, 8))
    kernel = np.zeros((8, 8, 3, 2), np.float32)
    kernel[:, :4, :, 1] = 1
    network.model.get_layer("out").set_weights([kernel.reshape(-1, 2), np.zeros(2)])
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    single = single_of(network, image)
    right, wrong = np.zeros((8, 8)), np.zeros((8, 8))
    right[:, :4], wrong[:, 4:] = 1, 1
    found = [faith.deletion(single, faith.ranked(one, (8, 8), np.random.default_rng(0))) for one in (right, wrong)]
    # From 1 to 0 in the first half of the steps, or in the second: areas 1/4 and 3/4, but for the trapezoid at half.
    assert found == pytest.approx([0.25, 0.75], abs=5e-3)
    gained = [faith.insertion(single, faith.ranked(one, (8, 8), np.random.default_rng(0))) for one in (right, wrong)]
    assert gained[0] > gained[1] + 0.1


def test_ties_are_broken_by_chance_so_that_a_constant_map_points_nowhere():
    places = faith.ranked(np.ones((4, 4)), (16, 16), np.random.default_rng(0))
    assert sorted(places.ravel()) == list(range(256))
    halves = places[:8].mean(), places[8:].mean()
    assert abs(halves[0] - halves[1]) < 40


def test_imputation_solves_its_equations():
    random = np.random.default_rng(3)
    image = random.random((12, 11, 2)).astype(np.float32)
    removed = random.random((12, 11)) < 0.6
    found = faith.imputed(image, removed, random, noise=0.0)
    cells = [tuple(cell) for cell in np.argwhere(removed)]
    number = {cell: index for index, cell in enumerate(cells)}
    left, right = np.zeros((len(cells), len(cells))), np.zeros((len(cells), 2))
    for cell, index in number.items():
        for r in (-1, 0, 1):
            for c in (-1, 0, 1):
                other = cell[0] + r, cell[1] + c
                if (r, c) == (0, 0) or not (0 <= other[0] < 12 and 0 <= other[1] < 11):
                    continue
                weight = 1 / 6 if 0 in (r, c) else 1 / 12
                left[index, index] += weight
                if other in number:
                    left[index, number[other]] -= weight
                else:
                    right[index] += weight * image[other]
    exact = np.linalg.solve(left, right)
    np.testing.assert_allclose(found[removed], exact, atol=5e-3)
    np.testing.assert_array_equal(found[~removed], image[~removed])


def test_large_holes_are_filled_nearly_as_the_equations_say():
    """A ramp with its middle gone is a ramp again: each cell of a ramp is the mean of its neighbours."""
    ramp = np.linspace(0, 1, 64)[None, :, None] * np.ones((64, 1, 1))
    removed = np.zeros((64, 64), bool)
    removed[10:54, 10:54] = True
    found = faith.imputed(ramp.astype(np.float32), removed, np.random.default_rng(0), noise=0.0)
    assert np.abs(found - ramp).max() < 0.03


def test_road_prefers_the_map_that_counts():
    network = linear_network((16, 16))
    kernel = np.zeros((16, 16, 3, 2), np.float32)
    kernel[4:8, 4:8, :, 1] = 1
    network.model.get_layer("out").set_weights([kernel.reshape(-1, 2), np.zeros(2)])
    image = np.zeros((16, 16, 3), np.uint8)
    image[4:8, 4:8] = 255
    single = single_of(network, image)
    right = np.zeros((16, 16))
    right[4:8, 4:8] = 1
    random = np.random.default_rng(0)
    good, bad = (faith.road(single, faith.ranked(one, (16, 16), random), random) for one in (right, -right))
    assert good > 0.5
    assert bad < -0.5


# -- the badge -------------------------------------------------------------------------------------------


def remake_edges(x):
    rows, columns = np.gradient(x[0].mean(axis=-1))
    return np.hypot(rows, columns)


def test_an_edge_detector_fails(photo):
    single = single_of(open_model(gap_network(), preprocess="0..1"), photo)
    found = faith.check(single, remake_edges(single.x), remake_edges)
    assert found.randomisation == pytest.approx(1)
    assert found.badge == "fail"
    assert "hardly depends" in found.reason


def test_random_maps_fail_whether_they_are_the_same_or_not(photo):
    single = single_of(open_model(gap_network(), preprocess="0..1"), photo)
    fixed = np.random.default_rng(0).random((20, 24))
    assert faith.check(single, fixed, lambda x: fixed).badge == "fail"
    source = np.random.default_rng(1)
    fresh = faith.check(single, fixed, lambda x: source.random((20, 24)))
    assert fresh.randomisation < 0.2
    assert fresh.badge == "fail"  # imperceptible noise changes it


def test_a_constant_map_fails(photo):
    single = single_of(open_model(gap_network(), preprocess="0..1"), photo)
    flat = np.ones((8, 10))
    found = faith.check(single, flat, lambda x: flat)
    assert (found.badge, found.reason[:27]) == ("fail", "the map has the same value ")


@pytest.mark.parametrize(
    ("scrambled", "steady", "badge"),
    [(0.2, 0.9, "pass"), (0.6, 0.9, "doubtful"), (0.8, 0.9, "fail"), (0.2, 0.4, "doubtful"), (0.2, 0.1, "fail")],
)
def test_limits_of_the_badge(scrambled, steady, badge):
    assert faith.verdict(np.array([[0.0, 1.0]]), scrambled, steady)[0] == badge


def test_checks_come_with_the_result_and_back_from_disk(photo, tmp_path):
    network = open_model(models.plain(), preprocess="0..1")
    found = convscope.heatmap(network, photo, 1, method=["grad-cam", "saliency"], check=True)
    for row in found.rows:
        assert row.check.badge in ("pass", "doubtful", "fail")
        assert 0 <= row.check.deletion <= 1
        assert 0 <= row.check.randomisation <= 1
    convscope.save(found, tmp_path)
    assert convscope.load(tmp_path).rows == found.rows
    again = convscope.heatmap(network, photo, 1, method=["grad-cam", "saliency"], check=True)
    assert again.rows == found.rows


def test_scrambled_weights_are_the_networks_for_a_block_only(photo):
    network = open_model(models.plain(), preprocess="0..1")
    x = network.prepare(convscope.images.decode.read_images([photo]))
    before, weights, mark = network.predict(x), network.weights(), network.weights_sha256()
    assert len(network.stages()) == 3
    assert len(network.stages(("conv_b",))) == 2
    with network.scrambled(network.stages()[-1:]):
        head = network.predict(x)
        maps = network.forward(x, ("conv_b",))[1]["conv_b"]
    with suppress(ZeroDivisionError), network.scrambled(network.stages()):
        everything = network.predict(x)
        raise ZeroDivisionError
    assert not np.allclose(head, before)
    assert not np.allclose(everything, head)
    np.testing.assert_array_equal(network.predict(x), before)
    np.testing.assert_array_equal(maps, network.forward(x, ("conv_b",))[1]["conv_b"])  # below the head nothing changed
    for one, other in zip(network.weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert network.weights_sha256() == mark


def test_a_map_that_uses_all_weights_changes_with_them(photo):
    """The same network with other weights has another map, as the check has to see."""
    network = open_model(models.plain(side=32), preprocess="0..1")
    single = single_of(network, photo, 1, network.layer("conv_b"))

    def remake(x):
        return convscope.techniques.heatmaps.METHODS["hirescam"].explain(
            trace(
                TraceSpec(network, network.layer("conv_b"), single.target),
                x,
                tuple(a[None] for a in single.arguments),
                resolved=True,
            )
        )[0]

    raw = remake(single.x)
    with network.scrambled(network.stages()[-1:], 0):
        expected = abs(rank_correlation(raw, remake(single.x)))
    assert expected < 1
    assert faith.randomisation(single, raw, remake) < 1


# -- which layer -----------------------------------------------------------------------------------------


def test_best_is_the_layer_with_the_most_insertion_less_deletion(photo):
    network = open_model(models.plain(side=32), preprocess="0..1")
    found = convscope.heatmap(network, [photo, photo[::-1].copy()], 1, "best")
    rule = found.provenance["parameters"]["layer_rule"]
    assert rule.startswith("the best of ")
    told = {part.split()[0]: float(part.split()[1]) for part in rule.split(": ")[1].split(", ")}
    assert found.rows[0].layer == max(told, key=told.get)
    assert len(told) >= 2
    for path, value in told.items():
        gained = []
        for image in (photo, photo[::-1].copy()):
            raw = convscope.heatmap(network, image, 1, path).maps[0]
            single = single_of(network, image)
            places = faith.ranked(raw, (32, 32), np.random.default_rng(0))
            gained.append(faith.insertion(single, places) - faith.deletion(single, places))
        assert value == pytest.approx(np.mean(gained), abs=2e-3)
