"""Expect one of convscope's errors by its class, code and data, so that wording can improve."""

from contextlib import contextmanager

import pytest


@contextmanager
def raises(kind, code, /, *, match=None, **data):
    """The block raises an error of this class and code, which has at least these data.

    Args:
        kind: a class of convscope.errors; code: as docs/errors.md lists it.
        match: what the message has to show, where its wording is the claim: advice that a user follows, or the reason
            where several faults have one code.
        data: expected values by name.
    """
    with pytest.raises(kind, match=match) as caught:
        yield caught
    error = caught.value
    assert error.code == code, f"{error.code}: {error}"
    assert {name: error.data.get(name) for name in data} == data, error.data
