"""TorchScript: the mirror gives what the script module itself gives, and its layers can be tapped."""

import io
import pickle
import re
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from assets import ASSETS, needs_assets  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import convscope  # noqa: E402
from convscope import limits  # noqa: E402
from convscope.errors import ModelError  # noqa: E402
from convscope.images.decode import read_images  # noqa: E402
from convscope.networks.formats.files import sniff  # noqa: E402
from convscope.networks.formats.torch import script as torch_script  # noqa: E402

pytestmark = pytest.mark.without_keras


class Residual(nn.Module):
    """Functional activations, a sum in place, a module that is used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)
        y = self.mix(F.leaky_relu(self.mix(x), 0.1))
        y += x
        return F.softmax(self.fc(F.adaptive_avg_pool2d(y, (1, 1)).flatten(1)), dim=1)


class Branching(nn.Module):
    """Conditions and loops, lists of modules, numbers, several outputs."""

    def __init__(self, how: int):
        super().__init__()
        self.how = how
        self.first = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
        self.drop = nn.Dropout(0.5)

    def helper(self, x, times: int):
        for step in range(times):
            x = x * (1.0 + 0.1 * step)
        return x

    def forward(self, x):
        x = self.first(x)
        if x.shape[2] > 10 and x.shape[3] % 2 == 0:
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        else:
            x = torch.tanh(x)
        parts = []
        for index, block in enumerate(self.blocks):
            x = torch.relu(block(x)) if index != self.how else torch.sigmoid(block(x))
            parts.append(x.mean(dim=(2, 3)))
        x = self.helper(self.drop(x), 3)
        return torch.cat(parts, dim=1), {"map": x}["map"]


class Views(nn.Module):
    """Sizes taken from the tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=2)
        self.out = nn.Linear(2 * 7 * 7, 4)

    def forward(self, x):
        x = self.conv(x).clamp(min=0.0)
        return self.out(x.view(x.size(0), -1))


def images(side=16, count=3):
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (count, 3, side, side)).astype(np.float32))


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("make", [Residual, Views, lambda: nn.Sequential(Residual(), nn.Flatten())])
def test_the_mirror_is_the_script_module(tmp_path, how, make):
    module = make().eval()
    x = images()
    scripted = torch.jit.script(module) if how == "script" else torch.jit.trace(module, x[:1])
    torch.jit.save(scripted, tmp_path / "model.pt")
    mirror = torch_script.read(sniff(tmp_path / "model.pt")).module
    with torch.no_grad():
        assert torch.equal(mirror.eval()(x), scripted(x))


@pytest.mark.parametrize("how", [0, 2, 5])
@pytest.mark.parametrize("side", [12, 16, 17])
def test_conditions_and_loops(tmp_path, how, side):
    scripted = torch.jit.script(Branching(how).eval())
    torch.jit.save(scripted, tmp_path / "model.pt")
    mirror = torch_script.read(sniff(tmp_path / "model.pt")).module.eval()
    x = images(side)
    with torch.no_grad():
        for one, two in zip(mirror(x), scripted(x), strict=True):
            assert torch.equal(one, two)


class Defaults(nn.Module):
    """Arguments of `forward` that convscope does not give."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, double: bool = True, scale: float = 3.0):
        x = torch.relu(self.conv(x)).mean(dim=(2, 3)) * scale
        return 2 * x if double else x


class Lists(nn.Module):
    """Lists and dictionaries that change while it runs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x).mean(dim=(2, 3))
        parts = [y, y + 1]
        parts[0] = 2 * y
        parts.extend([y - 1, y * y])
        parts.insert(1, y + 5)
        last = parts.pop()
        parts.reverse()
        named = {"a": last}
        named["b"] = parts[0]
        numbers = [1, 2]
        numbers.append(3)
        return torch.cat(parts, dim=1) + len(numbers) + named["a"].sum() + named["b"].sum()


@pytest.mark.parametrize("make", [Defaults, Lists])
def test_default_arguments_and_lists_that_change(tmp_path, make):
    torch.manual_seed(0)
    scripted = torch.jit.script(make().eval())
    torch.jit.save(scripted, tmp_path / "model.pt")
    mirror, x = torch_script.read(sniff(tmp_path / "model.pt")).module.eval(), images()
    with torch.no_grad():
        for _ in range(2):  # a second pass does not see what the first has changed
            assert torch.equal(mirror(x), scripted(x))


def test_a_script_that_would_write_a_file_is_refused(tmp_path):
    class Writing(nn.Module):
        def __init__(self, path: str):
            super().__init__()
            self.path = path
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            held = torch.from_file(self.path, True, 16)
            return self.conv(x).mean(dim=(2, 3)) + held.sum()

    torch.jit.save(torch.jit.script(Writing(str(tmp_path / "made")).eval()), tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"from_file.*reads or writes files"):
        convscope.open_model(tmp_path / "model.pt")
    assert not (tmp_path / "made").exists()


def test_frozen_and_half(tmp_path):
    scripted = torch.jit.freeze(torch.jit.script(Residual().eval()))
    torch.jit.save(scripted, tmp_path / "frozen.pt")
    network = convscope.open_model(tmp_path / "frozen.pt", size=16)
    x = images()
    with torch.no_grad():
        expected = scripted(x).numpy()
    found = network.head.probabilities(network.predict(x.permute(0, 2, 3, 1).numpy()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert {layer.kind for layer in network.layers} >= {"conv", "activation", "pool"}


def test_layers_taps_and_gradients(tmp_path):
    torch.manual_seed(0)
    module = Residual().eval()
    torch.jit.save(torch.jit.script(module), tmp_path / "model.pt")
    network = convscope.open_model(tmp_path / "model.pt", size=16)
    plain = convscope.open_model(module, size=16)
    names = {layer.path: layer.kind for layer in plain.layers}
    assert {layer.path: layer.kind for layer in network.layers} == names
    assert network.name == "Residual"
    assert (network.head.activation, network.head.undone) == ("softmax", "softmax")
    photo = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    mine, theirs = convscope.activations(network, [photo], "all"), convscope.activations(plain, [photo], "all")
    for path in names:
        np.testing.assert_array_equal(mine.arrays[path], theirs.arrays[path])
    one, two = (convscope.heatmap(net, [photo], 1, layer="mix#1").maps for net in (network, plain))
    np.testing.assert_allclose(one, two, atol=1e-7)
    assert one.any()


def test_what_is_no_archive_of_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(Residual()), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError):
        convscope.open_model(tmp_path / "cut.pt")


@needs_assets
@pytest.mark.parametrize(("name", "shape"), [("digits", (1, 28, 28)), ("trafficsign", (3, 30, 30))])
def test_real_files_as_torch_itself_runs_them(name, shape):
    path = ASSETS / "torch" / f"{name}_torchscript.pt"
    scripted = torch.jit.load(path, map_location="cpu").eval()
    mirror = torch_script.read(sniff(path)).module.eval()
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (5, *shape)).astype(np.float32))
    with torch.no_grad():
        assert torch.equal(mirror(x), scripted(x))
    assert mirror.state_dict().keys() == scripted.state_dict().keys()
    assert all(torch.equal(mirror.state_dict()[key], value) for key, value in scripted.state_dict().items())


@needs_assets
def test_digits():
    network = convscope.open_model(ASSETS / "torch" / "digits_torchscript.pt")
    assert (network.inputs.size, network.inputs.channels) == ((28, 28), 1)
    files = sorted((ASSETS / "photos" / "digits").glob("*/*.png"))
    logits = network.predict(network.prepare(read_images(files)))
    assert (logits.argmax(axis=1) == [int(file.parent.name) for file in files]).mean() >= 0.96


# -- programs that would do more than compute -------------------------------------------------------------


class Saving(nn.Module):
    """Writes a file when its state is set: while torch loads it."""

    marker: str

    def __init__(self, marker: str):
        super().__init__()
        self.conv, self.marker = nn.Conv2d(3, 4, 3), marker

    def forward(self, x):
        return self.conv(x).mean(dim=[2, 3])

    @torch.jit.export
    def __getstate__(self):
        return (self.training, self.conv.weight, self.marker)

    @torch.jit.export
    def __setstate__(self, state: tuple[bool, torch.Tensor, str]):
        torch.save(state[1], state[2])
        self.training = state[0]


class Holding(nn.Module):
    """The same in a child that the pass does not use."""

    def __init__(self, marker: str):
        super().__init__()
        self.conv, self.child = nn.Conv2d(3, 4, 3), Saving(marker)

    def forward(self, x):
        return self.conv(x).mean(dim=[2, 3])


@pytest.mark.parametrize("make", [Saving, Holding])
def test_a_state_that_is_set_by_code_of_the_file_is_not_set(tmp_path, make):
    marker = tmp_path / "marker"
    torch.jit.save(torch.jit.script(make(str(marker)).eval()), tmp_path / "model.pt")
    marker.unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"__[gs]etstate__.*trust=True"):
        convscope.open_model(tmp_path / "model.pt")
    assert not marker.exists()


class Unused(nn.Module):
    """A method that nothing calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean(dim=[2, 3])

    @torch.jit.export
    def other(self, x, name: str):
        torch.save(x, name)
        return x


class Waiting(Unused):
    @torch.jit.export
    def other(self, x, name: str):
        return torch.jit.wait(torch.jit.fork(torch.relu, x))


@pytest.mark.parametrize("make", [Unused, Waiting])
def test_methods_that_nothing_calls_are_read_too(tmp_path, make):
    torch.jit.save(torch.jit.script(make().eval()), tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"TorchScript program.*trust=True"):
        convscope.open_model(tmp_path / "model.pt")
    assert convscope.open_model(tmp_path / "model.pt", trust=True, size=16).layer("conv").kind == "conv"


def test_a_loop_without_end_ends(tmp_path):
    class Endless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            count = 0
            while count >= 0:
                count += 1
            return self.conv(x).mean(dim=[2, 3]) + count

    torch.jit.save(torch.jit.script(Endless().eval()), tmp_path / "model.pt")
    with limits.using(nodes=10_000), pytest.raises(ModelError, match="runs too often"):
        convscope.open_model(tmp_path / "model.pt", size=16)


def plain(tmp_path):
    torch.jit.save(torch.jit.script(Views().eval()), tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def changed(path, to, change):
    """The archive with its members changed: `change` is given the name and the bytes, and gives the bytes or None."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as made:
        for entry in archive.infolist():
            data = change(entry.filename.partition("/")[2], archive.read(entry))
            if data is not None:
                made.writestr(entry.filename, data)
    return to


FORWARD = b"  def forward(self: __torch__.test_torch_script.Views,\n    x: Tensor) -> Tensor:\n"
ODD_CODE = {
    "save as an operator": (b"", b"    ops.aten.save(x, 'marker')\n"),
    "save as a function": (b"", b"    torch.save(x, 'marker')\n"),
    "save as a method": (b"", b"    _9 = (x).save('marker', )\n"),
    "save under another name": (b"", b"    _9 = torch.save\n    _8 = _9(x, 'marker')\n"),
    "save by getattr": (b"", b"    _9 = getattr(x, 'save')('marker')\n"),
    "a home under another name": (b"", b"    _9 = ops.aten\n    _8 = _9.save(x, 'marker')\n"),
    "a default that is run": (
        b"  def more(self: Tensor, x: Tensor=torch.from_file('marker', True, 16)) -> Tensor:\n    return x\n",
        b"",
    ),
    "fork": (b"", b"    _9 = fork(__torch__.a.b, x)\n"),
    "a C++ class": (
        b"",
        b"    _9 = __torch__.torch.classes.dist_rpc.WorkerInfo.__new__(__torch__.torch.classes.dist_rpc.WorkerInfo)\n",
    ),
    "another space": (b"", b"    _9 = ops.c10d.barrier()\n"),
    "an unknown name": (b"", b"    _9 = open('marker', 'w')\n"),
    "a lambda": (b"", b"    _9 = (lambda: 0)\n"),
    "an import": (b"", b"    import os\n"),
    "a hidden line": (b"", b"    _9 = 1 # \x0c\r    torch.save(x, 'marker')\n"),
    "a continued line": (b"", b"    _9 = \\\n    torch.save(x, 'marker')\n"),
    "a text on several lines": (b"", b"    _9 = '''\n    torch.save(x, 'marker')\n'''\n"),
    "what is no code": (b"", b"    def (\n"),
    "an attribute that is run": (b"  more : Final[Tensor] = torch.zeros([9, 9])\n", b""),
    "a type that is run": (b'  __annotations__["0"] = torch.zeros([9, 9])\n', b""),
    "loops that are unrolled": (b"", b"    for _9 in (1, 2, 3):\n      _8 = 1\n"),
    "deep code": (b"", b"    _9 = " + b"torch.relu(" * 250 + b"x" + b")" * 250 + b"\n"),
    "setstate": (b"  def __setstate__(self: Tensor, s: Tensor) -> NoneType:\n    return None\n", b""),
}


# What grows, and the words of the limit that ends it.
_OWN = "__torch__.test_torch_script"
_DOUBLES = "def f0(x: Tensor) -> Tensor:\n  return x\n" + "".join(
    f"def f{n}(x: Tensor) -> Tensor:\n  return {_OWN}.f{n - 1}({_OWN}.f{n - 1}(x))\n" for n in range(1, 40)
)
GROWING = {
    "functions that call each other twice": (_DOUBLES, "    x = __torch__.test_torch_script.f39(x)\n", "too often"),
    "a list": ("", "    k = [1]\n    for i in range(60):\n      k = torch.add(k, k)\n", "list that is too large"),
    "a text": ("", "    k = 'ab'\n    for i in range(60):\n      k = torch.add(k, k)\n", "str that is too large"),
    "a tensor": ("", "    for i in range(60):\n      x = torch.cat([x, x], 0)\n", "of values"),
    "code": ("", "    1\n" * 2**20, "bytes of code"),
}


@pytest.mark.parametrize("what", list(GROWING))
def test_what_grows_without_end_is_stopped(tmp_path, what):
    before, inside, words = GROWING[what]

    def change(name, data):
        if name == "code/__torch__/test_torch_script.py":
            data = before.encode() + data.replace(FORWARD, FORWARD + inside.encode())
        return data

    path = changed(plain(tmp_path), tmp_path / "model.pt", change)
    with pytest.raises(ModelError, match=words):
        convscope.open_model(path, size=16)


def test_types_that_double_are_compiled_in_the_reader_alone(tmp_path):
    """torch's compiler compares types part by part, and can't be stopped at it."""
    lines = "".join(f"    t{n} = (t{n - 1}, t{n - 1})\n" for n in range(1, 40))

    def change(name, data):
        inside = FORWARD + b"    t0 = (x, x)\n" + lines.encode()
        return data.replace(FORWARD, inside) if name.endswith("test_torch_script.py") else data

    path = changed(plain(tmp_path), tmp_path / "model.pt", change)
    with limits.using(seconds=4), pytest.raises(ModelError, match="took too long"):
        convscope.open_model(path, size=16)


class Pairs(nn.Module):
    """Many tuples, as detectors have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def pair(self, x):
        return (x, (x, x + 1))

    def forward(self, x):
        x = self.conv(x)
        a, (b, c) = self.pair(x)
        d = ((a, b), (b, c), (c, a), (a, c), (b, a), (c, b), (a, a), (b, b), (c, c))
        e = (d, (a, b), (c, x), (a, b, c, x), (x, x))
        return e[0][0][0].mean(dim=(2, 3)) + e[2][1].mean(dim=(2, 3))


def test_many_tuples_are_read(tmp_path):
    torch.jit.save(torch.jit.script(Pairs().eval()), tmp_path / "model.pt")
    assert convscope.open_model(tmp_path / "model.pt", size=16).layer("conv").kind == "conv"


@pytest.mark.parametrize("what", list(ODD_CODE))
def test_code_that_is_not_known_to_compute_is_not_compiled(tmp_path, monkeypatch, what):
    before, inside = ODD_CODE[what]

    def change(name, data):
        if name == "code/__torch__/test_torch_script.py":
            assert FORWARD in data
            data = data.replace(FORWARD, before + FORWARD + inside)
        return data

    path = changed(plain(tmp_path), tmp_path / "model.pt", change)
    monkeypatch.setattr(torch._C, "import_ir_module_from_buffer", lambda *_: pytest.fail("torch has read it"))
    with pytest.raises(ModelError, match="trust=True"):
        convscope.open_model(path)


def at_data(change):
    return lambda name, data: change(data) if name == "data.pkl" else data


ODD_DATA = {
    "a class of C++": at_data(
        lambda d: re.sub(rb"c__torch__[\w.]*\nConv2d\n", b"c__torch__.torch.classes.os\nOs\n", d)
    ),
    "a foreign name": at_data(lambda d: d.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n")),
    "a storage that is not there": lambda name, data: None if name == "data/0" else data,
    "a storage that is short": lambda name, data: data[:-4] if name == "data/0" else data,
    "a storage that is long": lambda name, data: data + data if name == "data/0" else data,
    "a pickle that is cut": at_data(lambda d: d[: len(d) // 2]),
    "no pickle": at_data(lambda d: b"\x00" * 50),
    "a version that is no number": lambda name, data: b"nine" if name == "version" else data,
    "no version": lambda name, data: None if name == "version" else data,
}


@pytest.mark.parametrize("what", list(ODD_DATA))
def test_pickles_of_scripts_are_walked_before_torch_reads_them(tmp_path, monkeypatch, what):
    path = changed(plain(tmp_path), tmp_path / "model.pt", ODD_DATA[what])
    monkeypatch.setattr(torch._C, "import_ir_module_from_buffer", lambda *_: pytest.fail("torch has read it"))
    with pytest.raises(ModelError) as error:
        convscope.open_model(path)
    assert "\n" not in str(error.value)


def test_two_members_of_one_name_are_refused(tmp_path):
    """Which of the two a reader takes is its own affair."""
    path = plain(tmp_path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("plain/code/__torch__/test_torch_script.py", "def f(x: Tensor) -> Tensor:\n  return x\n")
    with pytest.raises(ModelError, match="two members named"):
        convscope.open_model(path)


def test_torch_sees_what_was_checked_and_no_more(tmp_path, monkeypatch):
    path = changed(plain(tmp_path), tmp_path / "model.pt", lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("plain/bytecode.pkl", b"cos\nsystem\n(S'true'\ntR.")
        archive.writestr("plain/code/__torch__.py.debug_pkl", b"cos\nsystem\n(S'true'\ntR.")
    given, load = [], torch._C.import_ir_module_from_buffer
    monkeypatch.setattr(torch._C, "import_ir_module_from_buffer", lambda *a: given.append(a[1]) or load(*a))
    assert torch_script.read(sniff(path)).module is not None
    names = zipfile.ZipFile(io.BytesIO(given[0])).namelist()
    assert not [name for name in names if name.endswith(("debug_pkl", "bytecode.pkl"))]


def test_parts_of_lists(tmp_path):
    class Sizes(Views):
        def forward(self, x):
            x = self.conv(x)
            return self.out(x.reshape(x.shape[:1] + [-1])) * x.shape[1:3][0]  # noqa: RUF005 TorchScript has no other

    scripted = torch.jit.script(Sizes().eval())
    torch.jit.save(scripted, tmp_path / "model.pt")
    mirror, x = torch_script.read(sniff(tmp_path / "model.pt")).module.eval(), images()
    with torch.no_grad():
        assert torch.equal(mirror(x), scripted(x))


class Twice(nn.Module):
    """A module that is there under two names."""

    def __init__(self, inner):
        super().__init__()
        self.one = self.two = inner

    def forward(self, x):
        return self.one(x) + self.two(x)


class Naming(pickle.Pickler):
    """Names the one array again for each tensor, which torch's own pickler does not."""

    def persistent_id(self, item):
        if isinstance(item, torch.storage.TypedStorage):
            return ("storage", torch.FloatStorage, "0", "cpu", len(item))
        return None


def test_arrays_count_at_each_place(tmp_path):
    values, constants = torch.ones(100_000), io.BytesIO()
    Naming(constants, 2).dump(tuple(values[:] for _ in range(20)))
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive, zipfile.ZipFile(tmp_path / "again.pt", "w") as made:
        for name in archive.namelist():
            made.writestr(name, constants.getvalue() if name.endswith("constants.pkl") else archive.read(name))
        made.writestr("model/constants/0", values.numpy().tobytes())
    assert torch_script.read(sniff(tmp_path / "again.pt")).module
    with limits.using(weights=2 * 10**6), pytest.raises(ModelError, match="limit weights"):
        torch_script.read(sniff(tmp_path / "again.pt"))


@pytest.mark.slow(reason="TorchScript compiles 4,096 modules")
def test_modules_count_at_each_place(tmp_path):
    module = nn.ReLU()
    for _ in range(12):
        module = Twice(module)
    torch.jit.save(torch.jit.script(module.eval()), tmp_path / "model.pt")
    with limits.using(nodes=1000), pytest.raises(ModelError, match="too many modules"):
        torch_script.read(sniff(tmp_path / "model.pt"))
