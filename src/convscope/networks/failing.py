"""Which layer of the user's model raised an exception."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from textwrap import shorten
from types import CodeType
from typing import TYPE_CHECKING, TypeVar

from convscope.errors import ConvscopeError, ModelError, one_line

if TYPE_CHECKING:
    from convscope.networks.network import Network

Found = TypeVar("Found")


def attempted(network: Network, body: Callable[[], Found]) -> Found | None:
    """The result of a trial pass, which measures something; None where it fails.

    A model may refuse any values but those that it was made for, in its layers or in code of its author's between them.
    Whoever runs it next on an image gets the reason.

    Raises:
        Exception: the memory did not suffice, which tells nothing of the model.
    """
    try:
        return body()
    except Exception as error:
        if network.out_of_memory(error):
            raise
        return None


def failing_layer(error: BaseException, paths: Mapping[int, str], own: Collection[CodeType] = ()) -> str | None:
    """The path of the innermost layer that an exception came out of; None if it came out of none.

    Args:
        error: with its traceback.
        paths: of layers by their `id`, the whole model's being "".
        own: functions of convscope that layers call, for taps: their exceptions are no layer's fault.
    """
    found, step = None, error.__traceback__
    while step is not None:
        frame = step.tb_frame
        if frame.f_code in own:
            return None
        found = paths.get(id(frame.f_locals.get("self")), found)
        step = step.tb_next
    return found


def failure(error: Exception, name: str, path: str | None) -> ModelError | None:
    """The message where a layer raised an exception that is not convscope's; None where none did."""
    if path is None or isinstance(error, ConvscopeError):
        return None
    return ModelError(
        f"{name} can't be run: {said(error, path)}. Expected a model that takes what preprocessing makes of an image; "
        "call it yourself on an array of that shape to see the whole error.",
        code="layer-failed",
        layer=path,
    )


def cant_run(name: str, size: tuple[int, int], channels: Collection[int], reason: str, advice: str) -> ModelError:
    """The message for a model that can't be called on a blank image.

    Args:
        name: the model's.
        size: `(h, w)` of the image.
        channels: the numbers of channels that were tried.
        reason: of the failure, for people.
        advice: the remedy, a sentence or more.
    """
    several = "s" if list(channels) != [1] else ""
    shown = shorten(reason, 300, placeholder=" …").rstrip(".")
    return ModelError(
        f"{name} can't be run on an image of {size[0]}x{size[1]} pixels with {' or '.join(map(str, channels))} "
        f"channel{several} ({shown}). {advice}",
        code="model-not-runnable",
        name=name,
        size=list(size),
        reason=reason,
    )


def said(error: BaseException, path: str | None) -> str:
    """An exception in a line, with the layer that raised it."""
    text = one_line(error).rstrip(".")
    if path is None or isinstance(error, ConvscopeError):
        return text
    where = f"its layer {path!r}" if path else "its own code"
    return f"{where} raised {type(error).__name__}" + (f": {text}" if text != type(error).__name__ else "")
