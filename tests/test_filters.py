"""Gradient ascent against the classic procedure written out plainly, and what a seed promises."""

from dataclasses import replace

import numpy as np
import pytest

keras = pytest.importorskip("keras")
import models  # noqa: E402
from keras import layers  # noqa: E402

import convscope  # noqa: E402
from convscope import demo, open_model  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.images.decode import read_images  # noqa: E402
from convscope.images.image import InputImage  # noqa: E402
from convscope.objectives import channel, likeness  # noqa: E402
from convscope.render import filters as views  # noqa: E402
from convscope.render.filters import label  # noqa: E402
from convscope.techniques.filters import NOISE_IMAGES, parse_channels  # noqa: E402
from convscope.techniques.filters.ascent import Plan, settled, step_of  # noqa: E402
from convscope.techniques.filters.optimizers import Normalised  # noqa: E402
from convscope.techniques.filters.recipes import CLASSIC, RECIPES  # noqa: E402


def classic_model():
    """All convolutional, any size, pixels in -1..1 by its name: what the procedure was written for."""
    image = layers.Input((None, None, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="conv1")(image)
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.Conv2D(12, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.Conv2D(6, 3, strides=2, activation="relu", name="conv3")(x)
    return models.seeded(keras.Model(image, layers.GlobalAveragePooling2D()(x), name="resnet50v2"))


def plain_gradient(loss, image):
    """Value and gradient of `loss` by the backend itself, on an image (1, h, w, 3)."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        image = tf.constant(image)
        with tf.GradientTape() as tape:
            tape.watch(image)
            value = loss(image)
        return float(value), tape.gradient(value, image).numpy()
    if backend == "jax":
        import jax

        value, gradient = jax.value_and_grad(loss)(jax.numpy.asarray(image))
        return float(value), np.asarray(gradient)
    import torch

    image = torch.tensor(image, requires_grad=True)
    value = loss(image)
    value.backward()
    return float(value.detach()), image.grad.numpy()


def plain_run(model, layer, channel, image, steps, rate=10.0):
    """The procedure of FIELD.md §1 as its author would write it: every image on the way, and every loss."""
    extractor = keras.Model(model.input, model.get_layer(layer).output)

    def loss(image):
        return keras.ops.mean(extractor(image)[:, 2:-2, 2:-2, channel])

    images, losses = [image], []
    for _ in range(steps):
        value, gradient = plain_gradient(loss, images[-1])
        losses.append(value)
        gradient = gradient / np.sqrt(max((gradient.astype(np.float64) ** 2).sum(), 1e-12))
        images.append((images[-1] + rate * gradient).astype(np.float32))
    losses.append(plain_gradient(loss, images[-1])[0])
    return images, losses


@pytest.mark.parametrize("layer", ["conv2", "conv3"])
def test_classic_equals_the_plain_procedure(layer):
    model = classic_model()
    network = open_model(model)
    assert network.preprocessing.name == "-1..1"
    channels, size, steps = [0, 3, 5], 48, 12
    result = filters(network, layer, channels, size=size, steps=steps, seed=7)
    plan = Plan(network, CLASSIC, (size, size), 7)
    bounds = [plan.bind(channel(layer, number)) for number in channels]
    step = network.compile(step_of(plan, bounds[0].key))
    begin = starts(plan, channels)
    for index, number in enumerate(channels):
        images, losses = plain_run(model, layer, number, begin[index : index + 1], steps)
        (mask,), (vector,) = bounds[index].arguments, bounds[index].vectors
        arguments = ((network.tensor(mask[None]), network.tensor(vector[None])),)
        nothing = network.tensor(np.zeros((1, 0, 8), np.float32))
        heat = network.tensor(np.zeros((1, size, size), np.float32))
        for before, after, loss in zip(images, images[1:], losses, strict=False):
            value, _, moved, _, _ = step(network.tensor(before), (), heat, arguments, nothing)
            value, moved = network.numpy(value), network.numpy(moved)
            assert value[0] == pytest.approx(loss, rel=1e-4, abs=1e-6)
            np.testing.assert_allclose(moved, after, atol=1e-4 * np.abs(after).max())
        row = result.rows[index]
        if not any(losses):  # the procedure has nothing to climb there, and convscope finds another start
            assert row.tries > 1
            continue
        assert row.activations[0] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
        assert len(row.activations) == steps
        assert row.activation == pytest.approx(losses[-1], rel=0.05)
    assert any(row.tries == 1 for row in result.rows)


def filters(*arguments, recipe="classic", precision="float32", **options):
    return convscope.filters(*arguments, recipe=recipe, precision=precision, **options)


def starts(plan, numbers):
    return np.stack([plan.start((number,)) for number in numbers])


def classic_starts(network, size, seed, numbers):
    return starts(Plan(network, CLASSIC, size, seed), numbers)


def test_the_start_is_the_procedures_own():
    network = open_model(classic_model())
    begin = classic_starts(network, (20, 20), 0, range(50))
    assert begin.min() >= -0.125
    assert begin.max() <= 0.125
    assert begin.std() == pytest.approx(0.25 / np.sqrt(12), rel=0.02)
    assert begin.mean() == pytest.approx(0, abs=1e-3)


def test_start_and_step_scale_with_the_range_of_the_input():
    model = classic_model()
    unit, pixels = open_model(model, preprocess="-1..1"), open_model(model, preprocess="0..1")
    one, other = (classic_starts(network, (9, 9), 0, [4]) for network in (unit, pixels))
    np.testing.assert_allclose(other, one / 2 + 0.5, atol=1e-6)


def test_starts_are_bit_equal_for_a_seed_and_channel():
    network = open_model(classic_model())
    together = classic_starts(network, (12, 12), 3, [9, 2, 5])
    alone = classic_starts(network, (12, 12), 3, [2])
    np.testing.assert_array_equal(together[1], alone[0])
    assert not np.array_equal(alone, classic_starts(network, (12, 12), 4, [2]))
    assert not np.array_equal(together[0], together[2])


def test_images_are_bit_equal_at_equal_batch_whichever_others_share_it():
    network = open_model(classic_model())
    options = {"size": 32, "steps": 6, "batch": 4}
    first = filters(network, "conv2", [0, 1, 2, 3, 4, 5], **options)
    again = filters(network, "conv2", [5, 4, 3, 2, 1, 0], **options)
    np.testing.assert_array_equal(first.values, again.values[::-1])
    alone = filters(network, "conv2", [2], size=32, steps=6, batch=1)
    assert alone.rows[0].activation == pytest.approx(first.rows[2].activation, rel=0.05)


def traces_of(network):
    """A list that grows by one whenever a program of the network is traced."""
    traced = []
    compile_ = network.compile

    def counting(function):
        def counted(run, *tensors):
            traced.append(function)
            return function(run, *tensors)

        return compile_(counted)

    network.compile = counting
    return traced


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch is eager: its Python runs each time")
def test_one_compile_serves_all_chunks_and_channels():
    one, many = open_model(classic_model()), open_model(classic_model())
    of_one, of_many = traces_of(one), traces_of(many)
    filters(one, "norm1", range(4), size=24, steps=3, batch=4)  # one chunk; none of the channels is stuck
    filters(many, "norm1", range(7), size=24, steps=3, batch=4)  # two chunks
    assert len(of_many) == len(of_one) > 0
    filters(many, "norm1", [6, 2, 5, 0, 1, 4, 3], size=24, steps=3, batch=4)
    assert len(of_many) == len(of_one)


def test_what_comes_after_the_layer_is_not_run():
    ran = []

    class Late(keras.layers.Layer):
        def call(self, x):
            ran.append(True)
            return x

    image = layers.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, name="early")(image)
    model = keras.Model(image, Late()(layers.Conv2D(4, 3)(x)))
    network = open_model(model)
    ran.clear()
    filters(network, "early", [0], steps=2)
    assert not ran


def test_dead_weak_and_alive():
    model = keras.Sequential(
        [layers.Input((20, 20, 3)), layers.Conv2D(3, 3, activation="relu", name="conv")], name="three"
    )
    kernel = np.random.default_rng(0).normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)
    kernel[..., 0] -= kernel[..., 0].mean()
    kernel[..., 1] = 0  # channel 1 answers 1 to everything
    model.get_layer("conv").set_weights([kernel, np.array([0.1, 1.0, -1e3], np.float32)])  # channel 2 never wakes
    result = filters(open_model(model), "conv", steps=5)
    assert [row.status for row in result.rows] == ["alive", "dead", "dead"]
    assert "gradient is zero" in result.rows[2].reason
    assert result.rows[2].activation == 0
    bright = np.full((20, 20, 3), 255, np.uint8)
    alive = filters(open_model(model), "conv", [0], steps=1)
    assert alive.rows[0].threshold < alive.rows[0].activation
    model.get_layer("conv").set_weights([np.abs(kernel), np.zeros(3, np.float32)])
    few = filters(open_model(model), "conv", [0], steps=1, natural_images=[bright])
    assert few.rows[0].status == "weak"
    assert "images" in few.rows[0].reason


def test_what_was_begun_with_a_photo_says_so():
    """Nothing but white excites the first channel, and there is nothing before its threshold to raise."""

    class Threshold(keras.layers.Layer):
        def call(self, x):
            return keras.ops.relu(x - keras.ops.convert_to_tensor([0.99, 0.0, 0.0]))

    gate = Threshold(name="gate")
    model = keras.Sequential([layers.Input((12, 12, 3)), gate, layers.Flatten(), layers.Dense(2)])
    network = open_model(models.seeded(model), preprocess="0..1")
    white, black = (np.full((12, 12, 3), value, np.uint8) for value in (255, 0))
    photos = [InputImage("black", black), InputImage("white", white)]
    result = filters(network, "gate", [0, 1], steps=3, natural_images=photos)
    assert [row.started_from for row in result.rows] == ["white", ""]
    assert "found from an image" in result.rows[0].reason
    assert "from an image" in label(result, 0).lines
    assert "from an image" not in label(result, 1).lines


def test_the_threshold_is_the_99th_percentile_of_the_noise_images():
    network = open_model(classic_model())
    row = filters(network, "conv2", [1], size=24, steps=1, seed=5).rows[0]
    noise = classic_starts(network, (24, 24), 5, range(-NOISE_IMAGES, 0))
    maps = network.forward(noise, ["conv2"])[1]["conv2"]
    answers = sorted(maps[:, 2:-2, 2:-2, 1].mean(axis=(1, 2)))
    below = int(0.99 * (NOISE_IMAGES - 1))
    low, high = answers[below], answers[below + 1]
    assert low <= row.threshold <= high


def test_dense_units_are_raised_on_their_logit():
    model = models.plain(side=16)
    result = filters(open_model(model), "out", steps=8)
    assert len(result.rows) == 5
    assert "logit" in result.provenance["parameters"]["objective"]
    for row, image in zip(result.rows, result.values, strict=True):
        assert row.activation > row.activations[0]
        best = open_model(model).predict(image[None])[0]
        assert best[row.channel] == pytest.approx(row.activation, rel=1e-3)


def test_a_layer_inside_nested_models():
    result = filters(open_model(models.nested()), "middle/inner/deep", [0, 4], steps=4)
    assert all(row.activation > row.activations[0] for row in result.rows)


def test_grey_networks_give_grey_images():
    model = keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(3, 5, activation="relu", name="conv"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    result = filters(open_model(models.seeded(model)), "conv", steps=3)
    crop = round(25 * 28 / 180)
    assert views.drawn(result, 0).shape == (28 - 2 * crop, 28 - 2 * crop, 3)
    assert (np.ptp(views.drawn(result, 0), axis=-1) == 0).all()


def test_a_network_that_overflows_is_flagged_and_the_others_go_on():
    model = keras.Sequential(
        [
            layers.Input((12, 12, 3)),
            layers.Conv2D(2, 3, name="conv"),
            layers.Activation("exponential", name="exp"),
        ]
    )
    kernel = np.zeros((3, 3, 3, 2), np.float32)
    kernel[..., 0], kernel[..., 1] = 50, 0.01
    model.get_layer("conv").set_weights([kernel, np.zeros(2, np.float32)])
    rows = filters(open_model(model), "exp", steps=4).rows
    assert rows[0].status == "weak"
    assert "finite" in rows[0].reason
    assert np.isfinite(rows[1].activation)


def test_the_sheet_has_eight_columns_and_five_black_pixels_between():
    network = open_model(classic_model())
    result = filters(network, "conv2", range(10), size=36, steps=2)
    side = 36 - 2 * round(25 * 36 / 180)
    sheet = views.sheet(result)
    assert sheet.shape == (2 * side + 5, 8 * side + 7 * 5, 3)
    assert not sheet[:, side : side + 5].any()
    np.testing.assert_array_equal(sheet[side + 5 :, side + 5 : 2 * side + 5], views.drawn(result, 9))


def test_the_image_follows_the_procedure():
    network = open_model(classic_model())
    result = filters(network, "conv2", [3], size=72, steps=3)
    image = result.values[0].astype(np.float64)
    image = (image - image.mean()) / (image.std() + 1e-5) * 0.15
    image = np.clip(image[10:-10, 10:-10] + 0.5, 0, 1) * 255
    assert np.abs(views.drawn(result, 0).astype(int) - np.clip(image, 0, 255).astype("uint8")).max() <= 1


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("0-3,7", 10, [0, 1, 2, 3, 7]),
        ("all", 3, [0, 1, 2]),
        (" 5 , 1-2", 9, [5, 1, 2]),
        (None, 100, list(range(100))),
        (4, 5, [4]),
        ([2, 2, 1], 5, [2, 1]),
    ],
)
def test_channels(text, count, expected):
    assert parse_channels(text, count) == expected


@pytest.mark.parametrize("text", ["0-10", "10", "-1", "a", "3-1", "", ","])
def test_channels_that_are_wrong(text):
    with pytest.raises(UsageError):
        parse_channels(text, 10)


def test_wrong_requests_say_what_there_is():
    network = open_model(models.plain())
    with pytest.raises(UsageError, match="conv_a"):
        filters(network, "conv_aa")
    with pytest.raises(UsageError, match="0 to 7"):
        filters(network, "conv_a", [8])
    with pytest.raises(UsageError, match="classic"):
        filters(network, "conv_a", recipe="classics")
    fixed = keras.Sequential(
        [layers.Input((16, 16, 3)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2, name="out")]
    )
    with pytest.raises(UsageError, match="give 16"):
        filters(open_model(fixed), "out", size=20)


def test_a_changed_preprocessing_is_not_answered_by_an_old_program():
    from convscope.networks.preprocessing import PRESETS

    network = open_model(classic_model(), preprocess="-1..1")
    filters(network, "conv2", [0], size=24, steps=2)
    network.preprocessing = PRESETS["none"]
    fresh = open_model(network.model, preprocess="none")
    changed, expected = (filters(one, "conv2", [0], size=24, steps=2) for one in (network, fresh))
    np.testing.assert_array_equal(changed.values, expected.values)


# -- recipes beyond the classic one ----------------------------------------------------------------------


LAYER = "block3_conv"


@pytest.fixture(scope="module")
def trained():
    """The network of the demo, whose filters mean something."""
    return open_model(demo.MODEL)


@pytest.mark.slow(reason="every recipe is compiled and run")
def test_each_recipe_raises_what_it_is_asked_to(trained):
    for name, recipe in RECIPES.items():
        begin = demo.PHOTOS[0] if recipe.needs_image else None
        channels = None if recipe.raises == "caricature" else range(3)
        result = convscope.filters(trained, LAYER, channels, recipe=name, steps=12, size=64, image=begin)
        # A step of one length, whatever the gradient's, may overshoot a filter; the others never do.
        risen = [row.activation > 1.2 * row.activations[0] > 0 for row in result.rows]
        assert sum(risen) >= (2 if isinstance(recipe.optimizer, Normalised) else len(risen)), (name, result.rows)
        assert (result.alpha is not None) == recipe.transparent
        if result.alpha is not None:
            assert result.alpha.min() >= 0
            assert result.alpha.max() == 1
            assert result.alpha.std() > 0.01


@pytest.mark.parametrize("name", ["accentuation", "deepdream"])
def test_recipes_that_start_from_a_photo_need_one(name):
    with pytest.raises(UsageError, match="image="):
        convscope.filters(open_model(classic_model()), "conv2", 0, recipe=name)


@pytest.mark.slow(reason="several filters of 30 steps")
def test_a_tie_keeps_the_image_near_the_photo(trained):
    before = [layer.path for layer in trained.layers if layer.spatial and layer.on_path]
    middle = before[before.index(LAYER) // 2]
    x = trained.prepare(read_images([demo.PHOTOS[0]]), (64, 64))

    def apart(tie):
        recipe = replace(RECIPES["accentuation"], regularizer_weight=tie)
        result = convscope.filters(
            trained, LAYER, 1, recipe=recipe, steps=30, size=64, image=demo.PHOTOS[0], precision="float32"
        )
        assert result.rows[0].channel == 1
        assert result.rows[0].name == f"{LAYER}:1"
        maps = [trained.forward(batch, (middle,))[1][middle] for batch in (x, result.values)]
        return np.square(maps[1] - maps[0]).sum() / np.square(maps[0]).sum(), result.rows[0].activation

    (free, reached), (tied, held) = apart(0.0), apart(30.0)
    assert tied < 0.5 * free
    assert 0 < held < reached


def test_a_likeness_needs_a_photo():
    with pytest.raises(UsageError, match="image="):
        convscope.filters(open_model(classic_model()), objectives=[channel("conv2", 1) + likeness("relu1")], steps=2)


@pytest.mark.slow(reason="the recipe makes the image at several sizes, a program for each")
def test_a_dream_that_does_not_move_is_the_photo(trained):
    """What a photo shows at a larger size only is given back to it there."""
    still = replace(RECIPES["deepdream"], optimizer=Normalised(length=1e-6))
    result = convscope.filters(trained, LAYER, recipe=still, steps=4, size=64, image=demo.PHOTOS[0])
    wanted = trained.prepare(read_images([demo.PHOTOS[0]]), (64, 64))[0]
    np.testing.assert_allclose(result.values[0], wanted, atol=1e-3 * wanted.max())
    assert [row.name for row in result.rows] == [f"{LAYER}:*"]


@pytest.mark.slow(reason="six filters of 40 steps")
def test_variants_differ_more_than_images_of_other_seeds(trained):
    def likeness_of(values):
        maps = trained.forward(values, (LAYER,))[1][LAYER]
        grams = np.einsum("nhwc,nhwd->ncd", maps, maps).reshape(len(maps), -1)
        grams /= np.linalg.norm(grams, axis=1, keepdims=True)
        return (grams @ grams.T)[np.triu_indices(len(grams), 1)].mean()

    options = {"recipe": "fourier", "steps": 40, "size": 64, "precision": "float32"}
    alone = [convscope.filters(trained, LAYER, 4, seed=seed, **options).values[0] for seed in range(3)]
    together = convscope.filters(trained, LAYER, 4, variants=3, **options)
    assert [row.variant for row in together.rows] == [0, 1, 2]
    assert likeness_of(together.values) < likeness_of(np.stack(alone)) - 0.05


def test_a_film_waits_for_filters_that_were_done_early(trained, monkeypatch):
    done = []

    def first_at_twenty(activations, gain):
        if len(activations) != 20 or done:
            return False
        done.append(True)
        return True

    monkeypatch.setattr("convscope.techniques.filters.ascent.settled", first_at_twenty)
    result = convscope.filters(trained, LAYER, range(3), steps=40, size=48, frames=10)
    steps = [row.steps for row in result.rows]
    assert sorted(steps) == [20, 40, 40]
    early = int(np.argmin(steps))
    assert result.frames.shape[:2] == (3, 10)
    np.testing.assert_array_equal(result.frames[early, -1], result.values[early])
    assert not np.array_equal(result.frames[early, 0], result.values[early])


def test_a_filter_has_settled_when_it_neither_rises_nor_falls():
    flat, rising = np.full(40, 3.0), np.linspace(1, 5, 40)
    wobbling = flat + 0.5 * (-1.0) ** np.arange(40)
    assert settled(flat, 0.02)
    assert settled(wobbling, 0.02)
    assert not settled(rising, 0.02)
    assert not settled(rising[::-1], 0.02)
    assert not settled(-rising[::-1], 0.02)
    assert not settled(flat[:15], 0.02)  # too few to tell
    assert not settled(flat, 0.0)


@pytest.mark.parametrize(("size", "cut"), [(5, True), (11, False)])
def test_a_size_below_the_receptive_field_is_said(size, cut):
    """Two 3x3 convolutions, the second with a stride of 2 before it: a unit of the last sees 7x7."""
    model = keras.Sequential(
        [
            layers.Input((None, None, 3)),
            layers.Conv2D(4, 3, strides=2, padding="same", name="one"),
            layers.Conv2D(4, 3, padding="same", name="two"),
        ]
    )
    network = open_model(models.seeded(model), preprocess="-1..1")
    found = convscope.filters(network, "two", [0], recipe="classic", steps=2, size=size)
    assert ("cut off" in found.provenance["parameters"]["note"]) == cut
    assert not convscope.filters(network, "one", [0], recipe="classic", steps=2).provenance["parameters"]["note"]
