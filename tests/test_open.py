"""Opening: names of classes, backends, `keras:` names, files under any name, preprocessing, and choosing layers."""

import hashlib
import json
import os
import subprocess
import sys

import models
import numpy as np
import pytest
from expecting import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from models import keras, layers

from convscope import open_model
from convscope.errors import ModelError, UsageError, nearest, one_line
from convscope.networks import BACKENDS, read_class_names
from convscope.networks.layers import Layer, find_layer, select_layers
from convscope.networks.preprocessing import FAMILIES, PRESETS, Preprocessing, family_of, parse

# -- class names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "cat\nsea lion\ndog\n",
        "\ufeffcat\r\n\r\n  sea lion \r\ndog",
        '["cat", "sea lion", "dog"]',
        '[["n1", "cat"], ["n2", "sea lion"], ["n3", "dog"]]',
        '{"0": "cat", "1": "sea lion", "2": "dog"}',
        '{"2": "dog", "0": "cat", "1": "sea lion"}',
        '{"0": ["n1", "cat"], "1": ["n2", "sea lion"], "2": ["n3", "dog"]}',
        '{"cat": 0, "dog": 2, "sea lion": 1}',
    ],
)
def test_class_names_in_every_form(tmp_path, text):
    path = tmp_path / "names"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_class_names(path) == ("cat", "sea lion", "dog")
    assert read_class_names(str(path)) == ("cat", "sea lion", "dog")


def test_class_names_in_memory():
    assert read_class_names(["cat", 7]) == ("cat", "7")
    assert read_class_names(None) is None


@pytest.mark.parametrize("text", ['{"0": "cat", "2": "dog"}', '{"cat": 0, "dog": 0}', '["cat"', '{"a": "b"}', "{}}"])
def test_class_names_with_a_gap_are_refused(tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(UsageError, match=r"names\.json are not understood"):
        read_class_names(tmp_path / "names.json")


def test_class_names_that_are_no_text(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    for path, reason in (("names.txt", "not UTF-8"), ("nowhere", "No such file"), ("", "director")):
        with pytest.raises(UsageError, match=reason):
            read_class_names(tmp_path / path)


# -- which backend ---------------------------------------------------------------------------------------

CHOOSE = """
import importlib.util, os, sys
real = importlib.util.find_spec
missing = os.environ["MISSING"].split()
importlib.util.find_spec = lambda name, *rest: None if name in missing else real(name, *rest)
for name in os.environ["IMPORTED"].split():
    __import__(name)
from convscope.errors import ConvscopeError
from convscope.networks import choose_backend
try:
    print(choose_backend(os.environ.get("ASKED")), os.environ["KERAS_BACKEND"], sorted(set(sys.modules) & set(SOME)))
except ConvscopeError as error:
    print(type(error).__name__, error)
""".replace("SOME", repr((*BACKENDS, "keras")))

KERAS_3 = "import os\nclass config:\n    backend = staticmethod(lambda: os.environ.get('KERAS_BACKEND'))\n"


@pytest.fixture
def choose(tmp_path):
    """What `choose_backend` chooses or says in a process whose Keras and backends are empty modules."""
    for name in BACKENDS:
        (tmp_path / f"{name}.py").write_text("")

    def chosen(asked=None, variable=None, imported="", missing="", keras=KERAS_3):
        (tmp_path / "keras.py").write_text(keras)
        environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
        places = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": places, "IMPORTED": imported, "MISSING": missing}
        environment |= {"ASKED": asked} if asked else {}
        environment |= {"KERAS_BACKEND": variable} if variable is not None else {}
        command = [sys.executable, "-c", CHOOSE]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    return chosen


FIRST, SECOND, THIRD = BACKENDS


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, FIRST),
        ({"missing": FIRST}, SECOND),
        ({"variable": ""}, FIRST),
        ({"imported": THIRD}, THIRD),
        ({"imported": THIRD, "variable": SECOND}, SECOND),
        ({"imported": THIRD, "variable": SECOND, "asked": FIRST}, FIRST),
        ({"imported": "keras", "variable": SECOND}, SECOND),
    ],
)
def test_the_backend_is_asked_for_then_set_then_imported_then_installed(choose, conditions, expected):
    loaded = sorted({"keras", *conditions.get("imported", "").split()})
    assert choose(**conditions) == f"{expected} {expected} {loaded}"


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"asked": "jax", "missing": "jax"}, ["BackendError", "needs jax", "pip install 'convscope[jax]'"]),
        ({"asked": "torch", "missing": "keras"}, ["BackendError", "needs keras", "'convscope[keras-torch]'"]),
        ({"missing": " ".join(BACKENDS)}, ["BackendError", "no backend", "convscope[tensorflow]", "convscope[jax]"]),
        ({"asked": "caffe"}, ["UsageError", "'caffe'", "expected one of"]),
        ({"variable": "numpy"}, ["BackendError", "'numpy'", "backend="]),
        ({"asked": "jax", "imported": "keras", "variable": "torch"}, ["BackendError", "'torch'", "KERAS_BACKEND=jax"]),
        ({"keras": "__version__ = '2.15.0'"}, ["BackendError", "found Keras 2.15.0", "pip install"]),
        ({"keras": "raise ImportError('libcuda.so.1')"}, ["BackendError", "libcuda.so.1", "--force-reinstall"]),
    ],
)
def test_what_is_said_where_there_is_no_such_backend(choose, conditions, words):
    said = choose(**conditions)
    assert len(said.splitlines()) == 1
    assert all(word in said for word in words)


# -- keras:NAME ------------------------------------------------------------------------------------------


def tiny_net(weights="imagenet", input_shape=(8, 8, 3), include_top=True, classes=4, note=""):
    x = inputs = layers.Input(input_shape)
    x = layers.Conv2D(3, 3, name="conv")(x)
    if include_top:
        x = layers.Dense(classes, activation="softmax", name="out")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x, name=f"tiny{note}")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(keras.applications, "TinyNet", tiny_net, raising=False)


def test_a_query_gives_the_arguments(tiny):
    network = open_model("keras:TinyNet?weights=none&classes=7&input_shape=(10,12,3)&note=-a_b")
    assert network.inputs.size == (10, 12)
    assert network.head.classes == 7
    assert network.name == "tiny-a_b"
    assert any("random weights" in note for note in network.source.notes)
    assert [layer.path for layer in open_model("keras:TinyNet?weights=none&include_top=False").layers] == ["conv"]


def test_random_weights_are_the_same_each_time_and_leave_the_users_draws_alone(tiny):
    np.random.seed(5)
    expected = np.random.uniform(size=2)
    np.random.seed(5)
    first = np.random.uniform()
    one = open_model("keras:TinyNet?weights=none")
    assert (first, np.random.uniform()) == tuple(expected)
    keras.utils.set_random_seed(7)
    assert open_model("keras:TinyNet?weights=none").weights_sha256() == one.weights_sha256()


def test_weights_are_those_of_imagenet_if_nothing_is_said(tiny, monkeypatch):
    seen = {}

    def recording(weights, classes=4):
        seen.update(weights=weights)
        return tiny_net(classes=classes)

    monkeypatch.setattr(keras.applications, "TinyNet", recording)
    open_model("keras:TinyNet")
    assert seen == {"weights": "imagenet"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keras:TinyNets", ["no 'TinyNets'", "did you mean 'TinyNet'"]),
        ("keras:tinynet", ["no 'tinynet'", "did you mean 'TinyNet'"]),
        ("keras:", ["no ''"]),
        ("keras:TinyNet?clases=3", ["no argument 'clases'", "did you mean 'classes'"]),
        ("keras:TinyNet?classes=many", ["TinyNet refuses these arguments"]),
        ("keras:imagenet_utils", ["no 'imagenet_utils'"]),
    ],
)
def test_names_and_arguments_that_there_are_not(tiny, name, words):
    with pytest.raises(UsageError) as caught:
        open_model(name)
    assert all(word in str(caught.value) for word in words)


def test_an_application_knows_its_preprocessing():
    network = open_model("keras:MobileNet?weights=none&alpha=0.25&input_shape=(32,32,3)")
    assert network.preprocessing.name == "-1..1"
    assert network.preprocessing.certainty == "found"
    assert network.class_names is None  # random weights know no classes


def test_each_family_preprocesses_as_keras_does():
    """Every application's own `preprocess_input` against the preset of its family."""
    image = np.random.default_rng(0).uniform(0, 255, (1, 4, 5, 3)).astype(np.float32)
    checked = set()
    for name, function in vars(keras.applications).items():
        family = family_of(name)
        if family is None or not callable(function):
            continue
        module = sys.modules[function.__module__]
        expected = keras.ops.convert_to_numpy(module.preprocess_input(image.copy(), data_format="channels_last"))
        np.testing.assert_allclose(PRESETS[family.preset].apply(image), expected, atol=2e-4, err_msg=name)
        checked.add(family)
    assert checked == set(FAMILIES)


# -- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.keras", "model.bin", "model", "model.h5"])
def test_a_file_holds_the_model_whatever_its_name(tmp_path, name):
    model = models.plain()
    model.save(tmp_path / "saved.keras")
    path = (tmp_path / "saved.keras").rename(tmp_path / name)
    network = open_model(path)
    x = np.random.default_rng(0).uniform(0, 1, (2, 16, 16, 3)).astype(np.float32)
    expected = models.ones_with(model, x)
    np.testing.assert_allclose(network.head.probabilities(network.predict(x)), expected, atol=1e-6)
    assert network.weights_sha256() == open_model(model).weights_sha256()
    assert network.source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert network.source.notes == (f"archive of Keras {keras.__version__}",)


def test_a_network_is_opened_already():
    network = open_model(models.plain())
    assert open_model(network) is network
    assert network.source.sha256 is None


def test_code_is_refused_without_trust(tmp_path):
    code = layers.Lambda(lambda x: x * 2, name="code")
    stack = [layers.Input((8, 8, 3)), layers.Conv2D(2, 3), code, layers.GlobalAveragePooling2D(), layers.Dense(2)]
    keras.Sequential(stack).save(tmp_path / "code.keras")
    with pytest.raises(ModelError, match=r"Lambda.*'code'.*trust=True"):
        open_model(tmp_path / "code.keras")
    assert "code" in [layer.path for layer in open_model(tmp_path / "code.keras", trust=True).layers]


def test_class_names_have_to_be_as_many_as_classes():
    assert open_model(models.plain(), classes=list("abcde")).class_names == tuple("abcde")
    with pytest.raises(UsageError, match="expected 5 class names for plain, found 2"):
        open_model(models.plain(), classes=["cat", "dog"])


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("one\ntwo", "one"),
        ("", "ValueError"),
        ("\n \n  two  \n", "two"),
        ("Exception encountered when calling Conv2D.call().\n\n\x1b[1mtoo small\x1b[0m\n\nArguments", "too small"),
        ("Sequential could not\n\nException encountered: Lambda could not\n\nException encountered: why", "why"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_what_another_library_says_in_one_line(said, line):
    assert one_line(ValueError(said)) == line


# -- preprocessing ---------------------------------------------------------------------------------------

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
FORMULAS = {
    "none": lambda rgb: rgb,
    "0..1": lambda rgb: rgb / 255,
    "-0.5..0.5": lambda rgb: rgb / 255 - 0.5,
    "-1..1": lambda rgb: rgb / 127.5 - 1,
    "caffe": lambda rgb: rgb[..., ::-1] - [103.939, 116.779, 123.68],
    "torch": lambda rgb: (rgb / 255 - MEAN) / STD,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_against_their_formulas(name):
    rgb = np.random.default_rng(0).uniform(0, 255, (2, 3, 4, 3))
    x = PRESETS[name].apply(rgb.astype(np.float32))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, FORMULAS[name](rgb), rtol=1e-5, atol=1e-4)
    black, white = PRESETS[name].range(3)
    np.testing.assert_allclose(black, FORMULAS[name](np.zeros(3)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(white, FORMULAS[name](np.full(3, 255.0)), rtol=1e-5, atol=1e-4)


NUMBERS = st.floats(-500, 500, width=32)
DEVIATIONS = st.floats(0.125, 500, width=32)
TRIPLES = st.tuples(NUMBERS, NUMBERS, NUMBERS)
SETTINGS = st.one_of(
    st.sampled_from(list(PRESETS.values())),
    st.builds(Preprocessing, st.just("mean,std"), st.tuples(NUMBERS), st.tuples(DEVIATIONS), st.booleans()),
    st.builds(Preprocessing, st.just("mean,std"), TRIPLES, st.tuples(*3 * [DEVIATIONS]), st.booleans()),
)


@settings(max_examples=200, deadline=None)
@given(SETTINGS, st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_restore_undoes_apply(preprocessing, channels, seed):
    pixels = np.random.default_rng(seed).uniform(0, 255, (2, 3, 4, channels)).astype(np.float32)
    np.testing.assert_allclose(preprocessing.restore(preprocessing.apply(pixels)), pixels, atol=1e-2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NUMBERS, DEVIATIONS), min_size=1, max_size=16))
def test_mean_and_deviation_of_each_channel_are_read(channels):
    mean, std = zip(*channels, strict=True)
    found = parse(",".join(map(str, mean + std)))
    assert (found.mean, found.std, found.bgr, found.certainty) == (mean, std, False, "set")


def _grey_or_not(channels):
    image = layers.Input((8, 8, channels))
    return keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(layers.Conv2D(3, 3)(image))))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_each_channel_has_its_own_mean_and_deviation(channels):
    mean, std = [10.0 * (number + 1) for number in range(channels)], [2.0 + number for number in range(channels)]
    network = open_model(_grey_or_not(channels), preprocess=",".join(map(str, mean + std)))
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, channels))
    found = network.preprocessing.apply(pixels.astype(np.float32))
    np.testing.assert_allclose(found, (pixels - mean) / std, rtol=1e-4, atol=1e-4)
    one = open_model(_grey_or_not(channels), preprocess="10,4").preprocessing.apply(pixels.astype(np.float32))
    np.testing.assert_allclose(one, (pixels - 10) / 4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "given"), [(1, 3), (3, 2), (2, 3), (4, 3)])
def test_numbers_for_another_number_of_channels_are_refused(channels, given):
    numbers = ",".join(["5"] * 2 * given)
    with raises(UsageError, "preprocessing-misfit", expected=channels, found=[given, given]):
        open_model(_grey_or_not(channels), preprocess=numbers)
    with raises(UsageError, "preprocessing-misfit", expected=channels, found=[1, given]):
        open_model(_grey_or_not(channels), preprocess=Preprocessing("own", (0.0,), (5.0,) * given))
    assert open_model(_grey_or_not(channels), preprocess="torch").preprocessing.name == "torch"


def test_one_mean_and_deviation_are_read():
    found = parse("127.5, 64")
    np.testing.assert_array_equal(found.apply(np.full((1, 1, 3), 255.0)), np.full((1, 1, 3), 127.5 / 64, np.float32))
    assert "127.5" in found.text
    assert parse("caffe") is PRESETS["caffe"]


@pytest.mark.parametrize(
    "text", ["", "half", "1", "1,0", "1,-2", "1,2,3", "1,2,3,0", "1,2,3,4,5", "nan,1", "1,inf", "0,0,0,1,1,0", "1;2"]
)
def test_preprocessing_that_is_not_understood(text):
    with pytest.raises(UsageError, match=r"Expected one of none, 0\.\.1"):
        parse(text)


def test_colours_are_kept_apart_and_grey_takes_their_mean():
    red = np.array([[[255, 0, 0]]], np.float32)
    assert PRESETS["caffe"].apply(red)[0, 0].argmax() == 2
    grey = PRESETS["caffe"].apply(np.full((1, 1, 1), 200, np.float32))
    np.testing.assert_allclose(grey, 200 - np.mean([103.939, 116.779, 123.68]), rtol=1e-5)


def test_a_guess_is_called_a_guess():
    guess, found = (PRESETS["0..1"].because(certainty, "some reason") for certainty in ("guess", "found"))
    assert "a guess: some reason" in guess.text
    assert "found: some reason" in found.text
    assert json.loads(json.dumps(guess.describe()))["certainty"] == "guess"


# -- choosing layers -------------------------------------------------------------------------------------


def layer(path, kind, *shape):
    return Layer(path, kind, kind.title(), shape or (4, 4, 2), 0)


LAYERS = (
    layer("scale", "rescaling"),
    layer("base", "model"),
    layer("base/conv_1", "conv"),
    layer("base/norm_1", "norm"),
    layer("base/pool", "pool"),
    layer("base/inner", "model"),
    layer("base/inner/conv_2", "conv"),
    layer("twice#0", "conv"),
    layer("twice#1", "conv"),
    layer("split[0]", "other"),
    layer("split[1]", "other"),
    layer("pool", "pool"),
    layer("out", "dense", 3),
)
PATHS = [one.path for one in LAYERS]
CONVS = ["base/conv_1", "base/inner/conv_2", "twice#0", "twice#1"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, ["base/conv_1", "base/pool", "base/inner/conv_2", "twice#0", "twice#1", "pool"]),
        ("conv", CONVS),
        ("dense|norm", ["base/norm_1", "out"]),
        ("out,scale", ["scale", "out"]),  # in the order of execution
        ("conv|merge", CONVS),  # a kind that this network does not have
        ("*", PATHS),
        ("all", PATHS),
        ("base/*", [path for path in PATHS if path.startswith("base/")]),
        ("conv_?", ["base/conv_1", "base/inner/conv_2"]),
        ("base/inner/conv_2", ["base/inner/conv_2"]),
        ("twice", ["twice#0", "twice#1"]),
        ("twice#1", ["twice#1"]),
        ("split", ["split[0]", "split[1]"]),
        ("split[1]", ["split[1]"]),
        ("split[*]", ["split[0]", "split[1]"]),
        (":3", ["scale", "base/conv_1", "base/norm_1"]),  # a container is not counted
        ("1:3", ["base/conv_1", "base/norm_1"]),
        ("-2:", ["pool", "out"]),
        (":-9", ["scale", "base/conv_1"]),
        ("conv:2", CONVS[:2]),
        ("conv::2", CONVS[:2]),
        ("conv:1:3", CONVS[1:3]),
        ("conv:-1:", CONVS[-1:]),
        ("conv|pool:-1:", ["pool"]),
        (["out", "conv:1"], ["base/conv_1", "out"]),
    ],
)
def test_layers_by_kind_glob_and_place(spec, expected):
    assert [one.path for one in select_layers(LAYERS, spec)] == expected


def test_a_network_without_convolutions_shows_all():
    assert select_layers(LAYERS[-1:]) == [LAYERS[-1]]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cnv", ["'cnv'", "did you mean 'conv'", "Kinds here: conv, dense, model"]),
        ("conv_3", ["'conv_3'", "base/conv_1"]),
        ("conv|conv_3", ["'conv_3'"]),
        ("merge", ["'merge'", "Kinds here"]),
        (":0", ["':0'", "none of the 13 layers"]),
        ("20:", ["'20:'", "none of the"]),
        ("", ["''", "none of the"]),
        ([], ["none of the"]),
    ],
)
def test_a_choice_of_nothing_is_an_error(spec, words):
    with pytest.raises(UsageError) as caught:
        select_layers(LAYERS, spec)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_finds_its_layer(path):
    assert find_layer(LAYERS, path).path == path


@pytest.mark.parametrize(
    ("path", "expected"),
    [("conv_2", "base/inner/conv_2"), ("inner/conv_2", "base/inner/conv_2"), ("inner", "base/inner"), ("pool", "pool")],
)
def test_the_last_part_of_a_path_will_do(path, expected):
    assert find_layer(LAYERS, path).path == expected


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("twice", ["more than one", "twice#0, twice#1"]),
        ("split", ["more than one", "split[0], split[1]"]),
        ("conv_22", ["no layer 'conv_22'", "did you mean 'base/inner/conv_2'"]),
        ("Conv_1", ["did you mean 'base/conv_1'"]),
        ("onv_1", ["no layer 'onv_1'"]),  # half a name is no last part
        ("", ["no layer ''"]),
    ],
)
def test_a_path_that_is_unknown_or_stands_for_more_than_one(path, words):
    with pytest.raises(UsageError) as caught:
        find_layer(LAYERS, path)
    assert all(word in str(caught.value) for word in words)


def test_a_last_part_that_two_layers_have_is_ambiguous():
    with pytest.raises(UsageError, match="a/conv, b/conv"):
        find_layer((layer("a/conv", "conv"), layer("b/conv", "conv")), "conv")


def test_the_nearest_names():
    assert nearest("conv", ["pool", "Conv1", "conv2"]) == "did you mean 'conv2' or 'Conv1'?"
    assert nearest("xyz", ["pool", "conv"]) == "there is 'pool', 'conv'"
    assert nearest("xyz", []) == "there is none"
    assert nearest("inn", ["spinning", "q"]) == "did you mean 'spinning'?"
    assert nearest("zzz", [f"a{number}" for number in range(20)]).endswith("'a7', …")


@pytest.mark.parametrize("given", ["0..2", "1,2,3", "5,-1", "", (1, 2, 3), 7, object(), ("a", "b")])
def test_preprocessing_that_is_none_is_refused_and_numbers_are_one(given):
    with raises(UsageError, "preprocessing-unknown"):
        open_model("keras:TinyNet?weights=none", preprocess=given)


def test_numbers_of_preprocessing_in_python():
    assert parse((10, 20)) == parse("10,20")
    assert parse(np.array([1, 2, 3, 4.0])) == parse("1,2,3,4")
