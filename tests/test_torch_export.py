"""Exported programs: the tree that they were exported from, with the outputs of the module itself."""

import io
import json
import pickle
import re
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from test_torch_script import Residual, Views, images  # noqa: E402
from torch import nn  # noqa: E402
from torch._export.serde import serialize  # noqa: E402
from torch.export import Dim  # noqa: E402

import convscope  # noqa: E402
from convscope import limits  # noqa: E402
from convscope.errors import ModelError  # noqa: E402
from convscope.networks.formats.files import sniff  # noqa: E402
from convscope.networks.formats.torch import export as torch_export  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.without_keras]


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
    example = images(16, batch)
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
    x = images(16, 5)
    with torch.no_grad():
        expected = module(x).numpy()
    found = network.predict(x.permute(0, 2, 3, 1).numpy())
    found = network.head.probabilities(found) if network.head.undone else found
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


@pytest.mark.parametrize(
    "member", ["data/weights/weight_0", "data/sample_inputs/model.pt", "models/model.json", "extra/notes"]
)
def test_an_archive_that_unpacks_a_hundredfold_is_refused_before_memory_is_taken(tmp_path, member):
    whole = exported(Views(), tmp_path / "model.pt2")
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "bomb.pt2", "w") as bomb:
        names = archive.namelist()
        for name in names:
            if not name.endswith(f"/{member}"):
                bomb.writestr(name, archive.read(name))
        bomb.writestr(f"{names[0].partition('/')[0]}/{member}", bytes(2**20 * 80), zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="100 times"):
            torch_export.read(sniff(tmp_path / "bomb.pt2"))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


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
        with pytest.raises(ModelError, match="would run"):
            convscope.open_model(_changed(path, tmp_path / f"{number}.pt2", change))
    assert not marker.exists()


def test_pickled_objects_in_the_archive_are_refused(tmp_path):
    path = exported(Residual(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/constants/opaque_obj_0", pickle.dumps(Evil(tmp_path / "was-run")))
    with pytest.raises(ModelError, match=r"1 pickled object, .*trust=True"):
        convscope.open_model(path)
    assert not (tmp_path / "was-run").exists()


def test_compiled_packages_are_refused(tmp_path):
    path = exported(Residual(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/aotinductor/model.so", b"\x7fELF")
    with pytest.raises(ModelError, match="compiled for one machine"):
        convscope.open_model(path)


# -- what torch would import, look up or run --------------------------------------------------------------


LEAF = {"type": None, "context": None, "children_spec": []}


def spec(kind, context, *children):
    return {"type": kind, "context": context, "children_spec": list(children)}


def specs(inner):
    """A text for `in_spec` with a node somewhere in it."""
    return json.dumps(
        [1, spec("builtins.tuple", "null", spec("builtins.tuple", "null", inner), spec("builtins.dict", "[]"))]
    )


ENUM = json.dumps({"__enum__": True, "fqn": "named_in_the_file:thing", "name": "a"})
FACTORY = {"default_factory_module": "named_in_the_file", "default_factory_name": "thing", "dict_context": []}
NODES = {
    "enum in a tuple": spec("builtins.tuple", ENUM, LEAF),
    "enum in a list": spec("builtins.list", ENUM, LEAF),
    "enum in a dict": spec("builtins.dict", json.dumps([json.loads(ENUM)]), LEAF),
    "enum deep in a dict": spec("builtins.dict", json.dumps([[[json.loads(ENUM)]]]), LEAF),
    "defaultdict": spec("collections.defaultdict", json.dumps(FACTORY)),
    "defaultdict with a plain context": spec("collections.defaultdict", FACTORY),
    "namedtuple": spec("collections.namedtuple", '"named_in_the_file.thing"', LEAF),
    "OrderedDict": spec("collections.OrderedDict", ENUM, LEAF),
    "deque": spec("collections.deque", ENUM, LEAF),
    "a class of the file's": spec("named_in_the_file.thing", "null", LEAF),
    "context of a leaf": {**LEAF, "context": ENUM},
    "another key": {**spec("builtins.tuple", "null", LEAF), "more": ENUM},
}


def edited(path, to, edit):
    """The archive with the description of its graph edited in place."""

    def change(text):
        program = json.loads(text)
        edit(program)
        return json.dumps(program)

    return _changed(path, to, change)


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    return exported(Residual(), tmp_path_factory.mktemp("pt2") / "model.pt2")


@pytest.mark.parametrize("place", ["in_spec", "out_spec"])
@pytest.mark.parametrize("node", list(NODES))
def test_pytree_texts_hold_tuples_lists_and_dicts_alone(exported_once, tmp_path, monkeypatch, node, place):
    (tmp_path / "named_in_the_file.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nthing = {{}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "named_in_the_file", raising=False)

    def edit(program):
        program["graph_module"]["module_call_graph"][0]["signature"][place] = specs(NODES[node])

    path = edited(exported_once, tmp_path / "model.pt2", edit)
    with pytest.raises(ModelError, match="trust=True"):
        convscope.open_model(path)
    assert not (tmp_path / "marker").exists()
    assert "named_in_the_file" not in sys.modules


class Keywords(nn.Module):
    """Takes a keyword, and a dictionary whose keys are no names."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x, scale=None):
        return {"class scores/1": self.out(torch.relu(self.conv(x)).mean((2, 3)))}


@pytest.fixture(scope="module")
def with_keywords(tmp_path_factory):
    path = tmp_path_factory.mktemp("keywords") / "model.pt2"
    example = (torch.zeros(2, 3, 16, 16),), {"scale": torch.zeros(1)}
    torch.export.save(torch.export.export(Keywords().eval(), *example), path)
    return path


def test_keywords_and_keys_that_are_no_names_are_read(with_keywords):
    assert convscope.open_model(with_keywords).layer("conv").kind == "conv"


@pytest.mark.parametrize(
    "key", ["a=open({!r}, 'w')", "a: open({!r}, 'w')", "a):\n  pass\nopen({!r}, 'w')\ndef b(c", "if"]
)
def test_names_of_arguments_are_names(with_keywords, tmp_path, key):
    """torch writes the keys of the keywords into the Python that it generates: a default value there runs."""
    marker = tmp_path / "marker"

    def edit(program):
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        version, tree = json.loads(signature["in_spec"])
        tree["children_spec"][1]["context"] = json.dumps([key.format(str(marker))])
        signature.update(in_spec=json.dumps([version, tree]), forward_arg_names=None)

    path = edited(with_keywords, tmp_path / "model.pt2", edit)
    with pytest.raises(ModelError, match="trust=True"):
        convscope.open_model(path)
    assert not marker.exists()


def test_a_description_of_too_many_values_is_not_parsed(exported_once, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with zipfile.ZipFile(exported_once) as archive, zipfile.ZipFile(tmp_path / "m.pt2", "w") as made:
        for entry in archive.infolist():
            long = entry.filename.endswith("models/model.json")
            made.writestr(entry, b"[" + b"[]," * 50_000 + b"0]" if long else archive.read(entry))
    with limits.using(nodes=1000), pytest.raises(ModelError, match="nodes"):
        convscope.open_model(tmp_path / "m.pt2")


def node_of(program):
    return program["graph_module"]["graph"]["nodes"][0]


def size_in(program, text):
    """A size as text, among those of the graph."""
    program["graph_module"]["graph"]["sym_int_values"]["s"] = {"as_expr": {"expr_str": text, "hint": None}}


EDITS = {
    "dunder in an operator": lambda p: node_of(p).update(target="torch.ops.aten.relu.__class__"),
    "dunder in a namespace": lambda p: node_of(p).update(target="torch.ops.__class__.relu.default"),
    "dunder in a name": lambda p: node_of(p).update(target="torch.ops.aten.__class__.default"),
    "higher_order.wrap": lambda p: node_of(p).update(target="torch.ops.higher_order.wrap"),
    "higher order dunder": lambda p: node_of(p).update(target="torch.ops.higher_order.__init__"),
    "auto_functionalized": lambda p: node_of(p).update(target="torch.ops.higher_order.auto_functionalized"),
    "load_library": lambda p: node_of(p).update(target="torch.ops.load_library"),
    "torch.load": lambda p: node_of(p).update(target="torch.load"),
    "math dunder": lambda p: node_of(p).update(target="math.__loader__.load_module"),
    "a large power": lambda p: node_of(p).update(
        target="_operator.pow", inputs=[{"name": "", "arg": {"as_int": 2**40}, "kind": 1}] * 2
    ),
    "an extension": lambda p: node_of(p).update(target="#aoti:thing"),
    "internal operator": lambda p: node_of(p).update(target="torch.ops.aten._test_string_default.default"),
    "operator of another space": lambda p: node_of(p).update(target="torch.ops._test.leaky_relu.default"),
    "a function as an argument": lambda p: node_of(p)["inputs"][0].update(arg={"as_operator": "torch.load"}),
    "a C++ object": lambda p: node_of(p)["inputs"][0].update(arg={"as_custom_obj": {"name": "x", "class_fqn": "y"}}),
    "an unlisted key": lambda p: p.update(surprise=1),
    "an unlisted key of the graph": lambda p: p["graph_module"]["graph"].update(surprise={"a": "b"}),
    "an unlisted note": lambda p: node_of(p)["metadata"].update(surprise="import os"),
    "two kinds at once": lambda p: node_of(p)["inputs"][0]["arg"].update(as_int=1),
    "a name that is no name": lambda p: p["graph_module"]["graph"]["inputs"][0]["as_tensor"].update(name="x: print()"),
    "a keyword as a name": lambda p: node_of(p).update(name="lambda"),
    "named tuples": lambda p: p["graph_module"].update(treespec_namedtuple_fields={"os.x": {"field_names": ["a"]}}),
    "a symbol of many": lambda p: p.update(range_constraints={"u99999999999": {"min_val": 0, "max_val": 9}}),
    "a verifier": lambda p: p.update(verifiers=["os.system"]),
    "a number of many digits": lambda p: size_in(p, "Float('0.5', precision=1000000)"),
    "a number of a large exponent": lambda p: size_in(p, "Float('1e999999999', precision=53)"),
    "a power tower": lambda p: size_in(p, "Pow(Integer(9), Pow(Integer(9), Integer(99)))"),
    "a call": lambda p: size_in(p, "sympify('1')"),
}


@pytest.mark.parametrize("what", list(EDITS))
def test_only_what_an_export_writes_is_handed_to_torch(exported_once, tmp_path, monkeypatch, what):
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("torch has read it"))
    with pytest.raises(ModelError, match="trust=True"):
        convscope.open_model(edited(exported_once, tmp_path / "model.pt2", EDITS[what]))


def test_what_is_noted_beside_the_graph_is_left_out(exported_once, tmp_path):
    """Guards are Python, and functions in notes are looked up by name."""

    def edit(program):
        program["guards_code"] = ["__import__('os').abort()"]
        program["graph_module"]["metadata"] = {"custom": "{}"}
        node_of(program)["metadata"].update(source_fn_stack="a,torch.ops.load_library", custom='{"__enum__": true}')

    assert convscope.open_model(edited(exported_once, tmp_path / "model.pt2", edit)).layer("conv").kind == "conv"


def rewritten(path, to, change):
    """The archive with its members changed: `change` is given the name and the bytes, and gives the bytes or None."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as made:
        for entry in archive.infolist():
            data = change(entry.filename, archive.read(entry))
            if data is not None:
                made.writestr(entry.filename, data)
    return to


def table_with(**changes):
    def change(name, data):
        if not name.endswith("model_weights_config.json"):
            return data
        table = json.loads(data)
        payload = table["config"]["conv.weight"]
        payload.update({key: value for key, value in changes.items() if key in payload})
        payload["tensor_meta"].update({key: value for key, value in changes.items() if key in payload["tensor_meta"]})
        return json.dumps(table).encode()

    return change


BIG = [{"as_int": 2**20}, {"as_int": 2**20}, {"as_int": 3}, {"as_int": 3}]


@pytest.mark.parametrize(
    "change",
    [
        table_with(use_pickle=True),
        table_with(path_name="../../etc/passwd"),
        table_with(path_name="weight_99"),
        table_with(sizes=BIG),
        table_with(strides=BIG),
        table_with(storage_offset={"as_int": 10**6}),
        table_with(storage_offset={"as_int": -1}),
        table_with(device={"type": "meta", "index": None}),
        lambda name, data: b"" if name.endswith("weight_0") else data,
        lambda name, data: None if name.endswith("weight_0") else data,
        lambda name, data: b"{" * 10**5 if name.endswith("models/model.json") else data,
        lambda name, data: b"[" * 10**5 + b"]" * 10**5 if name.endswith("models/model.json") else data,
        lambda name, data: b"\xff" if name.endswith("archive_format") else data,
        lambda name, data: b"big" if name.endswith("byteorder") else data,
    ],
)
def test_weights_are_what_the_table_says(exported_once, tmp_path, change):
    with pytest.raises(ModelError) as error:
        convscope.open_model(rewritten(exported_once, tmp_path / "model.pt2", change))
    assert "\n" not in str(error.value)


def test_weights_count_at_each_place(tmp_path):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, 500)

        def forward(self, x):
            return self.fc(x.flatten(1))

    def change(name, data):
        if not name.endswith("model_weights_config.json"):
            return data
        table = json.loads(data)
        table["config"].update({f"again_{number}": table["config"]["fc.weight"] for number in range(10)})
        return json.dumps(table).encode()

    path = rewritten(exported(Wide(), tmp_path / "wide.pt2"), tmp_path / "model.pt2", change)
    with limits.using(weights=2 * path.stat().st_size), pytest.raises(ModelError, match="a tensor of"):
        convscope.open_model(path)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
def test_a_download_that_broke_off(exported_once, tmp_path, kept):
    data = exported_once.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ModelError):
        convscope.open_model(tmp_path / "cut.pt2")


class Scaled(Residual):
    def forward(self, x, *, scale=1.0, double=False):
        x = super().forward(x) * scale
        return {"p": 2 * x if double else x, "q": (x, None)}


def test_arguments_that_are_no_tensors_are_those_of_the_example(tmp_path):
    module = Scaled().eval()
    program = torch.export.export(module, (images(16, 1),), {"scale": 3.0, "double": True})
    torch.export.save(program, tmp_path / "model.pt2")
    opened = torch_export.read(sniff(tmp_path / "model.pt2")).module
    with torch.no_grad():
        expected = module(images(16, 1), scale=3.0, double=True)["p"]
        torch.testing.assert_close(opened(images(16, 1))["p"], expected)


def old_format(program, path, change=lambda name, data: data):
    """As PyTorch 2.6 and 2.7 wrote it: four members, three of them pickles."""
    held = serialize.serialize(program)
    members = {
        "version": ".".join(map(str, serialize.SCHEMA_VERSION)).encode(),
        "serialized_exported_program.json": held.exported_program,
        "serialized_state_dict.pt": held.state_dict,
        "serialized_constants.pt": held.constants,
        "serialized_example_inputs.pt": held.example_inputs,
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
    return path


def test_the_format_of_earlier_versions(tmp_path):
    module = Residual().eval()
    program = torch.export.export(module, (images(16, 1),))
    opened = torch_export.read(sniff(old_format(program, tmp_path / "model.pt2"))).module
    with torch.no_grad():
        torch.testing.assert_close(opened(images(16, 1)), module(images(16, 1)))


@pytest.mark.parametrize("member", ["state_dict", "constants", "example_inputs"])
def test_pickles_of_the_earlier_format_are_walked(tmp_path, member):
    marker, held = tmp_path / "marker", io.BytesIO()
    torch.save({"conv.weight": Evil(marker)}, held)
    program = torch.export.export(Residual().eval(), (images(16, 1),))
    path = old_format(
        program, tmp_path / "model.pt2", lambda name, data: held.getvalue() if name.endswith(member + ".pt") else data
    )
    with pytest.raises(ModelError, match=r"exec.*trust=True"):
        convscope.open_model(path)
    assert not marker.exists()
