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
    """The fields of every event.

    Attributes:
        done: parts of the work that are finished, 0 or more.
        total: parts of the work, None where it is not known in advance.
        text: the subject of the event, such as an image or a layer, for people.
        stages: the stages of a larger work that it belongs to, the outermost first; empty where there is one only.

    Example:
        >>> Event(2, 5, "cat", stages=("heatmaps",)).label
        'heatmaps: cat'
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
    """The work begins; `done` is 0.

    Example:
        >>> Started(0, 3, "heatmaps").total
        3
    """


@dataclass(frozen=True)
class Advanced(Event):
    """Part of the work is done; there is no result of it alone.

    Example:
        >>> Advanced(1, 3, "maps").done
        1
    """


@dataclass(frozen=True)
class ItemFinished(Event):
    """An item has its result.

    Attributes:
        item: the result; its type is that of the technique's items.

    Example:
        >>> seen = []
        >>> found = convscope.heatmap(network, PHOTOS[0], progress=seen.append)
        >>> [event.item.image.name for event in seen if isinstance(event, ItemFinished)]
        ['cat']
    """

    item: object = None


Progress = Callable[[Event], object] | None


def tell(progress: Progress, event: Event) -> None:
    """Call `progress` with an event, where there is one.

    Example:
        >>> tell(None, Started(0, 3, "heatmaps"))
        >>> tell(lambda event: print(event.text), Started(0, 3, "heatmaps"))
        heatmaps
    """
    if progress is not None:
        progress(event)


def within(progress: Progress, stage: str) -> Progress:
    """The progress of one stage of a larger work: each event gets the stage's name in front.

    Example:
        >>> progress = within(lambda event: print(event.label), "report")
        >>> progress(Started(0, 3, "heatmaps"))
        report: heatmaps
    """
    if progress is None:
        return None
    return lambda event: progress(replace(event, stages=(stage, *event.stages)))
