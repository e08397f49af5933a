"""A spec is what a network was opened with: sent to another process, it opens the same network."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from expecting import raises

import convscope
from convscope import limits
from convscope.errors import ConvscopeError, ModelError, UsageError
from convscope.networks import ModelSpec, open_model
from convscope.networks.preprocessing import CERTAINTIES, Preprocessing
from convscope.networks.spec import Options

PIXELS = np.random.default_rng(7).integers(0, 256, (2, 12, 12, 3)).astype(np.float32)

# What another process does with a spec: open it, and say what the network answers.
OTHER = """
import json, pickle, sys
import numpy as np
spec = pickle.load(open(sys.argv[1], "rb"))
network = spec.open()
logits, _ = network.forward(network.preprocessing.apply(np.load(sys.argv[2])))
np.save(sys.argv[3], logits)
print(json.dumps([network.weights_sha256(), network.describe()["spec"] == spec.describe()]))
"""

CODE = """
def net(width=4):
    import torch
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(width, 5),
    )
"""


def torch_net():
    import torch

    torch.manual_seed(3)
    made = {}
    exec(CODE, made)
    return made["net"]().eval()


def keras_net():
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, activation="softmax"),
        ]
    )


def keras_file(name):
    def make():
        keras_net().save(name)
        return open_model(name, preprocess="0..1", classes=list("abcde"))

    return make


def onnx_file():
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(3)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)), "d": rng.normal(size=(4, 5))}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "d"], ["y"], name="dense"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    held = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", [given], [made], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), "net.onnx")
    return open_model("net.onnx", head="softmax")


def torchscript_file():
    torch = pytest.importorskip("torch")
    torch.jit.script(torch_net()).save("net.pt")
    return open_model("net.pt", size=12)


def exported_file():
    torch = pytest.importorskip("torch")
    program = torch.export.export(torch_net(), (torch.zeros(2, 3, 12, 12),))
    torch.export.save(program, "net.pt2")
    return open_model("net.pt2")


def code_with_weights():
    torch = pytest.importorskip("torch")
    Path("code.py").write_text(CODE)
    torch.save(torch_net().state_dict(), "weights.pt")
    return open_model("code.py:net?width=4", weights="weights.pt", size=(12, 12))


def collection():
    pytest.importorskip("keras")
    return open_model("keras:MobileNet?weights=none&alpha=0.25&classes=5&input_shape=(32,32,3)")


WAYS = {
    "keras": keras_file("net.keras"),
    "hdf5": keras_file("net.h5"),
    "onnx": onnx_file,
    "torchscript": torchscript_file,
    "exported": exported_file,
    "code": code_with_weights,
    "collection": collection,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow(reason="another process imports the framework")
def test_a_spec_opens_the_same_network_in_another_process(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = WAYS[way]()
    pixels = PIXELS if network.inputs.size == (12, 12) else np.resize(PIXELS, (2, 32, 32, 3))
    logits, _ = network.forward(network.preprocessing.apply(pixels))
    (tmp_path / "elsewhere").mkdir()
    spec, given, answers = (tmp_path / "elsewhere" / name for name in ("spec.pickle", "pixels.npy", "logits.npy"))
    spec.write_bytes(pickle.dumps(network.spec))
    np.save(given, pixels)
    arguments = [sys.executable, "-c", OTHER, spec, given, answers]
    done = subprocess.run(arguments, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [network.weights_sha256(), True]
    np.testing.assert_array_equal(np.load(answers), logits)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A network of code with weights, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return code_with_weights()


def test_a_spec_is_a_value(opened):
    spec = opened.spec
    again = open_model("code.py:net?width=4", weights="weights.pt", size=(12, 12)).spec
    assert spec == again
    assert hash(spec) == hash(again) == hash(pickle.loads(pickle.dumps(spec)))
    assert spec != open_model("code.py:net?width=4", weights="weights.pt", size=(12, 13)).spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.source = "other.py:net"


def test_a_spec_with_arrays_is_a_value():
    from convscope.networks.spec import Fed

    fed, other = np.arange(3.0), np.arange(3.0)
    assert Fed("mask", fed) == Fed("mask", other)
    assert hash(Fed("mask", fed)) == hash(Fed("mask", other))
    assert Fed("mask", fed) != Fed("mask", fed.astype(np.float32))
    assert Fed("mask", fed) != Fed("mask", fed[:, None])


def test_open_model_takes_a_spec(opened):
    assert open_model(opened.spec).weights_sha256() == opened.weights_sha256()
    with pytest.raises(UsageError, match="a spec says how"):
        open_model(opened.spec, size=20)


def test_a_spec_is_in_the_provenance_as_plain_json(opened):
    from hashlib import sha256

    found = convscope.activations(opened, PIXELS[0].astype(np.uint8), layers=[opened.layers[0].path])
    written = json.loads(json.dumps(found.provenance))["network"]["spec"]
    assert written == opened.spec.describe()
    assert written["source"] == "code.py:net?width=4"
    assert written["sha256"] == sha256(Path("code.py").read_bytes()).hexdigest()
    assert written["weights_file_sha256"] == sha256(Path("weights.pt").read_bytes()).hexdigest()
    assert os.getcwd() not in json.dumps(written)


@pytest.mark.parametrize("name", ["code.py", "weights.pt"])
def test_a_file_that_has_changed_since_is_refused(name, opened):
    before = opened.spec.origin.sha256 if name == "code.py" else opened.spec.origin.weights_sha256
    with open(name, "ab") as file:
        file.write(b"\n")
    with pytest.raises(
        ModelError, match=rf"{name} has changed since the spec was made: expected SHA-256 {before}, found \w+\. Give"
    ):
        opened.spec.open()


def test_a_model_file_that_has_changed_since_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch = pytest.importorskip("torch")
    spec = torchscript_file().spec
    torch.jit.script(torch_net()[:2]).save("net.pt")
    with pytest.raises(
        ModelError, match=r"net\.pt has changed since the spec was made: expected SHA-256 \w+, found \w+"
    ):
        spec.open()


def test_a_model_in_memory_cannot_be_sent():
    pytest.importorskip("torch")
    spec = pickle.loads(pickle.dumps(open_model(torch_net(), size=12).spec))
    with pytest.raises(UsageError, match=r"Sequential in memory, which is in the memory of one process\. Save it"):
        spec.open()
    with pytest.raises(UsageError, match="in the memory of one process"):
        ModelSpec.from_json(spec.describe()).open()


def test_trust_never_travels(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3)), "whole.pt")
    spec = open_model("whole.pt", size=12, trust=True).spec
    assert spec.describe()["trusted"] is True
    for sent in (spec, pickle.loads(pickle.dumps(spec)), ModelSpec.from_json(spec.describe())):
        with pytest.raises(ModelError, match="is a pickle that would run code"):
            sent.open()
        assert sent.open(trust=True).weights_sha256() == open_model("whole.pt", size=12, trust=True).weights_sha256()


@pytest.mark.parametrize("source", ["evil.py:net", "os:getpid", "timm:hf-hub:some/one", "keras:VGG16?weights=/x.h5"])
def test_what_a_json_names_is_not_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w').close()\ndef net(): return None\n")
    described = {**ModelSpec("net.onnx").describe(), "source": source}
    for kind in ("file", "code", "collection"):
        with pytest.raises(UsageError, match="JSON"):
            ModelSpec.from_json({**described, "kind": kind, "trusted": True}).open()
    assert not Path("ran").exists()


def test_json_of_a_file_opens_it_with_the_limits_in_force(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = torchscript_file()
    told = json.loads(json.dumps({**network.spec.describe(), "limits": {"weights": 2**60}}))
    monkeypatch.chdir("/")
    spec = ModelSpec.from_json(told, folder=tmp_path)
    assert spec.limits == limits.current()
    assert spec.open().weights_sha256() == network.weights_sha256()
    with limits.using(weights=10), pytest.raises(ModelError, match="CONVSCOPE_LIMITS=weights"):
        spec.open()


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": 5},
        {"kind": "url"},
        {"head": "tanh"},
        {"size": [12]},
        {"size": [0, 12]},
        {"preprocess": {"name": "none"}},
        {"preprocess": {"name": "a", "mean": [0], "std": [0], "certainty": "set", "reason": ""}},
        {"feed": [{"name": "mask"}]},
        {"weights": ["a"]},
    ],
    ids=str,
)
def test_json_that_is_no_spec(change):
    with pytest.raises(ConvscopeError, match="expected"):
        ModelSpec.from_json({**ModelSpec("net.onnx").describe(), **change})


def test_preprocessing_and_classes_come_back_from_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("a\nb\nc\nd\ne\n")
    torchscript_file()
    for classes in ("names.txt", list("abcde")):
        network = open_model("net.pt", size=12, preprocess="1,2,3,4,5,6", classes=classes)
        again = ModelSpec.from_json(json.loads(json.dumps(network.spec.describe()))).open()
        assert again.preprocessing == network.preprocessing
        assert again.class_names == tuple("abcde")


@pytest.mark.parametrize("certainty", CERTAINTIES)
@pytest.mark.parametrize("bgr", [False, True])
def test_every_field_of_a_preprocessing_comes_back_from_json(certainty, bgr):
    given = Preprocessing("own", (1.0, 2.0), (3.0, 4.0), bgr, certainty, "a reason", "resnet50", "torch")
    spec = ModelSpec("net.onnx", options=Options(preprocess=given))
    assert ModelSpec.from_json(json.loads(json.dumps(spec.describe()))).options.preprocess == given


def test_a_preprocessing_without_the_newer_fields_comes_back_from_json():
    data = ModelSpec("net.onnx", options=Options(preprocess=Preprocessing("own"))).describe()
    del data["preprocess"]["named_after"], data["preprocess"]["instead_of"]
    assert ModelSpec.from_json(data).options.preprocess == Preprocessing("own")


@pytest.mark.parametrize(
    "change",
    [
        *({"certainty": "sure"}, {"name": None}, {"reason": None}, {"order": 1}, {"mean": []}, {"mean": 3}),
        *({"std": [-1]}, {"std": ["1"]}, {"named_after": 3}, {"instead_of": []}),
    ],
    ids=str,
)
def test_json_that_is_no_preprocessing(change):
    data = ModelSpec("net.onnx", options=Options(preprocess=Preprocessing("own"))).describe()
    data["preprocess"] |= change
    with raises(ModelError, "spec-invalid") as caught:
        ModelSpec.from_json(data)
    assert caught.value.data["name"].startswith(f"preprocess.{next(iter(change))}")


def test_a_file_is_sniffed_once(tmp_path, monkeypatch):
    from convscope.networks import Named
    from convscope.networks.formats import files

    monkeypatch.chdir(tmp_path)
    pytest.importorskip("h5py")
    keras_net().save("net.h5")
    seen, hashed = [], []
    kind_of, sha256 = files.kind_of_file, files.sha256
    monkeypatch.setattr(files, "kind_of_file", lambda path: seen.append(path) or kind_of(path))
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or sha256(path))
    named = Named("net.h5")  # as the command line does: it asks for the framework first
    assert named.needs_keras
    open_model(named)
    assert len(seen) == len(hashed) == 1
