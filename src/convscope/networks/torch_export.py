"""Exported programs (`.pt2`): the module tree that they were exported from, built anew from their graph."""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.modules import Described, OpenedModule
from convscope.networks.torch_files import source_of


def read(path: Path, trust: bool = False) -> OpenedModule:
    """An exported program as a tree of modules.

    Args:
        path: a `.pt2` file.
        trust: let it unpickle what is no tensor, and run expressions and functions that a graph has no use for.

    Raises:
        ModelError: it is damaged, compiled for one machine, or holds what could run code and is not trusted.
    """
    names = _names(path)
    if any(name.endswith((".so", ".cubin")) for name in names):
        raise ModelError(
            f"{path} is compiled for one machine (AOTInductor), without a graph. Expected torch.export.save."
        )
    objects = [name for name in names if name.rpartition("/")[2].startswith(("custom_obj_", "opaque_obj_"))]
    if objects and not trust:
        raise ModelError(
            f"{path} holds {len(objects)} pickled object{'s' if len(objects) > 1 else ''}, and unpickling runs code. "
            "Expected tensors only. If you trust the file, give --trust (trust=True)."
        )
    if not trust:
        _refuse_code(path)
    with _tensors_only(not trust):
        try:
            program = torch.export.load(path)
        except Exception as error:  # torch raises what its reader raises
            raise ModelError(f"{path} can't be read as an exported program ({one_line(error)[:200]}).") from error
    shape = _input_shape(program)
    _free_the_batch(program)
    module = torch.export.unflatten(program)
    # Its own check insists on the sizes of the example.
    module.process_forward_inputs = lambda *arguments: list(arguments)  # type: ignore[method-assign]
    _describe(module, program)
    return OpenedModule(module, source_of(path), input_shape=(None, *shape[1:]) if shape else None)


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


# torch evaluates the sizes of a graph as Python, looks its functions up by dotted names, and writes names of weights,
# modules and arguments into the Python that it generates. Each is held to what an export writes.
_SIZES = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality", "Unequality", "ceiling", "Piecewise"),
        *("StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "FloorDiv", "CleanDiv", "CeilDiv"),
        *("PythonMod", "ModularIndexing", "Where", "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "ToFloat", "Identity"),
        *("FloorToInt", "CeilToInt", "RoundToInt", "PowByNatural", "FloatPow", "LShift", "RShift"),
    }
)
_SIZE_SYNTAX = (
    *(ast.Expression, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.keyword),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context, ast.Tuple),
)
_FUNCTIONS = (
    r"torch\.ops\.(aten|prims|quantized|torchvision)\.(?!(from_file|save)\b)\w+\.\w+|torch\.ops\.higher_order\.\w+"
    r"|_operator\.(getitem|add|i?sub|mul|floordiv|truediv|mod|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|pow)"
    r"|math\.\w+|torch\.sym_\w+|"
)


def _refuse_code(path: Path) -> None:
    """Make sure that nothing in the graph's description would be run as Python but arithmetic of sizes."""
    with zipfile.ZipFile(path) as archive:
        found = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    try:
        texts = [(key, text) for data in found for key, text in _texts(json.loads(data))]
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read as an exported program ({one_line(error)[:200]}).") from error
    odd = next((text for key, text in texts if not _is_plain(key, text)), None)
    if odd is not None:
        raise ModelError(
            f"{path} holds text that PyTorch would run as code ({odd[:80]!r}), and no export writes such. If you trust "
            "the file, give --trust (trust=True)."
        )


def _texts(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested JSON with the key that it stands under."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, dict):
        for inner, value in data.items():
            yield from _texts(value, inner)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value, key)


def _is_plain(key: str, text: str) -> bool:
    if key == "expr_str":
        return _is_size(text)
    if key in ("target", "as_operator"):
        return re.fullmatch(_FUNCTIONS, text) is not None
    if key == "name":
        return re.fullmatch(r"\w*", text) is not None
    if key in ("nn_module_stack", "fqn") or key.endswith("_name"):
        return re.search(r"[\"\\\n\r]", text) is None
    return True


def _is_size(text: str) -> bool:
    """True for arithmetic of numbers and symbols: "Mul(Integer(2), Symbol('s0', integer=True))"."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names_of_symbols = {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and _makes_symbol(node)}
    return all(isinstance(node, _SIZE_SYNTAX) for node in nodes) and all(
        _is_plain_node(node, id(node) in names_of_symbols) for node in nodes
    )


def _makes_symbol(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "Symbol" and bool(call.args)


def _is_plain_node(node: ast.AST, names_symbol: bool) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SIZES
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Constant):
        text = isinstance(node.value, str | bytes)
        return not text or (names_symbol and re.fullmatch(r"\w+", str(node.value)) is not None)
    return True


@contextmanager
def _tensors_only(wanted: bool) -> Iterator[None]:
    """torch.export.load falls back on a full unpickling; this setting of torch's own forbids it."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    try:
        if wanted:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        yield
    finally:
        if before is None:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _input_shape(program: Any) -> tuple[int | None, ...] | None:
    """`(n, c, h, w)` of the first input, None where it was exported as dynamic."""
    first = program.graph_signature.user_inputs[0]
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == first and "val" in node.meta:
            return tuple(side if isinstance(side, int) else None for side in node.meta["val"].shape)
    return None


_SHAPING = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.expand.default")


def _free_the_batch(program: Any) -> None:
    """Let constant shapes that begin with the example's batch take any batch: convscope looks at several at a time."""
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


def _describe(module: nn.Module, program: Any) -> None:
    """Say of each module which class it was, as the nodes of the graph remember it."""
    classes: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            classes[path] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    for path, child in module.named_modules():
        home, _, name = classes.get(path.partition("@")[0], "").rpartition(".")
        own = home.startswith("torch.nn.modules") and not list(child.children())
        child.described = Described(name or "module", None if own else "model")
