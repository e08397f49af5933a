"""Exported programs: the tree that they were exported from, with the outputs of the module itself."""

import io
import pickle
import re
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from test_torch_script import Residual, Views, pictures  # noqa: E402
from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402

import convscope  # noqa: E402
from convscope.errors import ModelError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Shaped(nn.Module):
    """Shapes with the example's batch baked in."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16 * 16, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = x.view(x.shape[0], 2, 2, 16, 16).transpose(1, 2).reshape(x.shape[0], -1)
        return self.out(x)


def exported(module, path, batch=1, dynamic=False):
    example = pictures(16, batch)
    shapes = ({0: Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize(("batch", "dynamic"), [(1, False), (2, True)])
@pytest.mark.parametrize("make", [Residual, Views, Shaped])
def test_any_batch_gives_what_the_module_gives(tmp_path, make, batch, dynamic):
    torch.manual_seed(0)
    module = make()
    network = convscope.open_model(exported(module, tmp_path / "model.pt2", batch, dynamic))
    assert network.name == make.__name__
    assert network.inputs.size == (16, 16)
    x = pictures(16, 5)
    with torch.no_grad():
        expected = module(x).numpy()
    found = network.predict(x.permute(0, 2, 3, 1).numpy())
    found = network.head.probabilities(found) if network.head.kind == "softmax" else found
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_layers_are_those_of_the_module(tmp_path):
    torch.manual_seed(0)
    module = Residual()
    network = convscope.open_model(exported(module, tmp_path / "model.pt2"))
    plain = convscope.open_model(module, size=16)
    kinds = {layer.path: layer.kind for layer in plain.layers}
    assert {layer.path: layer.kind for layer in network.layers} == kinds
    photo = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    mine, theirs = convscope.activations(network, [photo], "all"), convscope.activations(plain, [photo], "all")
    for path in kinds:
        np.testing.assert_allclose(mine.arrays[path], theirs.arrays[path], atol=1e-6)
    one, two = (convscope.heatmap(net, [photo], 1, layer="mix#1").maps for net in (network, plain))
    np.testing.assert_allclose(one, two, atol=1e-7)


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_pickled_code_in_the_archive_is_not_run(tmp_path):
    """torch.export.load falls back on a full unpickling of the example inputs; convscope forbids it."""
    path = exported(Residual(), tmp_path / "model.pt2")
    marker, held = tmp_path / "was-run", io.BytesIO()
    torch.save(((Evil(marker),), {}), held)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as changed:
        for entry in archive.infolist():
            inputs = entry.filename.endswith("sample_inputs/model.pt")
            changed.writestr(entry, held.getvalue() if inputs else archive.read(entry))
    with pytest.raises(ModelError):
        convscope.open_model(tmp_path / "evil.pt2")
    assert not marker.exists()


class Free(nn.Module):
    """Any height: its sizes are expressions."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))


def _changed(path, to, change):
    """The archive with the text of its graph changed; the change has to be one."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as changed:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("models/model.json"):
                assert change(data.decode()) != data.decode()
                data = change(data.decode()).encode()
            changed.writestr(entry, data)
    return to


def test_text_in_the_graph_is_not_run_as_code(tmp_path):
    """torch evaluates sizes, looks functions up by dotted names, and generates Python with the names in the file."""
    path, marker = tmp_path / "model.pt2", tmp_path / "was-run"
    height = torch.export.Dim("height", min=8, max=512)
    program = torch.export.export(Free().eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({2: height},))
    torch.export.save(program, path)
    assert convscope.open_model(path).layer("conv").kind == "conv"  # as it is it opens
    code = f"__import__('pathlib').Path('{marker}').touch()"
    changes = (
        lambda text: re.sub(r'("expr_str": ?)"[^"]*"', rf'\1"{code}"', text),
        lambda text: re.sub(r'("expr_str": ?)"[^"]*"', r"""\1"sympify('1')" """, text),
        lambda text: text.replace("torch.ops.aten.relu.default", "torch.os.system"),
        lambda text: text.replace("torch.ops.aten.relu.default", "_operator.call"),
        lambda text: text.replace("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"),
        lambda text: text.replace('conv.weight"', r"conv.w\" + " + code + r' + \""'),
        lambda text: text.replace('"name": "input"', f'"name": "input={code}#"'),
    )
    for number, change in enumerate(changes):
        with pytest.raises(ModelError, match="would run as code"):
            convscope.open_model(_changed(path, tmp_path / f"{number}.pt2", change))
    assert not marker.exists()


def test_pickled_objects_in_the_archive_are_refused(tmp_path):
    path = exported(Residual(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/constants/opaque_obj_0", pickle.dumps(Evil(tmp_path / "was-run")))
    with pytest.raises(ModelError, match=r"1 pickled object, .*--trust"):
        convscope.open_model(path)
    assert not (tmp_path / "was-run").exists()


def test_compiled_packages_are_refused(tmp_path):
    path = exported(Residual(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/aotinductor/model.so", b"\x7fELF")
    with pytest.raises(ModelError, match="compiled for one machine"):
        convscope.open_model(path)
