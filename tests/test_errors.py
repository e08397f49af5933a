"""Errors carry a code and data; a message names parameters as the shell that shows it spells them."""

import pickle
import re

import pytest

from convscope import errors
from convscope.errors import ConvscopeError, UsageError, option


def kinds(base=ConvscopeError):
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def test_a_parameter_is_spelled_by_each_shell():
    error = UsageError(f"give {option('open_model.size')} or {option('photo')}", code="size-missing", photo=None)
    assert str(error) == "give size= or photo="
    assert error.text(str.upper) == "give OPEN_MODEL.SIZE or PHOTO"
    assert (error.code, error.data) == ("size-missing", {"photo": None})


def test_an_error_keeps_its_code_data_and_spelling_through_a_pickle():
    error = UsageError(f"give {option('photo')}", code="photo-missing", count=3)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.code, again.data) == (UsageError, str(error), error.code, error.data)
    assert again.text(str.upper) == "give PHOTO"


def test_a_line_is_cut_after_it_was_spelled():
    error = UsageError("x" * 5000 + option("photo"))
    assert error.text(str).endswith("photo")
    assert len(error.text(str)) <= errors.LONGEST_LINE


@pytest.mark.parametrize("kind", sorted(kinds(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_each_class_has_a_code_of_its_own(kind):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.kind)
