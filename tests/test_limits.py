"""Declared limits: where they come from, what they may be, and what is said of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from expecting import raises

from convscope import limits
from convscope.errors import UsageError

pytestmark = pytest.mark.without_keras


def test_where_they_come_from(monkeypatch):
    monkeypatch.delenv("CONVSCOPE_LIMITS", raising=False)
    assert limits.current() == limits.Limits()
    monkeypatch.setenv("CONVSCOPE_LIMITS", "seconds=1.5, weights=2GiB,")
    assert (limits.current().seconds, limits.current().weights) == (1.5, 2 * 2**30)
    with limits.using(seconds=7, pixels=1e6):
        assert (limits.current().seconds, limits.current().pixels) == (7, 1_000_000)
        assert limits.current().weights == 2 * 2**30
    assert limits.current().seconds == 1.5


@pytest.mark.parametrize(
    ("text", "value"),
    [("pixels=400M", 400_000_000), ("text=1 KiB", 1024), ("file=0.5GiB", 2**29), ("nodes=12", 12), ("weights=3g", 3e9)],
)
def test_units(text, value):
    assert limits.parse([text]) == {text.partition("=")[0]: value}


@pytest.mark.parametrize(
    "text",
    [
        *("", "seconds", "=3", "size=3", "seconds=", "seconds=0", "seconds=-1", "seconds=nan", "seconds=inf"),
        *("pixels=0.5", "pixels=3x", "pixels=1e9", "pixels=" + "9" * 400, "seconds=" + "9" * 30),
    ],
)
def test_what_is_no_limit(text, monkeypatch):
    code = "limit-unknown" if text in ("=3", "size=3") else "limit-invalid"
    with raises(UsageError, code):
        limits.parse([text])
    if text:
        monkeypatch.setenv("CONVSCOPE_LIMITS", text)
        with raises(UsageError, code):
            limits.current()


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "3", None, True])
def test_what_is_no_value(value):
    with raises(UsageError, "limit-invalid", name="seconds"), limits.using(seconds=value):
        pass


def test_messages_say_what_to_do():
    with limits.using(seconds=60, weights=2**33, text=1000):
        assert str(UsageError(limits.how_to_raise("seconds"))) == (
            "limit seconds=60; to raise it: limits.using(seconds=300), or CONVSCOPE_LIMITS=seconds=300"
        )
        assert "CONVSCOPE_LIMITS=weights=40GiB" in limits.how_to_raise("weights")
        for name in vars(limits.current()):
            said = limits.how_to_raise(name).split("CONVSCOPE_LIMITS=")[1]
            assert limits.parse([said])[name] == pytest.approx(5 * getattr(limits.current(), name), rel=1e-3)


def test_the_help_and_the_security_page_name_every_limit():
    from convscope.cli import app

    page = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    shown = next(option.help for option in app.commands["layers"].params if option.name == "limited")
    for name in vars(limits.Limits()):
        assert re.search(rf"\b{name}\b", shown)
        assert f"| `{name}` |" in page
