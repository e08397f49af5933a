"""The house as ARCHITECTURE.md draws it: arrows go down only, and no framework is loaded before it is needed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import convscope

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "convscope"
FRAMEWORKS = {"keras", "tensorflow", "jax", "torch", "onnx", "tf_keras"}

# From the ground up. A room may use what stands in a floor below it; rooms of one floor don't know each other.
FLOORS = (
    ("errors",),
    ("limits", "schema", "events", "messages"),
    ("isolation",),
    ("reading",),
    ("arrays", "files"),
    ("images",),
    ("networks",),
    ("measures",),
    ("ancestry",),
    ("cuts",),
    ("objectives",),
    ("binding",),
    ("results",),
    ("techniques.activations", "techniques.filters", "techniques.heatmaps", "render"),
    ("store", "requests"),
    ("session",),
    ("reports", "diagnosis"),
    ("demo",),
    ("terminal",),
    ("cli",),
    ("__main__",),
)
# The same inside of the largest room: a format ends in a framework, and opening reads formats.
NETWORK_FLOORS = (
    ("foreign",),
    ("ops",),
    ("layouts",),
    ("preprocessing", "inputs", "layers", "restoring", "attributes", "failing", "installed", "backends", "class_names"),
    ("head", "passes", "feeding"),
    ("measured",),
    ("graph", "choices"),
    ("endings",),
    ("trace",),
    ("heads", "scaling", "grids"),
    ("network",),
    ("inspection",),
    ("traced",),
    ("keras", "torch"),
    ("formats.damage",),
    ("formats.code", "formats.archives", "formats.hdf5", "formats.pickles"),
    ("formats.files",),
    ("formats.saved_model",),
    ("formats.keras", "formats.torch"),
    ("formats.onnx",),
    ("opening",),
    ("spec",),
)
MODULES = {
    ".".join(part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
HOLDERS = {"", "techniques", "networks.formats"}  # packages that hold rooms and nothing else, and the front door


def room(module, floors=FLOORS):
    """The room that a module of convscope belongs to, as (floor, name)."""
    for floor, names in enumerate(floors):
        for name in names:
            if module == name or module.startswith(name + "."):
                return floor, name
    raise AssertionError(f"{module} stands on no floor")


def tree_of(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def modules():
    return [(name, tree_of(name)) for name in MODULES if name not in HOLDERS]


def imported(tree):
    """What a module imports, at its top or inside of functions, as full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named(tree, package=""):
    """Modules that texts name, for `import_module` or the reader process: "convscope.a.b" or "convscope.a.b:function".

    Inside of a `package` a table may name them from there: "formats.keras.files" in `networks`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value.partition(":")[0]
            if text.startswith("convscope.") and text.removeprefix("convscope.") in MODULES:
                yield text
            elif package and "." in text and f"{package}.{text}" in MODULES:
                yield f"convscope.{package}.{text}"


def only_for_types(tree):
    """A tree without what is imported for annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def inside(target):
    """The module of convscope that an import reaches, "" for the package; None for one of another package."""
    first, _, rest = target.partition(".")
    if first != "convscope":
        return None
    if rest.split(".")[0] in convscope._HOMES and rest not in MODULES:
        return convscope._HOMES[rest.split(".")[0]].removeprefix("convscope.")  # fetched through the front door
    while rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest


def arrows(floors, package=""):
    """Each arrow that does not go down, between rooms of a package."""
    start = f"{package}." if package else ""
    wrong = []
    for name, tree in modules():
        if not name.startswith(start):
            continue
        floor, own = room(name.removeprefix(start), floors)
        if package:
            tree = only_for_types(tree)
        for target in {inside(one) for one in (*imported(tree), *named(tree, package))} - {None, *HOLDERS, package}:
            if not target.startswith(start):
                continue
            below, other = room(target.removeprefix(start), floors)
            if other != own and below >= floor:
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def test_arrows_go_down_only():
    assert not arrows(FLOORS)


def test_arrows_go_down_only_inside_of_networks():
    assert not arrows(NETWORK_FLOORS, "networks")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("results.base", "from convscope.render import tile"),
        ("results.base", "from convscope import store"),
        ("objectives", "import convscope.techniques.filters"),
        ("measures", "def later():\n    from convscope.objectives import parse"),
        ("images.source", "import importlib\nimportlib.import_module('convscope.store')"),
        ("reading", "TABLE = {'a': 'convscope.networks.spec:open_model'}"),
        ("render.grid", "from convscope import heatmap"),
        ("techniques.filters.runs", "from convscope.techniques.heatmaps import METHODS"),
        ("techniques.heatmaps.run", "from convscope.techniques import activations"),
        ("store", "from convscope.session import Session"),
        ("networks.traced", "from convscope.networks.keras import taps"),
        ("networks.keras.network", "def later():\n    from convscope.networks.formats.keras import files"),
        ("networks.torch.graph", "from convscope.networks.keras.graph import trace"),
        ("networks.formats.keras.files", "from convscope.networks.formats.torch import files"),
        ("networks.formats.files", "READERS = {'keras': 'formats.keras.files'}"),
        ("networks.network", "from convscope.networks.spec import ModelSpec"),
    ],
)
def test_an_arrow_upwards_would_be_seen(monkeypatch, name, code):
    trees = {name: ast.parse(code)}
    monkeypatch.setattr(sys.modules[__name__], "modules", lambda: trees.items())
    floors = (NETWORK_FLOORS, "networks") if name.startswith("networks.") else (FLOORS,)
    assert len(arrows(*floors)) == 1


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


RAISING = {"is_file", "is_dir", "exists", "is_symlink", "resolve", "samefile"}


def raising_checks(tree):
    """Checks of a path by pathlib, which raise an error for a name that is too long or a link that leads to itself."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [node.lineno for node in calls if node.func.attr in RAISING and not node.args and not node.keywords]


def test_paths_are_checked_by_what_never_raises():
    """`os.path.isfile` and its like are False for a path that can't be; a user, a table or a model may name any."""
    assert not [f"{name}:{line}" for name, tree in modules() for line in raising_checks(tree)]
    assert raising_checks(ast.parse("path.is_file()\nPath(a).exists()\nos.path.exists(a)\npath.parent.resolve()")) == [
        1,
        2,
        4,
    ]


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


def test_the_map_names_every_module():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+\.py", text))
    modules = {path.name for path in SOURCE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules <= named
    there = {
        path.name
        for folder in ("src", "tests", "benchmarks", "docs", "trials")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert named - {"file.py", "net.py"} <= there
