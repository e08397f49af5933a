"""Archives of Keras 2, SavedModel folders, and weights for a model that code makes."""

import hashlib
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from assets import ASSETS, needs_assets

keras = pytest.importorskip("keras")
import h5py  # noqa: E402
import models  # noqa: E402
from expecting import raises  # noqa: E402
from keras import layers  # noqa: E402
from test_legacy_h5 import conv, conv2d, dense, flat, images, norm, relu, sigmoid  # noqa: E402

import convscope  # noqa: E402
from convscope.errors import BackendError, ModelError, UsageError  # noqa: E402
from convscope.images.decode import read_images  # noqa: E402
from convscope.networks.formats.keras import files as keras_files  # noqa: E402

needs_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel runs on TensorFlow")


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.4, shape).astype(np.float32)


def answers(network, x):
    return keras.ops.convert_to_numpy(network.model(x, training=False))


# -- archives as tf.keras 2.12 to 2.15 wrote them --------------------------------------------------------


def old(node, module="keras.layers", inbound=None):
    """A layer of an archive: what an HDF5 file has, with its module and where it is built."""
    shape = {"build_config": {"input_shape": [None, 1, 1, 1]}}
    return {"module": module, "registered_name": None, **shape, **node, **({} if inbound is None else inbound)}


def after(*names):
    return {"inbound_nodes": [[[name, 0, 0, {}] for name in names]]}


def functional(name, nodes, first, last):
    config = {"name": name, "trainable": True, "layers": nodes, "input_layers": [[first, 0, 0]]}
    config["output_layers"] = [[last, 0, 0]]
    root = {"module": "keras.src.engine.functional", "class_name": "Functional", "registered_name": "Functional"}
    return {**root, "config": config, "compile_config": {"optimizer": "rmsprop", "loss": "mse"}}


def named(node):
    return {**node, "name": node["config"]["name"]}


def archive(path, config, weights, version="2.15.0"):
    with h5py.File(path.with_suffix(".weights.h5"), "w") as file:
        for name, value in weights.items():
            file[name] = value
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("metadata.json", json.dumps({"keras_version": version, "date_saved": "2023-12-01@10:00:00"}))
        made.writestr("config.json", json.dumps(config))
        made.write(path.with_suffix(".weights.h5"), "model.weights.h5")
    return path


def placeholder(name, *shape):
    config = {"batch_input_shape": [None, *shape], "dtype": "float32", "sparse": False, "ragged": False, "name": name}
    return old({"class_name": "InputLayer", "config": config}, inbound={"inbound_nodes": []})


def plain(class_name, name, **config):
    return {"class_name": class_name, "config": {"name": name, "trainable": True, "dtype": "float32", **config}}


TWIN = {
    "layers/conv2d/vars/0": drawn(3, 3, 4, 4),
    "layers/conv2d/vars/1": drawn(4, seed=1),
    "layers/conv2d_1/vars/0": drawn(3, 3, 4, 4, seed=2),
    "layers/conv2d_1/vars/1": drawn(4, seed=3),
    "layers/batch_normalization/vars/0": np.abs(drawn(4, seed=4)) + 0.5,
    "layers/batch_normalization/vars/1": drawn(4, seed=5),
    "layers/batch_normalization/vars/2": drawn(4, seed=6),
    "layers/batch_normalization/vars/3": np.abs(drawn(4, seed=7)) + 0.5,
    "layers/dense/vars/0": drawn(4, 2, seed=8),
    "layers/dense/vars/1": drawn(2, seed=9),
    "metrics/mean/vars/0": np.float32(3),
    "optimizer/vars/0": np.int64(5),
}


def twin_config():
    """Two convolutions of one shape; the layers' names and numbers have nothing to do with the groups of the file."""
    bn = plain("BatchNormalization", "bn", axis=[3], momentum=0.99, epsilon=0.001, center=True, scale=True)
    gap = plain("GlobalAveragePooling2D", "gap", data_format="channels_last", keepdims=False)
    nodes = [
        named(placeholder("input_3", 9, 9, 4)),
        named(old(conv2d("conv2d_8", 4, activation="relu"), inbound=after("input_3"))),
        named(old(conv2d("conv2d_9", 4), inbound=after("conv2d_8"))),
        named(old(bn, inbound=after("conv2d_9"))),
        named(old(gap, inbound=after("bn"))),
        named(old(dense("dense_5", 2, activation="sigmoid"), inbound=after("gap"))),
    ]
    return functional("twin", nodes, "input_3", "dense_5")


def twin_answers(x, w):
    y = relu(conv(x, w["layers/conv2d/vars/0"], w["layers/conv2d/vars/1"]))
    y = conv(y, w["layers/conv2d_1/vars/0"], w["layers/conv2d_1/vars/1"])
    y = norm(y, *(w[f"layers/batch_normalization/vars/{index}"] for index in range(4)))
    return sigmoid(y.mean(axis=(1, 2)) @ w["layers/dense/vars/0"] + w["layers/dense/vars/1"])


def test_an_archive_of_keras_2_computes_what_its_datasets_say(tmp_path):
    network = convscope.open_model(archive(tmp_path / "twin.keras", twin_config(), TWIN), preprocess="none")
    x = images(9, 9, 4)
    np.testing.assert_allclose(answers(network, x), twin_answers(x, TWIN), atol=1e-5)
    assert network.source.notes[0] == "archive of Keras 2.15.0"
    assert any("keras.src.engine.functional" in note for note in network.source.notes)


def test_swapped_kernels_in_an_archive_change_the_answer(tmp_path):
    one, two = "layers/conv2d/vars/0", "layers/conv2d_1/vars/0"
    swapped = {**TWIN, one: TWIN[two], two: TWIN[one]}
    network = convscope.open_model(archive(tmp_path / "twin.keras", twin_config(), swapped), preprocess="none")
    x = images(9, 9, 4)
    assert np.abs(answers(network, x) - twin_answers(x, TWIN)).max() > 1e-3
    np.testing.assert_allclose(answers(network, x), twin_answers(x, swapped), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {**w, "layers/conv2d_2/vars/0": drawn(3, 3, 4, 4)}, "no place for layers/conv2d_2/vars/0"),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("layers/dense")}, "do not fit"),
        (lambda w: {**w, "layers/dense/vars/0": drawn(7, 2)}, "do not fit"),
    ],
)
def test_weights_that_do_not_fit_an_archive(tmp_path, change, words):
    with pytest.raises(ModelError, match=words) as error:
        convscope.open_model(archive(tmp_path / "twin.keras", twin_config(), change(TWIN)))
    assert "\n" not in str(error.value)


def test_augmentation_and_rescaling_inside_an_archive(tmp_path):
    """A nested Sequential of random layers, which hand images on, then a Rescaling and a separable convolution."""
    flip = plain("RandomFlip", "random_flip", mode="horizontal", seed=None)
    zoom = plain(
        *("RandomZoom", "random_zoom"),
        **{"height_factor": 0.2, "width_factor": None, "fill_mode": "reflect", "fill_value": 0.0},
        **{"interpolation": "bilinear", "seed": None},
    )
    inner = {"name": "augment", "layers": [placeholder("in", 8, 8, 3), old(flip), old(zoom)]}
    sequential = old({"class_name": "Sequential", "config": inner, "name": "augment"}, "keras.src.engine.sequential")
    separable = {
        **{"filters": 5, "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid", "groups": 1},
        **{"data_format": "channels_last", "dilation_rate": [1, 1], "depth_multiplier": 1, "activation": "linear"},
        "use_bias": True,
    }
    nodes = [
        named(placeholder("pixels", 8, 8, 3)),
        {**sequential, **after("pixels")},
        named(
            old(
                plain("Rescaling", "rescaling", scale=1 / 255, offset=0.0),
                inbound={"inbound_nodes": [[["augment", 1, 0, {}]]]},
            )
        ),
        named(old(plain("SeparableConv2D", "separable", **separable), inbound=after("rescaling"))),
        named(old(plain("Flatten", "flatten", data_format="channels_last"), inbound=after("separable"))),
    ]
    weights = {
        "layers/separable_conv2d/vars/0": drawn(3, 3, 3, 1),
        "layers/separable_conv2d/vars/1": drawn(1, 1, 3, 5, seed=1),
        "layers/separable_conv2d/vars/2": drawn(5, seed=2),
    }
    path = archive(tmp_path / "net.keras", functional("net", nodes, "pixels", "flatten"), weights, "2.12.0")
    network = convscope.open_model(path)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("none", "found")
    x = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3)).astype(np.float32)
    depth = np.stack(
        [conv(x[..., c : c + 1] / 255, drawn(3, 3, 3, 1)[:, :, c : c + 1])[..., 0] for c in range(3)], axis=-1
    )
    expected = flat(depth @ drawn(1, 1, 3, 5, seed=1)[0, 0] + drawn(5, seed=2))
    np.testing.assert_allclose(network.predict(x), expected, atol=1e-5)


def test_code_in_an_archive_of_keras_2_is_refused(tmp_path):
    config = twin_config()
    function = {"class_name": "__lambda__", "config": {"value": ["4wEAAAA=", None, None]}}
    config["config"]["layers"].append(named(old(plain("Lambda", "evil", function=function), inbound=after("dense_5"))))
    with pytest.raises(ModelError, match="Lambda layer 'evil'"):
        convscope.open_model(archive(tmp_path / "net.keras", config, TWIN))


# -- every real file: each dataset is in the model, and none is left over --------------------------------

REAL = (
    *("cats_and_dogs_small_1.h5", "dogs_vs_cats_32px.h5", "cats_vs_dogs_150px.keras", "cats_vs_dogs_gray_112px.h5"),
    *("pill_sorter.keras", "steering_keras1.h5", "emotions_mini_xception.hdf5", "cifar10_cnn.keras", "mnist_cnn.h5"),
    *("cat_mood_nested_mobilenetv2.keras", "mobilenet_v1_0.25_224.keras", "tiny_vgg.keras"),
)


def mark(values):
    plain = np.ascontiguousarray(values, np.float32)
    return f"{plain.shape} {hashlib.sha256(plain.tobytes()).hexdigest()[:12]}"


def datasets(path, tmp_path):
    """The weights in a file by path, read apart from the code under test."""
    if not h5py.is_hdf5(path):
        with zipfile.ZipFile(path) as made:
            path = made.extract("model.weights.h5", tmp_path)
    found = {}
    with h5py.File(path) as file:
        inside = file.get("model_weights", file)

        def visit(name, item):
            beside = name.startswith(("optimizer", "metrics", "_metrics", "top_level")) or "seed_generator" in name
            if isinstance(item, h5py.Dataset) and not beside:
                found[name] = item[()]

        inside.visititems(visit)
    return found


@needs_assets
@pytest.mark.parametrize("name", REAL)
def test_each_dataset_of_a_real_file_is_in_the_model_and_none_left_over(name, tmp_path):
    network = convscope.open_model(ASSETS / "keras" / name, preprocess="0..1")
    stored = Counter(mark(value) for value in datasets(ASSETS / "keras" / name, tmp_path).values())
    held = Counter(mark(keras.ops.convert_to_numpy(weight.value)) for weight in network.model.weights)
    assert held == stored
    assert sum(stored.values()) >= 4


@needs_assets
@pytest.mark.parametrize("name", [name for name in REAL if name.endswith((".h5", ".hdf5")) or "150px" in name])
def test_each_dataset_of_a_real_hdf5_file_is_in_the_layer_of_its_name(name, tmp_path):
    network = convscope.open_model(ASSETS / "keras" / name, preprocess="0..1")
    by_layer = {layer.name: Counter(map(mark, layer.get_weights())) for layer in network.model.layers}
    stored = {}
    for path, value in datasets(ASSETS / "keras" / name, tmp_path).items():
        stored.setdefault(path.split("/")[0], Counter())[mark(value)] += 1
    assert {name: marks for name, marks in by_layer.items() if marks} == stored


@needs_assets
def test_the_pill_sorter_computes_what_its_datasets_say(tmp_path):
    with zipfile.ZipFile(ASSETS / "keras" / "pill_sorter.keras") as made:
        inside = made.extract("model.weights.h5", tmp_path)
    with h5py.File(inside) as file:
        names = [name for name in file["layers"] if name.startswith(("conv", "dense"))]
        w = {name: [file[f"layers/{name}/vars/{i}"][()] for i in (0, 1)] for name in names}
    network = convscope.open_model(ASSETS / "keras" / "pill_sorter.keras")
    x = network.prepare(read_images([ASSETS / "photos" / "cats" / "cat.4099.jpg"]))
    y = x / 255
    for number in range(5):
        kernel, bias = w["conv2d" + (f"_{number}" if number else "")]
        y = relu(conv(y, kernel, bias))
        if number < 4:
            n, h, v, c = y.shape
            y = y[:, : h // 2 * 2, : v // 2 * 2].reshape(n, h // 2, 2, v // 2, 2, c).max(axis=(2, 4))
    logit = flat(y) @ w["dense"][0] + w["dense"][1]
    np.testing.assert_allclose(network.predict(x)[:, 1:], logit, rtol=1e-3, atol=1e-3)


# -- SavedModel folders ----------------------------------------------------------------------------------


@needs_tensorflow
def test_a_saved_model_is_one_block(tmp_path):
    model = models.plain()
    model.export(tmp_path / "saved", verbose=False)
    network = convscope.open_model(tmp_path / "saved")
    x = np.random.default_rng(0).uniform(0, 1, (3, 16, 16, 3)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(network.head.probabilities(network.predict(x)), expected, atol=1e-6)
    assert network.inputs.size == (16, 16)
    assert [layer.class_name for layer in network.layers] == ["SavedModelBlock"]
    assert any("output only" in note for note in network.source.notes)
    found = convscope.activations(network, [np.zeros((16, 16, 3), np.uint8)])
    assert next(iter(found.arrays.values())).shape == (1, 5)
    with pytest.raises(UsageError, match="has none"):
        convscope.heatmap(network, [np.zeros((16, 16, 3), np.uint8)])


@needs_tensorflow
def test_a_saved_model_that_would_write_a_file_is_refused_and_not_run(tmp_path):
    import tensorflow as tf

    class Writing(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3))])
        def serve(self, x):
            tf.io.write_file(str(tmp_path / "was-run"), "x")
            return tf.reduce_mean(x, (1, 2))

    made = Writing()
    tf.saved_model.save(made, str(tmp_path / "saved"), signatures={"serving_default": made.serve})
    with pytest.raises(ModelError, match=r"WriteFile.*trust=True"):
        convscope.open_model(tmp_path / "saved")
    assert not (tmp_path / "was-run").exists()
    assert convscope.open_model(tmp_path / "saved", trust=True).head.units == 3


@needs_tensorflow
def test_a_saved_model_can_not_hide_what_it_would_do(tmp_path):
    """Behind the name of what saves variables, or in the start of a program of TensorFlow 1."""
    import tensorflow as tf

    def write(x):
        tf.io.write_file(str(tmp_path / "was-run"), "x")
        return x

    write.__name__ = "__traced_save"
    hidden = tf.function(write)
    made = tf.Module()
    made.serve = tf.function(lambda x: tf.reduce_mean(hidden(x), (1, 2)))
    signature = made.serve.get_concrete_function(tf.TensorSpec((None, 8, 8, 3), tf.float32))
    tf.saved_model.save(made, str(tmp_path / "hidden"), signatures={"serving_default": signature})
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        start = tf.io.write_file(str(tmp_path / "was-run"), "x")
        outputs = {"y": tf.reduce_mean(x, (1, 2))}
        v1.saved_model.simple_save(session, str(tmp_path / "old"), {"x": x}, outputs, legacy_init_op=start)
    (tmp_path / "was-run").unlink(missing_ok=True)
    for name in ("hidden", "old"):
        with pytest.raises(ModelError, match=r"WriteFile.*trust=True"):
            convscope.open_model(tmp_path / name)
    assert not (tmp_path / "was-run").exists()


@needs_tensorflow
def test_a_saved_model_without_images(tmp_path):
    model = keras.Sequential([layers.Input((12,)), layers.Dense(2)])
    model.export(tmp_path / "saved", verbose=False)
    with pytest.raises(ModelError, match="no signature that takes one image"):
        convscope.open_model(tmp_path / "saved")
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\xff\xff damaged")
    with pytest.raises(ModelError, match="Copy it again"):
        convscope.open_model(tmp_path / "saved")


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="it would open there")
def test_a_saved_model_needs_tensorflow(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"any")
    with pytest.raises(BackendError, match="tensorflow with backend="):
        convscope.open_model(tmp_path / "saved")


# -- weights for a model that code makes -----------------------------------------------------------------


def small(first="conv_a", second="conv_b", last="out", classes=3, channels=3):
    return keras.Sequential(
        [
            layers.Input((8, 8, channels)),
            layers.Conv2D(4, 3, name=first),
            layers.Conv2D(4, 3, name=second),
            layers.GlobalAveragePooling2D(name="gap"),
            layers.Dense(classes, name=last),
        ]
    )


def as_keras_2(path, model, names=None, order=None):
    """Weights alone as Keras 2 wrote them: `layer_names`, and a group with `weight_names` for each layer."""
    names = names or {layer.name: layer.name for layer in model.layers}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [names.get(name, name).encode() for name in order or names]
        file.attrs["keras_version"] = b"2.2.4"
        file.attrs["backend"] = b"tensorflow"
        for layer in model.layers:
            group = file.create_group(names.get(layer.name, layer.name))
            label = names.get(layer.name, layer.name)
            group.attrs["weight_names"] = [f"{label}/{weight.name}:0".encode() for weight in layer.weights]
            for weight in layer.weights:
                group[f"{label}/{weight.name}:0"] = keras.ops.convert_to_numpy(weight.value)
    return path


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(one.get_weights(), two.get_weights(), strict=True))


@pytest.mark.parametrize("kind", ["keras 2", "keras 3", "h5", "keras"])
def test_weights_of_each_kind(tmp_path, kind):
    model = models.seeded(small())
    path = tmp_path / {"keras 2": "w.h5", "keras 3": "w.weights.h5", "h5": "m.h5", "keras": "m.keras"}[kind]
    if kind == "keras 2":
        as_keras_2(path, model)
    elif kind == "keras 3":
        model.save_weights(path)
    else:
        model.save(path)
    filled = models.seeded(small(), seed=5)
    assert not same(filled, model)
    keras_files.load_weights(filled, path)
    assert same(filled, model)


def test_order_in_the_file_plays_no_part(tmp_path):
    model, filled = models.seeded(small()), models.seeded(small(), seed=5)
    keras_files.load_weights(filled, as_keras_2(tmp_path / "w.h5", model, order=["out", "conv_b", "gap", "conv_a"]))
    assert same(filled, model)


def test_swapped_names_are_seen(tmp_path):
    model, filled = models.seeded(small(channels=4)), models.seeded(small(channels=4), seed=5)
    names = {"conv_a": "conv_b", "conv_b": "conv_a", "gap": "gap", "out": "out"}
    keras_files.load_weights(filled, as_keras_2(tmp_path / "w.h5", model, names))
    assert not same(filled, model)
    assert np.array_equal(filled.get_layer("conv_b").get_weights()[0], model.get_layer("conv_a").get_weights()[0])


def test_automatic_numbers_that_differ_are_said(tmp_path):
    model = models.seeded(small("conv2d_3", "conv2d_4", "dense_7"))
    filled = small("conv2d", "conv2d_1", "dense")
    notes = keras_files.load_weights(filled, as_keras_2(tmp_path / "w.h5", model))
    assert same(filled, model)
    assert any("numbered otherwise" in note and "conv2d_3 to conv2d" in note for note in notes)


@pytest.mark.parametrize("kind", ["keras 2", "keras 3"])
@pytest.mark.parametrize("other", [{"classes": 4}, {"second": "another"}])
def test_weights_of_another_model(tmp_path, kind, other):
    if kind == "keras 3" and "second" in other:
        pytest.skip("names of layers play no part in files of Keras 3: they go by class and place")
    path = tmp_path / ("w.h5" if kind == "keras 2" else "w.weights.h5")
    model = models.seeded(small())
    as_keras_2(path, model) if kind == "keras 2" else model.save_weights(path)
    with pytest.raises(ModelError) as error:
        keras_files.load_weights(small(**other), path)
    assert "\n" not in str(error.value)


CODE = """
import keras  # noqa: E402
from keras import layers  # noqa: E402


def steering():
    elu = lambda: layers.ELU()
    steps = [layers.Input((160, 320, 3)), layers.Rescaling(1 / 255, -0.5), layers.Cropping2D(((70, 25), (0, 0)))]
    for number, (filters, size, stride) in enumerate(((24, 5, 2), (36, 5, 2), (48, 5, 2), (64, 3, 1), (64, 3, 1))):
        steps += [layers.Conv2D(filters, size, strides=stride, name=f"conv2d_{number + 1}"), elu()]
    steps += [layers.Flatten()]
    for number, units in enumerate((100, 50, 10)):
        steps += [layers.Dense(units, name=f"dense_{number + 1}"), elu()]
    return keras.Sequential([*steps, layers.Dense(1, name="dense_4")], name="steering")
"""


@needs_assets
def test_the_real_weights_alone_with_the_code(tmp_path):
    (tmp_path / "road.py").write_text(CODE)
    path = ASSETS / "keras" / "steering_weights_only.h5"
    network = convscope.open_model(f"{tmp_path / 'road.py'}:steering", weights=path)
    assert network.source.notes[0] == "weights of steering_weights_only.h5"
    assert network.inputs.size == (160, 320)
    assert network.preprocessing.name == "none"
    photo = sorted((ASSETS / "photos" / "steering").glob("*.jpg"))[0]
    x = network.prepare(read_images([photo]))
    with h5py.File(path) as file:
        w = {
            name: [file[f"{name}/{name}/{key}:0"][()] for key in ("kernel", "bias")]
            for name in file
            if file[name].keys()
        }
    y = (x / 255 - 0.5)[:, 70:-25]
    for number, stride in enumerate((2, 2, 2, 1, 1), start=1):
        y = elu(conv(y, *w[f"conv2d_{number}"])[:, ::stride, ::stride])
    y = flat(y)
    for number in (1, 2, 3):
        y = elu(y @ w[f"dense_{number}"][0] + w[f"dense_{number}"][1])
    y = y @ w["dense_4"][0] + w["dense_4"][1]
    np.testing.assert_allclose(network.predict(x), y, rtol=1e-3, atol=1e-4)


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def test_code_without_weights_says_so(tmp_path):
    (tmp_path / "road.py").write_text(CODE)
    network = convscope.open_model(f"{tmp_path / 'road.py'}:steering")
    assert any("no file of weights" in note for note in network.source.notes)


def test_weights_that_are_none(tmp_path):
    (tmp_path / "road.py").write_text(CODE)
    (tmp_path / "w.h5").write_text("no weights")
    with pytest.raises(ModelError):
        convscope.open_model(f"{tmp_path / 'road.py'}:steering", weights=tmp_path / "w.h5")
    with pytest.raises(ModelError, match="no model file at"):
        convscope.open_model(f"{tmp_path / 'road.py'}:steering", weights=tmp_path / "absent.h5")


def test_a_model_that_is_not_built(tmp_path):
    models.seeded(small()).save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(UsageError, match="not built"):
        keras_files.load_weights(keras.Sequential([layers.Conv2D(4, 3)]), tmp_path / "w.weights.h5")


UNBUILT = """
import keras
from keras import layers


def sequential():
    return keras.Sequential([layers.Conv2D(4, 3, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(2)])


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.out = layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(2)

    def call(self, x):
        return self.out(self.pool(self.conv(x)))


def broken():
    return keras.Sequential([layers.Conv2D(4, 30), layers.Flatten(), layers.Dense(2)])
"""


@pytest.mark.parametrize("maker", ["sequential", "Own"])
@pytest.mark.parametrize("channels", [1, 3])
def test_code_whose_model_was_never_called_is_built_by_the_size(tmp_path, maker, channels):
    (tmp_path / "code.py").write_text(UNBUILT)
    space = {}
    exec(UNBUILT, space)
    made = space[maker]()
    x = np.random.default_rng(0).uniform(size=(2, 12, 16, channels)).astype("float32")
    made(x)
    models.seeded(made)
    made.save_weights(tmp_path / "w.weights.h5")
    network = convscope.open_model(f"{tmp_path / 'code.py'}:{maker}", weights=tmp_path / "w.weights.h5", size=(12, 16))
    assert network.image_shape == (12, 16, channels)
    np.testing.assert_allclose(network.predict(x), keras.ops.convert_to_numpy(made(x)), atol=1e-5)


def test_a_size_at_which_the_model_can_not_be_called(tmp_path):
    (tmp_path / "code.py").write_text(UNBUILT)
    models.seeded(small()).save_weights(tmp_path / "w.weights.h5")
    code = f"{tmp_path / 'code.py'}:broken"
    with raises(UsageError, "not-built"):
        convscope.open_model(code, weights=tmp_path / "w.weights.h5", size=12)
    with raises(UsageError, "not-built", match="size="):
        convscope.open_model(code, weights=tmp_path / "w.weights.h5")


def test_a_key_is_for_checkpoints_of_pytorch(tmp_path):
    (tmp_path / "road.py").write_text(CODE)
    models.seeded(small()).save_weights(tmp_path / "w.weights.h5")
    with raises(UsageError, "option-misfit", name="weights"):
        convscope.open_model(f"{tmp_path / 'road.py'}:steering", weights=f"{tmp_path / 'w.weights.h5'}::model")
