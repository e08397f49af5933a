"""Files of PyTorch's: checkpoints of both ages, TorchScript, exported programs, safetensors."""

from __future__ import annotations

import json
import pickletools
import struct
from typing import Any

from trials import mutations
from trials.models import archive, case, member
from trials.outcomes import Case, Place

_ALIGN = 64

# -- checkpoints -----------------------------------------------------------------------------------------


def _in_pickle(change: Any) -> Any:
    """A change of the pickle in an archive."""

    def changed(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
        names = [name for name in contents if name.endswith(".pkl")]
        name = place.rng.choice(names)
        return {**contents, name: change(contents[name], place)}

    return changed


def _code_only(data: bytes, place: Place) -> bytes:
    return b"\x80\x02" + mutations.code_pickle(place) + b"."


def _records(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """The tensors' bytes are short, missing, large or swapped."""
    names = [name for name in contents if "/data/" in name]
    name = place.rng.choice(names or list(contents))
    data = contents[name]
    new = place.rng.choice((b"", data[:-1], data * 1000, bytes(10**7), data + b"x", place.rng.randbytes(len(data))))
    return {**contents, name: new}


def _shapes(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """Sizes, strides and offsets of tensors that their bytes do not hold."""
    name = member(contents, "data.pkl")
    parts = mutations.opcodes(contents[name])
    numbers = [i for i, part in enumerate(parts) if part[:1] in b"KM"]
    for i in place.rng.sample(numbers, min(len(numbers), place.rng.choice((1, 2, 6)))):
        value = place.rng.choice((0, 2**31 - 1, 2**33, 2**62, -1, -(2**62), 65536))
        parts[i] = b"\x8a\x08" + struct.pack("<q", value)
    return {**contents, name: b"".join(parts)}


def _deep(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    levels = place.rng.choice((200, 5000, 10**6))
    return {**contents, member(contents, "data.pkl"): b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."}


_CHECKPOINTS = {
    "opcodes changed": _in_pickle(mutations.mutated_pickle),
    "a call planted": _in_pickle(mutations.planted_pickle),
    "a call only": _in_pickle(_code_only),
    "records": _records,
    "shapes": _shapes,
    "deep": _deep,
}


def _as_model_or_weights(place: Place, name: str, data: bytes, what: str) -> Case:
    if place.rng.random() < 0.4:
        return case(place, name, data, what)
    return case(place, name, data, what, "weights", code=f"{place.bases / 'net.py'}:make")


def state_dict(place: Place) -> Case:
    """A checkpoint in a zip archive."""
    data, what = archive(place, place.base("state-*.pth"), "net.pth", _CHECKPOINTS, _ALIGN)
    return _as_model_or_weights(place, "net.pth", data, what)


def legacy(place: Place) -> Case:
    """A checkpoint from before the archives: pickles after each other, then the tensors' bytes."""
    rng, base = place.rng, place.base("legacy-*.pth")
    data = base.read_bytes()
    if rng.random() < 0.4:
        return _as_model_or_weights(place, "net.pth", mutations.damaged(data, rng), f"{base.name}, damaged bytes")
    pickles, rest = _pickles(data)
    number = rng.randrange(len(pickles))
    what, change = rng.choice(
        (
            ("opcodes changed", mutations.mutated_pickle),
            ("a call planted", mutations.planted_pickle),
            ("a call only", _code_only),
        )
    )
    pickles[number] = change(pickles[number], place)
    return _as_model_or_weights(place, "net.pth", b"".join(pickles) + rest, f"{base.name}, {what} in pickle {number}")


def _pickles(data: bytes) -> tuple[list[bytes], bytes]:
    found, start = [], 0
    for _ in range(5):
        end = start
        for opcode, _, position in pickletools.genops(data[start:]):
            if opcode.name == "STOP":
                end = start + position + 1  # type: ignore[operator]
        found.append(data[start:end])
        start = end
    return found, data[start:]


# -- TorchScript -----------------------------------------------------------------------------------------

_LINES = (
    '    torch.save({x}, "{marker}")',
    '    _w = torch.from_file("{secret}", False, 16)',
    "    _z = torch.zeros([68719476736])",
    "    while True:\n      pass",
    "    for _i in range(1000000000000):\n      pass",
    '    print("\x1b[31mhello")',
    '    ops.prim.RaiseException("\x1b[31m\u202etext")',
    '    _s = ops.aten.save({x}, "{marker}")',
    "    _q = ops.planted.thing({x})",
    "    _l = torch.__class__",
    "    return {x}",
    "    _n = [[[[[[1]]]]]]",
    '    _m = torch.load("{secret}")',
    "    _m = __torch__.missing.thing({x})",
    '    assert False, "no"',
)


def _code_lines(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """A line put into the code, in a method of some class."""
    rng = place.rng
    names = [name for name in contents if name.endswith(".py")]
    name = rng.choice(names)
    lines = contents[name].decode().split("\n")
    heads = [
        i
        for i, line in enumerate(lines)
        if line.strip().startswith("input: Tensor") or line.strip().startswith("x: Tensor")
    ]
    at = (rng.choice(heads) if heads else rng.randrange(len(lines))) + 1
    argument = "x" if heads and "x: Tensor" in lines[at - 1] else "input"
    lines.insert(at, rng.choice(_LINES).format(x=argument, marker=place.marker, secret=place.outside / "weights.bin"))
    return {**contents, name: "\n".join(lines).encode()}


def _code_text(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """Names, numbers and operators of the code changed."""
    rng = place.rng
    name = rng.choice([name for name in contents if name.endswith(".py")])
    text = contents[name].decode()
    old, new = rng.choice(
        (
            ("Tensor", "str"),
            ("forward", "forwardx"),
            ("conv2d", "conv3d"),
            ("self", "self_"),
            ("[1, 1]", "[10000000, 10000000]"),
            ("torch.", "ops.aten."),
            ("__torch__", "__planted__"),
            ("return ", "return torch.detach("),
            ("(", "(("),
            ("None", "True"),
            ("input", "input\u202e"),
            (" ", "  "),
            ("0", str(10**30)),
            ("def ", "def __"),
            ("class ", "class X(Module):\n  pass\nclass "),
        )
    )
    return {**contents, name: text.replace(old, new, rng.choice((1, 1, -1))).encode()}


def _nested_code(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    name = place.rng.choice([name for name in contents if name.endswith(".py")])
    levels = place.rng.choice((500, 20000))
    text = contents[name].decode()
    return {**contents, name: text.replace("return ", f"_d = {'(' * levels}1{')' * levels}\n    return ", 1).encode()}


def _scripted_attack(contents: dict[str, bytes], place: Place) -> dict[str, bytes] | bytes:
    """A module that was scripted to do harm, with this try's marker in it."""
    base = place.base("attack-*.pt")
    return mutations.rezipped(_filled(mutations.members(base), place), place, _ALIGN)


def _filled(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """The stand-ins for paths replaced, in code and in pickles."""
    paths = {
        "@MARKER@": str(place.marker),
        "@SECRET@": str(place.outside / "weights.bin"),
        "@PIPE@": str(place.outside / "pipe"),
    }
    out = {}
    for name, data in contents.items():
        for text, path in paths.items():
            data = (
                data.replace(mutations.short(text), mutations.short(path))
                if name.endswith(".pkl")
                else data.replace(text.encode(), path.encode())
            )
        out[name] = data
    return out


_TORCHSCRIPT = {
    "opcodes changed": _in_pickle(mutations.mutated_pickle),
    "a call planted": _in_pickle(mutations.planted_pickle),
    "records": _records,
    "shapes": _shapes,
    "deep": _deep,
    "line of code": _code_lines,
    "line of code ": _code_lines,
    "text of code": _code_text,
    "nested code": _nested_code,
    "scripted attack": _scripted_attack,
    "scripted attack ": _scripted_attack,
}


def torchscript(place: Place) -> Case:
    """TorchScript."""
    base = place.base("script-*.pt")
    if place.rng.random() < 0.1:
        base = place.base("attack-*.pt")
        return case(
            place,
            "net.pt",
            mutations.zipped(
                [mutations.stored(name, data) for name, data in _filled(mutations.members(base), place).items()], _ALIGN
            ),
            base.name,
        )
    data, what = archive(place, base, "net.pt", _TORCHSCRIPT, _ALIGN)
    return case(place, "net.pt", data, what)


# -- exported programs -----------------------------------------------------------------------------------


def _program(change: Any) -> Any:
    """A change of the program's JSON."""

    def changed(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
        name = member(contents, "models/model.json")
        program = json.loads(contents[name])
        new = change(program, place)
        return {**contents, name: mutations.dumped(program if new is None else new)}

    return changed


def _specs(program: Any, place: Place) -> None:
    """Pytree specs of kinds that name modules."""
    rng = place.rng
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    named = rng.choice(
        ("planted_module", "antigravity", "os", "./planted_module", "planted_lib.so", "turtledemo.clock")
    )
    enum = json.dumps({"__enum__": True, "fqn": f"{named}:thing", "name": "a"})
    factory = json.dumps({"default_factory_module": named, "default_factory_name": "thing", "dict_context": "[]"})
    kinds = [
        ("builtins.tuple", enum),
        ("builtins.list", enum),
        ("builtins.dict", f"[{enum}]"),
        ("collections.OrderedDict", f"[{enum}]"),
        ("collections.defaultdict", factory),
        ("collections.namedtuple", json.dumps(f"{named}.thing")),
        ("collections.namedtuple", json.dumps({"class_name": "thing", "module": named, "fields": ["a"]})),
        ("collections.deque", enum),
        (f"{named}.thing", "null"),
        ("torch.utils._pytree.TreeSpec", enum),
        ("types.MappingProxyType", enum),
        ("functools.partial", json.dumps([named, "thing"])),
        ("builtins.slice", "null"),
        ("torch.return_types.max", json.dumps(named)),
    ]
    kind, context = rng.choice(kinds)
    inner = {"type": kind, "context": context, "children_spec": [leaf]}
    outer = {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [inner, {"type": "builtins.dict", "context": "[]", "children_spec": []}],
    }
    if rng.random() < 0.5:
        outer = {
            "type": "builtins.tuple",
            "context": context,
            "children_spec": [
                {"type": "builtins.tuple", "context": "null", "children_spec": [leaf]},
                {"type": "builtins.dict", "context": "[]", "children_spec": []},
            ],
        }
    signature = rng.choice(program["graph_module"]["module_call_graph"])["signature"]
    if signature is None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature[rng.choice(("in_spec", "out_spec"))] = json.dumps([rng.choice((1, 1, 1, 2)), outer])


def _targets(program: Any, place: Place) -> None:
    """Operators that don't exist, or that no network uses."""
    node = place.rng.choice(program["graph_module"]["graph"]["nodes"])
    node["target"] = place.rng.choice(
        (
            *(
                "torch.ops.aten.__class__.default",
                "torch.ops.higher_order.wrap",
                "torch.ops.higher_order.__init__",
                "planted_module.thing",
                "builtins.eval",
                "os.system",
            ),
            *(
                "math.__loader__",
                "_operator.attrgetter",
                "_operator.methodcaller",
                "torch.ops.aten.from_file.default",
                "torch.ops.aten.save.default",
                "torch.ops.load_library",
            ),
            *(
                "torch.ops.planted.thing.default",
                "torch.ops.aten.conv2d",
                "torch.load",
                "torch.hub.load",
                "torch.sym_not.__globals__",
                "",
                "torch.ops.",
                "x" * 10**5,
                "torch.ops.aten.zeros.default",
            ),
            *(
                "torch.ops.higher_order.map_impl",
                "torch.ops.higher_order.triton_kernel_wrapper_mutation",
                "torch.ops.prim.device.default",
                "torch.ops.inductor.resize_storage_bytes_.default",
                "torch.ops.c10d.send.default",
            ),
            *(
                "torch.ops.aten.relu_.default",
                "torch.ops.aten.sigmoid.default",
                "torch.ops.aten.empty.memory_format",
                "_operator.getitem",
                "math.sqrt",
                "torch.ops.rngprims.philox_rand.default",
            ),
        )
    )


def _injected(program: Any, place: Place) -> None:
    """Texts that would be code, where names stand."""
    rng, marker = place.rng, str(place.marker)
    code = rng.choice(
        (
            f"x = open({marker!r}, 'w')",
            f'");open({marker!r},"w");("',
            f"\nopen({marker!r}, 'w')\n",
            "__import__('planted_module').thing",
            f"x\\'); open({marker!r}, 'w') #",
            "x;import planted_module",
        )
    )
    texts = [
        (holder, key)
        for holder in mutations.holders_in(program)
        for key in (holder if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], str)
    ]
    old = rng.choice([holder[key] for holder, key in texts])
    for holder, key in texts:  # everywhere alike, so that what refers to it still finds it
        if holder[key] == old:
            holder[key] = code if rng.random() < 0.9 else old + code


def _expressions(program: Any, place: Place) -> None:
    """Sizes that are expressions."""
    rng = place.rng
    text = rng.choice(
        (
            "__import__('planted_module')",
            "Symbol('s0').__class__",
            f"open({str(place.marker)!r}, 'w')",
            "Pow(Integer(10), Pow(Integer(10), Integer(10)))",
            "Mul(" * 500 + "1" + ")" * 500,
            "9**9**9**9",
            "s0",
            "",
            "Integer(-1)",
            "(lambda: 1)()",
            "Symbol('__import__(\"planted_module\")')",
            "Max(1, 2)",
            "[x for x in [1]]",
            "Piecewise((1, True))",
            "factorial(100000)",
            "sympify('__import__(\"planted_module\")')",
            "Integer('planted')",
            "Float('1', 10**9)",
        )
    )
    sizes = [size for value in program["graph_module"]["graph"]["tensor_values"].values() for size in value["sizes"]]
    size = rng.choice(sizes)
    size.clear()
    size["as_expr"] = {"expr_str": text, "hint": {"as_int": 3}}
    if rng.random() < 0.5:
        program["range_constraints"] = {text: {"min_val": 0, "max_val": 2**31}}


def _large(program: Any, place: Place) -> None:
    """Declared sizes of many GiB."""
    values = list(program["graph_module"]["graph"]["tensor_values"].values())
    value = place.rng.choice(values)
    for size in value["sizes"]:
        size.clear()
        size["as_int"] = place.rng.choice((65536, 2**31, 2**62, -1, 0))


def _sample(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """The pickles in the archive: its examples, its constants."""
    import io
    import zipfile

    names = [name for name in contents if name.endswith(".pt")]
    if not names:
        return contents
    name = place.rng.choice(names)
    with zipfile.ZipFile(io.BytesIO(contents[name])) as inner:
        inside = {key: inner.read(key) for key in inner.namelist()}
    pickle = member(inside, "data.pkl")
    change = place.rng.choice((mutations.planted_pickle, mutations.mutated_pickle, _code_only))
    inside[pickle] = change(inside[pickle], place)
    return {**contents, name: mutations.rezipped(inside, place, _ALIGN)}


def _configs(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """The declared place of the weights, and their storage."""
    rng = place.rng
    name = rng.choice([name for name in contents if name.endswith("_config.json")])
    config = json.loads(contents[name])
    entries = list(config.get("config", {}).values())
    if entries and rng.random() < 0.6:
        entry = rng.choice(entries)
        if rng.random() < 0.5:
            entry["use_pickle"] = True
            root = name.split("/")[0]
            contents = {
                **contents,
                f"{root}/data/weights/{entry['path_name']}": b"\x80\x02" + mutations.code_pickle(place) + b".",
            }
        else:
            entry["path_name"] = mutations.odd_text(place)
    else:
        config = mutations.mutated(config, place)
    return {**contents, name: mutations.dumped(config)}


def _objects(contents: dict[str, bytes], place: Place) -> dict[str, bytes]:
    """Files beside the program that no network needs."""
    root = next(iter(contents)).split("/")[0]
    name = place.rng.choice(
        (
            "data/constants/custom_obj_0",
            "data/constants/opaque_obj_0",
            "data/aotinductor/model/x.so",
            "extra/planted",
            "models/other.json",
            "data/weights/custom_obj_1",
            "data/constants/tensor_0",
        )
    )
    content = b"\x80\x02" + mutations.code_pickle(place) + b"."
    return {**contents, f"{root}/{name}": content}


_EXPORTED = {
    "tree changed": _program(mutations.mutated),
    "tree changed ": _program(mutations.mutated),
    "specs": _program(_specs),
    "specs ": _program(_specs),
    "targets": _program(_targets),
    "injected": _program(_injected),
    "expressions": _program(_expressions),
    "large": _program(_large),
    "pickles": _sample,
    "configs": _configs,
    "objects": _objects,
    "records": _records,
}


def exported(place: Place) -> Case:
    """An exported program."""
    data, what = archive(place, place.base("export-*.pt2"), "net.pt2", _EXPORTED, _ALIGN)
    return case(place, "net.pt2", data, what)


# -- safetensors -----------------------------------------------------------------------------------------


def safetensors(place: Place) -> Case:
    """A header of JSON, and bytes."""
    rng, base = place.rng, place.base("*.safetensors")
    data = base.read_bytes()
    if rng.random() < 0.3:
        return _as_model_or_weights(
            place, "net.safetensors", mutations.damaged(data, rng), f"{base.name}, damaged bytes"
        )
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = rng.choice(("tree changed", "tensor", "length", "twice"))
    tensor = header[rng.choice([key for key in header if key != "__metadata__"])]
    if what == "tree changed":
        header = mutations.mutated(header, place)
    elif what == "tensor":
        key = rng.choice(("shape", "data_offsets", "dtype"))
        tensor[key] = rng.choice(
            (
                [2**40, 2**40],
                [0],
                [-1],
                [2**63],
                [0, 10**12],
                [5, 3],
                "F64",
                "F128",
                "I1",
                "BF16",
                None,
                [[1]],
                [1] * 100,
            )
        )
    text = mutations.dumped(header)
    if what == "twice":
        text = text[:-1] + b', "again": ' + json.dumps(tensor).encode() + b', "again": {}}'
    size = len(text) if what != "length" else rng.choice((0, 1, len(text) - 1, len(data) * 2, 2**40, 2**63, 2**64 - 1))
    return _as_model_or_weights(place, "net.safetensors", struct.pack("<Q", size) + text + rest, f"{base.name}, {what}")
