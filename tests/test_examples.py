"""The public interface: every public name is on docs/api.md and has an example, and the examples run."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import convscope
from convscope.demo import CLASSES, MODEL, PHOTOS

ROOT = Path(__file__).parents[1]


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_api = _script("make_api")
PUBLIC = make_api.objects()
# Each of these runs all techniques, or starts processes: over 5 s. Other tests call them (test_demo, test_report).
SKIPPED = {"convscope.doctor", "convscope.report", "convscope.demo.run"}


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert make_api.page() == page, "run python docs/make_api.py"


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for module in make_api.MODULES:
        section = page.partition(f"\n## {module}\n")[2].partition("\n## ")[0]
        for name in make_api.public_names(module):
            assert f"- `{name}" in section, f"{module}.{name}"


def test_names_that_are_left_out_exist():
    for module, names in make_api.MODULES.items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_a_new_name_would_be_missed():
    """The page is not made of a list of names that nobody extends."""
    errors = importlib.import_module("convscope.errors")

    def novelty():
        """New."""

    novelty.__module__ = "convscope.errors"
    errors.novelty = novelty
    try:
        assert "novelty" in make_api.public_names("convscope.errors")
    finally:
        del errors.novelty


def test_every_public_name_has_an_example():
    missing = []
    for name, value in PUBLIC.items():
        if ">>>" not in (value.__doc__ or ""):
            missing.append(name)
    assert not missing


def test_only_slow_examples_are_skipped():
    assert {name for name, value in PUBLIC.items() if "doctest: +SKIP" in (value.__doc__ or "")} <= SKIPPED


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What examples may use, in a folder with a model and a photo."""
    pytest.importorskip("keras")
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(MODEL, folder / "model.keras")
    shutil.copy(PHOTOS[0], folder / "photo.jpg")
    network = convscope.open_model(MODEL, classes=CLASSES)
    with contextlib.chdir(folder):
        yield {
            "CLASSES": CLASSES,
            "MODEL": MODEL,
            "PHOTOS": PHOTOS,
            "convscope": convscope,
            "network": network,
            "np": np,
        }


def _tests(value, name, globs):
    finder = doctest.DocTestFinder()
    return [test for test in finder.find(value, name, module=False, globs=globs) if test.examples]


def _run(value, name, names, module):
    for test in _tests(value, name, {**vars(module), **names}):
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL)
        said = io.StringIO()
        runner.run(test, out=said.write)
        assert not runner.failures, said.getvalue()


# Those of the sessions run in test_session.
@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if value.__module__ != "convscope.session"])
def test_examples_run(names, name):
    value = PUBLIC[name]
    _run(value, name, names, sys.modules[value.__module__])


@pytest.mark.parametrize("name", [name for name in make_api.MODULES if name != "convscope.session"])
def test_examples_of_modules_run(names, name):
    module = importlib.import_module(name)
    docstring = type("Docstring", (), {"__doc__": module.__doc__, "__module__": name})
    _run(docstring, name, names, module)
