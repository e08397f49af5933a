"""Heatmaps of the image's own pixels and places, against closed forms and slow loops."""

import models
import numpy as np
import pytest

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402
from test_heatmaps import branching, gap_network, maps_and_head  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.arrays import resize_map  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.render.heatmaps import comparison  # noqa: E402
from convscope.techniques.heatmaps.methods import METHODS  # noqa: E402
from convscope.techniques.heatmaps.perturbation import estimated_scores, spread_out  # noqa: E402
from convscope.techniques.heatmaps.ranks import rank_correlation  # noqa: E402


def linear_network(side=(12, 16)):
    """A score that is a weighted sum of the pixels."""
    model = keras.Sequential([layers.Input((*side, 3)), layers.Flatten(name="flat"), layers.Dense(2, name="out")])
    return open_model(models.seeded(model), preprocess="0..1")


def weights_of(network, number=1):
    kernel = keras.ops.convert_to_numpy(network.model.get_layer("out").kernel)
    return kernel[:, number].reshape(*network.inputs.size, 3)


def test_of_a_linear_network_pixel_methods_are_its_weights(photo):
    network = linear_network()
    names = ["saliency", "input-x-gradient", "smoothgrad", "integrated-gradients"]
    found = convscope.heatmap(network, photo, 1, method=names)
    x, w = network.prepare(found.images[:1])[0], weights_of(network)
    share, size = (x * w).sum(-1), np.abs(w).max(-1)
    for heat, expected in zip(found.maps, (size, share, size, share), strict=True):
        np.testing.assert_allclose(heat, expected, rtol=1e-3, atol=1e-6)
    assert [row.layer for row in found.rows] == [""] * 4
    with pytest.raises(UsageError, match="ReLU"):
        convscope.heatmap(network, photo, 1, method="guided-backprop")
    bias = keras.ops.convert_to_numpy(network.model.get_layer("out").bias)[1]
    assert found.maps[1].sum() == pytest.approx(found.rows[0].score - bias, rel=1e-3)


def test_input_gradients_are_differences(photo):
    smooth = keras.Sequential(  # without a kink that a difference could step over
        [
            layers.Input((16, 16, 3)),
            layers.Conv2D(8, 3, activation="tanh"),
            layers.Conv2D(6, 3, strides=2, activation="swish"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
        ]
    )
    network = open_model(models.seeded(smooth), preprocess="0..1")
    x = network.prepare(convscope.images.decode.read_images([photo]))
    heat = convscope.heatmap(network, photo, 2, method="input-x-gradient").maps[0]
    for row, column in ((3, 4), (8, 9), (11, 2)):
        expected = 0.0
        for colour in range(3):
            step = np.zeros_like(x)
            step[0, row, column, colour] = 1e-2
            slope = (network.predict(x + step)[0, 2] - network.predict(x - step)[0, 2]) / 2e-2
            expected += x[0, row, column, colour] * slope
        assert heat[row, column] == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_integrated_gradients_are_complete(photo):
    network = open_model(branching("add"), preprocess="0..1")
    found = convscope.heatmap(network, photo, 1, method="integrated-gradients", budget=256)
    x = network.prepare(found.images)
    gained = network.predict(x)[0, 1] - network.predict(np.zeros_like(x))[0, 1]
    assert found.maps[0].sum() == pytest.approx(gained, rel=0.02)
    assert f"{gained:.3g}"[:4] in found.rows[0].note


def over_range(sizes):
    return (sizes - sizes.min()) / (sizes.max() - sizes.min())


def test_full_grad_is_the_slow_loop(photo):
    """Pixels and biases of conv -> ReLU -> mean -> dense: the gradient by hand, place by place."""
    network = open_model(gap_network(), preprocess="0..1")
    found = convscope.heatmap(network, photo, 2, method="full-grad")
    x = network.prepare(found.images)
    maps, head, offset = maps_and_head(network.model, x)
    kernel, bias = map(keras.ops.convert_to_numpy, network.model.get_layer("conv").weights)
    before = (maps[0] > 0) * head[:, 2] / maps[0, ..., 0].size
    at_pixels = np.zeros_like(x[0])
    for row in range(before.shape[0]):
        for column in range(before.shape[1]):
            at_pixels[2 * row : 2 * row + 5, 2 * column : 2 * column + 5] += kernel @ before[row, column]
    shares, biases = x[0] * at_pixels, before * bias
    expected = over_range(np.abs(shares)).sum(-1) + resize_map(over_range(np.abs(biases)).sum(-1), *x.shape[1:3])
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-4)
    score = network.predict(x)[0, 2]
    assert shares.sum() + biases.sum() + offset[2] == pytest.approx(score, rel=1e-4)
    assert found.rows[0].note == f"sums up to {score:.4g} of {score:.4g}: 0.0 % off"


@pytest.mark.parametrize("make", [lambda: branching("add"), lambda: branching("concatenate"), models.plain])
@pytest.mark.parametrize("against", [None, 3])
def test_full_grad_accounts_for_the_whole_score_of_relus(photo, make, against):
    network = open_model(make(), preprocess="-1..1")
    row = convscope.heatmap(network, photo, 1, against=against, method="full-grad").rows[0]
    assert row.note == f"sums up to {row.score:.4g} of {row.score:.4g}: 0.0 % off"


def test_full_grad_of_other_nonlinearities_says_what_is_missing(photo):
    """What comes before each is seen whether it is a layer of its own or not; of a tanh the sum is not the score."""
    maps = []
    for own in (True, False):
        bend = {"activation": "tanh"} if own else {}
        model = keras.Sequential([layers.Input((16, 16, 3)), layers.Conv2D(4, 3, **bend, name="conv")])
        if not own:
            model.add(layers.Activation("tanh"))
        model.add(layers.GlobalAveragePooling2D())
        model.add(layers.Dense(3, activation="softmax"))
        found = convscope.heatmap(open_model(models.seeded(model), preprocess="0..1"), photo, 1, method="full-grad")
        assert not found.rows[0].note.endswith(" 0.0 % off")
        maps.append(found.maps[0])
    np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-4)


def test_full_grad_says_which_biases_it_has_not(photo):
    """A layer with a ReLU of its own that is called twice can't be seen before it at one call."""
    shared = layers.Conv2D(3, 3, padding="same", activation="relu")
    image = layers.Input((16, 16, 3))
    x = layers.GlobalAveragePooling2D()(shared(shared(image)))
    network = open_model(models.seeded(keras.Model(image, layers.Dense(3)(x))), preprocess="0..1")
    note = convscope.heatmap(network, photo, 1, method="full-grad").rows[0].note
    assert note.endswith("without the biases of 2 layers that are called more than once")


def test_full_grad_of_a_channel_goes_no_further(photo):
    """A norm's bias is what it answers to zeros; the layers after the channel have no part in it."""
    network = open_model(models.plain(), preprocess="0..1")
    path = next(layer.path for layer in network.layers if layer.kind == "norm")
    row = convscope.heatmap(network, photo, f"{path}:1", method="full-grad").rows[0]
    assert row.note == f"sums up to {row.score:.4g} of {row.score:.4g}: 0.0 % off"


def test_guided_backprop_is_backpropagation_that_lets_only_what_is_positive_through(photo):
    model = keras.Sequential(
        [
            layers.Input((6, 7, 3)),
            layers.Conv2D(8, 1, activation="relu", name="first"),
            layers.Conv2D(6, 1, name="second"),
            layers.ReLU(name="gate"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, activation="softmax", name="out"),
        ]
    )
    network = open_model(models.seeded(model), preprocess="-1..1")
    found = convscope.heatmap(network, photo, 3, method="guided-backprop")
    heat = found.maps[0]
    assert "edges" in found.rows[0].note
    x = network.prepare(convscope.images.decode.read_images([photo]))[0]
    values = {name: keras.ops.convert_to_numpy(model.get_layer(name).kernel) for name in ("first", "second", "out")}
    biases = {name: keras.ops.convert_to_numpy(model.get_layer(name).bias) for name in ("first", "second")}
    expected = np.zeros((6, 7))
    for row, column in np.ndindex(6, 7):
        first = np.maximum(x[row, column] @ values["first"][0, 0] + biases["first"], 0)
        second = np.maximum(first @ values["second"][0, 0] + biases["second"], 0)
        back = np.maximum(values["out"][:, 3] / 42, 0) * (second > 0)
        back = np.maximum(values["second"][0, 0] @ back, 0) * (first > 0)
        expected[row, column] = np.abs(values["first"][0, 0] @ back).max()
    np.testing.assert_allclose(heat, expected, rtol=1e-3, atol=1e-7)
    assert expected.any()


def test_after_guided_backprop_gradients_are_whole_again(photo):
    network = open_model(models.plain(), preprocess="0..1")
    before = convscope.heatmap(network, photo, 1, method="saliency").maps
    convscope.heatmap(network, photo, 1, method="guided-backprop")
    np.testing.assert_array_equal(convscope.heatmap(network, photo, 1, method="saliency").maps, before)


def test_smoothgrad_is_the_mean_over_its_draws_and_the_same_again(photo):
    network = open_model(models.plain(), preprocess="0..1")
    once, again = (convscope.heatmap(network, photo, 1, method="smoothgrad", budget=20, seed=3) for _ in range(2))
    np.testing.assert_array_equal(once.maps, again.maps)
    other = convscope.heatmap(network, photo, 1, method="smoothgrad", budget=20, seed=4)
    assert not np.array_equal(once.maps, other.maps)


@pytest.mark.slow(reason="the loop of the definition, a pass for each place")
def test_occlusion_is_the_slow_loop(photo):
    network = open_model(gap_network(), preprocess="0..1")
    found = convscope.heatmap(network, photo, 2, method="occlusion")
    x = network.prepare(found.images)
    height, width = x.shape[1:3]
    patch = round(height / 8), round(width / 8)
    total, times = np.zeros((height, width)), np.zeros((height, width))
    for row in range(0, height - patch[0] + 1, patch[0] // 2):
        for column in range(0, width - patch[1] + 1, patch[1] // 2):
            covered = x.copy()
            covered[0, row : row + patch[0], column : column + patch[1]] = x[0].mean(axis=(0, 1))
            loss = network.predict(x)[0, 2] - network.predict(covered)[0, 2]
            total[row : row + patch[0], column : column + patch[1]] += loss
            times[row : row + patch[0], column : column + patch[1]] += 1
    assert times.min() > 0
    np.testing.assert_allclose(found.maps[0], total / times, rtol=1e-3, atol=1e-5)


def test_rise_finds_the_part_that_counts(photo):
    """The score is the mean of the upper left quarter, seen through masks: only there does it matter what is seen."""
    network = linear_network((32, 32))
    kernel = np.zeros((32, 32, 3, 2), np.float32)
    kernel[:16, :16, :, 1] = 1
    network.model.get_layer("out").set_weights([kernel.reshape(-1, 2), np.zeros(2)])
    white = np.full((32, 32, 3), 255, np.uint8)
    found = convscope.heatmap(network, white, 1, method="rise", budget=400)
    heat = found.maps[0]
    inside = heat[2:14, 2:14].mean()
    assert inside > 5 * abs(heat[20:, 20:].mean())
    assert "400 masks" in found.rows[0].note
    kernel[:] = 0
    network.model.get_layer("out").set_weights([kernel.reshape(-1, 2), np.ones(2)])
    assert not convscope.heatmap(network, white, 1, method="rise", budget=20).maps.any()


def test_pixel_methods_need_no_layer_and_mix_with_those_that_do(photo):
    network = open_model(gap_network(), preprocess="0..1")
    found = convscope.heatmap(network, [photo, photo[::-1].copy()], 2, method=["occlusion", "grad-cam"])
    assert [row.method for row in found.rows] == ["occlusion", "grad-cam"] * 2  # in the order that was asked for
    assert [one.shape for one in found.maps[:2]] == [(20, 24), (8, 10)]
    assert comparison(found).dtype == np.uint8
    assert linear_network().layers[0].path  # it has no layer with a map at all
    assert convscope.heatmap(linear_network(), photo, 1, method="saliency").rows[0].status == "ok"


def test_results_of_several_sizes_come_back_from_disk(photo, tmp_path):
    network = open_model(gap_network(), preprocess="0..1")
    found = convscope.heatmap(network, photo, 2, method=["saliency", "grad-cam"])
    convscope.save(found, tmp_path)
    again = convscope.load(tmp_path)
    for one, other in zip(found.maps, again.maps, strict=True):
        np.testing.assert_array_equal(one, other)


# -- score-cam with a budget -----------------------------------------------------------------------------


def test_with_a_budget_score_cam_passes_no_more_and_says_how_sure_it_is(photo):
    image = layers.Input((20, 24, 3))
    x = layers.Conv2D(48, 5, strides=2, activation="relu", name="conv")(image)
    model = models.seeded(keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))
    network = open_model(model, preprocess="0..1")
    whole = convscope.heatmap(network, photo, 1, method="score-cam")
    some = convscope.heatmap(network, photo, 1, method="score-cam", budget=12)
    plenty = convscope.heatmap(network, photo, 1, method="score-cam", budget=500)
    np.testing.assert_array_equal(plenty.maps, whole.maps)
    assert "12 of" in some.rows[0].note
    assert rank_correlation(some.maps[0], whole.maps[0]) > 0.9
    with pytest.raises(UsageError, match="budget"):
        convscope.heatmap(network, photo, 1, method="score-cam", budget=1)


def test_guesses_leave_one_out_in_closed_form():
    """The guess for a channel that was passed is the one of a regression that was not told it."""
    random = np.random.default_rng(0)
    masks = random.random((14, 20))
    scores = masks[:, :4].sum(axis=1) + random.normal(0, 0.01, 14)
    passed = np.array(sorted(spread_out(masks, 9)))
    guessed, left_out = estimated_scores(masks, passed, scores[passed])
    np.testing.assert_array_equal(guessed[passed], scores[passed])
    squares = ((masks[:, None] - masks[None]) ** 2).sum(-1)
    kernel = np.exp(-squares / (2 * np.median(squares[np.ix_(passed, passed)])))
    centre, tried = scores[passed].mean(), []
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        found = []
        for one in passed:
            rest = passed[passed != one]
            told = kernel[np.ix_(rest, rest)] + ridge * np.eye(len(rest))
            found.append(centre + kernel[one, rest] @ np.linalg.solve(told, scores[rest] - centre))
        tried.append(np.array(found))
    best = min(tried, key=lambda found: ((found - scores[passed]) ** 2).mean())
    np.testing.assert_allclose(left_out, best, rtol=1e-6)


def test_rank_correlation_is_pearsons_of_the_ranks():
    assert rank_correlation([3, 1, 2], [30, 10, 20]) == pytest.approx(1)
    assert rank_correlation([3, 1, 2], [1, 3, 2]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    # Ranks 1.5, 1.5, 3, 4 and 1, 2, 3, 4.
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3, 4])[0, 1]
    assert rank_correlation([5, 5, 6, 7], [0, 1, 2, 9]) == pytest.approx(expected)


# -- one derivative more ---------------------------------------------------------------------------------


def test_finer_cam_takes_away_what_similar_classes_see_too(photo):
    """Grad-CAM is linear in the score, so the contrasted map is a sum of maps."""
    network = open_model(gap_network(), preprocess="0..1")
    found = convscope.heatmap(network, photo, 2, method="finer-cam")
    logits = network.predict(network.prepare(found.images))[0].astype(np.float64)
    similar = sorted((number for number in range(5) if number != 2), key=lambda n: abs(logits[n] - logits[2]))[:3]
    chances = np.exp(logits[similar]) / np.exp(logits[similar]).sum()
    maps = [convscope.heatmap(network, photo, number).maps[0] for number in range(5)]
    expected = maps[2] - 0.6 * sum(share * maps[number] for share, number in zip(chances, similar, strict=True))
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(UsageError, match="finer-cam"):
        convscope.heatmap(network, photo, "conv:1", "conv", method="finer-cam")


def test_shapley_cam_subtracts_half_of_the_hessian_vector_product(photo):
    """Of squares of the maps the Hessian's product is the gradient itself, so half of Grad-CAM is left."""
    image = layers.Input((20, 24, 3))
    x = layers.Conv2D(6, 5, strides=2, activation="relu", name="conv")(image)
    x = keras.ops.square(x)
    model = models.seeded(keras.Model(image, layers.Dense(3, name="out")(layers.GlobalAveragePooling2D()(x))))
    network = open_model(model, preprocess="0..1")
    found = convscope.heatmap(network, photo, 1, "conv", method=["grad-cam", "shapley-cam"])
    np.testing.assert_allclose(found.maps[1], found.maps[0] / 2, rtol=1e-3, atol=1e-6)
    assert np.abs(found.maps[0]).max() > 0


def test_with_a_hessian_of_zero_shapley_cam_is_grad_cam(photo):
    network = open_model(gap_network(), preprocess="0..1")
    found = convscope.heatmap(network, photo, 1, method=["grad-cam", "shapley-cam"])
    np.testing.assert_allclose(found.maps[1], found.maps[0], rtol=1e-4, atol=1e-7)


# -- several layers, smoothing ---------------------------------------------------------------------------


def test_several_layers_are_fused_as_shares_of_their_highest_values(photo):
    network = open_model(models.plain(), preprocess="0..1")
    for number in range(5):
        parts = [convscope.heatmap(network, photo, number, path).maps[0] for path in ("relu_a", "conv_b")]
        if min(part.max() for part in parts) > 0:
            break
    found = convscope.heatmap(network, photo, number, ["relu_a", "conv_b"])
    positive = [np.maximum(part, 0) for part in parts]
    expected = sum(resize_map(part, *parts[0].shape) / part.max() for part in positive) / 2
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-6)
    assert found.rows[0].layer == "relu_a, conv_b"


def test_smoothing_treats_a_image_and_its_mirror_image_alike(photo):
    network = open_model(gap_network(), preprocess="0..1")
    square = photo[:20, :24] if photo.shape[0] >= 20 else photo
    one = convscope.heatmap(network, square, 1, smooth=True).maps[0]
    other = convscope.heatmap(network, square[:, ::-1].copy(), 1, smooth=True).maps[0]
    np.testing.assert_allclose(one, other[:, ::-1], rtol=1e-3, atol=1e-5)
    assert one.shape == (20, 24)
    plain = convscope.heatmap(network, square, 1).maps[0]
    assert rank_correlation(one, resize_map(plain, 20, 24)) > 0.5


def test_every_method_has_a_paper_and_its_one_pass_or_more():
    assert {name for name, one in METHODS.items() if one.at_image} == {
        *("saliency", "input-x-gradient", "smoothgrad", "integrated-gradients", "guided-backprop"),
        *("occlusion", "rise", "full-grad"),
    }
