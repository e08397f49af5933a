"""`file.py:function` and `package.module:function`: run when they are named, and errors that say where."""

import os
import sys
from pathlib import Path

import pytest
from expecting import raises

from convscope.errors import ModelError, UsageError
from convscope.networks.formats import code, files


@pytest.fixture
def home(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 7\n")
    (tmp_path / "net.py").write_text(
        "from dataclasses import dataclass\n"
        "from beside import WIDTH\n\n"
        "@dataclass\nclass Settings:\n    width: int = WIDTH\n\n"
        "def make(classes=2, pretrained=True):\n    return ('made', classes, pretrained, Settings().width)\n\n"
        "def needy(size):\n    return size\n\n"
        "def broken():\n    return 1 / 0\n\n"
        "class Nets:\n    @staticmethod\n    def small():\n        return 'small'\n\n"
        "ready = 5\n"
    )
    return tmp_path / "net.py"


@pytest.mark.parametrize(
    ("name", "is_code"),
    [
        ("net.py:make", True),
        ("a/b/net.py:make?classes=3", True),
        (r"C:\models\net.py:make", True),
        ("package.module:function", True),
        ("package:function", True),
        ("model.keras", False),
        ("C:model.keras", False),
        ("folder/model.pt", False),
        ("net.py", False),
    ],
)
def test_what_is_code(name, is_code):
    assert code.is_code(name) is is_code


def test_a_file_that_exists_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py:make").write_text("")
    assert not code.is_code("net.py:make")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + ".py:make", "x/" * 3000 + "net.py:make", "a\0b.keras"])
def test_names_that_no_file_can_have(name):
    assert code.is_code(name) is name.endswith(":make")
    if code.is_code(name):
        with raises(UsageError, "file-missing"):
            code.build(name)
    with raises(ModelError, "file-missing"):
        files.sniff(Path(name))


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_link_that_leads_to_itself_is_no_file(tmp_path):
    (tmp_path / "net.py").symlink_to(tmp_path / "net.py")
    with raises(UsageError, "file-missing"):
        code.build(f"{tmp_path / 'net.py'}:make")
    with raises(ModelError, "file-missing"):
        files.sniff(tmp_path / "net.py")


def test_build(home):
    before = list(sys.path)
    assert code.build(f"{home}:make") == ("made", 2, True, 7)
    assert code.build(f"{home}:make?classes=10&pretrained=false") == ("made", 10, False, 7)
    assert code.build(f"{home}:Nets.small") == "small"
    assert code.build(f"{home}:ready") == 5
    assert sys.path == before


def test_build_from_a_module(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home.parent))
    assert code.build("net:make?classes=4") == ("made", 4, True, 7)
    with raises(UsageError, "module-missing", name="nett"):
        code.build("nett:make")


@pytest.mark.parametrize(
    ("text", "expected", "words"),
    [
        ("{}:mak", "function-unknown", ["no 'mak'", "did you mean 'make'"]),
        ("{}:needy", "function-arguments", ["needy(size)", "missing a required argument", "needy?argument=value"]),
        ("{}:make?klasses=3", "function-arguments", ["make(classes=2, pretrained=True)", "klasses"]),
        ("{}:broken", "code-failed", ["ZeroDivisionError", "division by zero", "net.py:15"]),
        ("{}x.py:make", "file-missing", ["no file at", "net.py"]),
    ],
)
def test_errors(home, text, expected, words):
    with raises(UsageError, expected) as error:
        code.build(text.format(home if "x.py" not in text else str(home)[:-3]))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_an_error_while_the_file_is_read(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with raises(UsageError, "code-failed", match=r"ModuleNotFoundError.*bad\.py:1"):
        code.build(f"{tmp_path / 'bad.py'}:make")
    (tmp_path / "syntax.py").write_text("def make(:\n")
    with raises(UsageError, "code-failed", match="SyntaxError"):
        code.build(f"{tmp_path / 'syntax.py'}:make")


@pytest.mark.parametrize(
    ("text", "value"),
    [("false", False), ("None", None), ("10", 10), ("(64,64,3)", (64, 64, 3)), ("imagenet", "imagenet")],
)
def test_literals(text, value):
    assert code.literal(text) == value


def test_what_is_no_model_is_said(home):
    import convscope

    pytest.importorskip("torch")
    with raises(
        UsageError,
        "not-a-model",
        found="builtins.tuple",
        match=r"to return a keras.Model or a torch.nn.Module, found builtins.tuple",
    ):
        convscope.open_model(f"{home}:make")
    (home.parent / "none.py").write_text("def make():\n    pass\n")
    with raises(UsageError, "not-a-model", found="nothing (None)", match=r"found nothing \(None\)"):
        convscope.open_model(f"{home.parent / 'none.py'}:make")


def test_what_lies_beside_is_found_also_while_the_function_runs(tmp_path):
    (tmp_path / "lies_beside.py").write_text("WIDTH = 3\n")
    (tmp_path / "net.py").write_text("def make():\n    from lies_beside import WIDTH\n    return WIDTH\n")
    assert code.build(f"{tmp_path / 'net.py'}:make") == 3


def test_a_model_is_no_function_though_it_can_be_called(tmp_path):
    keras = pytest.importorskip("keras")
    text = "import keras\nmodel = keras.Sequential([keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])\n"
    (tmp_path / "net.py").write_text(text)
    assert isinstance(code.build(f"{tmp_path / 'net.py'}:model"), keras.Model)
