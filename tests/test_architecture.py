"""The house as ARCHITECTURE.md draws it: arrows go down only, and no framework is loaded before it is needed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "convscope"
FRAMEWORKS = {"keras", "tensorflow", "jax", "torch", "onnx", "tf_keras"}

# From the ground up. A room may use what stands in a floor below it; rooms of one floor don't know each other.
FLOORS = (
    ("errors",),
    ("limits", "schema", "events"),
    ("isolation",),
    ("reading",),
    ("arrays", "files"),
    ("images",),
    ("networks",),
    ("measures",),
    ("objectives",),
    ("results",),
    ("techniques.activations", "techniques.filters", "techniques.heatmaps", "render"),
    ("store", "session"),
    ("reports", "diagnosis"),
    ("demo",),
    ("terminal",),
    ("cli",),
    ("__main__",),
)


def room(module):
    """The room that a module of convscope belongs to, as (floor, name)."""
    for floor, names in enumerate(FLOORS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return floor, name
    raise AssertionError(f"{module} stands on no floor")


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and name != "techniques":
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_go_down_only():
    wrong = []
    for name, tree in modules():
        floor, own = room(name)
        for target in imported(tree):
            if not target.startswith("convscope."):
                continue
            inside = target.removeprefix("convscope.")
            if inside.split(".")[0] not in {names.split(".")[0] for floor_ in FLOORS for names in floor_}:
                continue  # a name of the package itself
            below, other = room(inside)
            if other != own and below >= floor:
                wrong.append(f"{name} imports {inside}")
    assert not wrong


def test_frameworks_are_named_in_networks_alone():
    for name, tree in modules():
        if name.startswith("networks"):
            continue
        used = {target.split(".")[0] for target in imported(tree)} & FRAMEWORKS
        assert not used, f"{name} imports {used}"


@pytest.mark.parametrize(
    "what",
    [
        "import convscope",
        "import convscope.cli",
        "import convscope; convscope.open_model",
        "import convscope; convscope.Session",
    ],
)
def test_no_framework_is_loaded_before_it_is_needed(what):
    code = f"{what}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & (FRAMEWORKS | {"matplotlib", "h5py"})


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom convscope.cli import app\n"
    code += "try: app(['--help'])\nexcept SystemExit: pass\nprint(','.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split(","))
    assert not loaded & (FRAMEWORKS | {"numpy", "PIL", "matplotlib", "rich", "jinja2"})


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_every_command_and_its_options_are_in_the_docs(page):
    from convscope.cli import app

    text = (ROOT / page).read_text(encoding="utf-8")
    for name in app.commands:
        assert f"convscope {name}" in text, f"{page} does not show `convscope {name}`"


def test_every_heatmap_method_is_in_the_docs():
    from convscope.techniques.heatmaps import METHODS

    text = (ROOT / "docs" / "heatmaps.md").read_text(encoding="utf-8")
    assert not [name for name in METHODS if f"| `{name}` |" not in text]


def test_public_functions_have_docstrings():
    bare = [
        f"{name}: {node.name}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and node in tree.body
    ]
    assert not bare


def test_architecture_page_names_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = [name.rpartition(".")[2] for floor in FLOORS for name in floor if name != "__main__"]
    assert not [name for name in rooms if not re.search(rf"\b{name}\b", text)]
