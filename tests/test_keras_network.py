"""The tap mechanism on Keras models, against Keras' own sub-models and against arithmetic."""

import logging
from contextlib import ExitStack

import numpy as np
import pytest

keras = pytest.importorskip("keras")
import models  # noqa: E402
import siamese  # noqa: E402
from keras import layers  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.errors import ModelError, UsageError  # noqa: E402
from convscope.networks import Pass  # noqa: E402
from convscope.networks.backends import backend_named  # noqa: E402
from convscope.networks.keras import folds as keras_folds  # noqa: E402


def images(network, count=2, seed=1):
    shape = (count, *network.inputs.size, network.inputs.channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def softmax(logits):
    exponent = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def gradient_at(network, path, x, classes):
    """Gradient of the chosen logits with respect to the activation at `path`, and the activation."""
    shape = network.layer(path).shape

    def program(run, x, delta, classes):
        def score(delta):
            seen = run(x, Pass(record=(path,), replace=(path,)), {path: lambda activation: activation + delta})
            chosen = network.ops.sum(seen.logits * network.ops.one_hot(classes, seen.logits.shape[-1]), axis=-1)
            return network.ops.sum(chosen), (chosen, seen.activations[path])

        (_, (chosen, activation)), gradient = network.value_and_grad(score)(delta)
        return chosen, activation, gradient

    arrays = (x, np.zeros((len(x), *shape), np.float32), np.asarray(classes, np.int32))
    return [network.numpy(tensor) for tensor in network.compile(program)(*map(network.tensor, arrays))]


def test_activations_equal_keras_own_sub_models():
    model = models.plain()
    network = open_model(model)
    x = images(network)
    paths = [layer.path for layer in network.layers][:-1]  # the last is the head, which `forward` undoes
    _, seen = network.forward(x, paths)
    for path in paths:
        own = keras.Model(model.inputs, model.get_layer(path).output)(x, training=False)
        np.testing.assert_allclose(seen[path], keras.ops.convert_to_numpy(own), rtol=1e-5, atol=1e-6)


def test_paths_reach_a_model_inside_a_model_inside_a_model():
    model = models.nested()
    network = open_model(model)
    x = 255 * np.abs(images(network))
    _, seen = network.forward(x, ["middle/inner/deep"])
    middle, scaled = model.get_layer("middle"), x / 127.5 - 1
    first = middle.get_layer("first")(scaled)
    expected = middle.get_layer("inner").get_layer("deep")(first)
    np.testing.assert_allclose(seen["middle/inner/deep"], keras.ops.convert_to_numpy(expected), rtol=1e-4, atol=1e-5)
    assert network.layer("deep").path == "middle/inner/deep"
    assert network.preprocessing.name == "none"
    assert "scale" in network.preprocessing.reason


def test_a_layer_called_twice_has_two_paths_with_their_own_values():
    model = models.shared()
    network = open_model(model)
    x = images(network)
    _, seen = network.forward(x, ["twice#0", "twice#1"])
    conv = model.get_layer("twice")
    once = keras.ops.convert_to_numpy(conv(x))
    again = keras.ops.convert_to_numpy(conv(np.maximum(once, 0)))
    np.testing.assert_allclose(seen["twice#0"], once, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["twice#1"], again, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"twice#0, twice#1"):
        network.layer("twice")


def test_operations_that_are_no_layers_are_found():
    network = open_model(models.shared())
    by_class = {layer.class_name: layer for layer in network.layers}
    assert by_class["Relu"].kind == "activation"
    assert by_class["Add"].kind == "merge"
    assert network.layer("twice#0").rectified == by_class["Relu"].path
    assert network.layer("twice#1").rectified is None


def test_several_inputs_and_outputs_by_name():
    model = models.two_in_two_out()
    extra = np.array([[1.0, -2.0, 0.5, 3.0]], np.float32)
    digit = open_model(model, output="digit", feed={"extra": extra})
    angle = open_model(model, output="angle", feed={"extra": extra})
    x = images(digit)
    expected = models.ones_with(model, {"picture": x, "extra": np.repeat(extra, 2, axis=0)})
    np.testing.assert_allclose(softmax(digit.predict(x)), expected["digit"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(angle.predict(x), expected["angle"], rtol=1e-4, atol=1e-5)
    assert (digit.head.activation, digit.head.undone, angle.head.linear) == ("softmax", "digit", True)
    with pytest.raises(UsageError, match="digit"):
        open_model(model, output="digits")
    with pytest.raises(UsageError, match="extra"):
        open_model(model, feed={"extras": extra})
    with pytest.raises(ModelError, match="input="):
        open_model(model, input="extra")


def siamese_model():
    side = (siamese.SIDE, siamese.SIDE, 3)
    left, right = layers.Input(side, name="left"), layers.Input(side, name="right")
    conv = layers.Conv2D(siamese.CHANNELS, 3, activation="relu", name="conv")
    pool = layers.GlobalAveragePooling2D(name="pool")
    score = layers.Dot(axes=1, name="score")([pool(conv(left)), pool(conv(right))])
    model = keras.Model([left, right], score)
    conv.set_weights([siamese.KERNEL, siamese.BIAS])
    return model


def test_either_side_of_a_siamese_model_is_explained():
    model = siamese_model()
    siamese.check_sides(lambda **options: open_model(model, **options))


def test_the_image_goes_to_an_input_that_can_take_one_and_is_not_fed():
    words, image = layers.Input((7, 5), name="words"), layers.Input((12, 12, 3), name="image")
    x = layers.Concatenate()([layers.GlobalAveragePooling1D()(words), layers.GlobalAveragePooling2D()(image)])
    model = keras.Model([words, image], layers.Dense(2)(x))
    assert open_model(model).inputs.name == "image"
    assert open_model(model, feed={"words": np.zeros((7, 5))}).inputs.others["words"] == "zeros"
    with pytest.raises(UsageError, match=r"'words' takes an array of shape \(1, 7, 5\)") as error:
        open_model(model, feed={"words": np.zeros((1, 7, 6))})
    assert error.value.code == "feed-misfit"
    with pytest.raises(UsageError, match="'image'") as error:
        open_model(model, input="image", feed={"image": np.zeros((1, 12, 12, 3))})
    assert error.value.code == "feed-is-image"


def test_a_subclassed_model_is_seen_and_its_probabilities_are_found_out():
    model = models.subclassed()
    network = open_model(model)
    x = images(network)
    logits, seen = network.forward(x, ["conv"])
    np.testing.assert_allclose(seen["conv"], keras.ops.convert_to_numpy(model.conv(x)), rtol=1e-5, atol=1e-6)
    assert network.head.activation == "softmax"
    assert network.head.log_probabilities
    assert "log p" in network.head.text
    np.testing.assert_allclose(logits, np.log(models.ones_with(model, x)), rtol=1e-4, atol=1e-5)


def test_a_tap_that_does_not_fire_is_said_loudly():
    model = models.subclassed()
    network = open_model(model)
    model.reach = False
    with pytest.raises(ModelError, match="conv did not run"):
        network.forward(images(network), ["conv"])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.function is TensorFlow's")
def test_a_call_wrapped_in_tf_function_is_tapped():
    import tensorflow as tf

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="block")
            self.conv = layers.Conv2D(2, 3, name="conv")

        @tf.function
        def call(self, x):
            return self.conv(x)

    class Whole(keras.Model):
        def __init__(self):
            super().__init__(name="whole")
            self.block, self.out = Block(), layers.Dense(2)

        @tf.function
        def call(self, x):
            return self.out(tf.reduce_mean(self.block(x), axis=(1, 2)))

    model = Whole()
    model(np.zeros((1, 8, 8, 3), np.float32))
    network = open_model(model)
    x = images(network)
    np.testing.assert_allclose(
        network.forward(x, ["block/conv"])[1]["block/conv"],
        keras.ops.convert_to_numpy(model.block.conv(x)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_sequential_without_an_input_layer():
    model = keras.Sequential([layers.Conv2D(3, 3, name="conv"), layers.Flatten(), layers.Dense(2, name="out")])
    with pytest.raises(UsageError, match="never built"):
        open_model(model)
    model.build((None, 9, 9, 1))
    network = open_model(models.seeded(model))
    assert (network.inputs.size, network.inputs.channels) == ((9, 9), 1)
    x = images(network)
    np.testing.assert_allclose(network.predict(x), models.ones_with(model, x), rtol=1e-4, atol=1e-5)


def test_channels_first_equals_channels_last():
    def build(data_format, shape):
        return keras.Sequential(
            [
                layers.Input(shape),
                layers.Conv2D(4, 3, data_format=data_format, name="conv"),
                layers.ReLU(name="relu"),
                layers.MaxPooling2D(data_format=data_format, name="pool"),
                layers.GlobalAveragePooling2D(data_format=data_format),
                layers.Dense(2),
            ]
        )

    last, first = build("channels_last", (10, 12, 3)), build("channels_first", (3, 10, 12))
    models.seeded(last)
    first.set_weights(last.get_weights())
    one, other = open_model(last), open_model(first)
    assert other.inputs.size == (10, 12)
    assert [la.shape for la in one.layers] == [la.shape for la in other.layers]
    x = images(one)
    for path in ("conv", "relu", "pool"):
        np.testing.assert_allclose(one.forward(x, [path])[1][path], other.forward(x, [path])[1][path], atol=1e-5)
    for path in ("conv", "pool"):
        np.testing.assert_allclose(
            gradient_at(one, path, x, [0, 1])[2], gradient_at(other, path, x, [0, 1])[2], atol=1e-6
        )


def test_a_layer_of_several_outputs_is_tapped_one_by_one():
    class Split(keras.layers.Layer):
        def call(self, x):
            return x[..., :1], 2 * x[..., 1:]

    image = layers.Input((6, 6, 3))
    one, two = Split(name="split")(image)
    joined = layers.Concatenate(name="join")([one, two])
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(joined)))
    network = open_model(model)
    x = images(network)
    _, seen = network.forward(x, ["split[0]", "split[1]"])
    np.testing.assert_allclose(seen["split[0]"], x[..., :1])
    np.testing.assert_allclose(seen["split[1]"], 2 * x[..., 1:])


@pytest.mark.parametrize("path", ["conv_a", "pool", "conv_b"])
def test_gradients_equal_central_differences(path):
    # Smooth throughout: a difference across a kink of ReLU or of a maximum would measure the kink.
    network = open_model(
        models.seeded(
            keras.Sequential(
                [
                    layers.Input((10, 10, 3)),
                    layers.Conv2D(4, 3, activation="tanh", name="conv_a"),
                    layers.AveragePooling2D(2, name="pool"),
                    layers.Conv2D(3, 3, activation="softplus", name="conv_b"),
                    layers.Flatten(),
                    layers.Dense(3, activation="softmax"),
                ]
            )
        )
    )
    x = images(network, 1)
    _, _, gradient = gradient_at(network, path, x, [2])
    shape = network.layer(path).shape

    def program(run, x, delta):
        return run(x, Pass(replace=(path,)), {path: lambda activation: activation + delta}).logits

    logits = network.compile(program)
    rng = np.random.default_rng(3)
    for _ in range(6):
        direction = rng.normal(size=(1, *shape)).astype(np.float32)
        eps = 5e-2 / np.abs(direction).max()
        high, low = (
            network.numpy(logits(network.tensor(x), network.tensor((sign * eps * direction).astype(np.float32))))[0, 2]
            for sign in (1, -1)
        )
        assert (high - low) / (2 * eps) == pytest.approx(float((gradient * direction).sum()), rel=1e-2, abs=5e-3)


def test_gradients_before_global_pooling_are_the_dense_weights():
    model = models.plain()
    network = open_model(model)
    _, maps, gradient = gradient_at(network, "conv_b", images(network), [1, 4])
    weights = keras.ops.convert_to_numpy(model.get_layer("out").kernel)
    height, width = maps.shape[1:3]
    for index, chosen in enumerate((1, 4)):
        expected = np.broadcast_to(weights[:, chosen] / (height * width), gradient[index].shape)
        np.testing.assert_allclose(gradient[index], expected, rtol=1e-4, atol=1e-7)


HEADS = {
    "dense": lambda x, kind: layers.Dense(4, activation=kind, name="out")(x),
    "activation": lambda x, kind: layers.Activation(kind, name="act")(layers.Dense(4, name="out")(x)),
    "operation": lambda x, kind: getattr(keras.ops, kind)(layers.Dense(4, name="out")(x)),
    "reshaped": lambda x, kind: layers.Reshape((4,))(
        layers.Activation(kind, name="act")(layers.Dense(4, name="out")(x))
    ),
}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", HEADS)
def test_softmax_and_sigmoid_are_taken_away_exactly(form, kind):
    image = layers.Input((8, 8, 3))
    features = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3, name="conv")(image))
    model = models.seeded(keras.Model(image, HEADS[form](features, kind)))
    network = open_model(model)
    x = 30 * images(network)  # far into saturation, where a logarithm of p would lose the logit
    expected = (
        keras.ops.convert_to_numpy(keras.Model(image, model.get_layer("out").output)(x)) if form != "dense" else None
    )
    if expected is None:
        out = model.get_layer("out")
        before = keras.ops.convert_to_numpy(keras.Model(image, features)(x))
        expected = before @ keras.ops.convert_to_numpy(out.kernel) + keras.ops.convert_to_numpy(out.bias)
    assert network.head.activation == kind
    assert network.head.undone is not None
    np.testing.assert_allclose(network.predict(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        network.head.probabilities(network.predict(x)), models.ones_with(model, x), rtol=1e-4, atol=1e-6
    )


def test_a_separate_softmax_layer_is_taken_away():
    model = models.plain(head=None)
    full = keras.Sequential([layers.Input((16, 16, 3)), *model.layers, layers.Softmax(name="soft")])
    network = open_model(full)
    x = images(network)
    assert (network.head.activation, network.head.undone) == ("softmax", "soft")
    np.testing.assert_allclose(network.predict(x), models.ones_with(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_linear_head_is_not_taken_for_probabilities(classes):
    model = models.plain(classes=classes, head=None)
    kernel, bias = model.get_layer("out").get_weights()
    model.get_layer("out").set_weights([0 * kernel, 0 * bias + 1 / classes])  # values as probabilities have them
    assert open_model(model).head.linear


def test_one_sigmoid_unit_has_two_classes_of_opposite_logits():
    network = open_model(models.plain(classes=1, head="sigmoid"))
    logits = network.predict(images(network))
    assert network.head.classes == 2
    np.testing.assert_allclose(logits[:, 0], -logits[:, 1])
    np.testing.assert_allclose(network.head.probabilities(logits).sum(axis=-1), 1, rtol=1e-6)


def fingerprint(model):
    """Everything about a model that a visitor could leave changed."""
    seen = {}
    for index, layer in enumerate(model._flatten_layers()):
        attributes = {
            key: value for key, value in vars(layer).items() if key in ("call", "activation", "quantized_call")
        }
        seen[index, layer.name] = (
            attributes,
            layer.trainable,
            len(layer._inbound_nodes),
            layer._called if index else None,
        )
    return seen, [keras.ops.convert_to_numpy(weight).copy() for weight in model.weights]


@pytest.mark.parametrize("build", [models.plain, models.nested, models.shared, models.subclassed])
def test_the_model_comes_back_as_it_was(build):
    model = build()
    before, weights = fingerprint(model)
    network = open_model(model)
    x = images(network)
    path = network.last_spatial_layer().path
    network.forward(x, [path])
    gradient_at(network, path, x, [0, 1])
    after, now = fingerprint(model)
    assert after == before
    assert all(np.array_equal(one, other) for one, other in zip(weights, now, strict=True))
    if keras.backend.backend() == "torch":
        assert all(weight.value.grad is None for weight in model.weights)


def test_the_model_comes_back_as_it_was_after_an_exception():
    model = models.plain()
    network = open_model(model)
    before, _ = fingerprint(model)

    def fails(activation):
        raise RuntimeError("in the middle")

    program = network.compile(lambda run, x: run(x, Pass(replace=("relu_a",)), {"relu_a": fails}).logits)
    with pytest.raises(RuntimeError, match="in the middle"):
        program(network.tensor(images(network)))
    assert fingerprint(model)[0] == before
    model(images(network))


def test_weights_are_read_anew_at_each_pass():
    model = models.plain()
    network = open_model(model)
    x = images(network)
    before = network.predict(x)
    models.seeded(model, seed=9)
    after = network.predict(x)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(network.head.probabilities(after), models.ones_with(model, x), rtol=1e-4, atol=1e-6)


def test_layers_that_draw_random_numbers_stay_calm_and_usable():
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.RandomFlip(seed=1),
            layers.GaussianNoise(1.0, seed=2),
            layers.Conv2D(3, 3, name="conv"),
            layers.Dropout(0.5, seed=3),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    network = open_model(models.seeded(model))
    x = images(network)
    np.testing.assert_array_equal(network.predict(x), network.predict(x))
    np.testing.assert_allclose(network.predict(x), models.ones_with(model, x), rtol=1e-5, atol=1e-6)
    model(x, training=True)  # a leaked tracer would show here
    assert network.last_spatial_layer().path == "conv"


def test_mixed_precision_gives_float32():
    model = models.plain()
    half = keras.Sequential.from_config(model.get_config())
    policy = keras.DTypePolicy("mixed_bfloat16")
    half = keras.models.clone_model(
        model, clone_function=lambda la: type(la).from_config({**la.get_config(), "dtype": policy})
    )
    half.set_weights(model.get_weights())
    network, reference = open_model(half), open_model(model)
    x = images(network)
    logits, seen = network.forward(x, ["conv_b"])
    assert logits.dtype == seen["conv_b"].dtype == np.float32
    np.testing.assert_allclose(seen["conv_b"], reference.forward(x, ["conv_b"])[1]["conv_b"], atol=0.1)


def test_a_free_size_network_takes_any_size():
    image = layers.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, strides=2, name="conv")(image))
    model = models.seeded(keras.Model(image, layers.Dense(2)(x)))
    network = open_model(model, size=(20, 30))
    assert network.inputs.free
    assert network.layer("conv").shape == (9, 14, 4)
    small = np.ones((1, 7, 9, 3), np.float32)
    _, seen = network.forward(small, ["conv"])
    np.testing.assert_allclose(seen["conv"], keras.ops.convert_to_numpy(model.get_layer(index=1)(small)), atol=1e-6)


def test_a_fixed_size_network_shows_its_early_layers_at_another_size():
    model = keras.Sequential(
        [
            layers.Input((12, 12, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.Flatten(),
            layers.Dense(2, name="out"),
        ]
    )
    network = open_model(models.seeded(model))
    larger = network.layers_at((20, 20))
    assert [(la.path, la.shape) for la in larger if la.path == "conv"] == [("conv", (18, 18, 4))]
    assert "out" not in [la.path for la in larger]
    x = np.ones((1, 20, 20, 3), np.float32)
    program = network.compile(lambda run, x: run(x, Pass(record=("conv",), stop=True)).activations["conv"])
    np.testing.assert_allclose(
        network.numpy(program(network.tensor(x))),
        keras.ops.convert_to_numpy(model.get_layer("conv")(x)),
        atol=1e-6,
    )
    with pytest.raises(UsageError, match="12x12"):
        open_model(model, size=(20, 20))


def test_grey_images_without_a_channel_axis():
    model = keras.Sequential(
        [
            layers.Input((8, 8)),
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(2, 3, name="conv"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    network = open_model(model)
    x = images(network)
    assert network.inputs.channels == 1
    np.testing.assert_allclose(network.predict(x), models.ones_with(model, x[..., 0]), rtol=1e-4, atol=1e-5)


def test_a_model_that_takes_no_image_is_refused():
    with pytest.raises(ModelError, match="expected an image"):
        open_model(keras.Sequential([layers.Input((7,)), layers.Dense(2)]))


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match=r"expected a keras\.Model"):
        open_model(object())


def test_two_threads_leave_the_model_as_it_was():
    import threading

    model = models.plain()
    photos = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    before, _ = fingerprint(model)
    failed = []

    def work():
        try:
            for _ in range(3):
                convscope.heatmap(model, list(photos))  # a network of its own each time
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert fingerprint(model)[0] == before


def test_auto_stays_on_the_way_from_the_image_to_the_output():
    image = layers.Input((12, 12, 3), name="picture")
    early = layers.Conv2D(4, 3, activation="relu", name="early_conv")(image)
    deep = layers.Conv2D(4, 3, activation="relu", name="deep_conv")(early)
    one = layers.Dense(2, activation="softmax", name="one")(layers.GlobalAveragePooling2D()(early))
    two = layers.Dense(2, activation="softmax", name="two")(layers.GlobalAveragePooling2D()(deep))
    model = models.seeded(keras.Model(image, {"one": one, "two": two}))
    assert open_model(model, output="one").last_spatial_layer().path == "early_conv"
    assert open_model(model, output="two").last_spatial_layer().path == "deep_conv"


def test_auto_stays_on_the_input_that_gets_the_image():
    left, right = layers.Input((12, 12, 3), name="left"), layers.Input((12, 12, 3), name="right")
    conv = layers.Conv2D(4, 3, activation="relu", name="conv")
    pool = layers.GlobalAveragePooling2D()
    joined = layers.Concatenate()([pool(conv(left)), pool(conv(right))])
    model = models.seeded(keras.Model([left, right], layers.Dense(2)(joined)))
    chosen = []
    for name in ("left", "right"):
        network = open_model(model, input=name)
        x = images(network)
        chosen.append(network.last_spatial_layer().path)
        seen = network.forward(x, chosen[-1:])[1][chosen[-1]]
        np.testing.assert_allclose(seen, keras.ops.convert_to_numpy(conv(x)), rtol=1e-5, atol=1e-6)
    assert sorted(chosen) == ["conv#0", "conv#1"]
    assert open_model(model, input="left").inputs.others == {"right": "zeros"}


def test_the_first_output_with_classes_is_taken_and_said():
    network = open_model(models.two_in_two_out())
    assert (network.output, set(network.outputs)) == ("digit", {"digit", "angle"})


def test_an_output_for_each_place_has_no_classes(photo):
    model = keras.Sequential(
        [layers.Input((8, 8, 3)), layers.Conv2D(3, 3, padding="same", activation="softmax", name="seg")]
    )
    network = open_model(models.seeded(model))
    assert network.head.spatial
    assert not network.head.has_scores
    with pytest.raises(UsageError) as error:
        convscope.heatmap(network, photo)
    assert error.value.code == "no-class-scores"
    assert convscope.activations(network, photo)["seg"].shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: layers.Rescaling(1 / 255), "none"),
        (lambda: layers.Rescaling(1 / 127.5, offset=-1), "none"),
        (lambda: layers.Rescaling(2.0, offset=-1), "0..1"),
        (lambda: layers.Normalization(mean=[0.485, 0.456, 0.406], variance=[0.052, 0.05, 0.05]), "0..1"),
        (lambda: layers.Normalization(mean=[124.0, 116.0, 104.0], variance=[3400.0, 3300.0, 3300.0]), "none"),
    ],
)
def test_a_scaling_layer_inside_tells_what_it_expects(layer, name):
    model = keras.Sequential([layers.Input((8, 8, 3)), layer(), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)])
    network = open_model(model)
    assert (network.preprocessing.name, network.preprocessing.certainty) == (name, "found")


def test_scaling_of_another_input_tells_nothing_of_the_image():
    image, table = layers.Input((8, 8, 3), name="picture"), layers.Input((4,), name="table")
    normal = layers.Normalization(mean=[0.0] * 4, variance=[1.0] * 4)(table)
    features = layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(image))
    model = keras.Model([table, image], layers.Dense(2)(layers.Concatenate()([normal, features])))
    assert open_model(model).preprocessing.certainty == "guess"


def test_arithmetic_inside_tells_what_it_expects():
    image = layers.Input((8, 8, 3))
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(layers.Conv2D(2, 3)(image / 127.5 - 1.0))))
    network = open_model(model)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")


def test_the_weights_hash_is_of_weights_alone():
    def build(seed):
        return models.seeded(
            keras.Sequential(
                [
                    layers.Input((8, 8, 3)),
                    layers.Conv2D(2, 3),
                    layers.Dropout(0.5, seed=seed),
                    layers.Flatten(),
                    layers.Dense(2),
                ]
            )
        )

    one, other = open_model(build(1)), open_model(build(2))
    assert one.weights_sha256() == other.weights_sha256()
    assert one.parameters == one.model.count_params()


def test_the_user_can_say_what_the_outputs_are():
    model = models.plain(classes=3, head="sigmoid")
    assert open_model(model, head="linear").head.linear
    with pytest.raises(UsageError, match="softmax"):
        open_model(model, head="relu")
    with pytest.raises(UsageError, match="open already"):
        open_model(open_model(model), head="linear")


# -- passes of the ascent: other precision, folded norms, without a non-linearity ------------------------


def normed(policy=None):
    """Norms whose statistics are not trivial, in a nested model too; a convolution with an activation of its own."""
    image = layers.Input((12, 12, 3))
    inner = keras.Sequential(
        [layers.Input((12, 12, 6)), layers.BatchNormalization(scale=False, name="norm2"), layers.ReLU(name="relu2")],
        name="inner",
    )
    x = layers.Conv2D(6, 3, padding="same", name="conv1")(image)
    x = inner(layers.BatchNormalization(center=False, name="norm1")(x))
    x = layers.Conv2D(5, 3, activation="relu", name="conv2")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="out")(x), name="normed")
    rng = np.random.default_rng(3)
    for weight in model.weights:
        low = 0.3 if "variance" in weight.path or "gamma" in weight.path else -0.7
        weight.assign(rng.uniform(low, 1.0, weight.shape))
    return model


def passed(network, x, record, **options):
    program = network.compile(lambda run, x: dict(run(x, Pass(record=tuple(record), **options)).activations))
    return {path: network.numpy(found) for path, found in program(network.tensor(x)).items()}


def gradient_of_sum(network, path, x, **options):
    def program(run, x):
        def score(x):
            return network.ops.sum(run(x, Pass(record=(path,), stop=True, **options)).activations[path]), ()

        return network.value_and_grad(score)(x)[1]

    return network.numpy(network.compile(program)(network.tensor(x)))


def test_folded_norms_are_the_norms():
    network = open_model(normed())
    x, paths = images(network), ("norm1", "inner/norm2", "conv2")
    plain, folded = passed(network, x, paths), passed(network, x, paths, folded=True)
    for path in paths:
        np.testing.assert_allclose(folded[path], plain[path], rtol=1e-4, atol=1e-4 * np.abs(plain[path]).max())
    one, other = (gradient_of_sum(network, "conv2", x, **options) for options in ({}, {"folded": True}))
    np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max())
    assert np.abs(one).max() > 0


def mobile():
    """Convolutions of each kind with a norm behind them, and two that keep theirs apart: one is used twice."""
    image = layers.Input((12, 12, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(name="conv_norm")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", use_bias=False, name="depth")(x)
    x = layers.ReLU()(layers.BatchNormalization(center=False, name="depth_norm")(x))
    x = layers.BatchNormalization(name="grouped_norm")(layers.Conv2D(6, 1, groups=3, name="grouped")(x))
    twice, norm = layers.Conv2D(6, 1, name="twice"), layers.BatchNormalization(name="twice_norm")
    x = layers.Add(name="add")([norm(twice(x)), twice(layers.ReLU()(x))])
    model = keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)), name="mobile")
    rng = np.random.default_rng(4)
    for weight in model.weights:
        low = 0.3 if "variance" in weight.path or "gamma" in weight.path else -0.7
        weight.assign(rng.uniform(low, 1.0, weight.shape))
    return model


def test_norms_are_taken_into_convolutions_of_every_kind():
    model = mobile()
    network = open_model(model)
    before = [np.array(weight) for weight in network.weights()]
    x, paths = images(network), ("conv_norm", "depth_norm", "grouped_norm", "add")
    plain, folded = passed(network, x, paths), passed(network, x, paths, folded=True)
    (folds,) = network._folds.values()
    assert [fold.conv.path for fold in folds] == ["conv", "depth", "grouped"]
    for path in paths:
        np.testing.assert_allclose(folded[path], plain[path], rtol=1e-4, atol=1e-4 * np.abs(plain[path]).max())
    one, other = (gradient_of_sum(network, "add", x, **options) for options in ({}, {"folded": True}))
    np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max())
    # What is looked at stays what it is.
    tapped = ("conv", "conv_norm", "depth")
    plain, folded = passed(network, x, tapped), passed(network, x, tapped, folded=True)
    for path in tapped:
        np.testing.assert_allclose(folded[path], plain[path], rtol=1e-4, atol=1e-4 * np.abs(plain[path]).max())
    for weight, was in zip(network.weights(), before, strict=True):
        np.testing.assert_array_equal(weight, was)
    assert not any("call" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("size", [(20, 20), (21, 26), (25, 19)])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (5, 3), ((6, 5), 2), (11, 4)])
def test_a_convolution_over_blocks_is_the_strided_one(kernel, stride, size, padding):
    image = layers.Input((*size, 3))
    x = layers.Conv2D(4, kernel, strides=stride, padding=padding, activation="elu", name="first")(image)
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 1, name="second")(x))
    model = models.seeded(keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))))
    assert list(map(keras_folds.strides_over_image, model.layers)).count(True) == 1
    x, first = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32), model.get_layer("first")

    plain = first(x)
    weights = keras.ops.convert_to_tensor(np.random.default_rng(3).normal(size=plain.shape).astype(np.float32))
    with ExitStack() as undo:
        keras_folds.first_in_blocks(undo, model.layers)
        found = first(x)
        slope = slope_of(lambda x: keras.ops.sum(first(x) * weights), x)
    np.testing.assert_allclose(to_numpy(found), to_numpy(plain), atol=1e-5)
    np.testing.assert_allclose(slope, slope_of(lambda x: keras.ops.sum(first(x) * weights), x), atol=1e-5)
    assert "call" not in vars(first)


def slope_of(function, x):
    backend = backend_named(keras.backend.backend())
    return to_numpy(backend.value_and_grad(lambda x: (function(x), ()))(backend.tensor(x))[1])


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_a_pass_in_bfloat16_is_near_and_its_records_are_float32():
    model = normed()
    network = open_model(model)
    before = [(layer, layer.dtype_policy, vars(layer).get("call")) for layer in model._flatten_layers()]
    x, paths = images(network), ("conv1", "norm1", "conv2")
    exact = passed(network, x, paths)
    for folded in (False, True):
        near = passed(network, x, paths, precision="bfloat16", folded=folded)
        for path in paths:
            assert near[path].dtype == np.float32
            scale = np.abs(exact[path]).max()
            assert 1e-5 * scale < np.abs(near[path] - exact[path]).max() < 0.05 * scale
    for layer, policy, call in before:
        assert layer.dtype_policy is policy
        assert vars(layer).get("call") is call
    np.testing.assert_array_equal(passed(network, x, paths)["conv2"], exact["conv2"])


def test_a_model_of_mixed_precision_keeps_its_own():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = normed()
    finally:
        keras.config.set_dtype_policy("float32")
    assert open_model(model).precision_for_ascent() == "float32"


def test_a_pass_without_a_non_linearity_records_what_comes_before_it():
    model = normed()
    network = open_model(model)
    x = images(network)
    before = passed(network, x, ("inner/norm2", "inner/relu2"))
    kernel, bias = map(keras.ops.convert_to_numpy, model.get_layer("conv2").weights)
    by_hand = keras.ops.convert_to_numpy(keras.ops.conv(before["inner/relu2"], kernel)) + bias
    found = passed(network, x, ("conv2",), preactivations=("conv2",))["conv2"]
    np.testing.assert_allclose(found, by_hand, atol=1e-4 * np.abs(by_hand).max())
    assert found.min() < 0
    lifted = passed(network, x, ("inner/relu2",), preactivations=("inner/relu2",))["inner/relu2"]
    np.testing.assert_allclose(lifted, before["inner/norm2"], rtol=1e-5, atol=1e-6)
    can = {path: network.nonlinearities(path) for path in ("conv1", "norm1", "inner/relu2", "conv2")}
    assert can == {"conv1": (), "norm1": (), "inner/relu2": ("inner/relu2",), "conv2": ("conv2",)}
    assert passed(network, x, ("conv2",))["conv2"].min() == 0


def test_what_is_made_from_another_non_linearity_is_not_seen_before_both():
    """Without the first the second would be another; and a sum or a product is no join."""
    image = layers.Input((8, 8, 3))
    early = layers.Conv2D(4, 3, padding="same", activation="relu", name="early")(image)
    late = layers.Conv2D(4, 3, padding="same", activation="relu", name="late")(early)
    joined = layers.Concatenate(name="joined")([early, late])
    product = layers.Multiply(name="product")([early, late])
    model = keras.Model(image, layers.Flatten()(layers.Add(name="sum")([product, layers.Conv2D(4, 1)(joined)])))
    network = open_model(models.seeded(model))
    assert [network.nonlinearities(path) for path in ("joined", "product", "sum", "late")] == [(), (), (), ("late",)]


def test_what_joins_and_pools_nonlinearities_is_seen_before_them():
    image = layers.Input((8, 8, 3))
    one = layers.Conv2D(4, 3, activation="relu", name="one")(image)
    other = layers.ReLU(name="relu")(layers.Conv2D(4, 3, name="other")(image))
    joined = layers.Concatenate(name="joined")([one, other])
    pooled = layers.MaxPooling2D(name="pooled")(layers.Dropout(0.5)(joined))
    last = layers.Conv2D(2, 1, name="last")(pooled)
    network = open_model(models.seeded(keras.Model(image, layers.Flatten()(last))))
    assert network.nonlinearities("pooled") == network.nonlinearities("joined") == ("one", "relu")
    assert network.nonlinearities("last") == ()
    x = images(network)
    before = passed(network, x, ("joined", "other"), preactivations=network.nonlinearities("joined"))
    assert before["joined"][..., :4].min() < 0
    np.testing.assert_allclose(before["joined"][..., 4:], before["other"], rtol=1e-6)


# -- outputs that are not a row for each image -----------------------------------------------------------


@pytest.mark.parametrize("change", [lambda x: x[:0], lambda x: x[:1], lambda x: keras.ops.concatenate([x, x])])
def test_a_layer_or_an_output_without_a_row_for_each_image_is_refused(change):
    class Change(keras.layers.Layer):
        def call(self, x):
            return change(x)

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((16, 16, 3))
    changed = Change(name="change")(keras.layers.Conv2D(4, 3, name="conv")(inputs))
    outputs = keras.layers.GlobalAveragePooling2D()(changed)
    network = convscope.open_model(keras.Model(inputs, outputs))
    images = [np.zeros((16, 16, 3), np.uint8)] * 3
    assert convscope.activations(network, images, ":1").arrays["conv"].shape == (3, 14, 14, 4)
    for refused in (
        lambda: network.predict(np.zeros((3, 16, 16, 3), np.float32)),
        lambda: convscope.heatmap(network, images, layer="change"),
        lambda: convscope.filters(network, "change", [0], steps=1, size=16),
    ):
        with pytest.raises(ModelError) as error:
            refused()
        assert error.value.code == "not-per-image"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.function is TensorFlow's")
def test_tensorflow_does_not_warn_of_many_programs():
    """It counts traces by code, and all programs have the same."""
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    network = convscope.open_model(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)]))
    x = np.zeros((1, 8, 8, 3), np.float32)
    logging.getLogger("tensorflow").addHandler(handler)
    try:
        for factor in range(12):
            network.program(_times, factor)(network.tensor(x))
    finally:
        logging.getLogger("tensorflow").removeHandler(handler)
    assert [warning for warning in warnings if "retracing" in warning] == []


def _times(network, factor):
    path = network.layers[0].path
    return lambda run, x: factor * run(x, Pass(record=(path,), stop=True)).activations[path]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends take any name")
def test_a_name_that_no_graph_may_have_is_one_clear_error():
    inner = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(4, 3, name="conv")], name="inner\\")
    image = keras.Input((12, 12, 3))
    model = keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(inner(image))))
    network = open_model(model, preprocess="0..1", head="linear")
    with pytest.raises(ModelError, match="Rename that layer") as caught:
        network.predict(np.zeros((1, 12, 12, 3), np.float32))
    assert caught.value.code == "layer-name-invalid"
