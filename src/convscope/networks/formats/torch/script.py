"""TorchScript files: the archive is read and checked here before PyTorch reads it.

What runs afterwards is in `interpreter.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from convscope import isolation, limits
from convscope.errors import ModelError, one_line, option
from convscope.networks.formats import archives, pickles
from convscope.networks.formats.damage import damaged
from convscope.networks.formats.files import ModelFile
from convscope.networks.formats.torch import code as torch_code
from convscope.networks.formats.torch import pickles as torch_pickles
from convscope.networks.formats.torch.interpreter import Code, Scripted
from convscope.networks.network import Source
from convscope.networks.torch.modules import OpenedModule


def read(file: ModelFile, trust: bool = False) -> OpenedModule:
    """A TorchScript archive as a module of mirrors.

    Args:
        file: the archive.
        trust: hand it to PyTorch as it is; else its code and its pickles are read first, and what is not known to be
            harmless is refused.

    Raises:
        ModelError: it is damaged, may do more than compute and is not trusted, or calls what can't be run from Python.
    """
    path = file.path
    unit = torch._C.CompilationUnit()  # as torch.jit.load does, which does not return the functions of the file
    source: object = str(path) if trust else _compilable(path)
    load = torch._C.import_ir_module if trust else torch._C.import_ir_module_from_buffer
    scripted = _loaded(unit, load, source, path)
    code = Code(unit, trust)
    code.steps.held = path.stat().st_size
    origin = file.source("TorchScript archive", f"the class {scripted.original_name}")
    return OpenedModule(Scripted(scripted, code, {}), origin)


def read_memory(scripted: torch.jit.ScriptModule, source: Source, trust: bool = False) -> OpenedModule:
    """A scripted or traced module in memory: the code of the file that it would be saved to, with its own tensors.

    The module itself stays as it is. Where it is trained further, or its weights are replaced in place, passes follow;
    what is no parameter or buffer (numbers, packed int8 weights, constants of a frozen module) is that of the opening.

    Raises:
        ModelError: as of a file, and where it can't be saved.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt"
        try:
            torch.jit.save(scripted, str(path))
        except Exception as error:  # torch raises what its writer raises
            reason = one_line(error)[:200]
            raise ModelError(
                f"{source.name} can't be opened, because PyTorch can't save it as TorchScript ({reason}). "
                "Give the module that it was scripted from.",
                code="not-a-model",
                name=source.name,
                reason=reason,
            ) from error
        try:
            opened = read(ModelFile(path, "torchscript"), trust)
        except ModelError as error:
            data = {**error.data, "path": source.name}
            raise ModelError(error.message.replace(str(path), source.name), code=error.code, **data) from error
    device = next((tensor.device for tensor in scripted.parameters()), torch.device("cpu"))
    mirror = opened.module.to(device)
    mirror.share(scripted)
    notes = (*source.notes, *opened.source.notes)
    return replace(opened, module=mirror, source=replace(source, notes=notes))


def _loaded(unit: object, load: Callable[..., object], source: object, path: Path) -> torch.jit.ScriptModule:
    try:
        loaded = load(unit, source, torch.device("cpu"), {}, False)
        return torch.jit._recursive.wrap_cpp_module(loaded).eval()
    except Exception as error:  # torch raises what its reader raises
        raise damaged(path, error, " as TorchScript") from error


_LARGE_TYPE = 2**16  # parts of a type that torch's compiler compares in no time
_ROOM, _TIMES = 8 * 2**30, 6  # what PyTorch adds to a process, and how often an archive is held while it is read


def _compilable(path: Path) -> bytes:
    """The archive, checked. Where its types may be large the reader tries to compile it: that can't be stopped here."""
    checked = _checked(path)
    with archives.opened(path, checked) as archive:
        size = math.prod(torch_code.largest_type(archive.text(name)) for name in archive.members if _is_code(name))
    if size > _LARGE_TYPE:
        room = _ROOM + _TIMES * len(checked)
        try:
            isolation.call("convscope.networks.formats.torch.script:try_to_compile", path, memory=room)
        except isolation.ReaderError as error:
            raise ModelError(
                f"{path} can't be compiled as TorchScript: {error}.", code=error.code, path=str(path), reason=str(error)
            ) from error
    return checked


def try_to_compile(path: str) -> None:
    """Compile the code of an archive and let go of it: run in the reader, where this may take too much.

    Raises:
        ModelError: it is damaged, or may do more than compute.
    """
    _loaded(torch._C.CompilationUnit(), torch._C.import_ir_module_from_buffer, _checked(Path(path)), Path(path))


def _checked(path: Path) -> bytes:
    """The archive, written anew of what was found to be harmless: torch's reader sees what was checked, and no more.

    What debuggers and phones read is left out.
    """
    with archives.opened(path) as archive:
        code = {name: archive.text(name) for name in archive.members if _is_code(name)}
        _check_amount(path, sum(map(len, code.values())))
        for name, text in code.items():
            _refuse(path, torch_code.check(name, text))
        data = {name: archive.text(name) for name in _PICKLES if name in archive.members}
        for name, pickle in data.items():
            _check_pickle(archive, name, pickle)
        place = "version" if "version" in archive.members else ".data/version"
        version = archive.text(place)
        if not re.fullmatch(rb"\d{1,4}\s*", version):
            raise ModelError(
                f"{path} can't be read as TorchScript (its version is no number). Copy it again.",
                code="file-damaged",
                path=str(path),
            )
        if "byteorder" in archive.members and archive.text("byteorder") != b"little":
            raise ModelError(
                f"{path} was written on a machine of another byte order, which is not read here.",
                code="byte-order",
                path=str(path),
            )
        tensors = [name for name in archive.members if re.fullmatch(r"(data|constants)/\d+", name)]
        small: dict[str, bytes | bytearray] = {**data, **code, place: version, "byteorder": b"little"}
        members = itertools.chain(small.items(), ((name, archive.read(name)) for name in tensors))
        return archives.packed(members).getvalue()


_PICKLES = ("data.pkl", "constants.pkl")


def _is_code(name: str) -> bool:
    return name.startswith("code/") and name.endswith(".py")


def _check_amount(path: Path, size: int) -> None:
    """Python's parser takes up to a thousand times the memory of the text."""
    if size > _LINE * limits.current().nodes:
        raise ModelError(
            f"{path} holds {size} bytes of code ({limits.how_to_raise('nodes')}).",
            code="input-too-large",
            limit="nodes",
        )


_LINE = 20  # bytes of code for an operation, at least


def _refuse(path: Path, found: object) -> None:
    if found is not None:
        quantized = "It is an int8 (quantized) model, which sets its own state. " if "quantized" in str(found) else ""
        raise ModelError(
            f"{path} is a TorchScript program, and may do more than compute: it holds {found}. {quantized}"
            f"If you trust the file, give {option('trust=True')} to open it.",
            code="needs-trust",
            path=str(path),
            found=str(found),
        )


def _check_pickle(archive: archives.Archive, name: str, data: bytes) -> None:
    """Walk one of the archive's pickles as torch's loader will, without making anything.

    Raises:
        ModelError: it is damaged, or names something that is not known to be harmless.
    """
    folder = name.removesuffix(".pkl")
    instances: list[pickles.Instance] = []

    def table(asked: str) -> pickles.Made | None:
        if asked.startswith("__torch__.torch.classes."):
            harmless = torch_code.is_harmless_class(asked)
        else:
            harmless = re.fullmatch(r"__torch__(\.\w+)+", asked) is not None
        if harmless:
            return pickles.Made(lambda *given: _instance(instances, asked, given))
        return pickles.Made(_LISTS[asked]) if asked in _LISTS else _of_tensors(asked)

    read = 0

    def storage(told: object) -> torch_pickles.Storage:
        """PyTorch reads a storage again at each place that names it."""
        nonlocal read
        found = torch_pickles.in_archive(archive, folder, torch_pickles.stored(told))
        read += found.nbytes
        if read > limits.current().weights:
            raise ModelError(
                f"{archive.path} holds tensors that take more than is read ({limits.how_to_raise('weights')}).",
                code="input-too-large",
                limit="weights",
            )
        return found

    try:
        modules = pickles.count(pickles.load(data, table, storage), pickles.Instance)
        if modules > limits.current().nodes:  # those that are shared are visited at each place
            raise ModelError(
                f"{archive.path} has too many modules ({limits.how_to_raise('nodes')}).",
                code="input-too-large",
                limit="nodes",
            )
        if any(not instance.finished for instance in instances):
            raise ValueError("an object has no state")
    except pickles.ForeignName as error:
        _refuse(archive.path, f"the name {error.name} ({name})")
    except pickles.DAMAGE as error:
        raise ModelError(
            f"{archive.path} can't be read as TorchScript ({name}: {one_line(error)[:200]}). Copy it again.",
            code="file-damaged",
            path=str(archive.path),
            name=name,
            reason=one_line(error)[:200],
        ) from error


def _instance(instances: list[pickles.Instance], name: str, given: tuple) -> pickles.Instance:
    if given:
        raise ValueError("an object is made of arguments")
    instances.append(pickles.Instance(name))
    return instances[-1]


def _of_tensors(name: str) -> pickles.Made | None:
    known = name.startswith(("torch._utils._rebuild_", "collections.OrderedDict", "torch.device"))
    return torch_pickles.table(name) if known or name.endswith("Storage") else None


def _typed(value: object, name: object) -> object:
    """A list or dictionary with its type as text, which torch parses."""
    if not isinstance(name, str) or len(name) > 4096 or name.count("[") > 40:
        raise ValueError("a type that no file has")
    if not re.fullmatch(r"[\w\[\]., ]*", name, re.ASCII):
        raise ValueError("a type that is no name")
    return value


_LISTS: Mapping[str, Callable[..., object]] = {
    "torch.jit._pickle.restore_type_tag": _typed,
    **{f"torch.jit._pickle.build_{kind}list": lambda value: value for kind in ("int", "tensor", "double", "bool")},
}
