"""The actions on a file: it is opened as a user opens it, and inspected briefly if it was accepted."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from convscope.errors import ConvscopeError
from trials.outcomes import Case

_SMALL = 512 * 512  # larger inputs are opened, and not passed through


def read_image(case: Case) -> str:
    """Pixels of an image."""
    from convscope.images.decode import read_image

    return str(read_image(case.path).pixels.shape)


def open_file(case: Case) -> str:
    """A network, its layers, and for one that is small the activations of a tiny image."""
    from convscope.networks import open_model

    network = open_model(str(case.path), **case.arguments)
    layers = network.layers
    for layer in layers:
        str(layer)
    shape = network.inputs.size
    if shape[0] * shape[1] > _SMALL:
        return f"{len(layers)} layers, too large to pass an image"
    if case.arguments.get("feed"):
        return f"{len(layers)} layers"
    _activations(network)
    return f"{len(layers)} layers"


def _activations(network: Any) -> None:
    from convscope.techniques.activations import activations

    image = np.zeros((16, 16, 3), np.uint8)
    try:
        activations(network, image)
    except ConvscopeError as error:
        if "channels" not in str(error):
            raise


def command(case: Case) -> str:
    """`convscope layers FILE` as in a terminal: nothing but clear text comes out."""
    from convscope import cli

    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(["layers", str(case.path), *case.arguments.get("options", ())])
        except SystemExit as left:
            status = left.code
    said = out.getvalue() + err.getvalue()
    odd = next((letter for letter in said if is_control(letter)), None)
    if odd is not None:
        raise RuntimeError(f"the terminal got {odd!r}: {said[max(said.index(odd) - 60, 0) :][:150]!r}")
    if "Internal error" in said or "does not suffice" in said or "Traceback" in said or status not in (0, None, 1, 2):
        raise RuntimeError(f"status {status}: {said[-200:]!r}")
    if status:
        raise ConvscopeError(said.strip()[-300:] or "no text")
    return ""


def is_control(letter: str) -> bool:
    """True for what moves a terminal's cursor or turns the direction of text."""
    code = ord(letter)
    return (
        (code < 32 and letter not in "\n\t\r")
        or 127 <= code < 160
        or letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def weights(case: Case) -> str:
    """The weights for a module of the user's."""
    from convscope.networks import open_model

    network = open_model(case.arguments["code"], weights=case.path)
    _activations(network)
    return ""


def class_names(case: Case) -> str:
    """A list of class names."""
    from convscope.networks import read_class_names

    return str(len(read_class_names(case.path) or ()))


def feed(case: Case) -> str:
    """Arrays for inputs, as the command line reads them."""
    return command(case)


def load(case: Case) -> str:
    """A saved result: loaded, and drawn where it was accepted."""
    from convscope.render import renderings
    from convscope.store import load as load_result

    result = load_result(case.path)
    repr(result)
    for _ in itertools.islice(renderings(result), 3):
        pass
    return type(result).__name__


ACTIONS: dict[str, Callable[[Case], str]] = {
    "image": read_image,
    "open": open_file,
    "command": command,
    "weights": weights,
    "classes": class_names,
    "feed": feed,
    "load": load,
}
