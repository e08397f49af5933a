"""Figures about the structure of the source: `python -m benchmarks.structure` prints them, with the places behind each.

It counts in `src/convscope`:

- reads of provenance: expressions that take something out of an object's `provenance`, or of a dictionary of that name;
- comparisons of a head with text: `head.kind == "..."`, `.kind.startswith(...)` of a head and the like;
- functions with more than 6 parameters (`self` and `cls` aside), and their names where they have more than 8;
- the median and the 90th percentile of the lengths of functions in lines, docstrings and decorators aside;
- files of more than 600 lines;
- annotations that hold `Any`.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "convscope"
MOST_PARAMETERS, MOST_LINES = 6, 600
WRITERS = {"provenance"}  # names that hold provenance

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Place:
    """A finding at a line of a file; `text` describes it."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.text}"


def trees(source: Path = SOURCE) -> Iterator[tuple[str, ast.Module]]:
    """Each file of the package with its syntax tree."""
    for path in sorted(source.rglob("*.py")):
        yield path.relative_to(source).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _named(node: ast.AST, names: set[str]) -> bool:
    return (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr in names)


def provenance_reads(file: str, tree: ast.Module) -> Iterator[Place]:
    """Subscripts, attributes and membership tests of provenance."""
    for node in ast.walk(tree):
        taken = isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Load)
        reads = taken and _named(node.value, WRITERS)  # type: ignore[attr-defined]
        tests = isinstance(node, ast.Compare) and any(_named(other, WRITERS) for other in node.comparators)
        if reads or (tests and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)):  # type: ignore[attr-defined]
            yield Place(file, node.lineno, ast.unparse(node))  # type: ignore[attr-defined]


def head_comparisons(file: str, tree: ast.Module) -> Iterator[Place]:
    """Comparisons of `head.kind`, and calls of text methods on it."""
    for node in ast.walk(tree):
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        called = [node.func.value] if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else []
        if any(_is_kind_of_head(one) for one in compared + called):
            yield Place(file, node.lineno, ast.unparse(node))  # type: ignore[attr-defined]


def _is_kind_of_head(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "kind" and _named(node.value, {"head"})


def functions(tree: ast.Module) -> Iterator[Function]:
    """Every function and method, also the nested ones."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def parameters(function: Function) -> int:
    """The number of parameters of a function, without `self` and `cls`."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return sum(name not in ("self", "cls") for name in names) + (given.vararg is not None) + (given.kwarg is not None)


def length(function: Function) -> int:
    """The lines of a function from its `def`, without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Every annotation of a parameter, a result, a variable or a field."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation


def has_any(annotation: ast.expr) -> bool:
    """True if `Any` is a part of an annotation."""
    return any(_named(node, {"Any"}) for node in ast.walk(annotation))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures, and the places with `--places`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=__doc__)
    parser.add_argument("--places", action="store_true", help="list the places behind each figure")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of another checkout's package")
    options = parser.parse_args(arguments)
    found = list(trees(options.source))
    every = [(file, function) for file, tree in found for function in functions(tree)]
    many = [
        Place(f, one.lineno, f"{one.name}: {parameters(one)} parameters")
        for f, one in every
        if parameters(one) > MOST_PARAMETERS
    ]
    long_files = [
        Place(file, 1, f"{lines} lines")
        for file, _ in found
        if (lines := len((options.source / file).read_text(encoding="utf-8").splitlines())) > MOST_LINES
    ]
    anys = [
        Place(file, one.lineno, ast.unparse(one)) for file, tree in found for one in annotations(tree) if has_any(one)
    ]
    lengths = sorted(length(function) for _, function in every)
    report = {
        "reads of provenance": [place for file, tree in found for place in provenance_reads(file, tree)],
        "comparisons of head.kind": [place for file, tree in found for place in head_comparisons(file, tree)],
        f"functions with more than {MOST_PARAMETERS} parameters": many,
        f"files of more than {MOST_LINES} lines": long_files,
        "annotations with Any": anys,
    }
    for name, places in report.items():
        print(f"{name}: {len(places)}")
        if options.places or name.startswith("functions"):
            print(*(f"    {place}" for place in places), sep="\n")
    ninth = lengths[round(0.9 * (len(lengths) - 1))]
    print(f"functions: {len(lengths)}; lines: median {statistics.median(lengths):g}, 90th percentile {ninth}")


if __name__ == "__main__":
    main()
