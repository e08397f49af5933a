"""What holds for the tests themselves: they use public names, and each of them can fail."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").glob("*.py"))
PROGRAMS = sorted(path for name in ("benchmarks", "trials", "docs") for path in (ROOT / name).rglob("*.py"))

# Private names that tests may use, with the reason.
OF_OTHERS = "of another library, which has no public name for it"
RESTORED = "that the user's model comes back exactly as it was can be seen in what its library keeps privately"
ALLOWED = {
    "_exit": "os._exit is the standard library's public way to end without cleaning up",
    "_repr_html_": "the notebook's protocol calls a result by this name",
    "_C": f"torch._C: {OF_OTHERS}",
    "_called": RESTORED,
    "_flatten_layers": RESTORED,
    "_forward_hooks": RESTORED,
    "_forward_pre_hooks": RESTORED,
    "_inbound_nodes": RESTORED,
    "_MAIN": "no signal may be left waiting after one at any line; nothing public tells",
    "_users": "of `restoring._MAIN`",
    "_waiting": "of `restoring._MAIN`",
    "_READERS": "no reader process may be left; nothing public lists them",
    "_child": "tests end a process from outside, or see that it has ended",
    "_hashed": "the hash without the cache that is tested",
    "_run": "passes are counted beneath the cache of programs that is tested",
    "_programs": "one compiled program has to serve several calls, on an eager runtime too, where no trace tells",
    "_folds": "which norms were folded can't be seen from equal results",
    "_HOMES": "the table of lazy names, by which an import through the package is followed",
    "_plan": "how layers are grouped under a limit is arithmetic, and `techniques.activations` lists what users call",
    "_reserve": "likewise: a full disk while an array is mapped can only be tried at this function",
    "_batch": "cases of ONNX's operators declare no batch",
}
# The same for programs that measure or try convscope.
ALLOWED_TO_PROGRAMS = {
    "_exit": ALLOWED["_exit"],
    "_C": ALLOWED["_C"],
    "_len_torch_function_stack": OF_OTHERS,
    "_run_exitfuncs": "the memory of a reader is known once it has ended; this ends all as the end of a program does",
    **dict.fromkeys(("_buffers", "_inbound_nodes", "_outbound_nodes", "_parameters"), RESTORED),
    "_losses": RESTORED,
    "_is_protocol": f"of typing: {OF_OTHERS}",
    "_MAIN": ALLOWED["_MAIN"],
    "_users": ALLOWED["_users"],
    "_waiting": ALLOWED["_waiting"],
}


def trees(paths=TESTS):
    return [(path.name, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """(line, name) of each private name of another object or module that is used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("getattr", "setattr", "delattr", "hasattr"):
                names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
                yield from ((node.lineno, name) for name in names if isinstance(name, str) and private(name))


@pytest.mark.parametrize(
    ("paths", "allowed"), [(TESTS, ALLOWED), (PROGRAMS, ALLOWED_TO_PROGRAMS)], ids=["tests", "programs"]
)
def test_tests_and_programs_use_public_names(paths, allowed):
    used = [(file, line, name) for file, tree in trees(paths) for line, name in private_names(tree)]
    assert not [f"{file}:{line} {name}" for file, line, name in used if name not in allowed]
    assert set(allowed) == {name for _, _, name in used}, "exceptions that nothing needs"


CHECKS = ("raises", "warns", "fail", "jaxtyped")


def name_of(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def checks(function, checking):
    """Whether a function asserts, expects an exception, or calls one that does."""
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and (name_of(node).startswith("assert_") or name_of(node) in checking))
        for node in ast.walk(function)
    )


def functions():
    return [(file, node) for file, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_every_test_checks_something():
    """A helper checks if it asserts, or where jaxtyping holds its arguments and its result against annotations."""
    found, checking = functions(), set(CHECKS)
    checking |= {node.name for _, node in found if any("jaxtyped" in ast.unparse(one) for one in node.decorator_list)}
    while more := {node.name for _, node in found if checks(node, checking)} - checking:
        checking |= more
    tests = [(file, node) for file, node in found if node.name.startswith("test_")]
    assert not [f"{file}: {node.name}" for file, node in tests if not checks(node, checking)]


# -- modules that need not run once more on another backend of Keras ------------------------------------------

WITH_KERAS = {"keras", "tensorflow", "jax", "agreement", "models", "runtimes_at_hand"}


def imported(tree):
    """Modules that a tree imports anywhere, `pytest.importorskip` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.Call) and name_of(node) == "importorskip" and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value).partition(".")[0]


def says_without_keras(tree):
    """Whether `pytestmark` of the module is the mark `without_keras`."""
    return any(isinstance(node, ast.Assign) and "mark.without_keras" in ast.unparse(node.value) for node in tree.body)


def test_modules_without_keras_use_none():
    """Nor does a module of the tests that they import. `.ci/run` runs them in an environment that lacks Keras."""
    known = {name.removesuffix(".py"): tree for name, tree in trees()}
    marked = [name for name, tree in known.items() if says_without_keras(tree)]
    assert len(marked) > 10
    for name in marked:
        reached, todo = set(), [name]
        while todo:
            new = set(imported(known[todo.pop()])) - reached
            reached |= new
            todo += new & set(known)
        assert not reached & WITH_KERAS, name


def test_the_checks_of_tests_notice():
    bare = ast.parse("def test_a():\n    thing._secret\n    setattr(thing, '_other', 1)\nfrom house import _room\n")
    assert sorted(name for _, name in private_names(bare)) == ["_other", "_room", "_secret"]
    assert not checks(bare.body[0], set(CHECKS))
    assert checks(ast.parse("def test_a():\n    with pytest.raises(E):\n        f()").body[0], set(CHECKS))
