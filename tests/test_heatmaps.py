"""Grad-CAM against closed forms and a slow loop, and every way in which a map can be blank."""

import re

import numpy as np
import pytest

keras = pytest.importorskip("keras")
import models  # noqa: E402
from keras import layers  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.arrays import resize_map  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.images.decode import read_images  # noqa: E402
from convscope.networks import Pass  # noqa: E402
from convscope.render.heatmaps import comparison, panel  # noqa: E402
from convscope.techniques.heatmaps.cam import grad_cam  # noqa: E402
from convscope.techniques.heatmaps.evidence import WHOLE  # noqa: E402
from convscope.techniques.heatmaps.methods import METHODS  # noqa: E402

NAMES = ["ant", "bee", "cat", "dog", "emu"]


def gap_network(classes=5, head="softmax", name="gap"):
    """conv -> ReLU -> global average pooling -> dense, for which Grad-CAM is CAM up to 1/(hw)."""
    model = keras.Sequential(
        [
            layers.Input((20, 24, 3)),
            layers.Conv2D(6, 5, strides=2, activation="relu", name="conv"),
            layers.GlobalAveragePooling2D(name="gap"),
            layers.Dense(classes, activation=head, name="out"),
        ],
        name=name,
    )
    return models.seeded(model)


def maps_and_head(model, x):
    conv = keras.Model(model.inputs, model.get_layer("conv").output)
    kernel, bias = (
        keras.ops.convert_to_numpy(weight) for weight in (model.get_layer("out").kernel, model.get_layer("out").bias)
    )
    return keras.ops.convert_to_numpy(conv(x)), kernel, bias


def test_grad_cam_is_the_slow_loop():
    rng = np.random.default_rng(0)
    maps, gradients = rng.normal(size=(2, 2, 3, 4, 5))
    expected = np.zeros((2, 3, 4))
    for n in range(2):
        for k in range(5):
            weight = sum(gradients[n, i, j, k] for i in range(3) for j in range(4)) / 12
            for i in range(3):
                for j in range(4):
                    expected[n, i, j] += weight * maps[n, i, j, k]
    np.testing.assert_allclose(grad_cam(maps, gradients), expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("hirescam", lambda g: g), ("layercam", lambda g: max(g, 0.0))])
def test_products_place_by_place_are_the_slow_loop(name, part):
    rng = np.random.default_rng(1)
    maps, gradients = rng.normal(size=(2, 2, 3, 4, 5))
    expected = np.zeros((2, 3, 4))
    for n, i, j in np.ndindex(2, 3, 4):
        expected[n, i, j] = sum(part(gradients[n, i, j, k]) * maps[n, i, j, k] for k in range(5))
    np.testing.assert_allclose(METHODS[name].function(maps, gradients), expected, rtol=1e-5)


def test_on_a_gap_head_hirescam_is_grad_cam(photo):
    """Where the gradient is the same at every place, the two can't differ (Draelos and Carin, section 3)."""
    network = open_model(gap_network(), preprocess="0..1")
    maps = [convscope.heatmap(network, photo, 1, method=name).maps for name in ("grad-cam", "hirescam")]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4, atol=1e-6)


def random_maps(shape=(2, 3, 4, 5), seed=5, positive=False):
    maps, gradients = np.random.default_rng(seed).normal(size=(2, *shape))
    return (np.abs(maps) if positive else maps), gradients


def test_xgrad_cam_is_the_slow_loop():
    maps, gradients = random_maps()
    maps[0, ..., 2] = 0  # a silent channel has no weight
    expected = np.zeros((2, 3, 4))
    for n, k in np.ndindex(2, 5):
        strength = maps[n, :, :, k].sum()
        weight = 0 if strength == 0 else (maps[n, :, :, k] * gradients[n, :, :, k]).sum() / strength
        for i, j in np.ndindex(3, 4):
            expected[n, i, j] += weight * maps[n, i, j, k]
    np.testing.assert_allclose(METHODS["xgrad-cam"].function(maps, gradients), expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_grad_cam_plus_plus_weights_are_the_papers(scale):
    """Equation 19 as it stands, place by place; small gradients must not drown in anything added to it."""
    maps, gradients = random_maps(positive=True)
    gradients *= scale
    gradients[0, 0, 0, 0] = 0  # 0 / 0 in the paper's form
    expected = np.zeros((2, 3, 4))
    for n, k in np.ndindex(2, 5):
        weight, total = 0.0, sum(maps[n, a, b, k] for a, b in np.ndindex(3, 4))
        for i, j in np.ndindex(3, 4):
            g = gradients[n, i, j, k]
            if g != 0:
                weight += g**2 / (2 * g**2 + g**3 * total) * max(g, 0.0)
        expected[n] += weight * maps[n, :, :, k]
    np.testing.assert_allclose(METHODS["grad-cam++"].function(maps, gradients), expected, rtol=1e-5)


def test_grad_cam_plus_plus_has_no_value_where_its_denominator_is_zero():
    maps = np.full((1, 1, 2, 1), -1.0)  # sum A = -2, g = 1: 2 + g sum A = 0
    assert METHODS["grad-cam++"].function(maps, np.ones_like(maps)).tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 2, 2, 9)])
def test_eigen_cam_is_the_projection_on_the_first_singular_vector(shape):
    maps, gradients = random_maps(shape)
    positive = np.abs(maps)
    for name, tables in (
        ("eigen-cam", positive),
        ("eigen-cam-centred", maps - maps.mean(axis=(1, 2), keepdims=True)),
        ("eigen-grad-cam", maps * gradients),
    ):
        found = METHODS[name].function(positive if name == "eigen-cam" else maps, gradients)
        for heat, table in zip(found, tables, strict=True):
            flat = table.reshape(-1, shape[-1])
            _, _, right = np.linalg.svd(flat, full_matrices=False)
            projection = (flat @ right[0]).reshape(shape[1:3])
            np.testing.assert_allclose(np.abs(heat), np.abs(projection), rtol=1e-4, atol=1e-5)
            assert abs(np.vdot(heat, projection)) == pytest.approx(np.vdot(projection, projection), rel=1e-4)
    assert (METHODS["eigen-cam"].function(positive, gradients) >= 0).all()


def test_signs_of_eigen_maps_do_not_depend_on_the_decomposition():
    maps, gradients = random_maps()
    for name in ("eigen-cam", "eigen-cam-centred", "eigen-grad-cam", "kpca-cam"):
        one = METHODS[name].function(maps, gradients)
        again = METHODS[name].function(maps[..., ::-1], gradients[..., ::-1])  # the order of channels means nothing
        np.testing.assert_allclose(one, again, rtol=1e-4, atol=1e-5)
    centred = METHODS["eigen-cam-centred"].function(maps, gradients)
    for heat, whole in zip(centred, maps.mean(-1), strict=True):
        assert np.corrcoef(heat.ravel(), whole.ravel())[0, 1] >= 0


def test_kpca_cam_is_the_first_kernel_component():
    maps, gradients = random_maps((2, 4, 3, 6))
    for heat, one in zip(METHODS["kpca-cam"].function(maps, gradients), maps, strict=True):
        rows = one.reshape(12, 6) - one.reshape(12, 6).mean(axis=0)
        kernel = np.array([[np.tanh(x @ y / 6 + 1) for y in rows] for x in rows])
        centre = np.eye(12) - np.ones((12, 12)) / 12
        sizes, vectors = np.linalg.eig(centre @ kernel @ centre)
        first = np.argmax(sizes.real)
        expected = vectors[:, first].real * np.sqrt(sizes[first].real)
        np.testing.assert_allclose(np.abs(heat.ravel()), np.abs(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="4096"):
        METHODS["kpca-cam"].function(np.zeros((1, 65, 64, 2)), np.zeros((1, 65, 64, 2)))


def test_cam_is_the_dense_layers_weights_and_only_where_there_is_one(photo):
    model = gap_network()
    network = open_model(model, preprocess="0..1")
    maps, kernel, _ = maps_and_head(model, network.prepare(read_images([photo])))
    found = convscope.heatmap(network, photo, 2, method="cam").maps[0]
    np.testing.assert_allclose(found, maps[0] @ kernel[:, 2], rtol=1e-3, atol=1e-5)
    flat = keras.Sequential(
        [layers.Input((20, 24, 3)), layers.Conv2D(4, 5, name="conv"), layers.Flatten(), layers.Dense(3)]
    )
    with pytest.raises(UsageError, match="global average pooling"):
        convscope.heatmap(open_model(models.seeded(flat), preprocess="0..1"), photo, 1, "conv", method="cam")


def test_on_a_gap_head_xgrad_cam_is_grad_cam(photo):
    network = open_model(gap_network(), preprocess="0..1")
    maps = [convscope.heatmap(network, photo, 1, method=name).maps for name in ("grad-cam", "xgrad-cam")]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_paper(name):
    """Authors, a year and a title; and a number of arXiv is of that year or of at most two years before it."""
    assert METHODS[name].name == name
    if name == "eigen-grad-cam":  # no paper defines it
        assert "as pytorch-grad-cam defines it" in METHODS[name].paper
        return
    cited = re.match(r"[A-Z]\w+(?: et al\.| and [A-Z]\w+)? (20\d\d), [A-Z]\w+", METHODS[name].paper)
    assert cited, METHODS[name].paper
    for number in re.findall(r"arXiv:(\S+)", METHODS[name].paper):
        digits = re.match(r"(\d\d)(0[1-9]|1[0-2])\.\d{4,5}(?=,|:|$)", number)
        assert digits, number
        assert 0 <= int(cited[1]) - 2000 - int(digits[1]) <= 2


@pytest.mark.parametrize("head", ["softmax", "sigmoid", None])
def test_on_a_gap_head_grad_cam_is_cam(photo, head):
    model = gap_network(head=head)
    network = open_model(model, preprocess="0..1")
    result = convscope.heatmap(network, [photo, photo[::-1].copy()], [2, 4])
    maps, kernel, bias = maps_and_head(model, network.prepare(result.images))
    cells = maps.shape[1] * maps.shape[2]
    for index, chosen in enumerate((2, 4)):
        cam = maps[index] @ kernel[:, chosen]
        np.testing.assert_allclose(result.maps[index], cam / cells, rtol=1e-3, atol=1e-6)
        # sum(g * A) is the logit without its bias
        assert result.maps[index].sum() == pytest.approx(result.rows[index].score - bias[chosen], rel=1e-3, abs=1e-5)
    assert result.rows[0].layer == "conv"
    assert result.provenance["parameters"]["explained"] == network.head.text


def test_against_another_class_it_is_the_difference_of_the_maps(photo):
    """Grad-CAM is linear in the score, so the map of a difference of logits is the difference of their maps."""
    network = open_model(gap_network(), preprocess="0..1", classes=NAMES)
    photos = [photo, photo[::-1].copy()]
    one, other = (convscope.heatmap(network, photos, name) for name in ("bee", "dog"))
    found = convscope.heatmap(network, photos, "bee", against="dog")
    np.testing.assert_allclose(found.maps, one.maps - other.maps, rtol=1e-3, atol=1e-6)
    assert found.rows[0].score == pytest.approx(one.rows[0].score - other.rows[0].score, rel=1e-4)
    assert (found.rows[0].explained, found.rows[0].class_name) == ("bee against dog", "bee")
    mixed = convscope.heatmap(network, photos, "top", against="rival")
    for index in range(2):
        best, second = np.argsort(-network.predict(network.prepare(mixed.images))[index])[:2]
        assert (mixed.rows[index].class_index, mixed.rows[index].against) == (best, NAMES[second])
    with pytest.raises(UsageError, match="against itself"):
        convscope.heatmap(network, photo, "bee", against="bee")
    with pytest.raises(UsageError, match="no other"):
        convscope.heatmap(open_model(gap_network(classes=1, head=None)), photo, against="rival")


def test_the_logit_is_explained_even_where_softmax_saturates(photo):
    model = gap_network()
    out = model.get_layer("out")
    kernel, bias = out.get_weights()
    out.set_weights([1000 * kernel, bias])
    network = open_model(model, preprocess="0..1")
    result = convscope.heatmap(network, photo)
    assert result.rows[0].probability == pytest.approx(1)
    assert result.rows[0].status == "ok"
    assert np.abs(result.maps).max() > 0


def test_one_sigmoid_unit_explains_both_classes(photo):
    network = open_model(gap_network(classes=1, head="sigmoid"), preprocess="0..1", classes=["cat", "dog"])
    cat = convscope.heatmap(network, photo, "cat")
    dog = convscope.heatmap(network, photo, "dog")
    np.testing.assert_allclose(cat.maps, -dog.maps, atol=1e-7)
    assert cat.rows[0].score == pytest.approx(-dog.rows[0].score)
    assert cat.rows[0].probability + dog.rows[0].probability == pytest.approx(1)
    top = convscope.heatmap(network, photo).rows[0]
    assert top.class_name == max((cat, dog), key=lambda result: result.rows[0].probability).rows[0].class_name


def test_classes_by_number_name_and_top(photo):
    network = open_model(gap_network(), preprocess="0..1", classes=NAMES)
    by_name, by_number = convscope.heatmap(network, photo, "CAT"), convscope.heatmap(network, photo, 2)
    np.testing.assert_array_equal(by_name.maps, by_number.maps)
    top = convscope.heatmap(network, photo).rows[0]
    assert top.class_name == top.predictions[0].name
    assert [p.index for p in top.predictions] == sorted(
        range(5), key=lambda index: -network.predict(network.prepare(by_name.images))[0, index]
    )
    for wrong in ("cow", 5, -1, "17"):
        with pytest.raises(UsageError):
            convscope.heatmap(network, photo, wrong)
    with pytest.raises(UsageError, match="classes="):
        convscope.heatmap(open_model(gap_network()), photo, "cat")


def test_many_images_give_what_each_gives_alone(photo):
    network = open_model(gap_network(), preprocess="0..1")
    several = [np.roll(photo, shift, axis=1) for shift in range(5)]
    together = convscope.heatmap(network, several, batch=2)
    for index, one in enumerate(several):
        np.testing.assert_allclose(convscope.heatmap(network, one).maps[0], together.maps[index], atol=1e-6)
    with pytest.raises(UsageError, match="5 images"):
        convscope.heatmap(network, several, [1, 2])


def test_a_layer_inside_nested_models(photo):
    model = models.nested()
    network = open_model(model)
    result = convscope.heatmap(network, photo, 1)
    assert result.rows[0].layer == "middle/inner/deep"
    maps = network.forward(network.prepare(result.images), ["middle/inner/deep"])[1]["middle/inner/deep"]
    kernel = keras.ops.convert_to_numpy(model.get_layer("out").kernel)
    np.testing.assert_allclose(result.maps[0], maps[0] @ kernel[:, 1] / maps[0, ..., 0].size, rtol=1e-3, atol=1e-6)


def test_auto_passes_over_a_one_by_one_map(photo):
    model = keras.Sequential(
        [
            layers.Input((12, 12, 3)),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.Dropout(0.3, name="drop"),
            layers.GlobalAveragePooling2D(keepdims=True, name="gap"),
            layers.Conv2D(3, 1, name="preds"),
            layers.Flatten(),
            layers.Softmax(),
        ]
    )
    result = convscope.heatmap(open_model(models.seeded(model)), photo)
    assert result.rows[0].layer == "conv"
    assert result.provenance["network"]["head"]["kind"] == "softmax"


def test_a_layer_without_a_map_is_refused(photo):
    network = open_model(gap_network())
    with pytest.raises(UsageError, match="'conv'"):
        convscope.heatmap(network, photo, layer="out")
    with pytest.raises(UsageError, match="grad-cam"):
        convscope.heatmap(network, photo, method="gradcam")


def test_log_p_is_explained_where_no_softmax_can_be_taken_away(photo):
    network = open_model(models.subclassed(), preprocess="0..1")
    result = convscope.heatmap(network, photo, 1, layer="conv")
    assert "log p" in result.provenance["parameters"]["explained"]
    assert result.rows[0].score == pytest.approx(np.log(result.rows[0].probability), rel=1e-4)


class TestBlankMaps:
    def explained(self, photo, kernel_of_out, bias_of_conv=0.0, head=None):
        model = gap_network(classes=2, head=head)
        conv, out = model.get_layer("conv"), model.get_layer("out")
        conv.set_weights([np.abs(conv.get_weights()[0]), np.full(6, bias_of_conv, np.float32)])
        out.set_weights([np.tile(np.asarray(kernel_of_out, np.float32), (6, 1)), np.zeros(2, np.float32)])
        result = convscope.heatmap(open_model(model, preprocess="0..1"), photo, 0)
        assert np.isfinite(result.maps).all()
        drawn = panel(result, 0)
        assert drawn.dtype == np.uint8
        return result.rows[0]

    def test_all_negative(self, photo):
        row = self.explained(photo, [-1, 1])
        assert (row.status, row.reason[:12]) == ("blank", "all negative")

    def test_zero_gradient(self, photo):
        row = self.explained(photo, [0, 1])
        assert (row.status, row.reason[:13]) == ("blank", "zero gradient")

    def test_silent_layer(self, photo):
        row = self.explained(photo, [1, -1], bias_of_conv=-1e4)
        assert row.status == "blank"
        assert row.reason.endswith("this class are zero")

    def test_saturated(self, photo):
        class Saturated(models.Subclassed):
            def call(self, x, training=None):
                return keras.ops.sigmoid(1e4 * keras.ops.mean(keras.ops.abs(self.conv(x)), axis=(1, 2, 3))[:, None])

        model = Saturated()
        model(np.ones((1, 10, 10, 3), np.float32))
        network = open_model(models.seeded(model), preprocess="0..1")
        assert network.head.log_probabilities
        assert network.head.independent
        row = convscope.heatmap(network, photo, 1, layer="conv").rows[0]
        assert row.status == "blank"
        assert row.reason.startswith("saturated")

    def test_not_finite(self, photo):
        network = open_model(gap_network(head=None), preprocess="0..1")
        kernel, bias = network.model.get_layer("out").get_weights()
        network.model.get_layer("out").set_weights([np.full_like(kernel, np.nan), bias])
        with pytest.raises(convscope.ConvscopeError, match=r"not finite.*layer 'out'"):
            convscope.heatmap(network, photo)


def test_numpy_integers_are_targets(photo):
    network = open_model(gap_network(), preprocess="0..1")
    one = convscope.heatmap(network, photo, np.int64(2))
    np.testing.assert_array_equal(one.maps, convscope.heatmap(network, photo, np.array([2])).maps)
    assert one.provenance["parameters"]["target"] == [2]


# -- several methods from one pass -----------------------------------------------------------------------


def test_all_methods_are_what_each_gives_alone(photo, tmp_path):
    network = open_model(gap_network(), preprocess="0..1", classes=NAMES)
    photos = [photo, photo[::-1].copy()]
    found = convscope.heatmap(network, photos, ["bee", "dog"], method="all")
    formulas = [name for name, method in METHODS.items() if method.one_pass]
    assert [row.method for row in found.rows] == formulas * 2
    assert [row.class_name for row in found.rows] == ["bee"] * len(formulas) + ["dog"] * len(formulas)
    for index, row in enumerate(found.rows):
        alone = convscope.heatmap(network, photos[index // len(formulas)], row.class_name, method=row.method)
        np.testing.assert_allclose(found.maps[index], alone.maps[0], rtol=1e-4, atol=1e-6)
    some = convscope.heatmap(network, photos[0], "bee", method=["layercam", "eigen-cam"])
    assert [row.method for row in some.rows] == ["layercam", "eigen-cam"]
    assert comparison(some).shape[1] > 3 * 240
    convscope.save(some, tmp_path)
    assert len(list(tmp_path.glob("*.methods.png"))) == len(list(tmp_path.glob("photos/*"))) == 1
    again = convscope.load(tmp_path)
    np.testing.assert_array_equal(again.maps, some.maps)
    assert [row.method for row in again.rows] == ["layercam", "eigen-cam"]


def test_all_leaves_out_what_does_not_fit_and_says_so(photo):
    model = keras.Sequential(
        [layers.Input((20, 24, 3)), layers.Conv2D(4, 5, name="conv"), layers.Flatten(), layers.Dense(3)]
    )
    found = convscope.heatmap(open_model(models.seeded(model), preprocess="0..1"), photo, 1, "conv", method="all")
    assert "cam" not in [row.method for row in found.rows]
    assert "global average pooling" in found.provenance["parameters"]["left_out"]["cam"]
    assert len(found.rows) == len([method for method in METHODS.values() if method.one_pass]) - 1


def test_several_methods_make_one_pass(photo, monkeypatch):
    network = open_model(gap_network(), preprocess="0..1")
    passes = []
    original = type(network)._run
    monkeypatch.setattr(
        type(network), "_run", lambda self, *args, **kwargs: passes.append(1) or original(self, *args, **kwargs)
    )
    convscope.heatmap(network, photo, 1, method="all")
    traced = len(passes)
    convscope.heatmap(network, photo, 1, method="all")
    backend = keras.backend.backend()
    assert traced == 1
    assert len(passes) == (2 if backend == "torch" else 1)  # torch passes each time, the others have a program


# -- replaying the network -------------------------------------------------------------------------------


def branching(join):
    """A branch from before the layer that is joined again after it."""
    image = layers.Input((20, 24, 3))
    early = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="early")(image)
    late = layers.Conv2D(6, 3, padding="same", activation="relu", name="late")(early)
    joined = layers.Add()([early, late]) if join == "add" else layers.Concatenate()([early, late])
    x = layers.Conv2D(4, 3, activation="relu")(joined)
    return models.seeded(keras.Model(image, layers.Dense(5, activation="softmax")(layers.GlobalMaxPooling2D()(x))))


@pytest.mark.parametrize("join", ["add", "concatenate"])
@pytest.mark.parametrize("against", [None, 3])
def test_ablation_cam_is_the_slow_loop(photo, join, against):
    """Each channel set to zero in a pass of its own."""
    network = open_model(branching(join), preprocess="0..1")
    found = convscope.heatmap(network, [photo, photo[::-1].copy()], 1, "late", against=against, method="ablation-cam")
    x = network.prepare(found.images)
    assert network.limitations == ({(WHOLE, "late")} if join == "concatenate" else set())

    def scored(image, channel):
        keep = np.ones(6, np.float32)
        if channel is not None:
            keep[channel] = 0

        def program(run, x, keep):
            return run(x, Pass(replace=("late",)), {"late": lambda activation: activation * keep}).logits

        logits = network.numpy(network.compile(program)(network.tensor(image[None]), network.tensor(keep)))[0]
        return logits[1] - (0 if against is None else logits[against])

    for index, image in enumerate(x):
        maps, whole = network.forward(image[None], ("late",))[1]["late"][0], scored(image, None)
        weights = [(whole - scored(image, channel)) / abs(whole) for channel in range(6)]
        np.testing.assert_allclose(found.maps[index], maps @ np.array(weights), rtol=1e-3, atol=1e-5)


def test_ablating_a_channel_of_a_gap_head_costs_its_share(photo):
    """w_k mean(A_k), in closed form, also over more channels than one chunk holds."""
    image = layers.Input((20, 24, 3))
    x = layers.Conv2D(300, 5, strides=2, activation="relu", name="conv")(image)
    model = models.seeded(keras.Model(image, layers.Dense(3, name="out")(layers.GlobalAveragePooling2D()(x))))
    network = open_model(model, preprocess="0..1")
    found = convscope.heatmap(network, photo, 2, method="ablation-cam")
    maps, kernel, _ = maps_and_head(model, network.prepare(found.images))
    drops = kernel[:, 2] * maps[0].mean(axis=(0, 1)) / abs(found.rows[0].score)
    np.testing.assert_allclose(found.maps[0], maps[0] @ drops, rtol=1e-2, atol=1e-5)


def test_score_cam_is_the_slow_loop(photo):
    network = open_model(branching("add"), preprocess="0..1")
    found = convscope.heatmap(network, photo, 1, "late", method="score-cam")
    x = network.prepare(found.images)
    maps = network.forward(x, ("late",))[1]["late"][0]
    empty = network.predict(np.zeros_like(x))[0, 1]
    scores, told = [], [channel for channel in range(6) if maps[..., channel].max() > maps[..., channel].min()]
    assert 2 <= len(told) < 6  # a channel that is silent everywhere would be 0 / 0 in the paper's form
    for channel in told:
        mask = resize_map(maps[..., channel], *x.shape[1:3])
        mask = (mask - maps[..., channel].min()) / (maps[..., channel].max() - maps[..., channel].min())
        scores.append(network.predict((x * mask[None, ..., None]).astype(np.float32))[0, 1] - empty)
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(found.maps[0], maps[..., told] @ weights, rtol=1e-3, atol=1e-6)


def test_score_cam_of_maps_that_tell_nothing_is_blank(photo):
    model = branching("add")
    kernel, bias = model.get_layer("late").weights
    kernel.assign(np.zeros(kernel.shape))
    bias.assign(np.ones(bias.shape))
    found = convscope.heatmap(open_model(model, preprocess="0..1"), photo, 1, "late", method="score-cam")
    assert (found.rows[0].status, found.maps.any()) == ("blank", False)


def test_score_cam_holds_no_more_images_than_a_chunk(photo, monkeypatch):
    image = layers.Input((20, 24, 3))
    x = layers.Conv2D(70, 5, strides=2, activation="relu", name="conv")(image)
    model = models.seeded(keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))
    network, counts = open_model(model, preprocess="0..1"), []
    original = type(network).tensor
    monkeypatch.setattr(
        type(network), "tensor", lambda self, x: counts.append(len(x) if x.ndim == 4 else 0) or original(self, x)
    )
    convscope.heatmap(network, photo, 2, method="score-cam")
    assert set(counts) == {0, 1, 16}
