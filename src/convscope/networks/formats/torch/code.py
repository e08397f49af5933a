"""The code inside TorchScript archives, read before torch compiles it.

Such a file is a program. It is let through only where every part of it is known to compute and do nothing else: the
lexical ground first, so that Python's parser and TorchScript's can't see different programs in one text; then every
statement, every name and every operator, in each function, used or not.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from convscope import limits
from convscope.networks.formats.torch import operators as torch_operators

# What TorchScript's printer writes: no comments, no line continued with a backslash, texts on one line whose escapes
# mean the same in both languages.
_TEXT = r"(?:\"(?:[^\"\\\n\r]|\\[\\'\"abfnrtv]|\\[0-7]{3})*\"|'(?:[^'\\\n\r]|\\[\\'\"abfnrtv]|\\[0-7]{3})*')"
_LEXICAL = re.compile(rf"(?:[\w .,:()\[\]{{}}=+\-*/%<>!&|^~@\n]|{_TEXT}(?![\"'\w]))*+", re.ASCII)

_SYNTAX = (
    *(ast.Module, ast.Import, ast.alias, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign),
    *(
        ast.AnnAssign,
        ast.AugAssign,
        ast.Return,
        ast.If,
        ast.While,
        ast.For,
        ast.With,
        ast.withitem,
        ast.Expr,
        ast.Raise,
    ),
    *(ast.Assert, ast.Pass, ast.Break, ast.Continue, ast.Delete, ast.Call, ast.keyword, ast.Attribute, ast.Name),
    *(ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.BoolOp),
    *(ast.Compare, ast.IfExp, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)
_BUILTINS = frozenset(
    {
        *(
            "annotate",
            "unchecked_cast",
            "uninitialized",
            "int",
            "float",
            "bool",
            "str",
            "complex",
            "getattr",
            "hasattr",
        ),
        *("isinstance", "len", "min", "max", "abs", "range", "zip", "enumerate", "list", "dict", "tuple", "print"),
        *("ord", "chr", "hex", "oct", "bin", "hash", "sorted", "sum", "any", "all", "divmod", "round", "pow", "inf"),
        *("nan", "infj", "nanj", "Exception", "AssertionError", "RuntimeError", "ValueError", "NotImplementedError"),
        *("IndexError", "KeyError", "TypeError", "super", "object", "__annotations__"),
    }
)
_TYPES = frozenset(
    {
        *("Tensor", "List", "Dict", "Tuple", "Optional", "Union", "Final", "NoneType", "number", "Device", "Any"),
        *("Module", "Interface", "NamedTuple", "Enum", "Generator", "Layout", "MemoryFormat", "AnyClassType", "None"),
        *("AnyListType", "AnyTupleType", "AnyEnumType", "Scalar", "QScheme", "Dimname", "Function"),
    }
)
_HOMES = frozenset({"torch", "ops", "CONSTANTS", "__torch__"})
_STARTERS = frozenset({"fork", "awaitable", "rpc_async", "rpc_sync", "rpc_remote"})  # of other threads and processes
_RUNS_AT_LOAD = frozenset({"__setstate__", "__getstate__"})
# Syntax calls them; they are code of the file's own, which is checked as all of it is.
_METHODS = frozenset(
    {
        *("__init__", "__enter__", "__exit__", "__new__", "__len__", "__contains__", "__getitem__", "__setitem__"),
        *("__iter__", "__call__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__"),
        *(
            "__mul__",
            "__truediv__",
            "__floordiv__",
            "__mod__",
            "__pow__",
            "__neg__",
            "__pos__",
            "__matmul__",
            "__and__",
        ),
        *("__or__", "__xor__", "__invert__", "__abs__", "__bool__", "__int__", "__float__", "__str__", "__delitem__"),
        *("__is__", "__isnot__", "__not__", "__parameters__", "__buffers__", "__annotations__", "__constants__"),
        *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__hash__", "__dir__", "__copy__", "__deepcopy__"),
    }
)
_PACKED = re.compile(r"__torch__\.torch\.classes\.quantized\.(Conv2d|Conv3d|Linear)PackedParamsBase")


@dataclass(frozen=True)
class Found:
    """The reason why a file is refused: the member, the line, and the finding."""

    member: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.what} ({self.member}, line {self.line})"


def is_harmless_class(name: str) -> bool:
    """True for the classes written in C++ whose objects a file may hold: packed quantized weights."""
    return _PACKED.fullmatch(name) is not None


def check(member: str, source: bytes) -> Found | None:
    """The first thing in a member's code that is not known to be harmless.

    Args:
        member: its name, for the message.
        source: its text.
    """
    text = source.decode("latin-1")
    read = _LEXICAL.match(text)
    assert read is not None
    if read.end() < len(text):
        line = text.count("\n", 0, read.end())
        odd = text.splitlines()[line][:60] if line < len(text.splitlines()) else ""
        return Found(member, line + 1, f"text that TorchScript does not write, {odd!r}")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Found(member, getattr(error, "lineno", 0) or 0, "code that can't be parsed")
    if _depth(tree) > 2 * limits.current().depth:
        return Found(member, 0, "code that is nested too deeply")
    return next((Found(member, line, what) for line, what in _odd(tree)), None)


def largest_type(source: bytes) -> int:
    """How many parts a type in a member's code has at most: each tuple may hold the one before it several times."""
    tree = ast.parse(source.decode("latin-1"))
    annotations = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    tuples = (node for node in ast.walk(tree) if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load))
    return math.prod(max(1, len(node.elts)) for node in tuples if id(node) not in annotations)


def _depth(tree: ast.AST) -> int:
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [inner for node in level for inner in ast.iter_child_nodes(node)]
    return depth


def _odd(tree: ast.Module) -> Iterator[tuple[int, str]]:
    inside = _inner_parts_of_chains(tree)
    for scope, known in _scopes(tree):
        for node in scope:
            what = None if id(node) in inside else _what(node, known)
            if what is not None:
                yield getattr(node, "lineno", 0), what


def _scopes(tree: ast.Module) -> Iterator[tuple[list[ast.AST], frozenset[str]]]:
    """The nodes of each function, with the names that it binds; then those outside of functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside: set[int] = set()
    for function in functions:
        nodes = list(ast.walk(function))
        inside.update(map(id, nodes))
        arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        yield nodes, frozenset(arguments | stored)
    outside = [node for node in ast.walk(tree) if id(node) not in inside]
    yield (
        outside,
        frozenset(node.id for node in outside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)),
    )


def _inner_parts_of_chains(tree: ast.AST) -> set[int]:
    """The nodes within `ops.aten.relu` that are judged with the whole of it."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inside and _chain(node) is not None:
            inner: ast.AST = node
            while isinstance(inner, ast.Attribute):
                inner = inner.value
                inside.add(id(inner))
    return inside


def _chain(node: ast.AST) -> list[str] | None:
    """["ops", "aten", "relu"] of `ops.aten.relu`: None where it begins with none of the homes of functions."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in _HOMES:
        return [node.id, *reversed(parts)]
    return None


def _what(node: ast.AST, known: frozenset[str]) -> str | None:
    if not isinstance(node, _SYNTAX):
        return f"the statement {type(node).__name__}"
    if isinstance(node, ast.FunctionDef):
        return _what_function(node)
    if isinstance(node, ast.ClassDef):
        return _what_class(node)
    if isinstance(node, ast.For) and not _is_range(node.iter):  # the compiler unrolls others, within each other
        return "a loop over something else than a range"
    if isinstance(node, ast.Import):
        return next((f"an import of {a.name}" for a in node.names if not a.name.startswith("__torch__")), None)
    if isinstance(node, ast.Attribute):
        chain = _chain(node)
        return _what_chain(chain) if chain is not None else _what_member(node.attr)
    if isinstance(node, ast.Name):
        return _what_name(node, known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        return _what_getattr(node)
    if isinstance(node, ast.arg) and (node.arg in _HOMES or node.arg in _STARTERS):
        return f"the name {node.arg}"
    return None


def _what_function(function: ast.FunctionDef) -> str | None:
    name, arguments = function.name, function.args
    if name in _RUNS_AT_LOAD:
        return f"the method {name} (methods that keep and set the state may run while the file is loaded)"
    if name.startswith("__") and name not in _METHODS and "mangle" not in name:
        return f"the method {name}"
    if function.decorator_list or arguments.vararg or arguments.kwarg:
        return f"the function {name}, which is declared in a way that TorchScript does not write"
    # The compiler runs the expressions of default arguments.
    odd = next((d for d in (*arguments.defaults, *arguments.kw_defaults) if d is not None and not _is_literal(d)), None)
    return None if odd is None else f"a default argument of {name} that is computed"


def _what_class(node: ast.ClassDef) -> str | None:
    if node.decorator_list or node.keywords:
        return "a decorated class"
    odd = not all(map(_is_plain_attribute, node.body))
    return f"an attribute of the class {node.name} that is computed" if odd else None


def _is_plain_attribute(part: ast.stmt) -> bool:
    """False for one whose value is computed: the compiler runs it."""
    if not isinstance(part, ast.Assign | ast.AnnAssign) or part.value is None or _is_literal(part.value):
        return True
    target = part.targets[0] if isinstance(part, ast.Assign) else part.target
    names_a_type = isinstance(target, ast.Subscript) and ast.unparse(target.value) == "__annotations__"
    return names_a_type and not any(isinstance(inner, ast.Call | ast.operator) for inner in ast.walk(part.value))


def _is_range(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _is_literal(node.operand)
    if isinstance(node, ast.List | ast.Tuple):
        return all(map(_is_literal, node.elts))
    if isinstance(node, ast.Call):  # annotate(List[int], [1, 2])
        return isinstance(node.func, ast.Name) and node.func.id == "annotate" and all(map(_is_literal, node.args[1:]))
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in ("inf", "nan"))


def _what_chain(chain: list[str]) -> str | None:
    home, *parts = chain
    if home == "CONSTANTS":
        return None if len(parts) == 1 and re.fullmatch(r"c\d+", parts[0]) else f"the constant {'.'.join(chain)}"
    if home == "__torch__":
        return _what_own(chain)
    if home == "torch" and parts[:1] == ["device"] and len(parts) == 1:
        return None
    space, names = ("aten", parts) if home == "torch" else (parts[0], parts[1:])
    if len(names) != 1:
        return f"the name {'.'.join(chain)}"
    return what_operator(space, names[0])


def what_operator(space: str, name: str) -> str | None:
    """The message on an operator that does more than compute, or None."""
    if torch_operators.computes(space, name):
        return None
    if torch_operators.reads_or_writes_files(space, name):
        return f"the operator {space}::{name}, which reads or writes files"
    return f"the operator {space}::{name}, which is not on the list of those that only compute"


def _what_own(chain: list[str]) -> str | None:
    """Classes and functions of the file's own, and C++ classes."""
    name = ".".join(chain)
    if chain[1:3] == ["torch", "classes"] and not is_harmless_class(name.removesuffix(".__new__")):
        return f"the class {name}"
    own = chain[1:-1] if chain[-1] in _METHODS else chain[1:]
    odd = next((part for part in own if part.startswith("__") and "mangle" not in part), None)
    return None if odd is None else f"the name {name}"


def _what_member(name: str) -> str | None:
    if name in _RUNS_AT_LOAD or (name.startswith("__") and name not in _METHODS and "mangle" not in name):
        return f"the attribute {name}"
    return (
        f"the operator {name}, which does more than compute" if name in torch_operators.names_that_do_more() else None
    )


def _what_name(node: ast.Name, known: frozenset[str]) -> str | None:
    if node.id in _STARTERS:
        return f"{node.id}, which starts other threads or processes"
    if node.id in _HOMES:
        return f"the bare name {node.id}"
    if node.id in known or node.id in _BUILTINS or node.id in _TYPES:
        return None
    return f"the name {node.id}, which the code does not define"


def _what_getattr(call: ast.Call) -> str | None:
    name = call.args[1] if len(call.args) > 1 else None
    if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
        return "getattr of a name that is computed"
    return _what_member(name.value)
