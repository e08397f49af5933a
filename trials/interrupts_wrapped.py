"""`interrupts` as a kind of tries: some at once, since starting costs more than a try."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trials.outcomes import FINDINGS, Answer, Place

_AT_ONCE = 100


def attempt(place: Place, runtime: str) -> Answer:
    """Some interrupts on one runtime."""
    from trials import interrupts

    return answered(interrupts.run(_AT_ONCE, 1_000_000 * place.seed + place.number, runtime))


def answered(counts: Any) -> Answer:
    """What `interrupts.run` counted, in the columns of the table."""
    found = counts if isinstance(counts, dict) else vars(counts)
    columns = Counter({name: int(found.get(name, 0)) for name in ("accepted", "refused", *FINDINGS)})
    said = tuple(str(text) for text in found.get("findings", ()))
    column = next((name for name in FINDINGS if columns[name]), "changed")
    return Answer(columns, tuple((column, text) for text in said), int(found.get("tried", _AT_ONCE)))
