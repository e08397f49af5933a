"""TensorFlow.js layers models: the same predictions as of the model that they were written of, and nothing outside."""

import hashlib
import json
import os
import re

import numpy as np
import pytest

keras = pytest.importorskip("keras")
import models  # noqa: E402
from expecting import raises  # noqa: E402
from keras import layers  # noqa: E402

import convscope  # noqa: E402
from convscope import limits  # noqa: E402
from convscope.errors import ModelError  # noqa: E402

# -- the writer: the format as TensorFlow.js documents it --------------------------------------------------


def small(**options):
    parts = [
        layers.Input((12, 12, 3)),
        layers.Conv2D(6, 3, activation="relu", name="first"),
        layers.BatchNormalization(name="bn"),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.GlobalAveragePooling2D(name="gap"),
        layers.Dense(4, activation="softmax", name="out"),
    ]
    return models.seeded(keras.Sequential(parts, name="small", **options))


def nested():
    inner = keras.Sequential([layers.Input((10, 10, 4)), layers.Conv2D(5, 3, name="conv")], name="inner")
    x = image = layers.Input((12, 12, 3))
    x = layers.Conv2D(4, 3, name="conv")(x)
    x = layers.GlobalMaxPooling2D()(inner(x))
    return models.seeded(keras.Model(image, layers.Dense(3, name="out")(x), name="nested"))


def exact(value):
    return value.astype("<f4"), None


def halves(value):
    return value.astype("<f2"), {"dtype": "float16", "original_dtype": "float32"}


def whole(kind):
    def packed(value):
        least, span = float(value.min()), float(value.max() - value.min())
        scale = span / np.iinfo(kind).max or 1.0
        numbers = np.round((value - least) / scale).astype(np.dtype(kind).newbyteorder("<"))
        return numbers, {"dtype": kind, "min": least, "scale": scale, "original_dtype": "float32"}

    return packed


def write(folder, model, pack=exact, shard=300, change=None):
    """`model.json` and its shards, as the converter writes them of a model, and their bytes before the last change."""
    told, data = [], b""
    for variable in model.weights:
        value = np.asarray(keras.ops.convert_to_numpy(variable.value), np.float32)
        packed, quantization = pack(value)
        item = {"name": variable.path, "shape": list(value.shape), "dtype": "float32"}
        told.append(item if quantization is None else {**item, "quantization": quantization})
        data += packed.tobytes()
    pieces = [data[start : start + shard] for start in range(0, len(data), shard)]
    names = [f"group1-shard{number + 1}of{len(pieces)}.bin" for number in range(len(pieces))]
    config = json.loads(model.to_json())
    topology = {"keras_version": keras.__version__, "backend": "tensorflow", "model_config": config}
    whole = {
        "format": "layers-model",
        "generatedBy": f"keras v{keras.__version__}",
        "convertedBy": "TensorFlow.js Converter v4.22.0",
        "modelTopology": topology,
        "weightsManifest": [{"paths": names, "weights": told}],
    }
    folder.mkdir(exist_ok=True)
    for name, piece in zip(names, pieces, strict=True):
        (folder / name).write_bytes(piece)
    if change is not None:
        change(whole)
    (folder / "model.json").write_text(whole if isinstance(whole, str) else json.dumps(whole))
    return folder / "model.json"


def images(side=12):
    return np.random.default_rng(0).uniform(-1, 1, (3, side, side, 3)).astype("float32")


def answers(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


# -- what opens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, nested, models.plain])
@pytest.mark.parametrize("shard", [97, 10**6])
def test_predictions_are_those_of_the_original(tmp_path, make, shard):
    model = models.seeded(make())
    network = convscope.open_model(write(tmp_path / "web", model, shard=shard))
    x = images(model.input_shape[1])[..., : model.input_shape[3]]
    np.testing.assert_allclose(answers(network.model, x), answers(model, x), atol=1e-6)
    assert any("TensorFlow.js layers model" in note for note in network.source.notes)
    assert [layer.path for layer in network.layers] == [layer.path for layer in convscope.open_model(model).layers]


@pytest.mark.parametrize(("pack", "steps"), [(halves, 2**11), (whole("uint8"), 2**8), (whole("uint16"), 2**16)])
def test_packed_weights_are_as_exact_as_their_steps(tmp_path, pack, steps):
    model = small()
    network = convscope.open_model(write(tmp_path / "web", model, pack))
    for variable, found in zip(model.weights, network.model.weights, strict=True):
        wanted, value = (keras.ops.convert_to_numpy(one.value) for one in (variable, found))
        most = np.ptp(wanted) or np.abs(wanted).max()
        np.testing.assert_allclose(value, wanted, atol=max(most, np.abs(wanted).max()) / steps)
    assert any("packed as" in note for note in network.source.notes)


def test_bare_topologies_and_other_ways_to_write_the_same(tmp_path):
    """Without `model_config` around the config, without a format, with names as TensorFlow 1 wrote them."""

    def change(whole):
        whole["modelTopology"] = {**whole["modelTopology"]["model_config"], "keras_version": keras.__version__}
        del whole["format"]
        for item in whole["weightsManifest"][0]["weights"]:
            item["name"] += ":0"

    model = small()
    network = convscope.open_model(write(tmp_path / "web", model, change=change))
    np.testing.assert_allclose(answers(network.model, images()), answers(model, images()), atol=1e-6)


def test_a_config_of_keras_2_as_the_converter_wrote_it(tmp_path):
    """`batch_input_shape`, no modules, the version of Keras 2, and one group of files for each layer."""
    model = small()
    model.layers[0].activation = keras.activations.relu

    def change(whole):
        base = {"trainable": True, "dtype": "float32"}
        conv = {"filters": 6, "kernel_size": [3, 3], "activation": "relu", "data_format": "channels_last"}
        parts = [
            ("Conv2D", "first", {**conv, "batch_input_shape": [None, 12, 12, 3]}),
            ("BatchNormalization", "bn", {"axis": [3]}),
            ("DepthwiseConv2D", "depthwise", {"kernel_size": [3, 3]}),
            ("GlobalAveragePooling2D", "gap", {"data_format": "channels_last"}),
            ("Dense", "out", {"units": 4, "activation": "softmax"}),
        ]
        nodes = [{"class_name": kind, "config": {"name": name, **base, **more}} for kind, name, more in parts]
        config = {"class_name": "Sequential", "config": {"name": "small", "layers": nodes}}
        whole["modelTopology"] = {"keras_version": "2.15.0", "backend": "tensorflow", "model_config": config}
        for item in whole["weightsManifest"][0]["weights"]:
            item["name"] = item["name"].replace("depthwise/kernel", "depthwise/depthwise_kernel")

    network = convscope.open_model(write(tmp_path / "web", model, change=change))
    np.testing.assert_allclose(answers(network.model, images()), answers(model, images()), atol=1e-6)


def test_a_spec_notices_that_a_shard_has_changed(tmp_path):
    path = write(tmp_path / "web", small())
    network = convscope.open_model(path)
    assert network.spec.open().weights_sha256() == network.weights_sha256()
    shard = tmp_path / "web" / "group1-shard1of4.bin"
    shard = shard if shard.exists() else next((tmp_path / "web").glob("group1-shard1of*.bin"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with raises(ModelError, "file-changed"):
        network.spec.open()


def test_a_spec_notices_that_a_shard_of_its_weights_has_changed(tmp_path):
    """Code makes the model, and its weights are those of a model.json, whose hash says nothing of the shards."""
    path = write(tmp_path / "web", small(), shard=10**6)
    (tmp_path / "made.py").write_text(CODE)
    spec = convscope.open_model(f"{tmp_path / 'made.py'}:make", weights=path).spec
    (shard,) = (tmp_path / "web").glob("*.bin")
    data = shard.read_bytes()
    line = f"{hashlib.sha256(data).hexdigest()}  {shard.name}\n"  # as sha256sum prints it
    assert spec.origin.beside_sha256 == hashlib.sha256(line.encode()).hexdigest()
    assert spec.open().spec == spec
    shard.write_bytes(bytes(4) + data[4:])
    with raises(ModelError, "file-changed", expected=spec.origin.beside_sha256):
        spec.open()


def test_shards_may_lie_in_a_folder_inside(tmp_path):
    model = small()
    path = write(tmp_path / "web", model, shard=10**6, change=lambda whole: first(whole).update(paths=["sub/a.bin"]))
    (shard,) = (tmp_path / "web").glob("*.bin")
    (tmp_path / "web" / "sub").mkdir()
    shard.rename(tmp_path / "web" / "sub" / "a.bin")
    network = convscope.open_model(path)
    np.testing.assert_allclose(answers(network.model, images()), answers(model, images()), atol=1e-6)
    assert network.spec.open().spec == network.spec


def test_a_folder_says_which_file_to_give(tmp_path):
    write(tmp_path / "web", small())
    with raises(ModelError, "is-folder", match="model\\.json"):
        convscope.open_model(tmp_path / "web")


# -- what does not -----------------------------------------------------------------------------------------


def first(whole):
    return whole["weightsManifest"][0]


def weight(whole):
    return first(whole)["weights"][0]


def as_graph(whole):
    whole["format"] = "graph-model"


def as_old_graph(whole):
    del whole["format"]
    whole["modelTopology"] = {"node": [], "library": {}, "versions": {}}


@pytest.mark.parametrize("change", [as_graph, as_old_graph])
def test_graph_models_are_named(tmp_path, change):
    with raises(ModelError, "graph-model", match="Give what it was converted from"):
        convscope.open_model(write(tmp_path / "web", small(), change=change))


OUTSIDE = [
    "../secret.bin",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".",
    "",
    "C:x",
    "\\b",
    "a\\..\\..\\b",
    "\x00",
    "web\n",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_of_the_folder_are_not_read(tmp_path, name):
    (tmp_path / "secret.bin").write_bytes(bytes(4000))
    with raises(ModelError, "weights-outside", name=name):
        convscope.open_model(
            write(tmp_path / "web", small(), shard=10**6, change=lambda w: first(w).update(paths=[name]))
        )


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    path = write(tmp_path / "web", small(), shard=10**6)
    (shard,) = (tmp_path / "web").glob("*.bin")
    shard.rename(tmp_path / "moved.bin")
    shard.symlink_to(tmp_path / "moved.bin")
    with raises(ModelError, "weights-outside"):
        convscope.open_model(path)


def test_a_link_to_a_folder_elsewhere_is_not_followed(tmp_path):
    path = write(tmp_path / "web", small(), shard=10**6, change=lambda w: first(w).update(paths=["sub/a.bin"]))
    (shard,) = (tmp_path / "web").glob("*.bin")
    (tmp_path / "other").mkdir()
    shard.rename(tmp_path / "other" / "a.bin")
    (tmp_path / "web" / "sub").symlink_to(tmp_path / "other")
    with raises(ModelError, "weights-outside"):
        convscope.open_model(path)


def test_a_name_that_is_too_long_for_a_file(tmp_path):
    path = write(tmp_path / "web", small(), shard=10**6, change=lambda w: first(w).update(paths=["x" * 300]))
    with pytest.raises(ModelError) as caught:
        convscope.open_model(path)
    assert caught.value.code in ("file-unreadable", "weights-missing")  # by the system


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    path = write(tmp_path / "web", small(), shard=10**6)
    (shard,) = (tmp_path / "web").glob("*.bin")
    shard.unlink()
    os.mkfifo(shard)
    with raises(ModelError, "no-regular-file"):
        convscope.open_model(path)


def test_a_missing_shard_is_named(tmp_path):
    path = write(tmp_path / "web", small(), shard=10**6)
    (shard,) = (tmp_path / "web").glob("*.bin")
    shard.unlink()
    with raises(ModelError, "weights-missing", name=shard.name):
        convscope.open_model(path)


SHAPES = [[-1], [3, -3, 3, 6], [None], [2.0], [True], ["3"], "3", None, [2**60], [2] * 40, [float("nan")], {"0": 3}]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_are_none(tmp_path, shape):
    with pytest.raises(ModelError) as caught:
        convscope.open_model(write(tmp_path / "web", small(), change=lambda w: weight(w).update(shape=shape)))
    assert caught.value.code in ("file-invalid", "file-damaged")  # NaN is no JSON


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [2**47, 0, 2**20], [2**47, 2**40, 0]])
def test_sides_beside_a_zero_are_bounded_too(tmp_path, shape):
    """There are no values, and NumPy can't make such an array all the same."""
    path = write(tmp_path / "web", small(), change=lambda w: weight(w).update(shape=shape))
    with raises(ModelError, "input-too-large", limit="weights"):
        convscope.open_model(path)


def test_an_amount_beyond_the_limits_is_not_read(tmp_path):
    path = write(tmp_path / "web", small(), change=lambda w: weight(w).update(shape=[2**20, 2**20]))
    with raises(ModelError, "input-too-large", limit="weights"):
        convscope.open_model(path)


@pytest.mark.parametrize("shape", [[3, 3, 3, 7], [0], []])
def test_sizes_have_to_be_those_of_the_files(tmp_path, shape):
    path = write(tmp_path / "web", small(), change=lambda w: weight(w).update(shape=shape))
    with raises(ModelError, "file-damaged"):
        convscope.open_model(path)


@pytest.mark.parametrize("by", [-1, 1, -(10**6)])
def test_a_shard_that_was_cut_or_grew(tmp_path, by):
    path = write(tmp_path / "web", small(), shard=10**6)
    (shard,) = (tmp_path / "web").glob("*.bin")
    data = shard.read_bytes()
    shard.write_bytes(data[:by] if by < 0 else data + bytes(by))
    with raises(ModelError, "file-damaged"):
        convscope.open_model(path)


NUMBERS = [float("nan"), float("inf"), None, "1", True, 1e300, [1]]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("key", ["scale", "min"])
def test_scales_that_are_no_numbers(tmp_path, key, number):
    def change(whole):
        weight(whole)["quantization"][key] = number

    with pytest.raises(ModelError) as caught:
        convscope.open_model(write(tmp_path / "web", small(), whole("uint8"), change=change))
    assert caught.value.code in ("file-invalid", "file-damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: weight(w).update(dtype="string"),
        lambda w: weight(w).update(dtype="complex64"),
        lambda w: weight(w).update(dtype=["float32"]),
        lambda w: weight(w).update(quantization={"dtype": "int4"}),
        lambda w: weight(w).update(quantization=7),
        lambda w: weight(w).update(name=7),
        lambda w: weight(w).update(name="\x1b[31m"),
        lambda w: first(w)["weights"].append(weight(w)),
        lambda w: first(w)["weights"].append("first/kernel"),
        lambda w: first(w).update(paths="group1-shard1of1.bin"),
        lambda w: first(w).update(paths=[3]),
        lambda w: first(w).update(weights=None),
        lambda w: w.update(weightsManifest={}),
        lambda w: w.update(weightsManifest=[None]),
    ],
)
def test_manifests_that_are_none(tmp_path, change):
    with raises(ModelError, "file-invalid"):
        convscope.open_model(write(tmp_path / "web", small(), change=change))


def test_a_weight_of_no_layer_and_a_layer_without_its_weight(tmp_path):
    path = write(tmp_path / "web", small(), change=lambda w: weight(w).update(name="elsewhere/kernel"))
    with raises(ModelError, "weights-misfit") as caught:
        convscope.open_model(path)
    assert {re.sub(" .*", "", reason) for reason in caught.value.data["reasons"]} == {
        "elsewhere/kernel",
        "first/kernel",
    }


@pytest.mark.parametrize("topology", [None, [], 3, {}, {"model_config": None}, {"class_name": 3, "config": {}}])
def test_topologies_that_are_none(tmp_path, topology):
    with raises(ModelError, "config-invalid"):
        convscope.open_model(write(tmp_path / "web", small(), change=lambda w: w.update(modelTopology=topology)))


CODE = """
import keras
from keras import layers


def make():
    parts = [layers.Conv2D(6, 3, activation="relu", name="first"), layers.BatchNormalization(name="bn")]
    parts += [layers.DepthwiseConv2D(3, name="depthwise"), layers.GlobalAveragePooling2D(name="gap")]
    return keras.Sequential([layers.Input((12, 12, 3)), *parts, layers.Dense(4, activation="softmax", name="out")])
"""


def test_code_in_the_config_is_not_run_and_the_weights_go_into_the_user_s(tmp_path):
    """As the message advises."""

    def change(whole):
        parts = whole["modelTopology"]["model_config"]["config"]["layers"]
        code = {"class_name": "Lambda", "config": {"name": "code", "function": ["4wEA", None, None]}}
        parts.insert(2, code)

    model = small()
    path = write(tmp_path / "web", model, change=change)
    with raises(ModelError, "code-in-file", match="weights of this file alone"):
        convscope.open_model(path)
    (tmp_path / "made.py").write_text(CODE)
    network = convscope.open_model(f"{tmp_path / 'made.py'}:make", weights=path)
    np.testing.assert_allclose(answers(network.model, images()), answers(model, images()), atol=1e-6)


UNBUILT = """
import keras
from keras import layers

def make(*first):
    parts = layers.Conv2D(5, 3, name="conv"), layers.GlobalAveragePooling2D(), layers.Dense(2, name="out")
    return keras.Sequential([*first, *parts])
"""


@pytest.mark.parametrize("channels", [1, 3])
def test_code_whose_model_was_never_called_is_built_for_the_channels_of_the_weights(tmp_path, channels):
    (tmp_path / "code.py").write_text(UNBUILT)
    space = {}
    exec(UNBUILT, space)
    model = models.seeded(space["make"](layers.Input((12, 16, channels))))
    path = write(tmp_path / "web", model)
    network = convscope.open_model(f"{tmp_path / 'code.py'}:make", weights=path, size=(12, 16))
    assert network.image_shape == (12, 16, channels)
    x = np.random.default_rng(0).uniform(size=(2, 12, 16, channels)).astype("float32")
    np.testing.assert_allclose(network.predict(x), answers(model, x), atol=1e-5)


@pytest.mark.parametrize("deep", [150, 10**5])
def test_deep_json_is_refused(tmp_path, deep):
    path = write(tmp_path / "web", small())
    path.write_text('{"modelTopology": ' + "[" * deep + "]" * deep + ', "weightsManifest": []}')
    with raises(ModelError, "input-too-large", limit="depth"):
        convscope.open_model(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_json_that_broke_off(tmp_path, kept):
    path = write(tmp_path / "web", small())
    text = path.read_text()
    path.write_text(text[: int(kept * len(text))])
    with pytest.raises(ModelError) as caught:
        convscope.open_model(path)
    assert caught.value.code in ("file-damaged", "file-unknown")


def test_a_text_beyond_the_limit_is_not_parsed(tmp_path):
    path = write(tmp_path / "web", small())
    with limits.using(text=1000), pytest.raises(ModelError) as caught:
        convscope.open_model(path)
    assert caught.value.code in ("input-too-large", "file-unknown")


def test_other_json_is_no_model(tmp_path):
    (tmp_path / "classes.json").write_text('{"0": "cat"}')
    with raises(ModelError, "file-unknown"):
        convscope.open_model(tmp_path / "classes.json")
