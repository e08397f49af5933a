"""Architectures that name what they should not, or declare more than they hold; archives that are bombs."""

import contextlib
import copy
import functools
import io
import json
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
pytest.importorskip("h5py")
import models  # noqa: E402
from keras import layers, ops  # noqa: E402

from convscope import limits  # noqa: E402
from convscope.errors import ModelError  # noqa: E402
from convscope.networks.formats.files import sniff  # noqa: E402
from convscope.networks.formats.keras import config as keras_config  # noqa: E402
from convscope.networks.formats.keras import files as keras_files  # noqa: E402
from convscope.networks.formats.keras.legacy_h5.building import registered_key  # noqa: E402


def saved(tmp_path, model=None, name="m.keras"):
    if model is None:
        (tmp_path / name).write_bytes(plain_file(name))
    else:
        model.save(tmp_path / name)
    return tmp_path / name


@functools.cache
def plain_file(name):
    """The bytes of a small model's file."""
    with tempfile.TemporaryDirectory() as folder:
        models.plain().save(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def parts(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repacked(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def with_config(path, change):
    members = parts(path)
    config = json.loads(members["config.json"])
    change(config)
    return repacked(path, {**members, "config.json": json.dumps(config)})


def as_hdf5(tmp_path, change):
    import h5py

    saved(tmp_path, name="m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config)
    return tmp_path / "m.h5"


def refused(path, words=""):
    with pytest.raises(ModelError, match=words) as error:
        keras_files.read(sniff(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200


# -- legitimate models of many shapes come back bit by bit -----------------------------------------------


def operations():
    given = keras.Input((8, 8, 3))
    x = ops.clip(given / 127.5 - 1.0, -1, 1)
    x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = layers.Conv2D(4, 3)(x[:, ::2, ::2] ** 2)
    x = ops.concatenate([ops.relu(x), ops.stop_gradient(ops.sigmoid(x))], axis=-1)
    x = ops.where(x > 0.1, x, ops.zeros_like(x))
    x = ops.mean(ops.transpose(x, (0, 2, 1, 3)), axis=(1, 2))
    return keras.Model(given, ops.softmax(layers.Dense(3)(x)))


def kinds_of_layers():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Rescaling(1 / 255),
            layers.RandomFlip(seed=3),
            layers.RandomZoom(0.1),
            layers.Conv2D(4, 3, kernel_initializer=keras.initializers.HeNormal(seed=1), activation="gelu"),
            layers.BatchNormalization(gamma_regularizer="l2"),
            layers.PReLU(shared_axes=[1, 2], alpha_initializer=keras.initializers.Constant(0.2)),
            layers.SeparableConv2D(5, 3),
            layers.Activation(keras.activations.hard_silu),
            layers.GroupNormalization(5),
            layers.SpectralNormalization(layers.Conv2D(3, 1, kernel_constraint=keras.constraints.MaxNorm(2))),
            layers.Dropout(0.5),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, kernel_regularizer=keras.regularizers.L1L2(0.1, 0.1), activation=layers.LeakyReLU(0.1)),
        ]
    )  # fmt: skip


def mixed_precision():
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, dtype="mixed_bfloat16"), layers.Flatten(), layers.Dense(2)]
    )


def half():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, dtype="bfloat16"), layers.Flatten()])


def recurrent():
    return keras.Sequential(
        [
            keras.Input((4, 8, 8, 3)),
            layers.TimeDistributed(layers.Conv2D(4, 3)),
            layers.TimeDistributed(layers.GlobalMaxPooling2D()),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
            layers.RNN([layers.GRUCell(2), layers.LSTMCell(2)]),
        ]
    )


def attention():
    given = keras.Input((8, 8, 3))
    x = layers.Reshape((16, 4))(layers.Conv2D(4, 2, strides=2)(given))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    return keras.Model(given, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


def compiled():
    model = models.plain()
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(1e-3, 10, 0.9)), "mse", metrics=["mae"]
    )
    model.fit(np.zeros((2, 16, 16, 3)), np.zeros((2, 5)), verbose=0)
    return model


LEGITIMATE = [
    operations, kinds_of_layers, mixed_precision, half, recurrent, attention, compiled,
    models.nested, models.shared, models.two_in_two_out,
]  # fmt: skip


@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
@pytest.mark.parametrize("make", LEGITIMATE)
def test_legitimate_models_come_back_bit_by_bit(make, name, tmp_path):
    model = make()
    if name == "m.h5" and make in (operations, attention, half, kinds_of_layers, models.shared):
        pytest.skip("Keras itself does not read its own HDF5 of these")
    opened = keras_files.read(sniff(saved(tmp_path, model, name))).model
    assert len(opened.weights) == len(model.weights) > 0
    for got, wanted in zip(opened.weights, model.weights, strict=True):
        one, two = (keras.ops.convert_to_numpy(item.value) for item in (got, wanted))
        assert (one.dtype, one.tobytes()) == (two.dtype, two.tobytes())


@pytest.mark.skipif(not hasattr(layers.Dense, "quantize"), reason="this Keras does not quantize")
def test_a_quantized_model_opens(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4)])
    model.quantize("int8")
    opened = keras_files.read(sniff(saved(tmp_path, model))).model
    assert [str(item.dtype) for item in opened.weights] == [str(item.dtype) for item in model.weights]


# -- what a config may name ------------------------------------------------------------------------------

BAD = {
    "a function of Keras that fetches files": {"class_name": "get_file", "module": "keras.utils", "config": {}},
    "a loader": {"class_name": "load_model", "module": "keras.saving", "config": {"filepath": "/etc/passwd"}},
    "another framework's layer": {"class_name": "TFSMLayer", "module": "keras.layers", "config": {"filepath": "x"}},
    "pickles": {"class_name": "TorchModuleWrapper", "module": "keras.layers", "config": {"module": "gASV"}},
    "jax": {"class_name": "JaxLayer", "module": "keras.layers", "config": {}},
    "word lists": {"class_name": "StringLookup", "module": "keras.layers", "config": {"vocabulary": "/etc/passwd"}},
    "features": {"class_name": "FeatureSpace", "module": "keras.utils", "config": {}},
    "os": {"class_name": "system", "module": "os", "config": {}, "registered_name": "system"},
    "a module's path": {"class_name": "Dense", "module": "evil", "config": {"units": 3}},
    "a longer name": {"class_name": "Dense", "module": "keras_evil.layers", "config": {"units": 3}},
    "an inner function": {"class_name": "func_load", "module": "keras.src.utils.python_utils", "config": {}},
    "loops": {"class_name": "WhileLoop", "module": "keras.src.ops.core", "config": {}},
    "mapped functions": {"class_name": "Map", "module": "keras.src.ops.core", "config": {}},
    "types": {"class_name": "__typespec__", "spec_name": "x", "module": "os", "registered_name": "x", "config": []},
    "a lambda": {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    "a dtype of a gigabyte": {"class_name": "__numpy__", "config": {"value": "a", "dtype": "S2000000000"}},
    "no text": {"class_name": ["Dense"], "config": {}},
    "no module": {"class_name": "Dense", "module": 3, "config": {}},
    "a callback": {"class_name": "LambdaCallback", "module": "keras.callbacks", "config": {}},
}  # fmt: skip
FUNCTIONS = {
    "of the system": {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"},
    "of builtins": {"module": "builtins", "class_name": "function", "config": "eval", "registered_name": "eval"},
    "of Keras": {"module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "x"},
    "settings": {
        "module": "keras.config",
        "class_name": "function",
        "config": "enable_unsafe_deserialization",
        "registered_name": "enable_unsafe_deserialization",
    },
}  # fmt: skip
PLACES = ("layer", "kernel_initializer", "activation", "dtype", "bias_regularizer", "unused", "build_config", "root")


def put(config, place, item):
    item = copy.deepcopy(item)
    conv = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Conv2D")
    if place == "layer":
        item.setdefault("config", {})
        config["config"]["layers"].insert(1, item)
    elif place == "root":
        config.update(item)
    elif place == "build_config":
        conv["build_config"] = {"input_shape": item}
    else:
        conv["config"][place] = item


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD)
def test_what_is_not_listed_is_refused_before_keras_sees_it(name, place, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("Keras was asked to build it")

    monkeypatch.setattr(keras.saving, "load_model", never)
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", never)
    refused(with_config(saved(tmp_path), lambda config: put(config, place, BAD[name])))
    refused(as_hdf5(tmp_path, lambda config: put(config, place, BAD[name])))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_activations_are_functions(name, tmp_path):
    refused(with_config(saved(tmp_path), lambda config: put(config, "activation", FUNCTIONS[name])), "the function")
    refused(as_hdf5(tmp_path, lambda config: put(config, "activation", FUNCTIONS[name])))


def test_a_registered_name_does_not_take_the_place_of_a_builtin(tmp_path):
    """The file says Conv2D of Keras, and beside that the registered name of a class of the user's."""

    class Own(layers.Layer):
        def __init__(self, **options):
            raise AssertionError("made by a file that did not say so")

    with keras.saving.custom_object_scope({}):
        keras.saving.get_custom_objects()["own>Conv2D"] = Own
        try:
            opened = keras_files.read(sniff(saved(tmp_path)))
        finally:
            del keras.saving.get_custom_objects()["own>Conv2D"]
    assert type(opened.model.layers[0]) is layers.Conv2D


def test_what_compiling_needs_is_left_out(tmp_path):
    """Also inside: Keras compiles a nested model that has a compile_config, whatever `compile` says."""
    bad = {"class_name": "system", "module": "os", "config": {}}

    def change(config):
        for item in (config, *config["config"]["layers"]):
            item["compile_config"] = {"optimizer": bad, "loss": bad}

    with_config(saved(tmp_path, models.nested()), change)
    assert keras_files.read(sniff(tmp_path / "m.keras")).model.built


def test_every_listed_name_is_one_of_keras():
    """By Keras' own lookup each name is a class that only computes; old Keras may lack some."""
    import importlib

    kinds = (layers.Layer, keras.Operation, keras.initializers.Initializer, keras.regularizers.Regularizer)
    kinds = (
        *kinds,
        keras.constraints.Constraint,
        keras.dtype_policies.DTypePolicy,
        keras.dtype_policies.DTypePolicyMap,
    )
    other = {"InputSpec", "SeedGenerator", "AbsMaxQuantizer", "Functional"}
    for module, names in keras_config.ALLOWED.items():
        home = importlib.import_module(module)
        for name in names:
            found = getattr(home, name, None)
            if found is None or name in other or name.endswith("QuantizationConfig"):
                continue
            assert issubclass(found, kinds), (module, name)


# -- what a config may declare ---------------------------------------------------------------------------


def huge(units):
    def change(config):
        config["config"]["layers"][-1]["config"]["units"] = units

    return change


@pytest.mark.parametrize("units", [2**27, 2**30, 2**33, 2**62])
def test_layers_larger_than_their_file_are_not_allocated(units, tmp_path):
    refused(with_config(saved(tmp_path), huge(units)), "larger|declare more than")
    refused(as_hdf5(tmp_path, huge(units)), "larger|declare more than")


def test_many_layers_that_are_large_together(tmp_path):
    def change(config):
        conv = next(layer for layer in config["config"]["layers"] if layer["class_name"] == "Conv2D")
        for number in range(200):
            more = copy.deepcopy(conv)
            more.pop("build_config", None)
            more["config"].update(name=f"more{number}", filters=300, padding="same", kernel_size=[3, 3])
            config["config"]["layers"].insert(-2, more)

    refused(with_config(saved(tmp_path), change), "declare more than")


@pytest.mark.parametrize("shape", [[None, 2**20, 2**20, 3], [2**40, 16, 16, 3]])
def test_inputs_that_no_image_has(shape, tmp_path):
    def change(config):
        config["config"]["layers"][0]["config"]["batch_shape"] = shape

    refused(with_config(saved(tmp_path), change), "expected an input for images")


@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
@pytest.mark.parametrize("nested", [False, True])
def test_outputs_that_no_memory_holds(nested, name, tmp_path):
    given = keras.Input((16, 16, 3))
    large = layers.UpSampling2D(20_000)(layers.Conv2D(4, 3)(given))
    model = keras.Model(given, layers.Dense(2)(layers.GlobalAveragePooling2D()(large)))
    if nested:
        model = keras.Sequential([keras.Input((16, 16, 3)), model, layers.Dense(2)])
    refused(saved(tmp_path, model, name), "outputs that fit the memory")


def test_deep_configs_are_one_error(tmp_path):
    path = saved(tmp_path)
    members = parts(path)
    for text in ("[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 300 + "]" * 300):
        refused(repacked(path, {**members, "config.json": text}))

    def change(config):
        for _ in range(40):
            inner = copy.deepcopy(config)
            config.clear()
            config.update({**inner, "config": {"name": "around", "layers": [inner]}, "class_name": "Sequential"})

    refused(with_config(saved(tmp_path), change), "nested too deep")


# -- archives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "metadata.json", "model.weights.h5"])
def test_bombs_are_not_unpacked(name, tmp_path):
    path = saved(tmp_path)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block, packed, size, check = b" " * 2**20, [], 0, 0
    for _ in range(100):
        packed.append(packer.compress(block))
        size, check = size + len(block), zlib.crc32(block, check)
    data = b"".join(packed) + packer.flush()
    members = {key: value for key, value in parts(path).items() if key != name}
    repacked(path, members)
    raw = _appended(path.read_bytes(), name, data, size, check)
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo(name).file_size == 100 * 2**20
    refused(path, "would unpack to")
    for said in (100, 2**16):  # the header says less than there is
        path.write_bytes(raw.replace(struct.pack("<I", size), struct.pack("<I", said)))
        refused(path)


def _appended(raw, name, data, size, check):
    """A zip archive with one more deflated member."""
    end = raw.rindex(b"PK\x05\x06")
    count, _, start = struct.unpack("<HII", raw[end + 10 : end + 20])
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 8, 0, 0, check, len(data), size, len(name), 0)
    central = struct.pack(
        *("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 8, 0, 0, check, len(data), size, len(name)),
        *(0, 0, 0, 0, 0, start),
    )
    body = raw[:start] + local + name.encode() + data
    directory = raw[start:end] + central + name.encode()
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count + 1, count + 1, len(directory), len(body), 0)
    return body + directory + tail


def test_a_part_that_is_there_twice(tmp_path):
    path = saved(tmp_path)
    members = parts(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", members["config.json"])
    refused(path, "config.json twice")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing(method, tmp_path):
    path = saved(tmp_path)
    refused(repacked(path, parts(path), compression=method), "stored or deflated")


def test_a_deflated_archive_opens(tmp_path):
    """Archives that people have packed again, with what their system adds."""
    path = saved(tmp_path)
    members = {**parts(path), "__MACOSX/._config.json": b"x", "README.md": b"hello", "../evil": b"x"}
    opened = keras_files.read(sniff(repacked(path, members, compression=zipfile.ZIP_DEFLATED)))
    assert opened.model.built
    assert not (tmp_path.parent / "evil").exists()


def test_an_encrypted_part(tmp_path):
    path = saved(tmp_path)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\x01\x02")
    while place >= 0:
        raw[place + 8] |= 1
        place = raw.find(b"PK\x01\x02", place + 4)
    path.write_bytes(raw)
    refused(path, "encrypted")


def test_damaged_archives_are_one_error_each(tmp_path):
    """Bytes drawn at random are overwritten, parts are cut off: the model, or a ModelError."""
    content, rng = saved(tmp_path).read_bytes(), np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            damaged[place] = rng.integers(256)
        if number % 3 == 0:
            damaged = damaged[: rng.integers(len(damaged))]
        (tmp_path / "d.keras").write_bytes(damaged)
        with contextlib.suppress(ModelError):
            keras_files.read(sniff(tmp_path / "d.keras"))


def test_texts_have_a_limit(tmp_path):
    path = saved(tmp_path)
    with limits.using(text=1000), pytest.raises(ModelError, match="limit text"):
        keras_files.read(sniff(path))


def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    path = saved(tmp_path, models.plain(classes=4))
    model = models.plain()
    before = [item.copy() for item in model.get_weights()]
    with pytest.raises(ModelError):
        keras_files.load_weights(model, path)
    assert all(np.array_equal(one, two) for one, two in zip(before, model.get_weights(), strict=True))


def test_nothing_is_read_from_outside_an_archive(tmp_path):
    """External values in the weights of an archive, claimed or not."""
    import h5py
    from test_hdf5 import external, with_secret

    path = saved(tmp_path)
    members = parts(path)
    with h5py.File(io.BytesIO(members["model.weights.h5"]), "r") as source, h5py.File(tmp_path / "w.h5", "w") as file:
        for name in source:
            source.copy(name, file)
        external(file, "unclaimed", with_secret(tmp_path))
    members["model.weights.h5"] = (tmp_path / "w.h5").read_bytes()
    refused(repacked(path, members), "lies in another file")
    with pytest.raises(ModelError, match="lies in another file"):
        keras_files.load_weights(models.plain(), tmp_path / "w.h5")


@pytest.mark.parametrize(
    "args",
    [
        [0, 2_000_000_000],
        [{"class_name": "__numpy__", "config": {"value": [1.0], "dtype": "float32"}}],
        [{"class_name": "__slice__", "config": {"start": {"class_name": "__keras_tensor__", "config": {}}}}],
        [],
    ],
)
def test_a_call_that_takes_constants_alone_is_refused(args):
    """Keras computes it at once, while it builds the model."""
    layer = {"class_name": "ReLU", "config": {}, "inbound_nodes": [{"args": args, "kwargs": {}}]}
    with pytest.raises(ModelError, match="constants alone"):
        keras_config.checked({"class_name": "Functional", "config": {"layers": [layer]}}, lambda key: None, "m.keras")


def test_a_call_with_a_tensor_among_constants_is_taken():
    tensor = {"class_name": "__keras_tensor__", "config": {"shape": [None, 3], "keras_history": ["in", 0, 0]}}
    layer = {"class_name": "Add", "config": {}, "inbound_nodes": [{"args": [[1.0, {"x": tensor}]], "kwargs": {}}]}
    config = {"class_name": "Functional", "config": {"layers": [layer]}}
    assert keras_config.checked(config, lambda key: None, "m.keras")


# -- only names go on to Keras -----------------------------------------------------------------------------


def mine(x):
    return x


def drawn(shape, dtype=None):
    return ops.ones(shape, dtype)


class Mine(layers.Layer):
    pass


PLANTED = "planted_by_a_file"
NAMES_ONLY = {
    "a function by its registered name": {"class_name": "function", "config": "system", "registered_name": "mine"},
    "a function by its name": {"class_name": "function", "config": "mine", "registered_name": "function"},
    "the function that old files get": {
        "class_name": "function",
        "config": "system",
        "registered_name": "hard_sigmoid_of_keras_2",
    },
    "an activation": {"class_name": "function", "config": "relu", "registered_name": "relu"},
    "a class by its registered name": {"class_name": "system", "config": {}, "registered_name": "own>Mine"},
    "a class by its name": {"class_name": "Mine", "config": {}, "registered_name": None},
    "a value": {"class_name": "__numpy__", "config": {"value": [1.0], "dtype": "float32"}, "registered_name": "mine"},
    "a tensor": {"class_name": "__keras_tensor__", "config": {}, "registered_name": "mine"},
    "a Lambda": {
        "class_name": "Lambda",
        "registered_name": "mine",
        "config": {
            "name": "code",
            "function": {"class_name": "function", "module": PLANTED, "config": "system", "registered_name": "mine"},
            "arguments": {"axis": 1, "module": 2},
        },
    },
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that leaves a mark where it is imported, and what the user registered."""
    mark = tmp_path / "imported"
    (tmp_path / f"{PLANTED}.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef system(*_, **__): return 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = keras.saving.get_custom_objects()
    for key, item in {"mine": mine, "drawn": drawn, "own>Mine": Mine}.items():
        monkeypatch.setitem(known, key, item)
    return mark


def modules_in(item):
    """Every text under the key `module` of an object."""
    if isinstance(item, dict) and "class_name" in item:
        yield from (text for key, text in item.items() if key == "module" and text is not None)
    if isinstance(item, dict | list):
        for child in item.values() if isinstance(item, dict) else item:
            yield from modules_in(child)


@pytest.mark.parametrize("case", NAMES_ONLY)
def test_no_module_that_a_file_names_goes_on_to_keras(case, planted):
    node = {**NAMES_ONLY[case], "module": PLANTED}
    old = "hard_sigmoid_of_keras_2"  # as building an old file registers it
    config = {"inside": [{"deeper": node}]}
    seen = keras_config.checked(config, lambda key: old if key == old else registered_key(key), "m.keras")
    seen = seen["inside"][0]["deeper"]
    assert set(modules_in(seen)) <= {"builtins", "keras.layers"}
    assert "system" not in json.dumps(seen)
    if node["class_name"] == "function":
        name = seen["config"]
        assert seen == {"class_name": "function", "config": name, "module": "builtins", "registered_name": name}
    assert PLANTED not in sys.modules
    assert not planted.exists()


def with_initializer(tmp_path, ending, registered_name):
    """A file whose convolutions draw their kernels by a function of this registered name, of the planted module."""
    function = {"class_name": "function", "module": PLANTED, "config": "system", "registered_name": registered_name}

    def change(config):
        for layer in config["config"]["layers"]:
            if "kernel_initializer" in layer["config"]:
                layer["config"]["kernel_initializer"] = function

    return as_hdf5(tmp_path, change) if ending == "h5" else with_config(saved(tmp_path), change)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_registered_name_decides_and_the_module_beside_it_is_not_looked_up(tmp_path, planted, ending):
    model = keras_files.read(sniff(with_initializer(tmp_path, ending, "drawn"))).model
    assert any(getattr(layer, "kernel_initializer", None) is drawn for layer in model.layers)
    assert PLANTED not in sys.modules
    assert not planted.exists()


def test_the_function_for_old_files_opens_no_way_to_a_module(tmp_path, planted):
    """It is registered for every HDF5 file, whatever the user registered."""
    with pytest.raises(ModelError):
        keras_files.read(sniff(with_initializer(tmp_path, "h5", "hard_sigmoid_of_keras_2")))
    assert PLANTED not in sys.modules
    assert not planted.exists()
