"""PyTorch's files: weights land where they belong, nothing is run unasked, and each refusal says why."""

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch_models  # noqa: E402
from assets import ASSETS, needs_assets  # noqa: E402
from expecting import raises  # noqa: E402
from torch import nn  # noqa: E402

import convscope  # noqa: E402
from convscope import limits  # noqa: E402
from convscope.errors import BackendError, ModelError, UsageError  # noqa: E402
from convscope.images.decode import read_images  # noqa: E402
from convscope.networks.formats import pickles  # noqa: E402
from convscope.networks.formats.files import kind_of_file, sniff  # noqa: E402
from convscope.networks.formats.torch import files as torch_files  # noqa: E402

pytestmark = pytest.mark.without_keras

HERE = torch_models.__file__


def guesses(network, files):
    photos = read_images(files)
    found = [network.predict(network.prepare(photos[start : start + 50])) for start in range(0, len(photos), 50)]
    return np.concatenate(found)


def net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 4, 3),
            bn=nn.BatchNorm2d(4),
            conv2=nn.Conv2d(4, 4, 3),
            conv3=nn.Conv2d(4, 4, 3),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, classes),
        )
    )


def other(module):
    """The same architecture with other weights."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(1)
    return module


# -- the real files --------------------------------------------------------------------------------------


def cifar(name):
    files = sorted((ASSETS / "photos" / "cifar10").glob("*/*.*"))
    order = sorted(folder.name for folder in (ASSETS / "photos" / "cifar10").iterdir())
    return files, np.array([order.index(file.parent.name) for file in files])


@needs_assets
@pytest.mark.parametrize(
    ("name", "file", "options", "least"),
    [
        ("resnet20", "resnet20_cifar10.th", {}, 0.75),
        ("tutorial", "cifar10_tutorial_net.pt", {"preprocess": "-1..1"}, 0.50),
    ],
)
def test_cifar(name, file, options, least):
    network = convscope.open_model(f"{HERE}:{name}", weights=ASSETS / "torch" / file, **options)
    assert network.inputs.size == (32, 32)
    files, truth = cifar(name)
    assert (guesses(network, files).argmax(axis=1) == truth).mean() >= least


@needs_assets
@pytest.mark.slow(reason="a real network of ImageNet")
def test_imagenet():
    network = convscope.open_model(
        f"{HERE}:squeezenet",
        weights=ASSETS / "torch" / "squeezenet1_1.safetensors",
        classes=ASSETS / "imagenet_class_index.json",
    )
    assert network.preprocessing.name == "torch"
    assert network.preprocessing.certainty == "guess"
    codes = {code: int(n) for n, (code, _) in json.loads((ASSETS / "imagenet_class_index.json").read_text()).items()}
    files = sorted((ASSETS / "photos" / "imagenet").glob("*.jpg"))
    truth = np.array([codes[file.name.split("_")[0]] for file in files])
    logits = guesses(network, files)
    assert (logits.argmax(axis=1) == truth).mean() >= 0.50
    assert (np.argsort(-logits, axis=1)[:, :5] == truth[:, None]).any(axis=1).mean() >= 0.75
    tabby = network.predictions(guesses(network, [ASSETS / "photos" / "misc" / "cat_keras-squeezenet.jpeg"])[0])[0]
    assert tabby.name == "tabby"
    assert tabby.probability > 0.5


@needs_assets
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet20", "resnet20_cifar10.th"),
        ("tutorial", "cifar10_tutorial_net.pt"),
        ("squeezenet", "squeezenet1_1.safetensors"),
    ],
)
def test_each_weight_of_a_real_file_is_in_its_place_and_none_is_left_over(name, file):
    path = ASSETS / "torch" / file
    module = getattr(torch_models, name)()
    torch_files.fill(module, path)
    # Read apart from the code under test.
    if file.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stored:
            expected = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    else:
        expected = torch.load(path, map_location="cpu", weights_only=True)
        expected = expected.get("state_dict", expected)
    expected = {key.removeprefix("module."): tensor for key, tensor in expected.items()}
    state = {key: value for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@needs_assets
def test_swapped_kernels_of_a_real_file_are_seen(tmp_path):
    """The check above, and the predictions, must be able to fail."""
    state = torch.load(ASSETS / "torch" / "resnet20_cifar10.th", map_location="cpu", weights_only=True)["state_dict"]
    one, two = "module.layer1.0.conv1.weight", "module.layer1.0.conv2.weight"
    state[one], state[two] = state[two], state[one]
    torch.save(state, tmp_path / "swapped.pt")
    files, truth = cifar("resnet20")
    network = convscope.open_model(f"{HERE}:resnet20", weights=tmp_path / "swapped.pt")
    assert (guesses(network, files).argmax(axis=1) == truth).mean() < 0.5


@needs_assets
def test_the_pickled_module_is_refused_by_name():
    with pytest.raises(ModelError, match=r"__main__\.CNN"):
        convscope.open_model(ASSETS / "torch" / "digits_whole_module_pickle.pth")


@needs_assets
@pytest.mark.parametrize("file", ["resnet20_cifar10.th", "cifar10_tutorial_net.pt", "squeezenet1_1.safetensors"])
def test_weights_alone_say_how_to_give_the_code(file):
    with pytest.raises(ModelError, match=r"holds weights only .* file\.py:function, and this file as weights="):
        convscope.open_model(ASSETS / "torch" / file)


# -- unwrapping ------------------------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: state, None),
        (lambda state: {"state_dict": state, "epoch": 3, "best_prec1": np.float64(91.2)}, "'state_dict'"),
        (lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, "'model'"),
        (lambda state: {"model_state_dict": state}, "'model_state_dict'"),
        (lambda state: prefixed(state, "module."), "'module.'"),
        (lambda state: prefixed(state, "_orig_mod."), "'_orig_mod.'"),
        (lambda state: {"state_dict": prefixed(state, "module._orig_mod.")}, "'module._orig_mod.'"),
        (lambda state: prefixed(state, "a prefix.of-nobody."), "'a prefix.of-nobody.'"),
        (lambda state: {"state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(2)}}, "under 'model.'"),
        (lambda state: {"state_dict_ema": state}, "'state_dict_ema'"),
        (lambda state: {"state_dict": state, "state_dict_of_judge": {"w": torch.ones(2, 2)}}, "state_dict_of_judge"),
        (lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, None),
    ],
)
def test_wrappers(tmp_path, wrap, note):
    module = net()
    torch.save(wrap(module.state_dict()), tmp_path / "weights.pt")
    filled = other(net())
    notes = torch_files.fill(filled, tmp_path / "weights.pt")
    assert all(
        torch.equal(value, module.state_dict()[key])
        for key, value in filled.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    assert note is None or any(note in said for said in notes)


def test_the_file_may_lack_the_prefix_of_a_wrapped_module(tmp_path):
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    filled = nn.DataParallel(other(net()))
    assert "'module.'" in " ".join(torch_files.fill(filled, tmp_path / "weights.pt"))
    assert torch.equal(filled.module.conv.weight, net().conv.weight)


@pytest.mark.parametrize("new", [True, False])
def test_files_from_before_the_archives(tmp_path, new):
    torch.save(net().state_dict(), tmp_path / "weights.pt", _use_new_zipfile_serialization=new)
    filled = other(net())
    torch_files.fill(filled, tmp_path / "weights.pt")
    assert torch.equal(filled.fc.weight, net().fc.weight)


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file(net().state_dict(), tmp_path / "weights.bin")  # the name plays no part
    filled = other(net())
    torch_files.fill(filled, tmp_path / "weights.bin")
    assert torch.equal(filled.conv2.bias, net().conv2.bias)


def test_lazily_created_layers_take_their_shapes_from_the_file(tmp_path):
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
    full = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    torch.save(full.state_dict(), tmp_path / "weights.pt")
    torch_files.fill(module, tmp_path / "weights.pt")
    assert torch.equal(module[0].weight, full[0].weight)


# -- what does not match ---------------------------------------------------------------------------------


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: without(s, "conv2.weight"), ["1 missing (conv2.weight"]),
        (
            lambda s: {**without(s, "conv2.weight"), "conv_2.weight": s["conv2.weight"]},
            ["conv_2.weight", "did you mean"],
        ),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, ["not in the network (extra.weight)"]),
        (lambda s: {**s, "fc.weight": torch.ones(7, 4)}, ["fc.weight is (7, 4), not (3, 4)"]),
        (lambda s: {}, ["empty"]),
        (lambda s: {"epoch": 3, "loss": 0.1}, ["expected a state dict", "'epoch'"]),
        (lambda s: [1, 2], ["expected a state dict", "a list"]),
    ],
)
def test_keys_that_do_not_match_are_named(tmp_path, change, words):
    torch.save(change(net().state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ModelError) as error:
        torch_files.fill(net(), tmp_path / "weights.pt")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_weights_of_another_network(tmp_path):
    torch.save(torch_models.tutorial().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"missing .* not in the network"):
        torch_files.fill(net(), tmp_path / "weights.pt")


# -- pickles ---------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("how", ["archive", "old", "plain"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path, how):
    marker, path = tmp_path / "was-run", tmp_path / "model.pt"
    state = {"state_dict": net().state_dict(), "evil": Evil(marker)}
    if how == "plain":
        path.write_bytes(pickle.dumps(Evil(marker), protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "archive")
    filled = other(net())
    if how == "plain":
        for attempt in (lambda: convscope.open_model(path), lambda: torch_files.fill(filled, path)):
            with pytest.raises(ModelError, match=r"builtin\w*\.exec"):
                attempt()
    else:  # the weights beside it are read, and it is left out
        torch_files.fill(filled, path)
        assert torch.equal(filled.conv.weight, net().conv.weight)
        with raises(ModelError, "weights-alone"):
            convscope.open_model(path)
    assert not marker.exists()


def test_a_pickle_of_a_later_protocol_is_no_model(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "was-run"), protocol=4))
    with pytest.raises(ModelError):
        convscope.open_model(path)
    assert not (tmp_path / "was-run").exists()


def test_objects_that_would_read_foreign_memory_are_not_made(tmp_path):
    """An array of Python objects made of the file's bytes is an array of pointers that the file chooses."""

    class Pointers:
        def __reduce__(self):
            return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")

    torch.save({"state_dict": {"w": torch.ones(2)}, "beside": Pointers()}, tmp_path / "net.pth")
    code = "import sys; from convscope.networks.formats.torch.files import load_state_dict as load\n"
    code += "from pathlib import Path; from convscope.networks.formats.files import sniff\n"
    code += "print(load(sniff(Path(sys.argv[1])))[0]['w'].sum())"
    command = [sys.executable, "-c", code, str(tmp_path / "net.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "tensor(2.)"), done.stderr


def test_a_later_protocol_of_pickle_is_said_and_nobody_accused(tmp_path):
    torch.save(net().state_dict(), tmp_path / "net.pth", pickle_protocol=4)
    assert torch_files.foreign_globals(tmp_path / "net.pth") == []
    with pytest.raises(ModelError, match=r"pickle protocol 4.*Save it anew"):
        torch_files.load_state_dict(sniff(tmp_path / "net.pth"))


def test_whole_modules_only_with_trust(tmp_path):
    torch.save(torch_models.tutorial(), tmp_path / "module.pth")
    with pytest.raises(ModelError, match=r"torch_models\.TutorialNet.*trust=True"):
        convscope.open_model(tmp_path / "module.pth")
    network = convscope.open_model(tmp_path / "module.pth", trust=True)
    assert [layer.path for layer in network.select("conv")] == ["conv1", "conv2"]
    assert any("trusted" in note for note in network.source.notes)


def test_harmless_things_beside_the_weights_are_read(tmp_path):
    import argparse

    state = {"state_dict": net().state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float32(0.5)}
    torch.save(state, tmp_path / "weights.pt")
    module = net()
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(7)
    assert "taken from 'state_dict'" in torch_files.fill(module, tmp_path / "weights.pt")
    filled = module.state_dict()
    assert filled.keys() == state["state_dict"].keys()
    assert all(torch.equal(filled[name], value) for name, value in state["state_dict"].items())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cut.pt", lambda path: torch.save(net().state_dict(), path)),
        ("cut.safetensors", None),
    ],
)
def test_damaged_files(tmp_path, name, make):
    path = tmp_path / name
    if make is None:
        from safetensors.torch import save_file

        save_file(net().state_dict(), path)
    else:
        make(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError) as error:
        convscope.open_model(f"{HERE}:tutorial", weights=path)
    assert "\n" not in str(error.value)


# -- collections of networks -----------------------------------------------------------------------------
# Neither torchvision nor timm is needed for the tests: what stands in for them has the part of their interface that is
# used, as their documentation gives it.


@pytest.fixture
def torchvision(monkeypatch):
    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")

    class Weights(collections.UserString):
        meta = {"categories": ["a", "b", "c"]}  # noqa: RUF012

        def transforms(self):
            return types.SimpleNamespace(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_size=[96])

    def get_model(name, weights=None, **arguments):
        if weights is not None and "OFFLINE" in weights:
            raise OSError("Name or service not known")
        return net(arguments.get("num_classes", 3))

    models.list_models = lambda: ["tiny", "tinier"]
    models.get_model_weights = lambda name: {key: Weights(key) for key in ("DEFAULT", "OFFLINE")}
    models.get_model = get_model
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def test_torchvision(torchvision, tmp_path):
    network = convscope.open_model("torchvision:tiny")
    assert network.inputs.size == (96, 96)
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("torch", "found")
    assert network.class_names == ("a", "b", "c")
    assert convscope.open_model("torchvision:tiny?weights=none&num_classes=5").head.units == 5
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        convscope.open_model("torchvision:tinny")
    with raises(ModelError, "weights-not-fetched", match=r"as weights=.*weights=none"):
        convscope.open_model("torchvision:tiny?weights=OFFLINE")
    torch.save(other(net()).state_dict(), tmp_path / "weights.pt")
    network = convscope.open_model("torchvision:tiny", weights=tmp_path / "weights.pt")
    assert torch.equal(network.module.fc.weight, other(net()).fc.weight)


def test_the_weights_of_a_collection_s_network_are_checked_as_those_of_code(torchvision, tmp_path):
    """A missing file, a pipe, and a pickle whose classes take trust."""
    with raises(ModelError, "file-missing", path=str(tmp_path / "none.pt")):
        convscope.open_model("torchvision:tiny", weights=tmp_path / "none.pt")
    (tmp_path / "empty.pt").touch()
    with raises(ModelError, "file-empty"):
        convscope.open_model("torchvision:tiny", weights=tmp_path / "empty.pt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        with raises(ModelError, "no-regular-file"):
            convscope.open_model("torchvision:tiny", weights=tmp_path / "pipe.pt")
    torch.save(other(net()), tmp_path / "whole.pt")
    with raises(ModelError, "needs-trust"):
        convscope.open_model("torchvision:tiny", weights=tmp_path / "whole.pt")
    network = convscope.open_model("torchvision:tiny", weights=tmp_path / "whole.pt", trust=True)
    assert torch.equal(network.module.fc.weight, other(net()).fc.weight)


def test_timm(monkeypatch):
    timm = types.ModuleType("timm")

    def create_model(name, pretrained=False, **arguments):
        if pretrained and name == "far":
            raise RuntimeError("offline")
        module = net()
        module.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 64, 80)}
        return module

    timm.is_model, timm.list_models = lambda name: name in ("near", "far"), lambda: ["near", "far"]
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    network = convscope.open_model("timm:near")
    assert (network.inputs.size, network.preprocessing.name) == ((64, 80), "-1..1")
    with pytest.raises(ModelError, match="pretrained=false"):
        convscope.open_model("timm:far")
    assert convscope.open_model("timm:far?pretrained=false").head.units == 3


def test_a_collection_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackendError, match="pip install timm"):
        convscope.open_model("timm:convnext_tiny")


# -- kinds of files --------------------------------------------------------------------------------------


@needs_assets
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torch/squeezenet1_1.safetensors", "safetensors"),
        ("torch/resnet20_cifar10.th", "torch"),
        ("torch/cifar10_tutorial_net.pt", "torch"),
        ("torch/digits_torchscript.pt", "torchscript"),
        ("torch/digits_whole_module_pickle.pth", "torch"),
        ("onnx/mnist-8.onnx", "onnx"),
        ("keras/cats_vs_dogs_150px.keras", "hdf5"),
        ("keras/pill_sorter.keras", "keras"),
    ],
)
def test_the_content_tells_the_kind(name, kind):
    assert kind_of_file(ASSETS / name) == kind


# -- what a file says of itself against what it holds -----------------------------------------------------


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(path, held, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in held.items():
            archive.writestr(f"net/{name}", data)
    return path


@pytest.fixture
def saved(tmp_path):
    torch.save(net().state_dict(), tmp_path / "saved.pt")
    return members(tmp_path / "saved.pt")


def refused(path, match=None):
    with pytest.raises(ModelError, match=match) as error:
        torch_files.load_state_dict(sniff(path))
    assert "\n" not in str(error.value)


def tensor(shape, strides, offset=0, count=4, key=b"0"):
    """The pickle of {"w": a tensor}, written by hand: torch itself writes no wrong one."""
    numbers = [b"(" + b"".join(b"\x8a\x08" + n.to_bytes(8, "little") for n in part) + b"t" for part in (shape, strides)]
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu"
    storage += b"\x8a\x08" + count.to_bytes(8, "little") + b"tQ"
    start = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
    end = b"\x8a\x08" + offset.to_bytes(8, "little") + numbers[0] + numbers[1] + b"\x89}tRs."
    return start + storage + end


@pytest.mark.parametrize(
    "data",
    [
        tensor((2**40, 2**20), (2**20, 1)),
        tensor((5,), (1,)),
        tensor((4,), (2,)),
        tensor((4,), (1,), offset=1),
        tensor((2,), (2**61,)),
        tensor((2**50,), (0,)),
        tensor((2, 2), (1,)),
        tensor((4,), (1,), count=2**40),
        tensor((4,), (1,), count=5),
        tensor((4,), (1,), key=b"7"),
    ],
)
def test_shapes_are_held_to_the_bytes_that_are_there(tmp_path, data):
    held = {"data.pkl": data, "data/0": bytes(16), "version": b"3\n"}
    refused(packed(tmp_path / "net.pt", held))


def test_the_pickle_written_by_hand_is_read_where_it_is_right(tmp_path):
    values = np.arange(4, dtype="<f4")
    held = {"data.pkl": tensor((2, 2), (1, 2)), "data/0": values.tobytes(), "version": b"3\n"}
    found, _ = torch_files.load_state_dict(sniff(packed(tmp_path / "net.pt", held)))
    np.testing.assert_array_equal(found["w"].numpy(), values.reshape(2, 2).T)


def test_views_and_shared_storages_come_out_as_torch_reads_them(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"a": base, "t": base.t(), "s": base[1:, ::2], "e": torch.empty(0, 3), "x": base[:1].expand(5, 6)}
    state |= {str(kind): torch.ones(3).to(kind) for kind in (torch.float16, torch.bfloat16, torch.int64, torch.bool)}
    state |= {"c": torch.ones(2, dtype=torch.complex64), "p": nn.Parameter(torch.ones(2)), "n": torch.tensor(3)}
    state["q"] = torch.quantize_per_tensor(torch.rand(3), 0.1, 3, torch.quint8)
    for new in (True, False):
        torch.save(state, tmp_path / "net.pt", _use_new_zipfile_serialization=new)
        found, _ = torch_files.load_state_dict(sniff(tmp_path / "net.pt"))
        expected = torch.load(tmp_path / "net.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name


def doubled(times):
    """A dictionary whose key is a tuple of twice the same tuple, and so on: hashing it takes 2 ** times steps."""
    return b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * times + b"K\x01s."


def of_one_hash(count):
    """A dictionary of whole numbers that Python gives the same hash."""
    numbers = (pickle.encode_long(number * (2**61 - 1)) for number in range(1, count))
    return b"\x80\x02}(" + b"".join(b"\x8a" + bytes([len(one)]) + one + b"N" for one in numbers) + b"u."


@pytest.mark.parametrize(
    "data",
    [doubled(60), b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.", of_one_hash(10**5)],
    ids=["doubled", "deep", "one hash"],
)
def test_keys_that_take_long_to_hash_are_refused(tmp_path, data):
    refused(packed(tmp_path / "net.pt", {"data.pkl": data, "version": b"3\n"}))


def test_pickles_of_many_operations_are_refused(tmp_path):
    path = packed(tmp_path / "net.pt", {"data.pkl": b"\x80\x02" + b"N0" * 600 + b"N.", "version": b"3\n"})
    with limits.using(entries=20):
        refused(path, "too many operations")


def test_quantized_tensors_that_repeat_a_value_are_refused(tmp_path):
    """They are copied when they are made: one byte would become many."""
    saved = io.BytesIO()
    whole = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)
    torch.save({"w": whole}, saved)
    with zipfile.ZipFile(saved) as archive:
        held = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    (tmp_path / "whole.pt").write_bytes(saved.getvalue())
    state, _ = torch_files.load_state_dict(sniff(tmp_path / "whole.pt"))
    assert torch.equal(state["w"].dequantize(), whole.dequantize())
    sides = held["data.pkl"].replace(b"K\x04\x85", b"J\x00\x00\x00\x10\x85").replace(b"K\x01\x85", b"K\x00\x85")
    assert sides != held["data.pkl"]
    refused(packed(tmp_path / "net.pt", held | {"data.pkl": sides}), "repeats")


def test_archives_that_unpack_to_more_than_the_limits(tmp_path, saved):
    saved["data/0"] = bytes(2**24)
    path = packed(tmp_path / "net.pt", saved, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**16
    with limits.using(weights=2**20):
        refused(path, "limit weights")
    with limits.using(entries=3):
        refused(path, "limit entries")
    saved["data.pkl"] = saved["data.pkl"][:-1] + b"0N" * 2**16 + b"."
    with limits.using(text=2**12):
        refused(packed(path, saved), "limit text")


@pytest.mark.parametrize("member", ["data/0", "data.pkl", "beside"])
def test_an_archive_that_unpacks_a_hundredfold_is_refused_before_memory_is_taken(tmp_path, saved, member):
    saved[member] = bytes(2**20 * 80)
    path = packed(tmp_path / "net.pt", saved, zipfile.ZIP_DEFLATED)
    assert taken(lambda: refused(path, "100 times")) < 2**24


@pytest.mark.parametrize("shared", [False, True])
def test_values_may_nest_as_deep_as_the_limit_and_no_deeper(shared):
    def nesting(levels):
        value = inner = [0]
        for _ in range(levels - 1):
            value = [value]
        return [value, inner] if shared else [value]  # what is inside is met first, less deep

    with limits.using(depth=9):
        pickles.check_shape(nesting(8))
        with pytest.raises(ModelError, match="limit depth"):
            pickles.check_shape(nesting(9))


def test_a_small_archive_that_was_compressed_opens(tmp_path, saved):
    path = packed(tmp_path / "net.pt", {**saved, "beside": bytes(2**24)}, zipfile.ZIP_DEFLATED)
    state, _ = torch_files.load_state_dict(sniff(path))
    assert list(state) == list(net().state_dict())


def taken(call):
    """The most bytes that Python held during a call, beside those it held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [b"N", b"K\x05", b"\x89", b"C\x01w", b"X\x01\x00\x00\x00\x1b"])
def test_a_tensor_without_a_name_that_can_be_shown(tmp_path, saved, name):
    """A key of a dictionary may be None, a number or bytes."""
    named = tensor((4,), (1,)).replace(b"X\x01\x00\x00\x00w", name)
    held = {**saved, "data.pkl": named, "data/0": bytes(16)}
    refused(packed(tmp_path / "net.pt", held), "a tensor has the name")


def test_a_declared_size_that_can_not_be_is_refused_before_memory_is_taken(tmp_path, saved):
    path = packed(tmp_path / "net.pt", saved)
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "can't be")


@pytest.mark.parametrize("damage", ["crc", "method", "encrypted", "local name", "twice", "cut", "prefix"])
def test_damaged_archives(tmp_path, saved, damage):
    path = packed(tmp_path / "net.pt", saved)
    data = bytearray(path.read_bytes())
    entry = data.find(b"PK\x01\x02")
    if damage == "crc":
        data[data.find(saved["data.pkl"]) + 5] ^= 1
    elif damage == "method":
        data[entry + 10] = 99
    elif damage == "encrypted":
        data[entry + 8] |= 1
    elif damage == "local name":
        data[30] ^= 1
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "prefix":
        data[:0] = b"#!/bin/sh\n"
    path.write_bytes(data)
    if damage == "twice":
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("net/data.pkl", b"\x80\x02N.")
    with pytest.raises(ModelError) as error:
        torch_files.load_state_dict(sniff(path))
    assert "\n" not in str(error.value)


def nested(depth):
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02K\x01K\x02.",
        b"\x80\x02q\x00.",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02h\x05.",
        b"\x80\x02(K\x01u.",
        b"\x80\x02}]N" + b"s.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02K\x01N" + b"b.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02]"
        + b"".join(b"q" + bytes([n]) + b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(60))
        + b".",
        nested(500),
        nested(50_000),
        b"\x80\x02N",
        b"\x80\x02J\x01",
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_damaged_pickles(tmp_path, data, old):
    path = tmp_path / "net.pt"
    if old:
        path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + data)
    else:
        packed(path, {"data.pkl": data, "version": b"3\n"})
    refused(path)


@pytest.mark.parametrize("key", [3, "\x1b[31mred", "a\u202eb", (1, 2)])
def test_names_that_are_no_plain_text(tmp_path, key):
    torch.save({key: torch.ones(2)}, tmp_path / "net.pt")
    refused(tmp_path / "net.pt", "name")


@pytest.mark.parametrize("kept", [0.01, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("new", [True, False])
def test_downloads_that_broke_off(tmp_path, kept, new):
    path = tmp_path / "net.pt"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    refused(path)


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def told(first, last, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"a": told(0, 8)}, 2**40),
        ({"a": told(0, 8)}, 10**5),
        ({"a": told(0, 8), "b": told(4, 12)}, None),
        ({"a": told(0, 2**40, (2**38,))}, None),
        ({"a": told(-8, 0)}, None),
        ({"a": told(0, 8, (2**60, 2**60))}, None),
        (
            b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b' "a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            None,
        ),
        ({"a\x1b[31m": told(0, 8)}, None),
        (b'{"a": ' + b"[" * 10**5, None),
        (b'{"a": [1, 2]}', None),
        (b'{"a": {"dtype": "F32"}}', None),
    ],
)
def test_headers_of_safetensors(tmp_path, header, length):
    refused(safetensors(tmp_path / "net.safetensors", header, bytes(16), length), None)


def test_torch_does_not_unpickle_checkpoints_here(tmp_path, monkeypatch):
    torch.save({"state_dict": net().state_dict()}, tmp_path / "net.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))
    assert len(torch_files.load_state_dict(sniff(tmp_path / "net.pt"))[0]) == len(net().state_dict())


@pytest.mark.parametrize(
    "name", ["os.system", "torch.load", "torch.storage._load_from_bytes", "torch.hub.load", "builtins.eval"]
)
@pytest.mark.parametrize("how", ["called", "named"])
def test_any_name_that_is_no_tensor_s_is_refused(tmp_path, name, how):
    home, _, kind = name.rpartition(".")
    data = b"\x80\x02c" + f"{home}\n{kind}\n".encode() + (b"X\x01\x00\x00\x00a\x85R" if how == "called" else b"") + b"."
    refused(packed(tmp_path / "net.pt", {"data.pkl": data, "version": b"3\n"}), rf"{name}.*trust=True")


def test_a_header_of_too_many_values_is_not_parsed(tmp_path, monkeypatch):
    header = b'{"__metadata__": {"a": "b"}' + b', "c": []' * 300 + b"}"
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    monkeypatch.setattr(json, "loads", lambda *a, **k: pytest.fail("it was parsed"))
    with limits.using(entries=10), pytest.raises(ModelError, match="limit entries"):
        convscope.open_model(f"{__file__}:_bare", weights=path)


def _bare():
    return torch.nn.Conv2d(3, 4, 3)


def ends_of_a_large_archive(directory, between=b"", decoy=b""):
    """The end of an archive whose directory has `directory` bytes, as ZIP64 tells it."""
    large = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 9, 9, directory, 0)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 9, 9, 2**32 - 1, 0, len(decoy)) + decoy
    return b"PK\x03\x04" + bytes(100_000) + large + between + locator + end


@pytest.mark.parametrize(
    "data",
    [
        ends_of_a_large_archive(90_000),
        ends_of_a_large_archive(90_000, decoy=b"PK\x06\x06" + bytes(60)),
        ends_of_a_large_archive(90_000, between=b"PK\x06\x06" + bytes(10)),
    ],
    ids=["plain", "another in the comment", "another place"],
)
def test_a_large_directory_is_not_read(tmp_path, monkeypatch, data):
    (tmp_path / "net.pt").write_bytes(data)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: pytest.fail("its directory was read"))
    with limits.using(entries=10), pytest.raises(ModelError, match=r"limit entries|can't be read whole"):
        kind_of_file(tmp_path / "net.pt")
