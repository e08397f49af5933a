"""The description inside an exported program (`.pt2`): held to PyTorch's own schema, and every text in it to a checker.

torch evaluates sizes as Python, looks functions up by dotted names, imports what the pytree texts name, and writes
names into the Python that it generates. `cleaned` follows the dataclasses of `torch._export.serde.schema`: a key that
they do not have is refused, and so is a text field that has no checker here. What a graph does not need to run (stack
traces, guards, notes) is left out. Only what comes out of here reaches torch.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import json
import keyword
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch._export.serde import schema

from convscope import limits
from convscope.errors import ModelError, option
from convscope.networks.formats.torch import operators as torch_operators
from convscope.schema import Json


class Odd(Exception):
    """Something that no export writes.

    Attributes:
        where: the keys that lead to it.
        found: what it is.
        code: true where torch would run it, or could be made to.
    """

    def __init__(self, where: str, found: str, code: bool = False) -> None:
        super().__init__(found)
        self.where, self.found, self.code = where, found, code


Hint = Any  # a type as the schema of PyTorch writes it


def parsed(data: bytes, name: str) -> Json:
    """JSON in a member of the archive.

    Raises:
        Odd: it is none, a key is there twice, or it is nested too deeply.
    """
    most = 50 * limits.current().nodes
    if sum(map(data.count, (b"[", b"{", b","))) > most:  # each value but the first has one of these before it
        raise Odd(name, f"more than {most} values ({limits.how_to_raise('nodes')})")
    try:
        found = json.loads(data.decode(), object_pairs_hook=functools.partial(_once, name))
    except (ValueError, RecursionError) as error:
        raise Odd(name, f"what is no JSON ({error})"[:120]) from error
    _check_size(found, name)
    return found


def _once(name: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Odd(name, "a key that is there twice")
    return found


def _check_size(value: object, name: str) -> None:
    """Level by level: how deep it is, and how many values it has."""
    level, count = [value], 0
    for _ in range(limits.current().depth):
        count += len(level)
        if count > 50 * limits.current().nodes:
            raise Odd(name, f"{count} values ({limits.how_to_raise('nodes')})")
        level = [inner for part in level for inner in _inner(part)]
        if not level:
            return
    raise Odd(name, f"values nested too deeply ({limits.how_to_raise('depth')})")


def _inner(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        return iter(value.values())
    return iter(value if isinstance(value, list) else ())


# -- the walk along the schema ---------------------------------------------------------------------------


def cleaned(kind: object, data: object, where: str = "", field: tuple[str, str] = ("", "")) -> Json:
    """Data as a class of the schema, with nothing in it that is not known to be harmless.

    Args:
        kind: a dataclass, union or type of the schema.
        data: what JSON made of it.
        where: the keys that lead to it, for the message.
        field: the class and the name of the field that it stands in: they choose the checker of a text.

    Raises:
        Odd: something in it is not on the list.
    """
    kind = _resolved(kind)
    if field in _LEFT_OUT:
        return _LEFT_OUT[field]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if data is None else cleaned(inner, data, where, field)
    if origin is list:
        return [cleaned(arguments[0], item, f"{where}[{n}]", field) for n, item in enumerate(_a(list, data, where))]
    if origin is dict:
        return {
            _key(key, field, where): cleaned(arguments[1], item, f"{where}.{ascii(key)[1:-1]}", field)
            for key, item in _a(dict, data, where).items()
        }
    if isinstance(kind, type) and issubclass(kind, schema._Union):
        return _of_union(kind, data, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _of_class(kind, data, where)
    return _scalar(kind, data, where, field)


def _resolved(kind: Hint) -> Hint:
    if isinstance(kind, typing.ForwardRef):
        kind = kind.__forward_arg__
    if isinstance(kind, str):
        kind = getattr(schema, kind)
    return kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind


@functools.cache
def _fields(kind: type) -> Mapping[str, Hint]:
    hints = typing.get_type_hints(kind, globalns=vars(schema))
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _a(kind: type, data: object, where: str) -> Json:
    if not isinstance(data, kind):
        raise Odd(where, f"a {type(data).__name__} where a {kind.__name__} has to be")
    return data


def _of_class(kind: type, data: Json, where: str) -> dict[str, Json]:
    fields = _fields(kind)
    unknown = next((key for key in _a(dict, data, where) if key not in fields), None)
    if unknown is not None:
        raise Odd(where, f"the key {ascii(unknown)[:60]}, which PyTorch's {kind.__name__} does not have")
    found = {
        name: cleaned(fields[name], value, f"{where}.{name}" if where else name, (kind.__name__, name))
        for name, value in data.items()
    }
    check = _TOGETHER.get(kind.__name__)
    if check is not None:
        check(found, where)
    return found


def _of_union(kind: type, data: Json, where: str) -> dict[str, Json]:
    if len(_a(dict, data, where)) != 1:
        raise Odd(where, f"{len(data)} kinds of value at once")
    ((tag, value),) = data.items()
    if tag not in _fields(kind):
        raise Odd(where, f"the key {ascii(tag)[:60]}, which PyTorch's {kind.__name__} does not have")
    if (kind.__name__, tag) in _REFUSED:
        raise Odd(where, _REFUSED[kind.__name__, tag], code=True)
    return {tag: cleaned(_fields(kind)[tag], value, f"{where}.{tag}", (kind.__name__, tag))}


def _scalar(kind: object, data: object, where: str, field: tuple[str, str]) -> Json:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if type(data) is not int or data not in {member.value for member in kind}:
            raise Odd(where, f"{ascii(data)[:60]}, which is no {kind.__name__}")
        return data
    if kind is str:
        return _text(_a(str, data, where), where, field)
    if kind is float and (type(data) in (int, float) or data in ("Infinity", "-Infinity", "NaN")):
        return data
    if kind in (int, bool) and type(data) is kind and abs(data) < 2**63:
        return data
    if kind is int and type(data) is float and math.isinf(data):  # the end of a range
        return data
    raise Odd(where, f"{ascii(data)[:60]} where a {getattr(kind, '__name__', kind)} has to be")


def _text(text: str, where: str, field: tuple[str, str]) -> str:
    check = _TEXTS.get(field)
    if check is None:
        raise Odd(where, f"the text {ascii(text)[:80]}, of a kind that is not read here", code=True)
    if not check(text):
        raise Odd(where, f"{ascii(text)[:80]}", code=True)
    return text


def _key(text: str, field: tuple[str, str], where: str) -> str:
    check = _KEYS.get(field)
    if check is None or not check(text):
        raise Odd(where, f"the key {ascii(text)[:80]}", code=True)
    return text


# -- checkers of texts -----------------------------------------------------------------------------------


def _matching(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text, re.ASCII) is not None


def _is_name(text: str) -> bool:
    """A name of a value in the graph: torch writes it into Python."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


def _is_name_or_none(text: str) -> bool:
    return text == "" or _is_name(text)


# A path of modules, parameters or buffers: it becomes attributes, and Python that torch generates.
_is_path = _matching(r"(?!.*__class__|.*__dict__)[\w@]*(\.[\w@]+)*")
_is_option = _matching(r"[\w .,:;>/+()*\[\]-]{0,1000}")

_OPERATORS = frozenset(
    f"_operator.{name}"
    for name in (
        *(
            "getitem",
            "add",
            "iadd",
            "sub",
            "isub",
            "mul",
            "imul",
            "floordiv",
            "truediv",
            "mod",
            "neg",
            "pos",
            "eq",
            "ne",
        ),
        *("lt", "le", "gt", "ge", "and_", "or_", "not_", "pow"),
    )
)
_SYM = frozenset(f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt", "sum"))
_MATH = frozenset(f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt", "log2"))
# They run a graph of the file's own, with gradients or autocast switched, or one of two.
_HIGHER = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast", "cond"})


def _is_function(text: str) -> bool:
    """A function that only computes: torch finds it by the dotted name."""
    if text in _OPERATORS or text in _SYM or text in _MATH:
        return True
    higher = re.fullmatch(r"torch\.ops\.higher_order\.(\w+)", text, re.ASCII)
    if higher is not None:
        return higher[1] in _HIGHER
    parts = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)\.([a-zA-Z]\w*)", text, re.ASCII)
    return parts is not None and parts[1] != "prim" and torch_operators.computes(parts[1], parts[2])


_SIZES = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor"),
        *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality", "Unequality", "ceiling", "Piecewise"),
        *("StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "FloorDiv", "CleanDiv", "CeilDiv"),
        *("PythonMod", "ModularIndexing", "Where", "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "ToFloat", "Identity"),
        *("FloorToInt", "CeilToInt", "RoundToInt", "PowByNatural", "FloatPow", "ExprCondPair"),
    }
)
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})
_OPTIONS_OF_SYMBOLS = frozenset({"integer", "positive", "nonnegative", "negative", "real", "evaluate", "zero"})
_SIZE_SYNTAX = (
    *(ast.Expression, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.keyword),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.unaryop, ast.cmpop, ast.boolop),
    *(ast.expr_context, ast.Tuple),
)


def is_size(text: str) -> bool:
    """True for arithmetic of numbers and symbols: "Mul(Integer(2), Symbol('s0', integer=True))"."""
    if len(text) > 20_000 or not text.isascii():
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    powers = [node for node in nodes if _is_power(node)]
    texts = {id(argument) for node in nodes if isinstance(node, ast.Call) for argument in _texts_of(node)}
    return (
        all(isinstance(node, _SIZE_SYNTAX) and _is_plain_node(node, id(node) in texts) for node in nodes)
        and len(powers) <= 4
        and all(_has_small_exponent(node) for node in powers)
    )


def _texts_of(call: ast.Call) -> list[ast.expr]:
    """The arguments that are texts: of Symbol('s0') its name, of Float('0.5') its digits."""
    named = isinstance(call.func, ast.Name) and call.func.id in ("Symbol", "Float")
    return call.args[:1] if named else []


def _is_plain_node(node: ast.AST, may_be_text: bool) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SIZES
    if isinstance(node, ast.keyword):
        return _is_option_of_symbols(node)
    if isinstance(node, ast.Name):
        return node.id in _SIZES or re.fullmatch(r"[a-z]{1,4}\d{1,10}|int_oo|oo|true|false", node.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return may_be_text and re.fullmatch(_SYMBOL_OR_NUMBER, node.value) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) < 2**63
    return True


# sympy computes with as many digits as requested.
_SYMBOL_OR_NUMBER = r"[a-zA-Z_]\w{0,100}|-?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[+-]?\d{1,3})?"


def _is_option_of_symbols(node: ast.keyword) -> bool:
    value = node.value.value if isinstance(node.value, ast.Constant) else None
    if node.arg == "precision":
        return type(value) is int and 0 < value <= 64
    return node.arg in _OPTIONS_OF_SYMBOLS and type(value) is bool


def _is_power(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS


def _has_small_exponent(node: ast.AST) -> bool:
    """sympy computes a power of numbers in full, whatever its size."""
    exponent = node.right if isinstance(node, ast.BinOp) else (node.args[1] if len(node.args) == 2 else None)  # type: ignore[attr-defined]
    if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name):
        if exponent.func.id not in ("Integer", "Float", "Rational"):
            return False
        numbers: list[ast.expr] = list(exponent.args)
    else:
        numbers = [] if exponent is None else [exponent]
    return bool(numbers) and all(_is_small(number) for number in numbers)


def _is_small(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_small(node.operand)
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) <= 8


# -- pytree texts ----------------------------------------------------------------------------------------


def _is_spec(text: str) -> bool:
    try:
        version, node = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
    known = type(version) is int and version == schema.TREESPEC_VERSION and _is_node(node, limits.current().depth)
    return known and all(_is_name(key) for key in _names_of_arguments(node))


def _names_of_arguments(node: Json) -> list[Json]:
    """The keys of the second part of (positions, keywords): torch writes them into Python as names of arguments."""
    parts = node["children_spec"]
    if len(parts) != 2 or parts[1]["type"] != "builtins.dict":
        return []
    return list(map(str, json.loads(parts[1]["context"])))


def _is_node(node: object, depth: int) -> bool:
    """A leaf, or a tuple, list or dict of nodes. For other kinds torch imports the class that the text names."""
    if depth < 0 or not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        return False
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if not isinstance(children, list) or not all(_is_node(child, depth - 1) for child in children):
        return False
    if kind is None:
        return context is None and not children
    if kind in ("builtins.tuple", "builtins.list"):
        return context == "null"
    return kind == "builtins.dict" and _is_keys(context, len(children))


_is_key = _matching(r"[\w ./:@-]{0,200}")


def _is_keys(context: Json, count: int) -> bool:
    try:
        keys = json.loads(context)
    except (ValueError, TypeError, RecursionError):
        return False
    plain = isinstance(keys, list) and all(type(key) is int or (type(key) is str and _is_key(key)) for key in keys)
    return plain and len(keys) == count == len(set(keys))


# -- the lists -------------------------------------------------------------------------------------------

_REFUSED: Mapping[tuple[str, str], str] = {
    ("Argument", "as_custom_obj"): "an object of a class written in C++",
    ("Argument", "as_operator"): "a function as a value",
    ("InputSpec", "custom_obj"): "an object of a class written in C++",
    ("InputSpec", "token"): "an operator with effects",
    ("OutputSpec", "token"): "an operator with effects",
}

# Nothing of it is needed to run a graph: it is not passed on.
_LEFT_OUT: Mapping[tuple[str, str], Json] = {
    ("ExportedProgram", "guards_code"): [],
    ("ExportedProgram", "torch_version"): "",
    ("GraphModule", "metadata"): {},
}

_TEXTS: Mapping[tuple[str, str], Callable[[str], bool]] = {
    ("Device", "type"): _matching(r"cpu|cuda|mps|xpu"),
    ("SymExpr", "expr_str"): is_size,
    ("SymIntArgument", "as_name"): _is_name,
    ("SymFloatArgument", "as_name"): _is_name,
    ("SymBoolArgument", "as_name"): _is_name,
    ("TensorArgument", "name"): _is_name_or_none,
    ("GraphArgument", "name"): _is_name,
    ("Argument", "as_string"): _is_option,
    ("Argument", "as_strings"): _is_option,
    ("NamedArgument", "name"): lambda text: text == "" or _matching(r"[a-zA-Z]\w*")(text),
    ("Node", "target"): _is_function,
    ("Node", "name"): _is_name,
    ("Node", "metadata"): _matching(r"[^\"\\\n\r]*"),
    ("InputToConstantInputSpec", "name"): _is_name,
    ("ConstantValue", "as_string"): _is_option,
    ("InputToParameterSpec", "parameter_name"): _is_path,
    ("InputToBufferSpec", "buffer_name"): _is_path,
    ("InputToTensorConstantSpec", "tensor_constant_name"): _is_path,
    ("BufferMutationSpec", "buffer_name"): _is_path,
    ("ParameterMutationSpec", "parameter_name"): _is_path,
    ("GradientToParameterSpec", "parameter_name"): _is_path,
    ("GradientToUserInputSpec", "user_input_name"): _is_name,
    ("UserInputMutationSpec", "user_input_name"): _is_name,
    ("ModuleCallSignature", "in_spec"): _is_spec,
    ("ModuleCallSignature", "out_spec"): _is_spec,
    ("ModuleCallSignature", "forward_arg_names"): _is_name,
    ("ModuleCallEntry", "fqn"): _is_path,
    ("ExportedProgram", "verifiers"): _matching(r"(ATEN|TRAINING|EDGE)?"),
    ("PayloadMeta", "path_name"): _matching(r"(weight|tensor)_\d{1,9}"),
}

_KEYS: Mapping[tuple[str, str], Callable[[str], bool]] = {
    ("Node", "metadata"): _matching(r"nn_module_stack"),
    ("Graph", "tensor_values"): _is_name,
    ("Graph", "sym_int_values"): _is_name,
    ("Graph", "sym_bool_values"): _is_name,
    ("Graph", "sym_float_values"): _is_name,
    ("Argument", "as_string_to_argument"): _is_name,
    ("ExportedProgram", "opset_version"): _matching(r"\w{1,60}"),
    ("ExportedProgram", "range_constraints"): _matching(r"[a-z]{1,6}\d{1,5}"),
    ("PayloadConfig", "config"): _is_path,
}


def _no_pickle(payload: dict[str, object], where: str) -> None:
    if payload.get("use_pickle") or payload.get("tensor_meta") is None:
        raise Odd(where, "a pickled object", code=True)


def _small_power(node: dict[str, Json], where: str) -> None:
    """Python computes a power of whole numbers in full, and can't be interrupted at it."""
    if node.get("target") != "_operator.pow":
        return
    exponent = node["inputs"][1]["arg"].get("as_int") if len(node.get("inputs", ())) == 2 else None
    if exponent is None or not 0 <= exponent <= 8:
        raise Odd(where, "a power whose exponent is no small number", code=True)


_TOGETHER: Mapping[str, Callable[[dict[str, Json], str], None]] = {"PayloadMeta": _no_pickle, "Node": _small_power}

# What an export notes of each operation; the first alone is of use here.
_NOTES = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "custom", "from_node")


def program(data: object) -> dict[str, Json]:
    """The description of an exported program, cleaned.

    Raises:
        Odd: something in it is not on the list.
    """
    _without_notes(data)
    found = cleaned(schema.ExportedProgram, data)
    found["torch_version"] = found.get("torch_version", "")
    return found


def _without_notes(data: Json) -> None:
    """Leave out of each operation what torch would keep and nobody reads: traces, functions by name, notes."""
    waiting = [data]
    while waiting:
        part = waiting.pop()
        waiting.extend(inner for inner in _inner(part) if isinstance(inner, dict | list))
        notes = part.get("metadata") if isinstance(part, dict) and "target" in part else None
        if isinstance(notes, dict):
            unknown = next((key for key in notes if key not in _NOTES), None)
            if unknown is not None:
                raise Odd("metadata", f"the key {ascii(unknown)[:60]}, which no export writes")
            part["metadata"] = {key: text for key, text in notes.items() if key == "nn_module_stack"}


def nbytes(meta: Mapping[str, Json]) -> tuple[int, int, int]:
    """Of a tensor's description: how many bytes it spans, how many its values take, and those of one value.

    Raises:
        Odd: its sizes are no plain numbers.
    """
    sizes, strides = ([_plain(one) for one in meta[key]] for key in ("sizes", "strides"))
    offset, item = _plain(meta["storage_offset"]), _itemsize(meta["dtype"])
    if len(sizes) != len(strides):
        raise Odd("tensor_meta", "a tensor with sizes without strides")
    count = math.prod(sizes)
    if not count:
        return 0, 0, item
    span = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return span * item, count * item, item


def _plain(told: Mapping[str, Json]) -> int:
    number = told.get("as_int")
    if number is None or number < 0:
        raise Odd("tensor_meta", "a weight whose sizes are no plain numbers")
    return number


def _itemsize(kind: int) -> int:
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    if kind not in _SERIALIZE_TO_TORCH_DTYPE:
        raise Odd("tensor_meta", f"values of the type {kind}")
    return _SERIALIZE_TO_TORCH_DTYPE[kind].itemsize


def refusal(path: object, odd: Odd) -> ModelError:
    """The message on a file with unknown content."""
    place = f"{odd.where}: " if odd.where else ""
    if odd.code:
        return ModelError(
            f"{path} has text that PyTorch would run, import or write into code ({place}{odd.found}), and that is not "
            f"on the list of harmless text. If you trust the file, give {option('trust=True')}.",
            code="needs-trust",
            path=str(path),
            found=odd.found,
        )
    return ModelError(
        f"{path} has content that torch.export of this PyTorch does not write ({place}{odd.found}). It is damaged, or "
        f"another version wrote it: export it again, or, if you trust the file, give {option('trust=True')}.",
        code="needs-trust",
        path=str(path),
        found=odd.found,
    )
