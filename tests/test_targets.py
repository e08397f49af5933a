"""What a heatmap can explain besides one class: closed forms on small networks."""

import models
import numpy as np
import pytest

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402
from test_heatmaps import NAMES, branching, gap_network, maps_and_head  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.objectives import channel, logit  # noqa: E402
from convscope.techniques.heatmaps import Custom, channel_target, similarity_target  # noqa: E402


@pytest.fixture
def network():
    return open_model(gap_network(), preprocess="0..1", classes=NAMES)


def segmenting(head="softmax"):
    """conv, then a class for each place."""
    image = layers.Input((20, 24, 3))
    x = layers.Conv2D(6, 5, strides=2, activation="relu", name="conv")(image)
    x = layers.Conv2D(4, 1, name="scores")(x)
    return models.seeded(keras.Model(image, layers.Softmax(name="shares")(x) if head else x))


def maps_of(network, photo, path):
    x = network.prepare(convscope.images.decode.read_images([photo]))
    return network.forward(x, (path,))[1][path][0]


def test_top3_is_a_map_for_each_of_the_three_best(network, photo, tmp_path):
    photos = [photo, photo[::-1].copy()]
    found = convscope.heatmap(network, photos, "top3")
    logits = network.predict(network.prepare(found.images[::3]))
    expected = [int(number) for row in logits for number in np.argsort(-row)[:3]]
    assert [row.class_index for row in found.rows] == expected
    assert [row.image for row in found.rows] == [found.images[0].name] * 3 + [found.images[3].name] * 3
    for index, number in enumerate(expected):
        alone = convscope.heatmap(network, photos[index // 3], number)
        np.testing.assert_allclose(found.maps[index], alone.maps[0], rtol=1e-4, atol=1e-6)
    convscope.save(found, tmp_path)
    assert len(list(tmp_path.glob("*.classes.png"))) == 2
    assert len(list(tmp_path.glob("*.npy"))) == 6


def test_a_channel_explained_at_its_own_layer_is_its_map(network, photo):
    maps = maps_of(network, photo, "conv")
    found = convscope.heatmap(network, photo, "conv:3", layer="conv", method=["grad-cam", "hirescam"])
    for heat in found.maps:
        np.testing.assert_allclose(heat, maps[..., 3] / maps[..., 3].size, rtol=1e-4, atol=1e-7)
    row = found.rows[0]
    assert (row.class_index, row.class_name, row.probability) == (None, "conv:3", None)
    assert row.score == pytest.approx(maps[..., 3].mean(), rel=1e-4)
    assert found.provenance["parameters"]["explained"] == "conv:3"


def test_a_unit_is_one_place_of_a_channel(network, photo):
    maps = maps_of(network, photo, "conv")
    found = convscope.heatmap(network, photo, "conv:2@4,5", layer="conv", method="hirescam")
    expected = np.zeros(maps.shape[:2])
    expected[4, 5] = maps[4, 5, 2]
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-7)
    assert found.rows[0].score == pytest.approx(maps[4, 5, 2], rel=1e-4, abs=1e-6)


def test_auto_takes_a_layer_before_the_one_that_is_explained(photo):
    found = convscope.heatmap(open_model(models.plain(), preprocess="0..1"), photo, "conv_b:1")
    assert found.rows[0].layer == "pool_a"
    assert np.abs(found.maps).max() > 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("conv:6", "out of range"), ("conv:2@40,1", "outside"), ("cnv:2", "conv"), ("top0", "top1")],
)
def test_what_is_no_target_is_said(network, photo, wrong, said):
    with pytest.raises(UsageError, match=said):
        convscope.heatmap(network, photo, wrong)


def test_a_channel_has_no_rival(network, photo):
    with pytest.raises(UsageError, match="for classes only"):
        convscope.heatmap(network, photo, "conv:1", against="rival")


@pytest.mark.parametrize("head", ["softmax", None])
def test_a_class_of_a_segmentation_is_explained_where_it_is_the_highest(photo, head):
    """g is the class's weights over the places of its own, so Grad-CAM is the class's evidence over the whole map."""
    network = open_model(segmenting(head), preprocess="0..1")
    maps, scores = maps_of(network, photo, "conv"), maps_of(network, photo, "scores")
    kernel = keras.ops.convert_to_numpy(network.model.get_layer("scores").kernel)[0, 0]
    number = int(np.bincount(scores.argmax(-1).ravel()).argmax())
    own = scores.argmax(-1) == number
    found = convscope.heatmap(network, photo, number, "conv")
    np.testing.assert_allclose(found.maps[0], maps @ kernel[:, number] / own.size, rtol=1e-3, atol=1e-6)
    assert found.rows[0].score == pytest.approx(scores[own][:, number].mean(), rel=1e-4)
    some = np.zeros(own.shape)
    some[:3, 2:6] = 1
    target = channel_target(network, "scores", number, mask=some)
    placed = convscope.heatmap(network, photo, target, "conv", method="hirescam")
    np.testing.assert_allclose(placed.maps[0], (maps @ kernel[:, number]) * some / 12, rtol=1e-3, atol=1e-6)


def test_a_mask_has_to_fit(photo):
    network = open_model(segmenting(), preprocess="0..1")
    with pytest.raises(UsageError, match="mask"):
        channel_target(network, "scores", 1, mask=np.ones((2, 2)))
    with pytest.raises(UsageError, match="mask"):
        channel_target(network, "scores", 1, mask=np.zeros(network.layer("scores").shape[:2]))


def test_likeness_is_the_cosine_of_two_answers(network, photo):
    other = photo[::-1, ::-1].copy()
    one, two = (maps_of(network, image, "gap") for image in (photo, other))
    target = similarity_target(network, other)
    assert target.layer == "gap"
    found = convscope.heatmap(network, photo, target, "conv")
    assert found.rows[0].score == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), rel=1e-4)
    # d cos / d A_k is the same at each place: (t_k - cos u_k) / |u| / (h w), with unit vectors u and t.
    u, t = one / np.linalg.norm(one), two / np.linalg.norm(two)
    maps = maps_of(network, photo, "conv")
    weights = (t - (u @ t) * u) / np.linalg.norm(one) / maps[..., 0].size
    np.testing.assert_allclose(found.maps[0], maps @ weights, rtol=1e-2, atol=1e-6)
    assert convscope.heatmap(network, other, target, "conv").rows[0].score == pytest.approx(1, abs=1e-5)


def test_any_function_of_the_answers_can_be_explained(network, photo):
    target = Custom(lambda ops, logits, activations: 3 * logits[:, 1] - logits[:, 4], text="three ants less emus")
    found = convscope.heatmap(network, photo, target)
    maps, kernel, _ = maps_and_head(network.model, network.prepare(found.images))
    weights = (3 * kernel[:, 1] - kernel[:, 4]) / maps[0, ..., 0].size
    np.testing.assert_allclose(found.maps[0], maps[0] @ weights, rtol=1e-3, atol=1e-6)
    assert found.rows[0].class_name == "three ants less emus"
    inside = Custom(lambda ops, logits, activations: ops.sum(activations["conv"][:, 1, 2, :], axis=-1), ("conv",))
    placed = convscope.heatmap(network, photo, inside, "conv", method="hirescam")
    expected = np.zeros(maps.shape[1:3])
    expected[1, 2] = maps[0, 1, 2].sum()
    np.testing.assert_allclose(placed.maps[0], expected, rtol=1e-4, atol=1e-6)


def test_replays_explain_the_same_target(network, photo):
    """Ablating a channel of a GAP head costs its own share of any linear score."""
    target = Custom(lambda ops, logits, activations: 2 * logits[:, 1], text="twice")
    found = convscope.heatmap(network, photo, target, method="ablation-cam")
    maps, kernel, _ = maps_and_head(network.model, network.prepare(found.images))
    drops = 2 * kernel[:, 1] * maps[0].mean(axis=(0, 1)) / abs(found.rows[0].score)
    np.testing.assert_allclose(found.maps[0], maps[0] @ drops, rtol=1e-2, atol=1e-5)


def test_arithmetic_of_classes_and_channels_is_explained(network, photo):
    """Of a GAP head each class is its weights over the mean of the maps, so a sum of classes is the sum of these."""
    found = convscope.heatmap(network, photo, f"{NAMES[1]} - 0.5*class:{NAMES[3]}", "conv", method="hirescam")
    maps, kernel, _ = maps_and_head(network.model, network.prepare(found.images))
    size, row = maps[0, ..., 0].size, found.rows[0]
    np.testing.assert_allclose(
        found.maps[0], maps[0] @ (kernel[:, 1] - 0.5 * kernel[:, 3]) / size, rtol=1e-3, atol=1e-6
    )
    logits = network.predict(network.prepare(found.images))[0]
    assert row.score == pytest.approx(logits[1] - 0.5 * logits[3], rel=1e-4)
    assert (row.class_index, row.class_name, row.probability) == (
        None,
        f"class:{NAMES[1]} - 0.5*class:{NAMES[3]}",
        None,
    )
    mixed = convscope.heatmap(
        network, photo, 2 * channel("conv", 2) - channel("conv", 4) + logit(0), "conv", method="hirescam"
    )
    weights = np.zeros(maps.shape[-1])
    weights[2], weights[4] = 2, -1
    np.testing.assert_allclose(mixed.maps[0], maps[0] @ (weights + kernel[:, 0]) / size, rtol=1e-3, atol=1e-6)
    difference = convscope.heatmap(network, photo, "conv:3 - conv:4", "conv", method="hirescam")
    np.testing.assert_allclose(difference.maps[0], (maps[0, ..., 3] - maps[0, ..., 4]) / size, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (f"class:{NAMES[2]}", {"target": 2}),
        ("class:2 - class:4", {"target": 2, "against": 4}),
        ("1*conv:3", {"target": "conv:3"}),
    ],
)
def test_text_of_an_objective_that_is_one_class_or_channel_is_that(network, photo, text, plain):
    found, expected = (
        convscope.heatmap(network, photo, text, "conv"),
        convscope.heatmap(network, photo, layer="conv", **plain),
    )
    np.testing.assert_array_equal(found.maps, expected.maps)
    assert found.rows == expected.rows


def test_one_program_serves_all_weights_and_channels_of_a_sum(network, photo):
    convscope.heatmap(network, photo, "conv:3 - conv:4", "conv", method="hirescam")
    before = set(network._programs)
    convscope.heatmap(network, photo, "2*conv:1 + conv:5@1,2", "conv", method="hirescam")
    assert set(network._programs) == before


def test_a_regularizer_is_not_explained(network, photo):
    with pytest.raises(UsageError, match="regularizers"):
        convscope.heatmap(network, photo, "conv:3 - tv(input)")


def test_a_class_can_not_be_set_against_itself_where_it_turns_out_to_be_the_best(network, photo):
    best = convscope.heatmap(network, photo).rows[0].class_name
    with pytest.raises(UsageError, match=f"{best}.*can't be set against itself"):
        convscope.heatmap(network, photo, "top", against=best)


def test_against_another_class_rise_weighs_with_the_difference(network, photo):
    alone = convscope.heatmap(network, photo, 1, method="rise", budget=40)
    found = convscope.heatmap(network, photo, 1, against=3, method="rise", budget=40)
    assert not np.allclose(found.maps, alone.maps)


def test_one_class_of_a_map_is_where_it_is_above_the_middle(photo):
    image = layers.Input((20, 24, 3))
    x = layers.Conv2D(6, 5, activation="relu", name="conv")(image)
    model = models.seeded(keras.Model(image, layers.Conv2D(1, 1, name="scores")(x)))
    scores = maps_of(open_model(model, preprocess="0..1"), photo, "scores")[..., 0]
    kernel, bias = model.get_layer("scores").get_weights()
    model.get_layer("scores").set_weights([kernel, bias - np.median(scores)])
    found = convscope.heatmap(open_model(model, preprocess="0..1"), photo, 0, "conv")
    shifted = scores - np.median(scores)
    assert found.rows[0].score == pytest.approx(shifted[shifted > 0].mean(), rel=1e-3)
    model.get_layer("scores").set_weights([kernel, bias - 100])
    nowhere = convscope.heatmap(open_model(model, preprocess="0..1"), photo, 0, "conv").rows[0]
    assert (nowhere.status, "no place" in nowhere.reason) == ("blank", True)


def test_targets_that_mean_nothing_are_said(network, photo):
    with pytest.raises(UsageError, match="a target is"):
        convscope.heatmap(network, photo, None)
    with pytest.raises(UsageError, match="a number for each image"):
        convscope.heatmap(network, photo, Custom(lambda ops, logits, activations: logits))
    with pytest.raises(UsageError, match="no layer 'typo'"):
        convscope.heatmap(network, photo, Custom(lambda ops, logits, activations: logits[:, 0], ("typo",)))
    with pytest.raises(UsageError, match="not computed from any layer with a map"):
        convscope.heatmap(network, photo, "conv:1")


def test_a_layer_after_what_is_explained_is_refused(photo):
    network = open_model(branching("add"), preprocess="0..1")
    with pytest.raises(UsageError, match=r"'late' comes after .*early"):
        convscope.heatmap(network, photo, "early:1", "late")
    assert convscope.heatmap(network, photo, "late:1", "early").rows[0].layer == "early"


def test_a_likeness_is_shown_where_it_is_measured(photo):
    network = open_model(branching("concatenate"), preprocess="0..1")
    found = convscope.heatmap(network, photo, similarity_target(network, photo[::-1].copy(), "late"))
    assert found.rows[0].layer == "late"
