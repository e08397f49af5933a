"""Exported programs (`.pt2`): the module tree that they were exported from, built anew from their graph."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch._export.serde import schema, serialize

from convscope import limits
from convscope.errors import ModelError, option
from convscope.networks.foreign import Exported, Structure
from convscope.networks.formats import archives, pickles
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.files import ModelFile
from convscope.networks.formats.torch import pickles as torch_pickles
from convscope.networks.formats.torch import schema as torch_schema
from convscope.networks.torch.modules import Described, OpenedModule


def read(file: ModelFile, trust: bool = False) -> OpenedModule:
    """An exported program as a tree of modules.

    Args:
        file: a `.pt2` file.
        trust: hand it to PyTorch as it is; else it is read first, and what is not known to be harmless is refused.

    Raises:
        ModelError: it is damaged, compiled for one machine, or holds what could run code and is not trusted.
    """
    path = file.path
    compiled = [name for name in archives.member_names(path) if name.endswith((".so", ".cubin"))]
    if compiled:
        raise ModelError(
            f"{path} is compiled for one machine (AOTInductor), without a graph. Expected torch.export.save.",
            code="model-compiled",
            path=str(path),
        )
    load = (lambda: torch.export.load(path)) if trust else _checked(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of code of its own
            program = load()
            module = _unflattened(program)
    except Exception as error:  # torch raises what its reader raises
        raise damaged(path, error, " as an exported program") from error
    shape = _input_shape(program)
    _describe(module, program)
    declared = (None, *shape[1:]) if shape else None
    return OpenedModule(module, file.source("PyTorch exported program (.pt2)"), input_shape=declared)


def _unflattened(program: Exported) -> nn.Module:
    _free_the_batch(program)
    module = torch.export.unflatten(program)
    # Its own check insists on the sizes of the example.
    constants = _constants_of_the_example(program)

    def inputs(*arguments: object) -> list[Structure]:
        return [*arguments, *constants[len(arguments) :]]

    module.process_forward_inputs = inputs  # type: ignore[method-assign]
    return module


def _constants_of_the_example(program: Exported) -> list[object]:
    """What stands for each argument that a pass is not given: the number that the program was exported with."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    return [getattr(spec.arg, "value", None) for spec in specs]


# -- reading the archive first ---------------------------------------------------------------------------

_MODEL, _WEIGHTS, _CONSTANTS = "models/model.json", "data/weights/", "data/constants/"
_CONFIGS = {_WEIGHTS: "model_weights_config.json", _CONSTANTS: "model_constants_config.json"}
# Of PyTorch 2.6 and 2.7.
_OLD_MODEL, _OLD_STATES = "serialized_exported_program.json", ("serialized_state_dict.pt", "serialized_constants.pt")
_MEMBERS = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/(version|serialization_id)|\.format_version"
    r"|\.storage_alignment|models/model\.json|data/weights/(weight_\d+|model_weights_config\.json|model\.pt)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json|model\.pt)|data/sample_inputs/model\.pt|extra/.*"
    r"|serialized_(exported_program\.json|(state_dict|constants|example_inputs)\.pt)|extra_files/.*"
)


def _checked(path: Path) -> Callable[[], Exported]:
    """What loads the program from parts that were found to be harmless: torch sees what was checked, and no more.

    The inputs of the example (a pickle) and what the author put beside the program are left out.
    """
    with archives.opened(path) as archive:
        _check_members(archive)
        try:
            if _OLD_MODEL in archive.members:
                parts = serialize.SerializedArtifact(*_old_parts(archive))
                return lambda: serialize.deserialize(parts)
            made = archives.packed(_members(archive))
            return lambda: torch.export.load(made)
        except torch_schema.Odd as odd:
            raise torch_schema.refusal(path, odd) from odd
        except pickles.ForeignName as error:
            raise ModelError(
                f"{path} holds a pickle that asks for {error.name}, and unpickling runs code. Expected tensors only. "
                f"If you trust the file, give {option('trust=True')}.",
                code="needs-trust",
                path=str(path),
                names=[error.name],
            ) from error


def _check_members(archive: archives.Archive) -> None:
    objects = [name for name in archive.members if re.match(r"(custom|opaque)_obj_", name.rpartition("/")[2])]
    if objects:
        raise ModelError(
            f"{archive.path} holds {len(objects)} pickled object{'s' if len(objects) > 1 else ''}, and unpickling runs "
            f"code. Expected tensors only. If you trust the file, give {option('trust=True')}.",
            code="needs-trust",
            path=str(archive.path),
            names=objects,
        )
    odd = next((name for name in archive.members if not _MEMBERS.fullmatch(name)), None)
    if odd is not None:
        raise ModelError(
            f"{archive.path} holds the member {ascii(odd)[:80]}, which torch.export.save does not write. "
            f"If you trust the file, give {option('trust=True')}.",
            code="needs-trust",
            path=str(archive.path),
            names=[odd],
        )


def _members(archive: archives.Archive) -> Iterator[tuple[str, bytes | bytearray]]:
    if archive.text("archive_format") != b"pt2":
        raise torch_schema.Odd("archive_format", "another format than pt2")
    _check_order(archive)
    yield "archive_format", b"pt2"
    yield "archive_version", _number(archive, "archive_version")
    yield ".data/version", b"3\n"
    yield "byteorder", b"little"
    yield _MODEL, _json(torch_schema.program(torch_schema.parsed(archive.text(_MODEL), _MODEL)))
    yield "data/sample_inputs/model.pt", _walked(archive, "data/sample_inputs/model.pt")
    for folder in (_WEIGHTS, _CONSTANTS):
        if f"{folder}model.pt" in archive.members:
            yield f"{folder}model.pt", _tensors_anew(archive, f"{folder}model.pt")
        else:
            yield from _payload(archive, folder)


def _payload(archive: archives.Archive, folder: str) -> Iterator[tuple[str, bytes | bytearray]]:
    """The table of a folder's tensors, and the bytes of each: as many as the table declares."""
    name = folder + _CONFIGS[folder]
    table = torch_schema.cleaned(schema.PayloadConfig, torch_schema.parsed(archive.text(name), name))
    yield name, _json(table)
    needed: dict[str, int] = {}
    total = 0
    for payload in table.get("config", {}).values():
        member = folder + payload["path_name"]
        span, values, item = torch_schema.nbytes(payload["tensor_meta"])
        held = archive.members[member].file_size if member in archive.members else -1
        total += values  # several tensors may be made of one member
        if span > held or held % item or total > limits.current().weights:
            raise torch_schema.Odd(name, f"a tensor of {max(span, values)} bytes, whose member {member} has {held}")
        needed[member] = held
    for member in needed:
        yield member, archive.read(member)


def _old_parts(archive: archives.Archive) -> Iterator[bytes]:
    """The program, its weights, its constants and the inputs of its example."""
    if not re.fullmatch(rb"\d{1,4}(\.\d{1,4})*\s*", archive.text("version")):
        raise torch_schema.Odd("version", "what is no version")
    yield _json(torch_schema.program(torch_schema.parsed(archive.text(_OLD_MODEL), _OLD_MODEL)))
    for name in _OLD_STATES:
        yield _tensors_anew(archive, name)
    yield _walked(archive, "serialized_example_inputs.pt")


def _tensors_anew(archive: archives.Archive, name: str) -> bytes:
    """A pickled dictionary of tensors, read by our own reader and written by torch."""
    data = archive.read(name)
    tensors: dict[str, torch.Tensor] = {}
    held: dict[object, bytearray] = {}
    total = 0
    if data:
        with torch_pickles.opened(archive.path, data) as checkpoint:
            for key, value in checkpoint.value.items():
                if not isinstance(value, torch_pickles.Declared) or not re.fullmatch(r"[\w.@]*", str(key)):
                    raise torch_schema.Odd(name, "a value that is no tensor", code=True)
                tensor = checkpoint.tensor(value, held)
                total += tensor.nbytes  # torch writes what several tensors share with each of them
                if total > limits.current().weights:
                    raise torch_schema.Odd(name, f"tensors that take too much ({limits.how_to_raise('weights')})")
                plain = tensor.is_floating_point() or tensor.is_complex()
                tensors[str(key)] = nn.Parameter(tensor, requires_grad=plain) if value.is_parameter else tensor
    made = io.BytesIO()
    torch.save(tensors, made)
    return made.getvalue()


def _walked(archive: archives.Archive, name: str) -> bytes:
    """Nothing, for a pickle that is not needed; but one that asks for more than tensors makes the file a suspect."""
    data = archive.read(name) if name in archive.members else b""
    if data:
        with torch_pickles.opened(archive.path, data):
            pass
    return b""


def _check_order(archive: archives.Archive) -> None:
    if "byteorder" in archive.members and archive.text("byteorder") != b"little":
        raise torch_schema.Odd("byteorder", "another byte order than little")


def _number(archive: archives.Archive, name: str) -> bytes:
    text = archive.text(name)
    if not re.fullmatch(rb"\d{1,4}", text):
        raise torch_schema.Odd(name, "what is no number")
    return text


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _input_shape(program: Exported) -> tuple[int | None, ...] | None:
    """`(n, c, h, w)` of the first input, None where it was exported as dynamic."""
    first = program.graph_signature.user_inputs[0]
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == first and "val" in node.meta:
            return tuple(side if isinstance(side, int) else None for side in node.meta["val"].shape)
    return None


_SHAPING = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.expand.default")


def _free_the_batch(program: Exported) -> None:
    """Let constant shapes that begin with the example's batch take any batch: convscope passes several at a time."""
    shape = _input_shape(program)
    if not shape or shape[0] is None:
        return
    for node in program.graph.nodes:
        if str(node.target) not in _SHAPING:
            continue
        source, sizes = node.args
        given, made = source.meta["val"].shape, node.meta["val"].shape
        if sizes and given and given[0] == shape[0] == made[0] and sizes[0] in (shape[0], -1):
            rest = [int(side) for side in made[1:]]
            keeps = "expand" in str(node.target)
            node.args = (source, [-1, *(list(sizes[1:]) if keeps else rest)])
    program.graph_module.recompile()


def _describe(module: nn.Module, program: Exported) -> None:
    """Mark each module with its original class, which the nodes of the graph record."""
    classes: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            classes[path] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    for path, child in module.named_modules():
        home, _, name = classes.get(path.partition("@")[0], "").rpartition(".")
        own = home.startswith("torch.nn.modules") and not list(child.children())
        child.described = Described(name or "module", None if own else "model")
