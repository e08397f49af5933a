"""Checkpoints as people save them: what lies beside the weights does not matter, and one of several is picked."""

import argparse
import collections
import enum
import functools
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from expecting import raises  # noqa: E402
from torch import nn  # noqa: E402

import convscope  # noqa: E402
from convscope.errors import ModelError, UsageError  # noqa: E402
from convscope.networks.formats.files import weights_file  # noqa: E402
from convscope.networks.formats.torch import files as torch_files  # noqa: E402
from convscope.networks.formats.torch import states  # noqa: E402

pytestmark = pytest.mark.without_keras


def net(seed=0, classes=3):
    torch.manual_seed(seed)
    parts = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "pool": nn.AdaptiveAvgPool2d(1)}
    return nn.Sequential(collections.OrderedDict(**parts, flat=nn.Flatten(), fc=nn.Linear(4, classes)))


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def holds(module, wanted):
    """True if each weight of a module is another's."""
    pairs = zip(module.state_dict().values(), wanted.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def filled(path, key=None):
    """A module with other weights, filled, and the notes."""
    module = net(seed=9)
    return module, torch_files.fill(module, weights_file(f"{path}::{key}" if key is not None else str(path)))


# -- beside the weights ------------------------------------------------------------------------------------


class Config(dict):
    """A dictionary with a class of its author's, and with itself as a value of an attribute."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Settings:
    def __init__(self):
        self.nested, self.path = Config(depth=3), pathlib.PurePosixPath("/data/set")


class Several(list):
    pass


class Slots:
    __slots__ = ("name",)


class Colour(enum.Enum):
    RED = 1


class Code:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def slotted():
    made = Slots()
    made.name = "a"
    return made


BESIDE = {
    "path": lambda: pathlib.PosixPath("/data/train"),
    "namespace": lambda: argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("out")),
    "config": Settings,
    "list": lambda: Several([1, Settings()]),
    "slots": slotted,
    "enum": lambda: Colour.RED,
    "enum as key": lambda: {Colour.RED: 1, np.int64(3): 2},
    "numpy": lambda: {"best": np.float64(0.5), "curve": np.arange(4.0), "kind": np.dtype("float32")},
    "partial": lambda: functools.partial(nn.ReLU, inplace=True),
    "deque": lambda: collections.deque([1, 2], maxlen=5),
    "function": lambda: torch_files.fill,
    "module": lambda: nn.Linear(2, 2),
    "sets": lambda: {frozenset({1}), frozenset({2})},
    "dates": lambda: __import__("datetime").datetime(2020, 1, 2),
    "optimizer": lambda: torch.optim.Adam(net().parameters()).state_dict(),
    "state of random numbers": torch.get_rng_state,
    "a loss": lambda: torch.tensor(0.25),
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_the_weights_does_not_matter(tmp_path, beside, new):
    value = {"epoch": 3, "extra": BESIDE[beside](), "state_dict": net().state_dict()}
    path = saved(tmp_path / "net.pth", value, _use_new_zipfile_serialization=new)
    module, notes = filled(path)
    assert holds(module, net())
    assert notes[0].startswith("taken from 'state_dict'")


def test_a_trained_optimizer_holds_no_weights(tmp_path):
    """Its averages of gradients have the names of numbers, and the shapes of the weights."""
    module = net()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "model": module.state_dict()}
    found, notes = filled(saved(tmp_path / "net.pth", state))
    assert holds(found, module)
    assert notes == ("taken from 'model'",)


def test_code_among_the_weights_is_not_run(tmp_path):
    """Also as a key of the state dict itself, where the names of the weights are."""
    marker = tmp_path / "was-run"
    path = saved(tmp_path / "net.pth", {**net().state_dict(), "config": Code(marker)})
    assert holds(filled(path)[0], net())
    assert not marker.exists()


def test_weights_within_foreign_objects_need_trust(tmp_path):
    """A pickled module is not taken apart, and the few tensors beside it are not taken for the model."""
    path = saved(tmp_path / "net.pth", {"model": net(), "statistics": {"mean": torch.zeros(3)}})
    with raises(ModelError, "needs-trust"):
        convscope.open_model(path)
    with raises(ModelError, "needs-trust"):
        filled(path)
    module = net(seed=9)
    assert torch_files.fill(module, path, trust=True)[0].startswith("taken from 'model'")
    assert holds(module, net())


def test_a_sparse_weight_needs_trust(tmp_path):
    state = {**net().state_dict(), "fc.weight": net().fc.weight.detach().to_sparse()}
    with raises(ModelError, "needs-trust"):
        filled(saved(tmp_path / "net.pth", state))


def test_a_foreign_name_can_not_stand_for_a_tensor(tmp_path):
    """Nor its storage: what a pickle makes of a class that is not known is never read as numbers."""
    data = b"\x80\x02cos\nsystem\n(X\x01\x00\x00\x00atR."
    path = tmp_path / "net.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + data)
    path.write_bytes(path.read_bytes() + pickle.dumps([], 2))
    with raises(ModelError, "needs-trust", names=["os.system"]):
        filled(path)


# -- prefixes ----------------------------------------------------------------------------------------------


def prefixed(module, prefix):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "backbone.", "net.", "encoder.body.", "_fabric.", "0.", "a b.", "ünï.", "weird-1.2."],
)
@pytest.mark.parametrize("around", [lambda state: state, lambda state: {"weights": {"deep": state}}])
def test_any_prefix_is_taken_off(tmp_path, prefix, around):
    module, notes = filled(saved(tmp_path / "net.pth", around(prefixed(net(), prefix))))
    assert holds(module, net())
    assert f"the prefix {prefix!r} taken off its names" in notes


@pytest.mark.parametrize("prefix", ["module.", "student.", "x.y."])
def test_a_network_among_other_parts_of_a_state_dict(tmp_path, prefix):
    state = {**prefixed(net(), prefix), "loss.weight": torch.ones(2, 2), "teacherless": torch.ones(1)}
    module, notes = filled(saved(tmp_path / "net.pth", state))
    assert holds(module, net())
    assert any(repr(prefix) in note and "2 other tensors" in note for note in notes)


def test_a_prefix_is_no_excuse_for_what_is_left_over(tmp_path):
    state = {**prefixed(net(), "model."), "model.extra.weight": torch.ones(2, 2)}
    with raises(ModelError, "weights-misfit", unexpected=["extra.weight"], missing=[]):
        filled(saved(tmp_path / "net.pth", state))


def test_names_that_end_alike_are_not_under_a_prefix(tmp_path):
    """ "my_conv.weight" is no "conv.weight" behind a prefix: prefixes end at a dot."""
    with raises(ModelError, "weights-misfit"):
        filled(saved(tmp_path / "net.pth", prefixed(net(), "my_")))


def test_parts_that_were_saved_beside_each_other(tmp_path):
    """An encoder's and a head's state dict, and code that makes both as one module."""
    whole = nn.ModuleDict({"encoder": net(1), "head": nn.Linear(3, 2)})
    parts = {"encoder": whole["encoder"].state_dict(), "head": whole["head"].state_dict(), "epoch": 2}
    made = nn.ModuleDict({"encoder": net(2), "head": nn.Linear(3, 2)})
    torch_files.fill(made, saved(tmp_path / "net.pth", parts))
    assert holds(made, whole)


def test_a_part_of_another_network_does_not_fill_a_module_of_one_part(tmp_path):
    one = nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(3, 4, 3)))
    with raises(ModelError, "weights-misfit"):
        torch_files.fill(one, saved(tmp_path / "net.pth", net().state_dict()))


def test_very_many_prefixes_are_searched_in_no_time(tmp_path):
    names = {f"{number}.weight": torch.zeros(1) for number in range(20000)}
    path = saved(tmp_path / "net.pth", {"state": {**names, **prefixed(net(), "here.")}})
    assert holds(filled(path)[0], net())


def small_pairs(count):
    """Many state dicts of one tensor, each two below a key of their own."""
    tensor = torch.zeros(2, 2)
    return {f"a{number}": {"x": {"t": tensor}, "y": {"t": tensor}} for number in range(count)}


def test_very_many_small_state_dicts_are_compared_in_no_time(tmp_path):
    """They were all compared with each other: hours for a file of 200,000."""
    with raises(ModelError, "weights-misfit"):
        filled(saved(tmp_path / "net.pth", small_pairs(5000)))


class Compared(str):
    """A place that counts how often it is compared."""

    count = 0

    def startswith(self, *arguments):
        type(self).count += 1
        return super().startswith(*arguments)


def test_the_comparisons_grow_with_the_state_dicts_and_not_with_their_square():
    """Two parts fit together where each lies below a key of its own, beside 1000 pairs that don't."""
    target = states.shapes_of(nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)}))
    parts = {part: dict(nn.Linear(2, 2).state_dict()) for part in ("x", "y")}
    found = [states.State(Compared(f"a{n}.{part}"), {"w": torch.zeros(1)}) for n in range(1000) for part in "xy"]
    found += [states.State(Compared(f"net.{part}"), tensors) for part, tensors in parts.items()]
    (fit,) = states.fits(found, target)
    assert fit.key == "net"
    assert sorted(fit.tensors) == sorted(target)
    assert Compared.count <= 10 * len(found)


def test_parts_are_found_among_very_many_small_state_dicts(tmp_path):
    """The parts of a network lie beside each other, and deeper beside others: together they are one."""
    parts = collections.defaultdict(dict)
    for name, tensor in net().state_dict().items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    path = saved(tmp_path / "net.pth", {**small_pairs(2000), "run": {"model": dict(parts), "other": small_pairs(3)}})
    module, notes = filled(path)
    assert holds(module, net())
    assert any("run.model" in note for note in notes)


def test_very_many_state_dicts_that_fit_are_told_apart_in_no_time(tmp_path):
    value = {f"a{number}": {"weight": torch.full((1, 1), float(number))} for number in range(2000)}
    with raises(ModelError, "weights-ambiguous") as caught:
        torch_files.fill(nn.Linear(1, 1, bias=False), saved(tmp_path / "net.pth", value))
    assert sorted(caught.value.data["names"]) == sorted(value)


def test_very_many_prefixes_that_fit_are_told_apart_in_no_time(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {f"a{number}.weight": torch.full((1, 1), float(number % 4000)) for number in range(5000)}
    safetensors.save_file(tensors, tmp_path / "net.safetensors")
    with raises(ModelError, "weights-ambiguous") as caught:
        torch_files.fill(nn.Linear(1, 1, bias=False), tmp_path / "net.safetensors")
    assert len(caught.value.data["names"]) == 4000


def test_the_key_of_very_many_may_be_long(tmp_path):
    """A place has all keys that lead to it: they would take memory once for each state dict below."""
    long, tensor = "k" * 1_000_000, torch.zeros(2, 2)
    value = {long: {f"a{number}": {"t": tensor} for number in range(5000)}, "model": net().state_dict()}
    assert holds(filled(saved(tmp_path / "net.pth", value))[0], net())


def test_objects_that_double_at_each_level(tmp_path):
    value = {"t": torch.zeros(2, 2)}
    for _ in range(18):
        value = {"a": value, "b": value}
    assert holds(filled(saved(tmp_path / "net.pth", {"model": net().state_dict(), "deep": value}))[0], net())


# -- one of several ----------------------------------------------------------------------------------------


def discriminator():
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())


PAIRS = {
    "two networks": lambda a, b: {"generator": a, "discriminator": discriminator().state_dict(), "g_ema": b},
    "averaged": lambda a, b: {"state_dict": a, "state_dict_ema": b, "args": Settings()},
    "in lists": lambda a, b: {"models": [a, b]},
    "nested": lambda a, b: {"nets": {"a": {"model": a}, "b": {"model": b}}},
    "under prefixes": lambda a, b: {
        "state_dict": {**{f"student.{k}": v for k, v in a.items()}, **{f"teacher.{k}": v for k, v in b.items()}}
    },
    "beside the file's own": lambda a, b: {**a, "ema": b},
}
KEYS = {
    "two networks": ("generator", "g_ema"),
    "averaged": ("state_dict", "state_dict_ema"),
    "in lists": ("models.0", "models.1"),
    "nested": ("nets.a", "nets.b.model"),
    "under prefixes": ("student", "state_dict.teacher"),
    "beside the file's own": ("", "ema"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_key_picks_one_of_several(tmp_path, pair):
    first, second = net(1), net(2)
    path = saved(tmp_path / "net.pth", PAIRS[pair](first.state_dict(), second.state_dict()))
    for key, wanted in zip(KEYS[pair], (first, second), strict=True):
        assert holds(filled(path, key)[0], wanted)


@pytest.mark.parametrize("pair", PAIRS)
def test_without_a_key_several_that_fit_are_listed(tmp_path, pair):
    """Each name in the list, given as the key, picks one."""
    first, second = net(1), net(2)
    path = saved(tmp_path / "net.pth", PAIRS[pair](first.state_dict(), second.state_dict()))
    module = net(seed=9)
    with raises(ModelError, "weights-ambiguous") as caught:
        torch_files.fill(module, path)
    assert holds(module, net(seed=9))
    found = [filled(path, key)[0] for key in caught.value.data["names"]]
    assert sorted(holds(module, first) for module in found) == [False, True]
    assert sorted(holds(module, second) for module in found) == [False, True]


def test_the_one_that_fits_needs_no_key(tmp_path):
    state = {"discriminator": discriminator().state_dict(), "generator": net().state_dict()}
    module, notes = filled(saved(tmp_path / "gan.pth", state))
    assert holds(module, net())
    assert notes == ("taken from 'generator' (beside it: discriminator)",)


def test_two_names_of_the_same_weights_need_no_key(tmp_path):
    state = net().state_dict()
    assert holds(filled(saved(tmp_path / "net.pth", {"model": state, "best": state}))[0], net())


def test_each_name_of_the_same_weights_is_a_key(tmp_path):
    """torch.save keeps one object under two keys as one."""
    state, other = net().state_dict(), net(3).state_dict()
    inner = {"net": state, "other": other}
    path = saved(tmp_path / "net.pth", {"model": state, "ema": state, "best": inner, "last": inner, "old": other})
    for key in ("model", "ema", "best.net", "last.net"):
        assert holds(filled(path, key)[0], net()), key
    for key in ("best.other", "last.other", "old"):
        assert holds(filled(path, key)[0], net(3)), key


@pytest.mark.parametrize(
    "key", ["generatr", "", " ", "..", "../../etc/passwd", "a::b", "\x1b[31m", "*", "{0}", "é" * 500]
)
def test_a_key_that_is_not_there_lists_those_that_are(tmp_path, key):
    state = {"discriminator": discriminator().state_dict(), "generator": net().state_dict()}
    path = saved(tmp_path / "gan.pth", state)
    with raises(UsageError, "weights-key-unknown", name=key, names=["discriminator", "generator"]) as caught:
        filled(path, key)
    assert "\x1b" not in str(caught.value)


def test_a_key_of_another_network_says_what_misfits(tmp_path):
    state = {"discriminator": discriminator().state_dict(), "generator": net().state_dict()}
    with raises(ModelError, "weights-misfit"):
        filled(saved(tmp_path / "gan.pth", state), "discriminator")


@pytest.mark.parametrize("key", ["a::b", "x/y", "ünï", "with space", "\x1b[31m", "'quoted'", "7"])
def test_keys_of_odd_characters(tmp_path, key):
    path = saved(tmp_path / "net.pth", {key: net(1).state_dict(), "other": net(2).state_dict()})
    assert holds(filled(path, key)[0], net(1))


def test_a_file_with_colons_in_its_name(tmp_path):
    path = saved(tmp_path / "a::b.pth", {"one": net(1).state_dict(), "two": net(2).state_dict()})
    assert holds(filled(path, "two")[0], net(2))
    plain = saved(tmp_path / "net::whole.pth", net(3).state_dict())
    assert holds(filled(plain)[0], net(3))


def test_a_part_of_a_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    save_file({**prefixed(net(1), "g."), **prefixed(net(2), "d.")}, tmp_path / "gan.safetensors")
    assert holds(filled(tmp_path / "gan.safetensors", "d")[0], net(2))


def test_weights_alone_list_their_state_dicts(tmp_path):
    state = {"discriminator": discriminator().state_dict(), "generator": net().state_dict()}
    with raises(ModelError, "weights-alone", names=["discriminator", "generator"], match="gan.pth::KEY"):
        convscope.open_model(saved(tmp_path / "gan.pth", state))


# -- through the whole of convscope ------------------------------------------------------------------------

CODE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

class Growing(nn.Module):
    '''Makes its last layer when it is first called.'''

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), None

    def forward(self, x):
        x = torch.flatten(torch.relu(self.conv(x)), 1)
        if self.fc is None:
            self.fc = nn.Linear(x.shape[1], 2)
        return self.fc(x)

def keras_model():
    import keras
    return keras.Sequential([keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "made.py").write_text(CODE)
    return f"{tmp_path / 'made.py'}:"


def made(code, seed):
    space = {}
    exec(CODE, space)
    torch.manual_seed(seed)
    return space[code]()


def test_the_key_in_a_spec_opens_the_same_weights_again(tmp_path, code):
    module = made("make", 4)
    path = saved(tmp_path / "net.pth", {"a": made("make", 3).state_dict(), "b": module.state_dict()})
    network = convscope.open_model(f"{code}make", weights=f"{path}::b", size=16)
    image = np.random.default_rng(0).uniform(0, 1, (2, 16, 16, 3)).astype("float32")
    wanted = module(torch.as_tensor(image.transpose(0, 3, 1, 2))).detach().numpy()
    again = pickle.loads(pickle.dumps(network.spec)).open()
    for opened in (network, again):
        np.testing.assert_allclose(opened.predict(image), wanted, atol=1e-6)
    assert "taken from 'b' (beside it: a)" in network.source.notes
    path.write_bytes(path.read_bytes() + b"\0")
    with raises(ModelError, "file-changed"):
        network.spec.open()


def test_the_command_line_picks_by_a_key(tmp_path, code):
    path = saved(tmp_path / "net.pth", {"a": made("make", 3).state_dict(), "b": made("make", 4).state_dict()})
    layers = [sys.executable, "-m", "convscope", "layers", f"{code}make"]
    asked = subprocess.run([*layers, "--weights", f"{path}::b"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0
    assert "opened: taken from 'b' (beside it: a)" in asked.stderr
    refused = subprocess.run([*layers, "--weights", str(path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "net.pth::KEY as --weights FILE" in refused.stderr


def test_code_that_grows_when_it_is_called_is_called_once(tmp_path, code):
    """With a size; the module that is filled has all the layers of the file."""
    module = made("Growing", 3)
    module(torch.zeros(1, 3, 12, 12))
    path = saved(tmp_path / "net.pth", module.state_dict())
    network = convscope.open_model(f"{code}Growing", weights=path, size=12)
    image = np.random.default_rng(0).uniform(0, 1, (2, 12, 12, 3)).astype("float32")
    wanted = module(torch.as_tensor(image.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(network.predict(image), wanted, atol=1e-6)
    assert [layer.path for layer in convscope.open_model(f"{code}Growing", size=12).select("dense")] == ["fc"]
    with raises(ModelError, "weights-misfit", unexpected=["fc.weight", "fc.bias"]):
        convscope.open_model(f"{code}Growing", weights=path)
