"""Progress as a stream of typed events, so that a bar, a server and a ledger can use the same one.

>>> from convscope.events import Event, ItemFinished
>>> def show(event: Event) -> None:
...     if isinstance(event, ItemFinished):
...         print(f"{event.done}/{event.total} {event.label}")
>>> show(ItemFinished(1, 3, "cat.jpg", item="the result of cat.jpg"))
1/3 cat.jpg
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Event:
    """What every event tells.

    Attributes:
        done: parts of the work that are finished, 0 or more.
        total: parts of the work, None where it is not known in advance.
        text: what the event concerns, such as an image or a layer, for people.
        stages: the stages of a larger work that it belongs to, the outermost first; empty where there is one only.
    """

    done: int
    total: int | None
    text: str
    stages: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def label(self) -> str:
        """The stages and the text in one line, for people."""
        return ": ".join((*self.stages, self.text))


@dataclass(frozen=True)
class Started(Event):
    """The work begins; `done` is 0."""


@dataclass(frozen=True)
class Advanced(Event):
    """Part of the work is done; there is no result of it alone."""


@dataclass(frozen=True)
class ItemFinished(Event):
    """An item has its result.

    Attributes:
        item: the result; its type is that of the technique's items.
    """

    item: object = None


Progress = Callable[[Event], object] | None


def tell(progress: Progress, event: Event) -> None:
    """Call `progress` with an event, where there is one."""
    if progress is not None:
        progress(event)


def within(progress: Progress, stage: str) -> Progress:
    """The progress of one stage of a larger work: each event gets the stage's name in front."""
    if progress is None:
        return None
    return lambda event: progress(replace(event, stages=(stage, *event.stages)))
