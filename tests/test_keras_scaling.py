"""The scaling that a Keras model does on its own input: the network's outputs are those of the model on raw pixels."""

import json
import zipfile

import models
import numpy as np
import pytest
from expecting import raises

import convscope
from convscope.errors import ModelError
from convscope.networks.formats.keras import lambdas
from convscope.networks.formats.keras.legacy_h5.code import code_layers
from convscope.networks.preprocessing import PRESETS

keras = models.keras
layers, ops, applications = keras.layers, keras.ops, keras.applications

SIDE = 16


class HalfRange(layers.Layer):
    """A step of one's own that is an affine map."""

    def call(self, x):
        return x / 127.5 - 1


class Whitened(layers.Layer):
    """A step of one's own whose values tell nothing of the pixels."""

    def call(self, x):
        return ops.sign(x - ops.mean(x, axis=(1, 2), keepdims=True))


def depthwise(x):
    constant = keras.initializers.Constant
    made = layers.DepthwiseConv2D(1, depthwise_initializer=constant(1 / 127.5), bias_initializer=constant(-1))
    return made(x)


def from_caffe(x):
    """From the values of the caffe mode to -1..1, red first."""
    return ops.flip(x, -1) / 127.5 + ops.convert_to_tensor(
        [123.68 / 127.5 - 1, 116.779 / 127.5 - 1, 103.939 / 127.5 - 1]
    )


# First steps, with the range of pixels that each is written for.
FIRST = {
    "mode tf": (applications.mobilenet.preprocess_input, "none"),
    "mode caffe": (applications.resnet50.preprocess_input, "none"),
    "mode torch": (applications.densenet.preprocess_input, "none"),
    "caffe, then back": (lambda x: from_caffe(applications.vgg16.preprocess_input(x)), "none"),
    "named Lambda": (lambda x: layers.Lambda(applications.resnet50.preprocess_input)(x), "none"),
    "own Lambda": (lambda x: layers.Lambda(lambda v: v / 127.5 - 1)(x), "none"),
    "own layer": (lambda x: HalfRange()(x), "none"),
    "cast": (lambda x: ops.cast(x, "float32") / 127.5 - 1, "none"),
    "resized": (lambda x: ops.image.resize(x, (20, 20)) / 127.5 - 1, "none"),
    "resized by a layer": (lambda x: layers.Rescaling(1 / 255)(layers.Resizing(20, 20)(x)), "none"),
    "augmented": (lambda x: layers.Rescaling(1 / 127.5, -1)(layers.RandomZoom(0.1)(layers.RandomFlip()(x))), "none"),
    "augmented inside": (
        lambda x: keras.Sequential([layers.RandomRotation(0.1), layers.Rescaling(1 / 255), layers.RandomContrast(0.2)])(
            x
        ),
        "none",
    ),
    "padded": (lambda x: layers.ZeroPadding2D(2)(x) / 127.5 - 1, "none"),
    "cropped": (lambda x: layers.Cropping2D(((3, 0), (0, 1)))(x) / 255.0, "none"),
    "Subtract": (lambda x: layers.Subtract()([x, ops.ones_like(x) * 127.5]) / 127.5, "none"),
    "clipped": (lambda x: ops.clip(x, 0, 255) / 127.5 - 1, "none"),
    "clipped only": (lambda x: ops.clip(x, 0.0, 1.0), "0..1"),
    "depthwise": (depthwise, "none"),
    "flipped": (lambda x: ops.flip(x, -1) / 255.0, "none"),
    "sliced": (lambda x: ops.take(x, [2, 1, 0], axis=-1) - ops.convert_to_tensor([103.939, 116.779, 123.68]), "none"),
    "Normalization": (lambda x: layers.Normalization(mean=[0.48, 0.45, 0.41], variance=[0.05, 0.05, 0.05])(x), "0..1"),
    "two layers": (lambda x: layers.Rescaling(2.0, -1)(layers.Rescaling(1 / 255)(x)), "none"),
    "grey to RGB": (lambda x: layers.Concatenate()([x / 255.0] * 3)[..., 2:5], "none"),
}


def wrapped(first, **options):
    keras.utils.set_random_seed(3)
    image = layers.Input((SIDE, SIDE, 3))
    core = keras.Sequential(
        [
            *(layers.Conv2D(5, 3, activation="relu", name="conv"), layers.GlobalAveragePooling2D()),
            layers.Dense(4, activation="softmax", name="dense"),
        ],
        name="core",
    )
    return keras.Model(image, core(first(image)), **options)


def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.float32)


def probabilities(network):
    logits = network.predict(network.preprocessing.apply(pixels())).astype(np.float64)
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("case", FIRST)
def test_a_model_that_scales_gets_the_pixels_that_it_is_written_for(case):
    first, taken = FIRST[case]
    model = wrapped(first)
    network = convscope.open_model(model)
    assert (network.preprocessing.name, network.preprocessing.certainty) == (taken, "found")
    own = keras.ops.convert_to_numpy(model(PRESETS[taken].apply(pixels()), training=False))
    np.testing.assert_allclose(probabilities(network), own, rtol=1e-3, atol=1e-5)


class Unseen(keras.Model):
    """A model whose arithmetic is in its own `call`, where no operation of Keras is called."""

    def __init__(self, core):
        super().__init__(name="mobilenet")
        self.core = core

    def call(self, x):
        return self.core(x / 127.5 - 1)


class AroundAnother(layers.Layer):
    """A step of one's own that calls a layer of Keras, and computes beside it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = layers.Rescaling(1 / 127.5)

    def call(self, x):
        return self.inner(x) - 1


def unseen():
    model = Unseen(wrapped(lambda x: x))
    model(pixels())
    return model


@pytest.mark.parametrize("make", [unseen, lambda: wrapped(lambda x: AroundAnother()(x), name="mobilenet")])
def test_before_code_that_is_not_seen_nothing_is_guessed(make):
    model = make()
    network = convscope.open_model(model)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "guess")
    assert "is not known" in network.preprocessing.reason
    own = keras.ops.convert_to_numpy(model(pixels(), training=False))
    np.testing.assert_allclose(probabilities(network), own, rtol=1e-3, atol=1e-5)


def test_a_cast_that_keras_makes_on_its_own_hides_no_scaling():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        scaled, plain = wrapped(lambda x: layers.Rescaling(1 / 127.5, -1)(x)), wrapped(lambda x: x, name="mobilenet")
        clipped = wrapped(lambda x: ops.clip(x, -1000, 1000), name="mobilenet")
    finally:
        keras.config.set_dtype_policy(before)
    assert convscope.open_model(scaled).preprocessing.certainty == "found"
    assert convscope.open_model(plain).preprocessing.name == "-1..1"
    assert convscope.open_model(clipped).preprocessing.name == "-1..1"
    image = layers.Input((SIDE, SIDE, 3), dtype="uint8")
    whole = keras.Model(image, wrapped(lambda x: x)(ops.cast(image, "float32") / 127.5 - 1))
    assert convscope.open_model(whole).preprocessing.certainty == "found"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="an assertion of TensorFlow's")
@pytest.mark.parametrize("place", ["in a layer", "in the model"])
def test_a_model_that_refuses_other_values_than_its_own_opens(place):
    """It takes values up to 1; the trials of opening have others."""
    import tensorflow as tf

    def refusing(x):
        with tf.control_dependencies([tf.debugging.assert_less_equal(x, 1.0)]):
            return tf.identity(x)

    class Refusing(layers.Layer):
        def call(self, x):
            return refusing(x)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = layers.Conv2D(4, 3), layers.GlobalAveragePooling2D()

        def call(self, x):
            return self.pool(self.conv(refusing(x)))

    image = layers.Input((SIDE, SIDE, 3))
    whole = keras.Model(image, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(Refusing()(image))))
    model = whole if place == "in a layer" else Model()
    model(np.zeros((1, SIDE, SIDE, 3), np.float32))
    network = convscope.open_model(model, size=None if place == "in a layer" else SIDE)
    x = np.random.default_rng(0).random((1, SIDE, SIDE, 3)).astype(np.float32)
    np.testing.assert_allclose(network.predict(x), ops.convert_to_numpy(model(x)), rtol=1e-4, atol=1e-5)


def test_before_a_step_whose_values_tell_nothing_nothing_is_guessed():
    network = convscope.open_model(wrapped(lambda x: Whitened(name="mine")(x), name="mobilenet"))
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "guess")
    assert "is not known" in network.preprocessing.reason
    assert "mine" in network.preprocessing.reason


@pytest.mark.parametrize(("family", "order"), [("vgg16", "rgb"), ("mobilenet", "bgr")])
def test_a_flip_alone_changes_what_the_family_of_a_model_takes(family, order):
    """What enters the first convolution is what the family takes, written out here."""
    model = wrapped(lambda x: ops.flip(x, -1), name=family)
    network = convscope.open_model(model)
    assert network.preprocessing.describe()["order"] == order
    values = pixels()
    if family == "vgg16":
        expected = values[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32)
    else:
        expected = values / 127.5 - 1
    np.testing.assert_allclose(network.preprocessing.apply(values)[..., ::-1], expected, rtol=1e-4, atol=1e-4)


# -- preprocess_input in a Lambda ----------------------------------------------------------------------------

FUNCTIONS = {
    "mobilenet": applications.mobilenet.preprocess_input,
    "resnet50": applications.resnet50.preprocess_input,
    "densenet": applications.densenet.preprocess_input,
}


def saved(model, path):
    model.save(path)
    return str(path)


def in_lambda(function, **options):
    return lambda x: layers.Lambda(function, name="prepare", **options)(x)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("family", FUNCTIONS)
def test_a_lambda_with_a_function_of_keras_applications_opens_without_trust(family, ending, tmp_path):
    model = wrapped(in_lambda(FUNCTIONS[family]), name=f"my_{family}")
    network = convscope.open_model(saved(renamed(model, family), tmp_path / f"model.{ending}"))
    own = keras.ops.convert_to_numpy(model(pixels(), training=False))
    np.testing.assert_allclose(probabilities(network), own, rtol=1e-3, atol=1e-5)
    assert network.preprocessing.certainty == "found"
    assert any("'prepare'" in note for note in network.source.notes)


def renamed(model, family):
    model.name = family
    return model


@pytest.mark.parametrize("trust", [False, True])
def test_where_nothing_tells_which_function_is_meant_it_is_refused(trust, tmp_path):
    path = saved(wrapped(in_lambda(FUNCTIONS["mobilenet"]), name="mine"), tmp_path / "model.keras")
    with raises(ModelError, "function-ambiguous", names=["prepare"]):
        convscope.open_model(path, trust=trust)


def test_the_advice_for_a_function_that_is_not_told_leads_on(tmp_path, monkeypatch):
    model = wrapped(in_lambda(FUNCTIONS["densenet"]), name="mine")
    path = saved(model, tmp_path / "model.keras")
    monkeypatch.setitem(keras.saving.get_custom_objects(), "preprocess_input", FUNCTIONS["densenet"])
    network = convscope.open_model(path)
    own = keras.ops.convert_to_numpy(model(pixels(), training=False))
    np.testing.assert_allclose(probabilities(network), own, rtol=1e-3, atol=1e-5)


def test_a_mode_among_the_arguments_tells_the_function(tmp_path):
    general = applications.imagenet_utils.preprocess_input
    model = wrapped(in_lambda(general, arguments={"mode": "torch"}), name="mine")
    network = convscope.open_model(saved(model, tmp_path / "model.keras"))
    own = keras.ops.convert_to_numpy(model(pixels(), training=False))
    np.testing.assert_allclose(probabilities(network), own, rtol=1e-3, atol=1e-5)


def changed(path, change):
    """The archive with the config of its Lambda changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    layer = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Lambda")
    change(layer["config"])
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


HOSTILE = {
    "another function": lambda config: config["function"].update(config="system", module="os"),
    "a module that only looks right": lambda config: config["function"].update(config="load_img", module="keras.utils"),
    "code as the shape": lambda config: config.update(
        mask={"class_name": "__lambda__", "config": {"code": "4wAAAA==", "defaults": None, "closure": None}}
    ),
    "an object among the arguments": lambda config: config.update(
        arguments={"mode": {"class_name": "TFSMLayer", "module": "keras.layers", "config": {"filepath": "/tmp"}}}
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_else_a_lambda_may_hold_needs_trust(case, tmp_path):
    path = saved(wrapped(in_lambda(FUNCTIONS["mobilenet"]), name="mobilenet"), tmp_path / "model.keras")
    with raises(ModelError, "needs-trust"):
        convscope.open_model(changed(path, HOSTILE[case]))


def test_the_module_that_a_file_names_is_compared_and_never_imported(tmp_path):
    """Keras 2 stores the module of a function; here it is one that doesn't exist, and one on the list."""
    path = saved(wrapped(in_lambda(FUNCTIONS["mobilenet"]), name="mine"), tmp_path / "model.keras")
    with raises(ModelError, "needs-trust"):
        convscope.open_model(changed(path, lambda config: config["function"].update(module="mobilenet")))
    module = "keras.src.applications.mobilenet"
    network = convscope.open_model(changed(path, lambda config: config["function"].update(module=module)))
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")


@pytest.mark.parametrize("module", ["mylib.prep", "__main__", "keras.applications.mobilenet.mine", "vgg16", ""])
@pytest.mark.parametrize("arguments", [{}, {"mode": "caffe"}])
def test_a_function_of_ones_own_is_not_taken_for_one_of_keras_applications(tmp_path, monkeypatch, module, arguments):
    """Neither a model's name nor an argument decides where the file names another module."""
    planted = tmp_path / "mylib"
    planted.mkdir()
    (planted / "__init__.py").write_text("")
    (planted / "prep.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = saved(wrapped(in_lambda(FUNCTIONS["resnet50"]), name="vgg16"), tmp_path / "model.keras")

    def change(config):
        config["function"]["module"] = module
        config["arguments"] = arguments

    with raises(ModelError, "needs-trust"):
        convscope.open_model(changed(path, change))
    assert not (tmp_path / "imported").exists()
    # With trust it goes to Keras as it is, and what is rewritten is none of it.
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    assert lambdas.resolved(config, "model.keras", False) == (config, ())


@pytest.mark.parametrize("module", ["mylib.prep", "__main__", "vgg16"])
def test_a_function_of_ones_own_in_a_file_of_keras_2(module):
    """There the module lies beside the name."""
    config = {"name": "prepare", "function": "preprocess_input", "function_type": "function", "arguments": {}}
    inner = {"class_name": "Model", "config": {"name": "vgg16", "layers": []}}
    prepare = {"class_name": "Lambda", "config": {**config, "module": module}}
    whole = {"class_name": "Sequential", "config": {"name": "mine", "layers": [prepare, inner]}}
    assert lambdas.resolved(whole, "model.h5", False) == (whole, ())
    assert list(code_layers(whole, "")) == [("Lambda", "prepare", False)]
    prepare["config"]["module"] = "tf_keras.src.applications.vgg16"
    changed_config, notes = lambdas.resolved(whole, "model.h5", False)
    function = changed_config["config"]["layers"][0]["config"]["function"]
    assert (function["module"], function["config"]) == ("keras.applications.vgg16", "preprocess_input")
    assert len(notes) == 1
