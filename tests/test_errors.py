"""Errors carry a code and data; a message names parameters as the shell that shows it spells them."""

import ast
import importlib
import importlib.util
import pickle
import re
from pathlib import Path

import pytest

import convscope
from convscope import errors, isolation, limits
from convscope.errors import ConvscopeError, ImageError, UsageError, option

ROOT = Path(__file__).parents[1]


def kinds(base=ConvscopeError):
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def test_a_parameter_is_spelled_by_each_shell():
    error = UsageError(f"give {option('open_model.size')} or {option('image')}", code="size-missing", image=None)
    assert str(error) == "give size= or image="
    assert error.text(str.upper) == "give OPEN_MODEL.SIZE or IMAGE"
    assert (error.code, error.data) == ("size-missing", {"image": None})


def test_an_error_keeps_its_code_data_and_spelling_through_a_pickle():
    error = UsageError(f"give {option('image')}", code="image-missing", count=3)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.code, again.data) == (UsageError, str(error), error.code, error.data)
    assert again.text(str.upper) == "give IMAGE"


def test_a_value_and_a_call_are_spelled_as_python_writes_them():
    error = UsageError(f"give {option('trust=True')} in {option('limits.using:seconds=3')}")
    assert str(error) == "give trust=True in limits.using(seconds=3)"
    assert error.text(str.upper) == "give TRUST=TRUE in LIMITS.USING:SECONDS=3"


def test_a_message_within_a_message_is_spelled_by_the_shell():
    inner = UsageError(f"give {option('image')}")
    outer = ImageError(f"no image ({errors.one_line(inner)})")
    assert (str(outer), outer.text(str.upper)) == ("no image (give image=)", "no image (give IMAGE)")


def test_a_message_that_lost_one_of_two_marks_shows_none():
    assert str(UsageError(f"give {option('image')}"[:8])) == "give ima"[:7]


def test_an_error_of_the_reader_process_keeps_its_code_data_and_spelling(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"x" * 100)
    with limits.using(file=10), pytest.raises(ImageError) as caught:
        isolation.call("convscope.images.decode:decode_file", str(path), "image.png")
    assert (caught.value.code, caught.value.data) == (
        "input-too-large",
        {"path": "image.png", "limit": "file"},
    )
    assert "limits.using(file=50)" in str(caught.value)
    assert "LIMITS.USING:FILE=50" in caught.value.text(str.upper)


# The modules that belong to the command line, and those whose messages name its flags still.
SHELLS = ("cli/", "terminal.py", "__main__.py")
FLAGS = re.compile(r"(?<![\w-])--[a-z]")
UNDONE: set[str] = set()


def texts(tree):
    """Every string of a module but its docstrings."""
    places = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, places) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
    ]


def flagged(tree):
    """Texts that name a flag; those of pip, which a message gives to be typed as it is, aside."""
    return [text for text in texts(tree) if FLAGS.search(text) and "pip install" not in text and text not in PIP]


PIP = {" --force-reinstall"}


def test_no_text_of_the_library_names_a_flag_of_the_command_line():
    source = Path(errors.__file__).parent
    found = {
        path.relative_to(source).as_posix(): flagged(ast.parse(path.read_text(encoding="utf-8")))
        for path in source.rglob("*.py")
    }
    named = {name: some for name, some in found.items() if some and not name.startswith(SHELLS)}
    assert {name: some for name, some in named.items() if name not in UNDONE} == {}
    assert set(named) == UNDONE, "a module that is done leaves this list"


def test_a_flag_in_a_text_is_found():
    assert flagged(ast.parse('"""--trust"""\nraise UsageError(f"give {x} with --trust")')) == [" with --trust"]


def test_a_line_is_cut_after_it_was_spelled():
    error = UsageError("x" * 5000 + option("image"))
    assert error.text(str).endswith("image")
    assert len(error.text(str)) <= errors.LONGEST_LINE


def test_what_a_library_says_is_escaped():
    error = ValueError("no layer 'a\x1b[31m\x1b]0;b\x07\u202ec\ue000d\x85'")
    assert errors.one_line(error) == r"no layer 'a\x1b]0;b\x07\u202ec\ue000d"
    assert errors.one_line(KeyError("größe 高")) == "'größe 高'"


def test_a_word_is_compared_to_some_names_only_and_found_among_all(monkeypatch):
    names, compared = [f"layer{number}" for number in range(30_000)], []
    monkeypatch.setattr(
        "difflib.get_close_matches",
        lambda word, some, **_: compared.extend(some) or [one for one in some if one == word],
    )
    assert errors.nearest("LAYER29999", names) == "did you mean 'layer29999'?"
    assert len(compared) < 15_000


# -- codes -------------------------------------------------------------------------------------------------


def list_of_errors():
    """`docs/make_errors.py`, which finds every place that makes an error."""
    spec = importlib.util.spec_from_file_location("make_errors", ROOT / "docs" / "make_errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_errors = list_of_errors()
MADE = tuple(make_errors.places(make_errors.trees()))


def test_every_error_has_a_code():
    assert len(MADE) > 400
    assert [made.where for made in MADE if not made.codes and not made.passed_on] == []
    codes = {code for made in MADE for code in made.codes}
    assert {code for code in codes if not re.fullmatch(r"[a-z]+(-[a-z]+)*", code)} == set()


def test_an_error_whose_message_shows_values_has_data():
    assert [made.where for made in MADE if made.shows and not made.data] == []


def test_a_code_stands_for_one_kind_of_fault():
    meanings = make_errors.MEANINGS
    assert set(meanings) == {code for made in MADE for code in made.codes}
    assert len(set(meanings.values())) == len(meanings)


def test_the_page_lists_every_code():
    assert make_errors.page() == (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), (
        "run python docs/make_errors.py"
    )


def test_the_search_for_errors_finds_what_lacks_a_code_or_data():
    found = make_errors.places({
        "a.py": ast.parse("""
class Own(UsageError): ...
raise Own(f"no layer {path!r}")
raise errors.ImageError(f"{name} is large ({how_to_raise('pixels')})", code="large" if big else "small", name=name)
raise ModelError(str(error), code=error.code, **error.data)
raise click.UsageError("none of ours")
"""),
        "errors.py": ast.parse("class UsageError(ConvscopeError): ...\nclass ImageError(ConvscopeError): ...\n"
                               "class ModelError(ConvscopeError): ..."),
    })  # fmt: skip
    assert [(made.kind, made.codes, made.passed_on, made.data, made.shows) for made in found] == [
        ("Own", (), False, (), True),
        ("ImageError", ("large", "small"), False, ("name",), True),
        ("ModelError", (), True, ("",), False),
    ]


def test_every_class_of_errors_is_found():
    for name in ("session", "techniques.heatmaps", "networks.ops"):
        importlib.import_module(f"convscope.{name}")
    assert {kind.__name__ for kind in kinds()} <= make_errors.error_classes(make_errors.trees().values())


@pytest.mark.parametrize("kind", sorted(kinds(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_each_class_has_a_code_of_its_own(kind):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.kind)


@pytest.mark.parametrize(
    "ask",
    [
        lambda net, photo: convscope.filters(net, "block4_conv", [96], steps=1),
        lambda net, photo: convscope.filters(net, objectives="block4_conv:96", steps=1),
        lambda net, photo: convscope.heatmap(net, photo, "block4_conv:96"),
        lambda net, photo: convscope.heatmap(net, photo, "block4_conv:96 - cat"),
        lambda net, photo: convscope.activations(net, photo, "block4_conv").channel("block4_conv", 96),
    ],
    ids=["filters", "objective", "heatmap", "sum", "activations"],
)
def test_a_channel_out_of_range_is_one_error_of_all_techniques(ask):
    pytest.importorskip("keras")
    from convscope.demo import CLASSES, MODEL, PHOTOS

    network = convscope.open_model(MODEL, classes=CLASSES)
    with pytest.raises(UsageError) as caught:
        ask(network, PHOTOS[0])
    assert caught.value.code == "channel-out-of-range"
    assert (caught.value.data["channel"], caught.value.data["count"]) == (96, 96)
